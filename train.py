"""Train one method: SFT where there is no model yet, then the turns of Algorithm 1.

    python train.py                                                  # IOPO on the safe world, on a laptop
    python train.py --method dpo --out runs/dpo                      # any baseline, by the same loop
    python train.py --model MODEL --data DATA --out runs/mine        # folders, files or names on the Hugging Face hub
    python train.py --out runs/mine --resume                         # goes on where a killed run stopped

One loop serves every method: a method is a loss, the schedule, and where its pairs come from. Whose turn it is
and which pairs a step sees follow from the step's number and the seed alone, so a checkpoint is the weights,
the optimisers' moments and one number.
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import operator
import os
import shutil
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (Pair, SafeWorld, Tokenizer, batches, encode_pairs, find_source, load_data, micro_batches,
                  replace_file)
from iopo import ADVERSARIES, LOSSES, clip_ratio, importance_ratio, preference_margin, ratio_terms, turns
from model import Decoder, DecoderConfig, find_device, generate, response_logps


# ----------------------------------------------------------------------------------------------------------
# What can be asked for

@dataclass(frozen=True)
class Method:
    """What --method names: the loss, the options it fixes, its own defaults, and whether it looks at ENV at all."""
    loss: str
    fixed: dict
    defaults: dict = dataclasses.field(default_factory=dict)
    env: bool = True


OFFLINE = {"n_nu": 0, "rounds": 0}
METHODS = {"iopo": Method("iopo", {"rounds": 0}),
           "dpo": Method("dpo", OFFLINE),
           "hinge": Method("hinge", OFFLINE),
           "ipo": Method("ipo", OFFLINE),
           "kto_pair": Method("kto_pair", {**OFFLINE, "micro_tokens": None}),    # its batch term needs a single pass
           "aipo": Method("aipo", {"n_nu": 0}, {"rounds": 0, "keep": 1.0}),
           "iter_dpo": Method("dpo", {"n_nu": 0}, {"rounds": 3, "keep": 0.2}),
           "sft": Method("sft", OFFLINE, env=False)}

WORLD_PAIRS = 3000
ROUND_VISITS = 4            # how often a round asks every prompt
ROUND_TEMPERATURE = 1.0     # at which it samples the answers
ROUND_ROWS = 240            # answers sampled in one batch
WORLD_MODEL = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=16, max_position_embeddings=128)


LIMITS = {"least": (operator.ge, "at least"), "above": (operator.gt, "above"), "below": (operator.lt, "below"),
          "most": (operator.le, "at most")}


def option(default, help, **more):
    """A field of Config. `more`: choices, limits (see LIMITS), or two defaults for None: world, and own (your data)."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass
