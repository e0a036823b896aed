"""Frontiers: what methods reach over learning rate and steps, and what it costs in KL to SFT.

    python -m reproduction frontier

Every row is trained at every rate, from the same SFT models, and looked at along each run: true
reward of sampled and greedy answers to held-out prompts, accuracy on held-out pairs, KL to SFT.
Answers to the validation prompts are what a rate and a number of steps may be chosen by.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SafeWorld, encode_pairs
from eval import EXAM_PAIRS, ROWS_AT_ONCE, margins, pair_logps, shuffled_prompts
from model import Decoder, generate
from reproduction.runs import Task
from reproduction.tables import markdown, plus_minus, standard_error, student, t_test

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
    """A run of the frontier; one that diverges counts as that."""
    must_end = False

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
        start = Decoder.from_pretrained(self.config.model) if self.config.model else None
        looks = result["looks"] = []

        def look(job, step, iteration, player):
            steps = job.players["protagonist"].steps
            if player != "adversary" and steps in (0, *LOOKS) and not (start and steps == 0):
                looks.append({"steps": steps, **see(job.players["protagonist"].model, start,
                                                    self.config.seed, steps)})
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

def see(model, start, seed, steps):
    """What a model does. Rewards are in quarters, as they come: whole numbers, small files. `start`
    is the SFT model, None where it is looked at itself, also at lower temperatures."""
    world, tokenizer = SafeWorld(), SafeWorld.tokenizer()
    seen, draws = {}, itertools.count(10_000 * seed + 10 * steps)      # no run has another's draws
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
    rows, _, _ = encode_pairs(world.exam_pairs("test", EXAM_PAIRS), tokenizer, 64)
    with tqdm(disable=True) as bar:
        ours, theirs = ({"logps": pair_logps(each, rows, bar)} for each in (model, start or model))
    seen["margin"], _, seen["accuracy"] = margins(ours, theirs)
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
        for place, result in zip(itertools.product(range(len(rates)), range(len(seeds))),
                                 results[row]):
            for look in result["looks"]:
                where = (*place, LOOKS.index(look["steps"]))
                for measure, value in (
                        ("reward", mean_reward(look["test"])),
                        ("greedy", mean_reward(look["greedy"])), ("accuracy", look["accuracy"]),
                        ("kl", look["test"]["kl"]), ("tokens", look["test"]["tokens"]),
                        ("vote", vote(look["validation"], sft[place[1]]["validation"]))):
                    found[measure][where] = value
        numbers[row] = {measure: values.tolist() for measure, values in found.items()}
    return json.loads(json.dumps(numbers))


def pack(results, rows, rates, seeds):
    """Every reward, in quarters, for a file: {"row, what": (rates, seeds, looks, answers) int8},
    -128 after a run has diverged; SFT's are (1, seeds, 1, answers)."""
    packed = {}
    for row in ("SFT", *rows):
        shape = (1, len(seeds), 1) if row == "SFT" else (len(rates), len(seeds), len(LOOKS))
        names = [name for name, seen in results[row][0]["looks"][0].items()
                 if isinstance(seen, dict)]
        for name in names:
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


# ---- What they come to ---------------------------------------------------------------------------

KL_VALUES = (0.5, 1.0, 2.0, 4.0, 8.0)       # nats an answer
RESAMPLES = 500
# named before the runs; Holm is applied to these, everything else is exploratory
FAMILY = (("IOPO", "DPO, beta 0.1"), ("IOPO", "DPO, beta 1"), ("IOPO", "ratio alone"),
          ("ratio alone", "DPO, beta 1"), ("adversary alone", "DPO, beta 0.1"),
          ("DPO, beta 1", "DPO, beta 0.1"))


def at_kl(kl, reward, start, value):
    """The reward of one run where its KL to SFT first is `value`, between its looks on a straight
    line; None where it never is. kl, reward: (looks,); start: SFT's own (KL, reward)."""
    points = [start, *zip(kl, reward)]
    for (kl_a, reward_a), (kl_b, reward_b) in itertools.pairwise(points):
        if kl_a <= value <= kl_b:
            share = (value - kl_a) / (kl_b - kl_a) if kl_b > kl_a else 0.0
            return reward_a + share * (reward_b - reward_a)
    return None                                                        # NaN compares as no


def tuned(row, seeds=None):
    """(rate, look) with the highest mean vote on validation prompts, over the seeds at these
    places; a point where any of them diverged is none."""
    votes = np.array(row["vote"], dtype=float)                         # (rates, seeds, looks)
    votes = votes if seeds is None else votes[:, seeds]
    means = votes.mean(axis=1)
    return np.unravel_index(np.nanargmax(means), means.shape)


def out_of_sample(row, measure, resamples=RESAMPLES):
    """Seeds are drawn with replacement, rate and steps chosen on their votes, and scored on the
    seeds that were not drawn: {mean, the standard deviation of such scores over resamples}."""
    values, rng, scores = np.array(row[measure], dtype=float), np.random.default_rng(0), []
    count = values.shape[1]
    for _ in range(resamples):
        drawn = rng.integers(count, size=count)
        left = np.setdiff1d(np.arange(count), drawn)
        if len(left):
            rate, look = tuned(row, drawn)
            scores.append(np.nanmean(values[rate, left, look]))
    return {"mean": float(np.mean(scores)), "spread": float(np.std(scores))}


