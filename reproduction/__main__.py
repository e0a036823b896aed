"""Carry out every row of the paper's two tables, the ablation and the theorems on the safe world.

    python -m reproduction                  # everything but the frontiers
    python -m reproduction theorems         # the exact games alone, a few minutes
    python -m reproduction frontier         # rate, steps and KL to SFT, nine rows

Tables use ten seeds, the ablation three. Learning rates and steps are the recorded ones, chosen on
other seeds and prompts; --tune chooses them again first. A run that is done already is not done
again, so a stopped command goes on. Prints the tables, and writes them, their numbers and, with
matplotlib, the figures to --out.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np

from data import replace_file
from reproduction import compare, frontier, plan
from reproduction.figures import can_draw, draw, draw_games
from reproduction.game import STEP_SIZES, exact_games
from reproduction.runs import STEPS, carry_out_all, digest, start_worker
from reproduction.tables import student, summarize, table_theorems, tables

RESULTS = Path(__file__).parent / "results"
INSTALL = "pip install -r reproduction/requirements.txt"


def main(arguments=None):
    try:
        options = parse_arguments(arguments)
        if options.part == "theorems":
            return theorems(options)
        seeds, ablation_seeds = plan.SEEDS, plan.ABLATION_SEEDS
        if options.quick:
            seeds = ablation_seeds = plan.SEEDS[:1]
        out, spawn = Path(options.out).as_posix(), multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.jobs, spawn, start_worker) as pool:
            try:
                if options.part == "frontier":
                    return run_frontier(options, pool)
                tuning = (plan.tune(out, pool, options.jobs) if options.tune else
                          recorded_tuning())
                seen = plan.run_rows(tuning["chosen"], seeds, ablation_seeds, out, pool,
                                     options.jobs)
            except BaseException:                      # what is running now has nobody to tell
                for process in multiprocessing.active_children():
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise
        summary = rounded({"tuning": tuning, **summarize(seen, seeds)})
        report = printed(tables(summary))
        folder = Path(out, "quick") if options.quick else Path(out)
        save_summary(summary, folder)
        (folder / "tables.md").write_text(report + "\n", encoding="utf-8")
        if options.record:
            save_summary(summary, RESULTS)
        theorems(options)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on with the runs that are left")
    except concurrent.futures.BrokenExecutor:
        sys.exit("\na run was killed from outside, perhaps for memory (fewer --jobs?); the same "
                 "command goes on")
    except (ValueError, OSError) as error:
        print(f"reproduction: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run_frontier(options, pool):
    """The frontiers: their runs, tables, numbers and, for a file, every reward."""
    rates, seeds, rows = frontier.RATES, frontier.SEEDS, tuple(frontier.ROWS)
    if options.quick:
        rates, seeds = rates[2:3], seeds[:1]
    out = Path(options.out, "frontier")
    tasks, results = frontier.tasks(rows, rates, seeds, out.as_posix()), {}
    everything = [task for some in tasks.values() for task in some]
    with plan.progress("frontier", everything, options.jobs) as bar:
        results["SFT"] = carry_out_all(tasks["SFT"], pool, bar)
        found = iter(carry_out_all(everything[len(seeds):], pool, bar))
        results |= {row: [next(found) for _ in tasks[row]] for row in rows}
    numbers = rounded(frontier.gather(results, rows, rates, seeds))
    printed(compare.tables(numbers, rates))
    out = out / "quick" if options.quick else out
    for folder in (out, RESULTS) if options.record else (out,):
        folder.mkdir(parents=True, exist_ok=True)
        recorded = {"rates": rates, "seeds": seeds, "looks": frontier.LOOKS, "rows": numbers}
        replace_file(folder / "frontier.json", (json.dumps(recorded) + "\n").encode())
        np.savez_compressed(folder / "frontier.npz",
                            **frontier.pack(results, rows, rates, seeds))


def theorems(options):
    """The exact games: their table, numbers and figure."""
    games = rounded(exact_games(STEP_SIZES[:1] if options.quick else STEP_SIZES))
    printed({"theorems": table_theorems(games)})
    out = Path(options.out, "quick") if options.quick else Path(options.out)
    for folder in (out, RESULTS) if options.record else (out,):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "theorems.json", (json.dumps(games) + "\n").encode())
        if can_draw():
            draw_games(games, folder)


def printed(tables):
    """The text of these tables, which is printed."""
    report = "\n\n".join(f"{name}\n\n{table}" for name, table in tables.items())
    print(f"\n{report}\n")
    return report


def recorded_tuning():
    """What tune found when it was recorded."""
    path = RESULTS / "tuning.json"
    if not path.is_file():
        raise ValueError(f"{path}: no recorded choice of rates and steps; choose them by --tune")
    try:
        tuning = json.loads(path.read_text())
        for choice in [tuning["chosen"][label] for label in plan.tuned_rows()]:
            if not (choice["lr"] in plan.RATES and choice["steps"] in STEPS):
                raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not what --tune --record writes; choose rates and steps again "
                         "by --tune") from None
    return tuning


def save_summary(summary, folder):
    """results.json, tuning.json and, where matplotlib is installed, the figures."""
    folder.mkdir(exist_ok=True)
    figures = draw(summary, folder) if can_draw() else []
    if not figures:
        print(f"no figures: they need matplotlib ({INSTALL})")
    results = {**summary, "figures": {name: digest(folder / name) for name in figures}}
    tuning = json.dumps(summary["tuning"], indent=1) + "\n"
    replace_file(folder / "tuning.json", tuning.encode())
    replace_file(folder / "results.json", (json.dumps(results) + "\n").encode())
    print(f"{folder}: results.json tuning.json {' '.join(figures)}")


def rounded(summary):
    """The same with six digits of every number, and lists for tuples: as it reads back from its
    file."""
    return json.loads(json.dumps(summary), parse_float=lambda number: float(f"{float(number):.6g}"))


def parse_arguments(arguments):
    def refuse(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(prog="python -m reproduction", description=__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("part", nargs="?", choices=("theorems", "frontier"),
                        help="this part alone")
    parser.add_argument("--quick", action="store_true", help="one seed, so no intervals; one "
                        "rate, one step size")
    parser.add_argument("--tune", action="store_true", help="choose learning rates and steps first")
    parser.add_argument("--record", action="store_true", help="write choices, results and figures "
                        "to reproduction/results as well")
    parser.add_argument("--out", default="runs/reproduce", help="folder of the runs "
                        "(default runs/reproduce)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side "
                        "(default: all cores)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {options.jobs}")
    if Path(options.out).exists() and not Path(options.out).is_dir():
        raise ValueError(f"--out {options.out} is a file, not a folder")
    if options.quick and options.record:
        raise ValueError("--record wants all seeds; leave out --quick")
    if options.part is not None and options.tune:
        raise ValueError(f"--tune is of no use to {options.part}; leave it out")
    if options.record and options.part != "frontier" and not can_draw():
        raise ValueError(f"--record draws the figures: {INSTALL}")
    if not options.quick and options.part != "theorems":
        student()                                      # better refused now than in an hour
    return options


if __name__ == "__main__":
    main()
