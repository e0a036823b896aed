"""A compact decoder of the Llama family: Hugging Face folders in and out, response log-probabilities, generation.

Llama, Mistral, Qwen2, Qwen3 and Baichuan2-7B are one architecture with the few differences that FAMILIES lists.
Parameter names are Hugging Face's own. Knows token ids and folders only: no tokenizer, no training.

    model = Decoder.from_pretrained("folder")            # config.json and weights
    logits = model(input_ids)                            # (B, T, V)
    chosen_logps, rejected_logps = response_logps(model, batch)
    answers = generate(model, [[1, 5, 7], [1, 9]], max_new_tokens=20, temperature=0, eos_id=2)

Shapes: B rows, T tokens, D hidden size, H heads, K key/value heads, d head size, V vocabulary, S keys seen.
"""

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors.torch import save_file


# ----------------------------------------------------------------------------------------------------------
# The shape of a model: config.json

@dataclass(frozen=True)
class Family:
    """What sets the models of one model_type apart from Llama's."""
    architecture: str                   # the class that transformers loads them as
    qkv_bias: bool = False              # queries, keys and values have a bias
    qk_norm: bool = False               # each head's queries and keys pass an RMSNorm before they are rotated
    norm_head: bool = False             # the rows of lm_head count as vectors of length 1, in training too
    stored: dict = field(default_factory=dict)         # parameter here -> its name in a checkpoint, where they differ


FAMILIES = {"llama": Family("LlamaForCausalLM"),
            "mistral": Family("MistralForCausalLM"),
            "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
            "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
            "baichuan": Family("BaichuanForCausalLM", norm_head=True,              # Baichuan2-7B
                               stored={"q_proj": "W_pack", "k_proj": "W_pack", "v_proj": "W_pack"})}


def linear_scaling(frequencies, factor):
    """Positions `factor` times as close together."""
    return frequencies / factor


