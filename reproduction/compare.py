"""What the numbers of plan.gather come to: choices, comparisons, and tables of them in Markdown."""

import itertools
import math

import numpy as np

from reproduction.game import STATED, TURNS
from reproduction.plan import FRONTIER, MIDDLE_RATES, PAPER, turn_lengths
from reproduction.runs import COOLER, LOOKS, SAMPLES, TEMPERATURE

KL_VALUES = (0.25, 0.5, 1.0, 2.0)           # nats an answer
RESAMPLES = 500
# Named before the runs: true reward at T=0.8. Holm is applied to these; all else is exploratory.
FAMILY = (("IOPO", "DPO, beta 0.1"), ("IOPO", "DPO, beta 1"), ("IOPO", "ratio alone"),
          ("ratio alone", "DPO, beta 1"), ("adversary alone", "DPO, beta 0.1"),
          ("DPO, beta 1", "DPO, beta 0.1"))


# ---- Choices of rate and steps -------------------------------------------------------------------

def tuned(row, seeds=slice(None), at_most=math.inf):
    """(rate, look) with the highest mean vote on validation prompts, over the seeds at these
    places; a point where any of them diverged is none. `at_most`: the highest mean KL to SFT."""
    means = np.array(row["vote"], dtype=float)[:, seeds].mean(axis=1)             # (rates, looks)
    if at_most < math.inf:
        far = np.array(row["kl"], dtype=float)[:, seeds].mean(axis=1) > at_most
        means = np.where(far, np.nan, means)
    if np.isnan(means).all():
        return None
    return np.unravel_index(np.nanargmax(means), means.shape)


def scores(numbers, row, measure):
    """(rates, seeds, looks). A run that diverged counts as what its user is left with, SFT."""
    values = np.array(numbers[row][measure], dtype=float)
    instead = numbers["SFT"].get(measure, 0.5 if measure == "accuracy" else 0.0)
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


def choices(row, at_most=math.inf):
    """For every seed the (rate, look) that the votes of all others choose; None: there is none."""
    count = np.shape(row["vote"])[1]
    if count == 1:                                                     # nobody else to ask
        return [tuned(row, at_most=at_most)]
    return [tuned(row, [other for other in range(count) if other != seed], at_most)
            for seed in range(count)]


def left_out(numbers, row, measure, at_most=math.inf):
    """(seeds,): every seed at the rate and steps that the votes of all others choose. Where nothing
    is within `at_most`, the seed stays with SFT."""
    values, start = scores(numbers, row, measure), numbers["SFT"].get(measure)
    return np.array([values[place[0], seed, place[1]] if place else start[seed]
                     for seed, place in enumerate(choices(numbers[row], at_most))])


def at_kl(kl, reward, start, value):
    """The reward of one run where its KL to SFT first is `value`, between its looks on a straight
    line; None where it never is. kl, reward: (looks,); start: SFT's own (KL, reward). KL is not
    monotone along a run, so where it jumps this is a guess."""
    points = [start, *zip(kl, reward)]
    for (kl_a, reward_a), (kl_b, reward_b) in itertools.pairwise(points):
        if kl_a <= value <= kl_b:
            share = (value - kl_a) / (kl_b - kl_a) if kl_b > kl_a else 0.0
            return reward_a + share * (reward_b - reward_a)
    return None                                                        # NaN compares as no


def at_equal_kl(numbers, row, measure, rate, value):
    """(seeds,): NaN where a seed's run at this rate never reaches this KL."""
    start, found = numbers["SFT"], []
    kl, values = (np.array(numbers[row][name], dtype=float)[rate] for name in ("kl", measure))
    for seed in range(len(kl)):
        begin = start["kl"][seed], start[measure][seed]
        found.append(at_kl(kl[seed], values[seed], begin, value))
    return np.array(found, dtype=float)                                # NaN for None


# ---- Comparisons ---------------------------------------------------------------------------------

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


def holm(p_values):
    """Holm's adjusted p-values, in the order given."""
    order, adjusted, highest = np.argsort(p_values), np.empty(len(p_values)), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted.tolist()


def half_interval(values):
    """Half the width of the 95% interval of a mean."""
    return student().t.ppf(0.975, len(values) - 1) * standard_error(values)


