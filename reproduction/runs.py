"""One run of the reproduction, from its beginning to what its models were seen to do; and many."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import train
from data import SafeWorld, encode_pairs, replace_file
from eval import EXAM_PAIRS, answer, pair_logps, shuffled_prompts
from reproduction.rounds import NoPairs, rounds

STEPS = (50, 100, 150)                      # the protagonist's, that can be chosen
TEST_SAMPLES, VALIDATION_SAMPLES = 4, 8     # answers sampled to each prompt


@dataclass(frozen=True)
class Task:
    """One run: its folder, options of train.py, the split whose prompts its models answer, and the
    protagonist's steps after which it is examined. Where there are `rounds`, the options are those
    of each, and of the pairs that it samples it keeps the share `keep`."""
    folder: str
    options: dict
    split: str
    steps: int
    rounds: int = 0
    keep: float = 1.0

    @property
    def config(self):
        """Its whole train.Config, which looks at the models wherever a player's turn may end."""
        config = train.make_config({**self.options, "out": self.folder, "device": "cpu",
                                    "save_every": 0})
        config.look_every = config.sft_steps or math.gcd(config.n_mu, config.n_nu)
        return config

    @property
    def seconds(self):
        """What it takes, roughly, in one process of one thread."""
        config = self.config
        return (10 + 0.1 * config.sft_steps + 17 * self.rounds
                + 0.25 * (self.rounds or config.n_iter) * (config.n_mu + config.n_nu))

    @property
    def model(self):
        """Where the protagonist will be."""
        last = f"round-{self.rounds}" if self.rounds else ""
        return Path(self.folder, last, "protagonist")

    @property
    def must_end(self):
        """Is it an error where it comes to nothing? Of the tuning's candidates some do."""
        return self.split == "test"

    @property
    def files(self):
        """The code that its result follows from."""
        here = Path(__file__).parent
        rooms = ("iopo", "model", "data", "train", "eval")
        return (*(here.with_name(f"{room}.py") for room in rooms), here / "runs.py",
                here / "rounds.py")

    def observe(self, result):
        """What train calls where it looks; it puts what it sees into the result."""
        return answers_look(self, result)


def identity(task):
    """All that a result follows from: the Task with all its options, the weights it starts from,
    the code, and what it is looked at with."""
    config, files = vars(task.config), [*task.files]
    files += [Path(config["model"], "model.safetensors")] if config["model"] else []
    return {"task": dataclasses.asdict(task), "config": config,
            "files": [digest(file) for file in files],
            "looks": [EXAM_PAIRS, TEST_SAMPLES, VALIDATION_SAMPLES, *STEPS]}


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def carry_out(task):
    """Train one run from its beginning and keep what its models did."""
    folder, config = Path(task.folder), task.config
    if folder.exists() and any(folder.iterdir()) and not (folder / "log.txt").is_file():
        raise ValueError(f"{folder} is no run of the reproduction and would be overwritten; take "
                         "another --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = {"identity": identity(task), "model": None, "failure": None}
    look = task.observe(result)
    with (open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        try:
            if task.rounds:
                rounds(config, task.rounds, task.keep, look)
            else:
                job = train.prepare(config)
                train.save_config(config)
                train.train(job, look)
            result["model"] = digest(task.model / "model.safetensors")
        except (NoPairs, FloatingPointError) as error:    # of what was tried some is beyond saving
            result["failure"] = str(error)
    for checkpoint in folder.rglob("checkpoint"):                      # nobody resumes it
        shutil.rmtree(checkpoint)
    text = json.dumps(result)
    replace_file(folder / "result.json", text.encode())
    return json.loads(text)                                            # as it reads back


def answers_look(task, result):
    """After every turn and (test) at the end: answers alone on the validation split, for the human
    to choose by; on the test split log-probabilities as well."""
    config, test, tokenizer = task.config, task.split == "test", SafeWorld.tokenizer()
    pairs = SafeWorld().exam_pairs("test", EXAM_PAIRS) if test else []
    rows = encode_pairs(pairs, tokenizer, config.max_length)[0]
    ids = [tokenizer.encode_prompt(prompt) for prompt in shuffled_prompts(task.split)]
    result |= {"turns": [], "final": None}

    def see(model, samples, greedy=False):
        with tqdm(disable=True) as bar:
            return {"logps": pair_logps(model, rows, bar).tolist() if rows else None,
                    "sampled": answer(model, tokenizer, ids * samples, 48, 0.8, 0, bar),
                    "greedy": answer(model, tokenizer, ids, 48, 0, 0, bar) if greedy else []}

    def look(job, step, iteration, player):
        """As train looks; what it sees goes into the result, none of it into the metrics."""
        turn = {"sft": config.sft_steps, "protagonist": config.n_mu, "adversary": config.n_nu}
        if job.players[player].steps % turn[player] == 0:              # the turn ends here
            model, steps, samples = job.players[player].model, iteration * config.n_mu, 0
            if player != "adversary":
                samples = 1 if test else VALIDATION_SAMPLES * (steps in (0, *STEPS))
            result["turns"].append({"player": player, "steps": steps, **see(model, samples)})
            if test and player != "adversary" and steps == task.steps:
                result["final"] = see(model, TEST_SAMPLES, greedy=True)
        return {}
    return look


def finished(task):
    """What carry_out saw, if this very run was carried out before and its model is there still,
    else None."""
    try:
        result = json.loads(Path(task.folder, "result.json").read_text())
        whole = result["failure"] or result["model"] == digest(task.model / "model.safetensors")
        return result if whole and result["identity"] == identity(task) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def carry_out_all(tasks, pool, bar):
    """The results of tasks, in their order; those finished before are read back."""
    results = [finished(task) for task in tasks]
    waiting = {pool.submit(carry_out, task): number
               for number, task in enumerate(tasks) if results[number] is None}
    bar.total -= sum(task.seconds for task, result in zip(tasks, results) if result is not None)
    for future in concurrent.futures.as_completed(waiting):
        number = waiting[future]
        results[number] = future.result()
        bar.update(tasks[number].seconds)
        if tasks[number].must_end and results[number]["failure"]:
            raise ValueError(f"{tasks[number].folder} came to nothing: "
                             f"{results[number]['failure']}")
    return results


def start_worker():
    """One thread, so that runs go side by side and their results do not depend on how many do; and
    a lock for tqdm that dies with the process."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
