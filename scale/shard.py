"""Both players sharded over processes, by PyTorch's FSDP2: torchrun in front of train.py.

    torchrun --nproc-per-node 2 train.py --model FOLDER --data DATA --out runs/mine
    torchrun --nproc-per-node 4 train.py --out runs/mine --resume           # more, or fewer

Every process runs all of train.py. It holds its part of every weight, gradient and moment, and sees
its part of every step's pairs. The first process writes the run; the others write to nowhere.
"""

import contextlib
import copy
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor

import train
from data import PairBatch, groups
from model import Decoder, find_device, read_weights
from scale import guard, lora
from scale.limits import brief


def is_first():
    return dist.get_rank() == 0


# ---- A player and a run, of several processes ----------------------------------------------------

class Player(train.Player):
    @property
    def decoder(self):
        return getattr(self.model, "decoder", self.model)              # an adapter's is inside

    def micro_batches(self, rows):
        """Those of this process. Gradients meet in the last one."""
        own = shares(rows, dist.get_world_size(), self.config.micro_tokens)[dist.get_rank()]
        for number, some in enumerate(own, start=1):
            self.decoder.set_requires_gradient_sync(number == len(own))
            yield PairBatch.from_ids(some).to(self.model.device)

    def logps(self, batch):
        logps = super().logps(batch)
        if not torch.is_grad_enabled():                # no backward pass will take them apart
            self.decoder.reshard()
        return logps

    def backward(self, loss):
        super().backward(loss * dist.get_world_size())                 # FSDP takes the mean

    def gather(self, columns):
        return [part if part is None else gathered(part) for part in columns]

    def norm(self, tensors):
        return super().norm(tensors).full_tensor()


def shares(rows, processes, max_tokens):
    """A step's rows for every process, in lists of at most so many tokens, as data.groups cuts
    them, but as many for all: in each pass all processes put the weights together."""
    [ordered] = groups(rows, None)                     # by length, so that shares are alike
    found = [groups(ordered[rank::processes], max_tokens) for rank in range(processes)]
    for own in found:
        while len(own) < max(map(len, found)):
            longest = max(range(len(own)), key=lambda number: len(own[number]))
            own[longest:longest + 1] = own[longest][::2], own[longest][1::2]
    return found


def gathered(part):
    """(B,) of every process to (B * processes,)."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


class Job(train.Job):
    """All processes do as the first one does, in a folder that is thrown away in the end; only
    `save_player` and checkpoints go to the run's."""
    player = Player
    command = "torchrun --nproc-per-node N train.py"

    @staticmethod
    def models(config, shape, folder):
        """On meta first: no process ever has more of them than its part and one whole tensor."""
        if config.method == "kto_pair":
            raise ValueError("--method kto_pair needs the whole batch in one place: no torchrun")
        if config.batch_size % dist.get_world_size():
            raise ValueError(f"--batch-size {config.batch_size} must be a multiple of the "
                             f"{dist.get_world_size()} processes")
        if folder is not None:
            lora.refuse_adapter(folder)
        device, models = device_of(config), []
        dtype = getattr(torch, config.backbone_dtype if config.lora_rank else "float32")
        while len(models) < 2:
            with torch.device("meta"):
                plain, decoder = Decoder(shape), Decoder(shape).to(dtype)
            if folder is None:
                torch.manual_seed(config.seed)
                values = Decoder(shape).named_parameters()
            else:
                values = read_weights(plain, folder, dtype)
            decoder.gradient_checkpointing = config.gradient_checkpointing
            views = [decoder]
            if config.lora_rank:
                views = lora.adapters(decoder, config)
                values = itertools.chain(values, (
                    (f"{name}.{view.name}.weight", value) for view in views
                    for name, value in lora.first_weights(view, config.seed).items()))
            shard(decoder, config, device)
            fill(decoder, values, device)
            models += views
        return models

    def __init__(self, *fields):
        super().__init__(*fields)
        self.out, self.nowhere = Path(self.config.out), tempfile.TemporaryDirectory()
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, self.made_of)    # by now all know whether there is a run
        for name in self.made_of:
            if len({str(one[name]) for one in every}) > 1:
                raise ValueError(f"the processes do not have the same {name}; give all machines "
                                 "the same files and options")
        if not is_first():
            self.config.out = self.nowhere.name
            (Path(self.config.out) / "checkpoint").mkdir()

    def load(self):
        """Of a run that nobody else writes, by now."""
        for file in (*guard.kept(self.out / "checkpoint"), self.out / "metrics.jsonl"):
            if file.is_file() and not is_first():
                shutil.copy(file, Path(self.config.out) / file.relative_to(self.out))
        dist.barrier()
        return super().load()

    def save_player(self, name):
        player, whole = self.players[name], {}
        for part, value in player.model.state_dict().items():
            value = value.full_tensor()                # of all processes
            if is_first():
                whole[part] = value.cpu().clone()      # without the padding of its parts
        if is_first():
            sharded, player.model = player.model, joined(player.model, whole)
            super().save_player(name)
            player.model = sharded
        dist.barrier()

    def end_of_step(self, step, last):
        told = torch.tensor(self.signal)
        dist.all_reduce(told, dist.ReduceOp.MAX)       # all stop at the same step
        self.signal = told.item()
        super().end_of_step(step, last)

    def save(self, step):
        """Everybody's parts in checkpoint/step-N, and a file beside it that has their checksums."""
        folder = self.out / "checkpoint"
        state, made = self.state()
        try:
            dcp.save(state, checkpoint_id=folder / f"step-{step}")
        except CheckpointException as error:           # of a full disk, say; no Exception
            raise OSError(f"{folder}: {str(error).splitlines()[0]}; the checkpoints before are "
                          "whole") from None
        if is_first():
            for path in (folder / f"step-{step}").iterdir():
                guard.sync(path)
            guard.write_checkpoint(folder, step, {
                "step": step, "made_of": self.made_of, "start": self.start, "made": made,
                "parts": guard.parts(folder, step)})
            there = {path.name.rsplit("-", 1)[0] for path in guard.kept(folder)}
            for old in folder.iterdir():
                if old.is_dir() and old.name not in there:
                    shutil.rmtree(old)
        dist.barrier()

    def agree(self, find):
        found = [find() if is_first() else None]
        dist.broadcast_object_list(found)
        return found[0]

    def go_to(self, saved):
        for name, (steps, has_moments) in saved["made"].items():
            player = self.players[name]
            player.start_at(steps)
            for parameter in player.model.parameters() if has_moments else []:
                first, second = (torch.zeros_like(parameter) for _ in range(2))
                player.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": first, "exp_avg_sq": second}
            if self.config.offload_resting:            # one player's at a time
                from scale.offload import rest
                rest(player.optimizer)
        state, _ = self.state()
        dcp.load(state, checkpoint_id=self.out / "checkpoint" / f"step-{saved['step']}")
        self.start = saved["start"]

    def finish(self):
        """The first process goes on alone, to examine the run."""
        dist.barrier()
        dist.destroy_process_group()
        if self.out != Path(self.config.out):
            raise SystemExit

    def state(self):
        """(what the parts of a checkpoint hold, {player: (steps made, has it moments?)}): tensors,
        which dcp.load fills in place."""
        state, made = {}, {}
        for name, player in self.players.items():
            moments = player.optimizer.state
            made[name] = player.steps, bool(moments)
            state[name] = {part: moments[parameter]
                           for part, parameter in player.model.named_parameters() if moments}
            if name != "sft":                          # its model is the protagonist's
                state[name] |= {"weights": player.model.state_dict()}
        return state, made


