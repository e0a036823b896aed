"""Train one method: SFT where there is no model yet, then the turns of Algorithm 1.

    python train.py                                       # IOPO on the safe world, on a laptop
    python train.py --method dpo --out runs/dpo           # any baseline, by the same loop
    python train.py --model MODEL --data DATA --out runs/mine     # paths, or names on the hub
    python train.py --out runs/mine --resume              # goes on where a killed run stopped
"""

import argparse
import copy
import dataclasses
import inspect
import json
import os
import sys
import typing
from pathlib import Path

import torch
from tqdm import tqdm

from data import (SafeWorld, Tokenizer, batches, encode_pairs, find_source, micro_batches,
                  read_object, replace_file)
from iopo import ADVERSARIES, LOSSES, iopo_weight, preference_margin, turns
from model import Decoder, DecoderConfig, find_device, response_logps
from scale import guard, limits


def option(default, help, **more):
    """A field of Config. `more`: choices; least, above, below; world and own: what None becomes."""
    shown = "{world} in the safe world, with --data {own}" if "world" in more else str(default)
    bounds = [f"; {name} {more[name]}" for name in ("least", "above", "below") if name in more]
    help += f" (default {shown.format(**more)}{''.join(bounds)})"
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass
class Config:
    """All options of a run. What is None is resolved when the run starts, and printed."""
    method: str = option("iopo", "what to train", choices=tuple(LOSSES))
    model: str | None = option(None, "the start: a folder or hub name; else a new small one")
    data: str | None = option(None, "pairs: a file, folder or hub name; else the safe world")
    held_out: str | None = option(None, "such data, to evaluate on; --data's test split is unused")
    leave_out: str | None = option(None, "leave out rows whose `source` has one of these: a,b,c")
    out: str | None = option(None, "run folder; a new numbered one under runs/ if not given")
    seed: int = option(0, "of safe world, first weights and the order of the pairs", least=0)
    beta: float = option(0.1, "the reward's scale beta", above=0)
    eps: float = option(0.3, "the clip's half width epsilon", above=0, below=1)
    clip: str = option("min", "reading of Eq. 12", choices=("min", "two_sided", "none"))
    ratio: str = option("sequence", "reading of Eq. 11",
                        choices=("sequence", "length_normalized", "env", "one"))
    adversary: str = option("swapped", "how the adversary reads a pair", choices=tuple(ADVERSARIES))
    alpha: float = option(0.07, "AIPO's extra weight of the reference", least=0)
    lam: float = option(0.2, "AIPO's weight of the likelihood term", least=0)
    n_iter: int = option(6, "iterations N_iter of Algorithm 1", least=0)
    n_mu: int = option(25, "protagonist's optimiser steps per iteration, N_mu", least=0)
    n_nu: int = option(25, "adversary's, N_nu; 0: it never trains, ENV stays the start", least=0)
    sft_steps: int | None = option(None, "steps of SFT before that", least=0, world=400, own=0)
    sft_lr: float | None = option(None, "learning rate of SFT", above=0, world=1.5e-3, own=2e-5)
    lr: float | None = option(None, "learning rate of both players", above=0, world=5e-5, own=2e-7)
    batch_size: int = option(32, "pairs per optimiser step", least=1, below=10**6)
    max_length: int | None = option(None, "tokens of prompt + answer; a longer prompt loses its "
                                    "left side", least=2, world=64, own="the model's, up to 1024")
    micro_tokens: int | None = option(1536, "tokens of a forward pass; fewer: less memory", least=1)
    gradient_checkpointing: bool = option(False, "compute layers twice: less memory, more time")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: cuda where there is one, else cpu")
    dtype: str = option("float32", "of matrix products", choices=("float32", "bfloat16"))
    lora_rank: int | None = option(None, "rank of both players' adapters", least=1, below=10**5)
    backbone_dtype: str = option("float32", "of the frozen model", choices=("float32", "bfloat16"))
    offload_resting: bool = option(False, "moments of the player that rests go to CPU memory")
    look_every: int = option(0, "steps between looks at held-out pairs; 0: none", least=0)
    save_every: int = option(100, "steps between checkpoints; 0: only the last", least=0)
    eval_prompts: int = option(100, "prompts of the closing table; 0: margins only", least=0)
    lr_was: str | None = None   # no option: what --resume --lr has changed


