"""Seconds and memory of one optimiser step, here and in TRL's DPOTrainer, and what the seconds grow with.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/speed.py --data Anthropic/hh-rlhf          # or any file that train.py reads (Linux, 45 minutes)

Against TRL. All sides train the same random Llama with a reference of its own, on the same tokens in the same order, with the
same optimiser, in processes that take turns, in a new order in every round. A turn is a step that does not count and one that
does: the first after a pause tends to be slower, and a training run has no pauses. TRL plain takes all pairs of a step in one
forward pass; TRL best one pair at a time, with accumulated gradients, and the sides compared with it keep freed memory as it
does (TUNED_MALLOC) instead of giving it back to the system and asking for it again. TRL asks its reference in every step, as
an epoch's first pass must; on a CPU its head computes every position, also the prompt's and the padding's (on a GPU with
Triton only the answers'), and it computes more metrics. Its collation is not in its time, ours is. An IOPO run takes as many
steps of the adversary on top. Ratios are medians over the steps, with the smallest and the largest.
The floor is the arithmetic of all linear layers with every distinct token once and of the vocabulary with the tokens that
predict an answer's, forward and backward for AGENT, forward for ENV, at the best matrix rate seen in the run. Attention is not
in it; what this project leaves out of the last layer, one part in twenty of the whole, is.

Growth. 16 made-up pairs, a prompt of 100 tokens, answers of 50, the model of 8.6M; one thing changes at a time. Two plain
rows: [prompt | chosen] and [prompt | rejected] on their own.
"""

import argparse
import copy
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
import torch

from load import peak                                                        # beside this file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Tokenizer, encode_pairs, load_pairs, micro_batches          # noqa: E402
from model import Decoder, DecoderConfig, response_logps                     # noqa: E402
from train import Config, adamw, optimizer_step                              # noqa: E402

VOCABULARY, LONGEST, LR = 8192, 512, 1e-5
SHAPES = {"8.6M": dict(hidden_size=256, intermediate_size=720, num_attention_heads=4, num_key_value_heads=4),
          "31.6M": dict(hidden_size=512, intermediate_size=1544, num_attention_heads=8, num_key_value_heads=8)}
TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36)}      # glibc's
# name: (the worker's arguments, its environment, the side it is compared with)
SIDES = {"TRL plain": ("trl 16", {}, "TRL plain"),
         "DPO here": ("here dpo", {}, "TRL plain"),
         "IOPO here": ("here iopo", {}, "TRL plain"),
         "TRL best": ("trl 1", TUNED_MALLOC, "TRL best"),
         "DPO here, tuned": ("here dpo", TUNED_MALLOC, "TRL best"),
         "IOPO here, tuned": ("here iopo", TUNED_MALLOC, "TRL best")}
BATCH_SIZE, TURN = 16, 2                    # pairs of a step, steps of a turn


def decoder(size="8.6M", vocab_size=VOCABULARY):
    torch.manual_seed(0)
    return Decoder(DecoderConfig(vocab_size=vocab_size, num_hidden_layers=8, head_dim=64, tie_word_embeddings=True,
                                 **SHAPES[size]))


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# ----------------------------------------------------------------------------------------------------------
# Against TRL

def tokenizer_for(pairs):
    """A byte-level BPE of these texts; the model is random, so any of the right size will do."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator((pair.prompt + pair.chosen + pair.rejected for pair in pairs), trainer)
    return Tokenizer({"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "<eos>"}'})


def report(seconds, loss):
    """A worker's line: the peak is that of the process, libraries and all."""
    print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak()}), flush=True)


def turns():
    """The numbers of the steps, a turn's for every line of standard input, once the worker is ready for it."""
    print("ready", flush=True)
    for turn, _ in enumerate(sys.stdin):
        yield from range(turn * TURN, (turn + 1) * TURN)
        print("ready", flush=True)


def work_here(folder, loss):
    agent, env = (Decoder.from_pretrained(folder) for _ in range(2))
    optimizer, rows = adamw(agent, LR), json.loads((folder / "rows.json").read_text())
    for step in turns():
        begin = time.perf_counter()
        metrics = optimizer_step(agent, env, optimizer, rows[step * BATCH_SIZE:][:BATCH_SIZE], loss, +1, Config())
        report(time.perf_counter() - begin, metrics["loss"])


