"""One run of the reproduction, from its beginning to what its models were seen to do; and many.

At LOOKS the protagonist answers held-out prompts, and is compared with the SFT model on held-out
pairs and in KL. All that it says is judged at once; what is kept are rewards and a few numbers.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from data import SafeWorld, encode_pairs, replace_file
from eval import EXAM_PAIRS, margins, pair_logps, shuffled_prompts
from iopo import iopo_gradient_weight
from model import Decoder, generate
from reproduction.rounds import NoPairs, rounds

LOOKS, EVERY = (10, 25, 50, 100, 150), 5    # the protagonist's steps; all are multiples of EVERY
SAMPLES = {"test": 16, "validation": 8}     # answers to each prompt
TEMPERATURE, COOLER = 0.8, (0.6, 0.4, 0.2)  # of answers; and of SFT's, the line to beat
NEW_TOKENS, AT_ONCE = 48, 160               # an answer's tokens, answers in a batch
PAIRS = 200                                 # training pairs whose ratio and weight are looked at
LEVELS = [level / 10 for level in range(11)]         # quantiles of log r


@dataclass(frozen=True)
class Run:
    """A run: its folder, its options of train.py, and the SFT model that it is measured against
    (none where it is SFT itself). Where there are `rounds`, the options are those of each, and of
    the pairs that it samples it keeps the share `keep`."""
    folder: str
    options: dict
    sft: str = ""
    rounds: int = 0
    keep: float = 1.0

    @property
    def config(self):
        """Its whole train.Config."""
        return train.make_config({**self.options, "out": self.folder, "device": "cpu",
                                  "save_every": 0, "look_every": EVERY})

    @property
    def model(self):
        """Where the protagonist will be."""
        last = f"round-{self.rounds}" if self.rounds else ""
        return Path(self.folder, last, "protagonist")

    @property
    def seconds(self):
        """What it takes, roughly, in one process of one thread."""
        config = self.config
        steps = (self.rounds or config.n_iter) * (config.n_mu + config.n_nu)
        looks = sum(step <= (self.rounds or config.n_iter) * config.n_mu for step in LOOKS)
        return (3 + 0.05 * config.sft_steps + 0.09 * steps + 12 * self.rounds
                + 2.5 * (looks if self.sft else 1 + len(COOLER)))


# ---- To carry out a run, once --------------------------------------------------------------------

def identity(run):
    """All that a result follows from: the run with all its options, the weights it starts from and
    is measured against, and the code."""
    config, here = vars(run.config), Path(__file__).parent
    files = [here.with_name(f"{room}.py") for room in ("iopo", "model", "data", "train", "eval")]
    files += [here / "runs.py", *[here / "rounds.py"] * bool(run.rounds)]
    files += [Path(folder, "model.safetensors") for folder in (config["model"], run.sft) if folder]
    return {"run": dataclasses.asdict(run), "config": config, "files": list(map(digest, files))}


def digest(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def carry_out(run):
    """Train one run from its beginning and keep what its models did. One that diverges ends there
    and keeps what was seen before."""
    folder, config = Path(run.folder), run.config
    if folder.exists() and any(folder.iterdir()) and not (folder / "log.txt").is_file():
        raise ValueError(f"{folder} is no run of the reproduction and would be overwritten; take "
                         "another --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = {"identity": identity(run), "model": None, "failure": None}
    look = watch(run, result)
    with (open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        try:
            if run.rounds:
                rounds(config, run.rounds, run.keep, look)
            else:
                job = train.prepare(config)
                train.train(job, look)
            result["model"] = digest(run.model / "model.safetensors")
        except (NoPairs, FloatingPointError) as error:
            result["failure"] = str(error)
    for checkpoint in folder.rglob("checkpoint"):                      # nobody resumes it
        shutil.rmtree(checkpoint)
    text = json.dumps(result)
    replace_file(folder / "result.json", text.encode())
    return json.loads(text)                                            # as it reads back


def finished(run):
    """What carry_out saw, if this very run was carried out before and its model is there still,
    else None."""
    try:
        result = json.loads(Path(run.folder, "result.json").read_text())
        whole = result["failure"] or result["model"] == digest(run.model / "model.safetensors")
        return result if whole and result["identity"] == identity(run) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def carry_out_all(runs, pool, bar):
    """The results of runs, in their order; those finished before are read back. Runs may diverge,
    but SFT must not, since all others start there."""
    results = [finished(run) for run in runs]
    order = sorted(range(len(runs)), key=lambda number: -runs[number].seconds)     # no long tail
    waiting = {pool.submit(carry_out, runs[number]): number
               for number in order if results[number] is None}
    bar.total -= sum(run.seconds for run, result in zip(runs, results) if result is not None)
    for future in concurrent.futures.as_completed(waiting):
        number = waiting[future]
        results[number] = future.result()
        bar.update(runs[number].seconds)
        if not runs[number].sft and results[number]["failure"]:
            raise ValueError(f"{runs[number].folder} came to nothing: "
                             f"{results[number]['failure']}")
    return results


def start_worker():
    """One thread, so that runs go side by side and their results do not depend on how many do; and
    a lock for tqdm that dies with the process."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())


# ---- What is looked at ---------------------------------------------------------------------------