def llama3_scaling(frequencies, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Waves longer than original / low are slowed by `factor`, those shorter than original / high are left alone,
    and what lies between is blended."""
    waves = original_max_position_embeddings * frequencies / (2 * math.pi)          # of each in the original context
    blend = ((waves - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies


# rope_type: (the function, what it needs of config.json)
ROPE_SCALINGS = {"linear": (linear_scaling, ("factor",)),
                 "llama3": (llama3_scaling, ("factor", "low_freq_factor", "high_freq_factor",
                                             "original_max_position_embeddings"))}


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
    eos_token_id: int | tuple | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"
    rope_scaling: dict | None = None            # rope_type and what ROPE_SCALINGS says it needs; None: not scaled
    source: dict | None = field(default=None, compare=False, repr=False)      # the config.json it was read from

    @property
    def family(self):
        return FAMILIES[self.model_type]

    @classmethod
    def from_json(cls, path):
        """Read a config.json; ValueError where it describes something this decoder would compute wrongly."""
        source = read_json(path)
        raw = {name: value for name, value in source.items() if value is not None}
        known = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        try:
            refuse_unsupported(source)
            heads, hidden_size, eos = raw["num_attention_heads"], raw["hidden_size"], raw.get("eos_token_id")
            # a KeyError names what is missing
            known |= {name: raw[name] for name in ("vocab_size", "intermediate_size", "num_hidden_layers")}
            known.setdefault("num_key_value_heads", heads)
            known.setdefault("head_dim", hidden_size // heads if heads else 0)
            known["rope_theta"], known["rope_scaling"] = read_rope(raw)
            config = cls(**known | {"source": source, "eos_token_id": tuple(eos) if isinstance(eos, list) else eos})
            config.check()
            return config
        except KeyError as error:
            raise ValueError(f"{path}: has no {error.args[0]}, which the config of such a model needs") from None
        except TypeError as error:
            raise ValueError(f"{path}: has something else where a number should be ({error})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def check(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if type(getattr(self, name)) is not int or not 0 < getattr(self, name) < 2**24:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not a positive whole number (below 2^24)")
        scaling = {name: value for name, value in (self.rope_scaling or {}).items() if name != "rope_type"}
        for name, value in {"rms_norm_eps": self.rms_norm_eps, "rope_theta": self.rope_theta, **scaling}.items():
            if type(value) not in (int, float) or not 0 < value < 1e15:
                raise ValueError(f"{name} is {value!r}, not a positive number")
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError(f"tie_word_embeddings is {self.tie_word_embeddings!r}, neither true nor false")
        if self.head_dim % 2 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("the head size must be even, the heads a multiple of the key/value heads")
        if "high_freq_factor" in scaling and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError("low_freq_factor must be below high_freq_factor")

    def to_json(self, path, dtype):
        """Write config.json: what was read, if anything was, with the dtype that is saved now."""
        dtype_name = "dtype" if "dtype" in (self.source or {}) else "torch_dtype"       # transformers 5 and 4
        fields = self.source
        if fields is None:
            fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "source"}
            rope = {**(self.rope_scaling or {"rope_type": "default"}), "rope_theta": self.rope_theta}
            fields |= {"architectures": [self.family.architecture], "hidden_act": "silu", "rope_parameters": rope}
            if self.model_type == "mistral":
                fields["sliding_window"] = None                     # absent would mean 4096
        fields = {**fields, dtype_name: str(dtype).removeprefix("torch.")}
        Path(path).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def refuse_unsupported(raw):
    """ValueError for what a config.json asks for and this decoder would silently compute otherwise."""
    kind, positions = raw.get("model_type"), raw.get("max_position_embeddings")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not computed here, only {', '.join(FAMILIES)}")
    for name, right in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
                        "is_causal": True, "quantization_config": None}.items():
        if raw.get(name) is not None and raw[name] != right:
            raise ValueError(f"{name} {raw[name]!r} is not computed here, only {right!r}")
    if kind == "baichuan":
        # the first generation has W_pack too, but a plain head; it spells its class so, or has its own vocabulary
        first = "z_loss_weight" not in raw and ("BaiChuan" in json.dumps(raw) or raw.get("vocab_size") == 64000)
        if first or positions is None or read_rope(raw) != (10000.0, None):
            raise ValueError("of the Baichuan models only Baichuan2-7B is computed here, neither the first generation, "
                             "nor 13B (it has no max_position_embeddings), nor other rotary positions")
    window = raw.get("sliding_window", 4096)                                    # what transformers takes for absent
    if slides(raw) and window is not None and (positions is None or window < positions):
        raise ValueError(f"sliding_window {window} is not computed here; it changes nothing up to {window} tokens, for "
                         f"which sliding_window null and max_position_embeddings {window} will do")


def slides(raw):
    """Does any layer of this config.json look at sliding_window?"""
    if raw["model_type"] in ("qwen2", "qwen3") and raw.get("use_sliding_window"):
        layers = raw.get("layer_types")
        return "sliding_attention" in layers if layers else raw.get("max_window_layers", 28) < raw["num_hidden_layers"]
    return raw["model_type"] == "mistral"


def read_rope(raw):
    """(rope_theta, rope_scaling) from either spelling: rope_theta and rope_scaling, or both in rope_parameters."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}          # the precedence of transformers
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling or rope_parameters is {rope!r}, not a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    odd = rope.get("partial_rotary_factor", 1.0) != 1.0 or any(isinstance(value, dict) for value in rope.values())
    if odd or kind not in ("default", *ROPE_SCALINGS):
        raise ValueError(f"rotary positions {rope!r} are not computed here, only default, {', '.join(ROPE_SCALINGS)}")
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    if kind == "default":
        return theta, None
    original = "original_max_position_embeddings"                               # found in any of three places there
    rope = {**rope, original: raw.get(original) or rope.get(original) or raw.get("max_position_embeddings")}
    return theta, {"rope_type": kind, **{name: rope[name] for name in ROPE_SCALINGS[kind][1]}}


def read_json(path):
    """A JSON object from a file; ValueError with one sentence where there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a model folder holds config.json and weights") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


# ----------------------------------------------------------------------------------------------------------
# The decoder

def rotary(positions, config):
    """cos and sin of the rotary angles, each (B, T, 1, d), float32. Both halves of d turn by the same angles; the sines
    of the first half are negated, as `rotate` wants them."""
    powers = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim        # (d/2)
    frequencies = 1 / config.rope_theta ** powers                                                   # (d/2)
    if config.rope_scaling is not None:
        scale, needed = ROPE_SCALINGS[config.rope_scaling["rope_type"]]
        frequencies = scale(frequencies, *(config.rope_scaling[name] for name in needed))
    angles = positions[:, :, None, None].float() * frequencies                                      # (B, T, 1, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)                            # (B, T, 1, d)


def rotate(x, cos, sin):
    """Rotary position embedding in the half-split layout of Hugging Face's Llama."""
    left, right = x.chunk(2, dim=-1)                                                                # (B, T, H, d/2)
    return torch.addcmul(x * cos, torch.cat([right, left], dim=-1), sin).to(x.dtype)                # (B, T, H, d)


# Who sees whom: each of these is `attend` of Decoder.hidden, once its first arguments are given

def attention(q, k, v, mask):
    """What the queries (B, T, H, d) read from the keys and values (B, S, K, d): (B, T, H, d). `mask` says who sees
    whom, by booleans (True = may attend) or by what is added to the scores, and broadcasts to (B, H, T, S); None is
    plainly causal, with S = T. H is a multiple of K."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                                # (B, H, T, d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)                                                                      # (B, T, H, d)


def attend_causally(mask, layer, q, k, v):
    """Rows of one sequence each. `mask` is (B, 1, T, T) as `causal` makes it, None for plainly causal."""
    return attention(q, k, v, mask)


def attend_pairs(masks, predicting, layer, q, k, v):
    """A data.PairBatch, all its pairs in one row. Of each pair the last tokens see what its mask says, which is of q's
    dtype and has a row for every one of them; those before, the beginning of a long prompt, are plainly causal. In the
    last layer only the tokens that predict have queries, `predicting` of each pair, and they are among the last."""
    tokens = [mask.shape[1] for mask in masks]
    if q.shape[1] == k.shape[1]:
        sizes = [(mask.shape[1] - len(mask), len(mask)) for mask in masks]
    else:
        sizes = [(0, last) for last in predicting]
    queries = iter(q.split([size for pair in sizes for size in pair if size], dim=1))
    out = []
    for (plain, masked), mask, k, v in zip(sizes, masks, k.split(tokens, dim=1), v.split(tokens, dim=1)):
        if plain:
            out.append(attention(next(queries), k[:, :plain], v[:, :plain], None))                  # (1, plain, H, d)
        out.append(attention(next(queries), k, v, mask[-masked:]))                                  # (1, masked, H, d)
    return torch.cat(out, dim=1)


def attend_cached(cache, mask, layer, q, k, v):
    """The tokens that follow those in a KVCache; `mask` is (B, 1, T or 1, S)."""
    return attention(q, *cache.append(layer, k, v), mask[:, :, -q.shape[1]:])


def causal(attention_mask, T):
    """(B, T) or (B, T, T) boolean, or None, to the mask of `attend_causally`: (B, 1, T, T), or None for plainly causal.

    Every position sees itself, so that no row of the softmax is empty; what a padding position computes is
    read by nobody.
    """
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"attention_mask must be boolean (True = may attend), not {attention_mask.dtype}")
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None]                                                    # (B, 1, T)
    positions = torch.arange(T, device=attention_mask.device)
    earlier, itself = positions[:, None] > positions, positions[:, None] == positions               # (T, T)
    return (attention_mask & earlier | itself)[:, None]                                             # (B, 1, T, T)


class KVCache:
    """Keys and values of every layer for B rows, allocated once; `keep` drops rows that are finished."""

    def __init__(self, config, rows, length, device, dtype):
        shape = (config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = torch.empty(2, *shape, device=device, dtype=dtype)               # 2 x (L, B, S, K, d)
        self.filled = 0

    def append(self, layer, k, v):
        """Store the keys and values (B, T, K, d) of the tokens that follow; returns all so far, (B, S, K, d)."""
        end = self.filled + k.shape[1]
        self.keys[layer, :, self.filled:end] = k
        self.values[layer, :, self.filled:end] = v
        if layer == len(self.keys) - 1:
            self.filled = end
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def keep(self, rows):
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class Attention(nn.Module):
    """Self-attention with grouped key/value heads; who sees whom is for `attend` to say, see Decoder.hidden."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.family.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.family.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.family.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.family.qk_norm
                                    else nn.Identity() for _ in range(2))

    def forward(self, x, cos, sin, attend, wanted):
        heads = -1, self.head_dim
        q = self.q_norm(self.q_proj(x[:, wanted]).unflatten(2, heads))                              # (B, Q, H, d)
        k = self.k_norm(self.k_proj(x).unflatten(2, heads))                                         # (B, T, K, d)
        v = self.v_proj(x).unflatten(2, heads)                                                      # (B, T, K, d)
        out = attend(rotate(q, cos[:, wanted], sin[:, wanted]), rotate(k, cos, sin), v)             # (B, Q, H, d)
        return self.o_proj(out.flatten(2))                                                          # (B, Q, D)


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend, wanted):
        x = x[:, wanted] + self.self_attn(self.input_layernorm(x), cos, sin, attend, wanted)        # (B, Q, D)
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:                                 # there it would load torch's compiler, 70 MB
            super().reset_parameters()


