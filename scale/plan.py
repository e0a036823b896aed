"""What a run takes of memory, disk and time, before any weight is loaded: train.py --plan.

    python train.py --model FOLDER --data DATA --plan                    # and any other options
    python train.py --model FOLDER --data DATA --anyway                  # else it must fit
    python -m scale.plan 7B --dtype bfloat16                             # for GPUs elsewhere

Every run of a --model asks `review`. README.md, beside this file, has what was measured against it.
"""

import dataclasses
import itertools
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import eval
from data import batches, groups
from model import CHUNK, CHUNKS, Decoder, DecoderConfig, find_device
from scale.offload import refuse_cpu

GB = 1e9
ADAPTERS = {"lora_rank": 16, "dtype": "bfloat16", "backbone_dtype": "bfloat16"}
WAYS = (("--method dpo: one player", {"method": "dpo", "n_nu": 0}, 1),
        ("--gradient-checkpointing", {"gradient_checkpointing": True}, 1),
        ("--offload-resting", {"offload_resting": True}, 1),
        ("--lora-rank 16", {"lora_rank": 16}, 1),
        ("--lora-rank 16, --dtype and --backbone-dtype bfloat16", ADAPTERS, 1),
        ("the same, --gradient-checkpointing", {**ADAPTERS, "gradient_checkpointing": True}, 1),
        ("torchrun, 2 processes", {}, 2), ("torchrun, 8 processes", {}, 8),
        ("torchrun, 8 processes, those adapters", ADAPTERS, 8))

PROCESS = {"cpu": 0.4 * GB, "cuda": 0.6 * GB}          # of PyTorch, before any tensor
PEFT = 0.1 * GB                                        # what it loads
CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CARDS = (24, 40, 80, 141)     # GB of GPUs; a tenth is left to what the allocator cannot use
LONG = dict(max_position_embeddings=4096)
SHAPES = {"1B": DecoderConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True,
                              **LONG),                                     # Llama-3.2-1B
          "7B": DecoderConfig(125696, 4096, 11008, 32, 32, 32, 128, model_type="baichuan",
                              **LONG)}                                     # Baichuan2-7B


# ---- Memory --------------------------------------------------------------------------------------

def bill(shape, config, step, processes=1, device="cpu"):
    """{what: bytes} of a process of a run when it has most; `step` is its largest step's rows.

    Masters, moments and gradients are float32. A player that trains keeps one pass at a time; ENV
    keeps nothing. From a step's second pass on there is a gradient beside that; shards of it meet
    only in the last pass, so it is whole in every process until then."""
    size = Sizes(shape, config)
    half = config.dtype == "bfloat16"
    backbone = size.whole * (2 if config.backbone_dtype == "bfloat16" else 4)
    frozen = 0 if config.lora_rank is None else backbone
    with_moments = 1 if config.offload_resting or not config.n_nu else 2
    [ordered] = groups(step, None)                     # the last process has the longest rows
    passes = groups(ordered[processes - 1::processes], config.micro_tokens)
    gradient = 4 * size.trained / (processes if len(passes) == 1 else 1)
    most = max([(gradient if number else 0, *passing(size, config, rows, device))
                for number, rows in enumerate(passes)] + [(gradient, 0, 0)], key=sum)
    together = 0
    if processes > 1:                                  # of shards: the rest, and two blocks
        together = (size.rest + 2 * size.block) * (2 if half else 4)
    elif half and (frozen == 0 or not config.gradient_checkpointing and frozen == 4 * size.whole):
        together = 2 * size.layers                     # what autocast makes of float32 weights
    return {"weights": (frozen + 2 * 4 * size.trained) / processes,
            "moments": with_moments * 8 * size.trained / processes,
            **dict(zip(("gradient", "activations", "vocabulary"), most)),
            "together": together,
            "process": PROCESS.get(device, PROCESS["cpu"]) + (PEFT if frozen else 0)}


class Sizes:
    """Numbers of a model: whole, its layers, a block, the rest; what each player trains of it."""

    def __init__(self, shape, config):
        with torch.device("meta"):
            model = Decoder(shape)
        self.shape = shape
        self.whole = sum(weight.numel() for weight in model.parameters())
        self.layers = sum(weight.numel() for weight in model.model.layers.parameters())
        self.block, self.rest = self.layers / shape.num_hidden_layers, self.whole - self.layers
        self.head = shape.vocab_size * shape.hidden_size
        adapted = sum(linear.in_features + linear.out_features
                      for linear in model.model.layers.modules()
                      if isinstance(linear, torch.nn.Linear))
        self.trained = self.whole if config.lora_rank is None else config.lora_rank * adapted


