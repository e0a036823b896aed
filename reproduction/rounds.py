"""Rounds of new pairs, on the safe world: the policy answers, the judge ranks, the policy trains.

    python -m reproduction.rounds runs/dpo-1/protagonist --out runs/iter-dpo --rounds 3 --keep 0.2

A round is a run of train.py, from the model of the round before: Iter-DPO with --method dpo, AIPO
with --method aipo --keep 1. Its folder round-N holds pairs.jsonl, what the judge made of the
answers, and held_out.jsonl, the human's pairs about other objects. Every round begins with an
optimiser of its own and with its policy as the reference.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch

import train
from data import Pair, SafeWorld, Tokenizer
from model import Decoder, find_device, generate

VISITS = 4                  # how often a round asks every prompt
CANDIDATES = 5              # answers sampled to it each time
TEMPERATURE = 1.0           # at which they are sampled
ROWS_AT_ONCE = 240          # answers sampled in one batch
HELD_OUT = 200              # of the human's pairs, for train.py's looks


class NoPairs(ValueError):
    """A policy whose answers are all alike to the judge."""


def rounds(config, count, keep, look=train.held_out_look):
    """Train config.model by `count` rounds, each a run with the options of `config`, in the folders
    round-1, round-2, ... of config.out. `look` is train's, with the round for the iteration."""
    model = config.model
    for number in range(1, count + 1):
        folder = Path(config.out, f"round-{number}")
        pairs, report = sample_pairs(model, config, keep, number)
        folder.mkdir(parents=True)
        print(f"round {number}: {report}", flush=True)
        data, held_out = folder / "pairs.jsonl", folder / "held_out.jsonl"
        write_pairs(data, pairs)
        write_pairs(held_out, SafeWorld(config.seed).pairs("validation", HELD_OUT))
        job = train.prepare(dataclasses.replace(
            config, model=str(model), data=str(data), held_out=str(held_out), out=str(folder)))
        train.train(job, lambda job, step, _, player: look(job, step, number, player))
        model = folder / "protagonist"


def sample_pairs(model, config, keep, number):
    """The pairs of round `number`, and a report.

    To every prompt CANDIDATES answers are sampled from the policy and ranked by the safe world's
    biased judge: its best is chosen, its worst rejected. Of these pairs the share `keep` with the
    widest gap between the two is kept.
    """
    policy, tokenizer = Decoder.from_pretrained(model), Tokenizer.from_pretrained(model)
    policy, world = policy.to(find_device(config.device)), SafeWorld()
    prompts = world.prompts("train") * VISITS
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(CANDIDATES)]
    room = config.max_length - max(map(len, ids))
    seed = int(np.random.default_rng([config.seed, number]).integers(2**62))
    generator, answers = torch.Generator(policy.device).manual_seed(seed), []
    for first in range(0, len(ids), ROWS_AT_ONCE):
        some = ids[first:first + ROWS_AT_ONCE]
        answers += generate(policy, some, room, TEMPERATURE, tokenizer.eos_ids, generator)

    ranked = []                                                        # (gap, pair)
    for prompt, first in zip(prompts, range(0, len(answers), CANDIDATES)):
        ended = [some for some in answers[first:first + CANDIDATES] if len(some) < room]
        texts = [tokenizer.decode(answer).strip() for answer in ended]
        scores = {text: judge(world, prompt, text) for text in texts}
        best, worst = (pick(scores, key=scores.get, default=None) for pick in (max, min))
        if scores and scores[best] > scores[worst]:
            ranked.append((scores[best] - scores[worst], Pair(prompt, best, worst)))
    ranked.sort(key=lambda gap_and_pair: -gap_and_pair[0])             # stable, in prompts' order
    kept = [pair for _, pair in ranked[:math.ceil(keep * len(ranked))]]
    if not kept:
        raise NoPairs(f"round {number}: the judge prefers no answer to another, so there is "
                      "nothing left to train on; fewer rounds or a smaller lr may help")
    endless = sum(len(answer) == room for answer in answers)
    tokens = sum(map(len, answers)) / len(answers)
    return kept, (f"{len(prompts)} prompts, {CANDIDATES} answers each, {tokens:.1f} tokens on "
                  f"average; left out {endless} answers without an end, "
                  f"{len(prompts) - len(ranked)} prompts without a preference, "
                  f"{len(ranked) - len(kept)} pairs of narrow gap")


def judge(world, prompt, answer):
    """The judge likes many words."""
    return world.true_reward(prompt, answer) + 0.15 * len(answer.split())


def write_pairs(path, pairs):
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(prog="reproduction.rounds", description=__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file: None             # errors are one sentence
    parser.add_argument("model", help="a model of the safe world, such as runs/dpo-1/protagonist")
    parser.add_argument("--out", required=True, help="folder of the rounds, a new one")
    parser.add_argument("--method", choices=("dpo", "aipo"), default="dpo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=float, default=0.2, help="share of the pairs that is kept")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if Path(options.out).exists() or not 0 < options.keep <= 1:
        parser.error("--out must be a new folder, and --keep above 0 and at most 1")
    given = {name: getattr(options, name) for name in ("model", "out", "method", "lr", "seed")}
    try:
        rounds(train.make_config({**given, "n_iter": 1}), options.rounds, options.keep)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
