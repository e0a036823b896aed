"""A compact decoder of the Llama family: log-probabilities, generation, Hugging Face folders.

Llama, Mistral, Qwen2, Qwen3 and Baichuan2-7B are one architecture with the few differences that
FAMILIES lists. Parameter names are Hugging Face's own. Knows token ids and folders only: no
tokenizer, no training.

    model = Decoder.from_pretrained("folder")            # config.json and weights
    logits = model(input_ids)                            # (B, T, V)
    logps = sequence_logps(logits, targets, mask)        # (B,), of this or any other model's logits
    chosen_logps, rejected_logps = response_logps(model, batch)         # of a data.PairBatch
    answers = generate(model, [[1, 5, 7], [1, 9]], max_new_tokens=20, temperature=0, eos_id=2)

Shapes: B rows, T tokens, D hidden size, H heads, K key/value heads, d head size, V vocabulary,
S keys seen.
"""

import functools
import json
import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import safetensors
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint


# ---- The decoder ---------------------------------------------------------------------------------

class Decoder(nn.Module):
    """Token ids to logits. No dropout: AGENT and ENV of the same weights give the same numbers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(
                torch.empty(config.vocab_size, config.hidden_size), freeze=False),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)})
        self.lm_head = None if config.tie_word_embeddings else \
            nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        for name, parameter in self.named_parameters():             # the norms keep their ones
            if parameter.dim() == 2 and not parameter.is_meta:      # from_pretrained brings them
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids, positions=None, attention_mask=None):
        """Logits (B, T, V). `positions` (B, T) default to 0, 1, 2, ...; `attention_mask` is
        boolean, True = may attend, (B, T) over keys or (B, T, T), beside the causal mask."""
        B, T = input_ids.shape
        if positions is None:
            positions = torch.arange(T, device=input_ids.device).expand(B, T)
        mask = causal(attention_mask, T)
        hidden = self.hidden(input_ids, positions, lambda layer, q, k, v: attention(q, k, v, mask))
        return F.linear(hidden, self.head())

    def hidden(self, input_ids, positions, attend, wanted=slice(None)):
        """Final hidden states (B, Q, D) of the Q `wanted` places, a slice or indices.
        `attend(layer, q, k, v)` gets queries (B, H, T, d), keys and values (B, K, T, d), of which q
        and k are rotated; it returns what the queries read, (B, H, T, d)."""
        cos, sin = rotary(positions, self.config)
        x = self.model.embed_tokens(input_ids)                                      # (B, T, D)
        for layer, block in enumerate(self.model.layers):
            last = layer == len(self.model.layers) - 1
            inputs = x, cos, sin, functools.partial(attend, layer), wanted if last else slice(None)
            x = recomputed(block, *inputs) if self.gradient_checkpointing else block(*inputs)
        return self.model.norm(x)

    def head(self):
        """The weight (V, D) that meets the vocabulary, apart from `hidden`: few places need it."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.normalize(weight, dim=-1) if "norm_head" in self.config.family else weight

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32):
        """Read a Hugging Face folder; its weights become `dtype`. ValueError where it cannot be."""
        folder = Path(folder)
        if (folder / "adapter_config.json").is_file():              # a player of --lora-rank
            from scale.lora import merged
            return merged(folder).to(dtype)
        with torch.device("meta"):                  # no memory until the checkpoint's tensors
            model = cls(DecoderConfig.from_json(folder / "config.json"))
        model.load_state_dict(dict(read_weights(model, folder, dtype)), assign=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, or its shards and their index."""
        from huggingface_hub import save_torch_state_dict           # comes with tokenizers
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = self.state_dict()
        tensors = {name: torch.cat([weights[part] for part in parts]) if len(parts) > 1 else
                   weights[parts[0]] for name, parts in checkpoint_names(self).items()}
        save_torch_state_dict(tensors, folder, max_shard_size=SHARD_BYTES)
        self.config.to_json(Path(folder) / "config.json", next(self.parameters()).dtype)


class Block(nn.Module):
    """Self-attention with grouped key/value heads, where `attend` says who sees whom; SwiGLU."""

    def __init__(self, config):
        super().__init__()
        D, d, inner = config.hidden_size, config.head_dim, config.intermediate_size
        queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
        eps, bias, self.head_dim = config.rms_norm_eps, "qkv_bias" in config.family, d
        self.input_layernorm = nn.RMSNorm(D, eps=eps)
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(D, queries, bias=bias),
            "k_proj": nn.Linear(D, keys, bias=bias),
            "v_proj": nn.Linear(D, keys, bias=bias),
            "o_proj": nn.Linear(queries, D, bias=False),
            **{name: nn.RMSNorm(d, eps=eps) if "qk_norm" in config.family else nn.Identity()
               for name in ("q_norm", "k_norm")}})
        self.post_attention_layernorm = nn.RMSNorm(D, eps=eps)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(D, inner, bias=False),
            "up_proj": nn.Linear(D, inner, bias=False),
            "down_proj": nn.Linear(inner, D, bias=False)})

    def forward(self, x, cos, sin, attend, wanted):
        y, attn, heads = self.input_layernorm(x), self.self_attn, (-1, self.head_dim)
        q = attn.q_norm(attn.q_proj(y).unflatten(2, heads)).transpose(1, 2)         # (B, H, T, d)
        k = attn.k_norm(attn.k_proj(y).unflatten(2, heads)).transpose(1, 2)         # (B, K, T, d)
        v = attn.v_proj(y).unflatten(2, heads).transpose(1, 2)                      # (B, K, T, d)
        read = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)                  # (B, H, T, d)
        x = x + attn.o_proj(read.transpose(1, 2).flatten(2))                        # (B, T, D)
        x = x[:, wanted]                                                            # (B, Q, D)
        y, mlp = self.post_attention_layernorm(x), self.mlp                         # (B, Q, D)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))         # SwiGLU


def rotary(positions, config):
    """cos and sin of the angles, the same in both halves of d, each (B, 1, T, d), float32. The
    sines of the first half are negated, as `rotate` wants them."""
    powers = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    frequencies = 1 / config.rope_theta ** powers                                   # (d/2)
    if config.rope_scaling is not None:
        frequencies = scaled(frequencies, config.rope_scaling)
    angles = positions[:, None, :, None].float() * frequencies                      # (B, 1, T, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)            # (B, 1, T, d)


def scaled(frequencies, scaling):
    """Slowed by `factor`; for llama3 only waves longer than original / low are, those shorter than
    original / high are left alone, and what lies between is blended."""
    factor, *bands = (scaling[name] for name in ROPE_TYPES[scaling["rope_type"]])
    if not bands:
        return frequencies / factor
    low, high, original = bands
    blend = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies


def rotate(x, cos, sin):
    """Rotary position embedding in the half-split layout of Hugging Face's Llama."""
    left, right = x.chunk(2, dim=-1)                                                # (B, H, T, d/2)
    turned = torch.cat([right, left], dim=-1)                                       # (B, H, T, d)
    return torch.addcmul(x * cos, turned, sin).to(x.dtype)


CHUNK, CHUNKS = 512, 4      # logits exist for so many tokens at a time, or for this part of all
# calls a function and keeps nothing but its inputs; the backward pass calls it again
recomputed = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False,
                               preserve_rng_state=False)


