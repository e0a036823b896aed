"""Which runs the reproduction is made of: the rows of its tables, how each row's learning rate and
steps are chosen, and all runs of all rows."""

import itertools
import re
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data import SafeWorld
from eval import shuffled_prompts
from reproduction.runs import STEPS, Task, carry_out_all

SEEDS, ABLATION_SEEDS = tuple(range(10)), (0, 1, 2)
TUNING_SEEDS = (100, 101, 102)              # other pairs, first weights and SFT models than SEEDS
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)      # the candidates for every row, each with all of STEPS
STEPS_PER_TURN = 25                         # N_mu, but for the readings that change it


# ---- The rows ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Variant:
    """A row: the options of train.py that make it, the row whose model it starts from, the row
    whose tuned learning rate and steps it takes (None: its own), and where it trains in rounds of
    sampled pairs the share of these that it keeps."""
    options: dict
    start: str = "SFT"
    tuned_as: str | None = None
    keep: float | None = None


OFFLINE = {
    "IOPO": Variant({"method": "iopo"}),
    "DPO": Variant({"method": "dpo"}),
    "HINGE": Variant({"method": "hinge"}),
    "IPO": Variant({"method": "ipo"}),
    "KTO-pair": Variant({"method": "kto_pair"}),
    "AIPO": Variant({"method": "aipo"}),
    "ratio, no adversary": Variant({"method": "iopo", "n_nu": 0}),
    "adversary, no ratio": Variant({"method": "iopo", "ratio": "one"})}
ONLINE = {                                  # from DPO: as much training as the other rows have
    "DPO online": Variant({"method": "dpo"}, start="DPO"),
    "IOPO online": Variant({"method": "iopo"}, start="DPO"),
    "ratio, no adversary, online": Variant({"method": "iopo", "n_nu": 0}, start="DPO"),
    "Iter-DPO": Variant({"method": "dpo"}, start="DPO", keep=0.2),
    "AIPO rounds": Variant({"method": "aipo"}, keep=1.0),
    "DPO rounds": Variant({"method": "dpo"}, keep=1.0),     # AIPO's pipeline with DPO's loss,
    "DPO rounds, AIPO's lr": Variant({"method": "dpo"}, keep=1.0, tuned_as="AIPO rounds")}
ROUNDS = tuple(label for label, variant in ONLINE.items() if variant.keep is not None)
ABLATION = {" ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items()):
            Variant({"method": "iopo", **options}, tuned_as="IOPO")
            for options in ({"ratio": "length_normalized"}, {"ratio": "env"}, {"ratio": "one"},
                            {"clip": "two_sided"}, {"clip": "none"},
                            {"adversary": "negated"}, {"adversary": "same"},
                            {"eps": 0.1}, {"eps": 0.2}, {"eps": 0.5}, {"eps": 0.9},
                            {"n_mu": 5, "n_nu": 5}, {"n_mu": 50, "n_nu": 50},
                            {"n_nu": 5}, {"n_nu": 50})}
VARIANTS = OFFLINE | ONLINE | ABLATION
SHORT_TURNS = "--n-mu 5 --n-nu 5"           # the most turns, so the theorems' Q is followed there
ALSO_COMPARED = ("ratio, no adversary", "adversary, no ratio", "DPO")      # in the ablation's table
TABLE1 = ("SFT", "DPO", "HINGE", "IPO", "KTO-pair", "AIPO", "ratio, no adversary",
          "adversary, no ratio")
TABLE2 = ("SFT", "DPO", "DPO online", "Iter-DPO", "AIPO rounds", "ratio, no adversary, online",
          "IOPO online")
FIGURE3 = ("DPO", "HINGE", "IPO", "KTO-pair", "AIPO", "IOPO")
FIGURE4 = ("DPO", "Iter-DPO", "IOPO online")
FIGURE5 = (*FIGURE4, "DPO online", "ratio, no adversary, online")


