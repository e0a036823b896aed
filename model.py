"""A compact Llama-layout decoder: Hugging Face folders in and out, response log-probabilities, generation.

Parameter names are Hugging Face's own, so a checkpoint loads without a table of names. Knows token ids and
folders only: no tokenizer, no training.

    model = Decoder.from_pretrained("folder")            # config.json + model.safetensors (or its shards)
    logits = model(input_ids)                            # (B, T, V)
    chosen_logps, rejected_logps = response_logps(model, batch)
    answers = generate(model, [[1, 5, 7], [1, 9]], max_new_tokens=20, temperature=0, eos_id=2)

Shapes: B rows, T tokens, D hidden size, H heads, K key/value heads, d head size, V vocabulary, S keys seen.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file


# ----------------------------------------------------------------------------------------------------------
# The shape of a model: config.json

@dataclass(frozen=True)
class DecoderConfig:
    """The fields of a Llama config.json that this decoder computes with, under Hugging Face's names."""
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

    @classmethod
    def from_json(cls, path):
        """Read a config.json; ValueError where it describes something this decoder would compute wrongly."""
        raw = {name: value for name, value in read_json(path).items() if value is not None}
        rope = {}
        for name in ("rope_scaling", "rope_parameters"):                        # as transformers 4 and 5 spell it
            value = raw.get(name) or {}
            if not isinstance(value, dict) or value.get("rope_type", value.get("type", "default")) != "default":
                raise ValueError(f"{path}: {name} is {value!r}, which this decoder does not compute")
            rope |= value
        plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}             # Llama's own defaults
        for name, right in {"model_type": "llama", **plain}.items():
            value = raw.get(name, plain.get(name))
            if value != right:
                raise ValueError(f"{path}: {name} is {value!r}, which this decoder does not compute")
        known = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        try:
            heads, eos = raw["num_attention_heads"], raw.get("eos_token_id")
            known.setdefault("num_key_value_heads", heads)
            known.setdefault("head_dim", raw["hidden_size"] // heads)
            known |= {"rope_theta": rope.get("rope_theta") or raw.get("rope_theta") or 10000.0,
                      "eos_token_id": tuple(eos) if isinstance(eos, list) else eos}
            config = cls(**known)
            config.check()
            return config
        except KeyError as error:
            raise ValueError(f"{path}: not the config of a Llama model (it has no {error.args[0]})") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{path}: not the config of a Llama model ({error})") from None

    def check(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if type(getattr(self, name)) is not int or not 0 < getattr(self, name) < 2**31:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not a positive whole number")
        for name in ("rms_norm_eps", "rope_theta"):
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}, not a positive number")
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError(f"tie_word_embeddings is {self.tie_word_embeddings!r}, neither true nor false")
        if self.head_dim % 2 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("the head size must be even, the heads a multiple of the key/value heads")

    def to_json(self, path, dtype):
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}          # transformers 5; 4 reads rope_theta
        fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
                   "attention_bias": False, "mlp_bias": False, "rope_parameters": rope,
                   "torch_dtype": str(dtype).removeprefix("torch.")}
        Path(path).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def read_json(path):
    """A JSON object from a file; ValueError with one sentence where there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a model folder holds config.json and model.safetensors") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


# ----------------------------------------------------------------------------------------------------------
# The decoder

def rotary(positions, head_dim, theta):
    """cos and sin of the rotary angles, each (B, 1, T, d), float32; both halves of d turn by the same angles."""
    inverse_frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)    # (d/2)
    angles = positions[:, None, :, None].float() * inverse_frequency                                # (B, 1, T, d/2)
    angles = torch.cat([angles, angles], dim=-1)                                                    # (B, 1, T, d)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary position embedding in the half-split layout of Hugging Face's Llama."""
    left, right = x.chunk(2, dim=-1)                                                                # (B, H, T, d/2)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)                          # (B, H, T, d)