def left_out(row, measure):
    """(seeds,): every seed at the rate and steps that the votes of all others choose."""
    values = np.array(row[measure], dtype=float)
    count = values.shape[1]
    chosen = [tuned(row, [other for other in range(count) if other != seed])
              for seed in range(count)]
    return np.array([values[rate, seed, look] for seed, (rate, look) in enumerate(chosen)])


def holm(p_values):
    """Holm's adjusted p-values, in the order given."""
    order, adjusted, highest = np.argsort(p_values), np.empty(len(p_values)), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted.tolist()


def comparisons(numbers, measure, family=FAMILY):
    """Paired differences over seeds, each seed at what the others' votes choose. Intervals and the
    smallest difference seen with 80% power are at the family's most cautious level, 0.05 over its
    size (Bonferroni's, never narrower than Holm's)."""
    stats, found = student(), []
    for ours, theirs in family:
        gaps = left_out(numbers[ours], measure) - left_out(numbers[theirs], measure)
        error, df = standard_error(gaps), len(gaps) - 1
        level = stats.t.ppf(1 - 0.05 / len(family) / 2, df)
        found.append({"ours": ours, "theirs": theirs, "difference": float(gaps.mean()),
                      "half": float(level * error), "p": t_test(gaps),
                      "seen": float((level + stats.t.ppf(0.8, df)) * error)})
    for comparison, p in zip(found, holm([comparison["p"] for comparison in found])):
        comparison["holm"] = p
    return found


# ---- The tables ----------------------------------------------------------------------------------

def tables(numbers, rates):
    """Name -> Markdown."""
    found = {"SFT": table_sft(numbers["SFT"])}
    rows = [row for row in numbers if row != "SFT"]
    for measure, digits in (("reward", 2), ("greedy", 2), ("accuracy", 3)):
        found[f"{measure} by rate"] = table_rates(numbers, rows, rates, measure, digits)
    found["reward at equal KL"] = table_kl(numbers, rows)
    found["tuned out of sample"] = table_tuned(numbers, rows, rates)
    if len(numbers["SFT"]["reward"]) > 1:
        family = [pair for pair in FAMILY if {*pair} <= {*rows}]
        for measure in ("reward", "greedy", "accuracy"):
            found[f"the family, {measure}"] = table_family(comparisons(numbers, measure, family))
    return found


def table_sft(sft):
    lines = [(f"{TEMPERATURE:g}", plus_minus(sft["reward"]), plus_minus(sft["kl"]))]
    lines += [(f"{cooler:g}", plus_minus(sft[f"{cooler:g}"]["reward"]),
               plus_minus(sft[f"{cooler:g}"]["kl"])) for cooler in COOLER]
    lines.append(("0", plus_minus(sft["greedy"]), ""))
    return markdown(("SFT at temperature", "true reward", "KL to SFT at 1, nats"), lines)


def table_rates(numbers, rows, rates, measure, digits):
    """The best look of every rate, by the mean over seeds."""
    lines = []
    for row in rows:
        values, cells = np.array(numbers[row][measure], dtype=float), []
        for number in range(len(rates)):
            means = values[number].mean(axis=0)                        # (looks,), NaN: diverged
            if np.isnan(means).all():
                cells.append("diverges")
            else:
                look = int(np.nanargmax(means))
                cells.append(f"{plus_minus(values[number, :, look], digits)} at {LOOKS[look]}")
        lines.append((row, *cells))
    return markdown((f"{measure}, best look", *(f"lr {rate:g}" for rate in rates)), lines)


def table_kl(numbers, rows):
    """Means over the seeds and rates whose runs reach a KL."""
    start, lines = numbers["SFT"], []
    for row in rows:
        cells = []
        for value in KL_VALUES:
            by_seed = []
            for seed, begin in enumerate(zip(start["kl"], start["reward"])):
                runs = [at_kl(kl[seed], reward[seed], begin, value) for kl, reward in
                        zip(numbers[row]["kl"], numbers[row]["reward"])]
                runs = [reward for reward in runs if reward is not None]
                by_seed += [np.mean(runs)] if runs else []
            cells.append(f"{plus_minus(by_seed)} ({len(by_seed)})" if by_seed else "-")
        lines.append((row, *cells))
    return markdown(("true reward where KL to SFT is (seeds that reach it)",
                     *(f"{value:g}" for value in KL_VALUES)), lines)


def table_tuned(numbers, rows, rates):
    lines = []
    for row in rows:
        rate, look = tuned(numbers[row])
        edge = ", an edge" if rate in (0, len(rates) - 1) else ""
        cells = [out_of_sample(numbers[row], measure) for measure in ("reward", "greedy")] \
            if len(numbers["SFT"]["reward"]) > 1 else []
        shown = [f"{cell['mean']:.2f} ({cell['spread']:.2f})" for cell in cells] or ["-", "-"]
        turns = 2 if "adversary" in row or row == "IOPO" else 1
        lines.append((row, f"{rates[rate]:g} x {LOOKS[look]}{edge}", str(turns * LOOKS[look]),
                      *shown))
    return markdown(("row", "lr x steps that all votes choose", "optimiser steps in all",
                     "true reward out of sample (spread over resamples)", "greedy"), lines)


def table_family(found):
    return markdown(("comparison", "difference", "p", "p by Holm", "seen with 80% power"),
                    [(f"{each['ours']} minus {each['theirs']}",
                      f"{each['difference']:+.3f} ± {each['half']:.3f}", f"{each['p']:.3f}",
                      f"{each['holm']:.3f}", f"{each['seen']:.3f}") for each in found])