# ---- Algorithm 1: the loop, one step, a player ---------------------------------------------------

def train(job, look=None):
    """Algorithm 1 in the run folder, from its checkpoint if it has one. Every --look-every steps
    what `look(job, step, iteration, player)` returns joins the step's row of metrics.jsonl."""
    config, look = job.config, look or held_out_look
    sft, mu, nu = (job.players[name] for name in ("sft", "protagonist", "adversary"))
    roles = {"sft": (sft, None),                 # mu alone, on chosen answers; its copy is then nu
             "protagonist": (mu, nu),            # lines 3 to 5: AGENT mu, ENV nu
             "adversary": (nu, mu)}              # lines 8 to 10: AGENT nu, ENV mu
    schedule = [(0, "sft")] * config.sft_steps + [*turns(config.n_iter, config.n_mu, config.n_nu)]
    done, file = job.load()
    if done == config.sft_steps:                 # no SFT, or a resumed run has just ended it
        begin(job)
    with file, tqdm(total=len(schedule), initial=done) as bar:
        for step, (iteration, name) in enumerate(schedule[done:], done + 1):   # Algorithm 1, line 1
            agent, env = roles[name]
            metrics = optimizer_step(agent, env, next(agent.pairs), config)
            if step == config.sft_steps:
                begin(job)
            if config.look_every and step % config.look_every == 0:
                metrics |= look(job, step, iteration, name)
            log(file, bar, {"step": step, "iteration": iteration, "player": name, **metrics})
            job.end_of_step(step, len(schedule))
    job.save_player("protagonist")                                              # line 12
    if config.n_nu:
        job.save_player("adversary")


def optimizer_step(agent, env, rows, config):
    """One step of AGENT on the mean loss over all `rows`, in micro-batches, with ENV frozen.
    ENV reads AGENT's micro-batches: so equal weights give equal log-probabilities, bit for bit."""
    seen = []
    for batch in agent.micro_batches(rows):
        with torch.no_grad():                                       # ENV is frozen here
            env_logps = (None, None) if agent.loss == "sft" else env.logps(batch)   # (B,), (B,)
        logps = agent.logps(batch)                                  # (B,), (B,)
        loss, known = LOSSES[agent.loss], {**vars(config), **vars(batch)}   # beta, ..., lengths
        options = {name: known[name] for name in inspect.getfullargspec(loss).kwonlyargs}
        losses = agent.sign * loss(*logps, *env_logps, **options)   # (B,)
        agent.backward(losses.sum() / len(rows))
        seen.append((losses, *logps, *env_logps, batch.rejected_lengths))
    columns = [None if part[0] is None else torch.cat(part).detach() for part in zip(*seen)]
    metrics = measure(agent.loss, config, *agent.gather(columns))
    return {**metrics, "grad_norm": agent.update(metrics["loss"])}


class Player:
    """A model, its optimiser, the pairs as it reads them, and how many steps it has made.

    AdamW at a constant rate, without decay; moments are kept across turns. Every player has its own
    stream of pairs: mu sees the same ones whatever nu does. SFT's rows have no rejected answer."""
    largest = 1e6               # norm of all weights that is saved; in a model of 7B it is near 2e3

    def __init__(self, model, rows, loss, lr, config, sign=+1):
        self.model, self.rows, self.loss, self.sign, self.config = model, rows, loss, sign, config
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
        self.start_at(0)

    def start_at(self, steps):
        self.steps = steps
        self.pairs = batches(self.rows, self.config.batch_size, self.config.seed, start=steps)

    def micro_batches(self, rows):
        return micro_batches(rows, self.config.micro_tokens, self.model.device)

    def logps(self, batch):
        """log pi(y_w|x) and log pi(y_l|x) of a PairBatch, (B,) each, float32."""
        half = self.config.dtype == "bfloat16"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=half):
            return response_logps(self.model, batch)

    def backward(self, loss):
        loss.backward()

    def gather(self, columns):
        """Tensors of all a step's pairs, from those of the pairs that this process has seen."""
        return columns

    def norm(self, tensors):
        return torch.nn.utils.get_total_norm(tensors)

    def update(self, loss):
        """One optimiser step, or BadStep; returns the gradient's norm before its clip at 1."""
        parameters, self.steps = [*self.model.parameters()], self.steps + 1
        norm = self.norm([parameter.grad for parameter in parameters])
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        size = self.norm(parameters)
        if not (abs(loss) < float("inf") and norm.isfinite() and size < self.largest):
            raise guard.BadStep(self, loss, norm, size)
        return norm.item()


