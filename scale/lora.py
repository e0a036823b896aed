"""Both players as low-rank adapters (LoRA) on one frozen backbone, by peft.

    python train.py --model FOLDER --data DATA --out runs/mine --lora-rank 16
    python -m scale.lora runs/mine/protagonist merged        # a plain model, the adapter added in

A projection W of the backbone becomes W + 2 B A, with A (R, in) and B (out, R) of the player who is
asked. B starts at 0, so both players start at the backbone. A saved player is a peft folder:
peft.PeftModel.from_pretrained puts it onto the same backbone in transformers.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from data import find_source
from model import Decoder, checkpoint_names, read_file, read_tensor

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SCALE = 2                                   # alpha / R
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = "base_model.model.{}.lora_{}.weight"          # its name in a peft folder
OTHERS = ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "layer_replication",
          "modules_to_save", "use_qalora")             # of peft: another function than W + 2 B A
INSTALL = "pip install -r scale/requirements.txt"


def adapters(decoder, config):
    """The protagonist's and the adversary's view of a decoder, whose own weights are frozen."""
    try:
        from peft import LoraConfig
        from peft.functional import cast_adapter_dtype, inject_adapter_in_model
    except ImportError:
        raise ValueError(f"--lora-rank needs peft: {INSTALL}") from None
    here = Path(config.model)
    refuse_adapter(here)
    base, views = str(here.resolve()) if here.exists() else config.model, []
    for name in ("protagonist", "adversary"):
        own = LoraConfig(**lora_options(config.lora_rank, PROJECTIONS))
        inject_adapter_in_model(own, decoder, name)
        del decoder.peft_config                        # peft would warn of the second adapter
        cast_adapter_dtype(decoder, name)              # float32, whatever the backbone is
        views.append(Adapted(decoder, name, base, config.lora_rank))
        if decoder.device.type != "meta":              # else scale/shard.py brings them
            views[-1].load_state_dict(first_weights(views[-1], config.seed))
    return views


def refuse_adapter(folder):
    if (Path(folder) / CONFIG).is_file():
        raise ValueError(f"--model {folder} is an adapter itself; make it a plain model by "
                         f"python -m scale.lora {folder} FOLDER")


def first_weights(view, seed):
    """{name: A or B}: A as peft draws it, but the same for both players, and B 0."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, parameter in view.named_parameters():
        found[name] = torch.zeros(parameter.shape)
        if name.endswith("lora_A"):
            torch.nn.init.kaiming_uniform_(found[name], a=math.sqrt(5), generator=generator)
    return found


def lora_options(rank, modules):
    return {"r": rank, "lora_alpha": SCALE * rank, "lora_dropout": 0.0, "bias": "none",
            "target_modules": modules, "task_type": "CAUSAL_LM"}


def patterns(ranks):
    """Of modules whose rank is another, {name: rank}; SCALE stays."""
    return {"rank_pattern": ranks,
            "alpha_pattern": {name: SCALE * rank for name, rank in ranks.items()}}