class Config:
    """Every option and its default, once. A None is resolved when the run starts, and printed."""
    method: str = option("iopo", "what to train", choices=METHODS)
    model: str | None = option(None, "checkpoint to start from, a folder or a name on the Hugging Face hub; without it "
                               "a new small one")
    data: str | None = option(None, "preference pairs: .json, .jsonl, .jsonl.gz or .parquet, a folder of these, or a "
                              "name on the hub (needs --model); without it the safe world")
    leave_out: str | None = option(None, "leave out the rows of --data whose `source` contains this, or one of several "
                                   "separated by commas")
    out: str | None = option(None, "run folder; a new numbered one under runs/ if not given")
    seed: int = option(0, "of the safe world, the first weights and the order of the pairs", least=0, below=2**63)
    beta: float = option(0.1, "the reward's scale beta", above=0)
    eps: float = option(0.3, "the clip's half width epsilon", above=0, below=1)
    clip: str = option("min", "reading of Eq. 12", choices=("min", "two_sided", "none"))
    ratio: str = option("sequence", "reading of Eq. 11", choices=("sequence", "length_normalized", "env", "one"))
    adversary: str = option("swapped", "how the adversary reads a pair", choices=ADVERSARIES)
    alpha: float = option(0.07, "AIPO's extra weight of the reference", least=0)
    lam: float = option(0.2, "AIPO's weight of the likelihood term", least=0)
    n_iter: int = option(6, "iterations N_iter of Algorithm 1", least=0)
    n_mu: int = option(25, "protagonist's optimiser steps per iteration, N_mu", least=0)
    n_nu: int = option(25, "adversary's optimiser steps per iteration, N_nu; 0: no adversary, ENV stays the start",
                       least=0)
    rounds: int | None = option(None, "instead of N_iter: rounds of N_mu steps, each on new pairs, sampled from the "
                                "policy, ranked by the safe world's biased judge (default: iter_dpo 3, aipo 0)",
                                least=0)
    candidates: int = option(5, "answers sampled to a prompt in a round; the pair is the best and the worst", least=2)
    keep: float | None = option(None, "share of a round's pairs that is kept, those with the widest gap (default: "
                                "iter_dpo 0.2, aipo 1)", above=0, most=1)
    sft_steps: int | None = option(None, "optimiser steps of SFT on the chosen answers before that; none with --model",
                                   least=0, world=400, own=0)
    sft_lr: float | None = option(None, "learning rate of SFT", above=0, world=1e-3, own=2e-5)
    lr: float | None = option(None, "learning rate of both players", above=0, world=5e-5, own=2e-7)
    batch_size: int = option(32, "pairs per optimiser step", least=1)
    max_length: int | None = option(None, "tokens of prompt + answer; longer prompts lose their left side", least=2,
                                    world=64, own="the model's positions, 1024 at most")
    micro_tokens: int | None = option(1536, "tokens per forward pass; less memory, same gradient", least=1)
    gradient_checkpointing: bool = option(False, "keep each layer's input alone and compute the rest again in the "
                                          "backward pass; less memory, a fifth more time")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: cuda where there is one, else cpu")
    dtype: str = option("float32", "bfloat16: matrix products in bfloat16, weights and log-probabilities in float32",
                        choices=("float32", "bfloat16"))
    compile: bool = option(False, "compile the layers by torch.compile (needs a C++ compiler, on a GPU Triton)")
    save_every: int = option(100, "optimiser steps between checkpoints; 0: only the last", least=0)
    eval_prompts: int = option(100, "held-out prompts answered for the closing table; 0: none", least=0)


class Refused(ValueError):
    """Input or options that cannot be used; the message is one sentence."""


def parse_arguments(arguments):
    """The flags, made from Config's fields: (the options given, resume?)."""
    def refuse(message):
        raise Refused(message)

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    for field in dataclasses.fields(Config):
        kind = next(part for part in (typing.get_args(field.type) or (field.type,)) if part is not type(None))
        default = "" if field.default is None else f" (default {field.default})"
        if "world" in field.metadata:
            default = " (default {world} in the safe world, with --data {own})".format(**field.metadata)
        if kind is bool:
            parser.add_argument(flag_of(field.name), action="store_true", help=field.metadata["help"])
            continue
        parser.add_argument(flag_of(field.name), type=kind, choices=field.metadata.get("choices"),
                            metavar=None if "choices" in field.metadata else kind.__name__.upper(),
                            help=field.metadata["help"].replace("%", "%%") + default)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, or begin it")
    given = vars(parser.parse_args(arguments))
    return given, given.pop("resume", False)


def make_config(given):
    """Config from the options given, with every None resolved that needs no look at the model."""
    config = Config(**given)
    check_values(config)
    method = METHODS[config.method]
    config = dataclasses.replace(config, **{**method.defaults, **given, **method.fixed})
    check_use(config, given)
    if config.sft_steps is None and config.model is not None:      # a model that is given needs none
        config.sft_steps = 0
    where = "world" if config.data is None else "own"
    for field in dataclasses.fields(Config):
        if getattr(config, field.name) is None and isinstance(field.metadata.get(where), (int, float)):
            setattr(config, field.name, field.metadata[where])
    return config