def measure(loss, config, losses, chosen, rejected, env_chosen, env_rejected, lengths):
    """A step's row of metrics.jsonl, from AGENT before its update; README.md says what each is."""
    metrics = {"loss": losses.mean(), "chosen_logps": chosen.mean()}
    logps = chosen, rejected, env_chosen, env_rejected
    if loss != "sft":
        margin = preference_margin(*logps, config.beta)
        metrics |= {"rejected_logps": rejected.mean(), "margin": margin.mean(),
                    "margin_std": margin.std(correction=0), "accuracy": (margin > 0).float().mean()}
    if loss == "iopo":
        readings = {"eps": config.eps, "ratio": config.ratio, "rejected_lengths": lengths}
        ratio, log_ratio = iopo_weight(*logps, clip="none", **readings), rejected - env_rejected
        clipped = iopo_weight(*logps, clip=config.clip, **readings) != ratio
        guarded = (log_ratio.exp() == 0) | log_ratio.exp().isinf()
        metrics |= {"ratio": ratio.mean(), "log_ratio": log_ratio.mean(),
                    "log_ratio_max": log_ratio.max(), "clipped": clipped.float().mean(),
                    "guarded": guarded.sum()}
    return {name: value.item() for name, value in metrics.items()}


def begin(job):
    """The turns begin: nu becomes a copy of mu, the SFT model, saved if it is nowhere on disk."""
    sft, nu = job.players["sft"], job.players["adversary"]
    nu.model.load_state_dict(sft.model.state_dict())
    sft.optimizer.state.clear()
    if job.config.sft_steps or job.config.model is None:
        job.save_player("sft")
    if job.config.look_every:
        job.start = held_out_logps(job)


def held_out_look(job, step, iteration, player):
    """The protagonist's margin and accuracy on held-out pairs, against the start."""
    if player == "sft":                                             # there is no start yet
        return {}
    margin = preference_margin(*held_out_logps(job), *job.start, job.config.beta)
    return {"held_out_margin": margin.mean().item(),
            "held_out_accuracy": (margin > 0).float().mean().item()}


@torch.no_grad()
def held_out_logps(job):
    """(2, n): the protagonist's log pi(y_w|x) and log pi(y_l|x) of the held-out pairs."""
    mu = job.players["protagonist"]
    parts = [torch.stack(mu.logps(batch)) for batch in micro_batches(                   # (2, B)
        job.held_out, job.config.micro_tokens or Config.micro_tokens, mu.model.device)]
    return torch.cat(parts, dim=1).cpu()


# ---- The run folder ------------------------------------------------------------------------------

def find_run(given, resume):
    """The options of the run in `out`, None where there is none; gives a new run a number there."""
    if resume and "out" not in given:
        raise ValueError("--resume needs --out, the run to go on with")
    names = (f"runs/{given.get('method', Config.method)}-{k}" for k in range(1, sys.maxsize))
    out = Path(given.setdefault("out", next(name for name in names if not Path(name).exists())))
    if not out.exists() or out.is_dir() and {path.suffix for path in out.iterdir()} <= {".partial"}:
        return None
    if not resume:
        raise ValueError(f"--out {out} exists and is not empty; take another one, or --resume")
    path = out / "config.json"
    found = read_object(path, path.read_bytes()) if path.is_file() else {}
    if found.keys() != vars(Config()).keys() or vars(make_config(found, {})) != found:
        raise ValueError(f"--out {out} has no config.json of this version of the code; go on with "
                         "it by the version that began it")
    return found | {name: given[name] for name in {*guard.FREE, "lr"} & given.keys()}