class Decoder(nn.Module):
    """Token ids to logits. No dropout: AGENT and ENV with the same weights must give the same numbers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)})
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = self.compiled = False
        for name, parameter in self.named_parameters():
            if parameter.is_meta:                                   # from_pretrained brings the values
                continue
            if parameter.dim() == 2:                                # the norms keep their ones
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids, positions=None, attention_mask=None):
        """Logits (B, T, V) for input_ids (B, T). `positions` (B, T) default to 0, 1, 2, ...; `attention_mask` is
        boolean, True = may attend, (B, T) over keys or (B, T, T), and is intersected with the causal mask."""
        B, T = input_ids.shape
        if positions is None:
            positions = torch.arange(T, device=input_ids.device).expand(B, T)
        attend = functools.partial(attend_causally, causal(attention_mask, T))
        return F.linear(self.hidden(input_ids, positions, attend), self.head())

    def hidden(self, input_ids, positions, attend, wanted=slice(None)):
        """Final hidden states (B, Q, D) of the Q `wanted` places of input_ids (B, T), a slice or a tensor of indices.

        `attend(layer, q, k, v)` is given each layer's queries (B, T, H, d), keys and values (B, T, K, d), rotated, and
        returns what the queries read. In the last layer there are queries at the wanted places alone, (B, Q, H, d):
        nobody reads the others.
        """
        cos, sin = rotary(positions, self.config)
        x = self.model.embed_tokens(input_ids)                                                      # (B, T, D)
        if self.compiled:
            attend = torch.compiler.disable(attend)
        for layer, block in enumerate(self.model.layers):
            last = layer == len(self.model.layers) - 1
            inputs = x, cos, sin, functools.partial(attend, layer), wanted if last else slice(None)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        return self.model.norm(x)

    def compile_layers(self):
        """By torch.compile, for rows of any length; what attends stays as it is."""
        torch._dynamo.config.recompile_limit = 32                  # with and without gradient, generation, the last layer
        self.compiled = True
        for block in self.model.layers:
            block.compile(dynamic=True)

    def head(self):
        """The weight (V, D) of the vocabulary projection, apart from `hidden` because it is needed at few places."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight    # (V, D)
        return F.normalize(weight, dim=-1) if self.config.family.norm_head else weight              # with its gradient

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def checkpoint_names(self):
        """Name of each tensor in a checkpoint -> the parameters here that it holds, stacked along its rows."""
        table = {}
        for name in self.state_dict():
            there = ".".join(self.config.family.stored.get(part, part) for part in name.split("."))
            table.setdefault(there, []).append(name)
        return table

    @classmethod
    def from_pretrained(cls, folder):
        """Read a Hugging Face folder; weights become float32. ValueError with one sentence where it cannot.

        Besides the model itself no more than one tensor is in memory, the largest first, while there is room.
        """
        folder = Path(folder)
        config = DecoderConfig.from_json(folder / "config.json")
        with torch.device("meta"):                                  # no memory until the checkpoint's tensors are in
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        table, files = model.checkpoint_names(), tensor_files(folder)
        head = files.pop("lm_head.weight", None) if config.tie_word_embeddings else None
        for name in sorted(table.keys() ^ files.keys()):
            problem = "missing" if name in table else "not part of this model"
            raise ValueError(f"{folder}: tensor {name} is {problem}")
        if head is not None:                                        # some store it twice
            name = "model.embed_tokens.weight"
            twice = read_tensor(head, "lm_head.weight", shapes[name]), read_tensor(files[name], name, shapes[name])
            if not all(torch.equal(a.float(), b.float()) for a, b in zip(*(tensor.split(1024) for tensor in twice))):
                raise ValueError(f"{folder}: config.json ties lm_head to the embeddings, but their weights differ")
            del twice
        weights = {}
        for name in sorted(table, key=lambda name: -sum(shapes[part].numel() for part in table[name])):
            rows = [shapes[part][0] for part in table[name]]
            expected = (sum(rows), *shapes[table[name][0]][1:])
            parts = read_tensor(files[name], name, expected).split(rows)
            weights |= {part: tensor.to(torch.float32, copy=True) for part, tensor in zip(table[name], parts)}
        model.load_state_dict(weights, assign=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, or its shards and their index, under the names that transformers
        knows."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, table = self.state_dict(), self.checkpoint_names()
        shards, room = [], 0
        for name, parts in table.items():
            size = sum(weights[part].nbytes for part in parts)
            if not shards or size > room:
                shards, room = shards + [[]], SHARD_BYTES
            shards[-1].append(name)
            room -= size
        index, single = {}, len(shards) == 1
        for number, names in enumerate(shards, start=1):
            path = folder / (SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            tensors = {name: [weights[part].cpu() for part in table[name]] for name in names}
            tensors = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in tensors.items()}
            save_file(tensors, f"{path}.partial", metadata={"format": "pt"})
            Path(f"{path}.partial").replace(path)
            index |= dict.fromkeys(names, path.name)
        if not single:
            total = sum(tensor.nbytes for tensor in weights.values())
            content = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
            (folder / f"{SINGLE}.index.json").write_text(content + "\n", encoding="utf-8")
            index["index"] = f"{SINGLE}.index.json"
        for path in folder.glob("model*.safetensors*"):             # of an earlier save, in more or fewer shards
            if path.name not in index.values():
                path.unlink()
        self.config.to_json(folder / "config.json", next(self.parameters()).dtype)


# ----------------------------------------------------------------------------------------------------------
# Checkpoint files

SINGLE, SINGLE_BIN = "model.safetensors", "pytorch_model.bin"
SHARD_BYTES = 5 * 10**9
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor_files(folder):
    """{tensor: the file it lies in} of a folder: one file or the shards that an index names, safetensors first."""
    for single in (SINGLE, SINGLE_BIN):
        if (folder / single).is_file():
            paths = [folder / single]
            break
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = read_json(index).get("weight_map")
            names = names.values() if isinstance(names, dict) else [None]
            suffix = Path(single).suffix
            if not all(isinstance(name, str) and Path(name).name == name and name.endswith(suffix) for name in names):
                raise ValueError(f"{index}: weight_map must map tensors to {suffix} files of this folder")
            paths = [folder / name for name in sorted(set(names))]
            break
    else:
        raise ValueError(f"{folder}: has neither {SINGLE} nor {SINGLE_BIN}, nor an index of one")
    files = {}
    for path in paths:
        for name in read_checkpoint(path):
            if name in files:
                raise ValueError(f"{path}: tensor {name} is in another shard too")
            if not name.endswith(".rotary_emb.inv_freq"):           # follows from config.json; old checkpoints store it
                files[name] = path
    return files


def read_checkpoint(path, name=None):
    """The tensor of that name in one file, mapped and not yet read; without a name, the names of all. ValueError where
    it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return list(file.keys()) if name is None else file.get_tensor(name)
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(tensors, dict) or not all(
                isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
                and value.device.type == "cpu" for key, value in tensors.items()):
            raise ValueError("it holds other things than plain tensors")
        return list(tensors) if name is None else tensors[name]
    except Exception as error:                                      # a damaged pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read ({reason}); is the file whole?") from None


def read_tensor(path, name, shape):
    """One tensor, checked. The file is opened for it alone: while it is open, all that was ever read of it stays."""
    tensor = read_checkpoint(path, name)
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {name} is {tensor.dtype}; quantised weights are not read")
    if tensor.shape != shape:
        raise ValueError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, but config.json says {tuple(shape)}")
    if not torch.stack(tensor.aminmax()).float().isfinite().all():
        raise ValueError(f"{path}: tensor {name} holds values that are not finite")
    return tensor


def find_device(name):
    """A torch.device by name; "auto" is cuda where there is one, else cpu. ValueError if it is not to be had."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("only cpu, cuda and mps are known")
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name} is not to be had here ({str(error).splitlines()[0]})") from None