def check_values(config):
    """Refuse values of a wrong type or out of range."""
    for field in dataclasses.fields(Config):
        value, flag, limits = getattr(config, field.name), flag_of(field.name), field.metadata
        kinds = typing.get_args(field.type) or (field.type,)
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            raise Refused(f"{flag} cannot be {value!r}")
        if value is None:
            continue
        if "choices" in limits and value not in limits["choices"]:
            raise Refused(f"{flag} must be one of {', '.join(limits['choices'])}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise Refused(f"{flag} must be finite, not {value}")
        for name, (right, words) in LIMITS.items():
            if name in limits and not right(value, limits[name]):
                raise Refused(f"{flag} must be {words} {limits[name]}, not {value}")


def check_use(config, given):
    """Refuse options that would be ignored, and halves of a pair."""
    if config.data is not None and config.model is None:
        raise Refused("--data needs --model: the safe world's model knows no other text")
    if config.leave_out is not None and config.data is None:
        raise Refused("--leave-out needs --data: the safe world's pairs have no source")
    if config.rounds and config.data is not None:
        raise Refused("--rounds needs a judge of new answers, which only the safe world has; leave out --data")
    if config.method == "iter_dpo" and not config.rounds:
        raise Refused("--method iter_dpo needs --rounds of at least 1; without rounds it is --method dpo")
    method = METHODS[config.method]
    every = {name for loss in LOSSES.values() for name in keywords(loss)}
    ignored = dict.fromkeys([*method.fixed, *(every - set(keywords(LOSSES[method.loss])))], f"--method {config.method}")
    for reason, holds, names in (
            (f"n_nu 0 (--method {config.method})", config.n_nu == 0, ["adversary"]),
            ("--ratio one", config.ratio == "one", ["clip", "eps"]),
            ("--clip none", config.clip == "none", ["eps"]),
            ("--rounds 0", not config.rounds, ["candidates", "keep"]),
            (f"--rounds {config.rounds}", config.rounds, ["n_iter"]),
            ("--n-iter 0", config.n_iter == 0 and not config.rounds, ["n_mu", "n_nu", "lr", "adversary", *every]),
            ("--n-mu 0 and no adversary", config.n_mu == config.n_nu == 0,
             ["n_iter", "rounds", "candidates", "keep", "lr", *every]),
            ("no SFT (--sft-steps)", not config.sft_steps and (config.model or config.sft_steps == 0), ["sft_lr"])):
        ignored |= dict.fromkeys(names, reason) if holds else {}
    for name in given:
        if name in ignored:
            raise Refused(f"{flag_of(name)} has no effect with {ignored[name]}; leave it out")


def flag_of(name):
    return "--" + name.replace("_", "-")


def keywords(loss):
    """The options a loss takes (lengths come from the batch)."""
    return [name for name, parameter in inspect.signature(loss).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and not name.endswith("_lengths")]


# ----------------------------------------------------------------------------------------------------------
# Setting up: everything that can be wrong with the input is found here, before anything is written

@dataclass
class Job:
    config: Config
    model: Decoder
    tokenizer: Tokenizer
    rows: list              # (prompt_ids, chosen_ids, rejected_ids)


def prepare(config):
    if config.data is None:
        pairs, held_out = SafeWorld(config.seed).pairs("train", WORLD_PAIRS), []
    else:
        everything, note = load_data(config.data, config.leave_out)
        print(note)
        pairs = [pair for pair in everything if not pair.held_out]
        held_out = [pair for pair in everything if pair.held_out]
    if config.model is None:
        tokenizer = SafeWorld.tokenizer()
        torch.manual_seed(config.seed)
        model = Decoder(DecoderConfig(vocab_size=tokenizer.largest_id + 1, eos_token_id=tokenizer.eos_id,
                                      bos_token_id=tokenizer.bos_id, **WORLD_MODEL))
    else:
        folder = find_source(config.model, "model")
        tokenizer = Tokenizer.from_pretrained(folder)
        if config.data is None and tokenizer.files["tokenizer.json"] != SafeWorld.tokenizer().files["tokenizer.json"]:
            raise Refused(f"--model {config.model} needs --data: it is no model of the safe world, whose pairs are the "
                          "default")
        model = Decoder.from_pretrained(folder)
    if tokenizer.largest_id >= model.config.vocab_size:
        raise Refused(f"{config.model}: the tokenizer has ids up to {tokenizer.largest_id}, the embeddings have only "
                      f"{model.config.vocab_size} rows; tokenizer and weights do not belong together")
    context = model.config.max_position_embeddings
    if config.max_length is None:
        config.max_length = min(context, 1024)
    if config.max_length > context:
        raise Refused(f"--max-length {config.max_length} is more than the model's {context} positions")
    if config.rounds:
        longest = max(len(tokenizer.encode_prompt(prompt)) for prompt in SafeWorld().prompts("train"))
        if longest >= config.max_length:
            raise Refused(f"--max-length {config.max_length} leaves no room to answer prompts of {longest} tokens")
    rows, _, report = encode_pairs(pairs, tokenizer, config.max_length)
    if not rows:
        raise Refused(f"{config.data}: no usable pair is left to train on: {report.splitlines()[0]}, besides "
                      f"{len(held_out)} held out")
    print(f"training pairs: {report}")
    if config.data is not None:
        print(f"held out: {encode_pairs(held_out, tokenizer, config.max_length)[2]}")
    device = find_device(config.device)
    if config.compile:
        try:
            torch.compile(torch.nn.functional.silu)(torch.zeros(8, device=device))
        except Exception as error:                                 # whatever the compiler may lack
            reason = next(line for line in str(error).splitlines() if line.strip())
            raise Refused(f"--compile: torch.compile does not work here ({reason}); leave it out") from None
    return Job(config, model.to(device), tokenizer, rows)


# ----------------------------------------------------------------------------------------------------------
# The loop

def train(job, watch=None):
    """Run Algorithm 1 in the run folder, from its checkpoint if it has one. After each turn, the last step of a player
    in an iteration, `watch(step, iteration, player, players)` may look at the models."""
    config, out, tokenizer = job.config, Path(job.config.out), job.tokenizer
    method = METHODS[config.method]
    schedule = [(0, "sft")] * config.sft_steps + list(turns(config.rounds or config.n_iter, config.n_mu, config.n_nu))
    players = {"protagonist": job.model, "adversary": copy.deepcopy(job.model)}
    for player in players.values():
        player.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            player.compile_layers()
    optimizers = {"sft": adamw(job.model, config.sft_lr), "protagonist": adamw(players["protagonist"], config.lr),
                  "adversary": adamw(players["adversary"], config.lr)}
    fingerprint = fingerprint_of(job.rows)
    done = load_checkpoint(out, players, optimizers, fingerprint)
    if done > len(schedule):
        raise Refused(f"{out}: the checkpoint is at step {done}, but the run in config.json has {len(schedule)}")
    # every player has a stream of its own, so that the protagonist sees the same pairs whatever the adversary does
    rows = {"protagonist": job.rows, "adversary": job.rows, "sft": [(*row[:2], None) for row in job.rows]}
    if method.loss == "sft":
        rows["protagonist"] = rows["sft"]
    exchange, sign = ADVERSARIES[config.adversary]
    if exchange:
        rows["adversary"] = [(prompt, rejected, chosen) for prompt, chosen, rejected in job.rows]
    streams = {player: batches(range(len(job.rows)), config.batch_size, config.seed,
                               start=sum(player == other for _, other in schedule[:done])) for player in rows}
    if done == 0 and config.model is None and config.sft_steps == 0:        # a start that is nowhere else on disk
        save_player(out / "sft", job.model, tokenizer)

    current = None                                                 # the turn that goes on
    with open_metrics(out, done) as metrics_file, tqdm(total=len(schedule), initial=done, unit="step") as bar:
        for step in range(done, len(schedule)):
            iteration, player = turn = schedule[step]
            if turn != current and player == "protagonist" and config.rounds:
                first = schedule.index(turn)
                if step == first:                                  # ENV is the policy as the round begins, so that a
                    copy_weights(players["protagonist"], players["adversary"])            # resumed run samples again
                rows[player], report = sample_pairs(players["adversary"], tokenizer, config, iteration)
                streams[player] = batches(range(len(rows[player])), config.batch_size, config.seed, start=step - first)
                bar.write(f"round {iteration}: {report}")
            current = turn
            if player == "sft":
                loss, agent, env = "sft", players["protagonist"], None
            elif player == "protagonist":                          # Algorithm 1, line 4: AGENT mu, ENV nu
                loss, agent, env = method.loss, players["protagonist"], players["adversary"]
            else:                                                  # Algorithm 1, line 9: AGENT nu, ENV mu
                loss, agent, env = method.loss, players["adversary"], players["protagonist"]
            numbers = next(streams[player])
            metrics = optimizer_step(agent, env if method.env else None, optimizers[player],
                                     [rows[player][number] for number in numbers], loss,
                                     sign if player == "adversary" else +1, config)

            bar.set_description(f"{player} {iteration}/{config.rounds or config.n_iter}" if iteration else "sft")
            bar.set_postfix({name: f"{metrics[name]:.3g}" for name in SHOWN if name in metrics})
            bar.update()
            metrics = {"step": step + 1, "iteration": iteration, "player": player, **metrics}
            metrics_file.write(json.dumps(metrics) + "\n")
            if step + 1 == config.sft_steps:                       # both players start at the SFT model
                copy_weights(players["protagonist"], players["adversary"])
                optimizers["sft"].state.clear()
                save_player(out / "sft", players["protagonist"], tokenizer)
            if step + 1 == len(schedule) or (config.save_every and (step + 1) % config.save_every == 0):
                metrics_file.flush()
                save_checkpoint(out, step + 1, players, optimizers, fingerprint)
            if watch is not None and turn not in schedule[step + 1:step + 2]:
                watch(step + 1, iteration, player, players)
    save_player(out / "protagonist", players["protagonist"], tokenizer)
    if config.n_nu:
        save_player(out / "adversary", players["adversary"], tokenizer)


def copy_weights(source, target):
    target.load_state_dict(source.state_dict())


SHOWN = ("loss", "margin", "accuracy", "ratio", "clipped")


def sample_pairs(policy, tokenizer, config, number):
    """The pairs of round `number`: (rows, report).

    To every prompt `candidates` answers are sampled from the policy and ranked by the safe world's biased judge: its
    best is chosen, its worst rejected. Of these pairs the `keep` share with the widest gap between the two is kept.
    """
    world = SafeWorld(config.seed)
    prompts = world.prompts("train") * ROUND_VISITS
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(config.candidates)]
    room = config.max_length - max(map(len, ids))
    seed = int(np.random.default_rng([config.seed, number]).integers(2**62))
    generator, answers = torch.Generator(policy.device).manual_seed(seed), []
    for first in range(0, len(ids), ROUND_ROWS):
        some = ids[first:first + ROUND_ROWS]
        answers += generate(policy, some, room, ROUND_TEMPERATURE, tokenizer.eos_ids, generator)

    ranked = []                                                    # (gap, pair)
    for prompt, first in zip(prompts, range(0, len(answers), config.candidates)):
        ended = [answer for answer in answers[first:first + config.candidates] if len(answer) < room]
        scores = {text: world.judge(prompt, text) for text in (tokenizer.decode(answer).strip() for answer in ended)}
        best, worst = max(scores, key=scores.get, default=None), min(scores, key=scores.get, default=None)
        if scores and scores[best] > scores[worst]:
            ranked.append((scores[best] - scores[worst], Pair(prompt, best, worst, f"round {number}")))
    ranked.sort(key=lambda gap_and_pair: -gap_and_pair[0])         # stable: equal gaps stay in the prompts' order
    kept = [pair for _, pair in ranked[:math.ceil(config.keep * len(ranked))]]
    rows, _, report = encode_pairs(kept, tokenizer, config.max_length)
    if not rows:
        raise Refused(f"round {number}: the judge prefers no answer to another, so there is nothing left to train on; "
                      "fewer --rounds or a smaller --lr may help")
    endless = sum(len(answer) == room for answer in answers)
    tokens = sum(map(len, answers)) / len(answers)
    return rows, (f"{len(prompts)} prompts, {config.candidates} answers each, {tokens:.1f} tokens on average; left out "
                  f"{endless} answers without an end, {len(prompts) - len(ranked)} prompts without a preference, "
                  f"{len(ranked) - len(kept)} pairs of narrow gap; {report}")


