"""Peak memory and seconds of a step of short runs of train.py, beside the bill of scale/plan.py.

    python -m scale.measure --model FOLDER --data PAIRS --batch-size 8      # Linux; here
    python -m scale.measure --shape 1B --dtype bfloat16 --micro-tokens 16384

Each way is a run of its own: turns of both players, all that a run writes, the closing table. On a
CPU the peak is that of a process' resident memory, on a GPU what PyTorch has reserved, and of bills
the process' share is left out there. Options that are not this script's are train.py's. A --shape
has random weights and made-up pairs.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data import SafeWorld
from model import Decoder
from scale.plan import SHAPES

LORA = "--lora-rank 16"
HALVED = f"{LORA} --dtype bfloat16 --backbone-dtype bfloat16"
WAYS = {"full": "", "full DPO": "--method dpo", "checkpointing": "--gradient-checkpointing",
        "resting moments offloaded": "--offload-resting",
        "LoRA": LORA, "LoRA DPO": f"{LORA} --method dpo",
        "LoRA, bfloat16 backbone": HALVED,
        "LoRA, bfloat16 backbone, checkpointing": f"{HALVED} --gradient-checkpointing",
        "two processes": "", "two processes, LoRA": LORA}

# of glibc: freed tensors go back to the system at once, so that a peak is what tensors take
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
SHORT = "--n-iter 1 --n-mu 2 --lr 1e-6 --save-every 0 --eval-prompts 0"


def write_model(folder, shape):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = Decoder(shape)
    model = model.to(torch.bfloat16).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() == 2 else \
            torch.nn.init.ones_(parameter)
    model.cpu().save_pretrained(folder)
    SafeWorld.tokenizer().save(folder)


def write_pairs(path):
    """Prompts of 100 to 300 tokens, answers of 100 to 400, all lengths as likely."""
    kinds, tokenizer, rng = [*SafeWorld().kinds], SafeWorld.tokenizer(), random.Random(0)

    def text(least, most):
        words, length = [], rng.randint(least, most)
        while len(tokenizer.encode(" ".join(words))) < length:
            words.append(rng.choice(kinds))
        return " ".join(words)

    with path.open("w") as file:
        for _ in range(200):
            row = {"prompt": text(100, 300) + "\n", "chosen": text(100, 400),
                   "rejected": text(100, 400)}
            file.write(json.dumps(row) + "\n")


def resident_peak():
    """Bytes of this process' memory when it had most, mapped files included."""
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024


def worker(arguments):
    """A run, of which this process prints peak, bill and seconds."""
    import train
    from scale import plan
    bills, seconds, bill, step = [], [], plan.bill, train.optimizer_step

    def billed(shape, config, rows, processes, device):
        found = bill(shape, config, rows, processes, device)
        most = max(sum(found.values()), plan.closing_table(shape, config, rows, device))
        bills.append(most - (found["process"] if device == "cuda" else 0))
        return found

    def timed(*inputs):
        begin = time.perf_counter()
        metrics = step(*inputs)                        # it ends with numbers: the GPU has finished
        seconds.append(time.perf_counter() - begin)
        return metrics

    plan.bill, train.optimizer_step = billed, timed
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from scale import shard
            shard.main(arguments)
        else:
            train.main(arguments)
    finally:
        if seconds:                                    # else it was refused
            peak = torch.cuda.max_memory_reserved() or resident_peak()     # without a GPU 0
            seen = {"peak": peak, "bill": bills[0], "seconds": seconds[1:]}
            print("MEASURED", json.dumps(seen), file=sys.__stdout__, flush=True)


def measure(way, arguments, folder):
    """{peak, bill, seconds} of a run; of several processes, of the one that takes most."""
    turns = SHORT if "dpo" in WAYS[way] else f"{SHORT} --n-nu 2"
    command = ["-m", "scale.measure", "--worker", *turns.split(), *arguments, *WAYS[way].split(),
               "--out", folder]
    if way.startswith("two"):
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *command]
    run = subprocess.run([sys.executable, *map(str, command)], text=True, capture_output=True,
                         env={**RETURNED, **os.environ})
    shutil.rmtree(folder, ignore_errors=True)
    seen = [json.loads(line.split(" ", 1)[1]) for line in run.stdout.splitlines()
            if line.startswith("MEASURED")]
    if run.returncode or not seen:
        print(f"{way} stopped: {run.stderr.strip()[-500:]}", file=sys.stderr)
        return None
    return max(seen, key=lambda one: one["peak"])


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m scale.measure", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="instead of train.py's --model and --data")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--rounds", type=int, default=1, help="of all ways, in turns")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if options.shape:
            write_model(folder / "model", SHAPES[options.shape])
            write_pairs(folder / "pairs.jsonl")
            arguments += ["--model", folder / "model", "--data", folder / "pairs.jsonl"]
        seen = {way: [] for way in options.ways}
        for _ in range(options.rounds):
            for way in options.ways:
                seen[way].append(measure(way, arguments, folder / "run"))
                print(way, seen[way][-1], file=sys.stderr, flush=True)
    print("| way | peak, GB | bill, GB | bill / peak | s/step |\n|---|---|---|---|---|")
    for way, runs in seen.items():
        if None not in runs:
            peak, bill = (max(run[name] for run in runs) / 1e9 for name in ("peak", "bill"))
            seconds = [value for run in runs for value in run["seconds"]]
            print(f"| {way} | {peak:.2f} | {bill:.2f} | {bill / peak:.2f} | "
                  f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) |")


if __name__ == "__main__":
    main()
