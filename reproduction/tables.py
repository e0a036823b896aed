"""What the runs come to: `summarize` makes numbers of them, `tables` Markdown of these alone."""

import math

import numpy as np
import torch

from data import SafeWorld
from eval import EXAM_BETA, compare, margins, mean, quality, shuffled_prompts
from iopo import preference_margin
from reproduction.game import STATED, TURNS, turn_values
from reproduction.plan import (ABLATION, ALSO_COMPARED, FIGURE3, FIGURE4, OFFLINE, ONLINE, ROUNDS,
                               SHORT_TURNS, TABLE1, TABLE2, VARIANTS)
from reproduction.runs import TEST_SAMPLES


# ---- The numbers ---------------------------------------------------------------------------------

def summarize(seen, seeds):
    """All numbers of the tables and figures, JSON-able, from what carry_out saw of every row and
    seed. A list has one number per seed, in the order of `seeds`."""
    world, prompts = SafeWorld(), shuffled_prompts("test")
    models = {label: [as_result(result["final"]) for result in results]
              for label, results in seen.items()}
    rows, curves = {}, {}
    for label in models:
        measured = [measure(model, sft, prompts * TEST_SAMPLES, world)
                    for model, sft in zip(models[label], models["SFT"])]
        rows[label] = {name: [seed[name] for seed in measured] for name in measured[0]}
    for label in ("SFT", *OFFLINE, *ONLINE):
        turns_of = [[turn for turn in result["turns"] if turn["player"] != "adversary"]
                    for result in seen[label]]
        turns_of = [*zip(*zip(*turns_of))]         # a run that ended early ends the curves there
        measured = [[measure(as_result(turn), sft, prompts, world) for turn in run]
                    for run, sft in zip(turns_of, models["SFT"])]
        curves[label] = {"steps": [turn["steps"] for turn in turns_of[0]],
                         **{name: [[turn[name] for turn in run] for run in measured]
                            for name in ("margin", "accuracy", "tokens", "reward", "judge")}}
    against = {f"{ours} against {theirs}, {answers}":
               [compare(a, b, prompts * times, world, answers)
                for a, b in zip(models[ours], models[theirs])]
               for ours, others, answers, times in (("IOPO", TABLE1, "sampled", TEST_SAMPLES),
                                                    ("IOPO online", TABLE2, "greedy", 1))
               for theirs in others if theirs != ours}
    held_out = {label: torch.stack([margins_of_pairs(model, sft)
                                    for model, sft in zip(models[label], models["SFT"])])
                for label in (*FIGURE3, *FIGURE4)}                              # (seeds, pairs)
    return {"seeds": seeds, "rows": rows, "against": against, "curves": curves,
            "figure3": histogram({label: held_out[label] for label in FIGURE3}),
            "figure4": histogram({label: held_out[label] for label in FIGURE4}),
            "sampled_game": [turn_values(result["turns"], sft["logps"])
                             for result, sft in zip(seen[SHORT_TURNS], models["SFT"])]}


def as_result(look):
    """What carry_out saw of a model, in the shape that eval.py's functions take."""
    return {**look, "logps": torch.tensor(look["logps"])}


def measure(model, sft, prompts, world):
    margin, spread, accuracy = margins(model, sft)
    judged = mean(world.judge(prompt, text) for prompt, (text, _) in zip(prompts, model["sampled"]))
    return {"margin": margin, "spread": spread, "accuracy": accuracy, "judge": judged,
            **quality(model, prompts, world)}


def margins_of_pairs(model, sft):
    return preference_margin(*model["logps"], *sft["logps"], beta=EXAM_BETA)


def histogram(samples):
    """Counts in common bins, mean over seeds, and mean and standard deviation over all pairs and
    seeds. The bins suit the row in the middle; what lies outside counts in the outermost ones.
    samples: label -> (seeds, pairs)."""
    widest = [values.abs().quantile(0.98).item() for values in samples.values()]
    reach = 1.5 * float(np.median(widest))
    edges = torch.linspace(-reach, reach, 41)
    rows = {}
    for label, values in samples.items():
        counts = torch.histogram(values.clamp(-reach, reach), edges).hist / len(values)
        rows[label] = {"counts": counts.tolist(), "mean": values.mean().item(),
                       "std": values.std().item()}
    return {"edges": edges.tolist(), "rows": rows}


# ---- The tables ----------------------------------------------------------------------------------

SHOWN = (("reward", 2), ("accuracy", 3))
PAPER1 = {"SFT": "44.8/21.6/33.6", "DPO": "50.4/21.2/28.4", "HINGE": "49.2/20/30.8",
          "IPO": "44.8/22/33.2", "KTO-pair": "48/21.6/30.4"}       # safe world view, by ERNIE-3.5
PAPER2 = {"SFT": "-, -, 13:204:10:23, 2.156", "DPO": "23.75, .9286, 13:203:11:23, 2.164",
          "Iter-DPO": "7.6875, .961, 13:204:11:22, 2.152", "IOPO online": "11.875, .9659, -, 2.176"}


