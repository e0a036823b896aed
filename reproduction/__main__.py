"""The experiments on the safe world, a part at a time or all of them.

    python -m reproduction frontier         # rate, steps and KL to SFT: nine rows
    python -m reproduction rounds           # part of the next: runs in rounds of new pairs
    python -m reproduction tables           # the paper's two tables: its other rows
    python -m reproduction ablation         # readings of the paper, one at a time
    python -m reproduction theorems         # exact games, three minutes
    python -m reproduction                  # all of these

A run that is done already is not done again, so a stopped command goes on. Prints the tables, and
writes their numbers, every reward and, with matplotlib, the figures to --out.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np

from data import replace_file
from reproduction import compare, figures, plan
from reproduction.game import STEP_SIZES, exact_games
from reproduction.runs import LOOKS, carry_out_all, start_worker

COMMANDS = ("frontier", "rounds", "tables", "ablation", "theorems")
RESULTS = Path(__file__).parent / "results"
INSTALL = "pip install -r reproduction/requirements.txt"


def main(arguments=None):
    try:
        options = parse_arguments(arguments)
        spawn = multiprocessing.get_context("spawn")
        for part in [options.part] if options.part else [*plan.PARTS, "theorems"]:
            if part == "theorems":
                theorems(options)
                continue
            with concurrent.futures.ProcessPoolExecutor(options.jobs, spawn,
                                                        start_worker) as pool:
                try:
                    run_part(part, options, pool)
                except BaseException:                  # what is running now has nobody to tell
                    for process in multiprocessing.active_children():
                        process.terminate()
                    pool.shutdown(cancel_futures=True)
                    raise
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on with the runs that are left")
    except concurrent.futures.BrokenExecutor:
        sys.exit("\na run was killed from outside, perhaps for memory (fewer --jobs?); the same "
                 "command goes on")
    except (ValueError, OSError) as error:
        print(f"reproduction: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run_part(part, options, pool):
    """All runs of a part, then its tables, numbers, rewards and figures."""
    rows, rates, seeds = plan.PARTS["tables" if part == "rounds" else part]
    rows = plan.in_rounds(rows) if part == "rounds" else rows
    if options.quick:
        rates, seeds = plan.MIDDLE_RATES[1:], seeds[:1]
        if part == "ablation":
            rows = {row: rows[row] for row in [*rows][:2]}
    out, numbers, rewards, dpo = Path(options.out).as_posix(), {}, {}, []
    if part != "frontier":                             # its rows are the others' company
        known, rewards = recorded("frontier", options)
        numbers, rewards = cut(known, rewards, rates, seeds)
    sft = plan.sft_runs(seeds, out)
    if part in ("rounds", "tables"):
        rate, look = compare.tuned(known["rows"]["DPO, beta 0.1"])
        dpo = plan.dpo_runs(known["rates"][rate], LOOKS[look], seeds, out)
    runs = {row: plan.row_runs(row, own, rates, seeds, out, dpo) for row, own in rows.items()}
    everything = [run for some in runs.values() for run in some]
    with plan.progress(part, sft + dpo + everything, options.jobs) as bar:
        first = carry_out_all(sft, pool, bar)
        carry_out_all(dpo, pool, bar)
        found = iter(carry_out_all(everything, pool, bar))
    if part == "rounds":
        print("what they came to stands in the tables: python -m reproduction tables")
        return
    results = {row: [next(found) for _ in some] for row, some in runs.items()}
    own = rounded({"SFT": plan.gather_sft(first),
                   **{row: plan.gather(first, some, rows[row], rates, seeds)
                      for row, some in results.items()}})
    if numbers and numbers["SFT"] != own["SFT"]:
        raise ValueError("the frontier's SFT models are not those trained here, by another machine "
                         "perhaps; run python -m reproduction frontier with this --out first")
    packed = plan.pack("SFT", first, (1, len(seeds)))
    for row, some in results.items():
        packed |= plan.pack(row, some, (len(rates), len(seeds)))
    numbers, rewards = {**numbers, **own}, {**rewards, **packed}
    tables = {"frontier": compare.frontier_tables, "tables": compare.paper_tables,
              "ablation": compare.ablation_tables}[part]
    report = printed(tables(numbers, rewards, rates))
    for folder in folders(options):
        recorded_too = {"rates": rates, "seeds": seeds, "looks": LOOKS, "rows": own}
        replace_file(folder / f"{part}.json", (json.dumps(recorded_too) + "\n").encode())
        replace_file(folder / f"{part}.md", (report + "\n").encode())
        np.savez_compressed(folder / f"{part}.npz", **packed)
        if part == "frontier":
            drawn(figures.draw_frontier, numbers, rates, folder)


def theorems(options):
    """The exact games: their table, numbers and figure."""
    games = rounded(exact_games(STEP_SIZES[:1] if options.quick else STEP_SIZES))
    printed({"theorems": compare.table_theorems(games)})
    for folder in folders(options):
        replace_file(folder / "theorems.json", (json.dumps(games) + "\n").encode())
        drawn(figures.draw_games, games, folder)


def drawn(draw, *what):
    """Figures, where there is matplotlib."""
    if figures.can_draw():
        draw(*what)
    else:
        print(f"no figures: they need matplotlib ({INSTALL})")


def folders(options):
    """Where results go."""
    out = Path(options.out, "quick") if options.quick else Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    return (out, RESULTS) if options.record else (out,)


def recorded(part, options):
    """(what its .json holds, rewards) of a part: of --out, else as recorded."""
    quick = [Path(options.out, "quick")] * options.quick
    paths = [folder / f"{part}.json" for folder in (*quick, Path(options.out), RESULTS)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{paths[0]} is not there; run python -m reproduction {part} first")
    with np.load(path.with_suffix(".npz")) as file:
        return json.loads(path.read_text()), dict(file)


def cut(known, rewards, rates, seeds):
    """(numbers, rewards) of a recorded part, of these rates and seeds alone."""
    which = [known["rates"].index(rate) for rate in rates]
    whose = [known["seeds"].index(seed) for seed in seeds]

    def of_seeds(values):
        if isinstance(values, dict):
            return {name: of_seeds(some) for name, some in values.items()}
        return [values[seed] for seed in whose]

    numbers = {row: of_seeds(some) if row == "SFT" else
               {name: [of_seeds(values[rate]) for rate in which] for name, values in some.items()}
               for row, some in known["rows"].items()}
    return numbers, {name: values[np.ix_([0] if name.startswith("SFT, ") else which, whose)]
                     for name, values in rewards.items()}


def printed(tables):
    """The text of these tables, which is printed."""
    report = "\n\n".join(f"{name}\n\n{table}" for name, table in tables.items())
    print(f"\n{report}\n")
    return report


def rounded(numbers):
    """The same with six digits of every number, lists for tuples and None for NaN: as it reads back
    from its file."""
    return json.loads(json.dumps(numbers), parse_constant=lambda _: None,
                      parse_float=lambda number: float(f"{float(number):.6g}"))


def parse_arguments(arguments):
    def refuse(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(prog="python -m reproduction", description=__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("part", nargs="?", choices=COMMANDS,
                        help="this part alone")
    parser.add_argument("--quick", action="store_true", help="one seed, so no intervals; one "
                        "rate, one step size")
    parser.add_argument("--record", action="store_true", help="write results and figures to "
                        "reproduction/results as well")
    parser.add_argument("--out", default="runs/reproduction", help="folder of the runs "
                        "(default runs/reproduction)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side "
                        "(default: all cores)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {options.jobs}")
    if Path(options.out).exists() and not Path(options.out).is_dir():
        raise ValueError(f"--out {options.out} is a file, not a folder")
    if options.quick and options.record:
        raise ValueError("--record wants all seeds; leave out --quick")
    if options.record and not figures.can_draw():
        raise ValueError(f"--record draws the figures: {INSTALL}")
    if not options.quick and options.part != "theorems":
        compare.student()                              # better refused now than in an hour
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # its workers end with it
    main()