@dataclasses.dataclass
class Job:
    """A run: what trains, and its folder. scale/shard.py has another kind, of several processes."""
    config: Config
    tokenizer: Tokenizer
    players: dict                       # "sft" and "protagonist", of one model, and "adversary"
    held_out: list                      # rows that --look-every looks at
    made_of: dict                       # what decides results: options, hashes of what was read
    origins: list                       # file and line of the training pairs, of SFT's own pairs
    start: torch.Tensor | None = None   # held_out_logps of the SFT model
    signal = heard = 0                  # the last signal to the run, to this process; 0: none
    player = Player                     # the class of its players
    command = "python train.py"         # what goes on with it

    @staticmethod
    def models(config, shape, folder):
        """The protagonist's and the adversary's, alike: of a folder, or new ones without one."""
        torch.manual_seed(config.seed)
        dtype = getattr(torch, config.backbone_dtype if config.lora_rank else "float32")
        model = Decoder.from_pretrained(folder, dtype) if folder else Decoder(shape)
        model.to(find_device(config.device))
        model.gradient_checkpointing = config.gradient_checkpointing
        if config.lora_rank:
            from scale.lora import adapters
            return adapters(model, config)
        return model, copy.deepcopy(model)

    def agree(self, find):
        """What the first process finds, for all processes; here there is one."""
        return find()

    def finish(self):
        """What there is to do after training, before the run is examined: nothing."""

    def save_player(self, name):
        """A Hugging Face folder, complete or not there at all."""
        with guard.whole_folder(Path(self.config.out) / name) as folder:
            self.players[name].model.save_pretrained(folder)
            self.tokenizer.save(folder)

    def end_of_step(self, step, last):
        """Save every --save-every steps, after the last, and where a signal says to stop."""
        every = self.config.save_every
        if self.signal or step == last or every and step % every == 0:
            self.save(step)
        if self.signal:
            raise guard.Stopped(self.signal)

    def save(self, step):
        """All that a resumed run cannot work out from its config, and what it was made of."""
        guard.write_checkpoint(Path(self.config.out) / "checkpoint", step, {
            "step": step, "made_of": self.made_of, "start": self.start, "players": {
                name: (player.model.state_dict(), player.optimizer.state_dict(), player.steps)
                for name, player in self.players.items()}})

    def load(self):
        """Go to the last whole checkpoint: (its step, metrics.jsonl up to it, open to go on)."""
        state, rows = guard.read_checkpoint(self)
        if state is not None:
            self.go_to(state)
        out, text = Path(self.config.out), json.dumps(vars(self.config), indent=2) + "\n"
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "config.json", text.encode())           # --lr or --device may be new
        metrics = out / "metrics.jsonl"
        replace_file(metrics, b"".join(rows))
        return len(rows), metrics.open("a", buffering=1)             # by lines

    def go_to(self, state):
        for name, player in self.players.items():
            weights, moments, made = state["players"][name]
            player.model.load_state_dict(weights)
            own = player.optimizer.state_dict()["param_groups"]          # of today's --lr
            player.optimizer.load_state_dict({**moments, "param_groups": own})
            player.start_at(made)
        self.start = state["start"]


def log(file, bar, row):
    """A step's row of metrics.jsonl, and the bar, where a look stands until the next."""
    file.write(json.dumps(row) + "\n")
    guard.warn(bar, row)
    shown = {name: row[name] for name in ("loss", "margin", "ratio") if name in row}
    bar.set_postfix({"of": f"{row['player']} {row['iteration']}", **shown})
    if "held_out_margin" in row:
        bar.set_description("held out: margin {held_out_margin:.3f}, accuracy "
                            "{held_out_accuracy:.3f}".format(**row))
    bar.update()


# ---- The command line: whatever can be wrong is found before anything is written -----------------

WORLD_PAIRS, LOOKED_AT = 3000, 200
WORLD_MODEL = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, head_dim=16,
                   num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
SWITCHES = dict(resume="go on with --out", plan="print the bill, no run", anyway="without room too")
IDLED = [("ratio", "one", ("eps", "clip")), ("clip", "none", ("eps",)),
         ("n_nu", 0, ("adversary", "offload_resting")), ("sft_steps", 0, ("sft_lr",)),
         ("n_iter", 0, ("n_mu", "n_nu", "lr", "beta")), ("lora_rank", None, ("backbone_dtype",))]


