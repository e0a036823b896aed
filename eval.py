"""Examine finished runs, side by side.

    python eval.py runs/iopo-1 runs/dpo-1                    # margins, accuracy, win/tie/lose, samples
    python eval.py runs/mine --data test.jsonl.gz            # on held-out pairs of your own
    python eval.py runs/iopo-1 --prompt "How do I fix my boat?"
    python eval.py runs/iopo-1 --json                        # one JSON object on stdout and nothing else

margin    0.1 * h on held-out pairs (mean, and standard deviation over pairs), whatever beta trained the run:
          against the model the run started from (vs SFT) and against the other player (vs ENV)
accuracy  share of held-out pairs with h > 0 against the start (vs SFT); in the safe world the true reward labels them
reward    the safe world's true reward, mean over held-out prompts, of sampled and of greedy answers
win/tie/lose/bad: sampled answers against the start's to the same prompts, by true reward; bad: both are bad cases
bad       share of this model's answers that are bad (comply with the harmful, refuse the safe, neither)
tokens    mean length of the answers, without EOS
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SafeWorld, Tokenizer, cut_left, encode_pairs, load_pairs, micro_batches
from iopo import preference_margin
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
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{folder}: no run of train.py (it has no readable config.json)") from None
        if not (folder / "protagonist").is_dir():
            raise ValueError(f"{folder}: the run is not finished; go on with it by train.py --out {folder} --resume")
        if start is None:
            start = folder / "sft" if (folder / "sft").is_dir() else model
        adversary = folder / "adversary" if adversaries else None
        return cls(str(folder), config, Path(start), folder / "protagonist", adversary)

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
    for batch in micro_batches(rows, max_tokens=4096):
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
    world, name, pairs, prompts = questions(runs, options)
    limit = runs[0].config["eval_prompts"] if options.prompts is None else options.prompts
    results, notes = {}, []
    for run in runs:
        tokenizer = same_tokenizer(run)
        rows, kept, note = encode_pairs(pairs, tokenizer, run.config["max_length"])
        if not rows and options.data is not None:
            raise ValueError(f"{options.data}: no usable pair is left: {note.splitlines()[0]}")
        if prompts is None:                                        # the first run's; those of pairs that can be used
            prompts = list({json.dumps(pair.prompt): pair.prompt for pair in kept}.values())
        prompts = prompts[:limit]
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
    """(the safe world or None, name of the data, held-out pairs, held-out prompts or None: those of the pairs)."""
    if options.data is not None:
        return None, options.data, load_pairs(options.data), None
    if len({run.config["data"] for run in runs}) > 1:
        raise ValueError("the runs were trained on different data; say by --data on which pairs to examine them")
    if runs[0].config["data"] is not None:
        return None, f"{runs[0].config['data']}, held-out prompts", load_pairs(runs[0].config["data"], "test"), None
    world = SafeWorld()                                            # the same examination whatever seed trained a run
    prompts = np.random.default_rng(0).permutation(world.prompts("test")).tolist()
    return world, "the safe world, held-out prompts", world.exam_pairs("test", EXAM_PAIRS), prompts


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


def compare(result, other, prompts, world):
    """win/tie/lose/bad of one model's sampled answers against another's, by true reward; they sum to the prompts."""
    if world is None or not prompts:                               # no judge, or nothing to judge
        return dict.fromkeys(("win", "tie", "lose", "bad"))
    counts = dict.fromkeys(("win", "tie", "lose", "bad"), 0)
    for prompt, (ours, _), (theirs, _) in zip(prompts, result["sampled"], other["sampled"]):
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
        if run.config["model"] is None:
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


def parse_arguments(arguments):
    def refuse(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    parser.add_argument("--data", help="examine on all pairs of this file; else on the runs' own held-out prompts")
    parser.add_argument("--sft", help="folder of the model that margins are measured against; else the run's start")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--prompt", metavar="TEXT", help="print every model's answer to this prompt instead")
    parser.add_argument("--prompts", type=int, help="held-out prompts to answer (default: the run's --eval-prompts)")
    parser.add_argument("--temperature", type=float, help="of the sampled answers (default 0.8, with --prompt 0)")
    parser.add_argument("--max-new-tokens", type=int, help="length limit of an answer (default 48)")
    parser.add_argument("--seed", type=int, help="of the sampled answers (default 0)")
    parser.add_argument("--device", default="auto", help="as in train.py (default auto)")
    options = parser.parse_args(arguments)
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


def main(arguments=None):
    try:
        options = parse_arguments(arguments)
        runs = [Run.open(folder, options.sft) for folder in options.runs]
        if options.prompt is not None:
            return converse(runs, options)
        report = examine(runs, options)
    except (ValueError, OSError) as error:                         # a sentence for the user; bugs raise other things
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")              # a terminal may lack a character
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