# ----------------------------------------------------------------------------------------------------------
# Response log-probabilities

CHUNK = 512                 # tokens that meet the vocabulary at once


class TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight^T) at the targets: hidden (N, D), weight (V, D), targets (N) -> (N), float32. Products
    are formed in the dtype of hidden; the weight's gradient is summed over the chunks in the weight's own.

    Logits exist for one chunk of tokens at a time; the backward pass computes them again. In it, the derivative of
    log softmax(z)_target by z is onehot(target) - softmax(z).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        ctx.save_for_backward(hidden, weight, targets)
        weight = weight.to(hidden.dtype)
        return torch.cat([-F.cross_entropy(F.linear(some, weight).float(), these, reduction="none")
                          for some, these in zip(hidden.split(CHUNK), targets.split(CHUNK))])       # (N,)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight, weight = [], torch.zeros_like(weight), weight.to(hidden.dtype)
        for some, these, upstream in zip(hidden.split(CHUNK), targets.split(CHUNK), grad.split(CHUNK)):
            by_logits = torch.softmax(F.linear(some, weight).float(), dim=1)                        # (n, V)
            by_logits[torch.arange(len(these), device=these.device), these] -= 1
            by_logits = by_logits.mul_(-upstream[:, None]).to(hidden.dtype)
            grad_hidden.append(by_logits @ weight)                                                  # (n, D)
            grad_weight += by_logits.T @ some                                                       # (V, D)
            del by_logits                                          # before the next chunk's
        return torch.cat(grad_hidden), grad_weight, None