def t_test(values):
    """Two-sided p of Student's test that the mean is 0."""
    if not np.any(values):
        return 1.0
    with np.errstate(divide="ignore"):                                 # all alike: t is infinite
        t = abs(np.mean(values)) / standard_error(values)
    return float(2 * student().t.sf(t, len(values) - 1))


def standard_error(values):
    return np.std(values, ddof=1) / math.sqrt(len(values))


def student():
    """scipy's distributions; without them one seed can still be shown."""
    try:
        from scipy import stats
    except ImportError:
        raise ValueError("intervals over seeds need scipy (pip install -r "
                         "reproduction/requirements.txt); --quick has none") from None
    return stats


# ---- The frontier's tables -----------------------------------------------------------------------

def frontier_tables(numbers, _, rates):
    """Name -> Markdown."""
    rows = [row for row in numbers if row != "SFT"]
    found = {"tuned out of sample": table_tuned(numbers, rows, rates)}
    if len(numbers["SFT"]["reward"]) > 1:
        family = [pair for pair in FAMILY if {*pair} <= {*rows}]
        found["the family"] = table_family(comparisons(numbers, "reward", family))
        found["exploratory"] = table_exploratory(numbers, [*family, ("AIPO", "ratio alone")])
    found["SFT alone"] = table_sft(numbers["SFT"])
    for measure, digits in (("reward", 2), ("greedy", 2), ("accuracy", 3)):
        found[f"{measure} by rate"] = table_rates(numbers, rows, rates, measure, digits)
    if len(numbers["SFT"]["reward"]) > 1:
        for measure, digits in (("reward", 2), ("greedy", 2), ("tokens", 1)):
            found[f"{measure} within a KL"] = table_within(numbers, rows, measure, digits)
    for number, rate in enumerate(rates):
        if rate in MIDDLE_RATES:
            found[f"reward at a KL, lr {rate:g}"] = table_kl(numbers, rows, "reward", number)
    chosen = [int(tuned(numbers[row])[0]) for row in rows]
    rate = max(sorted(set(chosen)), key=chosen.count)                  # that most rows choose
    for measure, words in (("idle", "share of pairs with a weight below 5% of its start"),
                           ("kl", "KL to SFT")):
        title = f"{words}, lr {rates[rate]:g}, after steps"
        found[f"{measure} along runs"] = table_along(numbers, rows, measure, rate, title)
    return found


def table_sft(sft):
    at = {TEMPERATURE: sft, **{cooler: sft[f"{cooler:g}"] for cooler in COOLER}}
    lines = [(f"{temperature:g}", plus_minus(some["reward"]), plus_minus(some["bad"]),
              plus_minus(some["kl"])) for temperature, some in at.items()]
    lines.append(("0", plus_minus(sft["greedy"]), plus_minus(sft["bad_greedy"]), ""))
    return markdown(("SFT at temperature", "true reward",
                     "share of answers below 0 (wrong or harm)", "KL to SFT at 1, nats"), lines)


def table_rates(numbers, rows, rates, measure, digits):
    """Every rate at the steps that its votes choose."""
    lines = []
    for row in rows:
        found = at_voted_looks(numbers, row, measure)
        lines.append((row, *(f"{plus_minus(values, digits)} at {LOOKS[look]}"
                             for look, values in found)))
    return markdown((f"{measure}, at the steps that the votes choose",
                     *(f"lr {rate:g}" for rate in rates)), lines)


def table_within(numbers, rows, measure, digits):
    """Every seed at what the others' votes choose of all that is no farther from SFT."""
    lines = [(row, *(plus_minus(left_out(numbers, row, measure, value), digits)
                     for value in KL_VALUES)) for row in rows]
    return markdown((f"{measure}, tuned, with a KL to SFT of at most",
                     *(f"{value:g}" for value in KL_VALUES)), lines)


def at_voted_looks(numbers, row, measure):
    """[(the look with the most votes, a value per seed) of every rate]."""
    values = scores(numbers, row, measure)
    looks = [voted_look(numbers, row, rate) for rate in range(len(values))]
    return [(look, values[rate, :, look]) for rate, look in enumerate(looks)]


def voted_look(numbers, row, rate):
    """The look with the most votes at a rate; the last one where some run diverged before any."""
    votes = np.array(numbers[row]["vote"], dtype=float)[rate].mean(axis=0)                # (looks,)
    return len(LOOKS) - 1 if np.isnan(votes).all() else int(np.nanargmax(votes))