def passing(size, config, rows, device):
    """Bytes of (what autograd keeps in the layers, what the vocabulary takes) in a pass."""
    shape, lora, autocast = size.shape, config.lora_rank is not None, config.dtype == "bfloat16"
    D, inner, depth = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    queries, keys = (heads * shape.head_dim for heads in
                     (shape.num_attention_heads, shape.num_key_value_heads))
    product = 2 if autocast else 4                     # bytes of a number
    norms = 2 if lora or device == "cuda" else 4       # the input; and its norm where not fused
    copies = 5 if autocast else 2                      # q, k, v, gate, up: each casts its own
    kept = (4 * norms * D + product * (copies * D + queries + inner)
            + product * (2 * queries + 2 * keys + 3 * inner)
            + product * 7 * (config.lora_rank or 0))   # of a token, in a layer
    layers = depth * kept if not config.gradient_checkpointing else depth * 4 * D + kept
    answers = answer_tokens(rows)
    chunk = min(answers, max(CHUNK, -(-answers // CHUNKS)))
    logits = (12 + 4 * autocast) * shape.vocab_size    # of a token: they, softmax, gradient
    weight = 2 if lora and config.backbone_dtype == "bfloat16" else 4
    head = weight * ("norm_head" in shape.family)      # the rows of length 1
    head += 2 * (autocast and weight == 4)             # its copy
    head += 0 if lora else 4 + 2 * autocast            # a chunk's gradient of it, and its copy
    return tokens(rows) * (layers + product * 3 * inner), chunk * logits + head * size.head


def closing_table(shape, config, rows, device="cpu"):
    """Bytes of it, after training: a whole float32 model, which reads some pairs, and then what it
    keeps of a batch of prompts and their answers."""
    at_once = min(eval.ROWS_AT_ONCE, config.eval_prompts)
    longest = max(len(prompt) for prompt, *_ in rows)
    keys = shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim    # and values
    cache = 2 * 4 * keys * at_once * (longest + eval.DEFAULTS["max_new_tokens"])
    inner = 4 * 3 * shape.intermediate_size * max(at_once * longest, eval.TOKENS_AT_ONCE)
    return 4 * Sizes(shape, config).whole + cache + inner + PROCESS.get(device, PROCESS["cpu"])


def tokens(rows):
    return sum(len(ids) for row in rows for ids in row if ids is not None)


def answer_tokens(rows):
    return sum(len(ids) for _, *answers in rows for ids in answers if ids is not None)


def memory(device):
    """Bytes that a GPU, or this machine or its container, has for a process at most, what it
    holds already included; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + PROCESS["cuda"]
    try:
        known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits = [path.read_text().strip() for path in map(Path, CONTAINER) if path.is_file()]
        return min([int(known["MemAvailable"].split()[0]) * 1024 + PROCESS["cpu"],
                    *(int(limit) for limit in limits if limit != "max")])
    except (OSError, KeyError, ValueError):
        return None


# ---- Time ----------------------------------------------------------------------------------------

def seconds(size, config, rows, rate):
    """Of a step, roughly: its products at half the rate of a large one. Attention is not counted.
    The forward pass of ENV; of AGENT, and again where it is recomputed; two backward, or only that
    of the inputs where the weights are frozen."""
    backward = 4 if config.lora_rank is None else 2
    layers = size.layers * (2 + 2 + backward + 2 * config.gradient_checkpointing) * tokens(rows)
    head = size.head * (2 + 4 + backward) * answer_tokens(rows)
    return config.batch_size * (layers + head) / len(rows) / (rate / 2)


def matrix_rate(shape, dtype, device):
    """FLOP/s of a feed-forward product of this model, the best within half a second."""
    dtype, best, end = getattr(torch, dtype), 0, time.perf_counter() + 0.5
    x = torch.randn(1024, shape.hidden_size, device=device, dtype=dtype)
    weight = torch.randn(shape.intermediate_size, shape.hidden_size, device=device, dtype=dtype)
    while best == 0 or time.perf_counter() < end:
        begin = time.perf_counter()
        F.linear(x, weight)[0, 0].item()               # which waits for it
        best = max(best, 2 * len(x) * weight.numel() / (time.perf_counter() - begin))
    return best


# ---- What a run asks -----------------------------------------------------------------------------

def review(config, shape, rows, plan, anyway):
    """Refuse a run that cannot fit; with `plan` print what this and other ways take, and end."""
    device = find_device(config.device)
    if config.offload_resting:
        refuse_cpu(device)
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    step = largest_step(config, rows)
    room = least(memory(device))
    if plan:
        print_bills(config, shape, rows, step, processes, device, room)
        raise SystemExit
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))                # processes of this machine
    needs = [(device.type, room, sum(bill(shape, config, step, processes, device.type).values())
              * (beside if device.type == "cpu" else 1))]
    if config.offload_resting:
        host = least(memory(torch.device("cpu")))
        needs.append(("cpu", host, 8 * Sizes(shape, config).trained * beside / processes))
    for kind, free, need in needs:
        if free is not None and need > free and not anyway:
            raise ValueError(f"this run takes about {need / GB:.1f} GB and {free / GB:.1f} GB are "
                             f"free here ({kind}); --plan instead shows what would fit, --anyway "
                             "tries all the same")


def largest_step(config, rows):
    """The rows of the step with most tokens, of a run's first thousand, which both players make."""
    count = max(1, min(1000, config.n_iter * max(config.n_mu, config.n_nu)))
    return max(itertools.islice(batches(rows, config.batch_size, config.seed), count), key=tokens)


def least(room):
    """Of all processes, so that they decide alike, and before any of them loads."""
    if not (dist.is_available() and dist.is_initialized()):
        return room
    rooms = [None] * dist.get_world_size()
    dist.all_gather_object(rooms, room)
    return min((one for one in rooms if one is not None), default=None)


def print_bills(config, shape, rows, step, processes, device, room):
    mean = config.batch_size * tokens(rows) / len(rows)
    rates = {dtype: matrix_rate(shape, dtype, device) for dtype in ("float32", "bfloat16")}
    print(f"{Sizes(shape, config).whole / 1e6:,.1f}M parameters; a step is {config.batch_size} "
          f"pairs, about {mean:,.0f} tokens; a product of this model runs at "
          f"{rates[config.dtype] / 1e9:,.0f} GFLOP/s\nfree here ({device.type}): "
          + ("unknown" if room is None else f"{room / GB:.1f} GB"))
    lines = []
    for name, other, count in ways(config, processes, device.type):
        shared = count if device.type == "cpu" else 1  # processes share memory, and cores unless
        alone = count if processes > 1 else count / shared             # their rate was measured so
        found = bill(shape, other, step, count, device.type)
        fits = "?" if room is None else "yes" if sum(found.values()) * shared <= room else "no"
        took = seconds(Sizes(shape, other), other, rows, rates[other.dtype]) / alone
        lines.append((name, found, {"fits": fits, "s/step": f"{took:.2g}"}))
    print_table(lines)
    print("(gradient: what of it is there when a process has most, in a step's first pass nothing)")
    trained = Sizes(shape, config).trained
    each = (16 + 8 * (config.n_nu > 0)) * trained
    print(f"on disk, as asked: checkpoints of {each / GB:.2f} GB, two and one more for a moment; "
          f"each player {4 * trained / GB:.2f} GB")
    print_closing_table(shape, config, rows, device.type)


def ways(config, processes, kind):
    """(name, config, processes) of the run that is asked and of those like it, each once."""
    seen = []
    for name, options, count in (("as asked", {}, processes), *WAYS):
        other = dataclasses.replace(config, **options)
        count = processes if count == 1 else count
        refused = processes not in (1, count) or \
            config.method == "kto_pair" and (count > 1 or "method" in options) or \
            config.batch_size % count > 0 or \
            options.get("offload_resting") and (kind == "cpu" or config.n_nu == 0) or \
            "lora_rank" in options and (config.model is None or config.sft_steps > 0)
        if (other, count) not in seen and not refused:
            seen.append((other, count))
            yield name, other, count


def print_closing_table(shape, config, rows, kind):
    print("the closing table, in one process, when all is trained and saved: "
          f"{closing_table(shape, config, rows, kind) / GB:.2f} GB")


def print_table(lines):
    """Of (name, bill, {more columns})."""
    _, found, more = lines[0]
    table = [("GB of a process", *found, "all", *more)]
    for name, found, more in lines:
        values = (*found.values(), sum(found.values()))
        table.append((name, *(f"{value / GB:.2f}" for value in values), *more.values()))
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))


def main():
    """Bills of GPUs that are not here: of pairs of 700 tokens, prompt 200 and each answer 250."""
    import train
    name, *arguments = sys.argv[1:] or [""]
    if name not in SHAPES:
        sys.exit(f"python -m scale.plan {{{','.join(SHAPES)}}} and options of train.py\n{__doc__}")
    given = train.parse_arguments(arguments)
    unread = [option for option in ("model", "data", "held_out", "leave_out", "out", "device",
                                    "max_length", *train.SWITCHES) if given.pop(option, None)]
    try:
        if unread:
            raise ValueError(f"{train.flag_of(unread[0])} is not read here")
        config = train.make_config({**given, "model": name, "data": "-"})
    except ValueError as error:
        print(f"scale.plan: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    rows, lines = [([0] * 200, [0] * 250, [0] * 250)] * config.batch_size, []
    for way, other, count in ways(config, 1, "cuda"):
        found = bill(SHAPES[name], other, rows, count, "cuda")
        cards = [card for card in CARDS if sum(found.values()) <= 0.9 * card * GB]
        lines.append((way, found, {"fits into": f"{cards[0]} GB" if cards else "none"}))
    print_table(lines)
    print_closing_table(SHAPES[name], config, rows, "cuda")


if __name__ == "__main__":
    main()
