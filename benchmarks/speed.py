"""Seconds and memory of one optimiser step, here and in TRL's DPOTrainer, and what they grow with.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/speed.py --data Anthropic/hh-rlhf     # or what else train.py reads; Linux
    python benchmarks/speed.py --parts growth               # without TRL and data
    python benchmarks/speed.py --parts gpu                  # a GPU of 80 GB; without data

README.md, beside this file, says what is compared with what. A worker is a process with one side's
two models; it takes a turn, some steps, when it is told to, and is idle between turns.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Tokenizer, encode_pairs, load_pairs, micro_batches                 # noqa: E402
from model import Decoder, DecoderConfig                                            # noqa: E402
from scale import attention                                                         # noqa: E402
from scale.measure import resident_peak as peak, write_model                        # noqa: E402
from scale.plan import SHAPES as LARGE                                              # noqa: E402
from train import Config, Player, optimizer_step                                    # noqa: E402

VOCABULARY, LONGEST, LR, GPU_TOKENS = 8192, 512, 1e-5, 16384
BATCH_SIZE, TURN = 16, 2                                          # pairs of a step, steps of a turn
SHAPES = {"8.6M": (256, 720), "31.6M": (512, 1544)}                # hidden and intermediate size
# of glibc: keep freed memory instead of giving it back to the system and asking for it again
TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
# name: (the worker's arguments, its environment, the side it is compared with)
SIDES = {"TRL plain": ("trl 16", {}, "TRL plain"),
         "DPO here": ("here dpo", {}, "TRL plain"),
         "IOPO here": ("here iopo", {}, "TRL plain"),
         "TRL best": ("trl 1", TUNED_MALLOC, "TRL best"),
         "DPO here, tuned": ("here dpo", TUNED_MALLOC, "TRL best"),
         "IOPO here, tuned": ("here iopo", TUNED_MALLOC, "TRL best")}
GPU_SIDES = {"TRL, 4 pairs at once": "trl 4", "TRL, 8 pairs at once": "trl 8",
             "DPO here": "here dpo", "IOPO here": "here iopo",
             "IOPO here, mask tensors": "here iopo-masked"}
ON_GPU, NO_GPU = torch.cuda.is_available(), {"CUDA_VISIBLE_DEVICES": ""}


def decoder(size="8.6M", vocab_size=VOCABULARY):
    torch.manual_seed(0)
    (hidden, intermediate), heads = SHAPES[size], SHAPES[size][0] // 64
    return Decoder(DecoderConfig(vocab_size, hidden, intermediate, num_hidden_layers=8,
                                 num_attention_heads=heads, num_key_value_heads=heads,
                                 head_dim=64, tie_word_embeddings=True))


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# ---- Against TRL ---------------------------------------------------------------------------------

def tokenizer_for(pairs):
    """A byte-level BPE of these texts; the model is random, so any of the right size will do."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    texts = (pair.prompt + pair.chosen + pair.rejected for pair in pairs)
    backend.train_from_iterator(texts, trainer)
    return Tokenizer({"tokenizer.json": backend.to_str().encode(),
                      "tokenizer_config.json": b'{"eos_token": "<eos>"}'})


def rows_of(rows, step):
    return rows[step * BATCH_SIZE:][:BATCH_SIZE]


def report(seconds, loss):
    """A worker's line: the peak is that of the process, libraries and all."""
    memory = torch.cuda.max_memory_reserved() if ON_GPU else peak()
    print(json.dumps({"seconds": seconds, "loss": loss, "peak": memory}), flush=True)


def turns():
    """A worker's steps by number, a turn's for each line of standard input, once it is ready."""
    print("ready", flush=True)
    for turn, _ in enumerate(sys.stdin):
        yield from range(turn * TURN, (turn + 1) * TURN)
        print("ready", flush=True)