def task_of(label, seed, choice, split, out, suffix=""):
    """The Task of a row. `choice`: {"lr": ..., "steps": ...}, the protagonist's."""
    name = re.sub("[^a-z0-9.]+", "-", label.lower()).strip("-")
    folder = f"{out}/{name}{suffix}-seed{seed}"
    if label == "SFT":
        return Task(folder, {"method": "sft", "n_iter": 0, "seed": seed}, split, 0)
    variant, steps = VARIANTS[label], choice["steps"]
    start = task_of(variant.start, seed, choice, split, out).model
    options = {**variant.options, "model": start.as_posix(), "seed": seed, "lr": choice["lr"]}
    if label in ROUNDS:                     # as many rounds for all, for the curves over rounds
        return Task(folder, {**options, "n_iter": 1}, split, steps,
                    rounds=max(STEPS) // STEPS_PER_TURN, keep=variant.keep)
    turn = variant.options.get("n_mu", STEPS_PER_TURN)
    return Task(folder, {**options, "n_iter": steps // turn}, split, steps)


# ---- The choice of rates and steps ---------------------------------------------------------------

def tuned_rows():
    """The rows that have a choice of their own."""
    return [label for label, variant in VARIANTS.items() if variant.tuned_as is None]


def tune(out, pool, jobs):
    """Learning rate and steps for every one of the tuned_rows: those whose sampled answers to the
    validation prompts the noisy human most often prefers to the SFT model's. The same candidates
    and seeds for every row."""
    def task(label, seed, choice=None, suffix=""):
        return task_of(label, seed, choice, "validation", f"{out}/tuning", suffix)

    def trials(labels):
        return list(itertools.product(labels, RATES, TUNING_SEEDS))

    def tasks_of(labels):
        return [task(label, seed, {"lr": rate, "steps": max(STEPS)}, f"-lr{rate:g}")
                for label, rate, seed in trials(labels)]

    def choose(labels):
        results = carry_out_all(tasks_of(labels), pool, bar)
        for (label, rate, seed), result in zip(trials(labels), results):
            for turn in result["turns"]:
                if turn["sampled"]:
                    share = preferred(turn["sampled"], start[seed], seed) / len(TUNING_SEEDS)
                    shares[label][f"{rate:g}"][turn["steps"]] += share
        for label in labels:
            candidates = [(share, rate, steps) for rate, by_steps in shares[label].items()
                          for steps, share in by_steps.items()]
            share, rate, steps = max(candidates, key=lambda candidate: candidate[0])
            chosen[label] = {"lr": float(rate), "steps": steps, "share": share}

    own = tuned_rows()
    shares = {label: {f"{rate:g}": dict.fromkeys(STEPS, 0.0) for rate in RATES} for label in own}
    chosen = {}
    sft = [task("SFT", seed) for seed in TUNING_SEEDS]
    longest = [task("DPO", seed, {"lr": RATES[0], "steps": max(STEPS)}) for seed in TUNING_SEEDS]
    with progress("tuning", sft + tasks_of(own) + longest, jobs) as bar:
        start = {seed: result["turns"][-1]["sampled"]
                 for seed, result in zip(TUNING_SEEDS, carry_out_all(sft, pool, bar))}
        choose([label for label in own if VARIANTS[label].start == "SFT"])
        carry_out_all([task("DPO", seed, chosen["DPO"]) for seed in TUNING_SEEDS], pool, bar)
        choose([label for label in own if VARIANTS[label].start == "DPO"])
    return {"seeds": TUNING_SEEDS, "shares": shares, "chosen": chosen}


def preferred(answers, others, seed):
    """The share of answers that the noisy human of the safe world prefers to the others; identical
    ones count half."""
    world, rng = SafeWorld(), np.random.default_rng(seed)
    prompts = itertools.cycle(shuffled_prompts("validation"))
    votes = [0.5 if ours == theirs else world.prefers(prompt, ours, theirs, rng)
             for prompt, (ours, _), (theirs, _) in zip(prompts, answers, others)]
    return sum(votes) / len(votes)


def progress(name, tasks, jobs):
    """A bar over the seconds that tasks take in one process."""
    seconds = sum(task.seconds for task in tasks)
    print(f"{name}: {len(tasks)} runs, about {seconds / jobs / 60:.0f} minutes if none is done yet",
          flush=True)
    return tqdm(total=seconds, desc=name, unit="s of work", smoothing=0)


# ---- All runs ------------------------------------------------------------------------------------

def run_rows(chosen, seeds, ablation_seeds, out, pool, jobs):
    """Carry out every row for every seed on the test split: {label: [a result per seed]}."""
    seeds_of = {label: ablation_seeds if label in ABLATION else seeds
                for label in ("SFT", *VARIANTS)}
    stages = [["SFT"], *([label for label, variant in VARIANTS.items() if variant.start == start]
                         for start in ("SFT", "DPO"))]

    def tasks_of(label):
        choice = None if label == "SFT" else chosen[VARIANTS[label].tuned_as or label]
        return [task_of(label, seed, choice, "test", out) for seed in seeds_of[label]]

    seen, everything = {}, [task for label in seeds_of for task in tasks_of(label)]
    with progress("reproduction", everything, jobs) as bar:
        for stage in stages:
            tasks = [task for label in stage for task in tasks_of(label)]
            results = iter(carry_out_all(tasks, pool, bar))
            seen |= {label: list(itertools.islice(results, len(seeds_of[label])))
                     for label in stage}
    return seen
