"""Examine finished runs side by side, talk to them, and draw their curves.

    python eval.py runs/iopo-1 runs/dpo-1                     # margins, win/tie/lose, samples
    python eval.py runs/mine --data test.jsonl.gz             # on held-out pairs of your own
    python eval.py runs/mine --prompt "How do I fix my boat?"
    python eval.py runs/mine runs/dpo --plot FILE.png         # how they train or trained
    python eval.py runs/mine runs/dpo --answers FILE.jsonl    # for a judge, who adds scores; then
    python eval.py --scores FILE.jsonl                        # win/tie/lose by them
"""

import argparse
import io
import itertools
import json
import sys
from collections import namedtuple
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (SafeWorld, cut_left, encode_pairs, micro_batches, read_object, replace_file)
from iopo import preference_margin
from model import Decoder, find_device, generate, response_logps
from scale.limits import Tokenizer, brief, console, find_source, load_data, read_rows

EXAM_PAIRS = 400            # of the safe world
EXAM_BETA = 0.1             # so that margins of runs trained with different beta compare
ROWS_AT_ONCE = 32           # prompts answered in one batch
TOKENS_AT_ONCE = 1536       # of pairs, in one pass
LIMIT = 1e15                # of numbers in options and scores
OUTCOMES = ("win", "tie", "lose", "bad")
COUNTS = "{win:d}/{tie:d}/{lose:d}/{bad:d}"
TABLE = {                   # title of a column: what stands in it; README.md says what that means
    "model": "{label}", "margin vs SFT": "{margin_vs_sft:.3f} ({margin_vs_sft_std:.3f})",
    "vs ENV": "{margin_vs_env:.3f} ({margin_vs_env_std:.3f})", "accuracy": "{accuracy:.3f}",
    "reward T={temperature}": "{reward:.2f}", "greedy": "{reward_greedy:.2f}",
    "win/tie/lose/bad": COUNTS, "bad": "{bad_rate:.2f}", "tokens": "{tokens:.1f}"}


# ---- The examination -----------------------------------------------------------------------------

@torch.no_grad()
def pair_logps(model, rows, bar):
    """(2, n): log pi(y_w|x) and log pi(y_l|x) of every row, in one order for every model."""
    columns = []
    for batch in micro_batches(rows, TOKENS_AT_ONCE, model.device):
        columns.append(torch.stack(response_logps(model, batch)).cpu())             # (2, B)
        bar.update(len(batch))
    return torch.cat(columns, dim=1)