def tables(summary):
    """Name -> Markdown. A ± is half of the 95% interval over seeds, p that of a paired t-test."""
    return {"adversary": table_adversary(summary), "table1": table1(summary),
            "table2": table2(summary), "table2, differences": table2_differences(summary),
            "ablation": table_ablation(summary), "rounds": table_rounds(summary),
            "trained Q": table_trained(summary), "choices": table_choices(summary)}


def table_adversary(summary):
    """Is the gain the adversary's or the ratio's?"""
    rows = summary["rows"]

    def cell(label):
        return "; ".join(plus_minus(rows[label][name], digits) for name, digits in SHOWN)

    def gain(ours, theirs):
        return "; ".join(difference(rows[ours][name], rows[theirs][name], digits)
                         for name, digits in SHOWN)

    ratio, game, neither = "ratio, no adversary", "adversary, no ratio", "DPO"
    return markdown(
        ("true reward, T=0.8; accuracy", "trained adversary", "frozen reference (`--n-nu 0`)",
         "the adversary's gain"),
        [("from SFT, clipped ratio", f"IOPO: {cell('IOPO')}", cell(ratio), gain("IOPO", ratio)),
         ("from SFT, r = 1", cell(game), f"DPO: {cell(neither)}", gain(game, neither)),
         ("from SFT, the ratio's gain", gain("IOPO", game), gain(ratio, neither), ""),
         ("from DPO, clipped ratio", f"IOPO: {cell('IOPO online')}", cell(f"{ratio}, online"),
          gain("IOPO online", f"{ratio}, online")),
         ("from DPO, r = 1", "not run", f"DPO: {cell('DPO online')}", ""),
         ("from DPO, the ratio's gain", "", gain(f"{ratio}, online", "DPO online"), "")])


def table1(summary):
    """The paper's Table 1: sampled answers, against the rows that start from SFT."""
    rows, lines = summary["rows"], []
    for label in ("IOPO", *TABLE1):
        compared = [""] * 3
        if label != "IOPO":
            compared = [difference(rows["IOPO"]["reward"], rows[label]["reward"]),
                        *counts(summary, f"IOPO against {label}, sampled", "/")]
        lines.append((label, chosen_for(summary, label), plus_minus(rows[label]["reward"]),
                      *compared, PAPER1.get(label, "")))
    return markdown(("row", "lr x steps", "true reward, T=0.8", "IOPO minus row",
                     "IOPO wins/ties/loses/both bad, %", "wins minus loses",
                     "paper's wins/ties/loses, %"), lines)


def table2(summary):
    """The paper's Table 2: greedy answers, and margin and accuracy on held-out pairs; and sampled
    answers, which tell more. The rows called online and Iter-DPO go on from the DPO model, the
    others start from SFT."""
    lines = []
    for label in TABLE2:
        row, margin, compared = summary["rows"][label], ("-", "-"), ""
        if label != "SFT":
            margin = (f"{plus_minus(row['margin'])} ({mean(row['spread']):.2f})",
                      plus_minus(row["accuracy"], 3))
        if label != "IOPO online":
            compared = counts(summary, f"IOPO online against {label}, greedy", ":")[0]
        lines.append((label, chosen_for(summary, label), *margin, compared,
                      plus_minus(row["reward_greedy"]), plus_minus(row["reward"]),
                      PAPER2.get(label, "")))
    return markdown(("row", "lr x steps", "margin vs SFT (spread)", "accuracy",
                     "IOPO online wins:ties:loses:both bad, %, T=0", "true reward, T=0",
                     "true reward, T=0.8", "paper's margin, accuracy, counts of 250, mean, T=0"),
                    lines)


def table2_differences(summary):
    """IOPO online minus every other row of Table 2."""
    ours, lines = summary["rows"]["IOPO online"], []
    for label in TABLE2[:-1]:
        row, margin = summary["rows"][label], ("-", "-")
        if label != "SFT":
            margin = (difference(ours["margin"], row["margin"]),
                      difference(ours["accuracy"], row["accuracy"], 3))
        lines.append((label, *margin,
                      counts(summary, f"IOPO online against {label}, greedy", ":")[1],
                      difference(ours["reward_greedy"], row["reward_greedy"]),
                      difference(ours["reward"], row["reward"])))
    return markdown(("IOPO online minus", "margin vs SFT", "accuracy", "wins minus loses, %, T=0",
                     "true reward, T=0", "true reward, T=0.8"), lines)


def table_ablation(summary):
    """One factor at a time from IOPO."""
    default, lines = summary["rows"]["IOPO"], []
    for label in ("IOPO", *ALSO_COMPARED, *ABLATION):
        row, compared = summary["rows"][label], ("", "the default")
        if label != "IOPO":
            compared = difference(row["reward"], default["reward"]), what_happened(row, default)
        lines.append((f"`{label}`" if label in ABLATION else label, chosen_for(summary, label),
                      str(len(row["reward"])),
                      f"{mean(row['margin']):.2f} ({mean(row['spread']):.2f})",
                      plus_minus(row["accuracy"], 3), plus_minus(row["reward"]), *compared))
    return markdown(("reading", "lr x steps", "seeds", "margin vs SFT (spread)", "accuracy",
                     "true reward, T=0.8", "minus the default's", "what happened"), lines)