# ---- Who sees whom -------------------------------------------------------------------------------

def attention(q, k, v, mask):
    """What the queries (B, H, T, d) read from keys and values (B, K, S, d): (B, H, T, d). `mask`
    is boolean (True = may attend) or added to the scores, and broadcasts to (B, H, T, S); None is
    plainly causal, with S = T. H is a multiple of K."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=q.shape[1] != k.shape[1])


def causal(attention_mask, T):
    """(B, T) or (B, T, T) boolean, or None, to a mask of `attention`, (B, 1, T, T) or None. Every
    position sees itself: no row of the softmax is empty, and nobody reads what padding computes."""
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"attention_mask must be boolean, not {attention_mask.dtype}")
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None]                                    # (B, 1, T)
    itself = torch.eye(T, dtype=torch.bool, device=attention_mask.device)           # (T, T)
    return (attention_mask.expand(-1, T, T).tril() | itself)[:, None]               # (B, 1, T, T)


# ---- Response log-probabilities ------------------------------------------------------------------

def sequence_logps(logits, targets, mask):
    """log pi of the masked tokens of each row, summed, in nats: (B,), float32.

    logits   (B, T, V) of any model; where the mask is False they do not matter
    targets  (B, T) what follows each place, shifted: logits[:, :-1] go with input_ids[:, 1:]
    mask     (B, T) boolean, True where the target is a token of the response (its EOS included)"""
    if mask.dtype != torch.bool or not logits.shape[:2] == targets.shape == mask.shape:
        raise ValueError("needs logits (B, T, V), targets (B, T) and a boolean mask (B, T), not "
                         f"{logits.shape}, {targets.shape}, {mask.shape} of {mask.dtype}")
    token_logps = -F.cross_entropy(logits[mask].float(), targets[mask], reduction="none")   # (N,)
    padded = token_logps.new_zeros(mask.shape).masked_scatter(mask, token_logps)            # (B, T)
    return padded.sum(dim=1)                                                                # (B,)


def response_logps(model, batch):
    """log pi(y_w|x) and log pi(y_l|x) of a data.PairBatch: two (B,) float32 tensors, summed over
    response tokens, EOS included, in nats. 0 for an answer that is not there.

    The prompt passes the layers once for both answers. Only what predicts a token of an answer
    meets the vocabulary: a chunk at a time, whose logits are computed again in the backward pass
    and never kept."""
    masks = functools.cache(lambda dtype: [mask.to(dtype) for mask in batch.masks])

    def attend(layer, q, k, v):                                     # each pair by its own mask
        parts = zip(*(x.split([len(mask) for mask in batch.masks], dim=2) for x in (q, k, v)))
        out = [attention(*part, mask) for part, mask in zip(parts, masks(q.dtype))]
        return torch.cat(out, dim=2)                                                # (1, H, T, d)

    if torch.is_autocast_enabled("cuda") and batch.input_ids.is_cuda:
        from scale.attention import of_pairs
        attend = of_pairs(batch, model.config.head_dim) or attend
    hidden = model.hidden(batch.input_ids, batch.positions, attend, batch.predictors)[0]    # (N, D)
    weight, size = model.head(), max(CHUNK, -(-len(hidden) // CHUNKS))              # (V, D)
    token_logps = [recomputed(target_logps, some, weight, targets)
                   for some, targets in zip(hidden.split(size), batch.targets.split(size))]
    sums = [logps.sum() for logps in torch.cat(token_logps).split(batch.lengths)]
    return torch.stack(sums).view(-1, 2).unbind(dim=1)                              # (B,), (B,)


def target_logps(hidden, weight, targets):
    """log softmax(hidden @ weight^T) at the targets: (n, D), (V, D), (n,) -> (n,), float32. Of a
    view autocast caches no copy, so the chunks' gradients add up in the weight's own dtype."""
    logits = F.linear(hidden, weight.view_as(weight)).float()                       # (n, V)
    return -F.cross_entropy(logits, targets, reduction="none")


# ---- Generation ----------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature, eos_id, generator=None):
    """Continue prompts (lists of token ids, of different lengths) in one batch; returns the lists
    of new ids, without prompt and EOS. `eos_id` is an int or several; temperature 0 takes the
    likeliest token. Random draws come from `generator`, a torch.Generator on the model's device."""
    if not prompts or not all(prompts) or min(temperature, max_new_tokens) < 0:
        raise ValueError("prompts need tokens; temperature and max_new_tokens are at least 0")
    device, head = model.device, model.head()                                       # head (V, D)
    stop = torch.as_tensor(eos_id, device=device)
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * left + list(prompt) for left, prompt in zip(padding, prompts)],
                       device=device)                              # (B, T), all end together
    positions = torch.arange(longest + max_new_tokens, device=device) \
        - torch.tensor(padding, device=device)[:, None]            # (B, S), negative in the padding
    mask = causal(positions[:, :longest] >= 0, longest)                             # (B, 1, T, T)
    cache = {}                                                     # layer -> keys, values so far

    def attend(layer, q, k, v):
        if layer in cache:
            k, v = (torch.cat(parts, dim=2) for parts in zip(cache[layer], (k, v)))  # (B, K, S, d)
        cache[layer] = k, v
        return attention(q, k, v, mask[:, :, -q.shape[2]:])

    answers = [[] for _ in prompts]
    alive = torch.arange(len(prompts), device=device)              # the prompt that a row continues
    for end in range(longest, longest + max_new_tokens):           # ids end at place `end`
        places = positions[:, end - ids.shape[1]:end].clamp(min=0)
        hidden = model.hidden(ids, places, attend)                                  # (B, T, D)
        logits = F.linear(hidden[:, -1], head).float()                              # (B, V)
        if temperature == 0:
            next_ids = logits.argmax(dim=-1)                                        # (B,)
        else:
            logits -= logits.max(dim=-1, keepdim=True).values      # a tiny temperature: no overflow
            probabilities = torch.softmax(logits / max(temperature, 1e-30), dim=-1)
            next_ids = torch.multinomial(probabilities, 1, generator=generator)[:, 0]       # (B,)
        going = ~torch.isin(next_ids, stop)                                         # (B,)
        if not going.all():                                        # finished rows leave the batch
            alive, next_ids, positions = alive[going], next_ids[going], positions[going]
            cache = {layer: (k[going], v[going]) for layer, (k, v) in cache.items()}
        for row, token in zip(alive.tolist(), next_ids.tolist()):
            answers[row].append(token)
        if len(alive) == 0:
            break
        ids, mask = next_ids[:, None], (positions[:, :end + 1] >= 0)[:, None, None]  # (B, 1, 1, S)
    return answers