class Adapted:
    """A decoder under one of its adapters: what a Player takes for a model. Weights, here and in
    its files, are the adapter's alone.

    Which adapter acts is a state of the decoder, so every use begins by setting it. The backward
    pass may compute layers again; it comes to `hidden` before them, where a hook sets it too."""

    def __init__(self, decoder, name, base, rank):
        self.decoder, self.name, self.base, self.rank = decoder, name, base, rank
        self.config, self.head = decoder.config, decoder.head

    def use(self, *_):
        if getattr(self.decoder, "adapter", None) != self.name:
            from peft.functional import set_adapter
            set_adapter(self.decoder, self.name)
            self.decoder.adapter = self.name

    def hidden(self, *inputs):
        self.use()
        hidden = self.decoder.hidden(*inputs)                                       # (B, Q, D)
        if hidden.requires_grad:
            hidden.register_hook(self.use)
        return hidden

    @property
    def device(self):
        return self.decoder.device

    def named_parameters(self):
        """("layer.lora_A", A), ("layer.lora_B", B), ..."""
        end = f".{self.name}.weight"
        return [(name.removesuffix(end), parameter)
                for name, parameter in self.decoder.named_parameters() if name.endswith(end)]

    def parameters(self):
        return [parameter for _, parameter in self.named_parameters()]

    def state_dict(self):
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, weights):
        for name, parameter in self.named_parameters():
            parameter.copy_(weights[name])

    def save_pretrained(self, folder):
        """Projections that the checkpoint stacks into one, such as Baichuan2's W_pack, are one in
        the peft folder: their A below each other, their B along a diagonal, a multiple of R."""
        from peft import LoraConfig
        from safetensors.torch import save_file
        stored, parts, tensors, ranks = self.config.family.get("stored", {}), {}, {}, {}
        for name, weight in self.state_dict().items():
            layer, which = name.rsplit(".lora_", 1)
            there = ".".join(stored.get(part, part) for part in layer.split("."))
            parts.setdefault((there, which), []).append(weight.cpu())
        for (there, which), some in parts.items():
            joined = torch.cat(some) if which == "A" else torch.block_diag(*some)
            tensors[TENSOR.format(there, which)] = joined.contiguous()
            if which == "A" and len(some) > 1:
                ranks[there.rsplit(".", 1)[1]] = len(joined)
        modules = sorted({there.rsplit(".", 1)[1] for there, _ in parts})
        own = LoraConfig(**lora_options(self.rank, modules), **patterns(ranks),
                         base_model_name_or_path=self.base, inference_mode=True)
        own.save_pretrained(folder)
        self.config.to_json(Path(folder) / "config.json", torch.float32)   # the backbone's
        save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})


# ---- An adapter added in -------------------------------------------------------------------------

@torch.no_grad()
def merged(folder):
    """The decoder W + 2 B A of a peft folder that train.py saved, float32."""
    config = read_file(Path(folder) / CONFIG)
    rank, base, ranks = map(config.get, ("r", "base_model_name_or_path", "rank_pattern"))
    ours = (type(rank) is int and isinstance(base, str) and isinstance(ranks, dict)
            and {*map(type, ranks.values())} <= {int})
    if ours:
        expected = {"peft_type": "LORA", **lora_options(rank, config.get("target_modules")),
                    **patterns(ranks)}
        ours = expected.items() <= config.items() and not any(map(config.get, OTHERS))
    if not ours:
        raise ValueError(f"{folder}: no adapter that train.py saved; peft can merge others")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(f"{folder}: its backbone {base} is not there; write where it is into "
                         f"base_model_name_or_path of {CONFIG}")
    model, path = Decoder.from_pretrained(find_source(base)), Path(folder) / WEIGHTS
    weights, left = model.state_dict(), {*read_file(path)}
    for there, parts in checkpoint_names(model).items():
        names = [TENSOR.format(there.removesuffix(".weight"), which) for which in "AB"]
        if names[0] in left:
            rows, columns = [len(weights[part]) for part in parts], weights[parts[0]].shape[-1]
            shapes = (rank * len(parts), columns), (sum(rows), rank * len(parts))
            A, B = (read_tensor(path, *both).float() for both in zip(names, shapes))
            for part, update in zip(parts, (SCALE * B @ A).split(rows)):
                weights[part] += update                # of the model: state_dict makes no copies
            left -= {*names}
    if left:
        raise ValueError(f"{path}: tensor {min(left)} does not fit the backbone {base}")
    return model


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m scale.lora", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file: None             # errors are one sentence
    parser.add_argument("adapter", help="the folder of a player that --lora-rank trained")
    parser.add_argument("out", help="folder of the plain model, a new one")
    options = parser.parse_args(arguments)
    try:
        if Path(options.out).exists():
            raise ValueError(f"{options.out} exists; take another one")
        if not Path(options.adapter, CONFIG).is_file():
            raise ValueError(f"{options.adapter}: has no {CONFIG}; name a player of a run, such as "
                             "runs/mine/protagonist")
        from scale.guard import whole_folder
        from scale.limits import Tokenizer
        tokenizer, model = Tokenizer.from_pretrained(options.adapter), merged(options.adapter)
        with whole_folder(Path(options.out)) as folder:
            model.save_pretrained(folder)
            tokenizer.save(folder)
    except (ValueError, OSError) as error:
        print(f"scale.lora: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
