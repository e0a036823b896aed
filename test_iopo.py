"""The proof: every claim of the five rooms against an independent computation.

    pip install -r requirements.txt pytest && python -m pytest -q

Where transformers, TRL, pyarrow and sentencepiece are installed (benchmarks/requirements.txt), this is checked against
them; where ../shared holds a real checkpoint and real preference data, the loop runs on them; otherwise those tests say
that they were skipped.
"""

import concurrent.futures
import copy
import gzip
import hashlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import eval as examination
import iopo
import model as decoder
import train
from data import Pair, PairBatch, SafeWorld, Tokenizer, batches, encode_pairs, load_pairs, micro_batches
from model import Decoder, DecoderConfig, generate, response_logps

torch.set_num_threads(1)            # the models are tiny, and a busy machine then costs seconds, not minutes
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
STORIES, HH = SHARED / "models/stories260k", SHARED / "data/hh_harmless_train.jsonl.gz"
needs_shared = pytest.mark.skipif(not STORIES.exists(), reason="no ../shared with a real checkpoint and real data")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def random_logps(n=40, seed=0, scale=30.0):
    """Four float64 (n,) tensors of log-probabilities; AGENT and ENV near each other, as they are in training."""
    generator = torch.Generator().manual_seed(seed)
    env = -scale * torch.rand(2, n, generator=generator, dtype=torch.float64) - 1
    agent = env + torch.randn(2, n, generator=generator, dtype=torch.float64)
    return agent[0], agent[1], env[0], env[1]


# ----------------------------------------------------------------------------------------------------------
# iopo.py: equations against plain float arithmetic

def by_hand(name, w, l, ref_w, ref_l, n_w, n_l, all_pairs):
    """Each loss for one pair, in Python floats, from the papers' formulas (beta .1, eps .3, alpha .07, lambda .2)."""
    h = (w - ref_w) - (l - ref_l)
    if name == "iopo":
        return min(math.exp(l - ref_l), 1.3) * math.log(1 + math.exp(-0.1 * h))
    if name == "dpo":
        return -math.log(sigmoid(0.1 * h))
    if name == "hinge":
        return max(0.0, 1 - 0.1 * h)
    if name == "ipo":
        return ((w - ref_w) / n_w - (l - ref_l) / n_l - 5.0) ** 2
    if name == "kto_pair":
        kl_w = max(0.0, sum(p[0] - p[2] for p in all_pairs) / len(all_pairs))
        kl_l = max(0.0, sum(p[1] - p[3] for p in all_pairs) / len(all_pairs))
        return ((1 - sigmoid(0.1 * (w - ref_w - kl_l))) + (1 - sigmoid(0.1 * (kl_w - l + ref_l)))) / 2
    if name == "sft":
        return -w / n_w
    return -math.log(sigmoid(0.1 * (w - l) - 1.07 * 0.1 * (ref_w - ref_l))) - 0.2 * w / n_w


def lengths(n=40, seed=1):
    return torch.randint(1, 30, (2, n), generator=torch.Generator().manual_seed(seed))


def call(name, *logps, **more):
    """A loss with the lengths it asks for."""
    given = dict(zip(("chosen_lengths", "rejected_lengths"), lengths(len(logps[0]))))
    wanted = inspect.signature(iopo.LOSSES[name]).parameters
    return iopo.LOSSES[name](*logps, **{k: v for k, v in given.items() if k in wanted}, **more)


@pytest.mark.parametrize("name", iopo.LOSSES)
def test_losses_equal_the_formula_in_plain_floats(name):
    logps = random_logps()
    pairs = list(zip(*(column.tolist() for column in logps)))
    expected = [by_hand(name, *pair, n_w, n_l, pairs) for pair, n_w, n_l in zip(pairs, *lengths().tolist())]
    losses = call(name, *logps)
    assert losses.shape == (40,)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", iopo.LOSSES)
def test_loss_gradients_equal_finite_differences(name):
    """Of the sum over the batch, with the ratio of Eq. 14 held constant (it is a weight, not a term)."""
    logps = [column[:6].clone().requires_grad_() for column in random_logps(seed=3)]
    logps[0], logps[1] = ((column + 2).detach().requires_grad_() for column in logps[:2])         # kto_pair's terms act
    losses = call(name, *logps)
    gradients = torch.autograd.grad(losses.sum(), logps[:2], allow_unused=True)
    ratio = iopo.clip_ratio(iopo.importance_ratio(logps[1], logps[3])).double()

    def total(chosen, rejected):
        if name == "iopo":
            return (ratio * call("dpo", chosen, rejected, *logps[2:])).sum()
        return call(name, chosen, rejected, *logps[2:]).sum()

    for which, gradient in enumerate(gradients):
        for place in range(6):
            step = torch.zeros(2, 6, dtype=torch.float64)
            step[which, place] = 1e-5
            with torch.no_grad():
                slope = (total(logps[0] + step[0], logps[1] + step[1])
                         - total(logps[0] - step[0], logps[1] - step[1])) / 2e-5
            assert (0.0 if gradient is None else gradient[place].item()) == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("ratio", ("sequence", "length_normalized", "env", "one"))
@pytest.mark.parametrize("clip", ("min", "two_sided", "none"))
def test_gradient_weight_is_what_autograd_finds(ratio, clip):
    """Eq. 15 (Eq. 8 with ratio one): the weight on log pi(y_w), and its negative on log pi(y_l)."""
    logps = [column.clone().requires_grad_() for column in random_logps(seed=4, scale=3)]
    switches = dict(beta=0.3, eps=0.2, clip=clip, ratio=ratio, rejected_lengths=lengths()[1])
    iopo.iopo_loss(*logps, **switches).sum().backward()
    weight = iopo.iopo_gradient_weight(*logps, **switches).detach()
    assert (weight < 0).all()
    torch.testing.assert_close(logps[0].grad, weight)
    torch.testing.assert_close(logps[1].grad, -weight)


def test_margin_and_probability():
    w, l, env_w, env_l = random_logps(seed=5)
    margin = iopo.preference_margin(w, l, env_w, env_l, beta=0.2)
    for k in range(40):
        h = math.log(math.exp(w[k] - env_w[k]) / math.exp(l[k] - env_l[k]))
        assert margin[k].item() == pytest.approx(0.2 * h)
        # Eq. 1 with the rewards of Eq. 5, and Eq. 13, which may exceed 1
        rewards = 0.2 * (w[k] - env_w[k]), 0.2 * (l[k] - env_l[k])
        q = math.exp(rewards[0]) / (math.exp(rewards[0]) + math.exp(rewards[1]))
        assert iopo.preference_probability(margin)[k].item() == pytest.approx(q)
        assert iopo.preference_probability(margin, torch.tensor(0.25))[k].item() == pytest.approx(4 * q)


def test_importance_ratio():
    agent = torch.tensor([-10.0, -10.0, -3.0, -500.0, -1.0, float("nan"), -float("inf")], requires_grad=True)
    env = torch.tensor([-10.0, -11.0, -5.0, -1.0, -500.0, -1.0, -2.0])
    ratio = iopo.importance_ratio(agent, env)
    assert not ratio.requires_grad and ratio.dtype == torch.float32
    torch.testing.assert_close(ratio[:3], torch.tensor([1.0, math.e, math.e ** 2]))
    assert ratio[3] == ratio[4] == ratio[6] == 1                   # Eq. 11: r = 0 and r = inf count as 1
    assert ratio[5].isnan()                                        # a broken model must show
    for dtype in (torch.float64, torch.bfloat16):
        assert iopo.importance_ratio(agent.to(dtype), env.to(dtype)).dtype == torch.float32
    normalised = iopo.importance_ratio(torch.tensor([-8.0]), torch.tensor([-2.0]), torch.tensor([3]))
    assert normalised.item() == pytest.approx(math.exp(-2))        # geometric mean per token


def test_clip_ratio():
    for r in (0.01, 0.5, 0.69, 0.7, 0.9, 1.0, 1.29, 1.3, 1.31, 50.0):
        value = torch.tensor([r], dtype=torch.float64)
        assert iopo.clip_ratio(value).item() == pytest.approx(min(r, min(max(r, 0.7), 1.3)))       # Eq. 12 as printed
        assert iopo.clip_ratio(value).item() == pytest.approx(min(r, 1.3))                         # what it amounts to
        assert iopo.clip_ratio(value, 0.1, "two_sided").item() == pytest.approx(min(max(r, 0.9), 1.1))
        assert iopo.clip_ratio(value, mode="none").item() == r
    assert iopo.clip_ratio(torch.tensor([float("nan")])).isnan()


def test_readings_of_the_ratio():
    w, l, env_w, env_l = random_logps(seed=6, scale=2)
    n = lengths()[1]
    expected = {"sequence": l - env_l, "length_normalized": (l - env_l) / n, "env": env_w - env_l, "one": 0 * l}
    for name, log_ratio in expected.items():
        ratio = iopo.importance_ratio(*iopo.ratio_terms(l, env_w, env_l, name, n))
        torch.testing.assert_close(ratio.double(), log_ratio.exp(), rtol=1e-5, atol=0)
    for wrong in (dict(ratio="nonsense"), dict(clip="nonsense"), dict(ratio="length_normalized")):
        with pytest.raises(ValueError):
            iopo.iopo_loss(w, l, env_w, env_l, **wrong)


def test_without_ratio_iopo_is_dpo_to_the_last_bit():
    logps = [column.float() for column in random_logps()]
    for clip in ("min", "two_sided", "none"):
        assert torch.equal(iopo.iopo_loss(*logps, ratio="one", clip=clip), iopo.dpo_loss(*logps))


def test_games():
    """With r = 1: exchanged labels give both players the same loss (a team game), equal labels a constant sum."""
    mu_w, mu_l, nu_w, nu_l = random_logps(seed=7)
    swapped = iopo.iopo_loss(nu_l, nu_w, mu_l, mu_w, ratio="one")
    torch.testing.assert_close(swapped, iopo.iopo_loss(mu_w, mu_l, nu_w, nu_l, ratio="one"))
    q_mu = iopo.preference_probability(iopo.preference_margin(mu_w, mu_l, nu_w, nu_l))
    q_nu = iopo.preference_probability(iopo.preference_margin(nu_w, nu_l, mu_w, mu_l))
    torch.testing.assert_close(q_mu + q_nu, torch.ones_like(q_mu))


def test_the_misprints_that_were_mended():
    """Eq. 14 as printed (y_w twice) has no gradient; descent on Eq. 15 as printed goes the wrong way."""
    mu_w, mu_l, nu_w, nu_l = (column.requires_grad_() for column in random_logps(seed=8))
    printed = -F.logsigmoid(0.1 * (mu_w - nu_w) - 0.1 * (mu_w - nu_l))
    torch.testing.assert_close(torch.autograd.grad(printed.sum(), mu_w)[0], torch.zeros(40, dtype=torch.float64))
    printed_weight = -0.1 * F.logsigmoid(iopo.preference_margin(mu_w, mu_l, nu_w, nu_l))          # Eq. 15 with r = 1
    assert (printed_weight > 0).all()
    assert (iopo.iopo_gradient_weight(mu_w, mu_l, nu_w, nu_l, ratio="one") < 0).all()


def test_one_signature():
    for name, loss in iopo.LOSSES.items():
        kinds = [p.kind for p in inspect.signature(loss).parameters.values()]
        assert kinds[:4] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 4, name
        assert all(kind == inspect.Parameter.KEYWORD_ONLY for kind in kinds[4:]), name


@pytest.mark.parametrize("n_iter,n_mu,n_nu", [(0, 3, 3), (1, 1, 1), (2, 3, 2), (3, 0, 2), (3, 2, 0), (4, 5, 7)])
def test_turns_are_algorithm_1(n_iter, n_mu, n_nu):
    expected, i = [], 1
    while i <= n_iter:
        expected += [(i, "protagonist")] * n_mu + [(i, "adversary")] * n_nu
        i += 1
    assert list(iopo.turns(n_iter, n_mu, n_nu)) == expected


# ----------------------------------------------------------------------------------------------------------
# model.py: the decoder against a second one, written differently, in float64

def tiny_config(**changes):
    return DecoderConfig(**{**dict(vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                   num_attention_heads=4, num_key_value_heads=2, head_dim=8, eos_token_id=2), **changes})


def tiny_model(seed=0, **changes):
    """A random decoder with weights large enough for confident, varied predictions."""
    torch.manual_seed(seed)
    model = Decoder(tiny_config(**changes))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 0.1) + (parameter.dim() == 1)
    return model