# ---- Models --------------------------------------------------------------------------------------

def shard(decoder, config, device):
    """Give every process its part of a decoder's weights. A block's are together while it computes;
    the rest, embeddings and head, while the model does."""
    mesh, policy = init_device_mesh(device.type, (dist.get_world_size(),)), MixedPrecisionPolicy()
    if config.dtype == "bfloat16":                     # products; masters and sums are float32
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in decoder.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(decoder, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(decoder, "hidden")    # response_logps calls it, not forward


def fill(decoder, values, device):
    """Bring whole values, by the names of a plain decoder, to a sharded one on meta."""
    places = dict(decoder.named_parameters())
    names, found = {name.replace(".base_layer", ""): name for name in places}, {}
    for name, value in values:
        place = places[names[name]]
        part = distribute_tensor(value.detach().to(device), place.device_mesh, place.placements,
                                 src_data_rank=None)   # every process has read it
        local = part.to_local().clone()                # of its own: the whole one can go
        found[names[name]] = DTensor.from_local(local, place.device_mesh, place.placements,
                                                shape=part.shape, stride=part.stride())
    decoder.load_state_dict(found, assign=True)


def joined(model, weights):
    """What writes the files of a sharded model, of these whole weights."""
    if isinstance(model, Decoder):
        with torch.device("meta"):
            plain = Decoder(model.config)
        plain.load_state_dict(weights, assign=True)
    else:
        plain = copy.copy(model)                       # an adapter
        plain.state_dict = lambda: weights
    return plain


def device_of(config):
    """This process' own: one of the machine's GPUs, or the CPU."""
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"torchrun gives every process a device of its own; leave out --device "
                         f"{config.device}")
    device = find_device(config.device)
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device


# ---- The processes -------------------------------------------------------------------------------

def main(arguments=None):
    """train.py, in this process."""
    if torch.cuda.is_available():                      # before any of them is spoken to
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if os.environ["LOCAL_RANK"] == "0":
        shutil.rmtree(SAID, ignore_errors=True)        # of a parent that had the same number
    dist.barrier()
    signal.signal(signal.SIGTERM, lambda *_: died(143))        # before and after the training
    first = is_first()
    if not first:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    try:
        train.main(arguments, Job)
    except SystemExit as stop:
        if stop.code in (1, 2) and not first:          # the first one refuses as well, and has said
            time.sleep(3)                              # why by then; or else this process says it
            died(stop.code, f"train.py: {brief(str(stop.__context__))}")
        if stop.code:
            SAID.mkdir(exist_ok=True)
        raise
    except RuntimeError as error:                      # gloo and nccl have nothing narrower
        if not re.search("(?i)connection|peer|timed out|nccl", str(error)):
            raise
        died(1)


def died(code, sentence="\ntrain.py: a process of this run has died; the same torchrun command "
                        "with --out and --resume goes on from the last checkpoint"):
    """One process of a machine says so."""
    with contextlib.suppress(FileExistsError):
        SAID.mkdir()
        print(sentence, file=sys.__stderr__, flush=True)
    os._exit(code)


SAID = Path(tempfile.gettempdir(), f"iopo-{os.getppid()}")     # torchrun's number