def work_here(folder, loss):
    loss, _, masked = loss.partition("-")
    if masked:
        attention.of_pairs = lambda *_: None
    rows, config = json.loads((folder / "rows.json").read_text()), Config()
    if ON_GPU:
        config = Config(dtype="bfloat16", micro_tokens=GPU_TOKENS)
    agent, env = (Player(Decoder.from_pretrained(folder).to("cuda" if ON_GPU else "cpu"),
                         rows, loss, LR, config) for _ in range(2))
    for step in turns():
        begin = time.perf_counter()
        metrics = optimizer_step(agent, env, rows_of(rows, step), config)
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
            if ON_GPU:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.begin

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                report(self.seconds, logs["loss"])

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset                                         # the rows are ids already

    names, rows = ("prompt_ids", "chosen_ids", "rejected_ids"), (folder / "rows.json").read_text()
    rows = datasets.Dataset.from_list([dict(zip(names, row)) for row in json.loads(rows)])
    agent, env = (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                  for _ in range(2))
    config = trl.DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=int(micro_batch),
        gradient_accumulation_steps=BATCH_SIZE // int(micro_batch), learning_rate=LR,
        weight_decay=0.0, lr_scheduler_type="constant", beta=Config.beta, max_length=None,
        train_sampling_strategy="sequential", gradient_checkpointing=False, bf16=ON_GPU,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=not ON_GPU,
        max_steps=2**30, dataloader_pin_memory=False)
    trainer = Trainer(
        model=agent, ref_model=env, args=config, train_dataset=rows, callbacks=[Turns()],
        processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(folder))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def matrix_rate(size):
    """FLOP/s of the best of some products, as a linear layer of this shape forms them."""
    best, width = 0, SHAPES[size][0]
    for tokens, outputs in itertools.product((512, 1024), SHAPES[size]):
        x, weight = torch.randn(tokens, width), torch.randn(outputs, width)
        seconds = timeit.repeat(lambda: torch.nn.functional.linear(x, weight), number=1, repeat=20)
        best = max(best, 2 * tokens * weight.numel() / min(seconds))
    return best


def floor(model, rows):
    """FLOP of one step on these rows."""
    vocabulary = model.head().numel()
    layers = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2) - vocabulary
    answers = sum(len(chosen) + len(rejected) for _, chosen, rejected in rows)
    inputs = sum(len(prompt) - 2 for prompt, _, _ in rows) + answers    # an answer's last is none
    return (6 + 2) * (layers * inputs + vocabulary * answers)


def longest(rows):
    """Tokens of the longest row that a plain layout makes of these pairs."""
    return max(len(prompt) + max(map(len, answers)) for prompt, *answers in rows)


def turn_of(name, worker, log):
    """What a worker reports until it is ready for another turn."""
    lines = []
    for line in iter(worker.stdout.readline, "ready\n"):
        if not line:
            sys.exit(f"{name} stopped:\n{log.read_text()[-2000:]}")
        lines.append(json.loads(line))
    return lines


