"""Frontiers: what methods reach over learning rate and steps, and what it costs in KL to SFT.

    python -m reproduction frontier

Every row is trained at every rate, from the same SFT models, and looked at along each run: true
reward of sampled and greedy answers to held-out prompts, accuracy on held-out pairs, KL to SFT.
Answers to the validation prompts are what a rate and a number of steps may be chosen by.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SafeWorld, encode_pairs
from eval import EXAM_PAIRS, ROWS_AT_ONCE, margins, pair_logps, shuffled_prompts
from model import Decoder, generate
from reproduction.runs import Task

ROWS = {"DPO, beta 0.1": {"method": "dpo"}, "DPO, beta 0.3": {"method": "dpo", "beta": 0.3},
        "DPO, beta 1": {"method": "dpo", "beta": 1.0},
        "DPO, beta 3": {"method": "dpo", "beta": 3.0},
        "ratio alone": {"method": "iopo", "n_nu": 0},
        "adversary alone": {"method": "iopo", "ratio": "one"},
        "IOPO": {"method": "iopo"},
        "DPO with likelihood": {"method": "aipo", "alpha": 0.0}, "AIPO": {"method": "aipo"}}
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
SEEDS = tuple(range(10))
LOOKS = (25, 50, 100, 150)                  # the protagonist's steps
TURN = 25                                   # N_mu and, with an adversary, N_nu
SAMPLES = {"test": 16, "validation": 8}     # answers to each prompt
TEMPERATURE, COOLER = 0.8, (0.6, 0.4, 0.2)  # of answers; and of SFT's, the line to beat
NEW_TOKENS = 48


# ---- The runs ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run(Task):
    """A run of the frontier. One that diverges is a hole in the numbers, but SFT must not."""

    @property
    def must_end(self):
        return "model" not in self.options

    @property
    def seconds(self):
        """What it takes, roughly, in one process of one thread."""
        config = self.config
        return (15 + 0.1 * config.sft_steps + 0.15 * config.n_iter * (config.n_mu + config.n_nu)
                + 12 * (len(LOOKS) if config.model else 1 + len(COOLER)))

    @property
    def files(self):
        return (*super().files, Path(__file__))

    def observe(self, result):
        """What train calls after every turn; the result's looks have a look at each of LOOKS."""
        config, tokenizer = self.config, SafeWorld.tokenizer()
        start = Decoder.from_pretrained(config.model) if config.model else None
        pairs = SafeWorld().exam_pairs("test", EXAM_PAIRS)
        rows, _, _ = encode_pairs(pairs, tokenizer, config.max_length)
        before = start and logps_of(start, rows)
        looks = result["looks"] = []

        def look(job, step, iteration, player):
            model, steps = job.players["protagonist"].model, job.players["protagonist"].steps
            if player != "adversary" and steps in (0, *LOOKS) and not (start and steps == 0):
                now = logps_of(model, rows)
                margin, _, accuracy = margins(now, before or now)
                seen = see(model, start, tokenizer, config.seed, steps)
                looks.append({"steps": steps, **seen, "margin": margin, "accuracy": accuracy})
            return {}
        return look


def tasks(rows, rates, seeds, out):
    """{"SFT": [its runs], row: [its runs]}: rates of a row one after another, each with all
    seeds."""
    first = [Run(f"{out}/sft-seed{seed}", {"method": "sft", "n_iter": 0, "seed": seed}, "test", 0)
             for seed in seeds]
    found = {"SFT": first}
    for row in rows:
        name = row.lower().replace(",", "").replace(" ", "-")
        found[row] = [Run(f"{out}/{name}-lr{rate:g}-seed{seed}",
                          {"n_mu": TURN, "n_iter": max(LOOKS) // TURN, **ROWS[row], "lr": rate,
                           "model": sft.model.as_posix(), "seed": seed}, "test", max(LOOKS))
                      for rate in rates for seed, sft in zip(seeds, first)]
    return found


# ---- One look at a model -------------------------------------------------------------------------

def logps_of(model, rows):
    """Log-probabilities of held-out pairs, as `margins` takes them."""
    with tqdm(disable=True) as bar:
        return {"logps": pair_logps(model, rows, bar)}


def see(model, start, tokenizer, seed, steps):
    """What a model answers. Rewards are in quarters, as they come: whole numbers, small files.
    `start` is the SFT model, None where it is looked at itself, also at lower temperatures."""
    world, seen = SafeWorld(), {}
    draws = itertools.count(10_000 * seed + 10 * steps)                # rows and rates share them
    for split, samples in SAMPLES.items():
        prompts = shuffled_prompts(split) * samples
        seen[split] = answer(model, start or model, tokenizer, world, prompts, TEMPERATURE,
                             next(draws))
    test = shuffled_prompts("test")
    seen["greedy"] = answer(model, None, tokenizer, world, test, 0, 0)
    if start is None:
        for temperature in COOLER:
            seen[f"{temperature:g}"] = answer(model, model, tokenizer, world,
                                              test * SAMPLES["test"], temperature, next(draws))
    return seen