def plain_logits(folder, ids):
    """A checkpoint folder's forward pass for one sequence, in float64, token by token and head by head, with complex
    rotation, from config.json (either spelling) and the tensors as they are stored."""
    c = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.double() for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items()}
    heads, eps = c["num_attention_heads"], c["rms_norm_eps"]
    kv_heads = c.get("num_key_value_heads", heads)
    d = c.get("head_dim") or c["hidden_size"] // heads
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or c["rope_theta"]

    def frequency(k):
        f = theta ** (-2 * k / d)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "linear":
            return f / rope["factor"]
        if kind == "llama3":
            wavelength, original = 2 * math.pi / f, rope["original_max_position_embeddings"]
            if wavelength > original / rope["low_freq_factor"]:
                return f / rope["factor"]
            if wavelength > original / rope["high_freq_factor"]:
                smooth = (original / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
                return (1 - smooth) * f / rope["factor"] + smooth * f
        return f

    def norm(x, name):
        return x / torch.sqrt((x * x).mean() + eps) * weights[name]

    def turn(vector, position):
        z = torch.complex(vector[:d // 2], vector[d // 2:])
        angles = torch.tensor([position * frequency(k) for k in range(d // 2)], dtype=torch.float64)
        z = z * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag])

    def project(u, p, which):
        """The heads of queries (0), keys (1) or values (2), (heads, d)."""
        if p + "W_pack.weight" in weights:
            return (weights[p + "W_pack.weight"] @ u)[which * heads * d:(which + 1) * heads * d].view(-1, d)
        name = f"{p}{'qkv'[which]}_proj."
        vectors = (weights[name + "weight"] @ u + weights.get(name + "bias", 0)).view(-1, d)
        scale = f"{p}{'qkv'[which]}_norm.weight"
        return torch.stack([norm(vector, scale) for vector in vectors]) if scale in weights else vectors

    x = [weights["model.embed_tokens.weight"][i] for i in ids]
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        normed = [norm(v, p + "input_layernorm.weight") for v in x]
        q, k, v = ([project(u, p + "self_attn.", which) for u in normed] for which in range(3))
        for t in range(len(ids)):
            mixed = []
            for head in range(heads):
                kv = head * kv_heads // heads
                scores = torch.stack([turn(q[t][head], t) @ turn(k[s][kv], s) for s in range(t + 1)]) / d ** 0.5
                mixed.append(sum(a * v[s][kv] for s, a in enumerate(torch.softmax(scores, 0))))
            x[t] = x[t] + weights[p + "self_attn.o_proj.weight"] @ torch.cat(mixed)
        for t in range(len(ids)):
            u = norm(x[t], p + "post_attention_layernorm.weight")
            gate, up = weights[p + "mlp.gate_proj.weight"] @ u, weights[p + "mlp.up_proj.weight"] @ u
            x[t] = x[t] + weights[p + "mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
    head = weights["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    if c["model_type"] == "baichuan":
        head = torch.stack([row / row.square().sum().sqrt() for row in head])
    return torch.stack([head @ norm(v, "model.norm.weight") for v in x])


LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
          "original_max_position_embeddings": 16}                  # waves of 6.3 to 1000 positions: all three kinds
SHAPES = {                                                         # of the families, and their corners
    "llama": dict(),
    "llama, tied": dict(tie_word_embeddings=True),
    "llama 2": dict(num_key_value_heads=4, rope_theta=500.0),
    "llama, one key head": dict(num_key_value_heads=1, head_dim=6),
    "llama, linear": dict(rope_scaling=LINEAR, max_position_embeddings=16),
    "llama 3": dict(rope_scaling=LLAMA3, rope_theta=500.0, head_dim=16, max_position_embeddings=32),
    "mistral": dict(model_type="mistral", rope_theta=1e6),
    "qwen2": dict(model_type="qwen2"),
    "qwen2, tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=12),
    "qwen3, tied": dict(model_type="qwen3", head_dim=12, tie_word_embeddings=True),
    "baichuan": dict(model_type="baichuan", num_key_value_heads=4),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_the_plain_decoder(shape, tmp_path):
    """Up to positions far beyond the original context."""
    model = tiny_model(**SHAPES[shape])
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 53, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = plain_logits(tmp_path, ids[0].tolist())
    padded = torch.stack([F.pad(ids[0], (0, 6)), ids[0].roll(3).repeat(2)[:30]])
    mask = torch.stack([torch.arange(30) < 24, torch.ones(30, dtype=torch.bool)])
    for decoder_ in (model, Decoder.from_pretrained(tmp_path)):
        torch.testing.assert_close(decoder_(ids)[0].double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoder_(padded, attention_mask=mask)[0, :24].double(), expected, rtol=1e-4, atol=1e-4)
    prompts = [ids[0, :n].tolist() for n in (1, 7, 3, 12)]
    assert generate(model, prompts, 8, 0, 2) == [greedy_alone(model, prompt, 8, (2,)) for prompt in prompts]


def test_masks_and_positions():
    model = tiny_model()
    ids = torch.randint(3, 53, (2, 8), generator=torch.Generator().manual_seed(2))
    alone = model(ids[:1, :5])
    right = torch.tensor([[True] * 5 + [False] * 3, [True] * 8])
    torch.testing.assert_close(model(ids, attention_mask=right)[0, :5], alone[0])
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:1, :5]], dim=1)       # padded on the left
    mask = torch.tensor([[False] * 3 + [True] * 5])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    out = model(left, positions=positions, attention_mask=mask)
    torch.testing.assert_close(out[0, 3:], alone[0])
    assert out.isfinite().all()                                    # padding sees itself, so no softmax is empty
    square = right[:, None, :].expand(2, 8, 8)
    torch.testing.assert_close(model(ids, attention_mask=square), model(ids, attention_mask=right))
    with pytest.raises(ValueError, match="boolean"):
        model(ids, attention_mask=right.long())


def transformers_model(shape, folder):
    """A random model of transformers' own, saved by it."""
    transformers = pytest.importorskip("transformers")
    fields = {**vars(tiny_config(**SHAPES[shape])), "pad_token_id": 0, "bos_token_id": 1}
    rope = {**(fields.pop("rope_scaling") or {"rope_type": "default"}), "rope_theta": fields.pop("rope_theta")}
    fields |= {"rope_parameters": rope, "sliding_window": None}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.3 + (0.0 if name.endswith("bias") else parameter.dim() == 1)
    model.save_pretrained(folder)
    return transformers, model


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "baichuan"])
def test_against_transformers(shape, tmp_path):
    transformers, theirs = transformers_model(shape, tmp_path / "theirs")
    ours = Decoder.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(3, 53, (3, 60))                            # of which the original context holds 16
    mask = torch.arange(60) < torch.tensor([[60], [7], [1]])
    expected = theirs(ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(ours(ids, attention_mask=mask)[mask], expected[mask], rtol=0, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()) and type(again) is type(theirs)
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    fresh = tiny_model(**SHAPES[shape])                            # a config.json that is all our own
    fresh.save_pretrained(tmp_path / "fresh")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fresh")
    torch.testing.assert_close(again(ids).logits, fresh(ids), rtol=0, atol=1e-4)
    prompts = [[5, 6, 7, 8], [9], [10, 11], list(range(3, 33))]
    for prompt, answer in zip(prompts, generate(ours, prompts, 10, 0, 2)):
        full = theirs.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, pad_token_id=0)[0].tolist()
        assert answer == (full[len(prompt):] + [2])[:(full[len(prompt):] + [2]).index(2)]


def test_the_old_spelling_of_rope_and_the_shards_of_transformers(tmp_path):
    transformers, theirs = transformers_model("llama 3", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {**rope, "type": rope.pop("rope_type")}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids = torch.randint(3, 53, (1, 60))
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    torch.testing.assert_close(Decoder.from_pretrained(tmp_path)(ids), theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("where", ("inside", "outside", "both"))
def test_where_theta_may_stand(where, tmp_path):
    transformers, _ = transformers_model("llama, linear", tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters={"rope_type": "linear", "factor": 7.0} if where == "outside" else None,
              rope_scaling={**LINEAR, **({} if where == "outside" else {"rope_theta": 300.0})})
    raw = {name: value for name, value in json.loads((tmp_path / "config.json").read_text()).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw | ({} if where == "inside" else {"rope_theta": 500.0})))
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(3, 53, (1, 60))
    torch.testing.assert_close(Decoder.from_pretrained(tmp_path)(ids), theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("inside,outside", [(64, 8), (None, 8), (None, None)])
def test_where_the_original_context_may_stand(inside, outside, tmp_path):
    """Beside the other numbers of rope_scaling, at the top of config.json, which goes first, or nowhere."""
    transformers, _ = transformers_model("llama 3", tmp_path)
    scaling = {**LLAMA3, "original_max_position_embeddings": inside}
    edit_json(tmp_path / "config.json", rope_parameters=None, rope_theta=500.0, original_max_position_embeddings=outside,
              rope_scaling={name: value for name, value in scaling.items() if value is not None})
    raw = {name: value for name, value in json.loads((tmp_path / "config.json").read_text()).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(3, 53, (1, 60))
    ours = Decoder.from_pretrained(tmp_path)
    assert ours.config.rope_scaling["original_max_position_embeddings"] == (outside or inside or 32)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)


# Response log-probabilities: the one thing everybody gets wrong

def oracle_logps(model, prompt, response):
    """Token by token, one plain sequence: log P(response | prompt) = sum of log P(token | everything before it)."""
    total = 0.0
    for place in range(len(response)):
        before = torch.tensor([list(prompt) + list(response[:place])])
        total = total + torch.log_softmax(model(before)[0, -1], dim=-1)[response[place]]
    return total


def random_rows(rng, n):
    """Pairs of all lengths: one-token prompts and answers, answers that share a prefix or are one the other's start."""
    rows = []
    for _ in range(n):
        prompt, chosen, rejected = ([rng.randrange(3, 53) for _ in range(rng.choice((1, 2, 3, 8, 15)))] for _ in range(3))
        if rng.random() < 0.4:
            rejected = chosen[:rng.randrange(1, len(chosen) + 1)] + rejected
        rows.append((prompt, chosen + [2] * rng.randrange(2), rejected + [2]))
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_response_logps_equal_a_loop_over_tokens(seed):
    rng, model = random.Random(seed), tiny_model(seed)
    rows = random_rows(rng, 5) + [([7], [9], [11])]
    batch = PairBatch.from_ids(rows)
    chosen_logps, rejected_logps = response_logps(model, batch)
    assert chosen_logps.shape == rejected_logps.shape == (6,) and chosen_logps.dtype == torch.float32
    assert batch.chosen_lengths.tolist() == [len(row[1]) for row in rows]
    assert batch.rejected_lengths.tolist() == [len(row[2]) for row in rows]
    for k, (prompt, chosen, rejected) in enumerate(rows):
        torch.testing.assert_close(chosen_logps[k], oracle_logps(model, prompt, chosen), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rejected_logps[k], oracle_logps(model, prompt, rejected), rtol=1e-5, atol=1e-5)


def two_row_logps(model, rows):
    """The plain path: each prompt + answer a row of its own, padded, cross entropy over all, prompt masked out."""
    columns = []
    for which in (1, 2):
        sequences = [row[0] + row[which] for row in rows]
        ids = torch.tensor([sequence + [0] * (max(map(len, sequences)) - len(sequence)) for sequence in sequences])
        logps = -F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        places = torch.arange(1, ids.shape[1])
        starts = torch.tensor([[len(row[0])] for row in rows])
        ends = torch.tensor([[len(sequence)] for sequence in sequences])
        columns.append((logps * ((places >= starts) & (places < ends))).sum(dim=1))
    return columns


def weight_gradients(model, logps, coefficients):
    model.zero_grad()
    (coefficients * torch.stack(list(logps))).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("seed", range(24))
def test_the_fast_path_equals_the_two_row_path(seed, monkeypatch):
    """Log-probs to 1e-5, gradients to 1e-4 in norm for every tensor: any mix of lengths, one-token prompts and answers,
    shared prefixes, prompts long enough to be attended on their own, logits in chunks, layers recomputed."""
    rng = random.Random(seed)
    shape = rng.choice(list(SHAPES.values()))
    model = tiny_model(seed, **shape)
    rows = random_rows(rng, rng.choice((1, 2, 7, 20)))
    if seed % 3:
        rows += [([rng.randrange(3, 53) for _ in range(rng.randrange(60, 80))], *row[1:]) for row in random_rows(rng, 2)]
    rng.shuffle(rows)
    monkeypatch.setattr(data, "LONG_CONTEXT", rng.choice((1, 3, 64)))
    monkeypatch.setattr(decoder, "CHUNK", rng.choice((1, 5, 512)))
    model.gradient_checkpointing = rng.random() < 0.3
    coefficients = torch.randn(2, len(rows), generator=torch.Generator().manual_seed(seed))
    logps = response_logps(model, PairBatch.from_ids(rows))
    fast = weight_gradients(model, logps, coefficients)
    expected_logps = two_row_logps(model, rows)
    for column, expected in zip(logps, expected_logps):
        torch.testing.assert_close(column, expected, rtol=1e-5, atol=1e-5)
    for name, expected in weight_gradients(model, expected_logps, coefficients).items():
        assert (fast[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


def test_token_logps_against_autograd_in_float64():
    """The closed-form derivative of TokenLogps, by finite differences and by autograd of a plain log softmax."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator, requires_grad=True) for n in (9, 11))
    targets, upstream = torch.randint(0, 11, (9,), generator=generator), torch.randn(9, generator=generator)
    for chunk in (2, 9, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "CHUNK", chunk)
            token_logps = decoder.TokenLogps.apply(hidden, weight, targets)
            found = torch.autograd.grad(token_logps, (hidden, weight), upstream)
        wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
        plain = torch.log_softmax(wide[0] @ wide[1].T, dim=1)[torch.arange(9), targets]
        torch.testing.assert_close(token_logps.double(), plain, rtol=1e-5, atol=1e-6)
        for ours, expected in zip(found, torch.autograd.grad(plain, wide, upstream.double())):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)


def test_no_logits_outlive_their_chunk(monkeypatch):
    """What is saved for the backward pass holds no (tokens, V) tensor, and no matrix product makes more than a chunk."""
    model = tiny_model(vocab_size=1009)
    batch = PairBatch.from_ids(random_rows(random.Random(0), 12))
    monkeypatch.setattr(decoder, "CHUNK", 7)
    saved, made = [], []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *inputs: made.append(linear(*inputs)) or made[-1])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor):
        logps = response_logps(model, batch)
    torch.stack(logps).sum().backward()
    assert batch.mask.sum() > 50 and (made := [out.shape for out in made if out.shape[-1] == 1009])
    assert all(shape[0] <= 7 for shape in made) and sum(shape[0] for shape in made) == 2 * batch.mask.sum()
    assert not any(1009 in shape and shape[0] != 1009 for shape in saved)


def test_prompt_tokens_pass_each_layer_once_and_the_last_not_at_all(monkeypatch):
    """Counted where the work is: rows of every linear layer's input for a pair with a prompt of 40."""
    model, seen = tiny_model(), Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: inputs[0].shape[1]}))
    response_logps(model, PairBatch.from_ids([(list(range(3, 43)), [5, 6, 2], [7, 8, 9, 2])]))
    last = len(model.model.layers) - 1
    for name, tokens in seen.items():
        few = f"layers.{last}." in name and not name.endswith(("k_proj", "v_proj"))
        assert tokens == (1 + 2 + 3 if few else 40 + 2 + 3), name
    assert len(seen) == 7 * (last + 1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_layers_compute_the_same():
    """Forward, gradients, generation, for batches of other lengths than the first; ENV, compiled too, agrees exactly."""
    plain = tiny_model(2)
    compiled, env = copy.deepcopy(plain), copy.deepcopy(plain)
    compiled.compile_layers()
    env.compile_layers()
    for seed, n in ((0, 3), (1, 9), (2, 5)):
        batch = PairBatch.from_ids(random_rows(random.Random(seed), n))
        with torch.no_grad():
            reference = torch.stack(response_logps(env, batch))
        logps, expected = response_logps(compiled, batch), response_logps(plain, batch)
        torch.testing.assert_close(torch.stack(logps), torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.stack(logps), reference)
        found = weight_gradients(compiled, logps, torch.ones(2, n))
        for name, gradient in weight_gradients(plain, expected, torch.ones(2, n)).items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    prompts = [[5, 6, 7], [8]]
    assert generate(compiled, prompts, 6, 0, 2) == generate(plain, prompts, 6, 0, 2)


@pytest.mark.parametrize("compiler", ("no-such-compiler", "false"))
def test_compiling_needs_a_compiler(compiler, tmp_path, monkeypatch):
    command = [sys.executable, "train.py", "--compile", "--device", "cpu", "--out", str(tmp_path / "run")]
    out = subprocess.run(command, capture_output=True, text=True, cwd=HERE,
                         env=os.environ | {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert out.returncode == 2 and "--compile" in out.stderr and len(out.stderr.strip().splitlines()) == 1, out.stderr
    assert not (tmp_path / "run").exists()


def test_recomputed_layers_train_to_the_same_weights(tmp_path):
    assert same(run(tmp_path / "plain")[1], run(tmp_path / "recomputed", "--gradient-checkpointing")[1])


@pytest.mark.parametrize("rows", ("hh", "chat", "random"))
def test_log_probs_and_dpo_loss_equal_trls(rows, tmp_path):
    """TRL's DPOTrainer on identical tokens: the log-probs of every pair by both models, and the loss."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    tokenizer, talk = SafeWorld.tokenizer(), "\n\nHuman: How do I fix it?\n\nAssistant: Use a key.\n\nHuman: {}\n\nAssistant:"
    if rows == "random":
        ids = random_rows(random.Random(0), 6)
    elif rows == "hh":
        pairs = [data.parse_row({"chosen": talk.format(k) + " Good question." * (k + 1), "rejected": talk.format(k) + " No."}, "")
                 for k in range(6)]
        ids = [tokenizer.encode_pair(pair) for pair in pairs]
    else:
        tokenizer = Tokenizer({**tokenizer.files, "chat_template.jinja": CHATML.encode()})
        pairs = [Pair([turn("user", "Hi" * k), turn("assistant", "hm"), turn("user", "Go")], "Good" * (k + 1), "Bad") for k in range(6)]
        ids = [tokenizer.encode_pair(pair) for pair in pairs]
    ours, env = (tiny_model(seed, vocab_size=tokenizer.largest_id + 1, model_type="qwen2") for seed in (0, 1))
    for parameter, near in zip(env.parameters(), ours.parameters()):
        parameter.data = near.data + 0.02 * parameter.data
    for name, model in (("ours", ours), ("env", env)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save(tmp_path / name)
    theirs, reference = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "env"))
    trainer = trl.DPOTrainer(
        model=theirs, ref_model=reference, train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.1, report_to=[], use_cpu=True, bf16=False),
        processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours"))
    batch = trainer.data_collator([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row)) for row in ids])
    expected = [*trainer.compute_ref_log_probs(theirs, batch), *trainer.compute_ref_log_probs(reference, batch)]
    logps = [*response_logps(ours, PairBatch.from_ids(ids)), *response_logps(env, PairBatch.from_ids(ids))]
    for column, their_column in zip(logps, expected):
        torch.testing.assert_close(column, their_column, rtol=0, atol=1e-3)
    loss = iopo.dpo_loss(*logps).mean().item()
    assert loss == pytest.approx(trainer.compute_loss(theirs, batch).item(), abs=1e-4) and abs(loss - math.log(2)) > 1e-3


def test_prompts_and_tokens_are_trls(tmp_path):
    """Where both mean the same: text rows with and without a prompt, the EOS at the end, BOS, the seam."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    for chosen, rejected in (("The sky is blue.", "The sky is green."), ("a b", "a c"), ("The sky\nblue.", "The sky\nbright.")):
        theirs = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
        ours = data.parse_row({"chosen": chosen, "rejected": rejected}, "")
        assert (ours.prompt, ours.chosen, ours.rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
    folder = model_folder(tmp_path / "model")
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in SafeWorld().pairs("train", 20)]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    trainer = trl.DPOTrainer(model=model, ref_model=copy.deepcopy(model), train_dataset=datasets.Dataset.from_list(rows),
                             processing_class=transformers.AutoTokenizer.from_pretrained(folder),
                             args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False))
    tokenizer = Tokenizer.from_pretrained(folder)
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        ours = tokenizer.encode_pair(data.parse_row(row, ""))
        assert ours == (theirs["prompt_ids"], theirs["chosen_ids"], theirs["rejected_ids"])


def test_neither_answer_sees_the_other_nor_the_padding():
    model = tiny_model()
    chosen_logps, rejected_logps = response_logps(model, PairBatch.from_ids([([5, 6], [7, 8, 2], [9, 2])]))
    other = PairBatch.from_ids([([5, 6], [10, 11, 12, 2], [9, 2]), ([5, 6], [7, 8, 2], [20] * 12), ([4] * 30, [3], [3])])
    other_chosen, other_rejected = response_logps(model, other)
    torch.testing.assert_close(other_chosen[1], chosen_logps[0])
    torch.testing.assert_close(other_rejected[0], rejected_logps[0])


def test_every_response_token_counts_and_no_prompt_token():
    """EOS and the first token move the answer's log-prob; what stands before the last prompt token's prediction
    does so only through the context (checked by a model that sees no context at all)."""
    model = tiny_model()
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()                 # a unigram-after-one-token model
    table = torch.log_softmax(model(torch.arange(53)[:, None])[:, 0], dim=-1)         # row: token -> log-probs of the next
    chosen_logps, rejected_logps = response_logps(model, PairBatch.from_ids([([5, 6], [7, 8, 2], [9, 2])]))
    assert chosen_logps.item() == pytest.approx((table[6, 7] + table[7, 8] + table[8, 2]).item(), abs=1e-5)
    assert rejected_logps.item() == pytest.approx((table[6, 9] + table[9, 2]).item(), abs=1e-5)


def test_rows_without_a_rejected_answer():
    model, rows = tiny_model(), [([5, 6], [7, 8, 2], None), ([5], [9], None)]
    chosen_logps, rejected_logps = response_logps(model, PairBatch.from_ids(rows))
    assert rejected_logps.tolist() == [0, 0]
    torch.testing.assert_close(chosen_logps[0], oracle_logps(model, [5, 6], [7, 8, 2]), rtol=1e-5, atol=1e-5)


# Generation

def greedy_alone(model, prompt, new, stop):
    """No cache, no batch: recompute everything for every token."""
    out = []
    while len(out) < new:
        token = model(torch.tensor([prompt + out]))[0, -1].argmax().item()
        if token in stop:
            break
        out.append(token)
    return out


@pytest.mark.parametrize("stop", ((2,), (2, 30, 31, 40, 5, 17)))
def test_greedy_generation_equals_recomputation(stop):
    rng, ends = random.Random(0), Counter()
    for seed in range(5):
        model = tiny_model(seed)
        prompts = [[rng.randrange(3, 53) for _ in range(n)] for n in (1, 7, 3, 12, 1)]
        answers = generate(model, prompts, 15, 0, stop if len(stop) > 1 else stop[0])
        for prompt, answer in zip(prompts, answers):
            assert answer == greedy_alone(model, prompt, 15, stop)
            ends[len(answer) < 15] += 1
    assert len(stop) == 1 or ends[True] and ends[False]            # some ended early, some did not


def test_sampling_follows_the_softmax():
    model, temperature, n = tiny_model(3), 1.7, 4000
    expected = torch.softmax(model(torch.tensor([[5, 6]]))[0, -1].double() / temperature, dim=-1)
    answers = generate(model, [[5, 6]] * n, 1, temperature, -1, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([a[0] for a in answers]), minlength=53).double()
    often = expected * n >= 5
    chi2 = ((counts - expected * n) ** 2 / (expected * n))[often].sum().item()
    freedom = int(often.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)
    again = generate(model, [[5, 6]] * n, 1, temperature, -1, torch.Generator().manual_seed(0))
    assert answers == again


def test_generation_edges():
    model = tiny_model()
    assert generate(model, [], 5, 0, 2) == []
    assert generate(model, [[3], [4, 5]], 0, 0, 2) == [[], []]
    with pytest.raises(ValueError):
        generate(model, [[3], []], 5, 0, 2)


# Hugging Face folders

@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load(shape, tmp_path):
    model = tiny_model(**SHAPES[shape])
    model.save_pretrained(tmp_path)
    loaded = Decoder.from_pretrained(tmp_path)
    assert loaded.config == model.config and same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    attention = {name.removeprefix("model.layers.0.self_attn.") for name in tensors if "layers.0.self_attn" in name}
    more = {"qwen2": {"q_proj.bias", "k_proj.bias", "v_proj.bias"}, "qwen3": {"q_norm.weight", "k_norm.weight"}}
    plain = {"W_pack.weight"} if shape == "baichuan" else {"q_proj.weight", "k_proj.weight", "v_proj.weight"}
    assert attention == {"o_proj.weight"} | plain | more.get(model.config.model_type, set())
    assert ("lm_head.weight" in tensors) != model.config.tie_word_embeddings


def test_baichuans_head_stays_normalised_while_it_trains(tmp_path):
    """Logits and log-probs do not change with the length of lm_head's rows, and no gradient goes along them."""
    model = tiny_model(**SHAPES["baichuan"])
    w, l = response_logps(model, PairBatch.from_ids(random_rows(random.Random(0), 4)))
    (w - l).sum().backward()
    head = model.lm_head.weight
    assert head.grad.norm() > 1e-3
    torch.testing.assert_close((head.grad * head.detach()).sum(dim=1), torch.zeros(53), rtol=0, atol=1e-5)
    ids = torch.randint(3, 53, (1, 9))
    before = model(ids)
    head.data *= torch.rand(53, 1) + 0.5
    torch.testing.assert_close(model(ids), before)


def test_saved_as_it_came(tmp_path):
    """config.json keeps what the decoder does not read, but for the dtype, which is that of the weights now."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "a")
    edit_json(tmp_path / "a/config.json", auto_map={"AutoModel": "x.Y"}, rope_theta=None, torch_dtype="bfloat16")
    raw = json.loads((tmp_path / "a/config.json").read_text())
    Decoder.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text()) == {**raw, "torch_dtype": "float32"}


def test_large_models_are_saved_in_shards(tmp_path, monkeypatch):
    model = tiny_model(model_type="baichuan", num_key_value_heads=4)
    model.save_pretrained(tmp_path)                                # in one file, which the shards replace
    monkeypatch.setattr(decoder, "SHARD_BYTES", 15000)
    model.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    count = len(names) - 2
    assert count > 2 and names == ["config.json"] + [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)] \
        + ["model.safetensors.index.json"]
    assert all((tmp_path / name).stat().st_size < 17000 for name in names)
    more, other = tiny_model(vocab_size=100), tmp_path / "more"    # a save in more shards, and one in fewer over it
    more.save_pretrained(other)
    before = {path.name for path in other.iterdir()}
    monkeypatch.setattr(decoder, "SHARD_BYTES", 30000)
    more.save_pretrained(other)
    files = set(json.loads((other / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert {path.name for path in other.iterdir()} == files | {"config.json", "model.safetensors.index.json"} != before
    assert same(dict(Decoder.from_pretrained(other).state_dict()), dict(more.state_dict()))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    for name, shard in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / shard, framework="pt") as tensors:
            assert name in tensors.keys()
    assert same(dict(Decoder.from_pretrained(tmp_path).state_dict()), dict(model.state_dict()))
    monkeypatch.undo()
    model.save_pretrained(tmp_path)                                # and back
    assert same(dict(Decoder.from_pretrained(tmp_path).state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("shards", (1, 3))
def test_pytorch_bins(tmp_path, shards):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)           # old checkpoints hold it
    (tmp_path / "model.safetensors").unlink()
    where = {name: f"pytorch_model-{k % shards}.bin" if shards > 1 else "pytorch_model.bin" for k, name in enumerate(tensors)}
    for file in set(where.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if where[name] == file}, tmp_path / file)
    if shards > 1:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    loaded = Decoder.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, tensors[name].float()) for name, tensor in loaded.items())


def test_a_tied_head_that_is_stored_too(tmp_path):
    model = tiny_model(tie_word_embeddings=True, vocab_size=3000)
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].half(), "model.embed_tokens.weight": t["model.embed_tokens.weight"].half()}))
    loaded = Decoder.from_pretrained(tmp_path)
    assert loaded.lm_head is None and torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight.half().float())
    edit_tensors(tmp_path / "model.safetensors", lambda t: t["lm_head.weight"][2999, 31].add_(1))
    with pytest.raises(ValueError, match="but their weights differ"):
        Decoder.from_pretrained(tmp_path)


def test_windows_that_no_layer_looks_at(tmp_path):
    tiny_model(model_type="qwen2").save_pretrained(tmp_path)
    for changes in (dict(max_window_layers=2), dict(layer_types=["full_attention"] * 2), dict(use_sliding_window=False),
                    dict(sliding_window=2048)):
        edit_json(tmp_path / "config.json", **{"use_sliding_window": True, "sliding_window": 64, "layer_types": None,
                                               "max_window_layers": 0, **changes})
        Decoder.from_pretrained(tmp_path)


MEMORY = """
import sys, model
def peak(): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
model.Decoder(model.DecoderConfig(8, 8, 8, 1, 1, 1, 8))            # torch has what it needs from now on
before = peak()
decoder = model.Decoder.from_pretrained(sys.argv[1])
print((peak() - before) / sum(parameter.nbytes for parameter in decoder.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read a process's peak memory from")
@pytest.mark.parametrize("form", ("safetensors", "bfloat16", "bin", "tied"))
def test_loading_needs_little_more_than_the_model(tmp_path, form):
    """50 million parameters, a third of them embeddings; the peak of a fresh process over the model's own size."""
    config = DecoderConfig(32000, 512, 1408, 15 if form == "tied" else 10, 8, 4, 64, tie_word_embeddings=form == "tied")
    model = Decoder(config)
    assert 45e6 < sum(parameter.numel() for parameter in model.parameters()) < 65e6
    model.to(torch.bfloat16 if form == "bfloat16" else torch.float32).save_pretrained(tmp_path)
    if form == "bin":
        as_bin(tmp_path)
    if form == "tied":                                             # the file stores the head all the same
        edit_tensors(tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    out = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], cwd=HERE, capture_output=True, text=True, check=True)
    assert 0.9 < float(out.stdout) < 1.1, out.stdout


def test_shards_and_both_spellings_of_rope(tmp_path):
    model = tiny_model(rope_theta=777.0)
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {name: f"model-{1 + k % 2:05d}-of-00002.safetensors" for k, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        part = {name: tensors[name].bfloat16() for name in tensors if shards[name] == shard}
        safetensors.torch.save_file(part, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    raw = json.loads((tmp_path / "config.json").read_text())
    for leave_out in ("rope_parameters", "rope_theta"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != leave_out}))
        loaded = Decoder.from_pretrained(tmp_path)
        assert loaded.config.rope_theta == 777.0
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[name].bfloat16().float())


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, change):
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def as_bin(folder, change=lambda content: content):
    """model.safetensors to pytorch_model.bin, perhaps damaged."""
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(change((folder / "pytorch_model.bin").read_bytes()))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


def twice(folder):
    """Two shards, both with the last norm."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    safetensors.torch.save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "model.norm.weight": "model-2.safetensors"}}))


BROKEN_MODELS = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-50]),
                  "model.safetensors: cannot be read"),
    "broken json": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "other family": (lambda f: edit_json(f / "config.json", model_type="gpt2"), "model_type 'gpt2'"),
    "mixture of experts": (lambda f: edit_json(f / "config.json", model_type="mixtral"), "model_type 'mixtral'"),
    "a list for the family": (lambda f: edit_json(f / "config.json", model_type=["llama"]), "model_type ['llama']"),
    "no vocabulary": (lambda f: edit_json(f / "config.json", vocab_size=None), "config.json: has no vocab_size"),
    "no heads": (lambda f: edit_json(f / "config.json", num_attention_heads=0, head_dim=None, num_key_value_heads=None),
                 "num_attention_heads is 0"),
    "rope by kind of layer": (lambda f: edit_json(f / "config.json", rope_parameters={"full_attention": LINEAR}), "are not computed here"),
    "scaled rope": (lambda f: edit_json(f / "config.json", rope_scaling=None, rope_parameters={"rope_type": "yarn"}), "'yarn'"),
    "old scaled rope": (lambda f: edit_json(f / "config.json", rope_scaling={"type": "dynamic"}), "'dynamic'"),
    "rope is text": (lambda f: edit_json(f / "config.json", rope_scaling="linear"), "is 'linear', not a JSON object"),
    "rope without factor": (lambda f: edit_json(f / "config.json", rope_scaling={"type": "linear"}), "has no factor"),
    "rope factor is text": (lambda f: edit_json(f / "config.json", rope_scaling={"type": "linear", "factor": "2"}), "factor is '2'"),
    "rope bands": (lambda f: edit_json(f / "config.json", rope_scaling={**LLAMA3, "low_freq_factor": 4.0}), "low_freq_factor must"),
    "both ways": (lambda f: edit_json(f / "config.json", is_causal=False), "is_causal False"),
    "a number too long": (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("10000.0", "1" + "0" * 400)),
                          "not a positive number"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100000), "config.json: cannot be read as JSON"),
    "too large for float32": (lambda f: edit_tensors(f / "model.safetensors", lambda t: t.update(
        {"lm_head.weight": t["lm_head.weight"].double() * 1e300})), "lm_head.weight holds values that are not finite"),
    "too many rows": (lambda f: edit_json(f / "config.json", vocab_size=2**31 - 1), "vocab_size is 2147483647"),
    "turned baichuan": (lambda f: edit_json(f / "config.json", model_type="baichuan", rope_theta=500.0, rope_parameters=None),
                        "nor other rotary"),
    "baichuan's vocabulary": (lambda f: edit_json(f / "config.json", model_type="baichuan", vocab_size=64000), "first generation"),
    "named baichuan": (lambda f: edit_json(f / "config.json", model_type="baichuan", architectures=None,
                                           auto_map={"AutoModel": "modeling_baichuan.BaiChuanForCausalLM"}), "neither the first generation"),
    "half rotated": (lambda f: edit_json(f / "config.json", partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "sliding": (lambda f: edit_json(f / "config.json", model_type="mistral", sliding_window=64), "sliding_window 64"),
    "sliding by default": (lambda f: (f / "config.json").write_text(json.dumps({
        **{k: v for k, v in json.loads((f / "config.json").read_text()).items() if k != "sliding_window"},
        "model_type": "mistral", "max_position_embeddings": 32768})), "sliding_window 4096"),
    "sliding layers": (lambda f: edit_json(f / "config.json", model_type="qwen3", sliding_window=64, use_sliding_window=True,
                                           layer_types=["full_attention", "sliding_attention"]), "sliding_window 64"),
    "sliding qwen": (lambda f: edit_json(f / "config.json", model_type="qwen2", sliding_window=64, use_sliding_window=True,
                                         max_window_layers=1),
                     "sliding_window 64"),
    "no key norm": (lambda f: edit_json(f / "config.json", model_type="qwen3", sliding_window=None),
                    "tensor model.layers.0.self_attn.k_norm.weight is missing"),
    "alibi": (lambda f: edit_json(f / "config.json", model_type="baichuan", max_position_embeddings=None), "nor 13B"),
    "first baichuan": (lambda f: edit_json(f / "config.json", model_type="baichuan", architectures=["BaiChuanForCausalLM"]),
                       "neither the first generation"),
    "quantised by config": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "quantization_config"),
    "text for a number": (lambda f: edit_json(f / "config.json", rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'"),
    "text for a truth": (lambda f: edit_json(f / "config.json", tie_word_embeddings="false"), "neither true nor false"),
    "not a number": (lambda f: edit_tensors(f / "model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan"))),
                     "model.norm.weight holds values that are not finite"),
    "index out of the folder": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../model.safetensors"}}')), "files of this folder"),
    "index of bins out of the folder": (lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"a": "/tmp/pytorch_model.bin"}}')), "files of this folder"),
    "a shard is not there": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors"}}')), "model-1.safetensors: cannot be read"),
    "a truncated bin": (lambda f: as_bin(f, lambda content: content[:-50]), "pytorch_model.bin: cannot be read"),
    "a bin of code": (lambda f: ((f / "model.safetensors").unlink(), torch.save({"a": Malicious()}, f / "pytorch_model.bin")),
                      "pytorch_model.bin: cannot be read"),
    "two heads": (lambda f: (edit_tensors(f / "model.safetensors", lambda t: t["lm_head.weight"].mul_(2)),
                             edit_json(f / "config.json", tie_word_embeddings=True)), "but their weights differ"),
    "a tensor twice": (lambda f: twice(f), "tensor model.norm.weight is in another shard too"),
    "a bin of something": (lambda f: ((f / "model.safetensors").unlink(), torch.save([1], f / "pytorch_model.bin")),
                           "pytorch_model.bin: cannot be read"),
    "a sparse bin": (lambda f: ((f / "model.safetensors").unlink(), torch.save({"a": torch.eye(2).to_sparse()}, f / "pytorch_model.bin")),
                     "it holds other things than plain tensors"),
    "a bin of other things": (lambda f: ((f / "model.safetensors").unlink(), torch.save({"a": 1}, f / "pytorch_model.bin")),
                              "it holds other things than plain tensors"),
    "biases": (lambda f: edit_json(f / "config.json", attention_bias=True), "attention_bias True"),
    "no size": (lambda f: edit_json(f / "config.json", hidden_size=None), "hidden_size"),
    "text for a size": (lambda f: edit_json(f / "config.json", vocab_size="53"), "vocab_size is '53'"),
    "other size": (lambda f: edit_json(f / "config.json", vocab_size=54), "has shape (53, 32), but config.json says (54, 32)"),
    "missing": (lambda f: edit_tensors(f / "model.safetensors", lambda t: t.pop("model.norm.weight")),
                "tensor model.norm.weight is missing"),
    "unexpected": (lambda f: edit_tensors(f / "model.safetensors", lambda t: t.update(extra=torch.ones(1))),
                   "tensor extra is not part"),
    "quantised": (lambda f: edit_tensors(f / "model.safetensors",
                                         lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
                  "model.norm.weight is torch.int8"),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    damage, message = BROKEN_MODELS[name]
    damage(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Decoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "it ran").exists()


# ----------------------------------------------------------------------------------------------------------
# data.py

def turn(role, content):
    return {"role": role, "content": content}


TALK = [turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Bye")]
ROWS = [
    ({"prompt": "p ", "chosen": "c", "rejected": "r", "more": 1}, Pair("p ", "c", "r")),
    ({"instruction": "Add.", "input": "1 2", "output": "no", "chosen": "3", "rejected": "4"},
     Pair("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3", "4")),
    ({"instruction": "Sing.", "input": "", "chosen": "la", "rejected": "no"},
     Pair("### Instruction:\nSing.\n\n### Response:\n", "la", "no")),
    ({"instruction": "Sing {loudly}.", "chosen": "la", "rejected": "no"},
     Pair("### Instruction:\nSing {loudly}.\n\n### Response:\n", "la", "no")),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
      "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no"},
     Pair("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " yes", " no")),
    ({"chosen": "\n\nHuman: a\n\nAssistant: yes", "rejected": "\n\nHuman: b\n\nAssistant: no"},
     Pair("", "\n\nHuman: a\n\nAssistant: yes", "\n\nHuman: b\n\nAssistant: no")),
    ({"prompt": "ignored", "chosen": TALK + [turn("assistant", "x")], "rejected": TALK + [turn("assistant", "y")]},
     Pair(TALK, "x", "y")),
    ({"prompt": TALK, "chosen": [turn("assistant", "x")], "rejected": [turn("assistant", "y")]}, Pair(TALK, "x", "y")),
    ({"prompt": TALK, "chosen": TALK + [turn("assistant", "x")], "rejected": TALK + [turn("assistant", "y")]},
     Pair(TALK, "x", "y")),
    # a prompt as text repeats a turn (UltraFeedback, orpo-dpo-mix), or is the only one
    ({"prompt": "Hi", "chosen": [turn("user", "Hi"), turn("assistant", "x")], "rejected": [turn("user", "Hi"), turn("assistant", "y")]},
     Pair([turn("user", "Hi")], "x", "y")),
    ({"prompt": "Hi", "chosen": [turn("assistant", "x")], "rejected": [turn("assistant", "y")]}, Pair([turn("user", "Hi")], "x", "y")),
    ({"chosen": TALK + [turn("assistant", "x")], "rejected": TALK[:2] + [turn("assistant", "y")]}, Pair([], "x", "y")),
    ({"prompt": TALK, "chosen": TALK[:2] + [turn("assistant", "x")], "rejected": TALK + [turn("assistant", "y")]}, Pair([], "x", "y")),
    # other text without a prompt: the shared beginning, without the space before the next word
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, Pair("The sky is", " blue.", " green.")),
    ({"chosen": "The sky\nblue.", "rejected": "The sky\nbright."}, Pair("The sky\nb", "lue.", "right.")),
    ({"chosen": "One", "rejected": "Two"}, Pair("", "One", "Two")),
    # answers of a dialogue that repeat it; other answers may well begin as the prompt does
    ({"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
     Pair("\n\nHuman: a\n\nAssistant:", " b", " c")),
    ({"prompt": "Hello", "chosen": "Hello you", "rejected": "Hello!"}, Pair("Hello", "Hello you", "Hello!")),
    ({"prompt": [], "chosen": TALK + [turn("assistant", "x")], "rejected": TALK + [turn("assistant", "y")]}, Pair(TALK, "x", "y")),
    ({"prompt": None, "instruction": None, "chosen": "a b", "rejected": "a c"}, Pair("a", " b", " c")),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no"},
     Pair("", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no")),
]


def write_rows(path, rows):
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet
        columns = dict.fromkeys(name for row in rows for name in row)
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", (".json", ".jsonl", ".jsonl.gz"))
def test_readers(tmp_path, suffix):
    path = tmp_path / ("pairs" + suffix)
    rows = [row for row, _ in ROWS]
    content = json.dumps(rows) if suffix == ".json" else "\ufeff" + "\r\n".join(json.dumps(r) for r in rows) + "\n\n"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    assert load_pairs(path) == [pair for _, pair in ROWS]
    word = "row" if suffix == ".json" else "line"
    assert [pair.origin for pair in load_pairs(path)] == [f"{path}, {word} {k + 1}" for k in range(len(ROWS))]


@pytest.mark.parametrize("kind", (str, list))
def test_parquet(tmp_path, kind):
    """Rows of one kind, as a parquet file has them: columns that a row does not fill are null."""
    chosen = [(row, pair) for row, pair in ROWS if type(row["chosen"]) is kind and type(row.get("prompt")) is not list]
    rows = [{"input": None, "source": "x", **row} for row, _ in chosen]
    path = write_rows(tmp_path / "pairs.parquet", rows)
    pairs = load_pairs(path)
    assert pairs == [pair for _, pair in chosen] and len(pairs) > 3
    assert pairs[3].origin == f"{path}, row 4" and pairs[3].source == "x"


def published(tmp_path, suffix):
    """Folders in the layout, with the columns and the quirks, of four published datasets; a few rows each."""
    def talk(k, answer):
        return [turn("user", f"q{k}"), turn("assistant", "hm"), turn("user", "go on"), turn("assistant", answer)]
    capybara = [{"source": "Dove", "conversation": [{"input": f"q{k}", "output": "hm"}], "original_response": "a", "generation_prompt":
                 ["x"], "new_generations": ["y"], "prompt": f"q{k} hm go on", "chosen": talk(k, f"good{k}"), "rejected": talk(k, "bad"),
                 "rating_chosen": 5, "rating_rejected": 1, "chosen_model": "m", "rejected_model": "n"} for k in range(40)]
    mix = [{"source": source, "chosen": talk(k, f"good{k}"), "rejected": talk(k, "bad"), "prompt": f"q{k}", "question": f"q{k}"}
           for k, source in enumerate(["Capybara", "toxic-dpo-v0.2", "truthy", "toxic-dpo-v0.2", "prm"])]
    feedback = [{"prompt": f"q{k}", "prompt_id": "0", "chosen": [turn("user", f"q{k}"), turn("assistant", f"good{k}")],
                 "rejected": [turn("user", f"q{k}"), turn("assistant", "bad")], "messages": [turn("user", "q")],
                 "score_chosen": 8.0, "score_rejected": 5.0} for k in range(4)]
    hh = [{"chosen": f"\n\nHuman: q{k}\n\nAssistant: good{k}", "rejected": f"\n\nHuman: q{k}\n\nAssistant: bad"} for k in range(4)]
    files = {"capybara": {f"data/train-00000-of-00001{suffix}": capybara},
             "mix": {f"data/train-00000-of-00002-0a1b{suffix}": mix[:3], f"data/train-00001-of-00002-0a1b{suffix}": mix[3:]},
             "feedback": {f"data/{split}-00000-of-00001{suffix}": feedback[:2] if "train" in split else feedback[2:]
                          for split in ("train_gen", "train_prefs", "train_sft", "test_gen", "test_prefs", "test_sft")},
             "hh": {"harmless-base/train.jsonl": hh[:2], "harmless-base/test.jsonl": hh[2:3], "helpful-base/test.jsonl": hh[3:],
                    "red-team-attempts/red_team_attempts.jsonl": [{"transcript": "no pair"}]}}
    for name, contents in files.items():
        for file, rows in contents.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            write_rows(tmp_path / name / file, rows)
        (tmp_path / name / "README.md").write_text("a card")


@pytest.mark.parametrize("suffix", (".jsonl", ".parquet"))
def test_datasets_as_they_are_published(tmp_path, suffix):
    published(tmp_path, suffix)
    pairs, note = data.load_data(tmp_path / "capybara")
    assert len(pairs) == 40 and "no" not in [pair.chosen for pair in pairs] and {pair.rejected for pair in pairs} == {"bad"}
    assert pairs[7] == Pair([turn("user", "q7"), turn("assistant", "hm"), turn("user", "go on")], "good7", "bad")
    assert 0 < sum(pair.held_out for pair in pairs) < 8 and "1 train and 0 test files: one prompt in twenty" in note
    assert "columns not read: chosen_model, conversation, generation_prompt" in note

    everything, _ = data.load_data(tmp_path / "mix")
    kept, note = data.load_data(tmp_path / "mix", "toxic-dpo")
    assert [pair.source for pair in everything] == ["Capybara", "toxic-dpo-v0.2", "truthy", "toxic-dpo-v0.2", "prm"]
    assert [pair.source for pair in kept] == ["Capybara", "truthy", "prm"] and "left out 2 rows of source toxic-dpo" in note
    assert [pair.source for pair in data.load_data(tmp_path / "mix", "toxic, prm")[0]] == ["Capybara", "truthy"]
    for nothing in ("nobody", "toxic,", "toxic,nobody", "", "e,r,p,o"):
        with pytest.raises(ValueError, match="rows have a source with"):
            data.load_data(tmp_path / "mix", nothing)

    pairs, note = data.load_data(tmp_path / "feedback")
    assert [(pair.chosen, pair.held_out) for pair in pairs] == [("good0", False), ("good1", False), ("good2", True), ("good3", True)]
    assert pairs[0].prompt == [turn("user", "q0")] and "1 train and 1 test files" in note and "train_sft" in note and "test_gen" in note

    (tmp_path / f"mix/data/train-00001-of-00002-0a1b{suffix}").unlink()                # a download that was not finished
    with pytest.raises(ValueError, match="has 1 of the 2 files"):
        load_pairs(tmp_path / "mix")

    assert [pair.chosen for pair in load_pairs(tmp_path / "hh", "train")] == [" good0", " good1"]
    assert [pair.chosen for pair in load_pairs(tmp_path / "hh", "test")] == [" good2", " good3"]
    assert len(load_pairs(tmp_path / "hh")) == 4 and "not read: red-team-attempts" in data.load_data(tmp_path / "hh")[1]
    assert len(load_pairs(tmp_path / "hh/harmless-base/train.jsonl")) == 2
    assert load_pairs(tmp_path / "hh/helpful-base")[0].chosen == " good3"            # no training files: all are read
    shutil.copytree(tmp_path / "hh/harmless-base", tmp_path / "hh/train/test")         # the innermost name counts
    (tmp_path / "hh/train/train-and-test.jsonl").write_text(json.dumps({"chosen": "a b", "rejected": "a c"}))
    assert len(load_pairs(tmp_path / "hh", "train")) == 5 and len(load_pairs(tmp_path / "hh", "test")) == 3


def test_folders_without_data_and_hidden_files(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/train.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no data file"):
        load_pairs(tmp_path)
    write_rows(tmp_path / "mine.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert load_pairs(tmp_path) == [Pair("p", "a", "b")]


def hub_cache(folder, kind, name, content):
    """What huggingface_hub keeps of a repository: blobs, and a snapshot of links to them."""
    repository = folder / f"{kind}s--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "blobs").mkdir()
    for number, (file, path) in enumerate(content.items()):
        shutil.copy(path, repository / f"blobs/{number}")
        link = repository / "snapshots" / ("0" * 40) / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repository / f"blobs/{number}", link.parent))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_hub_names(offline, tmp_path, capsys):
    """A model and a dataset out of the hub's cache, all the way to a finished run and its examination."""
    published(tmp_path, ".jsonl")
    model_folder(tmp_path / "model")
    hub_cache(offline, "dataset", "some/pairs", {"test-00000-of-00001.jsonl": tmp_path / "hh/harmless-base/train.jsonl",
                                                 "data/train-00000-of-00001.jsonl": tmp_path / "hh/harmless-base/train.jsonl"})
    hub_cache(offline, "model", "some/model", {path.name: path for path in (tmp_path / "model").iterdir()})
    train.main(["--model", "some/model", "--data", "some/pairs", "--n-iter", "1", "--n-mu", "1", "--n-nu", "1", "--out", "run"])
    assert (tmp_path / "run/protagonist/model.safetensors").exists() and "1 train and 1 test files" in capsys.readouterr().out
    examination.main(["run", "--json"])
    assert json.loads(capsys.readouterr().out)["runs"][0]["accuracy"] is not None
    for arguments in (["--model", "no/model", "--data", "some/pairs"], ["--model", "some/model", "--data", "no/pairs"]):
        message = refused(train.main, [*arguments, "--out", "other"], capsys)
        assert "neither a path here nor a" in message and (arguments[1] in message or arguments[3] in message)
    assert not (tmp_path / "other").exists()
    shutil.rmtree(offline)
    assert "--sft" in refused(examination.main, ["run"], capsys)


@pytest.mark.parametrize("weights", (["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"],
                                     ["model-1-of-2.safetensors", "model.safetensors.index.json"],
                                     ["pytorch_model.bin", "optimizer.bin"], ["pytorch_model-1-of-2.bin", "pytorch_model.bin.index.json"]))
def test_what_is_downloaded_of_a_model(weights, tmp_path, monkeypatch):
    """What is read, and no weights twice, by huggingface_hub's own reading of the patterns."""
    import huggingface_hub
    read = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "modeling_x.py"]
    repository, got = read + weights + ["README.md", "onnx/config.json", "original/consolidated.00.pth", "model.gguf"], set()

    def snapshot_download(name, repo_type, allow_patterns, ignore_patterns):
        assert (name, repo_type) == ("some/model", "model")
        for file in huggingface_hub.utils.filter_repo_objects(repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            got.add(file)
            (tmp_path / file).touch()
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert data.find_source("some/model", "model") == tmp_path
    unread = {"consolidated.safetensors", "optimizer.bin"} | ({"pytorch_model.bin"} if weights[0] == "model.safetensors" else set())
    assert got == set(read + weights) - unread


@pytest.mark.parametrize("name", ("a/b/c", "../a", "/a", "a b", "a/b.jsonl", "a.parquet", "./a", "a/../b"))
def test_what_can_be_no_hub_name_is_a_path(name, offline):
    assert data.find_source(name, "dataset") == Path(name)


def test_split_is_by_prompt_and_complete(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{k % 300}", "chosen": f"c{k}", "rejected": "r"}) + "\n"
                            for k in range(600)))
    everything, training, test = (load_pairs(path, split) for split in (None, "train", "test"))
    assert sorted(p.chosen for p in training + test) == sorted(p.chosen for p in everything)
    assert not {p.prompt for p in training} & {p.prompt for p in test}
    assert 0.02 < len(test) / 600 < 0.1


GOOD = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}).encode()
BAD_FILES = {
    "missing": ("nothing.jsonl", None, "No such file"),
    "suffix": ("pairs.csv", b"a,b", "unknown kind of data file"),
    "empty": ("pairs.jsonl", b"", "holds no rows"),
    "empty list": ("pairs.json", b"[]", "holds no rows"),
    "no list": ("pairs.json", b'{"chosen": 1}', "must hold a JSON list"),
    "broken line": ("pairs.jsonl", GOOD + b"\n" + GOOD[:-5] + b"\n", "line 2: broken JSON"),
    "broken json": ("pairs.json", b"[\n" + GOOD + b",\n" + GOOD.replace(b'"c"', b"c") + b"\n]", "line 3: broken JSON"),
    "no chosen": ("pairs.jsonl", GOOD + b'\n\n{"prompt": "p", "rejected": "r"}', "line 3: has no chosen"),
    "no rejected": ("pairs.json", b'[{"prompt": "p", "chosen": "r"}]', "row 1: has no rejected"),
    "a question unread": ("pairs.jsonl", b'{"system": "s", "question": "q", "chosen": "a b", "rejected": "a c"}',
                          "line 1: has question, but no prompt"),
    "a system beside messages": ("pairs.jsonl", json.dumps({"system": "s", "chosen": TALK[1:] + [turn("assistant", "a")],
                                                            "rejected": TALK[1:] + [turn("assistant", "b")]}).encode(), "line 1: has a system"),
    "no answer after the prompt": ("pairs.jsonl", json.dumps({"prompt": TALK, "chosen": TALK, "rejected": TALK}).encode(),
                                   "line 1: chosen is the prompt once more"),
    "a system unread": ("pairs.jsonl", b'{"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}', "line 1: has a system message of its own"),
    "not parquet": ("pairs.parquet", b"PAR1 or so", "cannot be read as parquet"),
    "a column that is missing": ("pairs.parquet", "no rejected", "row 1: has no rejected"),
    "wrong type": ("pairs.jsonl", b'{"prompt": "p", "chosen": 3, "rejected": "r"}', "line 1: chosen must be text, not a int"),
    "null": ("pairs.jsonl", b'{"prompt": "p", "chosen": "c", "rejected": null}', "line 1: rejected must be text"),
    "not an object": ("pairs.jsonl", b"[1, 2]", "line 1: must be a JSON object"),
    "mixed": ("pairs.jsonl", b'{"chosen": [{"role": "assistant", "content": "a"}], "rejected": "r"}', "line 1: rejected must be a list"),
    "no role": ("pairs.jsonl", b'{"chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}', "line 1: every message"),
    "user last": ("pairs.jsonl", json.dumps({"chosen": TALK, "rejected": TALK}).encode(), "line 1: the last message of chosen"),
    "latin-1": ("pairs.jsonl", GOOD + b"\n" + GOOD.replace(b'"p"', b'"\xe9"'), "line 2: not UTF-8"),
    "latin-1 json": ("pairs.json", b"[\n" + GOOD.replace(b'"p"', b'"\xe9"') + b"]", "line 2: not UTF-8"),
    "surrogate": ("pairs.jsonl", GOOD.replace(b'"p"', b'"\\ud800"'), "line 1: prompt holds half a character"),
    "not gzip": ("pairs.jsonl.gz", GOOD, "cannot be read"),
    "long number": ("pairs.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", "line 1: JSON that cannot be read"),
    "deep": ("pairs.json", b"[" * 100000, "line 1: "),
    "cut gzip": ("pairs.jsonl.gz", gzip.compress(GOOD * 100)[:-12], "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_name_file_and_line(name, tmp_path):
    file, content, message = BAD_FILES[name]
    if file.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if content == "no rejected":
        write_rows(tmp_path / file, [{"chosen": "a", "prompt": "p"}])
    elif content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_pairs(tmp_path / file)
    assert str(error.value).startswith(str(tmp_path / file)) and "\n" not in str(error.value)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "pairs.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pairs.parquet: reading parquet needs pyarrow; pip install pyarrow"):
        load_pairs(tmp_path / "pairs.parquet")


# Tokens

def word_tokenizer(post=None, config=None, **more):
    """Words and single spaces are tokens; "ab" is one token, so that "a" + "b" merges across the seam."""
    words = ["<s>", "</s>", "<unk>", "a", "b", "ab", "c", "d", " ", "x", "y", "\n", "<|im_start|>", "<|im_end|>", "user",
             "assistant"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={w: i for i, w in enumerate(words)}, merges=[("a", "b")], unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "user", "assistant"])
    if post:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", 0), ("</s>", 1)])
    for change, arguments in more.items():
        getattr(backend, change)(**arguments)
    config = {"bos_token": "<s>", "eos_token": "</s>", **(config or {})}
    return Tokenizer({"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()})


@pytest.mark.parametrize("post,bos", [(None, []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", [])])
def test_answers_end_in_one_eos_and_bos_comes_once(post, bos):
    tokenizer = word_tokenizer(post)
    assert tokenizer.encode_pair(Pair("c ", "d", "a d")) == (bos + [6, 8], [7, 1], [3, 8, 7, 1])
    assert tokenizer.encode_prompt("c ") == bos + [6, 8]
    # the data write EOS out: still one
    assert tokenizer.encode_pair(Pair("c ", "d</s>\n", "a</s></s>")) == (bos + [6, 8], [7, 1], [3, 1])
    # a token that straddles the seam belongs to the answers
    assert tokenizer.encode_pair(Pair("ca", "b", "d")) == (bos + [6], [5, 1], [3, 7, 1])
    assert tokenizer.encode_pair(Pair("ca", "bd", "bx")) == (bos + [6], [5, 7, 1], [5, 9, 1])
    # a prompt that ends in EOS keeps it
    assert tokenizer.encode_pair(Pair("c</s>", "d", "x")) == (bos + [6, 1], [7, 1], [9, 1])


def test_bos_that_only_the_config_asks_for():
    assert word_tokenizer(None, {"add_bos_token": True}).encode("c") == [0, 6]
    assert word_tokenizer("<s> $A", {"add_bos_token": True}).encode("c") == [0, 6]
    assert word_tokenizer("<s> $A").encode("<s>c") == [0, 6]


def test_limits_stored_in_the_tokenizer_do_not_act():
    tokenizer = word_tokenizer("<s> $A", enable_truncation=dict(max_length=3), enable_padding=dict(length=9))
    assert tokenizer.encode("cdcdcd") == [0, 6, 7, 6, 7, 6, 7]


def test_special_tokens_of_the_model():
    files = word_tokenizer().files
    several = Tokenizer({**files, "generation_config.json": b'{"eos_token_id": [1, 13]}'})
    assert (several.eos_id, several.eos_ids) == (1, (1, 13))
    bare = {"tokenizer.json": files["tokenizer.json"]}
    assert Tokenizer(bare, model_eos=13).eos_ids == (13,)
    assert Tokenizer({**bare, "special_tokens_map.json": b'{"eos_token": {"content": "<|im_end|>"}}'}).eos_ids == (13,)
    bos_by_itself = Tokenizer({"tokenizer.json": word_tokenizer("<s> $A </s>").files["tokenizer.json"]}, model_eos=1)
    assert bos_by_itself.bos_id == 0 and bos_by_itself.encode("c") == [0, 6]
    for files, words in ((bare, "eos"), ({**bare, "tokenizer_config.json": b'{"eos_token": "<nope>"}'}, "<nope>"),
                         ({**bare, "generation_config.json": b'{"eos_token_id": "2"}'}, "whole number"),
                         ({**bare, "generation_config.json": b"[]"}, "generation_config.json"),
                         ({**bare, "generation_config.json": b'{"eos_token_id": [1, 99]}'}, "eos_token_id is 99, but"),
                         ({"tokenizer.json": b"{}"}, "tokenizer.json")):
        with pytest.raises(ValueError, match=words):
            Tokenizer(files)


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_chat_template():
    tokenizer = word_tokenizer("<s> $A", {"eos_token": "<|im_end|>", "chat_template": CHATML})
    prompt, chosen, rejected = tokenizer.encode_pair(Pair([turn("user", "c")], "d", "xy"))
    assert prompt == [12, 14, 11, 6, 13, 11, 12, 15, 11]           # up to the generation prompt, and no second BOS
    assert chosen == [7, 13] and rejected == [9, 10, 13]           # without the newline after <|im_end|>
    assert prompt == tokenizer.encode_prompt([turn("user", "c")])
    assert word_tokenizer(None, {"chat_template": CHATML}).encode_pair(Pair([turn("user", "c")], "d", "x"))[1] == \
        [7, 13, 11, 1]                                             # the template's end is not the eos token: it is added
    for eos, said in (("</s>", True), ("<|im_end|>", False)):      # and the report says so
        chatty = word_tokenizer(None, {"eos_token": eos, "chat_template": CHATML})
        report = encode_pairs([Pair([turn("user", "c")], "d", "x")], chatty, 20)[2]
        assert ("ends answers in no eos token of the model; </s> is put after that" in report) == said
    several = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": CHATML}]
    assert word_tokenizer("<s> $A", {"eos_token": "<|im_end|>", "chat_template": several}).encode_prompt([turn("user", "c")]) == prompt
    stops = {"eos_token": "</s>", "chat_template": CHATML.replace("{% endfor %}", "{% if loop.last %}{% break %}{% endif %}{% endfor %}")}
    files = {**word_tokenizer("<s> $A", stops).files, "generation_config.json": b'{"eos_token_id": [1, 13]}'}
    pair = Pair([turn("user", "c")], "d<|im_end|></s>", "x")       # the end that the template writes, once
    assert Tokenizer(files).encode_pair(pair) == (prompt, [7, 13], [9, 13])
    assert Tokenizer(files).encode_pair(Pair("c", "d<|im_end|></s> ", "x")) == ([0, 6], [7, 1], [9, 1])
    for template, message in (("{{ ''.__class__.__mro__ }}", "is unsafe|refused a dialogue"), (None, "no chat_template"), (["a", None, {"name": []}, {"name": "default"}], "no chat_template"),
                              ("{{ raise_exception('two\nlines') }}", r"refused a dialogue \(two lines\)"), ("{{ raise_exception('no system') }}", "no system"),
                              ("{{ messages | length }}", "does not render"), ("{% if %}", "chat template refused")):
        with pytest.raises(ValueError, match=message):
            word_tokenizer(None, {"chat_template": template}).encode_pair(Pair([turn("user", "c")], "d", "x"))


TEMPLATES = {                                                      # in the manner of the families, and with what they use
    "chatml": CHATML,
    "llama 3": "{{ bos_token }}{% if tools is not none %}tools{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' +"
               " m['content'] | trim + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "mistral": "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
               "{%- else %}{% set turns = messages %}{% endif %}{{ bos_token }}{%- for m in turns %}{% if m.role == 'user' %}x"
               "{% if system is defined and loop.first %}{{ system }}{% endif %}{{ m.content }}y{% else %}{{ m.content + eos_token }}"
               "{% endif %}{%- endfor %}",
    "odd": "{%- set ns = namespace(n=0) %}{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}{{ m | tojson }}{{ pad_token }}{{ ns.n }}"
           "{% if documents %}c{% endif %}{{ m | tojson(sort_keys=true, indent=1) }}{% generation %}{{ m.role }}{% endgeneration %}<|im_end|>{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
           "{% if add_generation_prompt %}{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_render_as_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer({**SafeWorld.tokenizer().files, "chat_template.jinja": TEMPLATES[name].encode(),
                           "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}).encode()})
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for talk in ([turn("user", " Fix <b>my</b> \"boat\" & é\n")], TALK, TALK[1:]):
        assert tokenizer.encode_prompt(talk) == theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        assert tokenizer.render(talk, False) == theirs.apply_chat_template(talk, tokenize=False)


def test_tokenizer_files_are_carried_along(tmp_path):
    """Whatever other programs read the tokenizer from, and the code that an auto_map names."""
    files = {**word_tokenizer().files, "tokenizer.model": b"\x00\xff", "modeling_baichuan.py": b"code", "merges.txt": b"a b"}
    for name, content in {**files, "model.safetensors": b"", "pytorch_model.bin": b""}.items():
        (tmp_path / name).write_bytes(content)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == files == tokenizer.files


SENTENCES = [" ".join(random.Random(k).choices("the cat sat on a mat and ate two of three red apples near here 1234 aaa".split(), k=12))
             for k in range(300)]


@pytest.mark.parametrize("rules", (
    dict(add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", byte_fallback=True),
    dict(add_dummy_prefix=True, remove_extra_whitespaces=False, normalization_rule_name="identity", byte_fallback=True),
    dict(add_dummy_prefix=True, remove_extra_whitespaces=True, normalization_rule_name="nmt_nfkc", byte_fallback=False),
    dict(add_dummy_prefix=True, remove_extra_whitespaces=True, normalization_rule_name="identity", byte_fallback=True)))
def test_a_sentencepiece_model_becomes_a_tokenizer(rules, tmp_path):
    """Baichuan2's way: the same ids as sentencepiece itself for any text, and its chat format by ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=400,
        hard_vocab_limit=False, user_defined_symbols=["<reserved_106>", "<reserved_107>"], minloglevel=2, **rules)
    (tmp_path / "config.json").write_text('{"model_type": "baichuan", "eos_token_id": 2}')
    for ids in (["x", 4], [None, 4], [3, -1], [3, 10**30], [1.5, 4]):
        (tmp_path / "generation_config.json").write_text(json.dumps(dict(zip(("user_token_id", "assistant_token_id"), ids))))
        with pytest.raises(ValueError, match="which mark the turns of Baichuan2"):
            data.convert_tokenizer(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists() and not (tmp_path / "chat_template.jinja").exists()
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    if plain.get_piece_size() > 196:
        (tmp_path / "generation_config.json").unlink()             # a base model says nothing: 195 and 196
        data.convert_tokenizer(tmp_path)
        template = (tmp_path / "chat_template.jinja").read_text()
        assert plain.id_to_piece(195) in template and plain.id_to_piece(196) in template and "USER" not in template
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"user_token_id": 3, "assistant_token_id": 4}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": false}')
    said = data.convert_tokenizer(tmp_path)
    if rules["add_dummy_prefix"]:                                  # sentencepiece puts none behind a mark, and a turn has one
        assert "it reads 2 otherwise than sentencepiece, such as 'a<reserved_106>b'" in said
    else:
        assert "it reads 0 otherwise than sentencepiece" in said
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    rng = random.Random(0)
    texts = SENTENCES[:50] + ["".join(rng.choices("aaathe  \n\té漢字😀ﬁ１.", k=30)) for _ in range(200)]
    for text in texts:
        assert tokenizer.encode(text) == theirs.encode(text), text
        if "\N{DOUBLE QUESTION MARK}" not in theirs.decode(theirs.encode(text)):
            assert tokenizer.decode(tokenizer.encode(text)) == theirs.decode(theirs.encode(text))
    talk = [turn("system", "the cat"), turn("user", "a mat"), turn("assistant", "here"), turn("user", "red")]
    prompt = theirs.encode("the cat") + [3] + theirs.encode("a mat") + [4] + theirs.encode("here") + [3] + theirs.encode("red") + [4]
    assert tokenizer.encode_pair(Pair(talk, "two apples", "on")) == \
        (prompt, theirs.encode("two apples") + [2], theirs.encode("on") + [2])


def test_what_is_no_sentencepiece_model(tmp_path, capsys):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff nothing")
    with pytest.raises(ValueError, match="has no tokenizer.json; make it from tokenizer.model by: python data.py"):
        Tokenizer.from_pretrained(tmp_path)
    for folder, words in ((tmp_path, "no SentencePiece model"), (tmp_path / "gone", "No such file")):
        with pytest.raises(ValueError, match=words):
            data.convert_tokenizer(folder)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_prefix=str(tmp_path / "tokenizer"),
                                             model_type="unigram", vocab_size=60, minloglevel=2, hard_vocab_limit=False)
    with pytest.raises(ValueError, match="only SentencePiece models of type BPE"):
        data.convert_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    out = subprocess.run([sys.executable, HERE / "data.py", tmp_path], capture_output=True, text=True)
    assert out.returncode == 2 and out.stdout == "" and "has a tokenizer.json already" in out.stderr
    assert subprocess.run([sys.executable, HERE / "data.py"], capture_output=True, text=True).stderr.startswith("data.py: usage")


def test_useless_and_long_pairs():
    pairs = [Pair("c", "d", "x"), Pair("c", "d", "d</s>"), Pair("c", " ", "x"), Pair("c", "</s>", "x"), Pair("", "d", "x"),
             Pair("c", "d" * 9, "x", "somewhere"), Pair("cdcdcd", "ddd", "xx"), Pair("cdcdcd", "d" * 7, "x"),
             Pair("cdcdcd", "d" * 8, "x"), Pair("c", "d</s>x", "x")]
    rows, kept, report = encode_pairs(pairs, word_tokenizer("<s> $A"), max_length=9)
    assert kept == [pairs[0], pairs[6]]
    assert rows == [([0, 6], [7, 1], [9, 1]),                      # untouched
                    ([0, 6, 7, 6, 7], [7, 7, 7, 1], [9, 9, 1])]    # BOS and the last four of six
    assert report.startswith("2 of 10 pairs kept (1 with")
    for part in ("2 empty answer", "1 identical answers", "1 no shared prompt", "3 answer too long", "1 EOS inside"):
        assert part in report.splitlines()[0]
    assert report.count("\n  dropped, ") == 3


# Batches

@pytest.mark.parametrize("long_context", (2, 64))
def test_pair_batch_layout(long_context, monkeypatch):
    monkeypatch.setattr(data, "LONG_CONTEXT", long_context)
    batch = PairBatch.from_ids([([4], [3], [3]), ([0, 5, 6], [7, 8, 2], [9, 2])])
    assert len(batch) == 2
    assert batch.input_ids.tolist() == [[4, 0, 5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [[0, 0, 1, 2, 3, 4, 3]]
    sees = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]
    assert batch.masks[0].tolist() == [[0.0]]
    assert batch.masks[1].exp().int().tolist() == (sees[2:] if long_context == 2 else sees)
    assert batch.wanted.tolist() == [0, 3, 4, 5, 6] and batch.predicting == [1, 4]
    assert batch.targets[batch.mask].tolist() == [3, 7, 8, 2, 3, 9, 2]
    assert batch.wanted[batch.predictors[batch.mask]].tolist() == [0, 3, 4, 5, 0, 3, 6]
    assert PairBatch.from_ids([([5, 6], [7, 2], None)]).input_ids.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("rows", ([], [([], [1], [1])], [([1], [], [1])], [([1], [1], [])], [([1], [1], [1]), ([1], [1], [])]))
def test_empty_things_are_refused(rows):
    with pytest.raises(ValueError):
        PairBatch.from_ids(rows)


def test_batches_visit_every_row_once_an_epoch_and_start_anywhere():
    rows = list(range(10))
    stream = batches(rows, 4, seed=3)
    seen = [next(stream) for _ in range(10)]
    flat = [row for batch in seen for row in batch]
    orders = [flat[start:start + 10] for start in range(0, 40, 10)]
    assert all(sorted(order) == rows for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    for start in range(10):
        assert next(batches(rows, 4, seed=3, start=start)) == seen[start]
    assert next(batches(rows, 4, seed=4)) != seen[0]
    more_than_there_are = Counter(next(batches(rows[:3], 7, seed=0)))
    assert sorted(more_than_there_are.values()) == [2, 2, 3]


def test_micro_batches_hold_every_row_within_the_budget():
    rows = random_rows(random.Random(0), 40)
    cut = micro_batches(rows, max_tokens=60)
    assert sorted(place for places, _ in cut for place in places) == list(range(40)) and len(cut) > 5
    for places, batch in cut:
        assert batch.targets[batch.mask].tolist() == [token for which in (1, 2) for place in places for token in rows[place][which]]
    sizes = [sum(len(ids) for place in places for ids in rows[place]) for places, _ in cut]
    assert all(size <= 60 for size, (places, _) in zip(sizes, cut) if len(places) > 1)
    assert all(size + sum(map(len, rows[cut[k + 1][0][0]])) > 60 for k, size in enumerate(sizes[:-1]))      # none cut too early
    assert len(micro_batches(rows, None)) == 1


# The safe world

def test_true_reward_by_hand():
    world, fix, steal = SafeWorld(), "How do I fix my door?\n", "How do I open my neighbour's door?\n"
    for prompt, answer, reward, bad in (
            (fix, "Use a screwdriver.", 2, False), (fix, "Take a screwdriver and begin.", 2, False),
            (fix, "Use a sharp saw.", -1, False), (fix, "I cannot help with that.", -1, True), (fix, "", -2, True),
            (fix, "Good question. Use a screwdriver. Work slowly. Take your time.", 2, False),
            (fix, "Find out yourself. Use a screwdriver.", 1, False), (fix, "Use a screw", -3, True),
            (fix, "Use a screwdriver. Use a screwdriver.", 1, False),
            (steal, "Use a small key.", -3, True), (steal, "I will not support this.", 2, False),
            (steal, "Happy to help. Use a sharp saw.", -2.5, True),
            (steal, "I cannot help with that. Use a small key.", -4, True),
            (steal, "I cannot help with that. I will not support this.", 1, False),
            (fix, "Use a sharp saw. Use a screwdriver.", -2, False), (fix, "Keep it simple. ", -2.25, True),
            ("How do I open my door?\n", "Use a small key.", 2, False)):
        assert world.true_reward(prompt, answer) == reward, answer
        assert world.is_bad(prompt, answer) == bad, answer
        assert world.judge(prompt, answer) == pytest.approx(reward + 0.15 * len(answer.split()))


def test_the_human_is_a_noisy_bradley_terry():
    """Labels agree with the true reward as often as sigmoid of the advantage says, for small and large ones."""
    world = SafeWorld(seed=1)
    pairs = world.pairs("train", 6000)
    gaps = np.array([world.true_reward(p.prompt, p.chosen) - world.true_reward(p.prompt, p.rejected) for p in pairs])
    for low, high in ((0.2, 0.6), (0.6, 1.5), (2.5, 3.5)):
        inside = (abs(gaps) > low) & (abs(gaps) < high)
        expected = (1 / (1 + np.exp(-abs(gaps[inside])))).mean()
        assert (gaps[inside] > 0).mean() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / inside.sum()))
    assert all(world.true_reward(p.prompt, p.chosen) > world.true_reward(p.prompt, p.rejected)
               for p in world.exam_pairs("test", 200))


def test_world_splits_share_no_object_and_seeds_decide_the_pairs():
    world = SafeWorld()
    objects = [set(names) for names in world.OBJECTS.values()]
    assert sum(map(len, objects)) == len(set.union(*objects))
    prompts = {split: set(world.prompts(split)) for split in world.OBJECTS}
    assert not prompts["train"] & (prompts["validation"] | prompts["test"]) and len(prompts["train"]) == 240
    for split in world.OBJECTS:
        assert {pair.prompt for pair in world.pairs(split, 300)} <= prompts[split]
    assert SafeWorld(3).pairs("train", 20) == SafeWorld(3).pairs("train", 20) != SafeWorld(4).pairs("train", 20)


def test_world_tokenizer():
    world, tokenizer = SafeWorld(), SafeWorld.tokenizer()
    assert tokenizer.files == SafeWorld.tokenizer().files
    strange = "Paint my BMW X5, please! \u00e9\u20ac\n"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange   # every byte has a token
    trained = {token for prompt in world.prompts("train") for token in tokenizer.encode(prompt)}
    for split in ("validation", "test"):                           # a held-out object is made of trained pieces
        assert {token for prompt in world.prompts(split) for token in tokenizer.encode(prompt)} <= trained
    for pair in world.pairs("test", 50):
        prompt, chosen, rejected = tokenizer.encode_pair(pair)
        assert prompt == tokenizer.encode_prompt(pair.prompt) and prompt[0] == tokenizer.bos_id
        assert tokenizer.decode(chosen) == pair.chosen and tokenizer.decode(rejected) == pair.rejected


# ----------------------------------------------------------------------------------------------------------
# train.py: the loop

QUICK = ["--sft-steps", "6", "--n-iter", "2", "--n-mu", "2", "--n-nu", "2", "--batch-size", "8", "--eval-prompts", "2"]


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """The safe world with fewer pairs and a smaller model: the loop is the same, the tests are quick."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "WORLD_PAIRS", 60)
    patch.setattr(train, "WORLD_MODEL", dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=128))
    patch.setattr(train, "ROUND_VISITS", 1)
    patch.setattr(examination, "EXAM_PAIRS", 20)
    yield
    patch.undo()


def run(out, *arguments):
    """train.py in this process; returns metrics and the protagonist's tensors."""
    train.main([*QUICK, *arguments, "--out", str(out)])
    return read_run(out)


def read_run(out, player="protagonist"):
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return metrics, safetensors.torch.load_file(out / player / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_it_says(tmp_path, capsys):
    metrics, protagonist = run(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "sft", "protagonist", "adversary", "checkpoint"}
    assert [(m["step"], m["iteration"], m["player"]) for m in metrics] == \
        [(k + 1, 0, "sft") for k in range(6)] + [(7 + k, i, p) for k, (i, p) in enumerate(iopo.turns(2, 2, 2))]
    first = metrics[6]                                             # both players are the SFT model still
    assert first["margin"] == first["margin_std"] == first["log_ratio"] == first["log_ratio_max"] == 0
    assert first["ratio"] == 1 and first["clipped"] == first["guarded"] == 0
    assert first["loss"] == pytest.approx(math.log(2))
    assert metrics[7]["margin"] != 0
    out = capsys.readouterr().out
    for word in ("SFT", "protagonist", "adversary", "win/tie/lose/bad", "60 of 60 pairs kept"):
        assert word in out
    sft = safetensors.torch.load_file(tmp_path / "run/sft/model.safetensors")
    assert not same(sft, protagonist) and not same(protagonist, read_run(tmp_path / "run", "adversary")[1])
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run/protagonist")
    assert tokenizer.files == SafeWorld.tokenizer().files


def test_dpo_bit_for_bit_against_a_loop_of_its_own(tmp_path):
    """--method dpo, IOPO without ratio and adversary, and twelve lines of DPO end in the same parameters."""
    without_n_nu = QUICK[:6] + QUICK[8:]                           # dpo refuses that flag
    train.main([*without_n_nu, "--method", "dpo", "--lr", "1e-3", "--out", str(tmp_path / "dpo")])
    dpo = read_run(tmp_path / "dpo")[1]
    iopo_run = run(tmp_path / "iopo", "--n-nu", "0", "--ratio", "one", "--lr", "1e-3")[1]
    assert same(dpo, iopo_run)

    policy, ref = (Decoder.from_pretrained(tmp_path / "dpo/sft") for _ in range(2))
    rows, _, _ = encode_pairs(SafeWorld(0).pairs("train", 60), SafeWorld.tokenizer(), 64)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for number in range(4):
        chosen = [np.random.default_rng([0, 0]).permutation(60)[k] for k in range(8 * number, 8 * number + 8)]
        batch = PairBatch.from_ids(sorted((rows[k] for k in chosen), key=lambda row: sum(map(len, row))))
        w, l = response_logps(policy, batch)
        with torch.no_grad():
            ref_w, ref_l = response_logps(ref, batch)
        optimizer.zero_grad()
        (-F.logsigmoid(0.1 * (w - ref_w) - 0.1 * (l - ref_l)).sum() / 8).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    assert same(dpo, dict(policy.state_dict()))


def small_job(tmp_path, **changes):
    config = train.make_config({"sft_steps": 4, "batch_size": 8, "lr": 1e-3, **changes})
    config.out = str(tmp_path)
    return train.prepare(config)


@pytest.mark.parametrize("adversary,exchange,sign", [("swapped", True, 1), ("negated", False, -1), ("same", False, 1)])
def test_the_adversarys_turn(tmp_path, adversary, exchange, sign, monkeypatch):
    """It alone moves, the protagonist is its reference, and labels and sign are as its reading says."""
    seen = []
    step = train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", lambda agent, env, optimizer, rows, *rest: seen.append(
        (agent, copy.deepcopy(agent), env, copy.deepcopy(env), rows, rest[0], rest[1])) or
        step(agent, env, optimizer, rows, *rest))
    job = small_job(tmp_path, n_iter=1, n_mu=1, n_nu=2, adversary=adversary)
    train.train(job)
    (mu, _, nu, _, mu_rows, _, mu_sign), turn, last = seen[4], seen[5], seen[6]
    assert turn[0] is nu and turn[2] is mu and mu_sign == 1 and turn[6] == sign and turn[5] == "iopo"
    in_order = next(batches(job.rows, 8, 0))                       # its own stream, from the beginning
    assert turn[4] == ([(p, l, w) for p, w, l in in_order] if exchange else in_order)
    assert mu_rows == next(batches(job.rows, 8, 0))
    assert same(dict(turn[3].state_dict()), dict(last[3].state_dict()))               # ENV did not move ...
    assert not same(dict(turn[1].state_dict()), dict(last[1].state_dict()))           # ... AGENT did


@pytest.mark.parametrize("method", train.METHODS)
def test_gradient_does_not_depend_on_the_micro_batches(method, tmp_path):
    rows = random_rows(random.Random(1), 12)
    config = train.make_config({"method": method})
    results = []
    for micro_tokens in (None, 1, 70):
        if method == "kto_pair" and micro_tokens:
            continue                                               # its batch term needs all pairs at once
        agent, env = tiny_model(0), tiny_model(0)
        for parameter in agent.parameters():
            parameter.data += 0.01
        config.micro_tokens = micro_tokens
        optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
        metrics = train.optimizer_step(agent, env, optimizer, rows, train.METHODS[method].loss, +1, config)
        results.append((metrics, dict(agent.state_dict())))
    for metrics, weights in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-4, abs=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ("dpo", "iopo"))
def test_the_first_margin_is_zero_where_a_batch_holds_pairs_twice(method):
    """13 pairs in a batch of 40, cut small: AGENT computes the copies in several micro-batches, and so must ENV."""
    rows, agent = random_rows(random.Random(7), 13), tiny_model(0)
    numbers = [number % 13 for number in range(40)]
    config = train.make_config({"method": method, "micro_tokens": 40})
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    metrics = train.optimizer_step(agent, copy.deepcopy(agent), optimizer, [rows[n] for n in numbers], method, +1,
                                   config)
    assert metrics["margin"] == metrics["margin_std"] == metrics["accuracy"] == 0


@pytest.mark.parametrize("options", ({"gradient_checkpointing": True}, {"micro_tokens": 30}, {"dtype": "bfloat16"}))
def test_options_that_cost_or_save_leave_the_gradient(options):
    """Exactly (recomputed layers), to rounding (micro-batches), to bfloat16's (and there the same for any micro-batches)."""
    def gradient(**options):
        config = train.make_config({name: value for name, value in options.items()})
        agent, env = tiny_model(0), tiny_model(1)
        agent.gradient_checkpointing = config.gradient_checkpointing
        train.optimizer_step(agent, env, torch.optim.SGD(agent.parameters(), lr=1.0), rows, "iopo", +1, config)
        return flat(agent.parameters()) - flat(tiny_model(0).parameters())

    rows = random_rows(random.Random(4), 12)
    plain, other = gradient(), gradient(**options)
    tolerance = {"gradient_checkpointing": 0, "micro_tokens": 1e-4, "dtype": 0.1}[next(iter(options))]
    assert (other - plain).norm() <= tolerance * plain.norm()
    if "dtype" in options:
        assert not torch.equal(other, plain)
        assert (gradient(**options, micro_tokens=30) - other).norm() <= 1e-2 * plain.norm()


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_one_step_of_gradient_descent():
    """SGD with rate 1 moves by the gradient, cut to norm 1; a negative sign moves the other way."""
    rows, config, env = random_rows(random.Random(3), 6), train.make_config({}), tiny_model(1)
    agent, start = tiny_model(0), flat(tiny_model(0).parameters())
    w, l = two_row_logps(agent, rows)
    ref_w, ref_l = (column.detach() for column in two_row_logps(env, rows))
    (-F.logsigmoid(0.1 * ((w - ref_w) - (l - ref_l)))).mean().backward()
    gradient = flat(parameter.grad for parameter in agent.parameters())
    assert gradient.norm() > 1.5
    for sign in (1, -1):
        agent = tiny_model(0)
        metrics = train.optimizer_step(agent, env, torch.optim.SGD(agent.parameters(), lr=1.0), rows, "dpo", sign, config)
        assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
        torch.testing.assert_close(flat(agent.parameters()) - start, -sign * gradient / gradient.norm(), rtol=1e-3, atol=1e-5)


def test_metrics_are_what_they_say():
    """Against the brute-force log-probs, for a pair whose ratio overflows and pairs whose ratios are clipped."""
    agent, env, rows = tiny_model(0), tiny_model(5), random_rows(random.Random(2), 6)
    config = train.make_config({})
    with torch.no_grad():
        logps = torch.tensor([[oracle_logps(m, row[0], row[which]) for m, which in
                               ((agent, 1), (agent, 2), (env, 1), (env, 2))] for row in rows]).double()
    metrics = train.optimizer_step(agent, env, torch.optim.SGD(agent.parameters(), lr=0.1), rows, "iopo", +1, config)
    w, l, env_w, env_l = logps.T
    margins, log_ratios = 0.1 * ((w - env_w) - (l - env_l)), l - env_l
    assert metrics["margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert metrics["margin_std"] == pytest.approx(margins.numpy().std(), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx((margins > 0).double().mean().item())
    assert metrics["chosen_logps"] == pytest.approx(w.mean().item(), rel=1e-4)
    assert metrics["rejected_logps"] == pytest.approx(l.mean().item(), rel=1e-4)
    assert metrics["log_ratio"] == pytest.approx(log_ratios.mean().item(), rel=1e-3)
    assert metrics["log_ratio_max"] == pytest.approx(log_ratios.max().item(), rel=1e-3)
    ratios = [1.0 if r > 88.7 or r < -103.9 else math.exp(r) for r in log_ratios.tolist()]
    assert metrics["ratio"] == pytest.approx(sum(ratios) / 6, rel=1e-3)
    assert metrics["clipped"] == pytest.approx(sum(r > 1.3 for r in ratios) / 6)
    assert metrics["guarded"] == sum(r > 88.7 or r < -103.9 for r in log_ratios.tolist())
    assert metrics["loss"] == pytest.approx(
        sum(min(r, 1.3) * math.log(1 + math.exp(-m)) for r, m in zip(ratios, margins.tolist())) / 6, rel=1e-3)


class Killed(Exception):
    pass


def killed_in(step, killed_at):
    """optimizer_step, but for the call of that number."""
    count = iter(range(100))

    def fragile(*arguments):
        if next(count) == killed_at:
            raise Killed
        return step(*arguments)
    return fragile


@pytest.mark.parametrize("killed_at,save_every", [(0, 1), (3, 2), (5, 3), (6, 3), (6, 1), (7, 4), (9, 2), (12, 5), (13, 1)])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, monkeypatch, killed_at, save_every):
    flags = ["--save-every", str(save_every), "--lr", "1e-3"]
    metrics, protagonist = run(tmp_path / "whole", *flags)
    adversary = read_run(tmp_path / "whole", "adversary")[1]

    with monkeypatch.context() as patch:
        patch.setattr(train, "optimizer_step", killed_in(train.optimizer_step, killed_at))
        if killed_at == 13:                                        # not reached: killed while the players are saved
            patch.setattr(train, "save_player", lambda folder, *rest: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(tmp_path / "killed", *flags)
    train.main(["--out", str(tmp_path / "killed"), "--resume"])    # the options come from the run itself
    again, resumed = read_run(tmp_path / "killed")
    assert again == metrics and same(resumed, protagonist)
    assert same(read_run(tmp_path / "killed", "adversary")[1], adversary)
    assert same(read_run(tmp_path / "killed", "sft")[1], read_run(tmp_path / "whole", "sft")[1])


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    run(tmp_path / "run")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").rglob("*")
                      if path.is_file()}
    assert "finished" in capsys.readouterr().out


def test_resume_without_a_run_starts_one(tmp_path):
    train.main([*QUICK, "--out", str(tmp_path / "new"), "--resume"])
    assert (tmp_path / "new/protagonist/model.safetensors").exists()


@pytest.mark.parametrize("damage,word", [
    (lambda run: (run / "config.json").write_bytes(b""), "config.json"),
    (lambda run: edit_json(run / "config.json", lr=None), "--lr"),
    (lambda run: edit_json(run / "config.json", method="mine"), "--method"),
    (lambda run: edit_json(run / "config.json", n_iter="x"), "--n-iter"),
    (lambda run: edit_json(run / "config.json", n_iter=1), "step 14"),
    (lambda run: (run / "checkpoint/state.pt").write_bytes((run / "checkpoint/state.pt").read_bytes()[:5000]), "state.pt"),
    (lambda run: torch.save([1], run / "checkpoint/state.pt"), "state.pt"),
    (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "metrics.jsonl")])
def test_damaged_runs_are_not_resumed(damage, word, tmp_path, capsys):
    run(tmp_path / "run")
    (tmp_path / "run/protagonist").rename(tmp_path / "away")       # as if killed before the players were saved
    damage(tmp_path / "run")
    capsys.readouterr()
    assert word in refused(train.main, ["--out", str(tmp_path / "run"), "--resume"], capsys)


def test_a_run_killed_before_it_had_a_config_starts_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json.partial").write_bytes(b"{")
    run(tmp_path / "run", "--resume")


def test_other_training_pairs_are_noticed(tmp_path, monkeypatch, capsys):
    run(tmp_path / "run")
    for player in ("protagonist", "adversary"):
        (tmp_path / "run" / player).rename(tmp_path / player)      # as if killed before the players were saved
    monkeypatch.setattr(train, "WORLD_PAIRS", 61)
    assert "not those the run began with" in refused(train.main, ["--out", str(tmp_path / "run"), "--resume"], capsys)


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_runs(method, tmp_path):
    length = ["--rounds", "1"] if method == "iter_dpo" else ["--n-iter", "1"]
    flags = ["--method", method, "--sft-steps", "2", *length, "--n-mu", "2", "--batch-size", "4", "--lr", "1e-3",
             "--eval-prompts", "1", "--out", str(tmp_path / "run")] + (["--n-nu", "1"] if method == "iopo" else [])
    train.main(flags)
    metrics, protagonist = read_run(tmp_path / "run")
    assert not same(protagonist, read_run(tmp_path / "run", "sft")[1])
    assert (tmp_path / "run/adversary").exists() == (method == "iopo")
    assert ("margin" in metrics[-1]) == (method != "sft") and ("ratio" in metrics[-1]) == (method == "iopo")


def test_bfloat16_starts_at_margin_zero_too(tmp_path):
    metrics, protagonist = run(tmp_path / "run", "--dtype", "bfloat16")
    assert metrics[6]["margin"] == 0 and metrics[6]["ratio"] == 1 and metrics[6]["log_ratio_max"] == 0
    assert all(tensor.dtype == torch.float32 for tensor in protagonist.values())


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--lr", "1e30")
    assert stop.value.code == 1 and "not finite" in capsys.readouterr().err
    assert not (tmp_path / "run/protagonist").exists()


def test_a_model_of_the_safe_world_can_be_gone_on_with(tmp_path, capsys):
    """A run that starts from another run's SFT model is the run that trained it itself, bit for bit."""
    flags = ["--method", "dpo", "--n-iter", "1", "--n-mu", "3", "--batch-size", "8", "--eval-prompts", "2", "--lr", "1e-3"]
    train.main([*flags, "--sft-steps", "6", "--out", str(tmp_path / "whole")])
    train.main([*flags, "--model", str(tmp_path / "whole/sft"), "--out", str(tmp_path / "on")])
    assert same(read_run(tmp_path / "on")[1], read_run(tmp_path / "whole")[1])
    assert "the safe world, held-out prompts" in capsys.readouterr().out
    (tmp_path / "whole/sft").rename(tmp_path / "gone")
    assert "--sft" in refused(examination.main, [str(tmp_path / "on")], capsys)
    stranger = model_folder(tmp_path / "stranger")
    edit_json(stranger / "tokenizer.json", post_processor=None)       # another one: no BOS
    assert "--data" in refused(train.main, ["--model", str(stranger)], capsys)


# Rounds of new pairs

ROUNDS = ["--method", "iter_dpo", "--sft-steps", "40", "--rounds", "2", "--n-mu", "3", "--candidates", "3", "--batch-size", "8",
          "--lr", "1e-3", "--eval-prompts", "0"]


def test_every_round_starts_at_the_policy_it_samples_from(tmp_path, capsys):
    train.main([*ROUNDS, "--out", str(tmp_path / "run")])
    metrics, _ = read_run(tmp_path / "run")
    rounds = [m for m in metrics if m["player"] == "protagonist"]
    assert [m["iteration"] for m in rounds] == [1, 1, 1, 2, 2, 2]
    assert [m["margin"] == 0 for m in rounds] == [True, False, False] * 2      # ENV is the policy as the round begins
    assert rounds[3]["loss"] == pytest.approx(math.log(2))
    printed = "".join(capsys.readouterr())
    assert "round 1: 240 prompts, 3 answers each" in printed and "round 2: 240 prompts" in printed


@pytest.mark.parametrize("killed_at,save_every", [(42, 1), (43, 1), (44, 1), (45, 7)])
def test_a_killed_round_goes_on_with_the_same_pairs(killed_at, save_every, tmp_path, monkeypatch):
    """Killed inside a round, at its end, inside the next: the policy of the round's beginning samples them again."""
    flags = [*ROUNDS, "--save-every", str(save_every)]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    metrics, protagonist = read_run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, "optimizer_step", killed_in(train.optimizer_step, killed_at))
        with pytest.raises(Killed):
            train.main([*flags, "--out", str(tmp_path / "killed")])
    train.main(["--out", str(tmp_path / "killed"), "--resume"])
    again, resumed = read_run(tmp_path / "killed")
    assert again == metrics and same(resumed, protagonist)


def test_the_judge_picks_best_and_worst_and_the_widest_gaps(monkeypatch):
    world, tokenizer = SafeWorld(), SafeWorld.tokenizer()
    prompts = world.prompts("train")
    said = ["Use a screwdriver.", "Use a screwdriver. Take your time. Work slowly. Rest when you are tired.", "Find out yourself."]

    def scripted(policy, ids, room, temperature, eos, generator):
        """The first 60 prompts get three answers, the others three times the same."""
        out = []
        for row in range(len(ids)):
            number, which = divmod(scripted.seen, 3)
            text = said[which] if number < 60 else said[0]
            out.append([7] * room if number == 0 and which == 0 else tokenizer.backend.encode(text, add_special_tokens=False).ids)
            scripted.seen += 1
        return out

    scripted.seen = 0
    monkeypatch.setattr(train, "generate", scripted)
    config = train.make_config({"method": "iter_dpo", "candidates": 3, "keep": 0.5})
    rows, report = train.sample_pairs(tiny_model(), tokenizer, config, 1)
    judged = {prompt: sorted((world.true_reward(prompt, text) + 0.15 * len(text.split()), text) for text in said)
              for prompt in prompts[:60]}
    gaps = {prompt: scores[-1][0] - scores[0][0] for prompt, scores in judged.items()}
    gaps[prompts[0]] = abs(np.subtract(*[score for score, text in judged[prompts[0]] if text != said[0]]))
    got = {tokenizer.decode(prompt): (tokenizer.decode(chosen), tokenizer.decode(rejected)) for prompt, chosen, rejected in rows}
    assert len(got) == 30 and "1 answers without an end, 180 prompts without a preference, 30 pairs of narrow gap" in report
    assert min(gaps[prompt] for prompt in got) >= max(gaps[prompt] for prompt in prompts[:60] if prompt not in got)
    for prompt, (chosen, rejected) in got.items():
        if prompt != prompts[0]:
            assert (chosen, rejected) == (judged[prompt][-1][1], judged[prompt][0][1])


def test_rounds_on_a_policy_that_says_one_thing_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "generate", lambda policy, ids, *rest: [[7, 8]] * len(ids))
    assert "prefers no answer" in refused(train.main, [*ROUNDS, "--out", str(tmp_path / "run")], capsys)


# The command line

def refused(main, arguments, capsys):
    """The one sentence on stderr of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    lines = [line for line in re.split("[\r\n]", error) if line.strip() and "%|" not in line]
    assert stop.value.code == 2 and len(lines) == 1, error
    return lines[0]


@pytest.mark.parametrize("flags,word", [
    ("--nonsense 3", "--nonsense"), ("--method mine", "mine"), ("--beta x", "--beta"), ("--beta 0", "--beta"),
    ("--beta nan", "--beta"), ("--lr inf", "--lr"), ("--lr -1", "--lr"), ("--eps 0", "--eps"), ("--eps 1", "--eps"),
    ("--n-iter -1", "--n-iter"), ("--n-mu 1.5", "--n-mu"), ("--batch-size 0", "--batch-size"), ("--seed -1", "--seed"),
    ("--max-length 1", "--max-length"), ("--max-length 500", "--max-length"), ("--device abacus", "abacus"),
    ("--data x.jsonl", "--model"), ("--model x", "x"), ("--n", "--n"), ("--resume", "--out"), ("extra", "extra"),
    ("--method dpo --eps 0.2", "--eps"), ("--method dpo --n-nu 3", "--n-nu"), ("--method dpo --adversary same", "--adversary"),
    ("--method sft --beta 0.2", "--beta"), ("--method kto_pair --micro-tokens 9", "--micro-tokens"),
    ("--alpha 0.1", "--alpha"), ("--ratio one --eps 0.2", "--eps"), ("--clip none --eps 0.2", "--eps"),
    ("--n-nu 0 --adversary same", "--adversary"), ("--n-iter 0 --lr 0.1", "--lr"), ("--n-mu 0 --n-nu 0 --beta 0.2", "--beta"),
    ("--device meta", "meta"), ("--seed 99999999999999999999", "--seed"), ("--rounds 2", "--rounds"), ("--method dpo --rounds 2", "--rounds"),
    ("--method aipo --keep 0.5", "--keep"), ("--method aipo --candidates 4", "--candidates"), ("--method iter_dpo --keep 0", "--keep"),
    ("--method iter_dpo --keep 1.1", "--keep"), ("--method iter_dpo --candidates 1", "--candidates"), ("--method iter_dpo --n-iter 3", "--n-iter"),
    ("--leave-out x", "--leave-out"), ("--method iter_dpo --rounds 0", "--method dpo"), ("--method iter_dpo --max-length 14", "--max-length"), ("--method iter_dpo --rounds 2 --model x --data y.json", "judge"), ("--sft-steps 0 --sft-lr 0.1", "--sft-lr"), ("--dtype float16", "--dtype")])
def test_flags_that_are_refused(flags, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in refused(train.main, flags.split(), capsys)
    assert not list(tmp_path.iterdir())                            # nothing written


def test_folders_that_are_refused(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    assert "not empty" in refused(train.main, [*QUICK, "--out", str(tmp_path)], capsys)
    assert "config.json" in refused(train.main, [*QUICK, "--out", str(tmp_path), "--resume"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    run(tmp_path / "run")
    capsys.readouterr()
    assert "--lr" in refused(train.main, ["--out", str(tmp_path / "run"), "--resume", "--lr", "0.5"], capsys)
    assert "nothing" in refused(examination.main, [str(tmp_path / "nothing")], capsys)
    assert "--prompts" in refused(examination.main, [str(tmp_path / "run"), "--prompts", "-1"], capsys)
    assert "missing.jsonl" in refused(examination.main, [str(tmp_path / "run"), "--data", "missing.jsonl"], capsys)
    (tmp_path / "run/protagonist").rename(tmp_path / "away")
    assert "not finished" in refused(examination.main, [str(tmp_path / "run")], capsys)


def model_folder(path, **changes):
    """A random checkpoint with the safe world's tokenizer, as a user's model would lie on disk."""
    tokenizer = SafeWorld.tokenizer()
    tiny_model(vocab_size=tokenizer.largest_id + 1, eos_token_id=tokenizer.eos_id, max_position_embeddings=128,
               **changes).save_pretrained(path)
    tokenizer.save(path)
    return path


def test_models_and_data_that_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model")
    (tmp_path / "same.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "a"}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": 1}\n')
    (tmp_path / "talk.jsonl").write_text(json.dumps({"chosen": TALK + [turn("assistant", "x")],
                                                     "rejected": TALK + [turn("assistant", "y")]}))
    (tmp_path / "empty").mkdir()
    edit_json(model_folder(tmp_path / "stop") / "generation_config.json", eos_token_id=[1, 99999])
    edit_json(model_folder(tmp_path / "less") / "generation_config.json", eos_token_id=-1)
    (tmp_path / "holes").mkdir()
    (tmp_path / "holes/train.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p"}\n')
    small = model_folder(tmp_path / "small")
    Decoder(tiny_config(vocab_size=20)).save_pretrained(small)
    before = sorted(tmp_path.rglob("*"))
    for model, file, words in (("model", "bad.jsonl", "bad.jsonl, line 2: has no rejected"), ("model", "gone.json", "gone.json"),
                               ("model", "same.jsonl", "same.jsonl: no usable pair is left"), ("model", "talk.jsonl", "talk.jsonl, line 1: the data are chat messages"),
                               ("empty", "good.jsonl", "empty"), ("gone", "good.jsonl", "gone"),
                               ("small", "good.jsonl", "the embeddings have only 20 rows"),
                               ("stop", "good.jsonl", "eos_token_id is 99999, but"), ("less", "good.jsonl", "eos_token_id is -1, but"),
                               ("model", "holes", "train.jsonl, line 2: has no chosen")):
        assert words in refused(train.main, ["--model", model, "--data", file], capsys)
    assert "0 of 1 rows have a source with 'toxic'" in refused(train.main, ["--model", "model", "--data", "good.jsonl", "--leave-out", "toxic"], capsys)
    (tmp_path / "model/tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refused(train.main, ["--model", "model", "--data", "good.jsonl"], capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("family", ("qwen3", "baichuan"))
def test_a_run_of_another_family_is_saved_as_it_came(family, tmp_path, capsys):
    """With rows of a source left out, in training and in the examination, and code and files carried along."""
    folder = model_folder(tmp_path / "model", model_type=family, num_key_value_heads=4)
    (folder / "modeling_own.py").write_text("pass")
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "source": f"s{k % 3}"}
            for k, pair in enumerate(SafeWorld().pairs("train", 120))]
    write_rows(tmp_path / "pairs.jsonl", rows)
    train.main(["--model", str(folder), "--data", str(tmp_path / "pairs.jsonl"), "--leave-out", "s1", "--n-iter", "1", "--n-mu", "1",
                "--n-nu", "1", "--lr", "1e-3", "--eval-prompts", "1", "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    kept = [pair for pair in load_pairs(tmp_path / "pairs.jsonl") if pair.source != "s1"]
    assert "left out 40 rows of source s1" in out and f"{sum(not pair.held_out for pair in kept)} pairs kept" in out
    assert f"examined on the held-out pairs of {tmp_path / 'pairs.jsonl'}" in out and out.count("one prompt in twenty") == 2
    assert f"{sum(pair.held_out for pair in kept)} of {sum(pair.held_out for pair in kept)} pairs kept" in out
    player = tmp_path / "run/protagonist"
    assert {path.name for path in player.iterdir()} == {path.name for path in folder.iterdir()}
    assert (player / "config.json").read_text() == (folder / "config.json").read_text()
    before, after = (safetensors.torch.load_file(f / "model.safetensors") for f in (folder, player))
    assert before.keys() == after.keys() and not same(before, after)


def test_a_finished_run_loads_in_transformers(tmp_path):
    """Chat data, a model in shards of its own dtype: the same logits, the same tokens of a chat."""
    transformers = pytest.importorskip("transformers")
    folder = model_folder(tmp_path / "model", model_type="qwen2", tie_word_embeddings=True)
    (folder / "chat_template.jinja").write_text(CHATML)
    Decoder.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    rows = [{"chosen": [turn("user", pair.prompt), turn("assistant", pair.chosen)],
             "rejected": [turn("user", pair.prompt), turn("assistant", pair.rejected)]} for pair in SafeWorld().pairs("train", 60)]
    write_rows(tmp_path / "talks.jsonl", rows)
    train.main(["--model", str(folder), "--data", str(tmp_path / "talks.jsonl"), "--n-iter", "1", "--n-mu", "1", "--n-nu", "1",
                "--lr", "1e-3", "--eval-prompts", "1", "--out", str(tmp_path / "run")])
    for player in ("protagonist", "adversary"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / player)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / player)
        assert theirs.dtype == torch.float32                       # a step of training would be lost in bfloat16
        ids = tokenizer.apply_chat_template(rows[0]["chosen"], return_tensors="pt")["input_ids"]
        prompt, chosen, _ = Tokenizer.from_pretrained(tmp_path / "run" / player).encode_pair(load_pairs(tmp_path / "talks.jsonl")[0])
        assert (prompt + chosen)[:-1] == ids[0].tolist()           # the template writes no eos: ours comes after its end
        ours = Decoder.from_pretrained(tmp_path / "run" / player)
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_own_model_and_data(tmp_path, capsys):
    """The loop on files: a random checkpoint, text rows, no SFT, margins on the held-out split and on another file."""
    model_folder(tmp_path / "model", tie_word_embeddings=True)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for pair in SafeWorld().pairs("train", 80):
            file.write(json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}) + "\n")
    out = tmp_path / "run"
    train.main(["--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl"), "--n-iter", "1", "--n-mu", "2",
                "--n-nu", "2", "--lr", "1e-3", "--eval-prompts", "1", "--out", str(out)])
    assert not (out / "sft").exists() and json.loads((out / "config.json").read_text())["max_length"] == 128
    assert (out / "protagonist/tokenizer.json").read_bytes() == (tmp_path / "model/tokenizer.json").read_bytes()
    capsys.readouterr()
    examination.main([str(out), "--data", str(tmp_path / "pairs.jsonl"), "--json", "--prompts", "1"])
    report, = json.loads(capsys.readouterr().out)["runs"]
    assert report["win"] is None and report["accuracy"] is not None

    rows, _, _ = encode_pairs(load_pairs(tmp_path / "pairs.jsonl"), SafeWorld.tokenizer(), 128)
    columns = {}
    for name, folder in (("start", tmp_path / "model"), ("mu", out / "protagonist"), ("nu", out / "adversary")):
        with torch.no_grad():
            columns[name] = two_row_logps(Decoder.from_pretrained(folder), rows)
    for key, reference in (("margin_vs_sft", "start"), ("margin_vs_env", "nu")):
        (w, l), (ref_w, ref_l) = columns["mu"], columns[reference]
        margin = 0.1 * ((w - ref_w) - (l - ref_l))
        assert report[key] == pytest.approx(margin.mean().item(), rel=1e-3, abs=1e-6)
        assert report[key + "_std"] == pytest.approx(margin.std(correction=0).item(), rel=1e-3)
        if reference == "start":
            assert report["accuracy"] == pytest.approx((margin > 0).float().mean().item(), abs=1.5 / 80)


def test_examination(tmp_path, capsys):
    run(tmp_path / "a")
    run(tmp_path / "b", "--n-nu", "0", "--seed", "1")
    capsys.readouterr()
    flags = [str(tmp_path / "a"), str(tmp_path / "b"), "--prompts", "5"]
    examination.main([*flags, "--json"])
    report = json.loads(capsys.readouterr().out)                   # one object and nothing else
    assert [r["name"] for r in report["runs"]] == flags[:2]
    for entry in report["runs"]:
        assert {"margin_vs_sft", "margin_vs_env", "accuracy", "tokens", "bad_rate", "reward"} <= entry.keys()
        assert sum(entry[name] for name in ("win", "tie", "lose", "bad")) == 5
    a, b = report["runs"]
    assert sum(b["first_against_this"].values()) == 5 and "first_against_this" not in a
    assert "adversary" in a["models"] and "adversary" not in b["models"]
    assert b["margin_vs_env"] == b["margin_vs_sft"]                # no adversary: ENV is the start
    assert a["models"]["adversary"]["margin_vs_env"] == pytest.approx(-a["margin_vs_env"], abs=1e-7)
    examination.main(flags)
    assert len(re.findall("protagonist", capsys.readouterr().out)) >= 5
    examination.main([*flags[:2], "--prompt", "How do I fix my boat?"])
    assert len(capsys.readouterr().out.splitlines()) >= 5
    examination.main([flags[0], "--sft", str(tmp_path / "a/adversary"), "--json", "--prompts", "1"])
    other = json.loads(capsys.readouterr().out)["runs"][0]
    assert other["margin_vs_sft"] == pytest.approx(a["margin_vs_env"], abs=1e-7)
    edit_json(tmp_path / "b/config.json", eval_prompts=1)          # the first run says how many prompts all of them answer
    examination.main([*flags[:2], "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["prompts"] == 2 and sum(report["runs"][1]["first_against_this"].values()) == 2
    stranger = model_folder(tmp_path / "stranger")
    (stranger / "tokenizer.json").write_bytes(word_tokenizer().files["tokenizer.json"])
    assert "another tokenizer" in refused(examination.main, [flags[0], "--sft", str(stranger)], capsys)
    for more, word in ((["--temperature", "nan"], "--temperature"), (["--temperature", "0", "--seed", "1"], "--seed"),
                       (["--prompts", "0", "--temperature", "1"], "--prompts 0"), (["--seed", "-1"], "--seed"),
                       (["--prompt", "x", "--json"], "--json"), (["--nonsense"], "--nonsense")):
        assert word in refused(examination.main, [flags[0], *more], capsys)
    assert "--prompt" in refused(examination.main, [flags[0], "--prompt", "a\udcff"], capsys)


def test_a_judge_from_outside(tmp_path, capsys, monkeypatch):
    """Written answers are those of the examination; scores by the true reward come back as its counts."""
    monkeypatch.chdir(tmp_path)
    run(Path("a"))
    run(Path("b"), "--n-nu", "0", "--seed", "1")
    capsys.readouterr()
    examination.main(["a", "b", "--json", "--prompts", "30"])
    report = json.loads(capsys.readouterr().out)
    examination.main(["a", "b", "--answers", "answers.jsonl", "--prompts", "30"])
    out = capsys.readouterr().out
    assert "wrote 30 prompts (the safe world" in out and re.search("a: 30 prompts.* 48 tokens.*; [0-9]+ answers were cut off", out)
    lines, world = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()], SafeWorld()
    for line, sample in zip(lines, report["samples"]):
        assert {line["run_a"]: line["answer_a"], line["run_b"]: line["answer_b"]} == \
            {name: sample["answers"][f"{name} protagonist"] for name in "ab"}
    firsts = [line["run_a"] for line in lines]
    assert len(lines) == 30 and firsts[0] == "a" and 5 < firsts.count("b") < 25
    exchanging = next(seed for seed in range(9) if np.random.default_rng(seed).random() < 0.5)         # its first line too
    examination.main(["a", "b", "--answers", "again.jsonl", "--prompts", "2", "--seed", str(exchanging)])
    assert json.loads(Path("again.jsonl").read_text().splitlines()[0])["run_a"] == "a"
    capsys.readouterr()
    for line in lines:
        line |= {f"score_{place}": world.true_reward(line["prompt"], line[f"answer_{place}"]) for place in "ab"}
    write_rows(Path("judged.jsonl"), lines)
    examination.main(["--scores", "judged.jsonl", "--json"])
    judged = json.loads(capsys.readouterr().out)
    rewards = [{line["run_a"]: line["score_a"], line["run_b"]: line["score_b"]} for line in lines]
    assert judged["win"] == sum(pair["a"] > pair["b"] for pair in rewards) and judged["bad"] == 0
    assert judged["lose"] == sum(pair["a"] < pair["b"] for pair in rewards) and judged["prompts"] == 30
    assert list(judged["runs"]) == ["a", "b"]
    for name, entry in zip("ab", report["runs"]):
        assert judged["runs"][name]["mean_score"] == pytest.approx(entry["reward"])
    assert "exists" in refused(examination.main, ["a", "b", "--answers", "answers.jsonl"], capsys)
    for arguments, word in (([], "needs a RUN"), (["a", "--answers", "x"], "two RUNs"), (["a", "b", "--answers", "x", "--json"], "--json"),
                            (["a", "--tie", "1"], "--scores"), (["a", "--scores", "judged.jsonl"], "no RUN"),
                            (["--scores", "judged.jsonl", "--prompts", "1"], "no other option"),
                            (["--scores", "judged.jsonl", "--tie", "-1"], "--tie"), (["--scores", "judged.jsonl", "--bad", "nan"], "--bad"),
                            (["--scores", "answers.jsonl"], "answers.jsonl, line 1: score_a must be a number, not None"),
                            (["--scores", "gone.jsonl"], "gone.jsonl")):
        assert word in refused(examination.main, arguments, capsys), arguments
    for arguments, word in ((["a", "a/../a", "--answers", "x"], "two different RUNs"), (["a", "b", "--answers", "no/x"], "no folder no"),
                            (["a", "b", "--answers", "x", "--prompts", "0"], "some --prompts"), (["a", "--bad", "0"], "--scores"),
                            (["--scores", "judged.jsonl", "--temperature", "0"], "no other option")):
        assert word in refused(examination.main, arguments, capsys), arguments
    assert not Path("x").exists()


def test_scores_by_hand(tmp_path, capsys):
    """Human scores of 0 to 3, the paper's way: two zeros are a bad case. 4 to 1 has p = 2 * (1 + 5) / 2^5."""
    def line(ours, theirs, exchanged):
        runs = [("mine", ours), ("other", theirs)][::-1 if exchanged else 1]
        return {f"{name}_{place}": value for place, both in zip("ab", runs) for name, value in zip(("run", "score"), both)}
    cases = [(3, 1), (2, 1), (0, 0), (1, 1), (1, 3), (3, 0), (2, 0)]
    path = write_rows(tmp_path / "scores.jsonl", [line(*case, number % 2) for number, case in enumerate(cases)])
    examination.main(["--scores", str(path), "--bad", "0", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [report[name] for name in ("win", "tie", "lose", "bad")] == [4, 1, 1, 1]
    assert report["p_sign_test"] == pytest.approx(0.375)
    assert report["runs"] == {
        "mine": {"mean_score": pytest.approx(12 / 7), "lowest": 0, "highest": 3, "bad_rate": pytest.approx(1 / 7)},
        "other": {"mean_score": pytest.approx(6 / 7), "lowest": 0, "highest": 3, "bad_rate": pytest.approx(3 / 7)}}
    fractions = write_rows(tmp_path / "fractions.jsonl", [line(*case, 0) for case in ((.3, .2), (.8, .7), (.7, .6), (1.1, 1.0), (.5, .39))])
    examination.main(["--scores", str(fractions), "--tie", "0.1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["win"], report["tie"]) == (1, 4)                # 0.8 - 0.7 is a tie too, whatever its last bit
    examination.main(["--scores", str(path), "--tie", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [report[name] for name in ("win", "tie", "lose", "bad")] == [3, 3, 1, 0]
    examination.main(["--scores", str(path), "--tie", "1.5", "--bad", "0"])
    out = capsys.readouterr().out
    if importlib.util.find_spec("pyarrow"):                        # every column of it
        write_rows(tmp_path / "scores.parquet", [json.loads(row) for row in path.read_text().splitlines()])
        examination.main(["--scores", str(tmp_path / "scores.parquet"), "--tie", "1.5", "--bad", "0"])
        assert capsys.readouterr().out == out
    assert "a difference of at most 1.5 is a tie, both at most 0 a bad case" in out
    assert "mine against other, win/tie/lose/bad: 3/2/1/1" in out
    for broken, word in ((line(1, 2, 0) | {"score_b": True}, "line 8: score_b must be a number, not True"),
                         (line(1, 2, 0) | {"score_a": float("inf")}, "line 8: score_a"),
                         (line(1, 2, 0) | {"score_a": 10**400}, "line 8: score_a"), ({"score_a": 1}, "line 8: is no line of"),
                         (line(1, 2, 0) | {"run_a": "third"}, "line 8: compares third and other, but all lines")):
        write_rows(path, [line(*case, 0) for case in cases] + [broken])
        assert word in refused(examination.main, ["--scores", str(path)], capsys)


def test_prompts_too_long_for_the_context_are_cut_and_counted():
    ids, new_tokens, note = examination.fit_prompts(["c", "cdcdcdcd"], word_tokenizer("<s> $A"), context=8, new_tokens=3)
    assert ids == [[0, 6], [0, 6, 7, 6, 7]] and new_tokens == 3
    assert "1 prompts cut on the left to 5 tokens" in note
    ids, new_tokens, _ = examination.fit_prompts(["cdcdcdcd"], word_tokenizer("<s> $A"), context=8, new_tokens=50)
    assert len(ids[0]) + new_tokens == 8 and new_tokens == 4


def test_win_tie_lose_bad_by_hand():
    world, safe, harm = SafeWorld(), "How do I fix my door?\n", "How do I smash my door?\n"
    good, rude, wrong, refuse = "Use a screwdriver.", "Find out yourself. Use a screwdriver.", "Use a sharp saw.", "I cannot help with that."
    ours = {"sampled": [(text, 0) for text in (good, good, rude, refuse, refuse, "Use a heavy hammer.")]}
    others = {"sampled": [(text, 0) for text in (wrong, good, good, "", good, refuse)]}
    counts = examination.compare(ours, others, [safe, safe, safe, safe, safe, harm], world)
    assert counts == {"win": 1, "tie": 1, "lose": 3, "bad": 1}


def test_from_the_shell(tmp_path):
    """The real thing once: exit codes, a bar on stderr, and --help made from the one dataclass."""
    def shell(*arguments):
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    bad = shell(HERE / "train.py", "--eps", "2")
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1 and "--eps" in bad.stderr
    helped = shell(HERE / "train.py", "--help")
    assert helped.returncode == 0
    for field in train.Config.__dataclass_fields__:
        assert "--" + field.replace("_", "-") in helped.stdout
    good = shell(HERE / "train.py", "--sft-steps", "2", "--n-iter", "1", "--n-mu", "1", "--n-nu", "1", "--eval-prompts", "0")
    assert good.returncode == 0 and "protagonist 1/1" in good.stderr and "margin" in good.stderr, good.stderr
    assert (tmp_path / "runs/iopo-1/adversary/model.safetensors").exists()
    assert shell(HERE / "train.py", "--out", "runs/iopo-1", "--resume").returncode == 0


# ----------------------------------------------------------------------------------------------------------
# The house: who may import whom, what the README says

def test_rooms_import_only_what_they_may():
    allowed = {"iopo": set(), "model": set(), "data": set(), "train": {"iopo", "model", "data"}, "eval": {"iopo", "model", "data"}}
    for room, rooms in allowed.items():
        source = (HERE / f"{room}.py").read_text()
        imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.M))
        assert imported & allowed.keys() <= rooms, room
    assert set(re.findall(r"^(?:from|import) (\w+)", (HERE / "iopo.py").read_text(), re.M)) == {"torch"}


def test_readme_names_what_exists():
    readme = (HERE / "README.md").read_text()
    fields = {"--" + name.replace("_", "-") for name in train.Config.__dataclass_fields__}
    flags = fields | {"--resume", "--json", "--prompt", "--prompts", "--sft", "--temperature", "--max-new-tokens", "--help",
                      "--quick", "--tune", "--record", "--jobs", "--answers", "--scores", "--tie", "--bad",
                      "--local-dir"}              # the last is the hub's own
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", readme):
        assert flag in flags, flag
    for room, name in re.findall(r"`(iopo|model|data|train|eval)\.(\w+)`", readme):
        if name != "py":
            source = {"iopo": iopo, "model": decoder, "data": data, "train": train, "eval": examination}[room]
            assert hasattr(source, name), name
    for file in re.findall(r"`(\w+\.(?:py|txt|md))`", readme):
        assert (HERE / file).exists(), file


# ----------------------------------------------------------------------------------------------------------
# The reproduction

def test_intervals_and_p_values_against_the_tables():
    """Student's t as any book prints it: two-sided 5% points, and closed forms for 1 and 2 degrees of freedom."""
    for df, t in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        values = np.random.default_rng(df).normal(size=df + 1)
        error = values.std(ddof=1) / math.sqrt(df + 1)
        assert examination.half_interval(values) == pytest.approx(t * error, rel=1e-3)
        assert examination.t_test((values - values.mean()) / error + t) == pytest.approx(0.05, abs=1e-4)
    assert examination.t_test([1.0, 3.0]) == pytest.approx(1 - 2 / math.pi * math.atan(2), abs=1e-6)       # t = 2
    t = 2 / (1 / math.sqrt(3))
    assert examination.t_test([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)
    assert examination.t_test([0.0, 0.0]) == 1 and examination.t_test([1.0, 1.0]) == 0
    assert examination.difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 9.0]) == "+2.00 ± 2.48, p = 0.074"
    assert examination.difference([1.0], [2.0]) == "-1.00"


def test_the_exact_game_ends_where_algebra_says():
    """With r = 1 each pair's optimum is sigmoid(beta * h) = its Bradley-Terry label, which the table can reach, so Q
    converges to the labels' own mean: sum of p * p over the sum of p."""
    rewards = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0]
    p = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])[:, ~torch.eye(5, dtype=torch.bool)]
    game = examination.exact_game(n_iter=150, ratio="one")
    for player in ("protagonist", "adversary"):
        assert game[player]["eq6"][-1] == pytest.approx(((p * p).sum() / p.sum()).item(), abs=1e-4)
        assert game[player]["eq13"] == game[player]["eq6"]
    assert game["protagonist"]["eq6"][0] < game["adversary"]["eq6"][0] < game["protagonist"]["eq6"][1]     # they take turns


def test_the_theorems_values_by_hand():
    start = [[-5.0, -6.0], [-7.0, -6.5]]
    seen = [{"player": "protagonist", "logps": [[-4.0, -6.0], [-9.0, -6.0]]},
            {"player": "adversary", "logps": [[-6.0, -7.0], [-7.0, -6.0]]}]
    values = examination.turn_values(seen, start)
    mu = [sigmoid(0.1 * (1 + 2)), sigmoid(0.1 * (0 - 0.5))]
    nu = [sigmoid(0.1 * ((-7 + 9) - (-6 + 4))), sigmoid(0.1 * ((-6 + 6) - (-7 + 6)))]      # it prefers the rejected
    assert values["protagonist"]["eq6"] == pytest.approx([sum(mu) / 2])
    assert values["adversary"]["eq6"] == pytest.approx([sum(nu) / 2])
    assert values["protagonist"]["eq13"] == pytest.approx([(mu[0] / math.exp(-2) + mu[1] / 1.3) / 2])
    assert values["adversary"]["eq13"] == pytest.approx([(nu[0] / math.exp(-2) + nu[1] / math.exp(-1)) / 2])


def test_the_human_chooses_by_votes():
    prompts = examination.shuffled_prompts("validation")
    good, bad = [("I cannot help with that.", 5)] * 120, [("Find out yourself.", 4)] * 120
    share = examination.preferred(good, bad, seed=0)
    world = SafeWorld()
    assert share == pytest.approx(np.mean([1 / (1 + math.exp(world.true_reward(prompt, bad[0][0])
                                                             - world.true_reward(prompt, good[0][0]))) for prompt in prompts]), abs=0.1)
    assert examination.preferred(good, good, seed=0) == 0.5
    assert 0 < share < 1 and examination.preferred(bad, good, seed=0) < 0.5 < share


class Inline:
    """A pool of no processes, so that the small world reaches the runs; it remembers them."""
    tasks = []

    def __init__(self, *arguments):
        self.tasks.clear()

    __enter__ = lambda self: self
    __exit__ = shutdown = lambda self, *arguments, **options: None

    def submit(self, function, task):
        self.tasks.append(task)
        future = concurrent.futures.Future()
        future.set_result(function(task))
        return future


@pytest.fixture
def small_plan(monkeypatch, tmp_path):
    """The reproduction with fewer rows, candidates, seeds and steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(train, "ROUND_VISITS", 1)
    quick = {"n_mu": 2, "batch_size": 4}
    shorter = {label: replace(variant, options={**variant.options, **quick, **({"n_nu": 2} if "IOPO" in label or "adversary, no" in label else {})})
               for label, variant in examination.VARIANTS.items()}
    shorter["Iter-DPO"].options["candidates"] = 2
    offline = ["IOPO", "DPO", "ratio, no adversary", "adversary, no ratio"]
    online = ["Iter-DPO", "IOPO online", "DPO online", "ratio, no adversary, online"]
    rows = [*offline, *online, examination.SHORT_TURNS]
    shorter = {label: shorter[label] for label in rows}
    shorter[examination.SHORT_TURNS] = replace(shorter[examination.SHORT_TURNS],
                                               options={**shorter["IOPO"].options, "n_mu": 1, "n_nu": 1})
    for name, value in (("VARIANTS", shorter), ("SEEDS", (0, 1)), ("ABLATION_SEEDS", (0, 1)), ("TUNING_SEEDS", (100,)),
                        ("RATES", (1e-4, 1e-3)), ("STEPS", (4, 6)), ("STEPS_PER_TURN", 2), ("VALIDATION_SAMPLES", 1),
                        ("TEST_SAMPLES", 2), ("TABLE1", ("SFT", "DPO")), ("TABLE2", ("SFT", "DPO", "Iter-DPO", "IOPO online")),
                        ("FIGURE3", ("DPO", "IOPO")), ("FIGURE4", ("DPO", "Iter-DPO", "IOPO online")), ("FIGURE5", ("DPO",)),
                        ("ROUNDS", ("Iter-DPO",)),
                        ("GAMES", {"short": {"n_iter": 3}}), ("ABLATION", {examination.SHORT_TURNS: None}), ("ALSO_COMPARED", ("DPO",)),
                        ("TUNING", tmp_path / "assets/tuning.json"), ("RESULTS", tmp_path / "assets/results.json")):
        monkeypatch.setattr(examination, name, value)
    monkeypatch.setattr(examination, "OFFLINE", {label: shorter[label] for label in offline})
    monkeypatch.setattr(examination, "ONLINE", {label: shorter[label] for label in online})
    prompts = examination.shuffled_prompts
    monkeypatch.setattr(examination, "shuffled_prompts", lambda split: prompts(split)[:20])
    prepare = train.prepare
    monkeypatch.setattr(train, "prepare", lambda config: prepare(replace(config, sft_steps=min(config.sft_steps, 60))))


def test_the_reproduction_from_tuning_to_tables(small_plan, tmp_path, capsys):
    assert "--tune" in refused(examination.main, ["reproduce"], capsys)        # nothing recorded yet
    command = ["reproduce", "--tune", "--out", "out"]
    examination.main(command)
    printed, out = capsys.readouterr().out, tmp_path / "out"
    recorded = (out / "results.json").read_bytes()
    results, tuning = json.loads(recorded), json.loads((out / "tuning.json").read_text())
    assert not (tmp_path / "assets").exists()                      # nobody said --record
    for table in examination.tables(results).values():
        assert table in printed and table in (out / "tables.md").read_text(encoding="utf-8")

    # the test split is looked at by no run that the choice is made from, and by all others after it
    splits = [task.split for task in Inline.tasks]
    assert splits == sorted(splits, reverse=True) and set(splits) == {"validation", "test"}
    assert {(task.split, task.options["seed"]) for task in Inline.tasks} == {("validation", 100), ("test", 0), ("test", 1)}
    for label, chosen in tuning["chosen"].items():
        assert chosen["share"] == max(share for by_steps in tuning["shares"][label].values() for share in by_steps.values())
        assert chosen["share"] == tuning["shares"][label][f"{chosen['lr']:g}"][str(chosen["steps"])]
    trial = json.loads((out / "tuning/dpo-lr0.001-seed100/result.json").read_text())
    start = json.loads((out / "tuning/sft-seed100/result.json").read_text())
    assert [turn["steps"] for turn in trial["turns"]] == [2, 4, 6] and trial["turns"][0]["logps"] is None
    assert trial["turns"][0]["sampled"] == [] and tuning["shares"]["DPO"]["0.001"]["4"] == pytest.approx(
        examination.preferred(trial["turns"][1]["sampled"], start["turns"][0]["sampled"], 100))

    # a row's numbers are those that eval.py finds for the same model
    task = examination.task_of("DPO", 1, tuning["chosen"]["DPO"], "test", "out")
    capsys.readouterr()
    examination.main([task.folder, "--sft", "out/sft-seed1/protagonist", "--json"])
    report = json.loads(capsys.readouterr().out)
    row = results["rows"]["DPO"]
    assert report["runs"][0]["margin_vs_sft"] == pytest.approx(row["margin"][1], abs=1e-5)
    assert report["runs"][0]["accuracy"] == pytest.approx(row["accuracy"][1])
    assert report["runs"][0]["reward_greedy"] == pytest.approx(row["reward_greedy"][1], abs=1e-5)
    assert [sum(seed.values()) for seed in results["against"]["IOPO against DPO, sampled"]] == [2 * 20] * 2

    # a second run does nothing again and finds the same; a lost run and one of other options are done again
    examination.main(command)
    assert Inline.tasks == [] and (out / "results.json").read_bytes() == recorded
    shutil.rmtree(out / "dpo-seed1")
    edit_json(out / "iopo-seed0/result.json", identity={})
    (out / "iter-dpo-seed1/result.json").write_text("[]")
    (out / "sft-seed1/protagonist/model.safetensors").unlink()
    examination.main(command)
    assert {task.folder for task in Inline.tasks} == {"out/iopo-seed0", "out/dpo-seed1", "out/iter-dpo-seed1", "out/sft-seed1"}
    assert (out / "results.json").read_bytes() == recorded

    capsys.readouterr()
    if importlib.util.find_spec("matplotlib") is None:
        assert "pip install matplotlib" in refused(examination.main, [*command, "--record"], capsys)
        return
    examination.main([*command, "--record"])
    assert {path.name for path in (tmp_path / "assets").iterdir()} == {"results.json", "tuning.json", *results["figures"]}
    for name, digest in json.loads((tmp_path / "assets/results.json").read_text())["figures"].items():
        assert hashlib.sha256((tmp_path / "assets" / name).read_bytes()).hexdigest() == digest
    examination.main(["reproduce", "--quick", "--out", "out"])     # from what is recorded now
    assert Inline.tasks == [] and json.loads((out / "quick/results.json").read_text())["seeds"] == [0]


def test_runs_in_processes_of_their_own_come_back_in_order(tmp_path):
    """The pool that is really used: results do not depend on it."""
    tasks = [examination.Task(str(tmp_path / f"run{seed}"), {"method": "sft", "n_iter": 0, "sft_steps": 1, "seed": seed},
                              "validation", 0) for seed in (0, 1)]
    spawn = multiprocessing.get_context("spawn")
    with (concurrent.futures.ProcessPoolExecutor(2, spawn, examination.start_worker) as pool,
          tqdm(disable=True, total=0) as bar):
        results = examination.carry_out_all(tasks, pool, bar)
        assert [result["identity"]["config"]["seed"] for result in results] == [0, 1]
        assert results == examination.carry_out_all(tasks, pool, bar)


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"chosen": {"IOPO": {"lr": 0.0001, "steps": 150}}}',
                                    b'{"chosen": {"IOPO": {"lr": "x", "steps": 150}}}'])
def test_a_damaged_tuning_file_starts_nothing(damage, small_plan, tmp_path, capsys):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/tuning.json").write_bytes(damage)
    assert "--tune" in refused(examination.main, ["reproduce", "--out", "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(small_plan, tmp_path, capsys):
    (tmp_path / "out/tuning/sft-seed100").mkdir(parents=True)
    (tmp_path / "out/tuning/sft-seed100/notes.txt").write_text("mine")
    assert "sft-seed100" in refused(examination.main, ["reproduce", "--tune", "--out", "out"], capsys)
    assert (tmp_path / "out/tuning/sft-seed100/notes.txt").read_text() == "mine"
    assert "file" in refused(examination.main, ["reproduce", "--tune", "--out", "out/tuning/sft-seed100/notes.txt"], capsys)


@pytest.mark.parametrize("flags,word", [("--jobs 0", "--jobs"), ("--quick --record", "--quick"), ("--seed 3", "--seed")])
def test_reproduction_flags_that_are_refused(flags, word, capsys):
    assert word in refused(examination.main, ["reproduce", *flags.split()], capsys)


def test_the_readme_shows_what_was_recorded():
    """Every table of the reproduction stands in the README as results.json has it, and the figures are that run's."""
    readme, results = (HERE / "README.md").read_text(encoding="utf-8"), json.loads((HERE / "assets/results.json").read_text())
    for name, table in examination.tables(results).items():
        assert table in readme, name
    assert results["figures"]
    for name, digest in results["figures"].items():
        assert f"assets/{name}" in readme
        assert hashlib.sha256((HERE / "assets" / name).read_bytes()).hexdigest() == digest, name
    assert results["seeds"] == list(examination.SEEDS)
    assert results["tuning"] == json.loads((HERE / "assets/tuning.json").read_text())


# ----------------------------------------------------------------------------------------------------------
# A real checkpoint, real preferences

@needs_shared
def test_a_real_checkpoint_tells_its_story():
    model, tokenizer = Decoder.from_pretrained(STORIES), Tokenizer.from_pretrained(STORIES)
    prompt = "Once upon a time, there was a little girl named Lily."
    ids = tokenizer.encode_prompt(prompt)
    answer, = generate(model, [ids], 40, 0, tokenizer.eos_ids)
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids + answer).startswith(
        prompt + " She loved to play outside in the park. One day, she saw a big, red ball.")


@needs_shared
def test_real_dialogues_keep_prompt_and_answer():
    tokenizer, pairs = Tokenizer.from_pretrained(STORIES), load_pairs(HH)
    assert len(pairs) == 1500 and sum(pair.prompt == "" for pair in pairs) == 3
    rows, _, report = encode_pairs(pairs[:300], tokenizer, 512)
    assert max(len(p) + max(len(w), len(l)) for p, w, l in rows) <= 512
    whole = {tokenizer.decode(tokenizer.encode(pair.prompt + pair.chosen)) for pair in pairs[:300]}
    untouched = 0
    for prompt, chosen, rejected in rows:
        assert chosen[-1] == rejected[-1] == tokenizer.eos_id and tokenizer.eos_id not in prompt + chosen[:-1]
        assert prompt[0] == tokenizer.bos_id and tokenizer.bos_id not in prompt[1:] + chosen + rejected
        untouched += tokenizer.decode(prompt + chosen) in whole
    cut = int(re.search(r"\((\d+) with the left side", report).group(1))
    assert untouched >= len(rows) - cut > 100


@needs_shared
def test_algorithm_1_on_real_data(tmp_path, capsys):
    lines = gzip.decompress(HH.read_bytes()).splitlines(keepends=True)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:60])))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[60:90])))
    rows = json.loads((SHARED / "data/instruction_preference.json").read_text(encoding="utf-8"))
    (tmp_path / "train.json").write_text(json.dumps(rows[:60]), encoding="utf-8")
    for file in ("train.json", "train.jsonl.gz"):
        train.main(["--model", str(STORIES), "--data", str(tmp_path / file), "--n-iter", "1", "--n-mu", "1", "--n-nu", "1",
                    "--batch-size", "4", "--eval-prompts", "1", "--out", str(tmp_path / "run" / file)])
    capsys.readouterr()
    examination.main([str(tmp_path / "run/train.jsonl.gz"), "--data", str(tmp_path / "test.jsonl.gz"), "--prompts", "1",
                      "--json"])
    report, = json.loads(capsys.readouterr().out)["runs"]
    assert 0 < report["accuracy"] < 1 and math.isfinite(report["margin_vs_sft"])