def compare(size, rows, tokenizer, rounds, against):
    """Prints the table's rows of this size; returns a note."""
    sides = {name: side for name, side in SIDES.items() if side[2] in against}
    model, best, rng = decoder(size), 0, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model.save_pretrained(folder)
        tokenizer.save(folder)
        (folder / "rows.json").write_text(json.dumps(rows))
        logs = {name: folder / f"{name}.log" for name in sides}
        workers = {name: subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--data", folder, "--worker",
             *arguments.split()], env=os.environ | NO_GPU | environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(logs[name], "w"))
            for name, (arguments, environment, _) in sides.items()}
        seen = {name: turn_of(name, workers[name], logs[name]) for name in workers}     # none yet
        for turn in range(rounds):
            tokens = longest(rows_of(rows, turn * TURN + TURN - 1))
            print(f"{size} turn {turn}: the longest row has {tokens} tokens", file=sys.stderr)
            for name in rng.sample(sorted(workers), len(workers)):
                print("go", file=workers[name].stdin, flush=True)
                seen[name] += turn_of(name, workers[name], logs[name])
                print(f"{size} turn {turn}: {name} {seen[name][-1]['seconds']:.2f} s",
                      file=sys.stderr, flush=True)
            best = max(best, matrix_rate(size))
        for worker in workers.values():
            worker.kill()
    steps = range(TURN - 1, rounds * TURN, TURN)                   # those that count
    floors = [floor(model, rows_of(rows, step)) / best for step in steps]
    for name, (_, _, other) in sides.items():
        here, there = ([seen[side][step]["seconds"] for step in steps] for side in (name, other))
        ratio = "" if name == other else spread([b / a for a, b in zip(here, there)])
        print(f"| {size} | {name} | {spread(here)} | {BATCH_SIZE / statistics.median(here):.1f} | "
              f"{seen[name][-1]['peak'] / 1e9:.2f} GB | {ratio} | "
              f"{spread([a / b for a, b in zip(here, floors)])} |", flush=True)
    gap = max(abs(a["loss"] - b["loss"]) for name, (worker, _, other) in sides.items()
              if worker != "here iopo" for a, b in zip(seen[name], seen[other]))
    return (f"{size}: floor {statistics.median(floors):.2f} s at {best / 1e9:.0f} GFLOP/s; the DPO "
            f"losses of both sides are at most {gap:.0e} apart in any step")


def against_trl(data, sizes, rounds, against):
    pairs = load_pairs(data)
    tokenizer, needed = tokenizer_for(pairs), rounds * TURN * BATCH_SIZE
    rows, _, note = encode_pairs(pairs, tokenizer, max_length=2**30)
    fit = [row for row in rows if longest([row]) <= LONGEST]
    print(f"{note.splitlines()[0]}; {len(rows) - len(fit)} of more than {LONGEST} tokens taken "
          f"out; {needed} used\n")
    if len(fit) < needed:
        sys.exit(f"{data}: {len(fit)} pairs are too few for {needed}")
    print("| model | side | s/step | pairs/s | peak memory | times as fast as TRL | of the floor |")
    print("|---|---|---|---|---|---|---|")
    notes = [compare(size, fit[:needed], tokenizer, rounds, against) for size in sizes]
    print("", *notes, "", sep="\n")


def gpu_rate(size=8192):
    x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    seconds = timeit.repeat(lambda: (x @ x, torch.cuda.synchronize()), number=1, repeat=20)
    return 2 * size**3 / min(seconds)


def on_gpu(rounds):
    """Llama-3.2-1B's shape in bfloat16, side after side, fresh pairs in every step."""
    shape, rng = LARGE["1B"], random.Random(0)
    rows = [tuple([rng.randrange(shape.vocab_size) for _ in range(rng.randint(*some))]
                  for some in ((100, 300), (100, 400), (100, 400)))
            for _ in range(rounds * TURN * BATCH_SIZE)]
    best = gpu_rate()
    print(f"{torch.cuda.get_device_name()}, products at {best / 1e12:.0f} TFLOP/s\n\n"
          "| side | s/step | pairs/s | peak memory | of the matrix rate |\n|---|---|---|---|---|")
    with torch.device("meta"):
        model = Decoder(shape)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_model(folder, shape)
        (folder / "rows.json").write_text(json.dumps(rows))
        for name, arguments in GPU_SIDES.items():
            log = folder / "log"
            worker = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "--data", folder, "--worker",
                 *arguments.split()], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log.open("w"))
            try:
                seen = turn_of(name, worker, log)
                for _ in range(rounds):
                    print("step", file=worker.stdin, flush=True)
                    seen += turn_of(name, worker, log)
            except SystemExit as stop:                             # out of memory, say
                print(f"| {name} | {str(stop.code).splitlines()[-1]} | | | |", flush=True)
                continue
            finally:
                worker.kill()
                worker.wait()
            steps = range(TURN - 1, rounds * TURN, TURN)
            seconds = [seen[step]["seconds"] for step in steps]
            share = [floor(model, rows_of(rows, step)) / best / seen[step]["seconds"]
                     for step in steps]
            print(f"| {name} | {spread(seconds)} | {BATCH_SIZE / statistics.median(seconds):.1f} | "
                  f"{seen[-1]['peak'] / 1e9:.1f} GB | {spread(share)} |", flush=True)


