"""Which runs the reproduction is made of, and the numbers that they come to.

A row is a method with its options. It is trained at every learning rate of its grid, for every
seed, from that seed's SFT model (or another row's), and looked at along the way.
"""

import re

import numpy as np
from tqdm import tqdm

import train
from reproduction.runs import COOLER, LEVELS, LOOKS, SAMPLES, Run

RATES, SEEDS = (3e-5, 1e-4, 3e-4, 1e-3), tuple(range(10))
MIDDLE_RATES, FEWER_SEEDS = RATES[1:3], SEEDS[:5]                      # of the ablation
TURN = 25                                   # N_mu and, with an adversary, N_nu


# ---- The rows ------------------------------------------------------------------------------------

FRONTIER = {"DPO, beta 0.1": {"method": "dpo"}, "DPO, beta 0.3": {"method": "dpo", "beta": 0.3},
            "DPO, beta 1": {"method": "dpo", "beta": 1.0},
            "DPO, beta 3": {"method": "dpo", "beta": 3.0},
            "ratio alone": {"method": "iopo", "n_nu": 0},
            "adversary alone": {"method": "iopo", "ratio": "one"},
            "IOPO": {"method": "iopo"},
            "DPO with likelihood": {"method": "aipo", "alpha": 0.0}, "AIPO": {"method": "aipo"}}
# the paper's other rows. Those with `online` go on from a DPO model; those with `keep` train in
# rounds of sampled pairs, of which they keep this share
PAPER = {"HINGE": {"method": "hinge"}, "IPO": {"method": "ipo"},
         "KTO-pair": {"method": "kto_pair"},
         "DPO online": {"method": "dpo", "online": True},
         "IOPO online": {"method": "iopo", "online": True},
         "ratio alone, online": {"method": "iopo", "n_nu": 0, "online": True},
         "Iter-DPO": {"method": "dpo", "online": True, "keep": 0.2},
         "DPO rounds": {"method": "dpo", "keep": 1.0},
         "AIPO rounds": {"method": "aipo", "keep": 1.0}}
ABLATION = {" ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items()):
            {"method": "iopo", **options}
            for options in ({"ratio": "length_normalized"}, {"ratio": "env"},
                            {"clip": "two_sided"}, {"clip": "none"},
                            {"adversary": "negated"}, {"adversary": "same"},
                            {"eps": 0.1}, {"eps": 0.2}, {"eps": 0.5}, {"eps": 0.9},
                            {"n_mu": 5, "n_nu": 5}, {"n_mu": 50, "n_nu": 50},
                            {"n_nu": 5}, {"n_nu": 50})}
PARTS = {"frontier": (FRONTIER, RATES, SEEDS), "tables": (PAPER, RATES, SEEDS),
         "ablation": (ABLATION, MIDDLE_RATES, FEWER_SEEDS)}


def in_rounds(rows):
    """Those of PAPER that take most of its time."""
    return {row: options for row, options in rows.items() if "keep" in options}


def sft_runs(seeds, out):
    return [Run(f"{out}/sft-seed{seed}", {"method": "sft", "n_iter": 0, "seed": seed})
            for seed in seeds]


def dpo_runs(lr, steps, seeds, out):
    """The DPO models that the rows called online go on from."""
    return [Run(f"{out}/dpo-model-seed{seed}",
                {"method": "dpo", "lr": lr, "n_iter": 1, "n_mu": steps,
                 "model": sft.model.as_posix(), "seed": seed}, sft.model.as_posix())
            for seed, sft in zip(seeds, sft_runs(seeds, out))]


def row_runs(row, options, rates, seeds, out, dpo=()):
    """The runs of a row: rate by rate, each with all seeds. `dpo`: dpo_runs of these seeds."""
    name, sft = re.sub("[^a-z0-9.]+", "-", row.lower()).strip("-"), sft_runs(seeds, out)
    keep, starts = options.get("keep"), dpo if "online" in options else sft
    own = own_options(options)
    count = max(LOOKS) // own["n_mu"]
    return [Run(f"{out}/{name}-lr{rate:g}-seed{seed}",
                {**own, "n_iter": 1 if keep else count, "lr": rate,
                 "model": start.model.as_posix(), "seed": seed},
                base.model.as_posix(), *((count, keep) if keep else ()))
            for rate in rates for seed, start, base in zip(seeds, starts, sft)]