def table_kl(numbers, rows, measure, rate, pairs=()):
    """Along runs at one rate; for pairs of rows, their difference in the seeds where both reach."""
    at = {row: [at_equal_kl(numbers, row, measure, rate, value) for value in KL_VALUES]
          for row in rows}
    for ours, theirs in pairs:
        at[f"{ours} minus {theirs}"] = [a - b for a, b in zip(at[ours], at[theirs])]
    lines = []
    for name, found in at.items():
        reached = [values[~np.isnan(values)] for values in found]
        lines.append((name, *(f"{plus_minus(values)} ({len(values)})" if len(values) else "-"
                              for values in reached)))
    return markdown((f"{measure} where a run's KL first is (seeds that reach it)",
                     *(f"{value:g}" for value in KL_VALUES)), lines)


def table_tuned(numbers, rows, rates):
    lines = []
    for row in rows:
        rate, look = tuned(numbers[row])
        edge = ", an edge" if rate in (0, len(rates) - 1) or look == len(LOOKS) - 1 else ""
        shown = ["-"] * 5
        if len(numbers["SFT"]["reward"]) > 1:
            cells = [out_of_sample(numbers, row, measure) for measure in ("reward", "greedy")]
            shown = [f"{cells[0]['mean']:.2f} ({cells[0]['spread']:.2f})",
                     plus_minus(left_out(numbers, row, "reward")),
                     f"{cells[1]['mean']:.2f} ({cells[1]['spread']:.2f})",
                     plus_minus(left_out(numbers, row, "accuracy"), 3),
                     plus_minus(left_out(numbers, row, "kl"))]
        lines.append((row, f"{rates[rate]:g} x {LOOKS[look]}{edge}",
                      str(total_steps(row, LOOKS[look])), *shown))
    return markdown(("row", "lr x steps that all votes choose", "optimiser steps in all",
                     "true reward out of sample (spread over resamples)", "± over seeds", "greedy",
                     "accuracy", "KL to SFT"), lines)