def adamw(model, lr):
    """The same for every player and method: constant rate, no decay, moments kept across turns."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def optimizer_step(agent, env, optimizer, rows, loss, sign, config):
    """One step of AGENT on `rows`, with ENV frozen (None: the loss looks at no reference). Returns the metrics.

    The gradient is that of the mean over all rows, in however many micro-batches they come. ENV reads AGENT's own
    micro-batches, so that on a CPU players of the same weights have the same log-probabilities, to the last bit.
    """
    autocast = functools.partial(torch.autocast, agent.device.type, torch.bfloat16)
    wanted = inspect.signature(LOSSES[loss]).parameters
    seen = []
    with autocast(enabled=config.dtype == "bfloat16"):             # around all: the layers' weights are converted once
        for _, batch in micro_batches(rows, config.micro_tokens):
            batch = batch.to(agent.device)
            logps, env_logps = response_logps(agent, batch), (None, None)
            if env is not None:
                with torch.no_grad():
                    env_logps = torch.stack(response_logps(env, batch))                                 # (2, B)
            options = {**vars(config), "chosen_lengths": batch.chosen_lengths, "rejected_lengths": batch.rejected_lengths}
            options = {name: value for name, value in options.items() if name in wanted}
            with autocast(enabled=False):
                losses = sign * LOSSES[loss](*logps, *env_logps, **options)                             # (B,)
                (losses.sum() / len(rows)).backward()
            seen.append(dict(losses=losses, logps=torch.stack(logps), lengths=batch.rejected_lengths,
                             **({"env_logps": env_logps} if env is not None else {})))
    grad_norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
    if not grad_norm.isfinite():
        raise FloatingPointError("the gradient is not finite, so the run stops before this step; try a smaller --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seen = {name: torch.cat([part[name].detach() for part in seen], dim=-1) for name in seen[0]}
    return {**measure(loss, config, **seen), "grad_norm": grad_norm.item()}


def measure(loss, config, losses, logps, lengths, env_logps=None):
    """What metrics.jsonl says of one step, before its update, from AGENT's side: means over the pairs, where margin
    is beta * h against ENV, accuracy the share of h > 0, and ratio Eq. 11's before Eq. 12 clips it."""
    metrics = {"loss": losses.mean(), "chosen_logps": logps[0].mean()}
    if env_logps is not None:
        margin = preference_margin(*logps, *env_logps, config.beta)
        metrics |= {"rejected_logps": logps[1].mean(), "margin": margin.mean(),
                    "margin_std": margin.std(correction=0), "accuracy": (margin > 0).float().mean()}
    if loss == "iopo":
        terms = ratio_terms(logps[1], *env_logps, config.ratio, lengths)
        ratio, (top, bottom, per_token) = importance_ratio(*terms), terms
        log_ratio = (top - bottom) / (1 if per_token is None else per_token)
        metrics |= {"ratio": ratio.mean(), "log_ratio": log_ratio.mean(), "log_ratio_max": log_ratio.max(),
                    "clipped": (clip_ratio(ratio, config.eps, config.clip) != ratio).float().mean(),
                    "guarded": ((log_ratio.exp() == 0) | log_ratio.exp().isinf()).sum()}
    return {name: value.item() for name, value in metrics.items()}


