"""Examine finished runs, side by side.

    python eval.py runs/iopo-1 runs/dpo-1                    # margins, accuracy, win/tie/lose, samples
    python eval.py runs/mine --data test.jsonl.gz            # on held-out pairs of your own
    python eval.py runs/iopo-1 --prompt "How do I fix my piano?"
    python eval.py runs/iopo-1 --json                        # one JSON object on stdout and nothing else

margin    0.1 * h on held-out pairs (mean, and standard deviation over pairs), whatever beta trained the run:
          against the model the run started from (vs SFT) and against the other player (vs ENV)
accuracy  share of held-out pairs with h > 0 against the start; in the safe world the true reward labels them
reward    the safe world's true reward of the answers to held-out prompts, mean
w/t/l/bad answers against the start's to the same prompts, by true reward; bad: both answers are bad cases
bad       share of this model's answers that are bad (comply with the harmful, refuse the safe, neither)
tokens    mean length of the answers, without EOS
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SafeWorld, Tokenizer, encode_pairs, load_pairs, micro_batches
from iopo import preference_margin
from model import Decoder, generate, response_logps

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
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{folder}: no run of train.py (it has no readable config.json)") from None
        if not (folder / "protagonist").is_dir():
            raise ValueError(f"{folder}: the run is not finished; go on with it by train.py --out {folder} --resume")
        if start is None:
            start = folder / "sft" if (folder / "sft").is_dir() else model
        return cls(str(folder), config, Path(start), folder / "protagonist", folder / "adversary" if adversaries else None)

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
    device = next(model.parameters()).device
    columns = []
    for batch in micro_batches(rows, max_tokens=8192):
        columns.append(torch.stack(response_logps(model, batch.to(device))).cpu())
        bar.update(len(batch))
    return torch.cat(columns, dim=1)


def answer(model, tokenizer, prompts, temperature, max_new_tokens, max_length, seed, bar):
    """Answers (text, tokens) to prompts; prompts that leave no room lose their left side, which is said."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    room = max_length - max_new_tokens
    if room < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in {max_length} tokens")
    if long := sum(len(prompt) > room for prompt in ids):
        tqdm.write(f"{long} of {len(ids)} prompts cut on the left to {room} tokens", file=sys.stderr)
    answers = []
    for first in range(0, len(ids), ROWS_AT_ONCE):
        rows = [prompt[-room:] for prompt in ids[first:first + ROWS_AT_ONCE]]
        answers += generate(model, rows, max_new_tokens, temperature, tokenizer.eos_ids, generator)
        bar.update(len(rows))
    return [(tokenizer.decode(answer).strip(), len(answer)) for answer in answers]


def load(folder, device):
    return Decoder.from_pretrained(folder).to(device).eval(), Tokenizer.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------
# The examination

def examine(runs, options):
    """A JSON-able report on runs; see the top of the file for what the numbers mean."""
    on_world = options.data is None and all(run.config["model"] is None for run in runs)
    if not on_world and options.data is None and len({run.config["data"] for run in runs}) > 1:
        raise ValueError("the runs were trained on different data; say by --data on which pairs to examine them")
    world = SafeWorld()                                            # one examination, whatever seed trained the run
    if on_world:
        pairs = world.exam_pairs("test", EXAM_PAIRS)
        prompts = [str(prompt) for prompt in np.random.default_rng(0).permutation(world.prompts("test"))]
    else:
        pairs = load_pairs(options.data) if options.data else load_pairs(runs[0].config["data"], "test")
        prompts = list({json.dumps(pair.prompt): pair.prompt for pair in pairs if pair.prompt}.values())
    prompts = prompts[:runs[0].config["eval_prompts"] if options.prompts is None else options.prompts]

    work = [(run, label, folder) for run in runs for label, folder in run.models.items()]
    results, notes = {}, {}
    with tqdm(total=len(work) * (len(pairs) + 2 * len(prompts)), unit="text", desc="evaluation") as bar:
        for run, label, folder in work:
            model, tokenizer = load(folder, find_device(options.device))
            length = run.config["max_length"]
            rows, notes[run.name] = encode_pairs(pairs, tokenizer, length) if pairs else ([], "no held-out pairs")
            result = results[run.name, label] = {"logps": pair_logps(model, rows, bar) if rows else None}
            for name, temperature in (("sampled", options.temperature), ("greedy", 0)):
                result[name] = answer(model, tokenizer, prompts, temperature, options.max_new_tokens, length, options.seed, bar)
    reports = [report_run(run, {label: results[run.name, label] for label in run.models}, prompts, world if on_world else None)
               for run in runs]
    for run, report in zip(runs[1:], reports[1:]):
        report["first_run_against_this"] = compare(results[runs[0].name, "protagonist"]["sampled"],
                                                   results[run.name, "protagonist"]["sampled"], prompts,
                                                   world if on_world else None)
    samples = [{"prompt": prompt, "answers": {f"{run.name} {label}": results[run.name, label]["sampled"][number][0]
                                              for run, label, _ in work}}
               for number, prompt in enumerate(prompts[:SAMPLES_SHOWN])]
    return {"data": "safe world, test split" if on_world else options.data or f"{runs[0].config['data']}, held-out split",
            "pairs": {run.name: notes[run.name] for run in runs}, "prompts": len(prompts),
            "temperature": options.temperature, "runs": reports, "samples": samples}


def report_run(run, results, prompts, world):
    """The numbers of a run's protagonist, with those of its other models beside them under "models"."""
    models = {}
    for label, result in results.items():
        other = {"SFT": "SFT", "protagonist": "adversary" if run.adversary else "SFT", "adversary": "protagonist"}[label]
        models[label] = {**margins("sft", result["logps"], results["SFT"]["logps"]),
                         **margins("env", result["logps"], results[other]["logps"]),
                         **quality(result, prompts, world),
                         **compare(result["sampled"], results["SFT"]["sampled"], prompts, world)}
    return {"name": run.name, "method": run.config["method"], "seed": run.config["seed"], **models["protagonist"],
            "models": models}