def work_in_trl(folder, micro_batch):
    import datasets
    import transformers
    import trl

    class Turns(transformers.TrainerCallback):
        def __init__(self):
            self.steps = turns()

        def on_step_begin(self, *_, **__):
            if next(self.steps, None) is None:
                sys.exit()
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds = time.perf_counter() - self.begin

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                report(self.seconds, logs["loss"])

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset                                                   # the rows are ids already

    names = "prompt_ids", "chosen_ids", "rejected_ids"
    rows = [dict(zip(names, row)) for row in json.loads((folder / "rows.json").read_text())]
    micro_batch = int(micro_batch)
    agent, env = (transformers.AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    config = trl.DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH_SIZE // micro_batch,
        learning_rate=LR, weight_decay=0.0, lr_scheduler_type="constant", beta=Config.beta,
        max_length=LONGEST, train_sampling_strategy="sequential", gradient_checkpointing=False, bf16=False,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        max_steps=2**30, dataloader_pin_memory=False)
    trainer = Trainer(model=agent, ref_model=env, args=config, train_dataset=datasets.Dataset.from_list(rows),
                      processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(folder), callbacks=[Turns()])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def matrix_rate(size):
    """FLOP/s of the best of some products, as a linear layer of this shape forms them."""
    best, shape = 0, SHAPES[size]
    for tokens in (512, 1024):
        for rows in (shape["hidden_size"], shape["intermediate_size"]):
            x, weight = torch.randn(tokens, shape["hidden_size"]), torch.randn(rows, shape["hidden_size"])
            for _ in range(20):
                begin = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                best = max(best, 2 * tokens * weight.numel() / (time.perf_counter() - begin))
    return best


def floor(model, rows):
    """FLOP of one step on these rows."""
    vocabulary = model.head().numel()
    layers = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2) - vocabulary
    answers = sum(len(chosen) + len(rejected) for _, chosen, rejected in rows)
    inputs = sum(len(prompt) - 2 for prompt, _, _ in rows) + answers         # no answer's last token is an input
    return (6 + 2) * (layers * inputs + vocabulary * answers)


def longest(rows):
    """Tokens of the longest row that a plain layout makes of these pairs, [prompt | chosen] or [prompt | rejected]."""
    return max(len(prompt) + max(map(len, answers)) for prompt, *answers in rows)


def lines_of(name, worker, log):
    """What a worker says, line by line."""
    for line in worker.stdout:
        yield line
    sys.exit(f"{name} stopped:\n{log.read_text()[-2000:]}")


