"""Which runs the reproduction is made of, and the numbers that they come to.

A row is a method with its options. It is trained at every learning rate of its grid, for every
seed, from that seed's SFT model (or another row's), and looked at along the way.
"""

import re

import numpy as np
from tqdm import tqdm

from reproduction.runs import COOLER, LEVELS, LOOKS, Run

RATES, SEEDS = (3e-5, 1e-4, 3e-4, 1e-3), tuple(range(10))
TURN = 25                                   # N_mu and, with an adversary, N_nu


# ---- The rows ------------------------------------------------------------------------------------

FRONTIER = {"DPO, beta 0.1": {"method": "dpo"}, "DPO, beta 0.3": {"method": "dpo", "beta": 0.3},
            "DPO, beta 1": {"method": "dpo", "beta": 1.0},
            "DPO, beta 3": {"method": "dpo", "beta": 3.0},
            "ratio alone": {"method": "iopo", "n_nu": 0},
            "adversary alone": {"method": "iopo", "ratio": "one"},
            "IOPO": {"method": "iopo"},
            "DPO with likelihood": {"method": "aipo", "alpha": 0.0}, "AIPO": {"method": "aipo"}}


def sft_runs(seeds, out):
    return [Run(f"{out}/sft-seed{seed}", {"method": "sft", "n_iter": 0, "seed": seed})
            for seed in seeds]


def row_runs(row, options, rates, seeds, out):
    """The runs of a row from the SFT models: rate by rate, each with all seeds."""
    name = re.sub("[^a-z0-9.]+", "-", row.lower()).strip("-")
    return [Run(f"{out}/{name}-lr{rate:g}-seed{seed}",
                {"n_mu": TURN, "n_iter": max(LOOKS) // TURN, **options, "lr": rate,
                 "model": sft.model.as_posix(), "seed": seed}, sft.model.as_posix())
            for rate in rates for seed, sft in zip(seeds, sft_runs(seeds, out))]


def progress(name, runs, jobs):
    """A bar over the seconds that runs take in one process."""
    seconds = sum(run.seconds for run in runs)
    print(f"{name}: {len(runs)} runs, about {seconds / jobs / 60:.0f} minutes if none is done yet",
          flush=True)
    return tqdm(total=seconds, desc=name, unit="s of work", smoothing=0)


# ---- The numbers ---------------------------------------------------------------------------------

MEASURES = ("reward", "greedy", "accuracy", "kl", "vote", "tokens", "margin", "spread", "idle")


def gather(sft, results, rates, seeds):
    """{measure: (rates, seeds, looks)} of a row, NaN after a run has diverged. `sft` and `results`
    are in the order of sft_runs and row_runs. The vote is the chance that the human prefers the
    row's answer to a validation prompt to SFT's, as expected from their rewards."""
    found = {measure: np.full((len(rates), len(seeds), len(LOOKS)), np.nan) for measure in MEASURES}
    for place, result in zip(np.ndindex(len(rates), len(seeds)), results):
        for look in result["looks"]:
            others = sft[place[1]]["looks"][0]["validation"]
            values = {"reward": mean_reward(look["test"]), "greedy": mean_reward(look["greedy"]),
                      "vote": vote(look["validation"], others), "kl": look["test"]["kl"],
                      "tokens": look["test"]["tokens"]}
            for measure in MEASURES:
                where = (*place, LOOKS.index(look["steps"]))
                found[measure][where] = values.get(measure, look.get(measure, np.nan))
    return {measure: values.tolist() for measure, values in found.items()}


def gather_sft(results):
    """{measure: (seeds,)} of SFT, and {temperature: the same} where it is cooler."""
    looks = [result["looks"][0] for result in results]
    found = {"greedy": [mean_reward(look["greedy"]) for look in looks]}
    for name in ("test", *map("{:g}".format, COOLER)):
        found[name] = {"reward": [mean_reward(look[name]) for look in looks],
                       "kl": [look[name]["kl"] for look in looks],
                       "tokens": [look[name]["tokens"] for look in looks]}
    return {**found.pop("test"), **found}


def gather_ratios(results, rates, seeds):
    """Quantiles of log r, (rates, seeds, looks, levels), of the protagonist and the adversary."""
    found = {}
    for player, name in (("protagonist", "looks"), ("adversary", "adversary")):
        values = np.full((len(rates), len(seeds), len(LOOKS), len(LEVELS)), np.nan)
        for place, result in zip(np.ndindex(len(rates), len(seeds)), results):
            for look in result[name]:
                values[(*place, LOOKS.index(look["steps"]))] = look["log_ratio"]
        found[player] = values
    return found


def pack(results, shape, names):
    """Every reward, in quarters, for a file: {name: (*shape, looks, answers) int8}, none below
    -127, and -128 after a run has diverged. shape: (rates, seeds); SFT has one rate and look."""
    steps, packed = [0] if "0.6" in names else LOOKS, {}
    for name in names:
        answers = len(results[0]["looks"][0][name]["quarters"])
        values = np.full((*shape, len(steps), answers), -128, dtype=np.int8)
        for place, result in zip(np.ndindex(shape), results):
            for look in result["looks"]:
                values[(*place, list(steps).index(look["steps"]))] = \
                    np.clip(look[name]["quarters"], -127, 127)
        packed[name] = values
    return packed


def mean_reward(answers):
    return float(np.mean(answers["quarters"])) / 4


def vote(answers, others):
    gaps = (np.array(answers["quarters"]) - np.array(others["quarters"])) / 4
    return float(np.mean(1 / (1 + np.exp(-gaps))))