def total_steps(row, steps):
    """Optimiser steps of both players, where the protagonist has just made so many: the adversary
    has not had the turn after that."""
    n_mu, n_nu = turn_lengths({**FRONTIER, **PAPER}[row])
    return steps + n_nu * ((steps - 1) // n_mu)


def table_family(found):
    return markdown(("comparison", "difference in true reward", "p", "p by Holm",
                     "seen with 80% power"),
                    [(f"{each['ours']} minus {each['theirs']}",
                      f"{each['difference']:+.2f} ± {each['half']:.2f}", p_value(each["p"]),
                      p_value(each["holm"]), f"{each['seen']:.2f}") for each in found])


def table_exploratory(numbers, pairs):
    """Tuned differences of other measures, plain 95% intervals and p."""
    measures = {"reward": 2, "greedy": 2, "accuracy": 3, "kl": 2}
    return markdown(("comparison", *measures), [
        (f"{ours} minus {theirs}", *(difference(left_out(numbers, ours, measure),
                                                left_out(numbers, theirs, measure), digits)
                                     for measure, digits in measures.items()))
        for ours, theirs in pairs if {ours, theirs} <= {*numbers}])


def table_along(numbers, rows, measure, rate, title):
    """Along runs at one rate; rows whose method has no such number are left out."""
    lines = []
    for row in rows:
        values = np.array(numbers[row][measure], dtype=float)[rate]    # (seeds, looks)
        if not np.isnan(values).all():
            lines.append((row, *(plus_minus(values[:, look]) for look in range(len(LOOKS)))))
    return markdown((title, *map(str, LOOKS)), lines)


# ---- The paper's tables, and the ablation --------------------------------------------------------

TABLE1 = ("DPO, beta 0.1", "HINGE", "IPO", "KTO-pair", "AIPO", "ratio alone", "adversary alone",
          "DPO, beta 1")
TABLE2 = ("DPO, beta 0.1", "DPO online", "Iter-DPO", "DPO rounds", "AIPO rounds",
          "ratio alone, online")
LENGTH = (("AIPO", "DPO with likelihood"), ("AIPO rounds", "DPO rounds"))
PAPER1 = {"SFT": "44.8/21.6/33.6", "DPO, beta 0.1": "50.4/21.2/28.4", "HINGE": "49.2/20/30.8",
          "IPO": "44.8/22/33.2", "KTO-pair": "48/21.6/30.4"}
PAPER2 = {"SFT": "-, -, 13:204:10:23, 2.156", "DPO, beta 0.1": "23.75, .9286, 13:203:11:23, 2.164",
          "Iter-DPO": "7.6875, .961, 13:204:11:22, 2.152", "IOPO online": "11.875, .9659, -, 2.176"}


def paper_tables(numbers, rewards, rates):
    """Name -> Markdown. `rewards`: {"row, what": (rates, seeds, looks, answers)}, see plan.pack."""
    found = {"Table 1, one rate for all": table_fixed(numbers, ("IOPO", *TABLE1), "reward", rates),
             "Table 1, tuned": table1(numbers, rewards),
             "Table 2, one rate for all":
                 table_fixed(numbers, ("IOPO online", *TABLE2), "accuracy", rates),
             "Table 2, tuned": table2(numbers, rewards),
             "tuned out of sample":
                 table_tuned(numbers, [row for row in PAPER if row in numbers], rates)}
    pairs = [pair for pair in LENGTH if {*pair} <= {*numbers}]
    rows = ["DPO, beta 0.1", *itertools.chain.from_iterable(pairs)]
    for number, rate in enumerate(rates):
        if rate in MIDDLE_RATES:
            found[f"length at a KL, lr {rate:g}"] = \
                table_kl(numbers, rows, "tokens", number, pairs)
            title = f"tokens (SFT: {plus_minus(numbers['SFT']['tokens'])}), lr {rate:g}, after steps"
            found[f"length along runs, lr {rate:g}"] = \
                table_along(numbers, rows, "tokens", number, title)
    return found


def table_fixed(numbers, rows, measure, rates):
    """Every row at every rate, all with the most steps: what a comparison at one rate sees. Rows
    called online have those of the DPO model before them."""
    digits = 3 if measure == "accuracy" else 2
    last = {row: scores(numbers, row, measure)[:, :, -1] for row in rows}       # (rates, seeds)
    lines = [(row, *(plus_minus(values, digits) for values in last[row])) for row in rows]
    return markdown((f"{measure} after {LOOKS[-1]} steps of the protagonist",
                     *(f"lr {rate:g}" for rate in rates)), lines)


def table1(numbers, rewards):
    """Answers sampled at T=0.8; every seed at what the others' votes choose."""
    lines, ours = [], left_out(numbers, "IOPO", "reward")
    for row in ("IOPO", "SFT", *TABLE1):
        values = numbers["SFT"]["reward"] if row == "SFT" else left_out(numbers, row, "reward")
        compared = ("", "") if row == "IOPO" else \
            (difference(ours, values), shares(numbers, rewards, "IOPO", row, "test"))
        lines.append((row, plus_minus(values), *compared, PAPER1.get(row, "")))
    return markdown(("row", "true reward, T=0.8", "IOPO minus row", "IOPO wins/ties/loses, %",
                     "the paper's"), lines)


def table2(numbers, rewards):
    """Greedy answers; every seed at what the others' votes choose, from a DPO model that all votes
    have chosen."""
    lines, ours = [], "IOPO online"
    for row in (ours, "SFT", *TABLE2):
        values = {"greedy": numbers["SFT"]["greedy"]} if row == "SFT" else {
            name: left_out(numbers, row, name)
            for name in ("margin", "spread", "accuracy", "greedy")}
        held_out = ("-", "-") if row == "SFT" else (
            f"{plus_minus(values['margin'])} ({np.mean(values['spread']):.2f})",
            plus_minus(values["accuracy"], 3))
        compared = ("", "") if row == ours else (
            difference(left_out(numbers, ours, "greedy"), values["greedy"]),
            shares(numbers, rewards, ours, row, "greedy"))
        lines.append((row, *held_out, plus_minus(values["greedy"]), *compared, PAPER2.get(row, "")))
    return markdown(("row", "margin vs SFT (spread)", "accuracy", "true reward, T=0",
                     "IOPO online minus row", "IOPO online wins/ties/loses, %",
                     "the paper's margin, accuracy, counts of 250, mean"), lines)


def shares(numbers, rewards, ours, theirs, what):
    """Percentages of wins, ties and loses over prompts and all pairs of different draws, mean over
    seeds (two rows at the same look share their draws). A run that diverged counts as SFT."""
    found, start = [], rewards[f"SFT, {what}"][0, :, 0]                        # (seeds, answers)
    for seed in range(len(start)):
        sides = []
        for row in (ours, theirs):
            rate, look = choices(numbers[row])[seed] if row != "SFT" else (None, None)
            said = start[seed] if row == "SFT" else rewards[f"{row}, {what}"][rate, seed, look]
            said = start[seed] if (said == -128).all() else said
            sides.append(said.astype(int).reshape(SAMPLES["test"] if what == "test" else 1, -1))
        gaps = sides[0][:, None] - sides[1][None]                              # (draws, draws, n)
        if len(gaps) > 1:
            gaps = gaps[~np.eye(len(gaps), dtype=bool)]
        found.append([100 * np.mean(some) for some in (gaps > 0, gaps == 0, gaps < 0)])
    return "/".join(f"{share:.0f}" for share in np.mean(found, axis=0))


def ablation_tables(numbers, _, rates):
    """One factor at a time from IOPO, at one rate, every row at the steps that its votes choose."""
    lines = []
    for row in ("IOPO", *(row for row in numbers if row.startswith("--"))):
        cells = []
        for rate in range(len(rates)):
            look, default_look = (voted_look(numbers, name, rate) for name in (row, "IOPO"))
            values = {name: scores(numbers, row, name)[rate, :, look]
                      for name in ("reward", "accuracy")}
            default = scores(numbers, "IOPO", "reward")[rate, :, default_look]
            against = f", {difference(values['reward'], default)}" if row != "IOPO" else ""
            cells.append(f"{plus_minus(values['reward'])} at {LOOKS[look]}{against}")
            cells.append(plus_minus(values["accuracy"], 3))
        lines.append((f"`{row}`" if row.startswith("--") else row, *cells))
    return {"ablation": markdown(("reading", *(
        title for rate in rates for title in (
            f"true reward, lr {rate:g}, minus the default's", "accuracy"))), lines)}


def difference(ours, theirs, digits=2):
    """Mean of the differences seed by seed with its 95% interval, and p of the paired t-test."""
    gaps = np.array(ours) - np.array(theirs)
    if len(gaps) == 1:
        return f"{gaps[0]:+.{digits}f}"
    p = p_value(t_test(gaps))
    return f"{gaps.mean():+.{digits}f} ± {half_interval(gaps):.{digits}f}, " \
           f"p {p if p.startswith('<') else '= ' + p}"


# ---- The theorems --------------------------------------------------------------------------------

def table_theorems(games):
    """Q_mu of the exact games, mean and standard deviation over random tables, for every step size.
    D_t is the increment of Q_mu from turn t - 1 to turn t (Eq. 18)."""
    lines = []
    for name, by_size in games.items():
        for size, game in by_size.items():
            until = [turn for turn in game["until"] if turn is not None]
            lines.append((
                name, size, spread(game["last"], 3), spread(game["d3_d2"], 2),
                f"{np.mean(np.abs(game['last_change'])):.0e}",
                f"{sum(game['rising'])} / {sum(game['falling'])}",
                f"{np.median(until):.0f} ({len(until)})" if until else "-",
                spread(game["sum"], 3), f"{np.median(game['eq13']):.2f}"))
    return markdown(("game", "step size", f"Q_mu after {TURNS} turns", "D_3 / D_2", "last D",
                     "tables where Q_mu only rises / falls",
                     f"turns until Q_mu is {STATED}, median (tables that reach it)",
                     "Q_mu + Q_nu, last", "Q_mu by Eq. 13, last, median"), lines)


def spread(values, digits):
    """Mean and standard deviation."""
    return f"{np.mean(values):.{digits}f} ({np.std(values, ddof=1):.{digits}f})"


# ---- What cells are made of ----------------------------------------------------------------------

def markdown(header, lines):
    return "\n".join("| " + " | ".join(cells) + " |"
                     for cells in (header, ["---"] * len(header), *lines))


def plus_minus(values, digits=2):
    """Mean and half of the 95% interval over seeds (Student's t)."""
    half = f" ± {half_interval(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{half}"


def p_value(p):
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