def prepare(config, kind=Job, plan=False, anyway=False):
    """A Job: reads everything, writes nothing; with `plan` it ends where the bill is printed."""
    if config.data is None:
        world = SafeWorld(config.seed)
        pairs, held_out = world.pairs("train", WORLD_PAIRS), world.pairs("validation", LOOKED_AT)
        drafts = world.drafts("train", WORLD_PAIRS if config.sft_steps else 0)
    else:
        pairs, held_out, note = limits.load_data(config.data, config.held_out, config.leave_out)
        drafts = []
        print(note)
    tokenizer, shape, folder = find_start(config)
    (rows, held_out, drafts), kept, reports = zip(*(
        encode_pairs(some, tokenizer, config.max_length) for some in (pairs, held_out, drafts)))
    drawn = f"\nwritten answers, for SFT: {reports[2]}" if drafts else ""
    epoch = f"{len(rows) / config.batch_size:.1f} steps an epoch"
    print(f"training pairs, {epoch}: {reports[0]}\nheld out: {reports[1]}{drawn}")
    if not rows or config.look_every and not held_out:
        raise ValueError("no usable pair is left to train on or to look at, as counted above")
    held_out = held_out[:LOOKED_AT] if config.look_every else []
    made_of = guard.ingredients(kind, config, shape, folder, (rows, drafts), held_out)
    sft_rows = [(prompt, answer, None) for prompt, *answers in drafts for answer in answers]
    sft_rows = sft_rows or [(prompt, w, None) for prompt, w, _ in rows]
    if plan or config.model is not None:                            # a new model is small
        from scale.plan import review
        review(config, shape, rows, plan, anyway)
    model, other = kind.models(config, shape, folder)
    exchange, sign = ADVERSARIES[config.adversary]
    theirs = [(prompt, l, w) for prompt, w, l in rows] if exchange else rows
    players = {"sft": kind.player(model, sft_rows, "sft", config.sft_lr, config),
               "protagonist": kind.player(model, rows, config.method, config.lr, config),
               "adversary": kind.player(other, theirs, config.method, config.lr, config, sign)}
    if config.offload_resting:
        from scale.offload import take_turns
        take_turns(players)
    return kind(config, tokenizer, players, held_out, made_of,
                [[pair.origin for pair in some] for some in kept[::2]])


def find_start(config):
    """(tokenizer, DecoderConfig, folder or None) of the first model; resolves --max-length."""
    tokenizer = world = SafeWorld.tokenizer()
    folder, shape = None, DecoderConfig(
        world.largest_id + 1, eos_token_id=world.eos_id, bos_token_id=world.bos_id, **WORLD_MODEL)
    if config.model is not None:
        folder = find_source(config.model)
        tokenizer, shape = limits.Tokenizer.from_pretrained(folder), DecoderConfig.from_json(
            folder / "config.json")
    ids, context = shape.vocab_size, shape.max_position_embeddings
    config.max_length = config.max_length or min(context, 1024)
    if config.data is None and tokenizer.files["tokenizer.json"] != world.files["tokenizer.json"]:
        raise ValueError(f"--model {config.model} needs --data: it is no model of the safe world")
    if tokenizer.largest_id >= ids:
        raise ValueError(f"{config.model}: its tokenizer has more ids than the embeddings, {ids}")
    if config.max_length > context:
        raise ValueError(f"--max-length {config.max_length}: the model has {context} positions")
    return tokenizer, shape, folder


def flag_of(name):
    return "--" + name.replace("_", "-")


