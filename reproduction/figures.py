"""The figures, PNG files made of recorded numbers alone; they need matplotlib."""

import importlib.util

import numpy as np

from reproduction.compare import (at_equal_kl, at_voted_looks, half_interval, left_out, scores,
                                  total_steps, tuned)
from reproduction.plan import MIDDLE_RATES
from reproduction.runs import COOLER, LEVELS, LOOKS

FINE_KL = np.linspace(0.15, 3, 58)          # nats, the points of curves over KL
STOPPING = ("DPO, beta 0.1", "DPO, beta 0.3", "DPO, beta 1", "DPO, beta 3", "ratio alone", "IOPO")
WORDS = {"reward": "true reward, T=0.8", "greedy": "true reward, T=0", "accuracy": "accuracy"}


def can_draw():
    return importlib.util.find_spec("matplotlib") is not None


def draw_frontier(numbers, rates, folder):
    """rate.png, kl.png, steps.png and stopping.png."""
    rows = [row for row in numbers if row != "SFT"]
    save(folder, "rate.png", [panel("learning rate", words, [
        curve(row, rates, [values for _, values in at_voted_looks(numbers, row, measure)])
        for row in rows], xscale="log")
        for measure, words in WORDS.items()])
    save(folder, "kl.png", [
        panel("tuned: KL to SFT of at most, nats an answer", WORDS["reward"],
              [curve(row, FINE_KL, [left_out(numbers, row, "reward", kl) for kl in FINE_KL])
               for row in rows] + [sft_line(numbers["SFT"])]),
        *(panel(f"lr {rate:g}: where KL to SFT first is", WORDS["reward"],
                [over_kl(numbers, row, "reward", number) for row in rows]
                + [sft_line(numbers["SFT"])])
          for number, rate in enumerate(rates) if rate in MIDDLE_RATES)])
    save(folder, "steps.png", [panel("optimiser steps of both players", WORDS[measure], [
        curve(row, [total_steps(row, steps) for steps in LOOKS],
              scores(numbers, row, measure)[tuned(numbers[row])[0]].T) for row in rows])
        for measure in ("reward", "greedy")])
    rate = tuned(numbers["ratio alone"])[0]
    save(folder, "stopping.png", [
        panel("protagonist's steps", f"share of pairs below 5%, lr {rates[rate]:g}", [
            curve(row, LOOKS, values_at(numbers, row, "idle", rate)) for row in STOPPING]),
        *(panel(f"{player}'s steps", f"log r of IOPO, deciles, lr {rates[rate]:g}",
                deciles(numbers, name, rate))
          for player, name in (("protagonist", "log_ratio"),
                               ("adversary", "adversary_log_ratio")))])


def values_at(numbers, row, measure, rate):
    """(looks, seeds)."""
    return np.array(numbers[row][measure], dtype=float)[rate].T


def curve(label, x, values):
    """(label, x, means, half intervals) of the seeds' values at each x."""
    half = [half_interval(seeds) if len(seeds) > 1 else 0.0 for seeds in values]
    return label, x, np.array([np.mean(seeds) for seeds in values]), np.array(half)


def over_kl(numbers, row, measure, rate):
    """Only where eight in ten seeds get there, so that the curve is of the same runs."""
    found = [(kl, at_equal_kl(numbers, row, measure, rate, kl)) for kl in FINE_KL]
    found = [(kl, seeds[~np.isnan(seeds)]) for kl, seeds in found]
    enough = 0.8 * len(numbers["SFT"]["reward"])
    found = [(kl, seeds) for kl, seeds in found if len(seeds) >= enough]
    return curve(row, [kl for kl, _ in found], [seeds for _, seeds in found])


def sft_line(sft):
    """SFT itself at lower temperatures: mean KL and reward."""
    at = [sft, *(sft[f"{temperature:g}"] for temperature in COOLER)]
    return "SFT, cooler", [np.mean(some["kl"]) for some in at], \
        np.array([np.mean(some["reward"]) for some in at]), 0


def deciles(numbers, name, rate):
    """Mean over seeds of each decile of log r, over the looks."""
    values = np.nanmean(np.array(numbers["IOPO"][name], dtype=float)[rate], axis=0)
    return [(f"{level:.0%}", LOOKS, values[:, place], 0)
            for place, level in enumerate(LEVELS) if level in (0.1, 0.3, 0.5, 0.7, 0.9)]


def draw_games(games, folder):
    """Mean Q_mu over tables after each turn, a panel for every step size."""
    save(folder, "values.png", [panel("turn", f"Q_mu by Eq. 6, step size {size}", [
        (name, range(1, 1 + len(by_size[size]["mean"])), by_size[size]["mean"], 0)
        for name, by_size in games.items()]) for size in next(iter(games.values()))])


def panel(across, up, lines, **more):
    """A line is (label, x, y, half the width of a band)."""
    return {"xlabel": across, "ylabel": up, **more}, lines


def save(folder, name, panels):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.8),
                                   layout="constrained", squeeze=False)
    for axis, (more, lines) in zip(axes.flat, panels):
        for label, x, y, half in lines:
            [line] = axis.plot(x, y, label=label)
            axis.fill_between(x, y - np.array(half), y + np.array(half), color=line.get_color(),
                              alpha=0.12, linewidth=0)
        axis.set(**more)
        axis.legend(fontsize="x-small")
    figure.savefig(folder / name, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