def answer(model, start, tokenizer, world, prompts, temperature, seed):
    """{rewards in quarters, mean tokens, mean KL to `start`} of an answer to every prompt."""
    ids, answers = list(map(tokenizer.encode_prompt, prompts)), []
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(ids), 4 * ROWS_AT_ONCE):
        answers += generate(model, ids[first:first + 4 * ROWS_AT_ONCE], NEW_TOKENS, temperature,
                            tokenizer.eos_ids, generator)
    rewards = [world.true_reward(prompt, tokenizer.decode(some).strip())
               for prompt, some in zip(prompts, answers)]
    kl = None if start is None else answers_kl(model, start, ids, answers, temperature)
    return {"quarters": [round(4 * reward) for reward in rewards],
            "tokens": float(np.mean(list(map(len, answers)))), "kl": kl}


@torch.no_grad()
def answers_kl(model, start, prompts, answers, temperature):
    """KL(pi || pi_start) of answers, nats, mean over answers that were sampled from pi, which is
    `model` at this temperature; pi_start is at temperature 1. Exact over the vocabulary at every
    token of an answer, summed over these (its EOS included, where it ended)."""
    total = 0.0
    rows = sorted(zip(prompts, answers), key=lambda row: len(row[0]) + len(row[1]))
    for first in range(0, len(rows), 4 * ROWS_AT_ONCE):
        some = rows[first:first + 4 * ROWS_AT_ONCE]
        longest = max(len(prompt) + len(answer) for prompt, answer in some)
        ids = torch.tensor([(prompt + answer + [0] * longest)[:longest] for prompt, answer in some])
        begins = torch.tensor([[len(prompt) - 1] for prompt, _ in some])
        ends = torch.tensor([[len(prompt) + min(len(answer), NEW_TOKENS - 1)]
                             for prompt, answer in some])
        place = torch.arange(longest)
        wanted = (place >= begins) & (place < ends)                                 # (B, T)
        p = torch.log_softmax(model(ids)[wanted] / temperature, dim=-1)             # (N, V)
        q = torch.log_softmax(start(ids)[wanted], dim=-1)
        total += (p.exp() * (p - q)).sum().item()
    return total / len(rows)


# ---- The numbers ---------------------------------------------------------------------------------

MEASURES = ("reward", "greedy", "accuracy", "kl", "vote", "tokens")


def gather(results, rows, rates, seeds):
    """{"SFT": {measure: (seeds,), temperature: ...}, row: {measure: (rates, seeds, looks)}}, NaN
    after a run has diverged. The vote is the chance that the human prefers the row's answer to a
    validation prompt to SFT's, as expected from their rewards."""
    sft = [result["looks"][0] for result in results["SFT"]]
    numbers = {"SFT": {"reward": [mean_reward(look["test"]) for look in sft],
                       "kl": [look["test"]["kl"] for look in sft],
                       "greedy": [mean_reward(look["greedy"]) for look in sft],
                       **{f"{temperature:g}": {
                           "reward": [mean_reward(look[f"{temperature:g}"]) for look in sft],
                           "kl": [look[f"{temperature:g}"]["kl"] for look in sft]}
                          for temperature in COOLER}}}
    for row in rows:
        found = {measure: np.full((len(rates), len(seeds), len(LOOKS)), np.nan)
                 for measure in MEASURES}
        for place, result in zip(np.ndindex(len(rates), len(seeds)), results[row]):
            for look in result["looks"]:
                where = (*place, LOOKS.index(look["steps"]))
                for measure, value in (
                        ("reward", mean_reward(look["test"])),
                        ("greedy", mean_reward(look["greedy"])), ("accuracy", look["accuracy"]),
                        ("kl", look["test"]["kl"]), ("tokens", look["test"]["tokens"]),
                        ("vote", vote(look["validation"], sft[place[1]]["validation"]))):
                    found[measure][where] = value
        numbers[row] = {measure: values.tolist() for measure, values in found.items()}
    return numbers


def pack(results, rows, rates, seeds):
    """Every reward, in quarters, for a file: {"row, what": (rates, seeds, looks, answers) int8},
    none below -127, and -128 after a run has diverged; SFT's are (1, seeds, 1, answers)."""
    packed = {}
    for row in ("SFT", *rows):
        shape = (1, len(seeds), 1) if row == "SFT" else (len(rates), len(seeds), len(LOOKS))
        cooler = [f"{temperature:g}" for temperature in COOLER] if row == "SFT" else []
        for name in (*SAMPLES, "greedy", *cooler):
            answers = len(results["SFT"][0]["looks"][0][name]["quarters"])
            values = np.full((*shape, answers), -128, dtype=np.int8)
            for place, result in zip(np.ndindex(shape[:2]), results[row]):
                for look in result["looks"]:
                    number = 0 if row == "SFT" else LOOKS.index(look["steps"])
                    values[(*place, number)] = np.clip(look[name]["quarters"], -127, 127)
            packed[f"{row}, {name}"] = values
    return packed


def mean_reward(answers):
    return float(np.mean(answers["quarters"])) / 4


def vote(answers, others):
    gaps = (np.array(answers["quarters"]) - np.array(others["quarters"])) / 4
    return float(np.mean(1 / (1 + np.exp(-gaps))))