def find_device(name):
    """A torch.device by name; "auto" is cuda where there is one, else cpu. ValueError if not."""
    try:
        name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"no device {name} here ({str(error).splitlines()[0]})") from None


# ---- config.json ---------------------------------------------------------------------------------

FAMILIES = {                            # what sets the models of a model_type apart from Llama's
    "llama": {}, "mistral": {},
    "qwen2": {"qkv_bias": True},        # queries, keys and values have a bias
    "qwen3": {"qk_norm": True},         # RMSNorm of each head's queries and keys before rotation
    "baichuan": {"norm_head": True,     # rows of lm_head count with length 1, in training too
                 "stored": dict.fromkeys(("q_proj", "k_proj", "v_proj"), "W_pack")}}  # in its files
ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = {"default": (), "linear": ("factor",),                 # and the numbers they need
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)}
# what a config.json may ask for, and the answers that this decoder computes; None is no answer
COMPUTED = {"model_type": (*FAMILIES,), "rope_type": (*ROPE_TYPES,), "hidden_act": ("silu", None),
            "attention_bias": (False, None), "mlp_bias": (False, None), "is_causal": (True, None),
            "partial_rotary_factor": (1.0, None), "quantization_config": (None,),
            "tie_word_embeddings": (False, True, None)}
LIMITS = {int: 2**24, float: 1e15, "num_hidden_layers": 1024}      # its numbers stay below


