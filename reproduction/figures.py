"""The figures, PNG files made of the summary alone; they need matplotlib."""

import importlib.util
import math

import numpy as np

from eval import EXAM_PAIRS
from reproduction.plan import FIGURE5, ROUNDS, STEPS_PER_TURN
from reproduction.tables import half_interval


def can_draw():
    return importlib.util.find_spec("matplotlib") is not None


def draw(summary, folder):
    """All figures in folder; returns their names."""
    def distributions(name):
        edges, rows = np.array(summary[name]["edges"]), summary[name]["rows"]
        middles, fine = (edges[1:] + edges[:-1]) / 2, np.linspace(edges[0], edges[-1], 600)

        def density(mean, std):
            return np.exp(-((fine - mean) / std) ** 2 / 2) / (std * math.sqrt(2 * math.pi))

        normal = [(label, fine, density(row["mean"], row["std"])) for label, row in rows.items()]
        counts = [(label, middles, row["counts"]) for label, row in rows.items()]
        across = "margin against SFT, held-out pairs"
        return save(folder, f"{name}.png", [(across, "density of the normal fit", normal),
                                            (across, f"pairs of {EXAM_PAIRS}", counts)])

    def curves(name, labels, across, measured):
        def line(label, what):
            seeds = summary["curves"][label][what]
            half = [half_interval(values) for values in zip(*seeds)] if len(seeds) > 1 else 0
            steps = summary["curves"][label]["steps"]
            return label, steps, np.mean(seeds, axis=0), np.array(half)

        return save(folder, name, [(across, up, [line(label, what) for label in labels])
                                   for what, up in measured.items()])

    held_out = {"margin": "margin against SFT, held-out pairs",
                "accuracy": "accuracy on held-out pairs"}
    answers = {"tokens": "tokens an answer", "judge": "biased judge", "reward": "true reward"}
    return [distributions("figure3"), distributions("figure4"),
            curves("figure5.png", FIGURE5, "protagonist's steps", held_out),
            curves("rounds.png", ROUNDS, f"steps, {STEPS_PER_TURN} a round", answers)]


def draw_games(games, folder):
    """Mean Q_mu over tables after each turn, a panel for every step size."""
    sizes = list(next(iter(games.values())))
    return save(folder, "values.png", [
        ("turn", f"Q_mu by Eq. 6, step size {size}",
         [(name, range(1, 1 + len(by_size[size]["mean"])), by_size[size]["mean"])
          for name, by_size in games.items()]) for size in sizes])


def save(folder, name, panels):
    """One PNG of panels (label across, label up, lines), a line (label, x, y, perhaps half the
    width of a band)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6),
                                   layout="constrained", squeeze=False)
    for axis, (across, up, lines) in zip(axes.flat, panels):
        for label, x, y, *half in lines:
            [line] = axis.plot(x, y, label=label)
            if half:
                axis.fill_between(x, y - half[0], y + half[0], color=line.get_color(), alpha=0.12,
                                  linewidth=0)
        axis.set(xlabel=across, ylabel=up)
        axis.legend(fontsize="x-small")
    figure.savefig(folder / name, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return name