def response_logps(model, batch):
    """log pi(y_w|x) and log pi(y_l|x): two (B,) float32 tensors, summed over response tokens, EOS included.

    `batch` is a data.PairBatch: one row of [prompt | chosen | rejected] after another, where rejected goes on at the
    prompt's positions and does not see chosen. The token at place r of a response is predicted one position earlier,
    the first one by the last prompt token; only those positions leave the last layer and meet the vocabulary.
    """
    kind, dtype = model.device.type, next(model.parameters()).dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype            # of the products
    attend = functools.partial(attend_pairs, [mask.to(dtype) for mask in batch.masks], batch.predicting)
    hidden = model.hidden(batch.input_ids, batch.positions, attend, batch.wanted)[0].to(dtype)      # (M, D)
    hidden = hidden[batch.predictors[batch.mask]]                  # (N, D): the N response tokens of all 2B answers
    token_logps = TokenLogps.apply(hidden, model.head(), batch.targets[batch.mask])                 # (N,)
    padded = token_logps.new_zeros(batch.mask.shape).masked_scatter(batch.mask, token_logps)        # (2B, R)
    return padded.sum(dim=1).chunk(2)                                                               # (B,), (B,)


# ----------------------------------------------------------------------------------------------------------
# Generation

@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature, eos_id, generator=None):
    """Continue prompts (lists of token ids, of different lengths) in one batch; returns the lists of new ids,
    without prompt and EOS. `eos_id` is an int or several; temperature 0 takes the likeliest token. Random draws
    come from `generator`, a torch.Generator on the model's device.
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens cannot be continued")
    if temperature < 0 or max_new_tokens < 0:
        raise ValueError(f"temperature {temperature} and max_new_tokens {max_new_tokens} must be at least 0")
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    device = model.device
    stop = torch.as_tensor(eos_id, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)                      # (B,)
    longest = int(lengths.max())
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]                   # all end together
    ids = torch.tensor(padded, device=device)                                                       # (B, T)
    place = torch.arange(longest + max_new_tokens, device=device)
    positions = place - (longest - lengths)[:, None]               # (B, S), negative where there is padding
    head = model.head()                                            # (V, D)
    cache = KVCache(model.config, len(prompts), len(place), device, next(model.parameters()).dtype)

    answers = [[] for _ in prompts]
    alive = torch.arange(len(prompts), device=device)              # which prompt each row of the batch continues
    attend = functools.partial(attend_cached, cache, causal(positions[:, :longest] >= 0, longest))
    hidden = model.hidden(ids, positions[:, :longest].clamp(min=0), attend, wanted=slice(-1, None))
    for end in range(longest, longest + max_new_tokens):           # `end` tokens are in the cache
        logits = F.linear(hidden[:, -1], head).float()                                              # (B, V)
        if temperature == 0:
            next_ids = logits.argmax(dim=-1)                                                        # (B,)
        else:
            logits -= logits.max(dim=-1, keepdim=True).values      # so that a tiny temperature does not overflow
            probabilities = torch.softmax(logits / temperature, dim=-1)
            next_ids = torch.multinomial(probabilities, 1, generator=generator)[:, 0]               # (B,)
        going = ~torch.isin(next_ids, stop)                                                         # (B,)
        if not going.all():                                        # finished rows leave the batch
            alive, next_ids, positions = alive[going], next_ids[going], positions[going]
            cache.keep(going)
        for row, token in zip(alive.tolist(), next_ids.tolist()):
            answers[row].append(token)
        if len(alive) == 0 or end + 1 == longest + max_new_tokens:
            break
        seen = (positions[:, :end + 1] >= 0)[:, None, None]                                         # (B, 1, 1, S)
        attend = functools.partial(attend_cached, cache, seen)
        hidden = model.hidden(next_ids[:, None], positions[:, end:end + 1], attend)
    return answers