def compare(size, rows, tokenizer, rounds, against):
    sides = {name: side for name, side in SIDES.items() if side[2] in against}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = decoder(size)
        model.save_pretrained(folder)
        tokenizer.save(folder)
        (folder / "rows.json").write_text(json.dumps(rows))
        workers = {name: subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--data", str(folder), "--worker", *arguments.split()],
            env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=open(folder / f"{name}.log", "w"), text=True)
            for name, (arguments, environment, _) in sides.items()}
        lines = {name: lines_of(name, worker, folder / f"{name}.log") for name, worker in workers.items()}
        for name in workers:
            assert next(lines[name]) == "ready\n"
        seen, best, rng = {name: [] for name in workers}, 0, random.Random(0)
        for turn in range(rounds):
            counted = rows[(turn * TURN + TURN - 1) * BATCH_SIZE:][:BATCH_SIZE]
            print(f"{size} turn {turn}: the longest row has {longest(counted)} tokens", file=sys.stderr)
            for name in rng.sample(sorted(workers), len(workers)):
                workers[name].stdin.write("go\n")
                workers[name].stdin.flush()
                seen[name] += [json.loads(next(lines[name])) for _ in range(TURN)]
                assert next(lines[name]) == "ready\n"                        # it is idle again
                print(f"{size} turn {turn}: {name} {seen[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
            best = max(best, matrix_rate(size))
        for worker in workers.values():
            worker.kill()
    steps = range(TURN - 1, rounds * TURN, TURN)
    floors = [floor(model, rows[step * BATCH_SIZE:][:BATCH_SIZE]) / best for step in steps]
    for name, (_, _, other) in sides.items():
        seconds, others = ([seen[side][step]["seconds"] for step in steps] for side in (name, other))
        ratio = "" if name == other else spread([b / a for a, b in zip(seconds, others)])
        print(f"| {size} | {name} | {spread(seconds)} | {BATCH_SIZE / statistics.median(seconds):.1f} | "
              f"{seen[name][-1]['peak'] / 1e9:.2f} GB | {ratio} | {spread([a / b for a, b in zip(seconds, floors)])} |",
              flush=True)
    gap = max(abs(seen[name][step]["loss"] - seen[other][step]["loss"])
              for name, (side, _, other) in sides.items() if "iopo" not in side for step in range(rounds * TURN))
    return (f"{size}: floor {statistics.median(floors):.2f} s at {best / 1e9:.0f} GFLOP/s; the DPO losses of both sides are at "
            f"most {gap:.0e} apart in any step")


# ----------------------------------------------------------------------------------------------------------
# Growth

def made_up(pairs=16, prompt=100, answer=50, vocab_size=VOCABULARY):
    rng = random.Random(0)
    return [tuple([rng.randrange(vocab_size) for _ in range(n)] for n in (prompt, answer, answer)) for _ in range(pairs)]


def seconds_of(agent, env, rows, dtype):
    """Of the log-probs of both players and AGENT's gradient."""
    begin, autocast = time.perf_counter(), functools.partial(torch.autocast, "cpu", torch.bfloat16)
    with autocast(enabled=dtype == "bfloat16"):
        for _, batch in micro_batches(rows, Config.micro_tokens):
            with torch.no_grad():
                response_logps(env, batch)
            logps = torch.stack(response_logps(agent, batch))
            with autocast(enabled=False):
                logps.sum().backward()
    agent.zero_grad()
    return time.perf_counter() - begin


def grow(rounds):
    """[(what, value, seconds of every round)], all settings taking turns."""
    settings = [("pairs", n, {}, dict(pairs=n)) for n in (8, 16, 32)]
    settings += [("tokens of an answer", n, {}, dict(answer=n)) for n in (50, 100, 200)]
    settings += [("tokens of the prompt", n, {}, dict(prompt=n)) for n in (100, 200, 400)]
    settings += [("vocabulary", n, dict(vocab_size=n), dict(vocab_size=n)) for n in (2048, 8192, 32768)]
    settings += [("parameters", size, dict(size=size), {}) for size in SHAPES]
    settings += [("option", name, {}, {}) for name in ("none", "--gradient-checkpointing", "--compile", "--dtype bfloat16")]
    jobs = [(what, value, decoder(**model), made_up(**pairs)) for what, value, model, pairs in settings]
    for size in SHAPES:
        rows = made_up(prompt=400, answer=40)
        plain = [(prompt, answer, None) for prompt, *answers in rows for answer in answers]
        what = f"{size}, prompt 400, answers 40"
        jobs += [(what, "a pair in one row", decoder(size), rows), (what, "two plain rows", decoder(size), plain)]
    seen = []
    for what, value, agent, rows in jobs:
        env = copy.deepcopy(agent)
        for player in (agent, env):
            player.gradient_checkpointing = value == "--gradient-checkpointing"
            if value == "--compile":
                player.compile_layers()
        seen.append((what, value, agent, env, rows, []))
    for _ in range(1 + rounds):
        for _, value, agent, env, rows, seconds in seen:
            seconds.append(seconds_of(agent, env, rows, "bfloat16" if "bfloat16" in str(value) else "float32"))
    return [(what, value, seconds[1:]) for what, value, *_, seconds in seen]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preference pairs, as train.py reads them, for the part trl")
    parser.add_argument("--parts", nargs="+", choices=("trl", "growth"), default=["trl", "growth"], help="what to measure")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=[*SHAPES], help="models to compare with TRL")
    parser.add_argument("--against", nargs="+", choices=("plain", "best"), default=["plain", "best"], help="which TRL")
    parser.add_argument("--rounds", type=int, default=10, help="steps that count")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, detail = options.worker
        {"here": work_here, "trl": work_in_trl}[side](Path(options.data), detail)
        sys.exit()
    if "trl" in options.parts:
        pairs = load_pairs(options.data)
        tokenizer = tokenizer_for(pairs)
        rows, _, note = encode_pairs(pairs, tokenizer, max_length=2**30)
        fit = [row for row in rows if longest([row]) <= LONGEST]
        needed = options.rounds * TURN * BATCH_SIZE
        print(f"{note.splitlines()[0]}; {len(rows) - len(fit)} of more than {LONGEST} tokens taken out; {needed} used\n")
        if len(fit) < needed:
            sys.exit(f"{options.data}: {len(fit)} pairs are too few for {needed}")
        print("| model | side | s/step | pairs/s | peak memory | times as fast as TRL | of the floor |\n|---|---|---|---|---|---|---|")
        against = [f"TRL {which}" for which in options.against]
        notes = [compare(size, fit[:needed], tokenizer, options.rounds, against) for size in options.sizes]
        print("", *notes, "", sep="\n")
    if "growth" in options.parts:
        print("| what | value | s | of the first |\n|---|---|---|---|")
        first = {}
        for what, value, seconds in grow(options.rounds):
            first.setdefault(what, seconds)
            print(f"| {what} | {value} | {spread(seconds)} | {spread([b / a for a, b in zip(first[what], seconds)])} |")