def watch(run, result):
    """What train calls every few steps. What it sees of the protagonist goes into result["looks"],
    at LOOKS and at the end of SFT; what it sees of an adversary into result["adversary"]."""
    config, tokenizer = run.config, SafeWorld.tokenizer()
    start = Decoder.from_pretrained(run.sft) if run.sft else None
    pairs = SafeWorld().exam_pairs("test", EXAM_PAIRS)
    rows, _, _ = encode_pairs(pairs, tokenizer, config.max_length)
    before = logps_of(start, rows) if start else None
    result |= {"looks": [], "adversary": []}

    def look(job, step, iteration, name):
        steps = job.players[name].steps + (iteration - 1) * config.n_mu * bool(run.rounds)
        if name == "adversary" and steps in LOOKS:
            result["adversary"].append({"steps": steps, **pull(job, name)})
        if name == "protagonist" and steps in LOOKS or name == "sft" and steps == config.sft_steps:
            model, steps = job.players[name].model, steps if start else 0
            now = logps_of(model, rows)
            margin, spread, accuracy = margins({"logps": now}, {"logps": before if start else now})
            result["looks"].append({
                "steps": steps, **see(model, start, tokenizer, config.seed, steps),
                "margin": margin, "spread": spread, "accuracy": accuracy,
                **(pull(job, name) if start else {})})
        return {}
    return look


def logps_of(model, rows):
    """(2, n): log-probabilities of chosen and rejected answers."""
    with tqdm(disable=True) as bar:
        return pair_logps(model, rows, bar)


def pull(job, name):
    """Of AGENT's first training pairs: quantiles of log r = log pi_AGENT - log pi_ENV of y_l, in
    nats, and (DPO, IOPO) the share whose gradient's weight is below a twentieth of its start, which
    is beta / 2 for every pair."""
    other = {"protagonist": "adversary", "adversary": "protagonist"}[name]
    agent, env, config = job.players[name], job.players[other], job.config
    ours, theirs = (logps_of(player.model, agent.rows[:PAIRS]) for player in (agent, env))
    found = {"log_ratio": np.quantile(ours[1] - theirs[1], LEVELS).tolist()}
    ratio = {"dpo": "one", "iopo": config.ratio}.get(config.method)
    if ratio in ("one", "sequence"):
        weights = iopo_gradient_weight(*ours, *theirs, beta=config.beta, eps=config.eps,
                                       clip=config.clip, ratio=ratio)
        found["idle"] = (weights.abs() < config.beta / 2 / 20).float().mean().item()
    return found


def see(model, start, tokenizer, seed, steps):
    """What a model answers to held-out prompts. `start` is the SFT model, None where it is looked
    at itself, then also at lower temperatures."""
    draws, seen = itertools.count(10_000 * seed + 10 * steps), {}      # rows and rates share them
    for split, samples in SAMPLES.items():
        seen[split] = answer(model, start or model, tokenizer, shuffled_prompts(split) * samples,
                             TEMPERATURE, next(draws))
    test = shuffled_prompts("test")
    seen["greedy"] = answer(model, None, tokenizer, test, 0, 0)
    for temperature in () if start else COOLER:
        seen[f"{temperature:g}"] = answer(model, model, tokenizer, test * SAMPLES["test"],
                                          temperature, next(draws))
    return seen


def answer(model, start, tokenizer, prompts, temperature, seed):
    """{rewards, mean tokens, mean KL to `start`} of an answer to every prompt. Rewards are in
    quarters, as they come: whole numbers, small files."""
    ids, answers, world = list(map(tokenizer.encode_prompt, prompts)), [], SafeWorld()
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(ids), AT_ONCE):
        answers += generate(model, ids[first:first + AT_ONCE], NEW_TOKENS, temperature,
                            tokenizer.eos_ids, generator)
    rewards = [world.true_reward(prompt, tokenizer.decode(some).strip())
               for prompt, some in zip(prompts, answers)]
    kl = None if start is None else answers_kl(model, start, ids, answers, temperature)
    return {"quarters": [round(4 * reward) for reward in rewards],
            "tokens": float(np.mean(list(map(len, answers)))), "kl": kl}


@torch.no_grad()
def answers_kl(model, start, prompts, answers, temperature):
    """KL(pi || pi_start) of answers, nats, mean over answers that were sampled from pi, which is
    `model` at this temperature; pi_start is at temperature 1. Exact over the vocabulary at every
    token of an answer, summed over these (its EOS included, where it ended)."""
    total = 0.0
    rows = sorted(zip(prompts, answers), key=lambda row: len(row[0]) + len(row[1]))
    for first in range(0, len(rows), AT_ONCE):
        some = rows[first:first + AT_ONCE]
        longest = max(len(prompt) + len(answer) for prompt, answer in some)
        ids = torch.tensor([(prompt + answer + [0] * longest)[:longest] for prompt, answer in some])
        begins = torch.tensor([[len(prompt) - 1] for prompt, _ in some])
        ends = torch.tensor([[len(prompt) + min(len(answer), NEW_TOKENS - 1)]
                             for prompt, answer in some])
        place = torch.arange(longest)
        wanted = (place >= begins) & (place < ends)                                 # (B, T)
        p = torch.log_softmax(model(ids)[wanted] / temperature, dim=-1)             # (N, V)
        q = torch.log_softmax(start(ids)[wanted], dim=-1)
        total += (p.exp() * (p - q)).sum().item()
    return total / len(rows)