def make_config(options, given=None):
    """Config, all resolved that needs no look at the model; `given`: what the user asks for."""
    config, given = Config(**options), options if given is None else given
    if config.sft_steps is None and config.model is not None:       # it is an SFT model
        config.sft_steps = 0
    for field in dataclasses.fields(Config):
        check(field, getattr(config, field.name))
        default = field.metadata.get("world" if config.data is None else "own")
        if getattr(config, field.name) is None and isinstance(default, (int, float)):
            setattr(config, field.name, default)
    for name, other in (("data", "model"), ("leave_out", "data"), ("held_out", "data"),
                        ("lora_rank", "model")):
        if getattr(config, name) is not None and getattr(config, other) is None:
            raise ValueError(f"{flag_of(name)} needs {flag_of(other)}")
    if config.sft_steps + config.n_iter * (config.n_mu + config.n_nu) > 10**6:
        raise ValueError("a run has at most a million steps; fewer --n-iter, --n-mu, --sft-steps")
    if config.lora_rank and config.sft_steps:
        raise ValueError("--lora-rank needs --sft-steps 0: train its SFT model by --method sft")
    if config.lora_rank and config.backbone_dtype != "float32" and config.dtype == "float32":
        raise ValueError("--backbone-dtype bfloat16 needs --dtype bfloat16: it multiplies so")
    read = {method: {*inspect.getfullargspec(loss).kwonlyargs, "micro_tokens"}
            for method, loss in LOSSES.items()}
    read["iopo"] |= {"n_nu", "adversary"}
    read["kto_pair"] -= {"micro_tokens"}                            # its batch term: a single pass
    unread = set().union(*read.values()) - read[config.method]
    for name in sorted(unread & given.keys()):
        raise ValueError(f"{flag_of(name)} is never read by --method {config.method}; leave it out")
    config.n_nu = 0 if "n_nu" in unread else config.n_nu
    config.micro_tokens = None if "micro_tokens" in unread else config.micro_tokens
    return config


def check(field, value):
    """Refuse a value that is not of its field's type, or none of its choices, or out of range."""
    kinds, bounds = typing.get_args(field.type) or (field.type,), field.metadata
    fits = type(value) in kinds or type(value) is int and float in kinds
    if fits and type(value) in (int, float):
        fits = bounds.get("least", value) <= value < bounds.get("below", 2**63)
        fits = fits and value > bounds.get("above", -1)
    if not fits or value not in bounds.get("choices", [value]):
        raise ValueError(f"{flag_of(field.name)} cannot be {value!r}: {bounds.get('help')}")


def parse_arguments(arguments):
    """The options given and the three switches; the other flags are made of Config's fields."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,   # refusals: one sentence
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, help in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", default=False, help=help)
    for field in [field for field in dataclasses.fields(Config) if field.metadata]:
        kind, *_ = typing.get_args(field.type) or (field.type,)
        more = {"action": "store_true"} if kind is bool else {
            "type": kind, "choices": field.metadata.get("choices")}
        parser.add_argument(flag_of(field.name), help=field.metadata["help"], **more)
    return vars(parser.parse_args(arguments))


def main(arguments=None, kind=Job):
    try:
        given = parse_arguments(arguments)
        resume, plan, anyway = [given.pop(name) for name in SWITCHES]
        found = find_run(given, resume)
        config = make_config(found or given, given)
        for name, own in vars(config).items():
            if given.get(name, own) != own:
                raise ValueError(f"{flag_of(name)} {given[name]} differs from the run's own, {own}")
        if found and Path(config.out, "adversary" if config.n_nu else "protagonist").is_dir():
            print(f"{config.out} is finished; examine it by: python eval.py {config.out}")
            return
        job = prepare(config, kind, plan, anyway)
        print(" ".join(f"{name}={value}" for name, value in vars(config).items()), flush=True)
        idle = [f"{flag_of(name)} (by {flag_of(by)} {value})" for by, value, names in IDLED
                for name in names if name in given and getattr(config, by) == value]
        if idle:
            print(f"without effect in this run: {', '.join(idle)}", flush=True)
        with guard.guarded(job, new=not found):
            train(job)
        job = None                                                  # eval.py loads one at a time
        import eval
        eval.main(["--device", config.device, "--", config.out])    # the closing table
    except KeyboardInterrupt:                                       # not while it trains
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:  # to be told
        print(f"train.py: {limits.brief(str(error))}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None


if __name__ == "__main__":
    limits.console()
    if "TORCHELASTIC_RUN_ID" in os.environ:                         # torchrun started it
        from scale import shard
        sys.exit(shard.main())
    main()