# ----------------------------------------------------------------------------------------------------------
# The run folder

def save_player(folder, model, tokenizer):
    """A Hugging Face folder, complete or not there at all."""
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save(partial)
    partial.rename(folder)


def save_config(config):
    Path(config.out).mkdir(parents=True, exist_ok=True)
    replace_file(Path(config.out) / "config.json", (json.dumps(vars(config), indent=2) + "\n").encode())


def fingerprint_of(rows):
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def save_checkpoint(out, step, players, optimizers, fingerprint):
    """Everything that a resumed run cannot work out from its config: one file, replaced in one move."""
    state = {"step": step, "data": fingerprint,
             "players": {name: player.state_dict() for name, player in players.items()},
             "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
    (out / "checkpoint").mkdir(exist_ok=True)
    torch.save(state, out / "checkpoint" / "state.pt.partial")
    os.replace(out / "checkpoint" / "state.pt.partial", out / "checkpoint" / "state.pt")


def load_checkpoint(out, players, optimizers, fingerprint):
    """The number of steps done; 0 where there is no checkpoint."""
    path = out / "checkpoint" / "state.pt"
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        same_pairs, step = state["data"] == fingerprint, state["step"]
        for name, player in players.items():
            player.load_state_dict(state["players"][name])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    except Exception:                                              # a damaged file can raise anything
        raise Refused(f"{path}: no checkpoint of this run and version, or a damaged one; resume needs it whole") from None
    if not same_pairs:
        raise Refused(f"{out}: the training pairs are not those the run began with; resume needs the same data")
    return step


def open_metrics(out, done):
    """metrics.jsonl, cut back to the steps that the checkpoint has."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)[:done] if path.exists() else []
    if len(lines) < done:
        raise Refused(f"{path}: has {len(lines)} lines, but the checkpoint is at step {done}; resume needs both whole")
    replace_file(path, b"".join(lines))
    return path.open("a")


def is_finished(config):
    out = Path(config.out)
    return (out / "protagonist").is_dir() and (config.n_nu == 0 or (out / "adversary").is_dir())


def choose_folder(given, resume):
    """The run folder, and the Config of the run that is in it already (None: a new run)."""
    if given.get("out") is None:
        if resume:
            raise Refused("--resume needs --out, the run to go on with")
        name = Path("runs", given.get("method", Config.method))
        numbered = (name.with_name(f"{name.name}-{number}") for number in range(1, sys.maxsize))
        return next(str(folder) for folder in numbered if not folder.exists()), None
    out = Path(given["out"])
    if not out.exists() or out.is_dir() and not any(path.suffix != ".partial" for path in out.iterdir()):
        return given["out"], None
    if not resume:
        raise Refused(f"--out {out} exists and is not empty; choose another one, or go on with it by --resume")
    try:
        config = Config(**json.loads((out / "config.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise Refused(f"--out {out} is no run that --resume could go on with: no readable config.json") from None
    check_values(config)
    for field in dataclasses.fields(Config):
        if getattr(config, field.name) is None and "world" in field.metadata:
            raise Refused(f"{out / 'config.json'}: {flag_of(field.name)} is missing")
    check_use(config, {name: value for name, value in given.items() if name != "out"})
    return given["out"], config


def main(arguments=None):
    try:
        given, resume = parse_arguments(arguments)
        out, before = choose_folder(given, resume)
        config = dataclasses.replace(before or make_config(given), out=out)
        for name, value in given.items():
            if value != getattr(config, name):
                raise Refused(f"{flag_of(name)} {value} differs from the run in {out}: it has {getattr(config, name)}")
        if before and is_finished(config):
            print(f"{out} is finished; nothing to do (examine it by: python eval.py {out})")
            return
        job = prepare(config)
        print(" ".join(f"{name}={value}" for name, value in vars(config).items()), flush=True)
        if before is None:
            save_config(config)
    except (ValueError, OSError) as error:                         # a sentence for the user; bugs raise other things
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    try:
        train(job)
        del job                                                    # eval.py loads one model at a time
    except KeyboardInterrupt:
        sys.exit(f"stopped; go on from the last checkpoint with: python train.py --out {out} --resume")
    except (Refused, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, Refused) else 1) from None

    import eval                                                    # the closing table
    eval.main(["--device", config.device, "--", str(out)])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")              # a terminal may lack a character
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
