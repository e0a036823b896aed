"""Peak memory and time of loading a checkpoint of 1.24 billion parameters, shaped as Llama-3.2-1B.

    python benchmarks/load.py     # 6 GB of memory and, for a moment, 10 GB in the temporary folder

Every form is written with random weights and loaded by a process of its own, which reads from /proc
(Linux) by how much its peak of resident memory rose, mapped files included. Loaded weights are
float32, whatever the file holds.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Decoder, DecoderConfig                                            # noqa: E402
from scale.measure import resident_peak as peak                                     # noqa: E402
from scale.plan import SHAPES                                                       # noqa: E402

FORMS = ("float32, safetensors", "bfloat16, safetensors", "float32, pytorch_model.bin")


def write(folder, form):
    with torch.device("meta"):
        model = Decoder(SHAPES["1B"])
    dtype = torch.bfloat16 if form.startswith("bfloat16") else torch.float32
    model = model.to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    model.save_pretrained(folder)
    if form.endswith(".bin"):
        del model
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


def load(folder):
    Decoder(DecoderConfig(8, 8, 8, 1, 1, 1, 8))                    # what torch needs in any case
    before, start = peak(), time.perf_counter()
    model = Decoder.from_pretrained(folder)
    size = sum(parameter.nbytes for parameter in model.parameters())
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": size, "peak": peak() - before}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        sys.exit(load(sys.argv[2]))
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    print("| checkpoint | model | peak | peak / model | seconds |\n|---|---|---|---|---|")
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), form)
            seen = json.loads(subprocess.check_output([sys.executable, __file__, "--load", folder]))
            print(f"| {form} | {seen['bytes'] / 1e9:.2f} GB | {seen['peak'] / 1e9:.2f} GB | "
                  f"{seen['peak'] / seen['bytes']:.2f} | {seen['seconds']:.1f} |", flush=True)