def own_options(options):
    """Those of a row that are train.py's."""
    return {"n_mu": TURN, **{name: value for name, value in options.items()
                             if name not in ("online", "keep")}}


def turn_lengths(options):
    """(N_mu, N_nu) of a row, N_nu 0 where there is no adversary."""
    config = train.make_config(own_options(options))
    return config.n_mu, config.n_nu


def progress(name, runs, jobs):
    """A bar over the seconds that runs take in one process."""
    seconds = sum(run.seconds for run in runs)
    print(f"{name}: {len(runs)} runs, about {seconds / jobs / 60:.0f} minutes if none is done yet",
          flush=True)
    return tqdm(total=seconds, desc=name, unit="s of work", smoothing=0)


# ---- The numbers ---------------------------------------------------------------------------------

MEASURES = ("reward", "greedy", "accuracy", "kl", "vote", "tokens", "margin", "spread", "idle",
            "log_ratio")


def gather(sft, results, options, rates, seeds):
    """{measure: (rates, seeds, looks)} of a row, NaN after a run has diverged; quantiles of log r
    have an axis more. `sft` and `results` are in the order of sft_runs and row_runs. The vote is
    the chance that the human prefers the row's answer to a validation prompt to SFT's, as expected
    from their rewards; NaN while a row's adversary has not trained yet, since until then the row is
    the one without."""
    n_mu, n_nu = turn_lengths(options)
    shape = len(rates), len(seeds), len(LOOKS)
    found = {measure: np.full(shape, np.nan) for measure in MEASURES}
    found |= {name: np.full((*shape, len(LEVELS)), np.nan)
              for name in ("log_ratio", "adversary_log_ratio")}
    for place, result in zip(np.ndindex(len(rates), len(seeds)), results):
        for look in result["looks"]:
            others = sft[place[1]]["looks"][0]["validation"]
            values = {"reward": mean_reward(look["test"]), "greedy": mean_reward(look["greedy"]),
                      "vote": vote(look["validation"], others), "kl": look["test"]["kl"],
                      "tokens": look["test"]["tokens"]}
            for measure in MEASURES:
                where = (*place, LOOKS.index(look["steps"]))
                found[measure][where] = values.get(measure, look.get(measure, np.nan))
            if n_nu and look["steps"] <= n_mu:
                found["vote"][where] = np.nan
        for look in result["adversary"]:
            where = (*place, LOOKS.index(look["steps"]))
            found["adversary_log_ratio"][where] = look["log_ratio"]
    return {measure: values.tolist() for measure, values in found.items()}


def gather_sft(results):
    """{measure: (seeds,)} of SFT, and {temperature: the same} where it is cooler. `bad`: the share
    of rewards below 0, which are those of wrong and harmful answers."""
    looks = [result["looks"][0] for result in results]
    found = {"greedy": [mean_reward(look["greedy"]) for look in looks],
             "bad_greedy": [share_below(look["greedy"]) for look in looks]}
    for name in ("test", *map("{:g}".format, COOLER)):
        found[name] = {"reward": [mean_reward(look[name]) for look in looks],
                       "kl": [look[name]["kl"] for look in looks],
                       "tokens": [look[name]["tokens"] for look in looks],
                       "bad": [share_below(look[name]) for look in looks]}
    return {**found.pop("test"), **found}


def pack(row, results, shape):
    """Every reward, in quarters, for a file: {"row, what": (*shape, looks, answers) int8}, none
    below -127, and -128 after a run has diverged. shape: (rates, seeds); SFT has one of each
    rate and look."""
    steps, packed = (0,) if row == "SFT" else LOOKS, {}
    cooler = map("{:g}".format, COOLER) if row == "SFT" else ()
    for name in (*SAMPLES, "greedy", *cooler):
        answers = len(results[0]["looks"][0][name]["quarters"])
        values = np.full((*shape, len(steps), answers), -128, dtype=np.int8)
        for place, result in zip(np.ndindex(shape), results):
            for look in result["looks"]:
                values[(*place, steps.index(look["steps"]))] = \
                    np.clip(look[name]["quarters"], -127, 127)
        packed[f"{row}, {name}"] = values
    return packed


def mean_reward(answers):
    return float(np.mean(answers["quarters"])) / 4


def share_below(answers):
    return float(np.mean(np.array(answers["quarters"]) < 0))


def vote(answers, others):
    gaps = (np.array(answers["quarters"]) - np.array(others["quarters"])) / 4
    return float(np.mean(1 / (1 + np.exp(-gaps))))