# ---- Growth --------------------------------------------------------------------------------------

def made_up(pairs=16, prompt=100, answer=50, vocab_size=VOCABULARY):
    rng = random.Random(0)
    return [tuple([rng.randrange(vocab_size) for _ in range(n)] for n in (prompt, answer, answer))
            for _ in range(pairs)]


def seconds_of(agent, env):
    """Of the log-probs of both players and AGENT's gradient."""
    begin = time.perf_counter()
    for batch in micro_batches(agent.rows, agent.config.micro_tokens):
        with torch.no_grad():
            env.logps(batch)
        torch.stack(agent.logps(batch)).sum().backward()
    agent.model.zero_grad()
    return time.perf_counter() - begin


def growth(rounds):
    """Prints the table; all settings take turns."""
    settings = [("pairs", n, {}, made_up(pairs=n)) for n in (8, 16, 32)]
    settings += [("tokens of an answer", n, {}, made_up(answer=n)) for n in (50, 100, 200)]
    settings += [("tokens of the prompt", n, {}, made_up(prompt=n)) for n in (100, 200, 400)]
    settings += [("vocabulary", n, dict(vocab_size=n), made_up(vocab_size=n))
                 for n in (2048, 8192, 32768)]
    settings += [("parameters", size, dict(size=size), made_up()) for size in SHAPES]
    settings += [("option", name, {}, made_up())
                 for name in ("none", "--gradient-checkpointing", "--dtype bfloat16")]
    rows = made_up(prompt=400, answer=40)
    plain = [(prompt, answer, None) for prompt, *answers in rows for answer in answers]
    for size in SHAPES:
        what = f"{size}, prompt 400, answers 40"
        settings += [(what, "a pair in one row", dict(size=size), rows),
                     (what, "two plain rows", dict(size=size), plain)]
    seen = []
    for what, value, model, rows in settings:
        config = Config(dtype="bfloat16" if value == "--dtype bfloat16" else "float32")
        players = [Player(decoder(**model), rows, "dpo", LR, config) for _ in range(2)]
        for player in players:
            player.model.gradient_checkpointing = value == "--gradient-checkpointing"
        seen.append((what, value, players, []))
    print("| what | value | s | of the first |\n|---|---|---|---|", flush=True)
    for _ in range(1 + rounds):                                    # the first does not count
        for _, _, players, seconds in seen:
            seconds.append(seconds_of(*players))
    first = {}
    for what, value, _, (_, *seconds) in seen:
        ratios = [b / a for a, b in zip(first.setdefault(what, seconds), seconds)]
        print(f"| {what} | {value} | {spread(seconds)} | {spread(ratios)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="pairs for the part trl, as train.py reads them")
    parser.add_argument("--parts", nargs="+", choices=("trl", "growth", "gpu"),
                        default=["trl", "growth"])
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=[*SHAPES],
                        help="models to compare with TRL")
    parser.add_argument("--against", nargs="+", choices=("plain", "best"),
                        default=["plain", "best"], help="which TRL")
    parser.add_argument("--rounds", type=int, default=10, help="steps that count")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, detail = options.worker
        sys.exit({"here": work_here, "trl": work_in_trl}[side](Path(options.data), detail))
    if "trl" in options.parts:
        if options.data is None:
            parser.error("the part trl needs --data")
        against_trl(options.data, options.sizes, options.rounds,
                    [f"TRL {which}" for which in options.against])
    if "gpu" in options.parts:
        if not ON_GPU:
            parser.error("the part gpu needs a GPU")
        on_gpu(options.rounds)
    if "growth" in options.parts:
        growth(options.rounds)