@dataclass(frozen=True)
class DecoderConfig:
    """The fields of a config.json that this decoder computes with, under Hugging Face's names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"
    rope_scaling: dict | None = None    # rope_type and the numbers that ROPE_TYPES has for it
    source: dict | None = field(default=None, compare=False, repr=False)    # the whole config.json

    def __post_init__(self):
        values = {**vars(self), **(self.rope_scaling or {})}
        kinds = {"rope_type": str, **{each.name: each.type for each in fields(self)}}
        for name, value in values.items():
            kind = kinds.get(name, float)                           # float: rope_scaling's numbers
            limit = LIMITS.get(name, LIMITS.get(kind))
            if limit is not None and not (type(value) in (int, kind) and 0 < value < limit):
                raise ValueError(f"{name} is {value!r}, not a positive {kind.__name__} < {limit}")
        if (self.head_dim % 2 or self.num_attention_heads % self.num_key_value_heads
                or values.get("low_freq_factor", 0) >= values.get("high_freq_factor", 1)):
            raise ValueError("head_dim must be even, num_attention_heads a multiple of "
                             "num_key_value_heads, low_freq_factor below high_freq_factor")

    @property
    def family(self):
        return FAMILIES[self.model_type]

    @classmethod
    def from_json(cls, path):
        """Read a config.json; ValueError where this decoder would compute something else."""
        source = read_file(path)
        try:
            raw = flattened(source)
            refuse_unsupported(raw, source.get("sliding_window", 4096))     # transformers' default
            scaling = {name: raw.get(name) for name in ("rope_type", *ROPE_TYPES[raw["rope_type"]])}
            raw |= {"source": source, "rope_scaling": scaling if len(scaling) > 1 else None}
            return cls(**{each.name: raw.get(each.name) for each in fields(cls)
                          if each.name in raw or each.default is MISSING})      # then it is None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self, path, dtype):
        """Write config.json: what was read, if anything was, with the dtype that is saved now."""
        rope = {**(self.rope_scaling or {"rope_type": "default"}), "rope_theta": self.rope_theta}
        found = self.source or {
            **{name: value for name, value in vars(self).items() if name != "source"},
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"], "hidden_act": "silu",
            "rope_parameters": rope, "sliding_window": None}        # for mistral absent means 4096
        name = "dtype" if "dtype" in found else "torch_dtype"       # transformers 5 and 4
        found = {**found, name: str(dtype).removeprefix("torch.")}
        Path(path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def flattened(source):
    """A config.json without its nulls, and its rotary numbers, which may stand in rope_scaling, in
    rope_parameters or outside, all outside, by the precedence of transformers."""
    rope = source.get("rope_scaling") or source.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rotary positions {rope!r} are not computed here, only one JSON object "
                         "for all layers")
    raw = {name: value for name, value in [*source.items(), *rope.items()] if value is not None}
    original = source.get(ORIGINAL) or raw.get(ORIGINAL) or raw.get("max_position_embeddings")
    heads = raw.get("num_attention_heads")
    return {"rope_type": raw.get("type", "default"), "num_key_value_heads": heads,
            "head_dim": raw.get("hidden_size", 0) // (heads or 1), **raw, ORIGINAL: original}


def refuse_unsupported(raw, window):
    """ValueError for what a config.json asks for and this decoder would compute otherwise."""
    for name, right in COMPUTED.items():
        if raw.get(name) not in right:
            raise ValueError(f"{name} {raw.get(name)!r} is not computed here, only "
                             f"{', '.join(map(str, right))}")
    kind, positions = raw["model_type"], raw.get("max_position_embeddings", math.inf)
    if kind == "baichuan":
        # the first generation has W_pack and a plain head: its class or its vocabulary tells
        first = "BaiChuan" in json.dumps(raw) or raw.get("vocab_size") == 64000
        turned = raw["rope_type"] != "default" or raw.get("rope_theta", 10000.0) != 10000.0
        if first and "z_loss_weight" not in raw or turned or positions == math.inf:
            raise ValueError("of Baichuan only Baichuan2-7B is computed here, neither the first "
                             "generation, nor 13B (which has ALiBi), nor other rotary positions")
    slides = kind == "mistral" or kind in ("qwen2", "qwen3") and raw.get("use_sliding_window")
    if slides and window is not None and window < positions:
        raise ValueError(f"sliding_window {window} is not computed here; up to {window} tokens "
                         f"sliding_window null and max_position_embeddings {window} are the same")


# ---- Checkpoint files ----------------------------------------------------------------------------

SINGLE, SINGLE_BIN = "model.safetensors", "pytorch_model.bin"
SHARD_BYTES = 5 * 10**9
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_weights(model, folder, dtype):
    """Yield (parameter's name, values): besides what was yielded one tensor is in memory (where the
    embeddings are stored twice, two), the largest first, while there is room."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    table, files, head = checkpoint_names(model), tensor_files(folder), "lm_head.weight"
    again = files.pop(head, None) if model.config.tie_word_embeddings else None
    for name in sorted(table.keys() ^ files.keys()):
        raise ValueError(f"{folder}: tensor {name} is " +
                         ("missing" if name in table else "not part of this model"))
    least = 2 * sum(map(math.prod, shapes.values()))                # of their numbers, in bytes
    if least > sum(path.stat().st_size for path in {*files.values()}):
        raise ValueError(f"{folder}: its files are too small for the shapes of config.json")
    for name in sorted(table, key=lambda name: -sum(shapes[part].numel() for part in table[name])):
        rows = [shapes[part][0] for part in table[name]]
        shape = sum(rows), *shapes[table[name][0]][1:]
        # the tensor has no name here, so that its file is closed before the next one is read
        for part, piece in zip(table[name], read_tensor(files[name], name, shape).split(rows)):
            piece = piece.to(dtype, copy=True)
            if again is not None and part == "model.embed_tokens.weight" and not torch.equal(
                    piece, read_tensor(again, head, piece.shape).to(dtype)):
                raise ValueError(f"{folder}: config.json ties lm_head to the embeddings, but their "
                                 "weights differ")
            yield part, piece


