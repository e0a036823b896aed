"""What the frontiers come to, from the numbers of frontier.gather alone: choices, comparisons,
tables."""

import itertools

import numpy as np

from reproduction.frontier import COOLER, LOOKS, ROWS, TEMPERATURE, TURN
from reproduction.tables import markdown, plus_minus, standard_error, student, t_test

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


def scores(numbers, row, measure):
    """(rates, seeds, looks). A run that diverged counts as what its user is left with, SFT."""
    values = np.array(numbers[row][measure], dtype=float)
    instead = numbers["SFT"].get(measure, 0.5)                         # SFT's accuracy is chance
    return np.where(np.isnan(values), np.reshape(instead, (1, -1, 1)), values)


def out_of_sample(numbers, row, measure, resamples=RESAMPLES):
    """Seeds are drawn with replacement, rate and steps chosen on their votes, and scored on the
    seeds that were not drawn: {mean, the standard deviation of such scores over resamples}."""
    values, rng, found = scores(numbers, row, measure), np.random.default_rng(0), []
    count = values.shape[1]
    for _ in range(resamples):
        drawn = rng.integers(count, size=count)
        left = np.setdiff1d(np.arange(count), drawn)
        if len(left):
            rate, look = tuned(numbers[row], drawn)
            found.append(np.mean(values[rate, left, look]))
    return {"mean": float(np.mean(found)), "spread": float(np.std(found))}


def left_out(numbers, row, measure):
    """(seeds,): every seed at the rate and steps that the votes of all others choose."""
    values, row = scores(numbers, row, measure), numbers[row]
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
        gaps = left_out(numbers, ours, measure) - left_out(numbers, theirs, measure)
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
        cells = [out_of_sample(numbers, row, measure) for measure in ("reward", "greedy")] \
            if len(numbers["SFT"]["reward"]) > 1 else []
        shown = [f"{cell['mean']:.2f} ({cell['spread']:.2f})" for cell in cells] or ["-", "-"]
        options = ROWS[row]
        n_nu = options.get("n_nu", TURN) if options["method"] == "iopo" else 0
        total = LOOKS[look] * (TURN + n_nu) // TURN
        lines.append((row, f"{rates[rate]:g} x {LOOKS[look]}{edge}", str(total),
                      *shown))
    return markdown(("row", "lr x steps that all votes choose", "optimiser steps in all",
                     "true reward out of sample (spread over resamples)", "greedy"), lines)


def table_family(found):
    return markdown(("comparison", "difference", "p", "p by Holm", "seen with 80% power"),
                    [(f"{each['ours']} minus {each['theirs']}",
                      f"{each['difference']:+.3f} ± {each['half']:.3f}", f"{each['p']:.3f}",
                      f"{each['holm']:.3f}", f"{each['seen']:.3f}") for each in found])