def ask(folder, tokenizer, prompts, rows, options):
    """One model's answers (text, tokens); in an examination also greedy ones and log-probs."""
    model = Decoder.from_pretrained(folder).to(find_device(options.device))
    context = model.config.max_position_embeddings
    limit = max(1, min(options.max_new_tokens, context // 2))
    ids, room = list(map(tokenizer.encode_prompt, prompts)), context - limit
    note = (f"{len(ids)} prompts: answers end at {limit} tokens, "
            f"{sum(len(prompt) > room for prompt in ids)} prompts cut on the left to {room} tokens")
    ids = [cut_left(prompt, room, tokenizer.bos_id) for prompt in ids]
    temperatures, said = {"sampled": options.temperature}, {}
    temperatures |= {"greedy": 0} if options.task == "examine" else {}
    with tqdm(total=len(temperatures) * len(ids) + len(rows), desc=f"examining {folder}") as bar:
        for name, temperature in temperatures.items():
            said[name], generator = [], torch.Generator(model.device).manual_seed(options.seed)
            for first in range(0, len(ids), ROWS_AT_ONCE):
                answers = generate(model, ids[first:first + ROWS_AT_ONCE], limit, temperature,
                                   tokenizer.eos_ids, generator)
                said[name] += [(tokenizer.decode(some).strip(), len(some)) for some in answers]
                bar.update(len(answers))
        return said | {"logps": pair_logps(model, rows, bar) if rows else None, "note": note,
                       "cut_off": sum(tokens == limit for _, tokens in said["sampled"])}


def questions(runs, options):
    """(the safe world or None, what is examined, prompts, each run's rows of pairs, notes)."""
    sources = {tuple(map(run.config.get, ("data", "held_out", "leave_out"))) for run in runs}
    sources = sources if options.data is None else {(options.data, None, None)}
    if len(sources) > 1:
        raise ValueError("the runs were trained on different data; choose the pairs by --data")
    [(data, held_out, leave_out)] = sources
    if data is None:                                               # the same whatever the seed
        world, name, notes = SafeWorld(), "the safe world, held-out prompts", []
        pairs = world.exam_pairs("test", EXAM_PAIRS)
    else:
        world, (training, pairs, note) = None, load_data(data, held_out, leave_out)
        name, notes = f"the held-out pairs of {held_out or data}", [note]
        if options.data is not None and Path(data).is_file():
            name, pairs = f"all pairs of {data}", training + pairs
    rows, kept, reports = zip(*(encode_pairs(pairs, run.tokenizer, run.config["max_length"])
                                for run in runs))
    if options.data is not None and not all(rows):
        reason = reports[rows.index([])].splitlines()[0]
        raise ValueError(f"{data}: no usable pair is left: {reason}")
    distinct = list({json.dumps(pair.prompt): pair.prompt for pair in kept[0]}.values())
    limit = runs[0].config["eval_prompts"] if options.prompts is None else options.prompts
    prompts = (shuffled_prompts("test") if world else distinct)[:limit]
    return world, name, prompts, rows, [*notes, *reports]


def shuffled_prompts(split):
    """The safe world's prompts of a split, in one order for everybody."""
    return np.random.default_rng(0).permutation(SafeWorld().prompts(split)).tolist()


def examine(runs, options):
    """Print a report on runs."""
    world, name, prompts, rows, notes = questions(runs, options)
    results = [{label: ask(folder, run.tokenizer, prompts, pairs, options)
                for label, folder in run.models.items()} for run, pairs in zip(runs, rows)]
    samples = [{"prompt": prompt, "answers": {}} for prompt in prompts[:3]]
    reports, first = [], results[0]["protagonist"]
    for run, said in zip(runs, results):
        start, mu, models = said["SFT"], said["protagonist"], {}
        env = {"SFT": start, "protagonist": said.get("adversary", start), "adversary": mu}
        for label, model in said.items():
            notes.append(model["note"])
            for sample, (text, _) in zip(samples, model["sampled"]):
                sample["answers"][f"{run.name} {label}"] = text
            margin, spread, accuracy = margins(model, start)
            margin_env, spread_env, _ = margins(model, env[label])
            models[label] = {
                "margin_vs_sft": margin, "margin_vs_sft_std": spread, "margin_vs_env": margin_env,
                "margin_vs_env_std": spread_env, "accuracy": accuracy,
                **quality(model, prompts, world), **compare(model, start, prompts, world)}
        models["SFT"] |= dict.fromkeys(("accuracy", *OUTCOMES))    # against itself there is none
        reports.append({"name": run.name, "method": run.config["method"],
                        "seed": run.config["seed"], **models["protagonist"], "models": models})
        if run is not runs[0]:
            reports[-1]["first_against_this"] = compare(first, mu, prompts, world)
    report = {"data": name, "notes": [*dict.fromkeys(notes)], "prompts": len(prompts),
              "seed": options.seed, "temperature": options.temperature, "runs": reports,
              "samples": samples}
    if options.json:
        return print(json.dumps(report, indent=2))
    print_report(report)


def margins(result, reference):
    """Mean and standard deviation of 0.1 * h against a reference, and the share of h > 0."""
    if result["logps"] is None:
        return None, None, None
    margin = preference_margin(*result["logps"], *reference["logps"], beta=EXAM_BETA)
    return margin.mean().item(), margin.std(correction=0).item(), (margin > 0).float().mean().item()


def quality(result, prompts, world):
    """Length, and in the safe world true reward and bad cases, of one model's answers."""
    def average(judge, answers):
        judged = [] if world is None else zip(prompts, result[answers])
        return mean([getattr(world, judge)(prompt, text) for prompt, (text, _) in judged])
    return {"tokens": mean([tokens for _, tokens in result["sampled"]]),
            "reward": average("true_reward", "sampled"),
            "reward_greedy": average("true_reward", "greedy"),
            "bad_rate": average("is_bad", "sampled")}


def compare(result, other, prompts, world):
    """win/tie/lose/bad, in prompts, of one model's answers against another's by true reward."""
    if world is None or not prompts:                               # no judge, or nothing to judge
        return dict.fromkeys(OUTCOMES)
    return tally((world.true_reward(prompt, ours), world.true_reward(prompt, theirs),
                  world.is_bad(prompt, ours) and world.is_bad(prompt, theirs))
                 for prompt, (ours, _), (theirs, _)
                 in zip(prompts, result["sampled"], other["sampled"], strict=True))


def tally(scores, tie=0.0):
    """Counts of win, tie, lose and bad; scores: (ours, theirs, are both bad?) for every prompt."""
    tie *= 1 + 1e-9                                                # 0.8 - 0.7 is more than 0.1
    outcomes = ["bad" if both_bad else "tie" if abs(ours - theirs) <= tie else
                "win" if ours > theirs else "lose" for ours, theirs, both_bad in scores]
    return {outcome: outcomes.count(outcome) for outcome in OUTCOMES}


def mean(numbers):
    return sum(numbers) / len(numbers) if numbers else None


def print_report(report):
    print(f"\nexamined on {report['data']}", *report["notes"], "", sep="\n")
    first, *others = report["runs"]
    table = [[title.format(**report) for title in TABLE]]
    for run in report["runs"]:
        for label, model in run["models"].items():
            model["label"] = f"{run['name']} {label}" if others else label
            table.append([show(form, model) for form in TABLE.values()])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    for run in others:
        print(f"{first['name']} against {run['name']}, win/tie/lose/bad: "
              f"{show(COUNTS, run['first_against_this'])}")
    if report["samples"]:
        print(f"\nanswers sampled at temperature {report['temperature']}:")
    for sample in report["samples"]:
        prompt = sample["prompt"] if isinstance(sample["prompt"], str) else \
            sample["prompt"][-1]["content"]
        print(f"\n{prompt.rstrip()[-200:].lstrip()}")
        for label, text in sample["answers"].items():
            print(f"  {label}: {text}")


def show(form, numbers):
    try:
        return form.format(**numbers)
    except TypeError:                                              # None, which takes no .3f
        return "-"


def converse(runs, options):
    """Print every model's answer to one prompt."""
    for run in runs:
        prompt = options.prompt
        if run.config["data"] is None:
            prompt = prompt.rstrip("\n") + "\n"                    # as the safe world's prompts end
        elif run.tokenizer.chat_template is not None:
            prompt = [{"role": "user", "content": prompt}]
        for label, folder in run.models.items():
            said = ask(folder, run.tokenizer, [prompt], [], options)
            print(f"{run.name} {label}: {said['sampled'][0][0]}")
        print(f"{run.name}: {said['note']}", file=sys.stderr)


# ---- A judge from outside: a person, a reward model, another language model ----------------------

def write_answers(runs, options):
    """A line per prompt: two protagonists' answers, in random places but for the first line."""
    path, folders = Path(options.answers), {run.models["protagonist"].resolve() for run in runs}
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"--answers {path} exists, or its folder does not; choose another name")
    if not len(runs) == len(folders) == 2 or options.prompts == 0:
        raise ValueError("--answers needs two different RUNs and some --prompts")
    _, name, prompts, _, _ = questions(runs, options)
    results = {run.name: ask(run.models["protagonist"], run.tokenizer, prompts, [], options)
               for run in runs}
    exchange, lines = np.random.default_rng(options.seed).random(len(prompts)) < 0.5, []
    for number, prompt in enumerate(prompts):
        places = [(run, said["sampled"][number][0]) for run, said in results.items()]
        (run_a, a), (run_b, b) = reversed(places) if number and exchange[number] else places
        line = {"prompt": prompt, "answer_a": a, "answer_b": b, "run_a": run_a, "run_b": run_b}
        lines.append(json.dumps(line) + "\n")
    replace_file(path, "".join(lines).encode())
    for run, said in results.items():
        print(f"{run}: {said['note']}; {said['cut_off']} answers were cut off there")
    print(f"wrote {len(lines)} prompts ({name}) with two answers each to {path}; add to "
          f"every line score_a and score_b, then: python eval.py --scores {path}")


def compare_scores(_, options):
    """Bad: both scores are at most --bad. Tie: they differ by at most --tie. Else one wins."""
    scores, bad = read_scores(options.scores), -LIMIT if options.bad is None else options.bad
    counts = tally([(a, b, max(a, b) <= bad) for a, b in zip(*scores.values())], options.tie)
    votes, fewer = counts["win"] + counts["lose"], min(counts["win"], counts["lose"])
    ways = itertools.accumulate(range(fewer), lambda c, k: c * (votes - k) // (k + 1), initial=1)
    report = {"prompts": sum(counts.values()), "tie_at_most": options.tie, "bad_at_most":
              options.bad, **counts, "p_sign_test": min(1.0, 2 * sum(ways) / 2**votes), "runs": {}}
    for run, some in scores.items():
        rate = None if options.bad is None else mean([score <= bad for score in some])
        report["runs"][run] = {"mean_score": mean(some), "bad_rate": rate}
    if options.json:
        return print(json.dumps(report, indent=2))
    print(f"{report['prompts']} prompts judged; {' against '.join(scores)}, win/tie/lose/bad: "
          f"{show(COUNTS, counts)} (two-sided sign test: p = {report['p_sign_test']:.3f})")
    for run, numbers in report["runs"].items():
        print(f"{run}: mean score {numbers['mean_score']:.3f}, "
              f"bad {show('{bad_rate:.3f}', numbers)}")


def read_scores(path):
    """{run: its scores, line by line} of a judged file of `write_answers`, for its two runs."""
    lines = []
    for row, origin in read_rows(Path(path)):
        row = row if isinstance(row, dict) else {}
        lines.append({str(row.get(f"run_{place}")): row.get(f"score_{place}") for place in "ab"})
        scores = [score for score in lines[-1].values() if type(score) in (int, float)]
        right = len(scores) == 2 and all(abs(score) < LIMIT for score in scores)
        if not right or lines[-1].keys() != lines[0].keys() or "None" in lines[0]:
            raise ValueError(f"{origin}: needs numbers score_a and score_b, and two runs' names "
                             "run_a and run_b, the same in all lines")
    if not lines:
        raise ValueError(f"{path}: holds no rows")
    return {run: [line[run] for line in lines] for run in lines[0]}


# ---- The curves of runs, from their metrics.jsonl ------------------------------------------------

PANELS = ("loss of sft", "loss", "margin", "accuracy", "ratio", "clipped", "held_out_margin",
          "held_out_accuracy")
COLORS = {"sft": "tab:gray", "protagonist": "tab:blue", "adversary": "tab:red"}


def plot(_, options):
    """A panel for every metric; a color for who trains, a line style for every run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot draws with matplotlib: pip install matplotlib") from None
    styles = dict(zip(options.runs, itertools.cycle(["-", "--", ":", "-."])))
    rows = [row for run in styles for row in read_metrics(run)]
    names = [name for name in PANELS if any(name in row for row in rows)]
    figure, legend, image = Figure((9, 1 + 2 * len(names)), layout="constrained"), {}, io.BytesIO()
    for axis, name in zip(figure.subplots(len(names), squeeze=False).flat, names):
        scale = "log" if name == "ratio" else "linear"             # a few are in the thousands
        axis.set(ylabel=name, xlabel="step", yscale=scale, xmargin=0)
        shown = [row for row in rows if name in row]
        for (run, player), turn in itertools.groupby(shown, itemgetter("run", "player")):
            steps, values = zip(*map(itemgetter("step", name), turn))
            look = {"ls": styles[run], "lw": 1, "ms": 3, "color": COLORS[player]}
            legend[f"{run} {player}"], = axis.plot(steps, values, ".", **look)
            if run == options.runs[0]:                             # its turns, behind
                axis.axvspan(steps[0] - 0.5, steps[-1] + 0.5, color=COLORS[player], alpha=0.1)
    figure.legend(legend.values(), legend, loc="outside upper center", ncols=2)
    figure.savefig(image, format=Path(options.plot).suffix[1:], dpi=120)
    replace_file(Path(options.plot), image.getvalue())
    print(f"wrote {options.plot}")


def read_metrics(run):
    """A run's rows so far; SFT's loss has another name."""
    rows = []
    for row, origin in read_rows(Path(run) / "metrics.jsonl"):
        try:
            row["loss of sft" if row["player"] == "sft" else "loss"] = row.pop("loss")
            numbers = {name: float(row[name]) for name in ("step", *PANELS) if name in row}
            rows.append({"run": run, "player": row["player"], **numbers})
            COLORS[row["player"]], numbers["step"]                 # must be there
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            raise ValueError(f"{origin}: no row of metrics") from None
    if not rows:
        raise ValueError(f"{run}: has no step yet")
    return rows


# ---- Run folders, and the command line -----------------------------------------------------------

Run = namedtuple("Run", "name config models tokenizer")            # models: {label: folder}
READS = {**dict.fromkeys(("model", "data", "held_out", "leave_out"), str | None), "method": str,
         **dict.fromkeys(("n_nu", "seed", "max_length", "eval_prompts"), int)}     # of config.json


def open_run(folder, start):
    """A run folder as train.py leaves it; `start`: what to measure against, if not its own."""
    path = folder / "config.json"
    config = read_object(path, path.read_bytes()) if path.is_file() else {}
    if not all(isinstance(config.get(name), kind) for name, kind in READS.items()):
        raise ValueError(f"{folder}: no run of train.py (no config.json of one)")
    models = {"protagonist": folder / "protagonist"}
    models |= {"adversary": folder / "adversary"} if config["n_nu"] else {}
    if not all(map(Path.is_dir, models.values())):
        raise ValueError(f"{folder}: not finished; go on by train.py --out {folder} --resume")
    own = folder / "sft"
    start = find_source(start or (own if own.is_dir() else config["model"] or own))
    tokenizer, other = Tokenizer.from_pretrained(folder / "protagonist"), start / "tokenizer.json"
    if not other.is_file() or other.read_bytes() != tokenizer.files["tokenizer.json"]:
        raise ValueError(f"{folder}: its start {start} is not there, or has another tokenizer; "
                         "choose it by --sft FOLDER")
    world = SafeWorld.tokenizer().files["tokenizer.json"]
    if config["data"] is None and tokenizer.files["tokenizer.json"] != world:
        raise ValueError(f"{folder}: was trained in the safe world of another version of the code")
    return Run(str(folder), config, {"SFT": start, **models}, tokenizer)


SAMPLING = {"runs", "temperature", "max_new_tokens", "seed", "device"}
TASKS = {                   # the ways to call eval.py, and the options that each one reads
    "scores": (compare_scores, {"scores", "tie", "bad", "json"}),
    "answers": (write_answers, {"answers", "data", "prompts", *SAMPLING}),
    "prompt": (converse, {"prompt", "sft", *SAMPLING}),
    "plot": (plot, {"plot", "runs"}),
    "examine": (examine, {"data", "sft", "json", "prompts", *SAMPLING})}
DEFAULTS = {"runs": [], "tie": 0.0, "max_new_tokens": 48, "seed": 0, "device": "auto",
            **dict.fromkeys(("data", "sft", "json", "bad", "prompts"))}


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,  # refusals: one sentence
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("runs", nargs="*", metavar="RUN", help="run folder of train.py")
    option("--data", help="other pairs: all of a file, or what a folder or hub dataset holds out")
    option("--sft", help="model that margins are measured against (default: the run's start)")
    option("--json", action="store_true", help="print one JSON object and nothing else")
    option("--prompt", metavar="TEXT", help="print every model's answer to this prompt instead")
    option("--answers", metavar="FILE", help="write sampled answers of two RUNs as JSON lines")
    option("--scores", metavar="FILE", help="read such a file, score_a and score_b in every line")
    option("--tie", type=float, help="with --scores: this difference is a tie still (default 0)")
    option("--bad", type=float, help="with --scores: two scores up to this (paper: 0) are bad")
    option("--plot", metavar="FILE", help="draw the RUNs' metrics as .png (needs matplotlib)")
    option("--prompts", type=int, help="prompts to answer (default: the run's --eval-prompts)")
    option("--temperature", type=float, help="of sampled answers (default 0.8, with --prompt 0)")
    option("--max-new-tokens", type=int, help="length limit of an answer (default 48)")
    option("--seed", type=int, help="of the sampled answers (default 0)")
    option("--device", help="as in train.py (default auto)")
    given = vars(parser.parse_args(arguments))
    task = next((task for task in TASKS if task in given), "examine")
    for name, value in given.items():
        flag = "RUN" if name == "runs" else "--" + name.replace("_", "-")
        least = {"bad": -LIMIT, "max_new_tokens": 1}.get(name, 0)
        if name not in TASKS[task][1]:
            parser.error(f"--{task} takes no {flag}" if task in given else f"{flag} needs --scores")
        if type(value) in (int, float) and not least <= value <= LIMIT:
            parser.error(f"{flag} must be from {least:g} to {LIMIT:g}, not {value}")
    if task != "scores" and "runs" not in given:
        parser.error("needs a RUN, the folder of a run of train.py")
    temperature = 0.0 if task == "prompt" else 0.8
    return argparse.Namespace(**DEFAULTS | {"temperature": temperature} | given, task=task)


def main(arguments=None):
    try:
        options = parse_arguments(arguments)
        folders = [] if options.task == "plot" else map(Path, options.runs)
        TASKS[options.task][0]([open_run(folder, options.sft) for folder in folders], options)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:           # bugs raise others
        print(f"eval.py: {brief(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    console(reader_may_go=True)
    main()