class KVCache:
    """Keys and values of every layer for B rows, allocated once; `keep` drops rows that are finished."""

    def __init__(self, config, rows, length, device, dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.keys, self.values = torch.empty(2, *shape, device=device, dtype=dtype)               # 2 x (L, B, K, S, d)
        self.filled = 0

    def append(self, layer, k, v):
        """Store the keys and values (B, K, T, d) of the tokens that follow; returns all so far, (B, K, S, d)."""
        end = self.filled + k.shape[2]
        self.keys[layer, :, :, self.filled:end] = k
        self.values[layer, :, :, self.filled:end] = v
        if layer == len(self.keys) - 1:
            self.filled = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows):
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, layer, cache):
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads).transpose(1, 2), cos, sin)                            # (B, H, T, d)
        k = rotate(self.k_proj(x).view(heads).transpose(1, 2), cos, sin)                            # (B, K, T, d)
        v = self.v_proj(x).view(heads).transpose(1, 2)                                              # (B, K, T, d)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                                        # (B, K, S, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))                                          # (B, T, D)


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

    def forward(self, x, *attention_inputs):
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids to logits. No dropout: AGENT and ENV with the same weights must give the same numbers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)})
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:                                # the norms keep their ones
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids, positions=None, attention_mask=None):
        """Logits (B, T, V) for input_ids (B, T). `positions` (B, T) default to 0, 1, 2, ...; `attention_mask` is
        boolean, True = may attend, (B, T) over keys or (B, T, T), and is intersected with the causal mask."""
        B, T = input_ids.shape
        if positions is None:
            positions = torch.arange(T, device=input_ids.device).expand(B, T)
        return self.head(self.hidden(input_ids, positions, causal(attention_mask, T)))

    def hidden(self, input_ids, positions, mask=None, cache=None):
        """Final hidden states (B, T, D). `mask` is (B, 1, T, S) as `causal` makes it, None for plainly causal."""
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x = self.model.embed_tokens(input_ids)                                                      # (B, T, D)
        for layer, block in enumerate(self.model.layers):
            x = block(x, cos, sin, mask, layer, cache)
        return self.model.norm(x)

    def head(self, hidden):
        """Vocabulary projection (..., D) -> (..., V), apart from `hidden` because it is needed at few positions."""
        return F.linear(hidden, self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @classmethod
    def from_pretrained(cls, folder):
        """Read a Hugging Face folder; weights become float32. ValueError with one sentence where it cannot."""
        folder = Path(folder)
        config = DecoderConfig.from_json(folder / "config.json")
        with torch.device("meta"):                                  # no memory until the checkpoint's tensors are in
            model = cls(config)
        expected = {name: parameter.shape for name, parameter in model.named_parameters()}
        tensors = {}
        for path in weight_files(folder):
            try:
                with safetensors.safe_open(path, framework="pt") as shard:
                    for name in shard.keys():
                        if name in tensors:
                            raise ValueError(f"{path}: tensor {name} is in another shard too")
                        tensors[name] = shard.get_tensor(name)
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(f"{path}: cannot be read as safetensors ({error}); is the file whole?") from None
        head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
        for name in sorted(expected.keys() ^ tensors.keys()):
            problem = "missing" if name in expected else "not part of this model"
            raise ValueError(f"{folder}: tensor {name} is {problem}")
        if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):     # some store it twice
            raise ValueError(f"{folder}: config.json ties lm_head to the embeddings, but their weights differ")
        for name, tensor in tensors.items():
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                raise ValueError(f"{folder}: tensor {name} is {tensor.dtype}; quantised weights are not read")
            if tensor.shape != expected[name]:
                raise ValueError(f"{folder}: tensor {name} has shape {tuple(tensor.shape)}, but config.json says "
                                 f"{tuple(expected[name])}")
            if not tensor.isfinite().all():
                raise ValueError(f"{folder}: tensor {name} holds values that are not finite")
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which transformers reads as LlamaForCausalLM."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors.partial", metadata={"format": "pt"})
        (folder / "model.safetensors.partial").replace(folder / "model.safetensors")
        self.config.to_json(folder / "config.json", next(self.parameters()).dtype)


def weight_files(folder):
    """The safetensors files of a folder: model.safetensors, or the shards its index names."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ValueError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    names = read_json(index).get("weight_map")
    names = names.values() if isinstance(names, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors") for name in names):
        raise ValueError(f"{index}: weight_map must map tensors to .safetensors files of this folder")
    return [folder / name for name in sorted(set(names))]


def causal(attention_mask, T):
    """(B, T) or (B, T, T) boolean, or None, to the mask of `hidden`: (B, 1, T, T), or None for plainly causal.

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

def response_logps(model, batch):
    """log pi(y_w|x) and log pi(y_l|x): two (B,) float32 tensors, summed over response tokens, EOS included.

    `batch` is a data.PairBatch: rows [prompt | chosen | rejected] where rejected goes on at the prompt's
    positions and does not see chosen. The token at place r of a response is predicted one position earlier,
    the first one by the last prompt token; only those positions meet the vocabulary.
    """
    hidden = model.hidden(batch.input_ids, batch.positions, causal(batch.attention_mask, batch.input_ids.shape[1]))
    # the N response tokens of all 2B answers: the row each stands in, and the place there that predicts it
    rows = torch.arange(len(batch), device=hidden.device).repeat(2)[:, None].expand_as(batch.mask)  # (2B, R)
    logits = model.head(hidden[rows[batch.mask], batch.predictors[batch.mask]])                     # (N, V)
    token_logps = -F.cross_entropy(logits.float(), batch.targets[batch.mask], reduction="none")     # (N,)
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
    cache = KVCache(model.config, len(prompts), len(place), device, next(model.parameters()).dtype)

    answers = [[] for _ in prompts]
    alive = torch.arange(len(prompts), device=device)              # which prompt each row of the batch continues
    hidden = model.hidden(ids, positions[:, :longest].clamp(min=0), causal(positions[:, :longest] >= 0, longest), cache)
    for end in range(longest, longest + max_new_tokens):           # `end` tokens are in the cache
        logits = model.head(hidden[:, -1]).float()                                                  # (B, V)
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
        hidden = model.hidden(next_ids[:, None], positions[:, end:end + 1], seen, cache)
    return answers