def table_rounds(summary):
    """Length, the biased judge's score and the true reward, round by round; round 0 is where the
    run starts."""
    lines, curves, control = [], summary["curves"], ROUNDS[-1]
    for name, words, digits in (("tokens", "tokens an answer", 1), ("judge", "judge", 2),
                                ("reward", "true reward", 2)):
        end = [seed[-1] for seed in curves[control][name]]
        for label in ROUNDS:
            before = [seed[-1] for seed in curves[VARIANTS[label].start][name]]
            rounds = [before, *zip(*curves[label][name])]
            last = difference(rounds[-1], end) if label != control else ""
            lines.append((words, label, *(plus_minus(seeds, digits) for seeds in rounds), last))
    return markdown(("", "row", *(f"round {number}" for number in range(len(lines[0]) - 3)),
                     f"last round minus that of {control}"), lines)


def table_trained(summary):
    """Q of the trained models after each turn, mean over seeds. D_t is the increment of Q_mu from
    turn t - 1 to turn t (Eq. 18)."""
    means = {name: np.mean([seed[player][eq] for seed in summary["sampled_game"]], axis=0)
             for name, player, eq in (("mu", "protagonist", "eq6"), ("nu", "adversary", "eq6"),
                                      ("mu13", "protagonist", "eq13"))}
    mu, nu, mu13 = means.values()
    increments = np.diff(mu)
    return markdown(("trained models", "turns", "Q_mu (Eq. 6), turns 1, 2, 3 ... last",
                     "D_3 / D_2", "Q_nu (Eq. 6)", "Q_mu (Eq. 13)"),
                    [(f"`{SHORT_TURNS}`", str(len(mu)),
                      f"{mu[0]:.4f} {mu[1]:.4f} {mu[2]:.4f} ... {mu[-1]:.4f}",
                      f"{increments[1] / increments[0]:.2f}", f"{nu[0]:.4f} ... {nu[-1]:.4f}",
                      f"{mu13[0]:.2f} ... {mu13[-1]:.2f}")])


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


def table_choices(summary):
    """What was tuned, on which share of the human's votes."""
    return markdown(("row", "lr", "steps", "preferred to SFT on validation prompts"),
                    [(label, f"{choice['lr']:g}", str(choice["steps"]), f"{choice['share']:.3f}")
                     for label, choice in summary["tuning"]["chosen"].items()])


# ---- What cells are made of ----------------------------------------------------------------------

def markdown(header, lines):
    return "\n".join("| " + " | ".join(cells) + " |"
                     for cells in (header, ["---"] * len(header), *lines))


def chosen_for(summary, label):
    """"lr x steps" of a row."""
    if label == "SFT":
        return "-"
    choice = summary["tuning"]["chosen"][VARIANTS[label].tuned_as or label]
    return f"{choice['lr']:g} x {choice['steps']}"


def counts(summary, pair, between):
    """Percentages of win, tie, lose and bad, and of win minus lose."""
    shares = {kind: [100 * seed[kind] / sum(seed.values()) for seed in summary["against"][pair]]
              for kind in ("win", "tie", "lose", "bad")}
    return (between.join(plus_minus(seeds, 0) for seeds in shares.values()),
            difference(shares["win"], shares["lose"], 0))


def what_happened(row, default):
    """One sentence; the default's lists may go on with more seeds."""
    def higher(name):
        return sum(ours > theirs for ours, theirs in zip(row[name], default[name]))
    wider = mean(row["spread"]) / mean(default["spread"][:len(row["spread"])])
    return (f"Reward higher on {higher('reward')} of {len(row['reward'])} seeds, accuracy on "
            f"{higher('accuracy')}; margins spread {wider:.1f} times as wide.")


def plus_minus(values, digits=2):
    """Mean and half of the 95% interval over seeds (Student's t)."""
    half = f" ± {half_interval(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{half}"


def difference(ours, theirs, digits=2):
    """Mean of the differences seed by seed with its 95% interval, and p of the paired t-test
    (two-sided)."""
    differences = [a - b for a, b in zip(ours, theirs)]
    shown = ("+" if np.mean(differences) >= 0 else "") + plus_minus(differences, digits)
    if len(differences) == 1:
        return shown
    p = t_test(differences)
    return f"{shown}, p {f'= {p:.3f}' if p >= 0.001 else '< 0.001'}"


def half_interval(values):
    """Half the width of the 95% interval of a mean."""
    return student().t.ppf(0.975, len(values) - 1) * standard_error(values)


def t_test(values):
    """Two-sided p of Student's test that the mean is 0."""
    if not any(values):
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