def margins(name, logps, ref_logps):
    """Mean and standard deviation of 0.1 * h against a reference, and the share of h > 0."""
    if logps is None or torch.equal(logps, ref_logps) and name == "sft":
        zero = None if logps is None else 0.0
        margin = torch.zeros(0)
        return {f"margin_vs_{name}": zero, f"margin_vs_{name}_std": zero, "accuracy": None}
    margin = preference_margin(*logps, *ref_logps, beta=EXAM_BETA)
    report = {f"margin_vs_{name}": margin.mean().item(), f"margin_vs_{name}_std": margin.std(correction=0).item()}
    return report | ({"accuracy": (margin > 0).float().mean().item()} if name == "sft" else {})


def quality(result, prompts, world):
    """Length, and in the safe world true reward and bad cases, of one model's answers."""
    report = {"tokens": mean(tokens for _, tokens in result["sampled"]), "reward": None, "reward_greedy": None, "bad_rate": None}
    if world is not None and prompts:
        for name, answers in (("reward", result["sampled"]), ("reward_greedy", result["greedy"])):
            report[name] = mean(world.true_reward(prompt, text) for prompt, (text, _) in zip(prompts, answers))
        report["bad_rate"] = mean(world.is_bad(prompt, text) for prompt, (text, _) in zip(prompts, result["sampled"]))
    return report


def compare(answers, others, prompts, world):
    """win/tie/lose/bad of answers against others to the same prompts, by true reward; they sum to the prompts."""
    if world is None:                                              # no judge
        return {"win": None, "tie": None, "lose": None, "bad": None}
    counts = {"win": 0, "tie": 0, "lose": 0, "bad": 0}
    for prompt, (ours, _), (theirs, _) in zip(prompts, answers, others):
        advantage = world.true_reward(prompt, ours) - world.true_reward(prompt, theirs)
        if world.is_bad(prompt, ours) and world.is_bad(prompt, theirs):
            counts["bad"] += 1
        else:
            counts["win" if advantage > 0 else "lose" if advantage < 0 else "tie"] += 1
    return counts


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers) if numbers else None


def find_device(name):
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


# ----------------------------------------------------------------------------------------------------------
# On the screen

def print_report(report):
    print(f"\n{report['data']}; {report['prompts']} prompts answered at temperature {report['temperature']} and greedily")
    for note in dict.fromkeys(report["pairs"].values()):
        print(f"examined: {note}")
    table = [("model", "margin vs SFT", "margin vs ENV", "accuracy", "reward", "greedy", "w/t/l/bad vs SFT", "bad", "tokens")]
    for run in report["runs"]:
        for label, m in run["models"].items():
            table.append((f"{run['name']} {label}" if len(report["runs"]) > 1 else label,
                          with_spread(m, "margin_vs_sft"), with_spread(m, "margin_vs_env"), number(m["accuracy"], 3),
                          number(m["reward"], 2), number(m["reward_greedy"], 2), win_tie_lose(m), number(m["bad_rate"], 2),
                          number(m["tokens"], 1)))
    print()
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for run in report["runs"][1:]:
        against = run["first_run_against_this"]
        print(f"\n{report['runs'][0]['name']} against {run['name']} (win/tie/lose/bad): {win_tie_lose(against)}", end="")
    print()
    for sample in report["samples"]:
        print(f"\n{sample['prompt'] if isinstance(sample['prompt'], str) else sample['prompt'][-1]['content']}".rstrip())
        for label, text in sample["answers"].items():
            print(f"  {label}: {text}")


def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def with_spread(model, name):
    return "-" if model[name] is None else f"{model[name]:.3f} ({model[name + '_std']:.3f})"


def win_tie_lose(counts):
    return "-" if counts["win"] is None else "/".join(str(counts[name]) for name in ("win", "tie", "lose", "bad"))


def converse(runs, options):
    """Every model's answer to one prompt."""
    for run in runs:
        for label, folder in run.models.items():
            model, tokenizer = load(folder, find_device(options.device))
            prompt = options.prompt
            if run.config["model"] is None:
                prompt = prompt.rstrip("\n") + "\n"                # how the safe world's prompts end
            elif tokenizer.chat_template is not None:
                prompt = [{"role": "user", "content": prompt}]
            with tqdm(disable=True) as bar:
                (text, _), = answer(model, tokenizer, [prompt], options.temperature, options.max_new_tokens,
                                    run.config["max_length"], options.seed, bar)
            print(f"{run.name} {label}: {text}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    parser.add_argument("--data", help="examine on all pairs of this file; else on the runs' own held-out pairs")
    parser.add_argument("--sft", help="folder of the model that margins are measured against; else the run's start")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--prompt", metavar="TEXT", help="print every model's answer to this prompt instead")
    parser.add_argument("--prompts", type=int, help="held-out prompts to answer (default: the run's --eval-prompts)")
    parser.add_argument("--temperature", type=float, help="of the answers (default 0.8, and 0 with --prompt)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length limit of an answer (default 48)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled answers (default 0)")
    parser.add_argument("--device", default="auto", help="as in train.py (default auto)")
    options = parser.parse_args(arguments)
    if options.temperature is None:
        options.temperature = 0.0 if options.prompt is not None else 0.8
    try:
        runs = [Run.open(folder, options.sft) for folder in options.runs]
        if options.prompt is not None:
            converse(runs, options)
            return
        report = examine(runs, options)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)


if __name__ == "__main__":
    main()