def checkpoint_names(model):
    """Name of each tensor in a checkpoint -> the parameters that it holds, stacked by rows."""
    table, stored = {}, model.config.family.get("stored", {})
    for name in model.state_dict():
        there = ".".join(stored.get(part, part) for part in name.split("."))
        table.setdefault(there, []).append(name)
    return table


def tensor_files(folder):
    """{tensor: its file} of a folder: one file, or shards by an index; safetensors before .bin."""
    names = [SINGLE, f"{SINGLE}.index.json", SINGLE_BIN, f"{SINGLE_BIN}.index.json"]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: has neither {SINGLE} nor {SINGLE_BIN}, nor an index of one")
    shards = [path.name]
    if path.suffix == ".json":
        table, suffix = read_file(path).get("weight_map"), path.suffixes[0]
        shards = sorted({*map(str, table.values())}) if isinstance(table, dict) else [""]
        if not all(Path(shard).name == shard and shard.endswith(suffix) for shard in shards):
            raise ValueError(f"{path}: must map tensors to {suffix} files of this folder")
    files = {}
    for path in (folder / shard for shard in shards):
        for name in map(str, read_file(path)):
            if name in files:
                raise ValueError(f"{path}: tensor {name} is in another shard too")
            if not name.endswith(".rotary_emb.inv_freq"):           # follows from config.json
                files[name] = path
    return files


def read_tensor(path, name, shape):
    """One tensor, checked. The file is opened for it alone: while open, all that was read stays."""
    tensor = read_file(path, name)
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    found = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if plain else "no plain tensor"
    if not (plain and tensor.dtype in DTYPES and tensor.shape == shape and not tensor.is_meta
            and torch.stack(tensor.aminmax()).float().isfinite().all()):
        raise ValueError(f"{path}: tensor {name} must hold finite numbers of shape {tuple(shape)}, "
                         f"as config.json says, not quantised; it is {found}")
    return tensor


def read_file(path, name=None):
    """What a file of a model folder holds, by name: .json values, .bin tensors, .safetensors names
    alone. With a name, the tensor of that name, mapped and not yet read."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return dict.fromkeys(file.keys()) if name is None else file.get_tensor(name)
        content = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else \
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, nothing under names")
        return content if name is None else content[name]
    except Exception as error:                          # a damaged pickle raises anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: cannot be read ({reason}); is the file whole?") from None
