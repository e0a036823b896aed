"""Time and memory of one optimiser step, here and in TRL's DPOTrainer, on the same pairs.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/speed.py --data Anthropic/hh-rlhf          # or any file that train.py reads

Both sides train the same random Llama in float32, with a reference of its own, on the same tokens in the same order, in
processes that take turns step by step. "plain" is TRL with all pairs in one forward pass; "best" the fastest setting found
for it, one pair at a time with accumulated gradients. There both sides keep freed memory (TUNED_MALLOC) instead of giving
it back to the system and asking for it again.
The floor is the arithmetic that no exact implementation can leave out, at the best matrix rate seen in this run: the
products of the linear layers with every distinct token, of the vocabulary with the tokens that predict an answer's, forward
and backward for AGENT, forward for ENV. Attention is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Tokenizer, encode_pairs, load_pairs                         # noqa: E402
from model import Decoder, DecoderConfig, find_device                        # noqa: E402
from train import Config, adamw, optimizer_step                              # noqa: E402

VOCABULARY, LONGEST, LR = 8192, 512, 1e-5
SHAPES = {"8.6M": dict(hidden_size=256, intermediate_size=720, num_attention_heads=4, num_key_value_heads=4),
          "31.6M": dict(hidden_size=512, intermediate_size=1544, num_attention_heads=8, num_key_value_heads=8)}
TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36)}      # glibc's
SIDES = {"dpo, plain": ("ours dpo", {}), "iopo, plain": ("ours iopo", {}), "TRL plain": ("trl 16", {}),
         "dpo, tuned": ("ours dpo", TUNED_MALLOC), "iopo, tuned": ("ours iopo", TUNED_MALLOC),
         "TRL best": ("trl 1", TUNED_MALLOC)}


def decoder(vocab_size=VOCABULARY, **shape):
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**{"vocab_size": vocab_size, "num_hidden_layers": 8, "head_dim": 64,
                                    "tie_word_embeddings": True, **shape}))


def tokenizer_for(pairs):
    """A byte-level BPE of these texts: the model is random, so it needs one of the right size only."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator((pair.prompt + pair.chosen + pair.rejected for pair in pairs), trainer)
    return Tokenizer({"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "<eos>"}'})


def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def ours(folder, loss, batch_size):
    """A step for every line of standard input."""
    device = find_device("auto")
    agent, env = (Decoder.from_pretrained(folder).to(device) for _ in range(2))
    optimizer, config = adamw(agent, LR), Config()
    rows = json.loads((folder / "rows.json").read_text())
    for step in map(int, sys.stdin):
        begin = time.perf_counter()
        metrics = optimizer_step(agent, env, optimizer, rows[step * batch_size:][:batch_size], loss, +1, config)
        answer(time.perf_counter() - begin, metrics["loss"])


def theirs(folder, micro_batch, batch_size):
    import datasets
    import transformers
    import trl

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not sys.stdin.readline():
                sys.exit()
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds = time.perf_counter() - self.begin

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                answer(self.seconds, logs["loss"])

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):                             # these are ids already
            return dataset

    names = "prompt_ids", "chosen_ids", "rejected_ids"
    rows = [dict(zip(names, row)) for row in json.loads((folder / "rows.json").read_text())]
    agent, env = (transformers.AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    config = trl.DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=micro_batch, learning_rate=LR, weight_decay=0.0,
        gradient_accumulation_steps=batch_size // micro_batch, lr_scheduler_type="constant", beta=Config.beta,
        max_length=LONGEST, train_sampling_strategy="sequential", gradient_checkpointing=False, bf16=False, fp16=False,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        max_steps=len(rows) // batch_size, dataloader_pin_memory=False)
    trainer = Trainer(model=agent, ref_model=env, args=config, train_dataset=datasets.Dataset.from_list(rows),
                      processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(folder), callbacks=[Turns()])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def answer(seconds, loss):
    print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak()}), flush=True)


def matrix_rate(shape):
    """FLOP/s of the best of some products, as a linear layer of this shape forms them."""
    best = 0
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
    vocabulary = model.model.embed_tokens.weight.numel()
    body = sum(p.numel() for p in model.parameters() if p.dim() == 2) - vocabulary
    answers = sum(len(chosen) + len(rejected) for _, chosen, rejected in rows)
    inputs = sum(len(prompt) - 2 for prompt, _, _ in rows) + answers
    return (6 + 2) * (body * inputs + vocabulary * answers)


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def compare(size, rows, tokenizer, options):
    """The sides take turns: one step each, on the same batch, in an order that goes round."""
    shape, batch_size = SHAPES[size], options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = decoder(**shape)
        model.save_pretrained(folder)
        tokenizer.save(folder)
        (folder / "rows.json").write_text(json.dumps(rows))
        sides = {name: subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--worker", *side.split(), "--data", str(folder), "--batch-size", str(batch_size)],
            env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for name, (side, environment) in SIDES.items()}
        seen, best = {name: [] for name in sides}, 0
        for step in range(options.warmup + options.rounds):
            order = list(sides)[step % len(sides):] + list(sides)[:step % len(sides)]
            for name in order:
                sides[name].stdin.write(f"{step}\n")
                sides[name].stdin.flush()
                line = sides[name].stdout.readline()
                if not line:
                    sys.exit(f"{name} stopped at step {step}; run its worker by hand to see why: {sides[name].args}")
                seen[name].append(json.loads(line))
                print(f"  {size} step {step} {name}: {seen[name][-1]}", file=sys.stderr)
            best = max(best, matrix_rate(shape))
        for process in sides.values():
            process.stdin.close()
            process.wait()
    steps = range(options.warmup, options.warmup + options.rounds)
    flops = [floor(model, rows[step * batch_size:][:batch_size]) for step in steps]
    seconds = {name: [seen[name][step]["seconds"] for step in steps] for name in seen}
    for name in sides:
        against = "TRL best" if name.endswith(("tuned", "best")) else "TRL plain"
        ratio = [a / b for a, b in zip(seconds[against], seconds[name])]
        floors = [s / (flop / best) for s, flop in zip(seconds[name], flops)]
        gap = max(abs(seen[name][step]["loss"] - seen[against][step]["loss"]) for step in steps)
        print(f"| {size} | {name} | {spread(seconds[name])} | {batch_size / statistics.median(seconds[name]):.1f} | "
              f"{seen[name][-1]['peak'] / 1e9:.2f} GB | {spread(ratio)} | {spread(floors)} | {gap:.1e}", flush=True)
    print(f"best matrix rate {best / 1e9:.0f} GFLOP/s; floor {statistics.median(flops) / best:.2f} s a step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7, help="steps that count, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per step")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, detail = options.worker
        if side == "ours":
            ours(options.data, detail, options.batch_size)
        else:
            theirs(options.data, int(detail), options.batch_size)
        sys.exit()
    pairs = load_pairs(options.data)
    tokenizer = tokenizer_for(pairs)
    rows, _, report = encode_pairs(pairs, tokenizer, max_length=2**30)
    print(report.splitlines()[0])
    fit = [row for row in rows if len(row[0]) + max(len(row[1]), len(row[2])) <= LONGEST]
    print(f"{len(rows) - len(fit)} pairs of more than {LONGEST} tokens taken out")
    for size in options.sizes:
        compare(size, fit[:(options.warmup + options.rounds) * options.batch_size], tokenizer, options)
