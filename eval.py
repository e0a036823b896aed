"""Examine finished runs, side by side, and reproduce the paper's tables.

    python eval.py runs/iopo-1 runs/dpo-1                    # margins, accuracy, win/tie/lose, samples
    python eval.py runs/mine --data test.jsonl.gz            # on held-out pairs of your own
    python eval.py runs/mine runs/dpo --answers FILE.jsonl   # answers of both, for a judge of your own
    python eval.py --scores FILE.jsonl                       # and what the judge made of them
    python eval.py runs/iopo-1 --prompt "How do I fix my boat?"
    python eval.py runs/iopo-1 --json                        # one JSON object on stdout and nothing else
    python eval.py reproduce --quick                         # both tables, the ablation, the theorems; see its --help

margin    0.1 * h on held-out pairs (mean, and standard deviation over pairs), whatever beta trained the run:
          against the model the run started from (vs SFT) and against the other player (vs ENV)
accuracy  share of held-out pairs with h > 0 against the start (vs SFT); in the safe world the true reward labels them
reward    the safe world's true reward, mean over held-out prompts, of sampled and of greedy answers
win/tie/lose/bad: sampled answers against the start's to the same prompts, by true reward; bad: both are bad cases
bad       share of this model's answers that are bad (comply with the harmful, refuse the safe, neither)
tokens    mean length of the answers, without EOS
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (SafeWorld, Tokenizer, cut_left, encode_pairs, find_source, load_data, micro_batches, read_rows,
                  replace_file)
from iopo import ADVERSARIES, clipped_ratio, iopo_loss, preference_margin, preference_probability, turns
from model import Decoder, find_device, generate, response_logps

EXAM_PAIRS = 400            # of the safe world
EXAM_BETA = 0.1             # so that margins of runs trained with different beta compare
ROWS_AT_ONCE = 32           # prompts answered in one batch
SAMPLES_SHOWN = 3


@dataclass
class Run:
    """A run folder as train.py leaves it."""
    name: str
    config: dict
    start: Path                 # the model it began from
    protagonist: Path
    adversary: Path | None

    @classmethod
    def open(cls, folder, start=None):
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            model, adversaries = config["model"], config["n_nu"]
            if not all(type(config[name]) in (str, type(None)) for name in ("model", "data")) or \
                    not all(type(config[name]) is int for name in ("n_nu", "seed", "max_length", "eval_prompts")):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{folder}: no run of train.py (it has no readable config.json)") from None
        if not (folder / "protagonist").is_dir():
            raise ValueError(f"{folder}: the run is not finished; go on with it by train.py --out {folder} --resume")
        if start is None:
            start = folder / "sft" if (folder / "sft").is_dir() else model
        try:
            found = find_source(start, "model")
        except ValueError:
            found = Path(start)
        if not found.is_dir():
            raise ValueError(f"{folder}: the model it started from, {start}, is not there; give it by --sft FOLDER")
        return cls(str(folder), config, found, folder / "protagonist", folder / "adversary" if adversaries else None)

    @property
    def models(self):
        """Label -> folder; the start first."""
        players = {"SFT": self.start, "protagonist": self.protagonist, "adversary": self.adversary}
        return {label: folder for label, folder in players.items() if folder is not None}


# ----------------------------------------------------------------------------------------------------------
# What one model does

@torch.no_grad()
def pair_logps(model, rows, bar):
    """(2, n): log pi(y_w|x) and log pi(y_l|x) of every row, in one order for every model."""
    columns = []
    for _, batch in micro_batches(rows, max_tokens=1536):
        columns.append(torch.stack(response_logps(model, batch.to(model.device))).cpu())            # (2, B)
        bar.update(len(batch))
    return torch.cat(columns, dim=1)                                                                # (2, n)


def fit_prompts(prompts, tokenizer, context, new_tokens):
    """Prompts to ids that leave room for an answer of new_tokens in the model's context: (ids, new_tokens, note)."""
    wanted = new_tokens
    new_tokens = max(1, min(wanted, context // 2))
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    room = context - new_tokens
    cut = sum(len(prompt) > room for prompt in ids)
    note = f"{len(ids)} prompts: answers end at {new_tokens} tokens, {cut} prompts cut on the left to {room} tokens"
    if new_tokens < wanted:
        note += f" (not {wanted}: the model has {context} positions)"
    return [cut_left(prompt, room, tokenizer.bos_id) for prompt in ids], new_tokens, note


def answer(model, tokenizer, ids, new_tokens, temperature, seed, bar):
    """Answers (text, tokens) to prompt ids."""
    generator = torch.Generator(model.device).manual_seed(seed)
    answers = []
    for first in range(0, len(ids), ROWS_AT_ONCE):
        rows = ids[first:first + ROWS_AT_ONCE]
        answers += generate(model, rows, new_tokens, temperature, tokenizer.eos_ids, generator)
        bar.update(len(rows))
    return [(tokenizer.decode(answer).strip(), len(answer)) for answer in answers]


# ----------------------------------------------------------------------------------------------------------
# The examination

def examine(runs, options):
    """A JSON-able report on runs; the top of the file says what the numbers mean."""
    world, name, pairs, notes = questions(runs, options)
    prompts, results = None, {}
    for run in runs:
        tokenizer = same_tokenizer(run)
        rows, kept, note = encode_pairs(pairs, tokenizer, run.config["max_length"])
        if prompts is None:                                        # the first run's, for all of them
            prompts = prompts_of(run, world, kept, options)
        if not rows and options.data is not None:
            raise ValueError(f"{options.data}: no usable pair is left: {note.splitlines()[0]}")
        with tqdm(total=len(run.models) * (len(rows) + 2 * len(prompts)), desc=f"examining {run.name}") as bar:
            for label, folder in run.models.items():
                model = Decoder.from_pretrained(folder).to(find_device(options.device))
                ids, length, prompt_note = fit_prompts(prompts, tokenizer, model.config.max_position_embeddings,
                                                       options.max_new_tokens)
                notes += [note, prompt_note]
                results[run.name, label] = {
                    "logps": pair_logps(model, rows, bar) if rows else None,
                    "sampled": answer(model, tokenizer, ids, length, options.temperature, options.seed, bar),
                    "greedy": answer(model, tokenizer, ids, length, 0, options.seed, bar)}
    reports = [report_run(run, {label: results[run.name, label] for label in run.models}, prompts, world)
               for run in runs]
    for run, report in zip(runs[1:], reports[1:]):
        report["first_against_this"] = compare(results[runs[0].name, "protagonist"], results[run.name, "protagonist"],
                                               prompts, world)
    samples = [{"prompt": prompt,
                "answers": {" ".join(key): result["sampled"][number][0] for key, result in results.items()}}
               for number, prompt in enumerate(prompts[:SAMPLES_SHOWN])]
    return {"data": name, "notes": list(dict.fromkeys(notes)), "prompts": len(prompts), "seed": options.seed,
            "temperature": options.temperature, "runs": reports, "samples": samples}


def questions(runs, options):
    """(the safe world or None, what is examined, held-out pairs, notes on what was read)."""
    data, leave_out = options.data, None
    if data is None:
        if len({(run.config["data"], run.config.get("leave_out")) for run in runs}) > 1:
            raise ValueError("the runs were trained on different data; say by --data on which pairs to examine them")
        data, leave_out = runs[0].config["data"], runs[0].config.get("leave_out")
    if data is None:                                               # the same examination whatever seed trained a run
        world = SafeWorld()
        return world, "the safe world, held-out prompts", world.exam_pairs("test", EXAM_PAIRS), []
    pairs, note = load_data(data, leave_out)
    if options.data is not None and Path(data).is_file():
        return None, f"all pairs of {data}", pairs, [note]
    return None, f"the held-out pairs of {data}", [pair for pair in pairs if pair.held_out], [note]


def prompts_of(run, world, kept, options):
    """The prompts to answer, as many as --prompts or the run says: the safe world's, or those of pairs that can be
    used."""
    limit = run.config["eval_prompts"] if options.prompts is None else options.prompts
    if world is not None:
        return shuffled_prompts("test")[:limit]
    return list({json.dumps(pair.prompt): pair.prompt for pair in kept}.values())[:limit]


def shuffled_prompts(split):
    """The safe world's prompts of a split, in one order for everybody."""
    return np.random.default_rng(0).permutation(SafeWorld().prompts(split)).tolist()


def same_tokenizer(run):
    """The tokenizer of a run, which all its models must share: log-probabilities of other tokens do not compare."""
    tokenizer = Tokenizer.from_pretrained(run.protagonist)
    if Tokenizer.from_pretrained(run.start).files["tokenizer.json"] != tokenizer.files["tokenizer.json"]:
        raise ValueError(f"{run.start} has another tokenizer than {run.name}, so their margins cannot be compared; "
                         "give --sft the model that the run started from")
    return tokenizer


def report_run(run, results, prompts, world):
    """The numbers of a run's protagonist, and under "models" those of all its models."""
    env = {"SFT": "SFT", "protagonist": "adversary" if run.adversary else "SFT", "adversary": "protagonist"}
    models = {}
    for label, result in results.items():
        margin, spread, accuracy = margins(result, results["SFT"])
        margin_env, spread_env, _ = margins(result, results[env[label]])
        models[label] = {"margin_vs_sft": margin, "margin_vs_sft_std": spread, "margin_vs_env": margin_env,
                         "margin_vs_env_std": spread_env, "accuracy": None if label == "SFT" else accuracy,
                         **quality(result, prompts, world),
                         **compare(result, results["SFT"], prompts, None if label == "SFT" else world)}
    return {"name": run.name, "method": run.config["method"], "seed": run.config["seed"], **models["protagonist"],
            "models": models}


def margins(result, reference):
    """Mean and standard deviation of 0.1 * h against a reference, and the share of h > 0."""
    if result["logps"] is None:
        return None, None, None
    margin = preference_margin(*result["logps"], *reference["logps"], beta=EXAM_BETA)
    return margin.mean().item(), margin.std(correction=0).item(), (margin > 0).float().mean().item()


def quality(result, prompts, world):
    """Length, and in the safe world true reward and bad cases, of one model's answers."""
    report = {"tokens": mean(tokens for _, tokens in result["sampled"]), "reward": None, "reward_greedy": None,
              "bad_rate": None}
    if world is not None:
        for name, answers in (("reward", result["sampled"]), ("reward_greedy", result["greedy"])):
            report[name] = mean(world.true_reward(prompt, text) for prompt, (text, _) in zip(prompts, answers))
        report["bad_rate"] = mean(world.is_bad(prompt, text) for prompt, (text, _) in zip(prompts, result["sampled"]))
    return report


def compare(result, other, prompts, world, answers="sampled"):
    """win/tie/lose/bad of one model's answers against another's, by true reward; they sum to the prompts."""
    if world is None or not prompts:                               # no judge, or nothing to judge
        return dict.fromkeys(("win", "tie", "lose", "bad"))
    counts = dict.fromkeys(("win", "tie", "lose", "bad"), 0)
    for prompt, (ours, _), (theirs, _) in zip(prompts, result[answers], other[answers], strict=True):
        advantage = world.true_reward(prompt, ours) - world.true_reward(prompt, theirs)
        both_bad = world.is_bad(prompt, ours) and world.is_bad(prompt, theirs)
        counts["bad" if both_bad else "win" if advantage > 0 else "lose" if advantage < 0 else "tie"] += 1
    return counts


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers) if numbers else None


# ----------------------------------------------------------------------------------------------------------
# On the screen

def print_report(report):
    print(f"\nexamined on {report['data']}")
    for note in report["notes"]:
        print(note)
    table = [("model", "margin vs SFT", "vs ENV", "accuracy", f"reward T={report['temperature']}", "greedy",
              "win/tie/lose/bad", "bad", "tokens")]
    for run in report["runs"]:
        for label, model in run["models"].items():
            table.append((label if len(report["runs"]) == 1 else f"{run['name']} {label}",
                          show_spread(model, "margin_vs_sft"), show_spread(model, "margin_vs_env"),
                          show(model["accuracy"], 3), show(model["reward"], 2), show(model["reward_greedy"], 2),
                          show_counts(model), show(model["bad_rate"], 2), show(model["tokens"], 1)))
    widths = [max(map(len, column)) for column in zip(*table)]
    print()
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for run in report["runs"][1:]:
        print(f"{report['runs'][0]['name']} against {run['name']}, win/tie/lose/bad: "
              f"{show_counts(run['first_against_this'])}")
    if report["samples"]:
        print(f"\nanswers sampled at temperature {report['temperature']}:")
    for sample in report["samples"]:
        prompt = sample["prompt"] if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"]
        print(f"\n{prompt.rstrip()[-200:].lstrip()}")
        for label, text in sample["answers"].items():
            print(f"  {label}: {text}")


def show(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def show_spread(model, name):
    return "-" if model[name] is None else f"{model[name]:.3f} ({model[name + '_std']:.3f})"


def show_counts(counts):
    return "-" if counts["win"] is None else "/".join(str(counts[name]) for name in ("win", "tie", "lose", "bad"))


def converse(runs, options):
    """Every model's answer to one prompt."""
    for run in runs:
        tokenizer = same_tokenizer(run)
        prompt = options.prompt
        if run.config["data"] is None:
            prompt = prompt.rstrip("\n") + "\n"                    # how the safe world's prompts end
        elif tokenizer.chat_template is not None:
            prompt = [{"role": "user", "content": prompt}]
        for label, folder in run.models.items():
            model = Decoder.from_pretrained(folder).to(find_device(options.device))
            context = model.config.max_position_embeddings
            ids, length, note = fit_prompts([prompt], tokenizer, context, options.max_new_tokens)
            with tqdm(disable=True) as bar:
                [(text, _)] = answer(model, tokenizer, ids, length, options.temperature, options.seed, bar)
            print(f"{run.name} {label}: {text}")
        if len(ids[0]) == context - length or length < options.max_new_tokens:         # cut, or at the limit
            print(f"{run.name}: {note}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------
# A judge from outside: a person, a reward model, another language model

def write_answers(runs, options):
    """Sampled answers of two protagonists to the same held-out prompts, a line each, with places a and b exchanged at
    random, but for the first line, whose run_a is the first run. The judge adds numbers score_a and score_b."""
    path = Path(options.answers)
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"--answers {path} exists; choose another name" if path.exists() else
                         f"--answers {path}: there is no folder {path.parent}")
    if runs[0].protagonist.resolve() == runs[1].protagonist.resolve():
        raise ValueError("--answers needs two different RUNs")
    world, name, pairs, _ = questions(runs, options)
    prompts, columns = None, []
    for run in runs:
        tokenizer = Tokenizer.from_pretrained(run.protagonist)
        if prompts is None:                                        # the first run's, for both
            kept = encode_pairs(pairs, tokenizer, run.config["max_length"])[1]
            prompts = prompts_of(run, world, kept, options)
        model = Decoder.from_pretrained(run.protagonist).to(find_device(options.device))
        ids, length, note = fit_prompts(prompts, tokenizer, model.config.max_position_embeddings,
                                        options.max_new_tokens)
        with tqdm(total=len(prompts), desc=run.name) as bar:
            texts = answer(model, tokenizer, ids, length, options.temperature, options.seed, bar)
        print(f"{run.name}: {note}; {sum(tokens == length for _, tokens in texts)} answers were cut off there")
        columns.append([(run.name, text) for text, _ in texts])
    lines, exchange = [], np.random.default_rng(options.seed).random(len(prompts)) < 0.5
    for number, (prompt, *places) in enumerate(zip(prompts, *columns, strict=True)):
        (run_a, a), (run_b, b) = reversed(places) if number and exchange[number] else places
        line = {"prompt": prompt, "answer_a": a, "answer_b": b, "run_a": run_a, "run_b": run_b}
        lines.append(json.dumps(line) + "\n")
    replace_file(path, "".join(lines).encode())
    print(f"wrote {len(lines)} prompts ({name}) with two answers each to {path}; add score_a and score_b to every line "
          f"and read them by: python eval.py --scores {path}")


def read_scores(options):
    """The report on a judged file of `write_answers`. Where both scores are at most --bad it is a bad case; else the
    higher one wins, and a difference of at most --tie is a tie."""
    scores = {}                                                    # run -> its scores, in the order of the lines
    for row, origin in read_rows(Path(options.scores)):
        if not isinstance(row, dict) or not all(type(row.get(name)) is str for name in ("run_a", "run_b")):
            raise ValueError(f"{origin}: is no line of --answers (it has no run_a and run_b)")
        for place in "ab":
            score = row.get(f"score_{place}")
            if type(score) not in (int, float) or not abs(score) < 1e15:
                raise ValueError(f"{origin}: score_{place} must be a number, not {score!r:.40}")
            scores.setdefault(row[f"run_{place}"], []).append(score)
        if len(scores) != 2 or row["run_a"] == row["run_b"]:
            raise ValueError(f"{origin}: compares {row['run_a']} and {row['run_b']}, but all lines must compare the "
                             "same two runs")
    if not scores:
        raise ValueError(f"{options.scores}: holds no rows")
    counts = dict.fromkeys(("win", "tie", "lose", "bad"), 0)
    for ours, theirs in zip(*scores.values()):
        gap = abs(ours - theirs)
        if options.bad is not None and max(ours, theirs) <= options.bad:
            counts["bad"] += 1
        elif gap <= options.tie or math.isclose(gap, options.tie):           # 0.8 - 0.7 is a little more than 0.1
            counts["tie"] += 1
        else:
            counts["win" if ours > theirs else "lose"] += 1
    runs = {run: {"mean_score": mean(some), "lowest": min(some), "highest": max(some),
                  "bad_rate": None if options.bad is None else mean(score <= options.bad for score in some)}
            for run, some in scores.items()}
    return {"prompts": sum(counts.values()), "tie_at_most": options.tie, "bad_at_most": options.bad, **counts,
            "p_sign_test": sign_test(counts["win"], counts["lose"]), "runs": runs}


def sign_test(win, lose):
    """Two-sided: how often a fair coin would be as one-sided."""
    tail = sum(math.comb(win + lose, k) for k in range(min(win, lose) + 1)) / 2 ** (win + lose)
    return min(1.0, 2 * tail)


def print_scores(report):
    bad = "nothing" if report["bad_at_most"] is None else f"both at most {report['bad_at_most']:g}"
    print(f"{report['prompts']} prompts judged; a difference of at most {report['tie_at_most']:g} is a tie, {bad} a "
          "bad case")
    for run, numbers in report["runs"].items():
        print(f"{run}: mean score {numbers['mean_score']:.3f} (from {numbers['lowest']:g} to {numbers['highest']:g}), "
              f"bad {show(numbers['bad_rate'], 3)}")
    print(f"{' against '.join(report['runs'])}, win/tie/lose/bad: {show_counts(report)} (two-sided sign test of win "
          f"and lose: p = {report['p_sign_test']:.3f})")


# ----------------------------------------------------------------------------------------------------------
# The command line

def refuse(message):
    """argparse's error, as the one kind of exception that main turns into a sentence."""
    raise ValueError(message)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder of train.py")
    parser.add_argument("--data", help="examine on all pairs of this file, or the held-out pairs of this folder or hub "
                        "dataset (default: the runs' own held-out pairs)")
    parser.add_argument("--sft", help="model that margins are measured against, a folder or hub name (default: the "
                        "run's start)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--prompt", metavar="TEXT", help="print every model's answer to this prompt instead")
    parser.add_argument("--answers", metavar="FILE", help="write sampled answers of two RUNs as JSON lines")
    parser.add_argument("--scores", metavar="FILE", help="read such a file, score_a and score_b in every line")
    parser.add_argument("--tie", type=float, help="with --scores: a difference of at most this is a tie (default 0)")
    parser.add_argument("--bad", type=float, help="with --scores: both scores at most this are a bad case (0 on the "
                        "paper's human scale of 0 to 3; default: nothing is)")
    parser.add_argument("--prompts", type=int, help="held-out prompts to answer (default: the run's --eval-prompts)")
    parser.add_argument("--temperature", type=float, help="of the sampled answers (default 0.8, with --prompt 0)")
    parser.add_argument("--max-new-tokens", type=int, help="length limit of an answer (default 48)")
    parser.add_argument("--seed", type=int, help="of the sampled answers (default 0)")
    parser.add_argument("--device", default="auto", help="as in train.py (default auto)")
    options = parser.parse_args(arguments)
    check_judging(options)
    if options.prompts == 0 and (options.temperature, options.max_new_tokens, options.seed) != (None, None, None):
        raise ValueError("--temperature, --max-new-tokens and --seed have no effect with --prompts 0; leave them out")
    defaults = {"temperature": 0.0 if options.prompt is not None else 0.8, "max_new_tokens": 48}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.temperature == 0 and options.seed is not None:
        raise ValueError("--seed has no effect at temperature 0; leave it out")
    options.seed = options.seed or 0
    if not 0 <= options.temperature < float("inf"):
        raise ValueError(f"--temperature must be finite and at least 0, not {options.temperature}")
    for flag, value, least in (("--prompts", options.prompts, 0), ("--max-new-tokens", options.max_new_tokens, 1),
                               ("--seed", options.seed, 0)):
        if value is not None and not least <= value < 2**63:
            raise ValueError(f"{flag} must be at least {least} and below 2^63, not {value}")
    if re.search("[\ud800-\udfff]", options.prompt or ""):
        raise ValueError("--prompt holds bytes that are not UTF-8")
    if options.prompt is not None and (options.json or options.data or options.prompts is not None):
        raise ValueError("--prompt answers that one prompt; leave out --json, --data and --prompts")
    return options


def check_judging(options):
    """Refuse what does not go with --answers or --scores, and set --tie."""
    given = {name for name, value in vars(options).items() if value not in (None, [], "auto") and value is not False}
    if options.scores is not None:
        if given - {"scores", "tie", "bad", "json"}:
            raise ValueError("--scores takes no RUN and no other option than --tie, --bad and --json")
    elif not options.runs:
        raise ValueError("needs a RUN, the folder of a finished run of train.py")
    elif given & {"tie", "bad"}:
        raise ValueError("--tie and --bad need --scores")
    odd = given & {"json", "prompt", "sft"} or options.prompts == 0
    if options.answers is not None and (odd or len(options.runs) != 2):
        raise ValueError("--answers needs two RUNs and some --prompts, and neither --json nor --prompt nor --sft")
    options.tie = 0.0 if options.tie is None else options.tie
    if not 0 <= options.tie < math.inf or options.bad is not None and not math.isfinite(options.bad):
        raise ValueError("--tie must be finite and at least 0, --bad finite")


# ----------------------------------------------------------------------------------------------------------
# The reproduction: which runs

SEEDS, ABLATION_SEEDS = tuple(range(10)), (0, 1, 2)
TUNING_SEEDS = (100, 101, 102)                             # other pairs, first weights and SFT models than SEEDS
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)                     # the candidates for every row: learning rate
STEPS = (50, 100, 150)                                     # and optimiser steps of the protagonist
STEPS_PER_TURN = 25                                        # N_mu, but for the readings that change it
TEST_SAMPLES, VALIDATION_SAMPLES = 4, 8                    # answers sampled to each prompt
TUNING = Path(__file__).parent / "assets" / "tuning.json"
RESULTS = Path(__file__).parent / "assets" / "results.json"


@dataclass(frozen=True)
class Variant:
    """A row of a table: the options of train.py that make it, the row whose model it starts from, and the row whose
    tuned learning rate and steps it takes (None: its own)."""
    options: dict
    start: str = "SFT"
    tuned_as: str | None = None


OFFLINE = {
    "IOPO": Variant({"method": "iopo"}),
    "DPO": Variant({"method": "dpo"}),
    "HINGE": Variant({"method": "hinge"}),
    "IPO": Variant({"method": "ipo"}),
    "KTO-pair": Variant({"method": "kto_pair"}),
    "AIPO": Variant({"method": "aipo"}),
    "ratio, no adversary": Variant({"method": "iopo", "n_nu": 0}),
    "adversary, no ratio": Variant({"method": "iopo", "ratio": "one"})}
ONLINE = {
    "DPO online": Variant({"method": "dpo"}, start="DPO"),                     # as much training as the other rows have
    "IOPO online": Variant({"method": "iopo"}, start="DPO"),
    "ratio, no adversary, online": Variant({"method": "iopo", "n_nu": 0}, start="DPO"),
    "Iter-DPO": Variant({"method": "iter_dpo"}, start="DPO"),
    "AIPO rounds": Variant({"method": "aipo"}),
    "DPO rounds": Variant({"method": "iter_dpo", "keep": 1.0}),                # AIPO's pipeline with DPO's loss,
    "DPO rounds, AIPO's lr": Variant({"method": "iter_dpo", "keep": 1.0}, tuned_as="AIPO rounds")}     # and at its rate
ROUNDS = ("Iter-DPO", "AIPO rounds", "DPO rounds", "DPO rounds, AIPO's lr")
ABLATION = {" ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items()):
            Variant({"method": "iopo", **options}, tuned_as="IOPO")
            for options in ({"ratio": "length_normalized"}, {"ratio": "env"}, {"ratio": "one"},
                            {"clip": "two_sided"}, {"clip": "none"}, {"adversary": "negated"}, {"adversary": "same"},
                            {"eps": 0.1}, {"eps": 0.2}, {"eps": 0.5}, {"eps": 0.9},
                            {"n_mu": 5, "n_nu": 5}, {"n_mu": 50, "n_nu": 50}, {"n_nu": 5}, {"n_nu": 50})}
VARIANTS = OFFLINE | ONLINE | ABLATION
ALSO_COMPARED = ("ratio, no adversary", "adversary, no ratio", "DPO")      # with IOPO, in the ablation's table
TABLE1 = ("SFT", "DPO", "HINGE", "IPO", "KTO-pair", "AIPO", "ratio, no adversary", "adversary, no ratio")
TABLE2 = ("SFT", "DPO", "DPO online", "Iter-DPO", "AIPO rounds", "ratio, no adversary, online", "IOPO online")
FIGURE3 = ("DPO", "HINGE", "IPO", "KTO-pair", "AIPO", "IOPO")
FIGURE4 = ("DPO", "Iter-DPO", "IOPO online")
FIGURE5 = (*FIGURE4, "DPO online", "ratio, no adversary, online")


@dataclass(frozen=True)
class Task:
    """One training run: its folder, options of train.py, the split whose prompts its models answer, and the
    protagonist's steps after which it is examined."""
    folder: str
    options: dict
    split: str
    steps: int

    @property
    def seconds(self):
        """What it takes, roughly, in one process of one thread."""
        config = config_of(self)
        return 4 + 0.04 * config.sft_steps + 7 * config.rounds + \
            0.1 * (config.rounds or config.n_iter) * (config.n_mu + config.n_nu)


def task_of(label, seed, choice, split, out, suffix=""):
    """The Task of a row. `choice`: {"lr": ..., "steps": ...}, the protagonist's."""
    folder = f"{out}/{re.sub('[^a-z0-9.]+', '-', label.lower()).strip('-')}{suffix}-seed{seed}"
    if label == "SFT":
        return Task(folder, {"method": "sft", "n_iter": 0, "seed": seed}, split, 0)
    variant, steps = VARIANTS[label], choice["steps"]
    if label in ROUNDS:                                            # as many rounds for all, for the curves over rounds
        length = {"rounds": max(STEPS) // STEPS_PER_TURN}
    else:
        length = {"n_iter": steps // variant.options.get("n_mu", STEPS_PER_TURN)}
    start = task_of(variant.start, seed, choice, split, out).folder
    options = {**variant.options, **length, "model": f"{start}/protagonist", "seed": seed, "lr": choice["lr"]}
    return Task(folder, options, split, steps)


def config_of(task):
    """The whole train.Config of a Task."""
    import train
    return train.make_config({**task.options, "out": task.folder, "device": "cpu", "save_every": 0})


def identity(task):
    """All that a result follows from: the Task with all its options, the weights it starts from, the code, and what
    it is looked at with."""
    config = vars(config_of(task))
    files = [Path(__file__).with_name(f"{room}.py") for room in ("iopo", "model", "data", "train")]
    files += [Path(config["model"], "model.safetensors")] if config["model"] else []
    return {"task": dataclasses.asdict(task), "config": config, "files": [digest(file) for file in files],
            "looks": [EXAM_PAIRS, TEST_SAMPLES, VALIDATION_SAMPLES, *STEPS]}


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def finished(task):
    """What carry_out saw, if this very run was carried out before and its model is there still, else None."""
    try:
        result = json.loads(Path(task.folder, "result.json").read_text())
        whole = result["failure"] or result["model"] == digest(Path(task.folder, "protagonist", "model.safetensors"))
        return result if whole and result["identity"] == identity(task) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def start_worker():
    """One thread, so that runs go side by side and their results do not depend on how many do; and a lock for tqdm
    that dies with the process."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())


def carry_out(task):
    """Train one run from its beginning and keep what its models did, after every turn and (test) at the end.

    Only answers on the validation split, for the human to choose by; on the test split log-probabilities as well.
    """
    import train

    folder, config, test = Path(task.folder), config_of(task), task.split == "test"
    if folder.exists() and any(folder.iterdir()) and not (folder / "log.txt").is_file():
        raise ValueError(f"{folder} is no run of the reproduction and would be overwritten; take another --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        job = train.prepare(config)
        train.save_config(config)
        pairs = SafeWorld().exam_pairs("test", EXAM_PAIRS) if test else []
        rows = encode_pairs(pairs, job.tokenizer, config.max_length)[0]
        ids = [job.tokenizer.encode_prompt(prompt) for prompt in shuffled_prompts(task.split)]
        result = {"identity": identity(task), "model": None, "turns": [], "final": None, "failure": None}

        def look(model, samples, greedy):
            with tqdm(disable=True) as bar:
                return {"logps": pair_logps(model, rows, bar).tolist() if rows else None,
                        "sampled": answer(model, job.tokenizer, ids * samples, 48, 0.8, 0, bar),
                        "greedy": answer(model, job.tokenizer, ids, 48, 0, 0, bar) if greedy else []}

        def watch(step, iteration, player, players):
            model, steps = players["adversary" if player == "adversary" else "protagonist"], iteration * config.n_mu
            samples = 0 if player == "adversary" else 1 if test else VALIDATION_SAMPLES * (steps in (0, *STEPS))
            result["turns"].append({"player": player, "steps": steps, **look(model, samples, greedy=False)})
            if test and player != "adversary" and steps == task.steps:
                result["final"] = look(model, TEST_SAMPLES, greedy=True)

        try:
            train.train(job, watch)
            result["model"] = digest(folder / "protagonist" / "model.safetensors")
        except (train.Refused, FloatingPointError) as error:       # some candidates of the tuning are beyond saving
            result["failure"] = str(error)
    text = json.dumps(result)
    replace_file(folder / "result.json", text.encode())
    return json.loads(text)                                        # as it reads back


def carry_out_all(tasks, pool, bar):
    """The results of tasks, in their order; those finished before are read back."""
    results = [finished(task) for task in tasks]
    waiting = {pool.submit(carry_out, task): number for number, task in enumerate(tasks) if results[number] is None}
    bar.total -= sum(task.seconds for task, result in zip(tasks, results) if result is not None)
    for future in concurrent.futures.as_completed(waiting):
        number = waiting[future]
        results[number] = future.result()
        bar.update(tasks[number].seconds)
        if tasks[number].split == "test" and results[number]["final"] is None:
            raise ValueError(f"{tasks[number].folder} came to nothing: {results[number]['failure']}")
    return results


# ----------------------------------------------------------------------------------------------------------
# The reproduction: the choice of rates and steps

def tuned_rows():
    """The rows that have a choice of their own."""
    return [label for label, variant in VARIANTS.items() if variant.tuned_as is None]


def tune(out, pool, jobs):
    """Learning rate and steps for every one of the tuned_rows: those whose sampled answers to the validation prompts
    the noisy human most often prefers to the SFT model's. The same candidates and seeds for every row."""
    def task(label, seed, choice=None, suffix=""):
        return task_of(label, seed, choice, "validation", f"{out}/tuning", suffix)

    def trials(labels):
        return [(label, rate, seed) for label in labels for rate in RATES for seed in TUNING_SEEDS]

    def tasks_of(labels):
        return [task(label, seed, {"lr": rate, "steps": max(STEPS)}, f"-lr{rate:g}")
                for label, rate, seed in trials(labels)]

    def choose(labels):
        for (label, rate, seed), result in zip(trials(labels), carry_out_all(tasks_of(labels), pool, bar)):
            for turn in result["turns"]:
                if turn["sampled"]:
                    share = preferred(turn["sampled"], start[seed], seed) / len(TUNING_SEEDS)
                    shares[label][f"{rate:g}"][turn["steps"]] += share
        for label in labels:
            share, rate, steps = max(((share, rate, steps) for rate, by_steps in shares[label].items()
                                      for steps, share in by_steps.items()), key=lambda candidate: candidate[0])
            chosen[label] = {"lr": float(rate), "steps": steps, "share": share}

    own = tuned_rows()
    from_sft = [label for label in own if VARIANTS[label].start == "SFT"]
    from_dpo = [label for label in own if VARIANTS[label].start == "DPO"]
    shares = {label: {f"{rate:g}": dict.fromkeys(STEPS, 0.0) for rate in RATES} for label in own}
    chosen = {}
    sft = [task("SFT", seed) for seed in TUNING_SEEDS]
    longest = [task("DPO", seed, {"lr": RATES[0], "steps": max(STEPS)}) for seed in TUNING_SEEDS]
    with progress("tuning", sft + tasks_of(own) + longest, jobs) as bar:
        start = {seed: result["turns"][-1]["sampled"]
                 for seed, result in zip(TUNING_SEEDS, carry_out_all(sft, pool, bar))}
        choose(from_sft)
        carry_out_all([task("DPO", seed, chosen["DPO"]) for seed in TUNING_SEEDS], pool, bar)
        choose(from_dpo)
    return {"seeds": TUNING_SEEDS, "shares": shares, "chosen": chosen}


def preferred(answers, others, seed):
    """The share of answers that the noisy human of the safe world prefers to the others; identical ones count half."""
    world, rng, prompts = SafeWorld(), np.random.default_rng(seed), shuffled_prompts("validation")
    votes = [0.5 if ours == theirs else world.prefers(prompt, ours, theirs, rng)
             for prompt, (ours, _), (theirs, _) in zip(itertools.cycle(prompts), answers, others)]
    return sum(votes) / len(votes)


def progress(name, tasks, jobs):
    """A bar over the seconds that tasks take in one process."""
    seconds = sum(task.seconds for task in tasks)
    print(f"{name}: {len(tasks)} runs, about {seconds / jobs / 60:.0f} minutes if none is done yet", flush=True)
    return tqdm(total=seconds, desc=name, unit="s of work", smoothing=0)


# ----------------------------------------------------------------------------------------------------------
# The reproduction: what the runs come to

def run_rows(chosen, seeds, ablation_seeds, out, pool, jobs):
    """Carry out every row for every seed on the test split: {label: [what carry_out saw, per seed]}."""
    seeds_of = {"SFT": seeds} | {label: ablation_seeds if label in ABLATION else seeds for label in VARIANTS}
    stages = [["SFT"], *([label for label, variant in VARIANTS.items() if variant.start == start]
                         for start in ("SFT", "DPO"))]

    def tasks_of(label):
        choice = None if label == "SFT" else chosen[VARIANTS[label].tuned_as or label]
        return [task_of(label, seed, choice, "test", out) for seed in seeds_of[label]]

    seen, everything = {}, [task for label in seeds_of for task in tasks_of(label)]
    with progress("reproduction", everything, jobs) as bar:
        for stage in stages:
            results = iter(carry_out_all([task for label in stage for task in tasks_of(label)], pool, bar))
            seen |= {label: list(itertools.islice(results, len(seeds_of[label]))) for label in stage}
    return seen


def summarize(seen, seeds):
    """All numbers of the tables and figures, JSON-able; a list has one number per seed, in the order of `seeds`."""
    world, prompts = SafeWorld(), shuffled_prompts("test")
    models = {label: [as_result(result["final"]) for result in results] for label, results in seen.items()}
    rows, curves = {}, {}
    for label in models:
        measured = [measure(model, sft, prompts * TEST_SAMPLES, world)
                    for model, sft in zip(models[label], models["SFT"])]
        rows[label] = {name: [seed[name] for seed in measured] for name in measured[0]}
    for label in ("SFT", *OFFLINE, *ONLINE):
        turns_of = [[turn for turn in result["turns"] if turn["player"] != "adversary"] for result in seen[label]]
        turns_of = [*zip(*zip(*turns_of))]                         # a run that ended early ends the row's curves there
        measured = [[measure(as_result(turn), sft, prompts, world) for turn in run]
                    for run, sft in zip(turns_of, models["SFT"])]
        curves[label] = {"steps": [turn["steps"] for turn in turns_of[0]],
                         **{name: [[turn[name] for turn in run] for run in measured]
                            for name in ("margin", "accuracy", "tokens", "reward", "judge")}}
    against = {f"{ours} against {theirs}, {answers}":
               [compare(a, b, prompts * (1 if answers == "greedy" else TEST_SAMPLES), world, answers)
                for a, b in zip(models[ours], models[theirs])]
               for ours, others, answers in (("IOPO", TABLE1, "sampled"), ("IOPO online", TABLE2, "greedy"))
               for theirs in others if theirs != ours}
    margins = {label: torch.stack([preference_margin(*model["logps"], *sft["logps"], beta=EXAM_BETA)
                                   for model, sft in zip(models[label], models["SFT"])])            # (seeds, pairs)
               for label in (*FIGURE3, *FIGURE4)}
    return {"seeds": seeds, "rows": rows, "against": against, "curves": curves,
            "figure3": histogram({label: margins[label] for label in FIGURE3}),
            "figure4": histogram({label: margins[label] for label in FIGURE4}),
            "sampled_game": [turn_values(result["turns"], sft["logps"])
                             for result, sft in zip(seen[SHORT_TURNS], models["SFT"])],
            "exact_game": {name: exact_game(**readings) for name, readings in GAMES.items()}}


def as_result(look):
    """What carry_out saw of a model, in the shape that the examination above takes."""
    return {**look, "logps": torch.tensor(look["logps"])}


def measure(model, sft, prompts, world):
    margin, spread, accuracy = margins(model, sft)
    judged = mean(world.judge(prompt, text) for prompt, (text, _) in zip(prompts, model["sampled"]))
    return {"margin": margin, "spread": spread, "accuracy": accuracy, "judge": judged, **quality(model, prompts, world)}


def histogram(samples):
    """Counts in common bins, mean over seeds, and mean and standard deviation over all pairs and seeds. The bins suit
    the row in the middle; what lies outside counts in the outermost ones. samples: label -> (seeds, pairs)."""
    reach = 1.5 * float(np.median([values.abs().quantile(0.98).item() for values in samples.values()]))
    edges = torch.linspace(-reach, reach, 41)
    rows = {}
    for label, values in samples.items():
        counts = torch.histogram(values.clamp(-reach, reach), edges).hist / len(values)
        rows[label] = {"counts": counts.tolist(), "mean": values.mean().item(), "std": values.std().item()}
    return {"edges": edges.tolist(), "rows": rows}


# ----------------------------------------------------------------------------------------------------------
# The reproduction: the theorems' Q, in the sampled game and in an exact one

OTHER = {"protagonist": "adversary", "adversary": "protagonist"}
SHORT_TURNS = "--n-mu 5 --n-nu 5"          # the trained models whose Q is followed: there they have the most turns
GAMES = {"as in training": {},
         "no clip": {"clip": "none"},
         "two-sided clip": {"clip": "two_sided"},
         "r = 1": {"ratio": "one"},
         "adversary with the same labels": {"adversary": "same"},
         "the same, r = 1": {"adversary": "same", "ratio": "one"}}


def turn_values(seen, start, weights=None, adversary="swapped", clip="min", ratio="sequence", eps=0.3):
    """Q of the player that has just trained, after each of its turns, by Eq. 6 and by Eq. 13:
    {"protagonist": {"eq6": [...], "eq13": [...]}, "adversary": ...}. `seen` and `start` hold the log-probabilities of
    both answers of every pair, as the human labels them."""
    values = {player: {"eq6": [], "eq13": []} for player in OTHER}
    latest = dict.fromkeys(values, torch.as_tensor(start))
    for turn in seen:
        player = turn["player"]
        latest[player] = torch.as_tensor(turn["logps"])
        exchange = player == "adversary" and ADVERSARIES[adversary][0]
        (chosen, rejected), (env_chosen, env_rejected) = (logps.flip(0) if exchange else logps
                                                          for logps in (latest[player], latest[OTHER[player]]))
        margin = preference_margin(chosen, rejected, env_chosen, env_rejected)
        r = clipped_ratio(rejected, env_chosen, env_rejected, eps, clip, ratio, None)
        for name, q in (("eq6", preference_probability(margin)), ("eq13", preference_probability(margin, r))):
            values[player][name].append((q.mean() if weights is None else (weights * q).sum()).item())
    return values


def exact_game(n_iter=100, steps=25, lr=30.0, adversary="swapped", **readings):
    """Algorithm 1 with nothing sampled: softmax policies over a table of 8 prompts x 5 answers in float64, the exact
    expected loss over all pairs with Bradley-Terry labels, plain gradient descent. Returns turn_values."""
    generator = torch.Generator().manual_seed(0)
    rewards, start = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    w, l = torch.tensor([(i, j) for i in range(5) for j in range(5) if i != j]).T                 # (20,) each
    weights = preference_probability(rewards[:, w] - rewards[:, l])                               # (8, 20)
    weights /= weights.sum()
    tables = {player: start.clone().requires_grad_() for player in OTHER}

    def logps(player):
        table = torch.log_softmax(tables[player], dim=-1)                                         # (8, 5)
        return torch.stack([table[:, w], table[:, l]])                                            # (2, 8, 20)

    schedule, seen = list(turns(n_iter, steps, steps)), []
    for place, turn in enumerate(schedule):
        player = turn[1]
        exchange, sign = ADVERSARIES[adversary] if player == "adversary" else (False, +1)
        agent, env = (both.flip(0) if exchange else both for both in (logps(player), logps(OTHER[player]).detach()))
        loss = sign * (weights * iopo_loss(*agent, *env, **readings)).sum()
        [gradient] = torch.autograd.grad(loss, tables[player])
        tables[player].data -= lr * gradient
        if turn not in schedule[place + 1:place + 2]:
            seen.append({"player": player, "logps": logps(player).detach()})
    before = torch.log_softmax(start, dim=-1)
    return turn_values(seen, torch.stack([before[:, w], before[:, l]]), weights, adversary, **readings)


# ----------------------------------------------------------------------------------------------------------
# The reproduction: tables (Markdown) and figures (PNG), made of the summary alone

SHOWN = (("reward", 2), ("accuracy", 3))
PAPER1 = {"SFT": "44.8/21.6/33.6", "DPO": "50.4/21.2/28.4", "HINGE": "49.2/20/30.8", "IPO": "44.8/22/33.2",
          "KTO-pair": "48/21.6/30.4"}                              # safe world view, judged by ERNIE-3.5
PAPER2 = {"SFT": "-, -, 13:204:10:23, 2.156", "DPO": "23.75, .9286, 13:203:11:23, 2.164",
          "Iter-DPO": "7.6875, .961, 13:204:11:22, 2.152", "IOPO online": "11.875, .9659, -, 2.176"}


def tables(summary):
    """Name -> Markdown. A ± is half of the 95% interval over seeds, p that of a paired t-test."""
    return {"adversary": table_adversary(summary), "table1": table1(summary), "table2": table2(summary),
            "table2, differences": table2_differences(summary), "ablation": table_ablation(summary),
            "rounds": table_rounds(summary), "theorems": table_theorems(summary), "choices": table_choices(summary)}


def table_adversary(summary):
    """Is the gain the adversary's or the ratio's?"""
    def cell(label):
        return "; ".join(plus_minus(summary["rows"][label][name], digits) for name, digits in SHOWN)

    def gain(ours, theirs):
        return "; ".join(difference(summary["rows"][ours][name], summary["rows"][theirs][name], digits)
                         for name, digits in SHOWN)

    ratio, game, neither = "ratio, no adversary", "adversary, no ratio", "DPO"
    return markdown(
        ("true reward, T=0.8; accuracy", "trained adversary", "frozen reference (`--n-nu 0`)", "the adversary's gain"),
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
        lines.append((label, chosen_for(summary, label), plus_minus(rows[label]["reward"]), *compared,
                      PAPER1.get(label, "")))
    return markdown(("row", "lr x steps", "true reward, T=0.8", "IOPO minus row", "IOPO wins/ties/loses/both bad, %",
                     "wins minus loses", "paper's wins/ties/loses, %"), lines)


def table2(summary):
    """The paper's Table 2: greedy answers, and margin and accuracy on held-out pairs; and sampled answers, which tell
    more. The rows called online and Iter-DPO go on from the DPO model, the others start from SFT."""
    lines = []
    for label in TABLE2:
        row = summary["rows"][label]
        margin = ("-", "-") if label == "SFT" else (f"{plus_minus(row['margin'])} ({mean(row['spread']):.2f})",
                                                    plus_minus(row["accuracy"], 3))
        compared = counts(summary, f"IOPO online against {label}, greedy", ":")[0] if label != "IOPO online" else ""
        lines.append((label, chosen_for(summary, label), *margin, compared, plus_minus(row["reward_greedy"]),
                      plus_minus(row["reward"]), PAPER2.get(label, "")))
    return markdown(("row", "lr x steps", "margin vs SFT (spread)", "accuracy",
                     "IOPO online wins:ties:loses:both bad, %, T=0", "true reward, T=0", "true reward, T=0.8",
                     "paper's margin, accuracy, counts of 250, mean, T=0"), lines)


def table2_differences(summary):
    """IOPO online minus every other row of Table 2."""
    ours, lines = summary["rows"]["IOPO online"], []
    for label in TABLE2[:-1]:
        row = summary["rows"][label]
        margin = ("-", "-") if label == "SFT" else (difference(ours["margin"], row["margin"]),
                                                    difference(ours["accuracy"], row["accuracy"], 3))
        lines.append((label, *margin, counts(summary, f"IOPO online against {label}, greedy", ":")[1],
                      difference(ours["reward_greedy"], row["reward_greedy"]),
                      difference(ours["reward"], row["reward"])))
    return markdown(("IOPO online minus", "margin vs SFT", "accuracy", "wins minus loses, %, T=0", "true reward, T=0",
                     "true reward, T=0.8"), lines)


def table_ablation(summary):
    """One factor at a time from IOPO."""
    default, lines = summary["rows"]["IOPO"], []
    for label in ("IOPO", *ALSO_COMPARED, *ABLATION):
        row = summary["rows"][label]
        compared = ("", "the default") if label == "IOPO" else (difference(row["reward"], default["reward"]),
                                                                what_happened(row, default))
        lines.append((f"`{label}`" if label in ABLATION else label, chosen_for(summary, label), str(len(row["reward"])),
                      f"{mean(row['margin']):.2f} ({mean(row['spread']):.2f})", plus_minus(row["accuracy"], 3),
                      plus_minus(row["reward"]), *compared))
    return markdown(("reading", "lr x steps", "seeds", "margin vs SFT (spread)", "accuracy", "true reward, T=0.8",
                     "minus the default's", "what happened"), lines)


def table_rounds(summary):
    """Length, the biased judge's score and the true reward, round by round; round 0 is where the run starts."""
    lines, curves = [], summary["curves"]
    for name, words, digits in (("tokens", "tokens an answer", 1), ("judge", "judge", 2), ("reward", "true reward", 2)):
        for label in ROUNDS:
            before = [seed[-1] for seed in curves[VARIANTS[label].start][name]]
            rounds = [before, *zip(*curves[label][name])]
            control = [seed[-1] for seed in curves[ROUNDS[-1]][name]]
            last = difference(rounds[-1], control) if label != ROUNDS[-1] else ""
            lines.append((words, label, *(plus_minus(seeds, digits) for seeds in rounds), last))
    return markdown(("", "row", *(f"round {number}" for number in range(len(lines[0]) - 3)),
                     f"last round minus that of {ROUNDS[-1]}"), lines)


def table_theorems(summary):
    """Q after each turn of the exact game: D_t is Q_mu's increment from turn t - 1 to turn t (Eq. 18)."""
    lines, sampled = [], summary["sampled_game"]
    trained = {player: {eq: np.mean([seed[player][eq] for seed in sampled], axis=0) for eq in ("eq6", "eq13")}
               for player in sampled[0]}
    for name, game in [*summary["exact_game"].items(), (f"trained models, `{SHORT_TURNS}`", trained)]:
        mu, nu, mu13 = game["protagonist"]["eq6"], game["adversary"]["eq6"], game["protagonist"]["eq13"]
        increments = np.diff(mu)
        near = 1 + next(turn for turn, q in enumerate(mu) if abs(q - mu[-1]) <= 0.01 * abs(mu[-1] - 0.5))
        lines.append((name, str(len(mu)), f"{mu[0]:.4f} {mu[1]:.4f} {mu[2]:.4f} ... {mu[-1]:.4f}",
                      f"{increments[1] / increments[0]:.2f}", f"{increments[-1]:.0e}", str(near),
                      f"{nu[0]:.4f} ... {nu[-1]:.4f}", f"{mu13[0]:.2f} ... {mu13[-1]:.2f}"))
    return markdown(("game", "turns", "Q_mu (Eq. 6), turns 1, 2, 3 ... last", "D_3 / D_2", "last D",
                     "turns until Q_mu - 1/2 is within 1% of the last", "Q_nu (Eq. 6)", "Q_mu (Eq. 13)"), lines)


def table_choices(summary):
    """What was tuned, on which share of the human's votes."""
    chosen = summary["tuning"]["chosen"]
    return markdown(("row", "lr", "steps", "preferred to SFT on validation prompts"),
                    [(label, f"{choice['lr']:g}", str(choice["steps"]), f"{choice['share']:.3f}")
                     for label, choice in chosen.items()])


def markdown(header, lines):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


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
    return between.join(plus_minus(seeds, 0) for seeds in shares.values()), difference(shares["win"], shares["lose"], 0)


def what_happened(row, default):
    """One sentence; the default's lists may go on with more seeds."""
    def higher(name):
        return sum(ours > theirs for ours, theirs in zip(row[name], default[name]))
    return (f"Reward higher on {higher('reward')} of {len(row['reward'])} seeds, accuracy on {higher('accuracy')}; "
            f"margins spread {mean(row['spread']) / mean(default['spread'][:len(row['spread'])]):.1f} times as wide.")


def plus_minus(values, digits=2):
    """Mean and half of the 95% interval over seeds (Student's t)."""
    return f"{np.mean(values):.{digits}f}" + (f" ± {half_interval(values):.{digits}f}" if len(values) > 1 else "")


def difference(ours, theirs, digits=2):
    """Mean of the differences seed by seed with its 95% interval, and p of the paired t-test (two-sided)."""
    differences = [a - b for a, b in zip(ours, theirs)]
    shown = ("+" if np.mean(differences) >= 0 else "") + plus_minus(differences, digits)
    if len(differences) == 1:
        return shown
    p = t_test(differences)
    return f"{shown}, p {f'= {p:.3f}' if p >= 0.001 else '< 0.001'}"


def half_interval(values):
    """Half the width of the 95% interval of a mean: t * standard error, the t whose two-sided p is 0.05."""
    angles, beyond = student(len(values) - 1)
    t = math.sqrt(len(values) - 1) * math.tan(np.interp(-0.05, -beyond, angles))
    return t * np.std(values, ddof=1) / math.sqrt(len(values))


def t_test(values):
    """Two-sided p of Student's test that the mean is 0."""
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    angles, beyond = student(len(values) - 1)
    return float(np.interp(math.atan2(abs(np.mean(values)), error * math.sqrt(len(values) - 1)), angles, beyond))


def student(df):
    """(angles, two-sided p) of Student's t with df degrees of freedom at t = sqrt(df) * tan(angle); the density in the
    angle is proportional to cos^(df - 1)."""
    edges = np.linspace(0, np.pi / 2, 20001)
    area = np.concatenate([[0], np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (df - 1))])
    return edges, 1 - area / area[-1]


def draw(summary, folder):
    """The figures as PNG files in folder; returns their names."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(name, panels):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained")
        for axis, (across, up, lines) in zip(axes, panels):
            for label, x, y, *half in lines:
                [line] = axis.plot(x, y, label=label)
                if half:
                    axis.fill_between(x, y - half[0], y + half[0], color=line.get_color(), alpha=0.12, linewidth=0)
            axis.set(xlabel=across, ylabel=up)
            axis.legend(fontsize="x-small")
        figure.savefig(folder / name, dpi=100, metadata={"Software": None})
        pyplot.close(figure)
        return name

    def distributions(name):
        edges, rows = np.array(summary[name]["edges"]), summary[name]["rows"]
        middles, fine = (edges[1:] + edges[:-1]) / 2, np.linspace(edges[0], edges[-1], 600)

        def density(mean, std):
            return np.exp(-((fine - mean) / std) ** 2 / 2) / (std * math.sqrt(2 * math.pi))

        normal = [(label, fine, density(row["mean"], row["std"])) for label, row in rows.items()]
        across = "margin against SFT, held-out pairs"
        return save(f"{name}.png", [(across, "density of the normal fit", normal), (
            across, f"pairs of {EXAM_PAIRS}", [(label, middles, row["counts"]) for label, row in rows.items()])])

    def curves(name, labels, across, measured):
        def line(label, what):
            seeds = summary["curves"][label][what]
            half = [half_interval(values) for values in zip(*seeds)] if len(seeds) > 1 else 0
            return label, summary["curves"][label]["steps"], np.mean(seeds, axis=0), np.array(half)

        return save(name, [(across, up, [line(label, what) for label in labels]) for what, up in measured.items()])

    def values(name):
        def line(label, values):
            return label, range(1, 1 + len(values)), values

        exact = [line(label, game["protagonist"]["eq6"]) for label, game in summary["exact_game"].items()]
        sampled = [line(player, np.mean([seed[player]["eq6"] for seed in summary["sampled_game"]], axis=0))
                   for player in OTHER]
        return save(name, [("turn", "Q_mu by Eq. 6, exact game", exact),
                           ("turn", "Q by Eq. 6, trained models, held-out pairs", sampled)])

    held_out = {"margin": "margin against SFT, held-out pairs", "accuracy": "accuracy on held-out pairs"}
    answers = {"tokens": "tokens an answer", "judge": "biased judge", "reward": "true reward"}
    return [distributions("figure3"), distributions("figure4"),
            curves("figure5.png", FIGURE5, "protagonist's steps", held_out),
            curves("rounds.png", ROUNDS, f"steps, {STEPS_PER_TURN} a round", answers), values("values.png")]


# ----------------------------------------------------------------------------------------------------------
# The reproduction: the command

def reproduce(arguments):
    """The command of that name."""
    try:
        options = reproduce_arguments(arguments)
        seeds, ablation_seeds = (SEEDS[:1], SEEDS[:1]) if options.quick else (SEEDS, ABLATION_SEEDS)
        out = Path(options.out).as_posix()
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.jobs, spawn, start_worker) as pool:
            try:
                tuning = tune(out, pool, options.jobs) if options.tune else recorded_tuning()
                seen = run_rows(tuning["chosen"], seeds, ablation_seeds, out, pool, options.jobs)
            except BaseException:                                  # what is running now has nobody to tell
                for process in multiprocessing.active_children():
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise
        summary = rounded({"tuning": tuning, **summarize(seen, seeds)})
        report = "\n\n".join(f"{name}\n\n{table}" for name, table in tables(summary).items())
        print(f"\n{report}\n")
        folder = Path(out, "quick") if options.quick else Path(out)
        save_summary(summary, folder)
        (folder / "tables.md").write_text(report + "\n", encoding="utf-8")
        if options.record:
            save_summary(summary, RESULTS.parent)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on with the runs that are left")
    except concurrent.futures.BrokenExecutor:
        sys.exit("\na run was killed from outside, perhaps for memory (fewer --jobs?); the same command goes on")
    except (ValueError, OSError) as error:
        print(f"eval.py reproduce: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def recorded_tuning():
    """What tune found when it was recorded."""
    if not TUNING.is_file():
        raise ValueError(f"{TUNING}: no recorded choice of rates and steps; choose them by --tune")
    try:
        tuning = json.loads(TUNING.read_text())
        for choice in [tuning["chosen"][label] for label in tuned_rows()]:
            if not (choice["lr"] in RATES and choice["steps"] in STEPS):
                raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{TUNING}: not what --tune --record writes; choose rates and steps again by --tune") from None
    return tuning


def save_summary(summary, folder):
    """results.json, tuning.json and, where matplotlib is installed, the figures."""
    folder.mkdir(exist_ok=True)
    figures = []
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures: they need matplotlib (pip install matplotlib)")
    else:
        figures = draw(summary, folder)
    digests = {name: digest(folder / name) for name in figures}
    replace_file(folder / "tuning.json", (json.dumps(summary["tuning"], indent=1) + "\n").encode())
    replace_file(folder / "results.json", (json.dumps({**summary, "figures": digests}) + "\n").encode())
    print(f"{folder}: results.json tuning.json {' '.join(figures)}")


def rounded(summary):
    """The same with six digits of every number, and lists for tuples: as it reads back from its file."""
    return json.loads(json.dumps(summary), parse_float=lambda number: float(f"{float(number):.6g}"))


def reproduce_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="eval.py reproduce", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""Carry out every row of the paper's two tables, the ablation and the theorems on the safe world.

Tables use seeds {SEEDS}, the ablation {ABLATION_SEEDS}. Learning rates and steps are the recorded ones, chosen on
other seeds and prompts; --tune chooses them again first. A run that is done already is not done again, so a stopped
command goes on. Prints the tables, and writes them, their numbers and, with matplotlib, the figures to --out.""")
    parser.error = refuse
    parser.add_argument("--quick", action="store_true", help="one seed, so no intervals")
    parser.add_argument("--tune", action="store_true", help="choose learning rates and steps first")
    parser.add_argument("--record", action="store_true", help="write choices, results and figures to assets/ as well")
    parser.add_argument("--out", default="runs/reproduce", help="folder of the runs (default runs/reproduce)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (default: all cores)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {options.jobs}")
    if Path(options.out).exists() and not Path(options.out).is_dir():
        raise ValueError(f"--out {options.out} is a file, not a folder")
    if options.quick and options.record:
        raise ValueError("--record wants all seeds; leave out --quick")
    if options.record and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--record draws the figures: pip install matplotlib")
    return options


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["reproduce"]:
        return reproduce(arguments[1:])
    try:
        options = parse_arguments(arguments)
        runs = [Run.open(folder, options.sft) for folder in options.runs]
        if options.prompt is not None:
            return converse(runs, options)
        if options.answers is not None:
            return write_answers(runs, options)
        report = examine(runs, options) if options.scores is None else read_scores(options)
    except (ValueError, OSError) as error:                         # a sentence for the user; bugs raise other things
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if options.json:
        print(json.dumps(report, indent=2))
    elif options.scores is None:
        print_report(report)
    else:
        print_scores(report)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")              # a terminal may lack a character
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
