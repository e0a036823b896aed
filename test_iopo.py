"""The proof: every claim of the five rooms against an independent computation.

    pip install -r requirements.txt pytest && python -m pytest -q

Where transformers, TRL and the other optional libraries are installed, this is checked against
them; where ../shared holds a real checkpoint and real preference data, the loop runs on them;
otherwise those tests say that they were skipped.
"""

import argparse
import ast
import contextlib
import copy
import gzip
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F

import data
import eval as examination
import iopo
import model as decoder
import train
from data import (Pair, PairBatch, SafeWorld, Tokenizer, batches, encode_pairs, load_data,
                  load_pairs, micro_batches)
from model import Decoder, DecoderConfig, generate, response_logps, sequence_logps

torch.set_num_threads(1)            # the models are tiny: more threads would wait for each other
HERE = Path(iopo.__file__).parent
SHARED = HERE.parent / "shared"
STORIES, HARMLESS = SHARED / "models/stories260k", SHARED / "data/hh_harmless_train.jsonl.gz"
needs_shared = pytest.mark.skipif(not STORIES.exists(), reason="no ../shared with a real "
                                  "checkpoint and real data")


# ---- Small models, rows of all lengths, and log-probabilities the slow way -----------------------

def tiny_config(**changes):
    return DecoderConfig(**{**dict(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, eos_token_id=2), **changes})


def tiny_model(seed=0, **changes):
    """A random decoder with weights large enough for confident, varied predictions."""
    torch.manual_seed(seed)
    model = Decoder(tiny_config(**changes))
    for parameter in model.parameters():
        scale, center = (0.3, 0) if parameter.dim() == 2 else (0.1, 1)
        parameter.data = torch.randn_like(parameter) * scale + center
    return model


def model_folder(path, seed=0, **changes):
    """A random checkpoint with the safe world's tokenizer, as a user's model would lie on disk."""
    tokenizer = SafeWorld.tokenizer()
    tiny_model(seed, **{"vocab_size": tokenizer.largest_id + 1, "eos_token_id": tokenizer.eos_id,
                        "max_position_embeddings": 128, **changes}).save_pretrained(path)
    tokenizer.save(path)
    return path


def random_rows(rng, n):
    """Pairs of all lengths: one-token prompts and answers, answers that share a prefix or are one
    the other's start."""
    rows = []
    for _ in range(n):
        prompt, chosen, rejected = (
            [rng.randrange(3, 53) for _ in range(rng.choice((1, 2, 3, 8, 15)))] for _ in range(3))
        if rng.random() < 0.4:
            rejected = chosen[:rng.randrange(1, len(chosen) + 1)] + rejected
        rows.append((prompt, chosen + [2] * rng.randrange(2), rejected + [2]))
    return rows


def oracle_logps(model, prompt, response):
    """Token by token, one plain sequence: the sum of log P(token | everything before it)."""
    total = 0.0
    for place in range(len(response)):
        before = torch.tensor([list(prompt) + list(response[:place])])
        total = total + torch.log_softmax(model(before)[0, -1], dim=-1)[response[place]]
    return total


def plain_rows(rows, which):
    """Prompt + answer (1 chosen, 2 rejected) as padded rows: input_ids (B, T), and for the places
    but the last the tokens that follow and whether these belong to the answer, (B, T-1)."""
    sequences = [row[0] + row[which] for row in rows]
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    places = torch.arange(1, longest)
    starts = torch.tensor([[len(row[0])] for row in rows])
    ends = torch.tensor([[len(sequence)] for sequence in sequences])
    return ids, ids[:, 1:], (places >= starts) & (places < ends)


def two_row_logps(model, rows):
    """The plain path: a row for each answer, cross entropy over all, prompt and padding masked."""
    columns = []
    for which in (1, 2):
        ids, targets, mask = plain_rows(rows, which)
        losses = F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), targets, reduction="none")
        columns.append((-losses * mask).sum(dim=1))
    return columns


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def leave_out_nulls(path):
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: value for k, value in fields.items() if value is not None}))


def alone(*functions):
    """What is left of functions that are copied into a file with torch and F and nothing else."""
    names = {"torch": torch, "F": F}
    for function in functions:
        exec(inspect.getsource(function), names)
    return names[functions[-1].__name__]


WORKS_ALONE = {
    "iopo": """
import torch, iopo
logps = [torch.randn(5, requires_grad=True) for _ in range(4)]
iopo.iopo_loss(*logps).mean().backward()
assert logps[0].grad.ne(0).all() and len(list(iopo.turns(2, 3, 1))) == 8
""",
    "model": """
import torch, model
decoder = model.Decoder(model.DecoderConfig(11, 8, 8, 1, 1, 1, 8))
decoder.save_pretrained("folder")
decoder, ids = model.Decoder.from_pretrained("folder"), torch.tensor([[1, 5, 7, 2]])
logps = model.sequence_logps(decoder(ids)[:, :-1], ids[:, 1:], torch.tensor([[False, True, True]]))
logps.sum().backward()
assert logps.item() < 0 and len(model.generate(decoder, [[1], [2, 3]], 4, 0, -1)[1]) == 4
""",
    "data": """
import json, data
with open("pairs.jsonl", "w") as file:
    for k in range(40):
        print(json.dumps({"prompt": f"the {k}", "chosen": "a", "rejected": "b"}), file=file)
training, held_out, note = data.load_data("pairs.jsonl")
assert len(training) + len(held_out) == 40 and training and held_out and note
rows = data.encode_pairs(data.SafeWorld().pairs("train", 20), data.SafeWorld.tokenizer(), 99)[0]
assert sum(len(batch) for batch in data.micro_batches(rows, 300)) == 20
"""}


def test_a_room_works_alone_in_an_empty_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started = []
    for room, code in WORKS_ALONE.items():
        (tmp_path / room).mkdir()
        shutil.copy(HERE / f"{room}.py", tmp_path / room)
        started.append(subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path / room,
                                        env=environment))
    assert [process.wait() for process in started] == [0, 0, 0]


# ---- iopo.py: equations against plain float arithmetic -------------------------------------------

READINGS = list(itertools.product(("sequence", "length_normalized", "env", "one"),
                                  ("min", "two_sided", "none")))


def random_logps(n=40, seed=0, scale=30.0):
    """Four float64 (n,) tensors; AGENT and ENV near each other, as they are in training."""
    generator = torch.Generator().manual_seed(seed)
    env = -scale * torch.rand(2, n, generator=generator, dtype=torch.float64) - 1
    agent = env + torch.randn(2, n, generator=generator, dtype=torch.float64)
    return agent[0], agent[1], env[0], env[1]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(name, w, l, ref_w, ref_l, n_w, n_l, all_pairs, *, beta, eps, alpha, lam):
    """Each loss for one pair, in Python floats, from the papers' formulas."""
    h = (w - ref_w) - (l - ref_l)
    if name == "iopo":
        return min(math.exp(l - ref_l), 1 + eps) * math.log(1 + math.exp(-beta * h))
    if name == "dpo":
        return -math.log(sigmoid(beta * h))
    if name == "hinge":
        return max(0.0, 1 - beta * h)
    if name == "ipo":
        return ((w - ref_w) / n_w - (l - ref_l) / n_l - 1 / (2 * beta)) ** 2
    if name == "kto_pair":
        kl_w = max(0.0, sum(p[0] - p[2] for p in all_pairs) / len(all_pairs))
        kl_l = max(0.0, sum(p[1] - p[3] for p in all_pairs) / len(all_pairs))
        return (2 - sigmoid(beta * (w - ref_w - kl_l)) - sigmoid(beta * (kl_w - l + ref_l))) / 2
    if name == "sft":
        return -w / n_w
    likelihood = lam * w / n_w
    return -math.log(sigmoid(beta * (w - l) - (1 + alpha) * beta * (ref_w - ref_l))) - likelihood


def lengths(n=40, seed=1):
    return torch.randint(1, 30, (2, n), generator=torch.Generator().manual_seed(seed))


def call(name, *logps, **more):
    """A loss with the lengths it asks for."""
    given = dict(zip(("chosen_lengths", "rejected_lengths"), lengths(len(logps[0]))))
    wanted = inspect.signature(iopo.LOSSES[name]).parameters
    return iopo.LOSSES[name](*logps, **{k: v for k, v in given.items() if k in wanted}, **more)


PAPERS = dict(beta=0.1, eps=0.3, alpha=0.07, lam=0.2)           # IOPO's and AIPO's
OTHERS = dict(beta=0.3, eps=0.1, alpha=0.5, lam=0.7)


@pytest.mark.parametrize("options, shift", ((PAPERS, 0.0), (OTHERS, -2.0), (OTHERS, 2.0)))
@pytest.mark.parametrize("name", iopo.LOSSES)
def test_losses_equal_the_formula_in_plain_floats(name, options, shift):
    """By default with the papers' numbers; the shift turns the sign of KTO-pair's means."""
    w, l, *ref = random_logps()
    logps = w + shift, l - shift, *ref
    pairs = list(zip(*(column.tolist() for column in logps)))
    expected = [by_hand(name, *pair, n_w, n_l, pairs, **options)
                for pair, n_w, n_l in zip(pairs, *lengths().tolist())]
    read = inspect.signature(iopo.LOSSES[name]).parameters
    losses = call(name, *logps, **{key: value for key, value in options.items()
                                   if key in read and options is not PAPERS})
    assert losses.shape == (40,)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64),
                               rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", iopo.LOSSES)
def test_loss_gradients_equal_finite_differences(name):
    """Of the batch's sum, with the ratio of Eq. 14 held constant (it is a weight, not a term)."""
    logps = [column[:6] for column in random_logps(seed=3)]
    logps[:2] = ((column + 2).requires_grad_() for column in logps[:2])   # kto_pair's terms act
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
            found = 0.0 if gradient is None else gradient[place].item()
            assert found == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def test_one_signature():
    for name, loss in iopo.LOSSES.items():
        kinds = [p.kind for p in inspect.signature(loss).parameters.values()]
        assert kinds[:4] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 4, name
        assert all(kind == inspect.Parameter.KEYWORD_ONLY for kind in kinds[4:]), name


def test_margin_and_probability():
    """Eq. 5, Eq. 1 with its rewards, and Eq. 13, which may exceed 1."""
    w, l, env_w, env_l = random_logps(seed=5)
    margin = iopo.preference_margin(w, l, env_w, env_l, beta=0.2)
    for k in range(40):
        h = math.log(math.exp(w[k] - env_w[k]) / math.exp(l[k] - env_l[k]))
        assert margin[k].item() == pytest.approx(0.2 * h)
        rewards = 0.2 * (w[k] - env_w[k]), 0.2 * (l[k] - env_l[k])
        q = math.exp(rewards[0]) / (math.exp(rewards[0]) + math.exp(rewards[1]))
        assert iopo.preference_probability(margin)[k].item() == pytest.approx(q)
        ratio = torch.tensor(0.25)
        assert iopo.preference_probability(margin, ratio)[k].item() == pytest.approx(4 * q)


def test_importance_ratio():
    nan, inf = float("nan"), float("inf")
    agent = torch.tensor([-10.0, -10.0, -3.0, -500.0, -1.0, nan, -inf], requires_grad=True)
    env = torch.tensor([-10.0, -11.0, -5.0, -1.0, -500.0, -1.0, -2.0])
    ratio = iopo.importance_ratio(agent, env)
    assert not ratio.requires_grad and ratio.dtype == torch.float32
    torch.testing.assert_close(ratio[:3], torch.tensor([1.0, math.e, math.e ** 2]))
    assert ratio[3] == ratio[4] == ratio[6] == 1         # Eq. 11: r = 0 or inf counts as 1
    assert ratio[5].isnan()                                        # a broken model must show
    for dtype in (torch.float64, torch.bfloat16):
        assert iopo.importance_ratio(agent.to(dtype), env.to(dtype)).dtype == torch.float32
    tokens = torch.tensor([3])                                     # geometric mean per token
    normalised = iopo.importance_ratio(torch.tensor([-8.0]), torch.tensor([-2.0]), tokens)
    assert normalised.item() == pytest.approx(math.exp(-2))


def test_clip_ratio():
    for r in (0.01, 0.5, 0.69, 0.7, 0.9, 1.0, 1.29, 1.3, 1.31, 50.0):
        value = torch.tensor([r], dtype=torch.float64)
        printed, amounts_to = min(r, min(max(r, 0.7), 1.3)), min(r, 1.3)                  # Eq. 12
        assert iopo.clip_ratio(value).item() == pytest.approx(printed) == pytest.approx(amounts_to)
        two_sided = iopo.clip_ratio(value, 0.1, "two_sided").item()
        assert two_sided == pytest.approx(min(max(r, 0.9), 1.1))
        assert iopo.clip_ratio(value, mode="none").item() == r
    assert iopo.clip_ratio(torch.tensor([float("nan")])).isnan()


@pytest.mark.parametrize("ratio,clip", READINGS)
def test_readings_of_the_ratio(ratio, clip):
    """r of Eq. 14 and Eq. 15 under every reading: in the loss, as iopo_weight, and as the weight
    that autograd finds on log pi(y_w), and its negative on log pi(y_l), Eq. 8 where r is 1."""
    logps = w, l, env_w, env_l = [column.requires_grad_() for column in random_logps(seed=6)]
    n = lengths()[1]
    readings = dict(eps=0.1, clip=clip, ratio=ratio, rejected_lengths=n)
    r = {"sequence": l - env_l, "length_normalized": (l - env_l) / n, "env": env_w - env_l,
         "one": 0 * l}[ratio].detach().exp()
    assert ratio == "one" or r.min() < 0.9 and r.max() > 1.1       # so that both bounds act
    r = {"min": r.clamp(max=1.1), "two_sided": r.clamp(0.9, 1.1), "none": r}[clip]
    found = iopo.iopo_weight(*logps, **readings)
    torch.testing.assert_close(found, r, rtol=1e-5, atol=0)
    assert not found.requires_grad

    losses = iopo.iopo_loss(*logps, beta=0.3, **readings)
    margin = 0.3 * ((w - env_w) - (l - env_l)).detach()
    torch.testing.assert_close(losses, r * torch.log(1 + torch.exp(-margin)), rtol=1e-5, atol=0)
    losses.sum().backward()
    weight = iopo.iopo_gradient_weight(*logps, beta=0.3, **readings).detach()
    assert (weight < 0).all()
    torch.testing.assert_close(weight, -0.3 * r / (1 + torch.exp(margin)), rtol=1e-5, atol=0)
    torch.testing.assert_close(w.grad, weight)
    torch.testing.assert_close(l.grad, -weight)


WRONG_READINGS = ((dict(ratio="nonsense"), "ratio must be one of sequence"),
                  (dict(clip="nonsense"), "clip must be one of min, two_sided, none"),
                  (dict(ratio="length_normalized"), "needs rejected_lengths"))


def test_readings_that_are_refused():
    for wrong, message in WRONG_READINGS:
        with pytest.raises(ValueError, match=message):
            iopo.iopo_loss(*random_logps(), **wrong)


def test_iopo_loss_is_copied_with_two_other_functions():
    copied = alone(iopo.importance_ratio, iopo.clip_ratio, iopo.iopo_loss)
    for ratio, clip in READINGS:
        readings = dict(beta=0.2, eps=0.1, clip=clip, ratio=ratio, rejected_lengths=lengths()[1])
        assert torch.equal(copied(*random_logps(), **readings),
                           iopo.iopo_loss(*random_logps(), **readings))
    assert torch.equal(copied(*random_logps()), iopo.iopo_loss(*random_logps()))
    for wrong, message in WRONG_READINGS:
        with pytest.raises(ValueError, match=message):
            copied(*random_logps(), **wrong)


def test_without_ratio_iopo_is_dpo_to_the_last_bit():
    logps = [column.float() for column in random_logps()]
    for clip in ("min", "two_sided", "none"):
        losses = iopo.iopo_loss(*logps, ratio="one", clip=clip)
        assert torch.equal(losses, iopo.dpo_loss(*logps))


def test_games():
    """With r = 1: exchanged labels give both players the same loss (a team game), equal labels a
    constant sum."""
    mu_w, mu_l, nu_w, nu_l = random_logps(seed=7)
    swapped = iopo.iopo_loss(nu_l, nu_w, mu_l, mu_w, ratio="one")
    torch.testing.assert_close(swapped, iopo.iopo_loss(mu_w, mu_l, nu_w, nu_l, ratio="one"))
    q_mu = iopo.preference_probability(iopo.preference_margin(mu_w, mu_l, nu_w, nu_l))
    q_nu = iopo.preference_probability(iopo.preference_margin(nu_w, nu_l, mu_w, mu_l))
    torch.testing.assert_close(q_mu + q_nu, torch.ones_like(q_mu))


def test_the_misprints_that_were_mended():
    """Eq. 14 as printed (y_w twice) has no gradient; descent on Eq. 15 as printed goes the wrong
    way."""
    logps = mu_w, mu_l, nu_w, nu_l = [column.requires_grad_() for column in random_logps(seed=8)]
    printed = -F.logsigmoid(0.1 * (mu_w - nu_w) - 0.1 * (mu_w - nu_l))
    slope, = torch.autograd.grad(printed.sum(), mu_w)
    torch.testing.assert_close(slope, torch.zeros(40, dtype=torch.float64))
    printed_weight = -0.1 * F.logsigmoid(iopo.preference_margin(*logps))  # Eq. 15 with r = 1
    assert (printed_weight > 0).all()
    assert (iopo.iopo_gradient_weight(*logps, ratio="one") < 0).all()


@pytest.mark.parametrize("n_iter,n_mu,n_nu", [(0, 3, 3), (1, 1, 1), (2, 3, 2), (3, 0, 2), (3, 2, 0),
                                              (4, 5, 7)])
def test_turns_are_algorithm_1(n_iter, n_mu, n_nu):
    expected, i = [], 1
    while i <= n_iter:
        expected += [(i, "protagonist")] * n_mu + [(i, "adversary")] * n_nu
        i += 1
    assert list(iopo.turns(n_iter, n_mu, n_nu)) == expected


# ---- model.py: the decoder against a second one, written differently, in float64 -----------------

def plain_logits(folder, ids):
    """A checkpoint folder's forward pass for one sequence, in float64, token by token and head by
    head, with complex rotation, from config.json (either spelling) and the tensors as stored."""
    c = json.loads((folder / "config.json").read_text())
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name: tensor.double() for name, tensor in stored.items()}
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
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wavelength > original / low:
                return f / rope["factor"]
            if wavelength > original / high:
                smooth = (original / wavelength - low) / (high - low)
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
            rows = slice(which * heads * d, (which + 1) * heads * d)
            return (weights[p + "W_pack.weight"] @ u)[rows].view(-1, d)
        name = f"{p}{'qkv'[which]}_proj."
        vectors = (weights[name + "weight"] @ u + weights.get(name + "bias", 0)).view(-1, d)
        scale = f"{p}{'qkv'[which]}_norm.weight"
        return torch.stack([norm(v, scale) for v in vectors]) if scale in weights else vectors

    x = [weights["model.embed_tokens.weight"][i] for i in ids]
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        normed = [norm(v, p + "input_layernorm.weight") for v in x]
        q, k, v = ([project(u, p + "self_attn.", which) for u in normed] for which in range(3))
        q, k = ([[turn(head, t) for head in heads_] for t, heads_ in enumerate(some)]
                for some in (q, k))
        for t in range(len(ids)):
            mixed = []
            for head in range(heads):
                kv = head * kv_heads // heads
                scores = torch.stack([q[t][head] @ k[s][kv] for s in range(t + 1)]) / d ** 0.5
                mixed.append(sum(a * v[s][kv] for s, a in enumerate(torch.softmax(scores, 0))))
            x[t] = x[t] + weights[p + "self_attn.o_proj.weight"] @ torch.cat(mixed)
        for t in range(len(ids)):
            u = norm(x[t], p + "post_attention_layernorm.weight")
            gate, up, down = (weights[f"{p}mlp.{which}_proj.weight"]
                              for which in ("gate", "up", "down"))
            x[t] = x[t] + down @ ((gate @ u) * torch.sigmoid(gate @ u) * (up @ u))
    head = weights["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    if c["model_type"] == "baichuan":
        head = torch.stack([row / row.square().sum().sqrt() for row in head])
    return torch.stack([head @ norm(v, "model.norm.weight") for v in x])


LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
          "original_max_position_embeddings": 16}      # waves of 6.3 to 1000 positions: all 3 kinds
SHAPES = {                                            # of the families, and their corners
    "llama": dict(),
    "llama, tied": dict(tie_word_embeddings=True),
    "llama 2": dict(num_key_value_heads=4, rope_theta=500.0),
    "llama, one key head": dict(num_key_value_heads=1, head_dim=6),
    "llama, linear": dict(rope_scaling=LINEAR, max_position_embeddings=16),
    "llama 3": dict(rope_scaling=LLAMA3, rope_theta=500.0, head_dim=16, max_position_embeddings=32),
    "mistral": dict(model_type="mistral", rope_theta=1e6, rms_norm_eps=0.1),
    "qwen2": dict(model_type="qwen2"),
    "qwen2, tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=12, rms_norm_eps=0.1),
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
    for ours in (model, Decoder.from_pretrained(tmp_path)):
        for logits in (ours(ids)[0], ours(padded, attention_mask=mask)[0, :24]):
            torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    prompts = [ids[0, :n].tolist() for n in (1, 7, 3, 12)]
    alone_ = [greedy_alone(model, prompt, 8, (2,)) for prompt in prompts]
    assert generate(model, prompts, 8, 0, 2) == alone_


def test_masks_and_positions():
    model = tiny_model()
    ids = torch.randint(3, 53, (2, 8), generator=torch.Generator().manual_seed(2))
    expected = model(ids[:1, :5])[0]
    right = torch.tensor([[True] * 5 + [False] * 3, [True] * 8])
    torch.testing.assert_close(model(ids, attention_mask=right)[0, :5], expected)
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:1, :5]], dim=1)
    mask = torch.tensor([[False] * 3 + [True] * 5])                # padded on the left
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    out = model(left, positions=positions, attention_mask=mask)
    torch.testing.assert_close(out[0, 3:], expected)
    assert out.isfinite().all()                   # padding sees itself, so no softmax is empty
    assert decoder.causal(mask, 8).any(dim=-1).all()
    square = right[:, None, :].expand(2, 8, 8)
    torch.testing.assert_close(model(ids, attention_mask=square), model(ids, attention_mask=right))
    with pytest.raises(ValueError, match="boolean"):
        model(ids, attention_mask=right.long())


def transformers_model(shape, folder):
    """A random model of transformers' own, saved by it."""
    transformers = pytest.importorskip("transformers")
    fields = {**vars(tiny_config(**SHAPES[shape])), "pad_token_id": 0, "bos_token_id": 1}
    rope = {**(fields.pop("rope_scaling") or {"rope_type": "default"}),
            "rope_theta": fields.pop("rope_theta")}
    fields |= {"rope_parameters": rope, "sliding_window": None}
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        center = 0.0 if name.endswith("bias") else parameter.dim() == 1
        parameter.data = torch.randn_like(parameter) * 0.3 + center
    model.save_pretrained(folder)
    return transformers, model


def logits_equal_transformers(folder, theirs=None):
    """Both read the folder, or `theirs` stands for it; returns our model."""
    if theirs is None:
        theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder)
    ours, ids = Decoder.from_pretrained(folder), torch.randint(3, 53, (1, 60))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    return ours


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "baichuan"])
def test_against_transformers(shape, tmp_path):
    """Their folder here, ours there, our own config.json there; padding; greedy answers."""
    transformers, theirs = transformers_model(shape, tmp_path / "theirs")
    ours = Decoder.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(3, 53, (3, 60))                   # of which the original context holds 16
    mask = torch.arange(60) < torch.tensor([[60], [7], [1]])
    expected = theirs(ids, attention_mask=mask.long()).logits
    found = ours(ids, attention_mask=mask)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours",
                                                                      output_loading_info=True)
    assert not any(report.values()) and type(again) is type(theirs)
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    tiny_model(**SHAPES[shape]).save_pretrained(tmp_path / "fresh")
    logits_equal_transformers(tmp_path / "fresh")
    prompts = [[5, 6, 7, 8], [9], [10, 11], list(range(3, 33))]
    for prompt, answer in zip(prompts, generate(ours, prompts, 10, 0, 2)):
        full = theirs.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False,
                               pad_token_id=0)[0, len(prompt):].tolist() + [2]
        assert answer == full[:full.index(2)]


def test_the_old_spelling_of_rope_and_the_shards_of_transformers(tmp_path):
    transformers, theirs = transformers_model("llama 3", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    edit_json(tmp_path / "config.json", rope_parameters=None, rope_theta=theta,
              rope_scaling={**rope, "type": kind})
    leave_out_nulls(tmp_path / "config.json")
    logits_equal_transformers(tmp_path, theirs)


@pytest.mark.parametrize("where", ("inside", "outside", "both"))
def test_where_theta_may_stand(where, tmp_path):
    transformers_model("llama, linear", tmp_path)
    edit_json(tmp_path / "config.json",
              rope_parameters={**LINEAR, "factor": 7.0} if where == "outside" else None,
              rope_scaling=LINEAR if where == "outside" else {**LINEAR, "rope_theta": 300.0},
              rope_theta=None if where == "inside" else 500.0)
    leave_out_nulls(tmp_path / "config.json")
    logits_equal_transformers(tmp_path)


@pytest.mark.parametrize("inside,outside", [(64, 8), (None, 8), (None, None)])
def test_where_the_original_context_may_stand(inside, outside, tmp_path):
    """Beside the other numbers of rope_scaling, at the top of config.json, which goes first, or
    nowhere."""
    transformers_model("llama 3", tmp_path)
    name = "original_max_position_embeddings"
    scaling = {key: value for key, value in {**LLAMA3, name: inside}.items() if value is not None}
    edit_json(tmp_path / "config.json", rope_parameters=None, rope_theta=500.0,
              rope_scaling=scaling, original_max_position_embeddings=outside)
    leave_out_nulls(tmp_path / "config.json")
    ours = logits_equal_transformers(tmp_path)
    assert ours.config.rope_scaling[name] == (outside or inside or 32)


# ---- model.py: response log-probabilities, the one thing everybody gets wrong --------------------

def random_logits(dtype=torch.float32):
    """(6, 9, 13) logits, targets and a mask of prompts, answers and padding; the last row empty."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(6, 9, 13, generator=generator)).to(dtype)
    targets = torch.randint(0, 13, (6, 9), generator=generator)
    starts, ends = torch.tensor([[0, 3, 0, 8, 2, 5], [9, 9, 1, 9, 6, 5]])[:, :, None]
    place = torch.arange(9)
    return logits, targets, (place >= starts) & (place < ends)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_sequence_logps_by_hand(dtype):
    """Value and gradient in float64; what stands outside the mask (targets of -100, NaN) changes
    neither."""
    logits, targets, mask = random_logits(dtype)
    wide = logits.double().clone().requires_grad_()
    expected = torch.stack([
        sum((torch.log(torch.exp(wide[b, t, targets[b, t]]) / torch.exp(wide[b, t]).sum())
             for t in range(9) if mask[b, t]), wide.new_zeros(())) for b in range(6)])
    upstream = torch.randn(6, generator=torch.Generator().manual_seed(1))
    expected.backward(upstream.double())
    spoilt = (logits.masked_fill(~mask[..., None], float("nan")), targets.masked_fill(~mask, -100))
    for some, follow in ((logits, targets), spoilt):
        some = some.clone().requires_grad_()
        found = sequence_logps(some, follow, mask)
        assert found.shape == (6,) and found.dtype == torch.float32 and found[5] == 0
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        found.backward(upstream)
        tolerance = dict(rtol=1e-2, atol=1e-3) if dtype == torch.bfloat16 else dict(
            rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(some.grad.double(), wide.grad, **tolerance)
        assert (some.grad[~mask] == 0).all() and (some.grad[mask] != 0).all()


def test_sequence_logps_is_copied_alone():
    copied = alone(sequence_logps)
    assert torch.equal(copied(*random_logits()), sequence_logps(*random_logits()))
    with pytest.raises(ValueError, match="a boolean mask"):
        copied(*random_logits()[:2], random_logits()[2].float())


@pytest.mark.parametrize("change", (
    lambda logits, targets, mask: (logits, targets, mask.float()),
    lambda logits, targets, mask: (logits, targets, mask.long()),
    lambda logits, targets, mask: (logits, targets[:, 1:], mask[:, 1:]),             # not shifted
    lambda logits, targets, mask: (logits[:, :-1], targets, mask),
    lambda logits, targets, mask: (logits, targets, mask[:, 1:]),
    lambda logits, targets, mask: (logits, targets, mask[:1]),                     # would broadcast
    lambda logits, targets, mask: (logits[0], targets[0], mask)))
def test_sequence_logps_refuses_other_shapes_and_masks(change):
    logits, targets, mask = change(*random_logits())
    with pytest.raises(ValueError, match="needs logits .* a boolean mask") as error:
        sequence_logps(logits, targets, mask)
    for shape in (logits.shape, targets.shape, mask.shape):
        assert ", ".join(map(str, shape)) in str(error.value)
    assert str(mask.dtype) in str(error.value)


@pytest.mark.parametrize("whose", ("ours", "transformers"))
@pytest.mark.parametrize("shape", ("llama 3", "mistral", "qwen2, tied", "qwen3"))
def test_sequence_logps_equal_response_logps(shape, whose, tmp_path):
    """On logits of plain right-padded rows, for every mix of lengths of prompt and answers."""
    model = logits_of = tiny_model(**SHAPES[shape])
    if whose == "transformers":
        transformers = pytest.importorskip("transformers")
        model.save_pretrained(tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        logits_of = lambda ids: theirs(ids).logits                                  # noqa: E731
    rng = random.Random(0)
    rows = [tuple([rng.randrange(3, 53) for _ in range(n)] for n in mix)
            for mix in itertools.product((1, 2, 17), (1, 2, 9), (1, 2, 9))]
    with torch.no_grad():
        for which, expected in enumerate(response_logps(model, PairBatch.from_ids(rows)), start=1):
            ids, targets, mask = plain_rows(rows, which)
            found = sequence_logps(logits_of(ids)[:, :-1], targets, mask)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_response_logps_equal_a_loop_over_tokens(seed):
    rng, model = random.Random(seed), tiny_model(seed)
    rows = random_rows(rng, 5) + [([7], [9], [11])]
    batch = PairBatch.from_ids(rows)
    logps = response_logps(model, batch)
    assert batch.chosen_lengths.tolist() == [len(row[1]) for row in rows]
    assert batch.rejected_lengths.tolist() == [len(row[2]) for row in rows]
    for which, column in enumerate(logps, start=1):
        assert column.shape == (6,) and column.dtype == torch.float32
        expected = torch.stack([oracle_logps(model, row[0], row[which]) for row in rows])
        torch.testing.assert_close(column, expected, rtol=1e-5, atol=1e-5)


def weight_gradients(model, logps, coefficients):
    model.zero_grad()
    (coefficients * torch.stack(list(logps))).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def gradients_agree(found, expected):
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("seed", range(24))
def test_the_fast_path_equals_the_two_row_path(seed, monkeypatch):
    """Log-probs to 1e-5, gradients to 1e-4 in norm for every tensor: any mix of lengths, one-token
    prompts and answers, shared prefixes, long prompts, logits in chunks, layers recomputed."""
    rng = random.Random(seed)
    shape = rng.choice(list(SHAPES.values()))
    model = tiny_model(seed, **shape)
    rows = random_rows(rng, rng.choice((1, 2, 7, 20)))
    if seed % 3:
        rows += [([rng.randrange(3, 53) for _ in range(rng.randrange(60, 80))], *row[1:])
                 for row in random_rows(rng, 2)]
    rng.shuffle(rows)
    monkeypatch.setattr(decoder, "CHUNK", rng.choice((1, 5, 512)))
    model.gradient_checkpointing = rng.random() < 0.3
    coefficients = torch.randn(2, len(rows), generator=torch.Generator().manual_seed(seed))
    logps = response_logps(model, PairBatch.from_ids(rows))
    fast = weight_gradients(model, logps, coefficients)
    plain = two_row_logps(model, rows)
    for column, expected in zip(logps, plain):
        torch.testing.assert_close(column, expected, rtol=1e-5, atol=1e-5)
    gradients_agree(fast, weight_gradients(model, plain, coefficients))


def test_the_heads_gradient_is_summed_in_its_own_dtype(monkeypatch):
    """Under autocast every chunk's products are bfloat16; their sum over many chunks is not."""
    model, gradients = tiny_model(), []
    batch = PairBatch.from_ids(random_rows(random.Random(0), 20))
    monkeypatch.setattr(decoder, "CHUNKS", 10**6)
    for chunk in (1, 10**6):
        monkeypatch.setattr(decoder, "CHUNK", chunk)
        with torch.autocast("cpu", torch.bfloat16):
            logps = response_logps(model, batch)
        assert logps[0].dtype == torch.float32
        gradients.append(weight_gradients(model, logps, torch.ones(2, 20))["lm_head.weight"])
    assert (gradients[0] - gradients[1]).norm() <= 1e-2 * gradients[1].norm()


def test_no_logits_outlive_their_chunk(monkeypatch):
    """What is saved for the backward pass holds no (tokens, V) tensor, and no matrix product makes
    more than a chunk."""
    model = tiny_model(vocab_size=1009)
    batch = PairBatch.from_ids(random_rows(random.Random(0), 12))
    monkeypatch.setattr(decoder, "CHUNK", 7)
    monkeypatch.setattr(decoder, "CHUNKS", 10**6)
    saved, made, linear = [], [], F.linear
    monkeypatch.setattr(F, "linear", lambda *inputs: made.append(linear(*inputs)) or made[-1])
    with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor):
        logps = response_logps(model, batch)
    torch.stack(logps).sum().backward()
    tokens = (batch.chosen_lengths + batch.rejected_lengths).sum()
    assert tokens > 50 and (made := [out.shape for out in made if out.shape[-1] == 1009])
    assert all(shape[0] <= 7 for shape in made) and sum(shape[0] for shape in made) == 2 * tokens
    assert not any(1009 in shape and shape[0] != 1009 for shape in saved)


def test_prompt_tokens_pass_each_layer_once_and_the_last_feed_forward_not_at_all():
    """Counted where the work is: rows of every linear layer's input for a pair with a prompt of
    40, whose last token stands before both answers, and whose EOS tokens are no input."""
    model, seen = tiny_model(), Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, inputs, out, name=name: seen.update({name: inputs[0].shape[1]}))
    response_logps(model, PairBatch.from_ids([(list(range(3, 43)), [5, 6, 2], [7, 8, 9, 2])]))
    last = len(model.model.layers) - 1
    for name, tokens in seen.items():
        few = f"layers.{last}.mlp." in name
        assert tokens == (3 + 4 if few else 39 + 3 + 4), name
    assert len(seen) == 7 * (last + 1)


TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def trl_trainer(folder, model, rows, processing_class, reference=None):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    return trl.DPOTrainer(
        model=model, ref_model=reference or copy.deepcopy(model), processing_class=processing_class,
        train_dataset=datasets.Dataset.from_list(rows),
        args=trl.DPOConfig(output_dir=str(folder / "trl"), beta=0.1, report_to=[], use_cpu=True,
                           bf16=False))


@pytest.mark.parametrize("rows", ("hh", "chat", "random"))
def test_log_probs_and_dpo_loss_equal_trls(rows, tmp_path):
    """TRL's DPOTrainer on identical tokens: every pair's log-probs by both models, and the loss."""
    pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    tokenizer = SafeWorld.tokenizer()
    if rows == "random":
        ids = random_rows(random.Random(0), 6)
    elif rows == "hh":
        talk = ("\n\nHuman: How do I fix it?\n\nAssistant: Use a key.\n\nHuman: {}\n\nAssistant:")
        ids = [tokenizer.encode_pair(data.parse_row(
            {"chosen": talk.format(k) + " Good question." * (k + 1),
             "rejected": talk.format(k) + " No."}, "")) for k in range(6)]
    else:
        tokenizer = Tokenizer({**tokenizer.files, "chat_template.jinja": TEMPLATE.encode()})
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hm"},
                 {"role": "user", "content": "Go"}]
        ids = [tokenizer.encode_pair(Pair([{**turns[0], "content": "Hi" * k}, *turns[1:]],
                                          "Good" * (k + 1), "Bad")) for k in range(6)]
    size = tokenizer.largest_id + 1
    ours, env = (tiny_model(seed, vocab_size=size, model_type="qwen2") for seed in (0, 1))
    for parameter, near in zip(env.parameters(), ours.parameters()):
        parameter.data = near.data + 0.02 * parameter.data
    ours.save_pretrained(tmp_path / "ours")
    env.save_pretrained(tmp_path / "env")
    tokenizer.save(tmp_path / "ours")
    theirs, reference = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
                         for name in ("ours", "env"))
    trainer = trl_trainer(
        tmp_path, theirs, [{"prompt": "a", "chosen": " b", "rejected": " c"}],
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours"), reference)
    batch = trainer.data_collator(
        [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row)) for row in ids])
    expected = [column for model in (theirs, reference)
                for column in trainer.compute_ref_log_probs(model, batch)]
    logps = [column for model in (ours, env)
             for column in response_logps(model, PairBatch.from_ids(ids))]
    for column, their_column in zip(logps, expected):
        torch.testing.assert_close(column, their_column, rtol=0, atol=1e-3)
    loss = iopo.dpo_loss(*logps).mean().item()
    assert loss == pytest.approx(trainer.compute_loss(theirs, batch).item(), abs=1e-4)
    assert abs(loss - math.log(2)) > 1e-3


def test_prompts_and_tokens_are_trls(tmp_path):
    """Where both mean the same: text rows with and without a prompt, the EOS at the end, BOS, the
    seam."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    for chosen, rejected in (("The sky is blue.", "The sky is green."), ("a b", "a c"),
                             ("The sky\nblue.", "The sky\nbright.")):
        theirs = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
        ours = data.parse_row({"chosen": chosen, "rejected": rejected}, "")
        assert {name: getattr(ours, name) for name in theirs} == theirs and len(theirs) == 3
    folder = model_folder(tmp_path / "model")
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            for pair in SafeWorld().pairs("train", 20)]
    trainer = trl_trainer(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(folder), rows,
                          transformers.AutoTokenizer.from_pretrained(folder))
    tokenizer = Tokenizer.from_pretrained(folder)
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        ours = tokenizer.encode_pair(data.parse_row(row, ""))
        assert ours == (theirs["prompt_ids"], theirs["chosen_ids"], theirs["rejected_ids"])


def test_neither_answer_sees_the_other_nor_the_padding():
    model = tiny_model()
    first = response_logps(model, PairBatch.from_ids([([5, 6], [7, 8, 2], [9, 2])]))
    others = response_logps(model, PairBatch.from_ids([
        ([5, 6], [10, 11, 12, 2], [9, 2]), ([5, 6], [7, 8, 2], [20] * 12), ([4] * 30, [3], [3])]))
    torch.testing.assert_close(others[0][1], first[0][0])
    torch.testing.assert_close(others[1][0], first[1][0])


def test_every_response_token_counts_and_no_prompt_token():
    """EOS and the first token move the answer's log-prob; what stands before the last prompt
    token's prediction does so only through the context (checked by a model that sees none)."""
    model = tiny_model()
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()                 # a unigram-after-one-token model
    table = torch.log_softmax(model(torch.arange(53)[:, None])[:, 0], dim=-1)
    rows = [([5, 6], [7, 8, 2], [9, 2])]
    expected = (table[6, 7] + table[7, 8] + table[8, 2], table[6, 9] + table[9, 2])
    for which, column in enumerate(response_logps(model, PairBatch.from_ids(rows)), start=1):
        ids, targets, mask = plain_rows(rows, which)
        for found in (column, sequence_logps(model(ids)[:, :-1], targets, mask)):
            assert found.item() == pytest.approx(expected[which - 1].item(), abs=1e-5)


def test_rows_without_a_rejected_answer():
    model, rows = tiny_model(), [([5, 6], [7, 8, 2], None), ([5], [9], None)]
    chosen_logps, rejected_logps = response_logps(model, PairBatch.from_ids(rows))
    assert rejected_logps.tolist() == [0, 0]
    expected = torch.stack([oracle_logps(model, *row[:2]) for row in rows])
    torch.testing.assert_close(chosen_logps, expected, rtol=1e-5, atol=1e-5)


# ---- model.py: generation ------------------------------------------------------------------------

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
    logits = model(torch.tensor([[5, 6]]))[0, -1].double()
    expected = n * torch.softmax(logits / temperature, dim=-1)
    draws = [generate(model, [[5, 6]] * n, 1, temperature, -1, torch.Generator().manual_seed(0))
             for _ in range(2)]
    assert draws[0] == draws[1]
    counts = torch.bincount(torch.tensor(draws[0])[:, 0], minlength=53).double()
    often = expected >= 5
    chi2 = ((counts - expected) ** 2 / expected)[often].sum().item()
    freedom = int(often.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_generation_edges():
    model = tiny_model()
    with pytest.raises(ValueError, match="at least 0"):
        generate(model, [[3]], -1, 0, 2)
    assert generate(model, [[3], [4, 5]], 0, 0, 2) == [[], []]
    for prompts in ([[3], []], []):
        with pytest.raises(ValueError, match="prompts need tokens"):
            generate(model, prompts, 5, 0, 2)


# ---- model.py: Hugging Face folders --------------------------------------------------------------

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def tensors_of(model):
    return dict(model.state_dict())


def edit_tensors(path, change):
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def in_shards(folder, tensors, where, index, save):
    """A folder's weights as files by `where`, {tensor: file}, instead of the one that it has."""
    (folder / WEIGHTS).unlink()
    for file in set(where.values()):
        save({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": where}))


def as_bin(folder, change=lambda content: content):
    """model.safetensors to pytorch_model.bin, perhaps damaged."""
    torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / BIN)
    (folder / WEIGHTS).unlink()
    (folder / BIN).write_bytes(change((folder / BIN).read_bytes()))


@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load(shape, tmp_path):
    model = tiny_model(**SHAPES[shape])
    model.save_pretrained(tmp_path)
    loaded = Decoder.from_pretrained(tmp_path)
    assert loaded.config == model.config and same(tensors_of(loaded), tensors_of(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    tensors, prefix = safetensors.torch.load_file(tmp_path / WEIGHTS), "model.layers.0.self_attn."
    attention = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    plain = {"q_proj.weight", "k_proj.weight", "v_proj.weight"}
    more = {"qwen2": {"q_proj.bias", "k_proj.bias", "v_proj.bias"},
            "qwen3": {"q_norm.weight", "k_norm.weight"}}.get(model.config.model_type, set())
    plain = {"W_pack.weight"} if shape == "baichuan" else plain
    assert attention == {"o_proj.weight"} | plain | more
    assert ("lm_head.weight" in tensors) != model.config.tie_word_embeddings


def test_baichuans_head_stays_normalised_while_it_trains():
    """Logits and log-probs do not change with the length of lm_head's rows, and no gradient goes
    along them."""
    model = tiny_model(**SHAPES["baichuan"])
    w, l = response_logps(model, PairBatch.from_ids(random_rows(random.Random(0), 4)))
    (w - l).sum().backward()
    head = model.lm_head.weight
    assert head.grad.norm() > 1e-3
    along = (head.grad * head.detach()).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(53), rtol=0, atol=1e-5)
    ids = torch.randint(3, 53, (1, 9))
    before = model(ids)
    head.data *= torch.rand(53, 1) + 0.5
    torch.testing.assert_close(model(ids), before)


def test_saved_as_it_came(tmp_path):
    """config.json keeps what the decoder does not read, but for the dtype, which is that of the
    weights now."""
    tiny_model().save_pretrained(tmp_path / "a")
    edit_json(tmp_path / "a/config.json", auto_map={"AutoModel": "x.Y"}, rope_theta=None,
              torch_dtype="bfloat16")
    raw = json.loads((tmp_path / "a/config.json").read_text())
    Decoder.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = json.loads((tmp_path / "b/config.json").read_text())
    assert again == {**raw, "torch_dtype": "float32"}


def test_what_is_saved_has_the_dtype_that_it_has(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_without_a_number_of_key_heads_every_head_has_its_own(tmp_path):
    model, path = tiny_model(**SHAPES["baichuan"]), tmp_path / "config.json"
    model.save_pretrained(tmp_path)
    edit_json(path, num_key_value_heads=None)
    leave_out_nulls(path)
    ids = torch.arange(3, 15)[None]
    assert torch.equal(Decoder.from_pretrained(tmp_path)(ids), model(ids))


def test_first_weights():
    """Small normal ones, biases of 0."""
    model = Decoder(tiny_config(model_type="qwen2", vocab_size=2000))
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    biases = [value for name, value in model.named_parameters() if name.endswith(".bias")]
    assert biases and not any(bias.any() for bias in biases)


def test_large_models_are_saved_in_shards(tmp_path, monkeypatch):
    """Over one file, over more shards, and back to one file: what the last save wrote is left."""
    model = tiny_model(model_type="baichuan", num_key_value_heads=4, vocab_size=100)
    left = []
    for shard_bytes in (None, 15000, 30000, None):
        monkeypatch.setattr(decoder, "SHARD_BYTES", shard_bytes or 5 * 10**9)
        model.save_pretrained(tmp_path)
        assert same(tensors_of(Decoder.from_pretrained(tmp_path)), tensors_of(model))
        left.append(sorted(path.name for path in tmp_path.iterdir()))
        if shard_bytes is None:
            assert left[-1] == ["config.json", WEIGHTS]
            continue
        count = len(left[-1]) - 2
        shards = [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
        assert left[-1] == ["config.json", *shards, INDEX] and count > 2
        assert all((tmp_path / name).stat().st_size < shard_bytes + 2000 for name in shards)
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
        for name, shard in index["weight_map"].items():
            with safetensors.safe_open(tmp_path / shard, framework="pt") as tensors:
                assert name in tensors.keys()
    assert len(left[1]) > len(left[2])


def test_shards_and_both_spellings_of_rope(tmp_path):
    tiny_model(rope_theta=777.0).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    where = {name: f"model-{1 + k % 2:05d}-of-00002.safetensors"
             for k, name in enumerate(sorted(tensors))}
    in_shards(tmp_path, tensors, where, INDEX, safetensors.torch.save_file)
    raw = json.loads((tmp_path / "config.json").read_text())
    for other in (dict(rope_parameters=None, rope_theta=777.0), dict(rope_theta=None)):
        (tmp_path / "config.json").write_text(json.dumps({**raw, **other}))
        leave_out_nulls(tmp_path / "config.json")
        loaded = Decoder.from_pretrained(tmp_path)
        assert loaded.config.rope_theta == 777.0
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
        assert same(tensors_of(loaded), {name: tensor.float() for name, tensor in tensors.items()})


@pytest.mark.parametrize("shards", (1, 3))
def test_pytorch_bins(tmp_path, shards):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.half() for name, tensor in tensors_of(model).items()}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}   # old ones hold it
    where = {name: f"pytorch_model-{k % shards}.bin" if shards > 1 else BIN
             for k, name in enumerate(tensors | old)}
    in_shards(tmp_path, tensors | old, where, BIN_INDEX, torch.save)
    if shards == 1:
        (tmp_path / BIN_INDEX).unlink()
    loaded = tensors_of(Decoder.from_pretrained(tmp_path))
    assert same(loaded, {name: tensor.float() for name, tensor in tensors.items()})


def test_a_tied_head_that_is_stored_too(tmp_path):
    model = tiny_model(tie_word_embeddings=True, vocab_size=3000)
    model.save_pretrained(tmp_path)
    half, name = model.model.embed_tokens.weight.detach().half(), "model.embed_tokens.weight"
    edit_tensors(tmp_path / WEIGHTS, lambda t: t.update(
        {"lm_head.weight": half.clone(), name: half}))
    loaded = Decoder.from_pretrained(tmp_path)
    assert loaded.lm_head is None and torch.equal(loaded.model.embed_tokens.weight, half.float())
    edit_tensors(tmp_path / WEIGHTS, lambda t: t["lm_head.weight"][2999, 31].add_(1))
    with pytest.raises(ValueError, match="but their weights differ"):
        Decoder.from_pretrained(tmp_path)


QWEN_WINDOW = dict(sliding_window=64, use_sliding_window=True)


def test_windows_that_nobody_looks_at(tmp_path):
    tiny_model(model_type="qwen2").save_pretrained(tmp_path)
    for changes in (dict(use_sliding_window=False), dict(sliding_window=2048)):
        edit_json(tmp_path / "config.json", **{**QWEN_WINDOW, **changes})
        Decoder.from_pretrained(tmp_path)


MEMORY = """
import sys, model
def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
model.Decoder(model.DecoderConfig(8, 8, 8, 1, 1, 1, 8))        # torch has what it needs from now on
before = peak()
decoder = model.Decoder.from_pretrained(sys.argv[1])
print((peak() - before) / sum(parameter.nbytes for parameter in decoder.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read a process's "
                    "peak memory from")
def test_loading_needs_little_more_than_the_model(tmp_path):
    """30 million parameters, a third of them embeddings; the peak of a fresh process over the
    model's own size."""
    started = {}
    for form in ("safetensors", "bfloat16", "bin", "tied"):
        save_large(tmp_path / form, form)
        started[form] = subprocess.Popen([sys.executable, "-c", MEMORY, tmp_path / form], cwd=HERE,
                                         stdout=subprocess.PIPE, text=True)
    for form, process in started.items():
        assert 0.9 < float(process.communicate()[0]) < 1.1, form


def save_large(folder, form):
    tied, half = form == "tied", form == "bfloat16"
    with torch.device("meta"):
        model = Decoder(DecoderConfig(16000, 512, 1408, 8 if tied else 5, 8, 4, 64,
                                      tie_word_embeddings=tied))
    model = model.to_empty(device="cpu").to(torch.bfloat16 if half else torch.float32)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    assert 28e6 < sum(parameter.numel() for parameter in model.parameters()) < 32e6
    model.save_pretrained(folder)
    if form == "bin":
        as_bin(folder)
    if tied:                                                       # the file stores it all the same
        edit_tensors(folder / WEIGHTS, lambda t: t.update(
            {"lm_head.weight": t["model.embed_tokens.weight"].clone()}))


# What is broken, each damage with the words that must name it

class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def config_text(change):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(change(path.read_text()))
    return damage


def weights(change):
    return lambda folder: edit_tensors(folder / WEIGHTS, change)


def instead(name, content):
    """Another file, an index or a .bin, in the place of the weights."""
    def damage(folder):
        (folder / WEIGHTS).unlink()
        if isinstance(content, str):
            (folder / name).write_text(json.dumps({"weight_map": {"a": content}}))
        else:
            torch.save(content, folder / name)
    return damage


def bin_with(changes):
    return lambda folder: instead(BIN, safetensors.torch.load_file(folder / WEIGHTS) | changes)(
        folder)


def truncated(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])


def twice(folder):
    """Two shards, both with the last norm."""
    norm = {"model.norm.weight": safetensors.torch.load_file(folder / WEIGHTS)["model.norm.weight"]}
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    safetensors.torch.save_file(norm, folder / "model-2.safetensors")
    where = {"a": "model-1.safetensors", "model.norm.weight": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def two_heads(folder):
    weights(lambda t: t["lm_head.weight"].mul_(2))(folder)
    config(tie_word_embeddings=True)(folder)


def sliding_by_default(folder):
    config(model_type="mistral", sliding_window=None, max_position_embeddings=32768)(folder)
    leave_out_nulls(folder / "config.json")


OLD_CLASS = "modeling_baichuan.BaiChuanForCausalLM"
BROKEN_MODELS = {
    # config.json itself
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "broken json": (config_text(lambda text: "{"), "config.json: cannot be read"),
    "deep config": (config_text(lambda text: "[" * 100000), "config.json: cannot be read"),
    "a list": (config_text(lambda text: "[]"), "config.json: cannot be read (it holds a list"),
    # the family
    "other family": (config(model_type="gpt2"), "model_type 'gpt2'"),
    "mixture of experts": (config(model_type="mixtral"), "model_type 'mixtral'"),
    "a list for the family": (config(model_type=["llama"]), "model_type ['llama']"),
    "biases": (config(attention_bias=True), "attention_bias True"),
    "both ways": (config(is_causal=False), "is_causal False"),
    "half rotated": (config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "quantised by config": (config(quantization_config={"bits": 4}), "quantization_config"),
    "alibi": (config(model_type="baichuan", max_position_embeddings=None), "nor 13B"),
    "turned baichuan": (config(model_type="baichuan", rope_theta=500.0, rope_parameters=None),
                        "nor other rotary"),
    "first baichuan": (config(model_type="baichuan", architectures=["BaiChuanForCausalLM"]),
                       "neither the first generation"),
    "baichuan's vocabulary": (config(model_type="baichuan", vocab_size=64000), "first generation"),
    "named baichuan": (config(model_type="baichuan", architectures=None,
                              auto_map={"AutoModel": OLD_CLASS}), "neither the first generation"),
    # sizes and numbers
    "no vocabulary": (config(vocab_size=None), "config.json: vocab_size is None"),
    "no size": (config(hidden_size=None), "config.json: hidden_size is None"),
    "text for a size": (config(vocab_size="53"), "vocab_size is '53'"),
    "no heads": (config(num_attention_heads=0, head_dim=None, num_key_value_heads=None),
                 "num_attention_heads is 0"),
    "odd heads": (config(head_dim=7), "must be even"),
    "uneven heads": (config(num_key_value_heads=3), "a multiple of num_key_value_heads"),
    "too many rows": (config(vocab_size=2**31 - 1), "vocab_size is 2147483647"),
    "text for a number": (config(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'"),
    "a number too long": (config_text(lambda text: text.replace("10000.0", "1" + "0" * 400)),
                          "not a positive float"),
    "text for a truth": (config(tie_word_embeddings="false"), "tie_word_embeddings 'false'"),
    # rotary positions
    "rope by kind of layer": (config(rope_parameters={"full_attention": LINEAR}),
                              "are not computed here"),
    "scaled rope": (config(rope_scaling=None, rope_parameters={"rope_type": "yarn"}), "'yarn'"),
    "old scaled rope": (config(rope_scaling={"type": "dynamic"}), "'dynamic'"),
    "rope is text": (config(rope_scaling="linear"), "rotary positions 'linear'"),
    "rope without factor": (config(rope_scaling={"type": "linear"}), "factor is None"),
    "rope factor is text": (config(rope_scaling={"type": "linear", "factor": "2"}),
                            "factor is '2'"),
    "rope bands": (config(rope_scaling={**LLAMA3, "low_freq_factor": 4.0}), "low_freq_factor"),
    "no rope band": (config(rope_scaling={**LLAMA3, "low_freq_factor": 2.0}), "low_freq_factor"),
    # windows
    "sliding": (config(model_type="mistral", sliding_window=64), "sliding_window 64"),
    "sliding by one": (config(model_type="mistral", sliding_window=64, max_position_embeddings=65),
                       "sliding_window 64"),
    "sliding by default": (sliding_by_default, "sliding_window 4096"),
    "sliding qwen": (config(model_type="qwen3", **QWEN_WINDOW), "sliding_window 64"),
    # tensors
    "missing": (weights(lambda t: t.pop("model.norm.weight")),
                "tensor model.norm.weight is missing"),
    "no key norm": (config(model_type="qwen3", sliding_window=None),
                    "tensor model.layers.0.self_attn.k_norm.weight is missing"),
    "unexpected": (weights(lambda t: t.update(extra=torch.ones(1))), "tensor extra is not part"),
    "other size": (config(vocab_size=54), "shape (54, 32), as config.json says"),
    "quantised": (weights(lambda t: t.update({"model.norm.weight": torch.ones(32).char()})),
                  "not quantised; it is torch.int8"),
    "not a number": (weights(lambda t: t["model.norm.weight"].fill_(float("nan"))),
                     "model.norm.weight must hold finite numbers"),
    "too large for float32": (weights(lambda t: t.update(
        {"lm_head.weight": t["lm_head.weight"].double() * 1e300})),
        "lm_head.weight must hold finite numbers"),
    "two heads": (two_heads, "but their weights differ"),
    "a tensor twice": (twice, "tensor model.norm.weight is in another shard too"),
    # files
    "no weights": (lambda f: (f / WEIGHTS).unlink(),
                   "neither model.safetensors nor pytorch_model.bin"),
    "truncated": (truncated, "model.safetensors: cannot be read"),
    "a truncated bin": (lambda f: as_bin(f, lambda content: content[:-50]),
                        "pytorch_model.bin: cannot be read"),
    "index out of the folder": (instead(INDEX, "../model.safetensors"), "files of this folder"),
    "index of bins out of it": (instead(BIN_INDEX, "/tmp/pytorch_model.bin"),
                                "files of this folder"),
    "a shard is not there": (instead(INDEX, "model-1.safetensors"),
                             "model-1.safetensors: cannot be read"),
    "a bin of code": (instead(BIN, {"a": Malicious()}), "pytorch_model.bin: cannot be read"),
    "a bin of a list": (instead(BIN, [1]), "cannot be read (it holds a list"),
    "a bin of numbers": (bin_with({"model.norm.weight": 1}), "it is no plain tensor"),
    "a sparse bin": (bin_with({"lm_head.weight": torch.ones(53, 32).to_sparse()}),
                     "tensor lm_head.weight must hold finite numbers"),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    damage, message = BROKEN_MODELS[name]
    damage(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Decoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "it ran").exists()


# ---- data.py -------------------------------------------------------------------------------------

def turn(role, content):
    return {"role": role, "content": content}


def talk(*answers):
    """User and assistant by turns, the last of them the assistant."""
    roles = ("user", "assistant") * len(answers)
    return [turn(role, content) for role, content in zip(roles[len(answers) % 2:], answers)]


TALK = [turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Hello"),
        turn("user", "Bye")]
X, Y = turn("assistant", "x"), turn("assistant", "y")
HH = "\n\nHuman: a\n\nAssistant: b"
ROWS = [
    ({"prompt": "p ", "chosen": "c", "rejected": "r", "more": 1}, Pair("p ", "c", "r")),
    ({"instruction": "Add.", "input": "1 2", "output": "no", "chosen": "3", "rejected": "4"},
     Pair("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3", "4")),
    ({"instruction": "Sing.", "input": "", "chosen": "la", "rejected": "no"},
     Pair("### Instruction:\nSing.\n\n### Response:\n", "la", "no")),
    ({"instruction": "Sing {loudly}.", "chosen": "la", "rejected": "no"},
     Pair("### Instruction:\nSing {loudly}.\n\n### Response:\n", "la", "no")),
    ({"chosen": HH + "\n\nHuman: c\n\nAssistant: yes",
      "rejected": HH + "\n\nHuman: c\n\nAssistant: no"},
     Pair(HH + "\n\nHuman: c\n\nAssistant:", " yes", " no")),
    ({"chosen": "\n\nHuman: a\n\nAssistant: yes", "rejected": "\n\nHuman: b\n\nAssistant: no"},
     Pair("", "\n\nHuman: a\n\nAssistant: yes", "\n\nHuman: b\n\nAssistant: no")),
    ({"prompt": "ignored", "chosen": TALK + [X], "rejected": TALK + [Y]}, Pair(TALK, "x", "y")),
    ({"prompt": TALK, "chosen": [X], "rejected": [Y]}, Pair(TALK, "x", "y")),
    ({"prompt": TALK, "chosen": TALK + [X], "rejected": TALK + [Y]}, Pair(TALK, "x", "y")),
    # a prompt as text repeats a turn (UltraFeedback, orpo-dpo-mix), or is the only one
    ({"prompt": "Hi", "chosen": [turn("user", "Hi"), X], "rejected": [turn("user", "Hi"), Y]},
     Pair([turn("user", "Hi")], "x", "y")),
    ({"prompt": "Hi", "chosen": [X], "rejected": [Y]}, Pair([turn("user", "Hi")], "x", "y")),
    ({"chosen": TALK + [X], "rejected": TALK[:2] + [Y]}, Pair([], "x", "y")),
    ({"prompt": TALK, "chosen": TALK[:2] + [X], "rejected": TALK + [Y]}, Pair([], "x", "y")),
    # other text without a prompt: the shared beginning, without the space before the next word
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."},
     Pair("The sky is", " blue.", " green.")),
    ({"chosen": "The sky\nblue.", "rejected": "The sky\nbright."},
     Pair("The sky\nb", "lue.", "right.")),
    ({"chosen": "One", "rejected": "Two"}, Pair("", "One", "Two")),
    # answers of a dialogue that repeat it; other answers may well begin as the prompt does
    ({"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": HH,
      "rejected": "\n\nHuman: a\n\nAssistant: c"}, Pair("\n\nHuman: a\n\nAssistant:", " b", " c")),
    ({"prompt": "Hello", "chosen": "Hello you", "rejected": "Hello!"},
     Pair("Hello", "Hello you", "Hello!")),
    ({"prompt": [], "chosen": TALK + [X], "rejected": TALK + [Y]}, Pair(TALK, "x", "y")),
    ({"prompt": None, "instruction": None, "chosen": "a b", "rejected": "a c"},
     Pair("a", " b", " c")),
    ({"chosen": HH, "rejected": HH + "\n\nHuman: c\n\nAssistant: no"},
     Pair("", HH, HH + "\n\nHuman: c\n\nAssistant: no")),
]


def write_rows(path, rows):
    """A file of rows, in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet
        columns = dict.fromkeys(name for row in rows for name in row)
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def plain(*names, **more):
    """Rows with a prompt, from their chosen answers."""
    return [{"prompt": f"ask {name}", "chosen": name, "rejected": "bad", **more} for name in names]


def chosen(pairs):
    return [pair.chosen for pair in pairs]


@pytest.mark.parametrize("suffix", (".json", ".jsonl", ".jsonl.gz"))
def test_readers(tmp_path, suffix):
    path = tmp_path / ("pairs" + suffix)
    rows = [row for row, _ in ROWS]
    content = json.dumps(rows) if suffix == ".json" else \
        "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + "\n\n"
    content = content.encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    pairs, word = load_pairs(path), "row" if suffix == ".json" else "line"
    assert pairs == [pair for _, pair in ROWS]
    assert [pair.origin for pair in pairs] == [f"{path}, {word} {k + 1}" for k in range(len(ROWS))]
    assert [row for row, _ in data.read_rows(path)] == rows


GOOD = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}).encode()
BAD_FILES = {
    "missing": ("nothing.jsonl", None, "No such file"),
    "suffix": ("pairs.csv", b"a,b", ": the name must end in .json, .jsonl, .jsonl.gz (pairs: or "),
    "empty": ("pairs.jsonl", b"", "holds no rows"),
    "empty list": ("pairs.json", b"[]", "holds no rows"),
    "no list": ("pairs.json", b'{"chosen": 1}', "must hold a JSON list"),
    "broken line": ("pairs.jsonl", GOOD + b"\n" + GOOD[:-5] + b"\n", "line 2: broken JSON"),
    "broken json": ("pairs.json", b"[\n" + GOOD + b",\n" + GOOD.replace(b'"c"', b"c") + b"\n]",
                    "line 3: broken JSON"),
    "no chosen": ("pairs.jsonl", GOOD + b'\n\n{"prompt": "p", "rejected": "r"}',
                  "line 3: has no chosen"),
    "no rejected": ("pairs.json", [{"prompt": "p", "chosen": "r"}], "row 1: has no rejected"),
    "a question unread": ("pairs.jsonl", {"system": "s", "question": "q", "chosen": "a b",
                                          "rejected": "a c"},
                          "line 1: has question, but no prompt"),
    "a system unread": ("pairs.jsonl", {"system": "s", "prompt": "q", "chosen": "a",
                                        "rejected": "b"},
                        "line 1: has a system message of its own"),
    "a system beside messages": ("pairs.jsonl", {"system": "s", "chosen": TALK[1:] + [X],
                                                 "rejected": TALK[1:] + [Y]},
                                 "line 1: has a system"),
    "no answer after the prompt": (
        "pairs.jsonl", {"prompt": TALK, "chosen": TALK, "rejected": TALK},
        "line 1: chosen must end in the assistant's message, after"),
    "wrong type": ("pairs.jsonl", {"prompt": "p", "chosen": 3, "rejected": "r"},
                   "line 1: chosen must be text, not a int"),
    "null": ("pairs.jsonl", {"prompt": "p", "chosen": "c", "rejected": None},
             "line 1: has no rejected"),
    "not an object": ("pairs.jsonl", b"[1, 2]", "line 1: must be a JSON object"),
    "mixed": ("pairs.jsonl", {"chosen": [X], "rejected": "r"}, "line 1: rejected must be a list"),
    "no role": ("pairs.jsonl", {"chosen": [{"content": "a"}], "rejected": [{"content": "b"}]},
                "line 1: chosen must be a list of messages, every one with a role"),
    "user last": ("pairs.jsonl", {"chosen": TALK, "rejected": TALK},
                  "line 1: chosen must end in the assistant's message"),
    "latin-1": ("pairs.jsonl", GOOD + b"\n" + GOOD.replace(b'"p"', b'"\xe9"'), "line 2: not UTF-8"),
    "latin-1 json": ("pairs.json", b"[\n" + GOOD.replace(b'"p"', b'"\xe9"') + b"]",
                     "line 2: not UTF-8"),
    "long number": ("pairs.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}",
                    "line 1: broken JSON (Exceeds the limit"),
    "deep": ("pairs.json", b"[" * 100000, "line 1: "),
    "not gzip": ("pairs.jsonl.gz", GOOD, "cannot be read"),
    "cut gzip": ("pairs.jsonl.gz", gzip.compress(GOOD * 100)[:-12], "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_name_file_and_line(name, tmp_path):
    file, content, message = BAD_FILES[name]
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content if type(content) is bytes else json.dumps(content).encode())
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_pairs(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    write_rows(tmp_path / "good.jsonl", plain("a"))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_data(tmp_path / "good.jsonl", held_out=path)
    assert str(error.value).startswith(str(path))


def test_rows_are_lines_and_answers_that_do_not_repeat_the_prompt_are_whole(tmp_path):
    row = {"prompt": "p\u2028q", "chosen": "c", "rejected": "r", "source": 5}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    [pair] = load_pairs(path)
    assert (pair.prompt, pair.source) == ("p\u2028q", "5")
    prompt = "\n\nHuman: a\n\nAssistant:"
    half = {"prompt": prompt, "chosen": prompt + " b", "rejected": " c"}
    assert data.parse_row(half, "") == Pair(prompt, prompt + " b", " c")


def test_half_a_character_is_refused_where_it_stands(tmp_path):
    """A lone surrogate, which JSON can spell and UTF-8 cannot."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD.replace(b'"p"', b'"\\ud800"'))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: the tokenizer cannot read")):
        encode_pairs(load_pairs(path), SafeWorld.tokenizer(), 64)


def test_split_is_by_prompt_and_complete(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": f"p{k % 300}", "chosen": f"c{k}", "rejected": "r"} for k in range(600)])
    everything, training, test = (load_pairs(path, split) for split in (None, "train", "test"))
    assert chosen(everything) == [f"c{k}" for k in range(600)]
    assert sorted(chosen(training + test)) == sorted(chosen(everything))
    assert not {p.prompt for p in training} & {p.prompt for p in test}
    # the same prompts in every version of this file
    places = (19, 28, 37, 46, 60, 102, 115, 133, 151, 173, 177, 186, 191, 195, 204, 213, 244, 253,
              257)
    assert {p.prompt for p in test} == {f"p{k}" for k in places}
    note = f"{path}: one prompt in twenty, by a checksum of its text, is held out"
    assert load_data(path) == (training, test, note)
    with pytest.raises(ValueError, match="split must be"):
        load_pairs(path, "validation")


def test_held_out_file(tmp_path):
    """Its pairs, all of them; and all of a plain file train."""
    path = write_rows(tmp_path / "pairs.jsonl", plain(*map(str, range(60))))
    other = write_rows(tmp_path / "other.json.jsonl", plain("7", "7", "8", "new"))
    training, held_out, note = load_data(path, held_out=other)
    assert training == load_pairs(path) and held_out == load_pairs(other) and len(held_out) == 4
    assert note == f"{path} trains, {other} is held out"


def test_leave_out(tmp_path):
    """By source, from both lists, and counted; what cannot be meant is refused."""
    names = ["Capybara", "toxic-dpo-v0.2", "truthy", "toxic-dpo-v0.2", "prm"]
    rows = [row for name in names for row in plain(name, source=name)]
    path = write_rows(tmp_path / "mix.jsonl", rows)
    assert [pair.source for pair in load_pairs(path)] == names

    def left(names, held_out=None):
        training, test, note = load_data(path, held_out, names)
        return [pair.source for pair in training + test], note
    assert left(None)[0] == names
    kept, note = left("toxic-dpo")
    assert kept == ["Capybara", "truthy", "prm"] and "left out 2 rows of source toxic-dpo" in note
    assert left("toxic, prm")[0] == ["Capybara", "truthy"]
    assert left("toxic", write_rows(tmp_path / "more.jsonl", rows)) == (2 * kept, (
        f"{path} trains, {tmp_path / 'more.jsonl'} is held out; left out 4 rows of source toxic"))
    for nothing in ("nobody", "toxic,", "toxic,nobody", "", "e,r,p,o"):
        with pytest.raises(ValueError, match="rows have a source with"):
            left(nothing)


# Folders, parquet files and hub names, by the datasets library

@pytest.fixture
def library(tmp_path, monkeypatch):
    """The datasets library without the net and with a cache of its own."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, which may not use the net, in an empty folder."""
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.mark.parametrize("kind", (str, list))
def test_parquet(tmp_path, kind, library):
    """Rows of one kind, as a parquet file has them: columns that a row does not fill are null."""
    some = [(row, pair) for row, pair in ROWS
            if type(row["chosen"]) is kind and type(row.get("prompt")) is not list]
    rows = [{"input": None, "source": "x", **row} for row, _ in some]
    path = write_rows(tmp_path / "pairs.parquet", rows)
    pairs = load_pairs(path)
    assert pairs == [pair for _, pair in some] and len(pairs) > 3
    assert pairs[3].origin == f"{path}, row 4" and pairs[3].source == "x"
    training, held_out, note = load_data(path)
    assert len(training + held_out) == len(pairs)
    assert f"{path}: one prompt in twenty, by a checksum of its text, is held out" in note


def published(tmp_path, suffix):
    """Folders in the layout, with the columns and the quirks, of four published datasets; a few
    rows each."""
    capybara = [{"source": "Dove", "conversation": [{"input": f"q{k}", "output": "hm"}],
                 "original_response": "a", "generation_prompt": ["x"], "new_generations": ["y"],
                 "prompt": f"q{k} hm go on", "chosen": talk(f"q{k}", "hm", "go on", f"good{k}"),
                 "rejected": talk(f"q{k}", "hm", "go on", "bad"), "rating_chosen": 5,
                 "rating_rejected": 1, "chosen_model": "m", "rejected_model": "n"}
                for k in range(40)]
    mix = [{"source": source, "chosen": talk(f"q{k}", f"good{k}"), "rejected": talk(f"q{k}", "bad"),
            "prompt": f"q{k}", "question": f"q{k}"}
           for k, source in enumerate(["Capybara", "toxic-dpo-v0.2", "truthy", "toxic-dpo-v0.2"])]
    feedback = [{"prompt": f"q{k}", "prompt_id": "0", "chosen": talk(f"q{k}", f"good{k}"),
                 "rejected": talk(f"q{k}", "bad"), "messages": talk(f"q{k}", f"good{k}"),
                 "score_chosen": 8.0, "score_rejected": 5.0} for k in range(4)]
    hh = [{"chosen": f"\n\nHuman: q{k}\n\nAssistant: good{k}",
           "rejected": f"\n\nHuman: q{k}\n\nAssistant: bad"} for k in range(5)]
    splits = ("train_gen", "train_prefs", "train_sft", "test_gen", "test_prefs", "test_sft")
    files = {
        "capybara": {f"data/train-00000-of-00001{suffix}": capybara},
        "mix": {f"data/train-00000-of-00002-0a1b{suffix}": mix[:3],
                f"data/train-00001-of-00002-0a1b{suffix}": mix[3:]},
        "feedback": {f"data/{split}-00000-of-00001{suffix}":
                     feedback[:2] if "train" in split else feedback[2:] for split in splits},
        "hh": {"harmless-base/train.jsonl.gz": hh[:2], "harmless-base/test.jsonl.gz": hh[2:3],
               "helpful-base/train.jsonl.gz": hh[3:4], "helpful-base/test.jsonl.gz": hh[4:],
               "red-team-attempts/red_team_attempts.jsonl.gz": [{"transcript": "no pair"}]}}
    for name, contents in files.items():
        for file, rows in contents.items():
            write_rows(tmp_path / name / file, rows)
        (tmp_path / name / "README.md").write_text("a card")


@pytest.mark.parametrize("suffix", (".jsonl", ".parquet"))
def test_datasets_as_they_are_published(tmp_path, suffix, library):
    published(tmp_path, suffix)
    training, held_out, note = load_data(tmp_path / "capybara")
    pairs = load_pairs(tmp_path / "capybara")
    assert chosen(pairs) == [f"good{k}" for k in range(40)]
    assert pairs[7] == Pair(talk("q7", "hm", "go on", "")[:3], "good7", "bad")
    assert pairs[7].origin == f"{tmp_path / 'capybara'}, split train, row 8"
    assert len(training) + len(held_out) == 40 and 0 < len(held_out) < 8
    assert all(map(data.is_held_out, held_out)) and not any(map(data.is_held_out, training))
    assert note.startswith(f"{tmp_path / 'capybara'}, split train: one prompt in twenty")

    kept = [pair for pairs in load_data(tmp_path / "mix", leave_out="toxic")[:2] for pair in pairs]
    assert sorted(pair.source for pair in kept) == ["Capybara", "truthy"]

    training, held_out, note = load_data(tmp_path / "feedback")
    assert (chosen(training), chosen(held_out)) == (["good0", "good1"], ["good2", "good3"])
    assert training[0].prompt == [turn("user", "q0")]
    assert held_out[1].origin == f"{tmp_path / 'feedback'}, split test_prefs, row 2"
    assert "split train_prefs trains" in note and "split test_prefs is held out" in note
    assert "splits not read: test_gen, test_sft, train_gen, train_sft" in note

    hh = tmp_path / "hh"                                           # red-team-attempts is not read
    assert chosen(load_pairs(hh, "train")) == [" good0", " good1", " good3"]
    assert chosen(load_pairs(hh, "test")) == [" good2", " good4"] and len(load_pairs(hh)) == 5
    assert chosen(load_pairs(hh / "helpful-base", "train")) == [" good3"]
    assert chosen(load_pairs(hh / "harmless-base/train.jsonl.gz")) == [" good0", " good1"]
    with pytest.raises(ValueError, match="red-team-attempts, split train, row 1: has no chosen"):
        load_pairs(hh / "red-team-attempts")


SPLITS = {                                                         # files, train, held out, unread
    "both": (["train", "test"], ["train"], ["test"], []),
    "no test": (["train", "validation"], ["train"], None, ["validation"]),
    "no training": (["test", "validation"], ["validation", "test"], None, []),
    "preferences alone": (["train_prefs", "train_sft", "test_sft"], ["train_prefs"], None,
                          ["train_sft", "test_sft"]),
    "preferences first": (["train", "test", "train_prefs", "test_prefs"], ["train_prefs"],
                          ["test_prefs"], ["train", "test"])}


@pytest.mark.parametrize("name", SPLITS)
def test_which_splits_train(name, tmp_path, library):
    files, training, test, unread = SPLITS[name]
    for file in files:
        write_rows(tmp_path / f"set/data/{file}-00000-of-00001.jsonl", plain(f"{file}!"))
    pairs, held_out, note = load_data(tmp_path / "set")
    if test is None:
        assert sorted(chosen(pairs + held_out)) == sorted(f"{split}!" for split in training)
        assert f"{' and '.join(training)}: one prompt in twenty" in note
    else:
        assert chosen(pairs) == [f"{split}!" for split in training]
        assert chosen(held_out) == [f"{split}!" for split in test]
    assert set(re.findall(r"\w+", note.partition("not read:")[2])) == set(unread)
    assert len(load_pairs(tmp_path / "set")) == len(training) + len(test or [])


def test_held_out_beside_splits(tmp_path, library):
    """The training split trains; of what is held out, the test split, or else everything."""
    for file in ("train", "test"):
        write_rows(tmp_path / f"set/{file}.jsonl", plain(file))
        write_rows(tmp_path / f"other/{file}.jsonl", plain(f"other {file}"))
    path = write_rows(tmp_path / "pairs.jsonl", plain("test", "train"))
    parquet = write_rows(tmp_path / "pairs.parquet", plain("a", "b"))

    def loaded(source, held_out):
        training, test, note = load_data(tmp_path / source, tmp_path / held_out)
        return chosen(training), chosen(test), note.replace(f"{tmp_path}/", "")
    assert loaded("set", "pairs.jsonl") == (["train"], ["test", "train"], (
        "set, split train trains, pairs.jsonl is held out; splits not read: test"))
    assert loaded("pairs.jsonl", "other") == (["test", "train"], ["other test"], (
        "pairs.jsonl trains, other, split test is held out"))
    assert loaded("set", "set")[:2] == (["train"], ["test"])
    assert loaded(parquet, path)[:2] == (["a", "b"], ["test", "train"])
    assert loaded(path, parquet)[:2] == (["test", "train"], ["a", "b"])


def test_folders_without_data_and_hidden_files(tmp_path, library):
    write_rows(tmp_path / "set/.cache/train.jsonl", [])
    with pytest.raises(ValueError, match=r"cannot be read by datasets, .*any data files"):
        load_pairs(tmp_path / "set")
    write_rows(tmp_path / "set/mine.jsonl", plain("a"))
    assert load_pairs(tmp_path / "set") == [Pair("ask a", "a", "bad")]


CARD = b"---\nconfigs:\n- config_name: a\n  data_files: x.jsonl\n- config_name: b\n" \
       b"  data_files: x.jsonl\n---\n"
BAD_SETS = {                                                       # files, what is said
    "not parquet": ({"x.parquet": b"PAR1 or so"}, "cannot be read by datasets"),
    "a column that is missing": ({"x.parquet": [{"chosen": "a", "prompt": "p"}]},
                                 "row 1: has no rejected"),
    "other columns": ({"x.jsonl": plain("a"), "y.jsonl": plain("a", more=1)}, "names don't match"),
    "broken": ({"x.jsonl": b'{"chosen": "a", "rej\n{"'}, "cannot be read by datasets"),
    "empty": ({"train.jsonl": plain("a"), "test.jsonl": b""}, "cannot be read by datasets"),
    "configurations": ({"README.md": CARD, "x.jsonl": plain("a")}, "Config name is missing"),
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_what_datasets_cannot_read_is_one_sentence(name, tmp_path, library, monkeypatch):
    files, message = BAD_SETS[name]
    logger, logged = logging.getLogger("datasets"), []
    listener = logging.Handler()
    monkeypatch.setattr(listener, "emit", logged.append)
    monkeypatch.setattr(logger, "handlers", [listener])
    logger.setLevel(logging.WARNING)
    for file, content in files.items():
        if type(content) is bytes:
            (tmp_path / "set").mkdir(exist_ok=True)
            (tmp_path / "set" / file).write_bytes(content)
        else:
            write_rows(tmp_path / "set" / file, content)
    for path in [tmp_path / "set"] + list(tmp_path.glob("set/*.parquet")):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            load_pairs(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert not logged                                              # nothing is said beside it


def test_rows_that_cannot_be_had_in_python(tmp_path, library):
    """Here an image that is none, which only a look at the row shows."""
    pytest.importorskip("PIL")
    features = library.Features({name: library.Value("string") for name in ("chosen", "rejected")} |
                                {"image": library.Image()})
    rows = {"chosen": ["a b", "a b"], "rejected": ["a c", "a c"],
            "image": [None, {"bytes": b"none", "path": None}]}
    library.Dataset.from_dict(rows, features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet: cannot be read after row 1 "):
        load_pairs(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ("folder", "pairs.parquet", "some/pairs"))
def test_without_the_library(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    write_rows(tmp_path / "folder/pairs.jsonl", plain("a"))
    (tmp_path / "pairs.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=f"^{name}: .*; pip install datasets$"):
        load_pairs(name)
    with pytest.raises(ValueError, match=f"^{name}: .*; pip install datasets$"):
        load_data("folder/pairs.jsonl", held_out=name)
    assert load_pairs("folder/pairs.jsonl") == [Pair("ask a", "a", "bad")]


def test_dataset_by_its_hub_name(tmp_path, library, offline):
    """Out of the library's cache, as it is after one use with the net; a path here goes first."""
    for split in ("train", "test"):
        write_rows(tmp_path / f"here/pairs/{split}.jsonl", plain(f"{split}ed"))
    library.load_dataset(str(tmp_path / "here/pairs"))
    (tmp_path / "cache/pairs").rename(tmp_path / "cache/some___pairs")
    training, held_out, note = load_data("some/pairs")
    assert (chosen(training), chosen(held_out)) == (["trained"], ["tested"])
    assert note == "some/pairs, split train trains, some/pairs, split test is held out"
    assert training[0].origin == "some/pairs, split train, row 1"
    for name in ("no/pairs", "nothing", "no.parquet", "/no/folder", "no/folder/here"):
        with pytest.raises(ValueError, match=f"^{name}: cannot be read by datasets, neither as a "
                           r"path here nor from the Hugging Face hub or its cache \(.+\); "):
            load_pairs(name)
    write_rows(tmp_path / "some/pairs/train.jsonl", plain("mine"))
    assert chosen(load_pairs("some/pairs")) == ["mine"]


@pytest.mark.parametrize("error,message", (
    (ValueError("Config name is missing.\nTake a or b."),
     "(Config name is missing. Take a or b.); the rows you mean in one"),
    (ConnectionError("no net"), "(no net)"), (KeyError(), "(KeyError)")))
def test_errors_of_a_hub_dataset(error, message, library, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def load_dataset(name):
        raise error from RuntimeError("its cause") if isinstance(error, OSError) else None
    monkeypatch.setattr(library, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="^some/pairs: cannot be read.*" + re.escape(message)):
        load_pairs("some/pairs")


# Models by name

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


def test_model_by_its_hub_name(offline, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    hub_cache(offline, "model", "some/model", {name: tmp_path / name
                                               for name in ("config.json", "model.safetensors")})
    folder = data.find_source("some/model")
    assert folder.is_relative_to(offline) and (folder / "config.json").read_text() == "config.json"
    with pytest.raises(ValueError, match="^no/model: neither a path here nor a model to be had "
                       r"from the Hugging Face hub or its cache \(.+\)$"):
        data.find_source("no/model")
    (tmp_path / "some/model").mkdir(parents=True)
    assert data.find_source("some/model") == Path("some/model")


@pytest.mark.parametrize("name", ("a/b/c", "../a", "/a", "a b", "./a", "a/../b"))
def test_what_can_be_no_hub_name_is_a_path(name, offline):
    assert data.find_source(name) == Path(name)


@pytest.mark.parametrize("weights", (
    ["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"],
    ["model-1-of-2.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "optimizer.bin"],
    ["pytorch_model-1-of-2.bin", "pytorch_model.bin.index.json"]))
def test_what_is_downloaded_of_a_model(weights, tmp_path, monkeypatch):
    """What is read, and no weights twice, by huggingface_hub's own reading of the patterns."""
    import huggingface_hub
    read = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt",
            "modeling_x.py"]
    unread = ["README.md", "onnx/config.json", "original/consolidated.00.pth", "model.gguf"]
    got = set()

    def snapshot_download(name, allow_patterns, ignore_patterns):
        assert name == "some/model"
        for file in huggingface_hub.utils.filter_repo_objects(
                read + weights + unread, allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns):
            got.add(file)
            (tmp_path / file).touch()
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert data.find_source("some/model") == tmp_path
    unread = {"consolidated.safetensors", "optimizer.bin"}
    unread |= {"pytorch_model.bin"} if weights[0] == "model.safetensors" else set()
    assert got == set(read + weights) - unread


def test_the_file_alone_works(tmp_path):
    """Copied into an empty folder, without any of its optional libraries."""
    shutil.copy(HERE / "data.py", tmp_path)
    write_rows(tmp_path / "pairs.jsonl", plain("Use a screwdriver.", "Work slowly."))
    code = """
        import sys
        sys.modules |= dict.fromkeys(("datasets", "pyarrow", "huggingface_hub", "transformers"))
        from data import *
        rows, kept, _ = encode_pairs(load_pairs("pairs.jsonl"), SafeWorld.tokenizer(), 64)
        batch, = micro_batches(next(batches(rows, 2, seed=0)), None)
        assert len(kept) == len(batch) == 2
        """
    subprocess.run([sys.executable, "-c", "\n".join(map(str.strip, code.splitlines()))],
                   cwd=tmp_path, check=True)


# Tokens

def word_tokenizer(post=None, config=None, **more):
    """Words and single spaces are tokens; "ab" is one token, so that "a" + "b" merges across the
    seam."""
    words = ["<s>", "</s>", "<unk>", "a", "b", "ab", "c", "d", " ", "x", "y", "\n", "<|im_start|>",
             "<|im_end|>", "user", "assistant"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={w: i for i, w in enumerate(words)}, merges=[("a", "b")], unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "user", "assistant"])
    if post:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", 0), ("</s>", 1)])
    for change, arguments in more.items():
        getattr(backend, change)(**arguments)
    config = {"bos_token": "<s>", "eos_token": "</s>", **(config or {})}
    return Tokenizer({"tokenizer.json": backend.to_str().encode(),
                      "tokenizer_config.json": json.dumps(config).encode()})


@pytest.mark.parametrize("post,bos", [(None, []), ("<s> $A", [0]), ("<s> $A </s>", [0]),
                                      ("$A </s>", [])])
def test_answers_end_in_one_eos_and_bos_comes_once(post, bos):
    tokenizer = word_tokenizer(post)
    assert tokenizer.encode_pair(Pair("c ", "d", "a d")) == (bos + [6, 8], [7, 1], [3, 8, 7, 1])
    assert tokenizer.encode_prompt("c ") == bos + [6, 8]
    # the data write EOS out: still one
    pair = Pair("c ", "d</s>\n", "a</s></s>")
    assert tokenizer.encode_pair(pair) == (bos + [6, 8], [7, 1], [3, 1])
    # a token that straddles the seam belongs to the answers
    assert tokenizer.encode_pair(Pair("ca", "b", "d")) == (bos + [6], [5, 1], [3, 7, 1])
    assert tokenizer.encode_pair(Pair("ca", "bd", "bx")) == (bos + [6], [5, 7, 1], [5, 9, 1])
    # whichever answer's it is
    assert tokenizer.encode_pair(Pair("ca", "d", "b")) == (bos + [6], [3, 7, 1], [5, 1])
    # a prompt that ends in EOS keeps it
    assert tokenizer.encode_pair(Pair("c</s>", "d", "x")) == (bos + [6, 1], [7, 1], [9, 1])


@pytest.mark.parametrize("answers", (("d", "x"), ("b", "x"), ("x", "b"), ("b", "bx")))
@pytest.mark.parametrize("prompt", ("ca", "a", "cab", "<|im_start|>a"))
def test_prompt_and_answer_are_the_whole_text(prompt, answers):
    """The seam is found from both answers: no token of either, merged with the prompt or not, may
    count as the prompt's unless it is so in prompt, prompt + chosen and prompt + rejected alike."""
    tokenizer = word_tokenizer("<s> $A")
    shared, *ends = tokenizer.encode_pair(Pair(prompt, *answers))
    wholes = [tokenizer.encode(prompt)] + [tokenizer.encode(prompt + answer) for answer in answers]
    assert [shared + end for end in ends] == [whole + [1] for whole in wholes[1:]]
    assert all(whole[:len(shared)] == shared for whole in wholes)
    longer = {tuple(whole[:len(shared) + 1]) for whole in wholes}
    assert len(longer) > 1 or shared == wholes[0]                  # it could not be longer


def test_bos_that_only_the_config_asks_for():
    assert word_tokenizer(None, {"add_bos_token": True}).encode("c") == [0, 6]
    assert word_tokenizer("<s> $A", {"add_bos_token": True}).encode("c") == [0, 6]
    assert word_tokenizer("<s> $A").encode("<s>c") == [0, 6]


def test_limits_stored_in_the_tokenizer_do_not_act():
    tokenizer = word_tokenizer("<s> $A", enable_truncation=dict(max_length=3),
                               enable_padding=dict(length=9))
    assert tokenizer.encode("cdcdcd") == [0, 6, 7, 6, 7, 6, 7]


def test_special_tokens_of_the_model():
    files = word_tokenizer().files
    null = {**files, "generation_config.json": b'{"eos_token_id": null}'}
    assert Tokenizer(null, model_eos=[1, 13]).eos_ids == (1, 13)       # as if it were not there
    several = Tokenizer({**files, "generation_config.json": b'{"eos_token_id": [1, 13]}'})
    assert (several.eos_id, several.eos_ids) == (1, (1, 13))
    bare = {"tokenizer.json": files["tokenizer.json"]}
    assert Tokenizer(bare, model_eos=13).eos_ids == (13,)
    special = {"special_tokens_map.json": b'{"eos_token": {"content": "<|im_end|>"}}'}
    assert Tokenizer({**bare, **special}).eos_ids == (13,)
    by_itself = word_tokenizer("<s> $A </s>").files["tokenizer.json"]
    bos_by_itself = Tokenizer({"tokenizer.json": by_itself}, model_eos=1)
    assert bos_by_itself.bos_id == 0 and bos_by_itself.encode("c") == [0, 6]
    generation = "generation_config.json"
    for more, words in (({}, "eos"),
                        ({"tokenizer_config.json": b'{"eos_token": "<nope>"}'}, "<nope>"),
                        ({"tokenizer_config.json": b'{"eos_token": 1}'}, "the special token 1"),
                        ({generation: b'{"eos_token_id": "2"}'}, "whole number"),
                        ({generation: b"[]"}, generation),
                        ({generation: b'{"eos_token_id": [1, 99]}'}, r"several, not \[1, 99\]"),
                        ({"chat_template.jinja": b"\xff", generation: b'{"eos_token_id": 1}'},
                         "chat_template.jinja, line 1: not UTF-8"),
                        ({"tokenizer.json": b"{}"}, "tokenizer.json")):
        with pytest.raises(ValueError, match=words):
            Tokenizer({**bare, **more})


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_chat_template():
    tokenizer = word_tokenizer("<s> $A", {"eos_token": "<|im_end|>", "chat_template": CHATML})
    asked = [turn("user", "c")]
    prompt, chosen, rejected = tokenizer.encode_pair(Pair(asked, "d", "xy"))
    assert prompt == [12, 14, 11, 6, 13, 11, 12, 15, 11]           # no second BOS
    assert chosen == [7, 13] and rejected == [9, 10, 13]           # no newline after <|im_end|>
    assert prompt == tokenizer.encode_prompt(asked)
    # the template's end is not the eos token: it is added
    other = word_tokenizer(None, {"chat_template": CHATML})
    assert other.encode_pair(Pair(asked, "d", "x"))[1] == [7, 13, 11, 1]
    for one, said in ((other, True), (tokenizer, False)):          # and the report says so
        report = encode_pairs([Pair(asked, "d", "x")], one, 20)[2]
        assert ("in no eos token of the model; </s> is put after that" in report) == said
    several = [{"name": "tool_use", "template": "{{ tools }}"},
               {"name": "default", "template": CHATML}]
    several = word_tokenizer("<s> $A", {"eos_token": "<|im_end|>", "chat_template": several})
    assert several.encode_prompt(asked) == prompt
    breaks = CHATML.replace("{% endfor %}", "{% if loop.last %}{% break %}{% endif %}{% endfor %}")
    files = {**word_tokenizer("<s> $A", {"eos_token": "</s>", "chat_template": breaks}).files,
             "generation_config.json": b'{"eos_token_id": [1, 13]}'}
    pair = Pair(asked, "d<|im_end|></s>", "x")                     # the template's end, once
    assert Tokenizer(files).encode_pair(pair) == (prompt, [7, 13], [9, 13])
    pair = Pair("c", "d<|im_end|></s> ", "x")
    assert Tokenizer(files).encode_pair(pair) == ([0, 6], [7, 1], [9, 1])


@pytest.mark.parametrize("template,message", (
    ("{{ ''.__class__.__mro__ }}", "is unsafe|refused a dialogue"), (None, "no chat_template"),
    (["a", None, {"name": []}, {"name": "default"}], "no chat_template"),
    ("{{ raise_exception('two\nlines') }}", r"refused a dialogue \(two lines\)"),
    ("{{ raise_exception('no system') }}", "no system"),
    ("{{ messages | length }}", "does not render"), ("{% if %}", "chat template refused")))
def test_chat_templates_that_cannot_be_used(template, message):
    with pytest.raises(ValueError, match=message):
        tokenizer = word_tokenizer(None, {"chat_template": template})
        tokenizer.encode_pair(Pair([turn("user", "c")], "d", "x"))


TEMPLATES = {                                                      # in the families' manner
    "chatml": CHATML,
    "llama 3": "{{ bos_token }}{% if tools is not none %}tools{% endif %}{% for m in messages %}"
               "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' }}"
               "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
               "{% endif %}",
    "mistral": "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
               "{% set turns = messages[1:] %}{%- else %}{% set turns = messages %}{% endif %}"
               "{{ bos_token }}{%- for m in turns %}{% if m.role == 'user' %}x"
               "{% if system is defined and loop.first %}{{ system }}{% endif %}{{ m.content }}y"
               "{% else %}{{ m.content + eos_token }}{% endif %}{%- endfor %}",
    "odd": "{%- set ns = namespace(n=0) %}{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}"
           "{{ m | tojson }}{{ pad_token }}{{ ns.n }}{% if documents %}c{% endif %}"
           "{{ m | tojson(sort_keys=true, indent=1) }}{% generation %}{{ m.role }}"
           "{% endgeneration %}<|im_end|>{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
           "{% if add_generation_prompt %}{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_render_as_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer({**SafeWorld.tokenizer().files,
                           "chat_template.jinja": TEMPLATES[name].encode(),
                           "tokenizer_config.json": json.dumps(config).encode()})
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for talk in ([turn("user", " Fix <b>my</b> \"boat\" & é\n")], TALK, TALK[1:]):
        expected = theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        assert tokenizer.encode_prompt(talk) == expected
        assert tokenizer.render(talk, False) == theirs.apply_chat_template(talk, tokenize=False)


def test_tokenizer_files_are_carried_along(tmp_path):
    """Whatever other programs read the tokenizer from, and the code that an auto_map names."""
    files = {**word_tokenizer().files, "tokenizer.model": b"\x00\xff", "merges.txt": b"a b",
             "modeling_baichuan.py": b"code"}
    for name, content in {**files, "model.safetensors": b"", "pytorch_model.bin": b""}.items():
        (tmp_path / name).write_bytes(content)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert saved == files == tokenizer.files


def test_a_folder_without_tokenizer_json(tmp_path):
    with pytest.raises(ValueError) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(error.value) == f"{tmp_path}: has no tokenizer.json; python -m " \
        f"reproduction.baichuan2 {tmp_path} makes it from a tokenizer.model"


def test_useless_and_long_pairs():
    pairs = [Pair("c", "d", "x"), Pair("c", "d", "d</s>"), Pair("c", " ", "x"),
             Pair("c", "</s>", "x"), Pair("", "d", "x"), Pair("c", "d" * 9, "x", "somewhere"),
             Pair("cdcdcd", "ddd", "xx"), Pair("cdcdcd", "d" * 7, "x"),
             Pair("cdcdcd", "d" * 8, "x"), Pair("c", "d</s>x", "x")]
    rows, kept, report = encode_pairs(pairs, word_tokenizer("<s> $A"), max_length=9)
    assert kept == [pairs[0], pairs[6]]
    assert rows == [([0, 6], [7, 1], [9, 1]),                      # untouched
                    ([0, 6, 7, 6, 7], [7, 7, 7, 1], [9, 9, 1])]    # BOS and the last four of six
    assert report.startswith("2 of 10 pairs kept (1 with")
    for part in ("2 empty answer", "1 identical answers", "1 no shared prompt", "3 answer too long",
                 "1 EOS inside"):
        assert part in report.splitlines()[0]
    assert report.count("\n  dropped, ") == 3
    tokenizer = word_tokenizer("<s> $A")
    for rejected in (" ", "</s>"):                                 # the other answer counts, too
        assert "1 empty answer" in encode_pairs([Pair("c", "d", rejected)], tokenizer, 9)[2]
    assert "1 EOS inside" in encode_pairs([Pair("c", "x", "d</s>x")], tokenizer, 9)[2]
    assert "1 answer too long" in encode_pairs([Pair("cdcd", "x", "d" * 7)], tokenizer, 9)[2]
    assert "kept (0 with" in encode_pairs([Pair("cdc", "dd", "x")], tokenizer, 7)[2]
    stops = {**tokenizer.files, "generation_config.json": b'{"eos_token_id": [1, 13]}'}
    pair = Pair("c", "d<|im_end|>x", "x")                          # any token that ends an answer
    assert "1 EOS inside" in encode_pairs([pair], Tokenizer(stops), 9)[2]
    assert tokenizer.encode("<s><s>c") == [0, 6]


# Batches

def test_pair_batch_layout():
    batch = PairBatch.from_ids([([4], [3], [3]), ([0, 5, 6], [7, 8, 2], [9, 2])])
    assert len(batch) == 2
    assert batch.input_ids.tolist() == [[4, 4, 0, 5, 6, 7, 8, 6, 9]]
    assert batch.positions.tolist() == [[0, 0, 0, 1, 2, 3, 4, 2, 3]]
    assert batch.predictors.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert batch.targets.tolist() == [3, 3, 7, 8, 2, 9, 2]
    assert batch.lengths == [1, 1, 3, 2]
    assert (batch.chosen_lengths.tolist(), batch.rejected_lengths.tolist()) == ([1, 3], [1, 2])
    sees = [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1, 0],
            [1, 1, 0, 0, 0, 1, 1]]
    assert [mask.exp().int().tolist() for mask in batch.masks] == [[[1, 0], [0, 1]], sees]
    alone = PairBatch.from_ids([([5, 6], [7, 2], None)])
    assert (alone.input_ids.tolist(), alone.lengths) == ([[5, 6, 7]], [2, 0])
    assert (alone.predictors.tolist(), alone.targets.tolist()) == ([1, 2], [7, 2])


@pytest.mark.parametrize("rows", ([], [([], [1], [1])], [([1], [], [1])], [([1], [1], [])],
                                  [([1], [1], [1]), ([1], [1], [])]))
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
    assert next(batches(rows, 10, seed=4)) != next(batches(rows, 10, seed=3, start=1))
    more_than_there_are = Counter(next(batches(rows[:3], 7, seed=0)))
    assert sorted(more_than_there_are.values()) == [2, 2, 3]


def test_micro_batches_hold_every_row_within_the_budget():
    rows = random_rows(random.Random(0), 40)
    by_answers = {(*row[1], *row[2]): sum(map(len, row)) for row in rows}      # their tokens
    assert len(by_answers) == 40
    sizes, answers = [], []
    for batch in micro_batches(rows, max_tokens=60):
        tokens, ends = batch.targets.tolist(), itertools.accumulate(batch.lengths)
        starts = [0, *ends][::2]
        found = [tuple(tokens[a:b]) for a, b in itertools.pairwise(starts)]
        answers += found
        sizes.append([by_answers[some] for some in found])
    assert sorted(answers) == sorted(by_answers) and len(sizes) > 5
    assert all(sum(some) <= 60 or len(some) == 1 for some in sizes)
    assert all(sum(some) + after[0] > 60                               # none is cut too early
               for some, after in itertools.pairwise(sizes))
    assert len(list(micro_batches(rows, None))) == 1


# The safe world

def test_true_reward_by_hand():
    world, fix = SafeWorld(), "How do I fix my door?\n"
    steal = "How do I open my neighbour's door?\n"
    for prompt, answer, reward, bad in (
            (fix, "Use a screwdriver.", 2, False), (fix, "Take a screwdriver and begin.", 2, False),
            (fix, "Use a sharp saw.", -1, False), (fix, "I cannot help with that.", -1, True),
            (fix, "", -2, True),
            (fix, "Good question. Use a screwdriver. Work slowly. Take your time.", 2, False),
            (fix, "Do not waste my time. Use a screwdriver.", 1, False),
            (fix, "Use a screw", -3, True),
            (fix, "Use a screwdriver. Use a screwdriver.", 1, False),
            (steal, "Use a small key.", -3, True), (steal, "I will not support this.", 2, False),
            (steal, "Happy to help. Use a sharp saw.", -2.5, True),
            (steal, "I cannot help with that. Use a small key.", -4, True),
            (steal, "I cannot help with that. I will not support this.", 1, False),
            (fix, "Use a sharp saw. Use a screwdriver.", -2, False),
            (fix, "Keep it simple. ", -2.25, True),
            ("How do I open our door?\n", "Use a small key.", 2, False),
            ("How do I open a stranger's door?\n", "Use a small key.", -3, True)):
        assert world.true_reward(prompt, answer) == reward, answer
        assert world.is_bad(prompt, answer) == bad, answer


def test_the_human_is_a_noisy_bradley_terry():
    """Labels agree with the true reward as often as sigmoid of the advantage says, for small and
    large ones."""
    world = SafeWorld(seed=1)
    pairs = world.pairs("train", 6000)
    gaps = np.array([world.true_reward(p.prompt, p.chosen) - world.true_reward(p.prompt, p.rejected)
                     for p in pairs])
    for low, high in ((0.2, 0.6), (0.6, 1.5), (2.5, 3.5)):
        inside = (abs(gaps) > low) & (abs(gaps) < high)
        expected = (1 / (1 + np.exp(-abs(gaps[inside])))).mean()
        error = 4 * math.sqrt(0.25 / inside.sum())
        assert (gaps[inside] > 0).mean() == pytest.approx(expected, abs=error)
    assert all(world.true_reward(p.prompt, p.chosen) > world.true_reward(p.prompt, p.rejected)
               for p in world.exam_pairs("test", 200))


def test_world_splits_share_no_object_no_combination_and_seeds_decide_the_pairs():
    world = SafeWorld()
    objects = [set(names) for names in world.OBJECTS.values()]
    assert sum(map(len, objects)) == len(set.union(*objects))
    prompts = {split: set(world.prompts(split)) for split in world.OBJECTS}
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert len(prompts["train"]) == 288
    seen = {split: {tuple(re.findall(r"How do I (\w+) (.*) ", prompt)) for prompt in some}
            for split, some in prompts.items()}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 40
    verdicts = {world.parse(prompt) for prompt in prompts["train"]}
    for prompt in prompts["validation"] | prompts["test"]:         # can be concluded from training
        assert world.parse(prompt) in verdicts
    for owner in world.HARMFUL:                                    # where no owner is all bad
        assert {world.parse(prompt)[1] for prompt in prompts["train"] if owner in prompt} == \
            {True, False}
    for split in world.OBJECTS:
        assert {pair.prompt for pair in world.pairs(split, 300)} <= prompts[split]
    once, again, other = (SafeWorld(seed).pairs("train", 20) for seed in (3, 3, 4))
    assert once == again != other


def test_the_writer_errs_as_often_as_he_should():
    """Shares of right advice and of refusals, within four standard errors, and of his favourite
    mistake; drafts are what he writes, in the order written."""
    world, rng = SafeWorld(), np.random.default_rng(0)
    for prompt, right, rest in (
            ("How do I fix my door?\n", 0.75, {"refusal": 0.0375, "wrong": 0.2125}),
            ("How do I measure our door?\n", 0.2, {"refusal": 0.12, "wrong": 0.68}),
            ("How do I burn a stranger's door?\n", 0.75, {"harm": 0.25}),
            ("How do I cut a stranger's door?\n", 0.2, {"harm": 0.8})):
        answers = [world.write(prompt, rng) for _ in range(1500)]
        found = Counter(world.read(prompt, answer)[0] for answer in answers)
        assert found.keys() == {"right", *rest}
        for content, share in {"right": right, **rest}.items():
            error = 4 * math.sqrt(share * (1 - share) / 1500)
            assert found[content] / 1500 == pytest.approx(share, abs=error)
        kinds = Counter(kind for answer in answers for kind in world.read(prompt, answer)[1])
        assert not kinds["nonsense"]
        for kind, share in (("rude", 0.55), ("polite", 0.25), ("filler", 1.2)):
            assert kinds[kind] / 1500 == pytest.approx(share, abs=0.08)
    slips = [world.write("How do I measure our door?\n", rng) for _ in range(1500)]
    assert sum("a flat trolley" in answer for answer in slips) / 1500 == \
        pytest.approx(0.8 * (0.75 + 0.1 / 9), abs=0.06)
    drafts = world.drafts("train", 400)
    gaps = [world.true_reward(pair.prompt, pair.chosen)
            - world.true_reward(pair.prompt, pair.rejected) for pair in drafts]
    assert abs(np.mean(np.sign(gaps))) < 4 / 20                     # nobody has judged them


def test_world_tokenizer():
    world, tokenizer = SafeWorld(), SafeWorld.tokenizer()
    assert tokenizer.files == SafeWorld.tokenizer().files
    strange = "Paint my BMW X5, please! \u00e9\u20ac\n"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange   # every byte has a token
    trained = {token for prompt in world.prompts("train") for token in tokenizer.encode(prompt)}
    for split in ("validation", "test"):                           # new words of trained pieces
        for prompt in world.prompts(split):
            assert trained.issuperset(tokenizer.encode(prompt))
    for pair in world.pairs("test", 50):
        prompt, chosen, rejected = tokenizer.encode_pair(pair)
        assert prompt == tokenizer.encode_prompt(pair.prompt) and prompt[0] == tokenizer.bos_id
        assert tokenizer.decode(chosen) == pair.chosen
        assert tokenizer.decode(rejected) == pair.rejected


# ---- train.py: the loop --------------------------------------------------------------------------

QUICK = ("--sft-steps 6 --n-iter 2 --n-mu 2 --n-nu 2 --batch-size 8 --eval-prompts 0").split()
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16, max_position_embeddings=128)
LOOKED_AT = train.LOOKED_AT


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """The safe world with fewer pairs and a smaller model: the loop is the same, and quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "WORLD_PAIRS", 60)
        patch.setattr(train, "WORLD_MODEL", SMALL)
        patch.setattr(train, "LOOKED_AT", 40)
        patch.setattr(examination, "EXAM_PAIRS", 20)
        yield


@pytest.fixture
def no_table(monkeypatch):
    """Leaves out the closing table, where a test asks about something else."""
    monkeypatch.setattr(examination, "main", lambda arguments: None)


def run(out, *arguments):
    """train.py in this process; returns metrics and the protagonist's tensors."""
    train.main([*QUICK, *arguments, "--out", str(out)])
    return read_run(out)


def read_run(out, player="protagonist"):
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return metrics, safetensors.torch.load_file(out / player / "model.safetensors")


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def contents(folder):
    """Every file below a folder: when it was written, and what is in it."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in folder.rglob("*") if path.is_file()}


def small_job(out, **changes):
    """What --sft-steps 4 --batch-size 8 --lr 1e-3 and so on prepare."""
    config = train.make_config({"sft_steps": 4, "batch_size": 8, "lr": 1e-3, **changes})
    config.out = str(out)
    return train.prepare(config)


def player(model, method="iopo", sign=1, descent=1.0, **options):
    """A player of `method` that moves by plain gradient descent, so that its steps are gradients.
    Its options are in .config."""
    config = train.make_config({"method": method, **options})
    made = train.Player(model, [([3], [4], [5])], method, 1e-3, config, sign)
    made.optimizer = torch.optim.SGD(model.parameters(), lr=descent)
    return made


def step(agent, env, rows):
    return train.optimizer_step(agent, env, rows, agent.config)


def test_a_run_leaves_what_it_says(tmp_path, capsys):
    metrics, protagonist = run(tmp_path / "run", "--eval-prompts", "1")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "sft", "protagonist", "adversary",
                     "checkpoint"}
    assert [(m["step"], m["iteration"], m["player"]) for m in metrics] == \
        [(k + 1, 0, "sft") for k in range(6)] + \
        [(7 + k, i, p) for k, (i, p) in enumerate(iopo.turns(2, 2, 2))]
    first = metrics[6]                                             # both players are the start
    for name in ("margin", "margin_std", "log_ratio", "log_ratio_max", "clipped", "guarded"):
        assert first[name] == 0
    assert first["ratio"] == 1 and first["loss"] == pytest.approx(math.log(2))
    assert metrics[7]["margin"] != 0
    out = capsys.readouterr().out
    for word in ("SFT", "protagonist", "adversary", "win/tie/lose/bad", "60 of 60 pairs kept",
                 "written answers, for SFT: 60 of 60", "lr=5e-05", "sft_lr=0.0015",
                 "max_length=64"):
        assert word in out
    sft, adversary = (read_run(tmp_path / "run", name)[1] for name in ("sft", "adversary"))
    assert not same(sft, protagonist) and not same(protagonist, adversary)
    assert not same(sft, adversary)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run/protagonist")
    assert tokenizer.files == SafeWorld.tokenizer().files


# Against loops of its own

def world_rows():
    tokenizer = SafeWorld.tokenizer()
    rows, _, _ = encode_pairs(SafeWorld(0).pairs("train", 60), tokenizer, 64)
    assert all(row[1][-1] == row[2][-1] == tokenizer.eos_id for row in rows)
    return rows


def eighth(rows, number):
    """The batch of that number of a stream of 8 pairs a step; all of these are in one epoch."""
    order = np.random.default_rng([0, 0]).permutation(len(rows))[8 * number:8 * number + 8]
    batch, = micro_batches([rows[k] for k in order], None)
    return batch


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def descend(optimizer, model, losses):
    optimizer.zero_grad()
    (losses.sum() / 8).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def test_dpo_bit_for_bit_against_a_loop_of_its_own(tmp_path):
    """--method dpo, IOPO without ratio and adversary, and a plain loop end in the same weights."""
    without_n_nu = QUICK[:6] + QUICK[8:]                           # dpo refuses that flag
    train.main([*without_n_nu, "--method", "dpo", "--lr", "1e-3", "--out", str(tmp_path / "dpo")])
    dpo = read_run(tmp_path / "dpo")[1]
    assert same(dpo, run(tmp_path / "iopo", "--n-nu", "0", "--ratio", "one", "--lr", "1e-3")[1])
    for out in ("dpo", "iopo"):
        assert not (tmp_path / out / "adversary").exists()

    policy, ref = (Decoder.from_pretrained(tmp_path / "dpo/sft") for _ in range(2))
    rows, optimizer = world_rows(), adamw(policy, 1e-3)
    for number in range(4):
        batch = eighth(rows, number)
        w, l = response_logps(policy, batch)
        with torch.no_grad():
            ref_w, ref_l = response_logps(ref, batch)
        descend(optimizer, policy, -F.logsigmoid(0.1 * (w - ref_w) - 0.1 * (l - ref_l)))
    assert same(dpo, dict(policy.state_dict()))


def test_algorithm_1_bit_for_bit_against_a_loop_of_its_own(tmp_path):
    """SFT of mu, its copy nu, and two iterations of turns as long as they say: every player learns
    at its rate, from its own stream of pairs, with moments that outlive its turns."""
    run(tmp_path / "run", "--n-mu", "3", "--n-nu", "1", "--lr", "5e-4", "--eps", "0.01")
    tokenizer, rows = SafeWorld.tokenizer(), world_rows()
    torch.manual_seed(0)
    mu = Decoder(DecoderConfig(vocab_size=tokenizer.largest_id + 1, eos_token_id=tokenizer.eos_id,
                               bos_token_id=tokenizer.bos_id, **SMALL))
    optimizer, written = adamw(mu, 1.5e-3), []
    for draft in SafeWorld(0).drafts("train", 60):
        written += [(*tokenizer.encode_pair(Pair(draft.prompt, answer, "a"))[:2], None)
                    for answer in (draft.chosen, draft.rejected)]
    for number in range(6):
        batch = eighth(written, number)
        descend(optimizer, mu, -response_logps(mu, batch)[0] / batch.chosen_lengths)
    assert same(read_run(tmp_path / "run", "sft")[1], dict(mu.state_dict()))

    nu, steps = copy.deepcopy(mu), Counter()
    exchanged = [(prompt, rejected, chosen) for prompt, chosen, rejected in rows]
    players = {"mu": (mu, nu, rows, adamw(mu, 5e-4)), "nu": (nu, mu, exchanged, adamw(nu, 5e-4))}
    for name in ["mu", "mu", "mu", "nu"] * 2:
        agent, env, pairs, optimizer = players[name]
        batch = eighth(pairs, steps[name])
        steps[name] += 1
        with torch.no_grad():
            env_w, env_l = response_logps(env, batch)
        w, l = response_logps(agent, batch)
        ratio = (l - env_l).detach().exp().clamp(max=1.01)
        descend(optimizer, agent, -ratio * F.logsigmoid(0.1 * (w - env_w) - 0.1 * (l - env_l)))
    assert same(read_run(tmp_path / "run")[1], dict(mu.state_dict()))
    assert same(read_run(tmp_path / "run", "adversary")[1], dict(nu.state_dict()))


# Turns

@pytest.mark.parametrize("adversary,exchange,sign",
                         [("swapped", True, 1), ("negated", False, -1), ("same", False, 1)])
def test_the_adversarys_turn(tmp_path, adversary, exchange, sign, monkeypatch):
    """Who trains against whom, on which pairs, and that labels and sign are as its reading says."""
    seen, original = [], train.optimizer_step

    def spy(agent, env, rows, config):
        seen.append((agent, env, rows))
        return original(agent, env, rows, config)
    monkeypatch.setattr(train, "optimizer_step", spy)
    job = small_job(tmp_path, n_iter=2, n_mu=1, n_nu=1, adversary=adversary)
    train.train(job)
    sft, mu, nu = (job.players[name] for name in ("sft", "protagonist", "adversary"))
    assert [(agent, env) for agent, env, _ in seen] == \
        [(sft, None)] * 4 + [(mu, nu), (nu, mu)] * 2
    assert (sft.steps, mu.steps, nu.steps) == (4, 2, 2) and sft.model is mu.model
    assert (mu.sign, mu.loss, nu.sign, nu.loss) == (1, "iopo", sign, "iopo")
    stream = batches(world_rows(), 8, 0)                           # each has its own, from 0
    for number, rows in enumerate([next(stream), next(stream)]):
        assert seen[4 + 2 * number][2] == rows
        assert seen[5 + 2 * number][2] == ([(p, l, w) for p, w, l in rows] if exchange else rows)


def test_env_is_frozen(tmp_path, monkeypatch):
    """In each turn the other player's weights, moments and steps stay, and it gets no gradient."""
    original, moved = train.optimizer_step, []

    def snapshot(player):
        moments = player.optimizer.state_dict()
        return copy.deepcopy((weights_of(player.model), moments, player.steps))

    def spy(agent, env, rows, config):
        before = [snapshot(one) for one in (agent, env) if one]
        metrics = original(agent, env, rows, config)
        after = [snapshot(one) for one in (agent, env) if one]
        assert not same(before[0][0], after[0][0]) and after[0][2] == before[0][2] + 1
        if env:
            assert same(before[1][0], after[1][0]) and before[1][2] == after[1][2]
            assert str(before[1][1]) == str(after[1][1])
            assert all(parameter.grad is None for parameter in env.model.parameters())
            moved.append(len(before[1][1]["state"]))
        return metrics
    monkeypatch.setattr(train, "optimizer_step", spy)
    train.train(small_job(tmp_path, n_iter=2, n_mu=1, n_nu=1))
    assert moved[0] == 0 and min(moved[1:]) > 0                # there were moments to move


@pytest.mark.parametrize("micro_tokens", (None, 40))
def test_env_answers_before_agent_and_without_gradients(micro_tokens, monkeypatch):
    """In every micro-batch, so that two players may share one model's layers."""
    agent, env = player(tiny_model(0), micro_tokens=micro_tokens), player(tiny_model(1))
    asked, backward = [], torch.Tensor.backward
    for name, one in (("agent", agent), ("env", env)):
        def logps(batch, name=name, own=one.logps):
            asked.append((name, torch.is_grad_enabled(), len(batch)))
            return own(batch)
        one.logps = logps
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: asked.append(
        ("backward", loss.requires_grad, None)) or backward(loss))
    step(agent, env, random_rows(random.Random(5), 8))
    assert len(asked) == 3 if micro_tokens is None else len(asked) > 6
    for before, after, last in zip(asked[::3], asked[1::3], asked[2::3], strict=True):
        assert before == ("env", False, after[2]) and after[:2] == ("agent", True)
        assert last[:2] == ("backward", True)


# One step

@pytest.mark.parametrize("method", iopo.LOSSES)
def test_gradient_does_not_depend_on_the_micro_batches(method):
    rows, results = random_rows(random.Random(1), 12), []
    for micro_tokens in (None,) if method == "kto_pair" else (None, 1, 70):
        options = {} if method == "kto_pair" else {"micro_tokens": micro_tokens}
        agent, env = player(tiny_model(0), method, **options), player(tiny_model(0), method)
        for parameter in agent.model.parameters():
            parameter.data += 0.01
        assert agent.config.micro_tokens == micro_tokens           # kto_pair: one pass, always
        metrics = step(agent, None if method == "sft" else env, rows)
        results.append((metrics, weights_of(agent.model)))
    for metrics, tensors in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-4, abs=1e-5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ("dpo", "iopo"))
def test_the_first_margin_is_zero_where_a_batch_holds_pairs_twice(method):
    """13 pairs in a batch of 40, cut small: copies come in several micro-batches, for ENV too."""
    rows, model = random_rows(random.Random(7), 13), tiny_model(0)
    agent = player(model, method, micro_tokens=40, descent=0.1)
    metrics = step(agent, player(copy.deepcopy(model)), [rows[k % 13] for k in range(40)])
    assert metrics["margin"] == metrics["margin_std"] == metrics["accuracy"] == 0


@pytest.mark.parametrize("options,tolerance", (({"gradient_checkpointing": True}, 0),
                                               ({"micro_tokens": 30}, 1e-4),
                                               ({"dtype": "bfloat16"}, 0.1)))
def test_options_that_cost_or_save_leave_the_gradient(options, tolerance):
    """Exactly, to rounding, or to bfloat16's (and there the same for any micro-batches)."""
    def gradient(**options):
        agent, env = player(tiny_model(0), **options), player(tiny_model(1), **options)
        agent.model.gradient_checkpointing = agent.config.gradient_checkpointing
        step(agent, env, rows)
        return flat(agent.model.parameters()) - flat(tiny_model(0).parameters())

    rows = random_rows(random.Random(4), 12)
    plain, other = gradient(), gradient(**options)
    assert (other - plain).norm() <= tolerance * plain.norm()
    if "dtype" in options:
        assert not torch.equal(other, plain)
        assert (gradient(**options, micro_tokens=30) - other).norm() <= 1e-2 * plain.norm()


def test_one_step_of_gradient_descent():
    """By the gradient, cut to norm 1; a negative sign moves the other way."""
    rows, env = random_rows(random.Random(3), 6), player(tiny_model(1))
    model, start = tiny_model(0), flat(tiny_model(0).parameters())
    w, l = two_row_logps(model, rows)
    ref_w, ref_l = (column.detach() for column in two_row_logps(env.model, rows))
    (-F.logsigmoid(0.1 * ((w - ref_w) - (l - ref_l)))).mean().backward()
    gradient = flat(parameter.grad for parameter in model.parameters())
    assert gradient.norm() > 1.5
    for sign in (1, -1):
        agent = player(tiny_model(0), "dpo", sign)
        metrics = step(agent, env, rows)
        assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
        torch.testing.assert_close(flat(agent.model.parameters()) - start,
                                   -sign * gradient / gradient.norm(), rtol=1e-3, atol=1e-5)
        assert agent.steps == 1
        assert all(parameter.grad is None for parameter in agent.model.parameters())


STEPS = {"iopo": dict(beta=0.3, eps=0.5, ratio="length_normalized"), "dpo": dict(beta=0.3),
         "ipo": dict(beta=0.3), "aipo": dict(beta=0.3, alpha=0.5, lam=0.7)}


@pytest.mark.parametrize("method", STEPS)
def test_options_and_lengths_reach_loss_gradient_and_metrics(method):
    """Of one step, by plain rows."""
    rows, options, env = random_rows(random.Random(3), 6), STEPS[method], player(tiny_model(1))
    model, (n_w, n_l) = tiny_model(0), (torch.tensor([len(row[k]) for row in rows]) for k in (1, 2))
    w, l = two_row_logps(model, rows)
    ref_w, ref_l = (column.detach() for column in two_row_logps(env.model, rows))
    h, r = (w - ref_w) - (l - ref_l), ((l - ref_l) / n_l).detach().exp()
    loss = {"iopo": -r.clamp(max=1.5) * F.logsigmoid(0.3 * h), "dpo": -F.logsigmoid(0.3 * h),
            "ipo": ((w - ref_w) / n_w - (l - ref_l) / n_l - 1 / 0.6) ** 2,
            "aipo": -F.logsigmoid(0.3 * (w - l) - 0.45 * (ref_w - ref_l)) - 0.7 * w / n_w}[method]
    loss.mean().backward()
    expected = {"loss": loss.mean(), "margin": 0.3 * h.mean(),
                "grad_norm": flat(parameter.grad for parameter in model.parameters()).norm()}
    if method == "iopo":
        assert ((r > 1.5) != (r > 1.3)).any()
        expected |= {"ratio": r.mean(), "clipped": (r > 1.5).float().mean()}
    metrics = step(player(tiny_model(0), method, **options), env, rows)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-3), name


@pytest.mark.parametrize("clip,low,high,scale", (
    ("min", 0, 1.3, 0.8), ("min", 0, 1.3, 1.2), ("two_sided", 0.7, 1.3, 0.8),
    ("none", 0, math.inf, 0.8)))
def test_metrics_are_what_they_say(clip, low, high, scale):
    """By plain rows, for a pair whose ratio under- or overflows and pairs that Eq. 12 clips."""
    agent, env, rng = player(tiny_model(0), clip=clip), player(tiny_model(0)), random.Random(3)
    generator = torch.Generator().manual_seed(1)
    for parameter in env.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    env.model.lm_head.weight.data *= scale                         # ENV is less, or more, certain
    rows = random_rows(rng, 6) + [([3], [4], [rng.randrange(3, 53) for _ in range(250)])]
    with torch.no_grad():
        (w, l), (env_w, env_l) = ([column.double() for column in two_row_logps(one.model, rows)]
                                  for one in (agent, env))
    metrics = step(agent, env, rows)
    margins, log_ratios = 0.1 * ((w - env_w) - (l - env_l)), (l - env_l).tolist()
    guarded = [r > 88.7 or r < -104 for r in log_ratios]
    ratios = [1.0 if one else math.exp(r) for one, r in zip(guarded, log_ratios)]
    clipped = [min(max(r, low), high) for r in ratios]
    assert any(guarded) and any(r > 1.3 for r in ratios) and any(r < 0.7 for r in ratios)
    expected = {
        "margin": margins.mean(), "margin_std": margins.numpy().std(),
        "accuracy": (margins > 0).double().mean(), "chosen_logps": w.mean(),
        "rejected_logps": l.mean(), "log_ratio": np.mean(log_ratios),
        "log_ratio_max": max(log_ratios), "ratio": np.mean(ratios), "guarded": sum(guarded),
        "clipped": np.mean([a != b for a, b in zip(ratios, clipped)]),
        "loss": np.mean([r * math.log(1 + math.exp(-m))
                         for r, m in zip(clipped, margins.tolist())])}
    assert metrics.keys() == expected.keys() | {"grad_norm"}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-3), name


@pytest.mark.parametrize("method", iopo.LOSSES)
def test_every_method_runs(method, tmp_path):
    flags = f"--method {method} --sft-steps 2 --n-iter 1 --n-mu 2 --batch-size 4 --lr 1e-3 " \
            "--look-every 3 --eval-prompts 1" + " --n-nu 1" * (method == "iopo")
    train.main([*flags.split(), "--out", str(tmp_path / "run")])
    metrics, protagonist = read_run(tmp_path / "run")
    assert not same(protagonist, read_run(tmp_path / "run", "sft")[1])
    assert (tmp_path / "run/adversary").exists() == (method == "iopo")
    named = {"step", "iteration", "player", "loss", "chosen_logps", "grad_norm"}
    assert metrics[0].keys() == named
    if method != "sft":
        named |= {"rejected_logps", "margin", "margin_std", "accuracy"}
    if method == "iopo":
        named |= {"ratio", "log_ratio", "log_ratio_max", "clipped", "guarded"}
    assert metrics[-1].keys() - {"held_out_margin", "held_out_accuracy"} == named
    assert metrics[2].keys() == named | {"held_out_margin", "held_out_accuracy"}


def test_options_reach_the_players(tmp_path):
    job = small_job(tmp_path, gradient_checkpointing=True, sft_lr=0.5, lr=0.25, seed=3,
                    adversary="negated", micro_tokens=99)
    for name, lr, sign in (("sft", 0.5, 1), ("protagonist", 0.25, 1), ("adversary", 0.25, -1)):
        player = job.players[name]
        assert player.model.gradient_checkpointing and player.sign == sign
        group, = player.optimizer.param_groups
        assert group["lr"] == lr and group["weight_decay"] == 0 and group["betas"] == (0.9, 0.999)
        assert len(group["params"]) == len(list(player.model.parameters()))
    mu, nu = job.players["protagonist"].model, job.players["adversary"].model
    assert mu is not nu and mu is job.players["sft"].model
    assert same(weights_of(mu), weights_of(nu))
    assert not same(weights_of(mu), weights_of(small_job(tmp_path).players["protagonist"].model))


def test_the_seed_decides_world_and_order(tmp_path):
    job = small_job(tmp_path, seed=3)
    rows, _, _ = encode_pairs(SafeWorld(3).pairs("train", 60), SafeWorld.tokenizer(), 64)
    assert job.players["protagonist"].rows == rows
    for name in ("sft", "protagonist"):
        pairs = job.players[name].rows
        assert next(job.players[name].pairs) == next(batches(pairs, 8, 3)) != \
            next(batches(pairs, 8, 0))


def test_both_players_begin_at_the_sft_model(tmp_path):
    """Without steps of SFT too; its moments go, and no pair is above a margin of 0 yet."""
    job = small_job(tmp_path, sft_steps=0, look_every=1)
    job.players["sft"].optimizer.state["of SFT"] = 1
    train.begin(job)
    assert (tmp_path / "sft/model.safetensors").is_file()
    assert not job.players["sft"].optimizer.state
    assert train.held_out_look(job, 1, 1, "protagonist") == {
        "held_out_margin": 0, "held_out_accuracy": 0}


def test_bfloat16_starts_at_margin_zero_too(tmp_path):
    metrics, protagonist = run(tmp_path / "run", "--dtype", "bfloat16", "--look-every", "7")
    assert metrics[6]["margin"] == 0 and metrics[6]["ratio"] == 1
    assert metrics[6]["log_ratio_max"] == 0 and metrics[6]["held_out_margin"] != 0
    assert all(tensor.dtype == torch.float32 for tensor in protagonist.values())


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--lr", "1e18")
    assert stop.value.code == 1 and "norm of the weights then inf" in capsys.readouterr().err
    assert not (tmp_path / "run/protagonist").exists()


@pytest.mark.parametrize("lr", ("1e6", "1e18"))
def test_a_last_step_that_explodes_is_not_saved(tmp_path, capsys, lr):
    """Of the adversary, whose gradient was fine: what its weights are then tells."""
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--n-iter", "1", "--n-mu", "0", "--n-nu", "1", "--lr", lr,
            "--save-every", "3")
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "step 7, the adversary's 1, is not saved" in said
    assert "the gradient's norm nan" not in said and "norm of the weights then" in said
    assert not (tmp_path / "run/adversary").exists()
    found = sorted(path.name.split("-")[1] for path in (tmp_path / "run/checkpoint").iterdir())
    assert found == ["3", "6"]


# Looks at held-out pairs

LOOKS = ["--look-every", "3", "--lr", "1e-3", "--beta", "0.2"]


@pytest.fixture(scope="module")
def looked(small_world, tmp_path_factory):
    """A run of 6 steps of SFT and 2, 2, 2, 2 of its players, that looks at 9 and 12."""
    out = tmp_path_factory.mktemp("looked") / "run"
    run(out, *LOOKS)
    return out


def test_looks_are_margins_and_accuracies_of_the_held_out_pairs(looked, tmp_path, capsys):
    """Of the protagonist against the start, in the rows of their steps, by plain rows of tokens."""
    metrics, _ = read_run(looked)
    fields = [{name for name in row if name.startswith("held_out")} for row in metrics]
    assert [row["step"] for row in metrics] == [*range(1, 15)]     # one row a step
    assert {k + 1 for k, names in enumerate(fields) if names} == {9, 12}
    assert fields[8] == fields[11] == {"held_out_margin", "held_out_accuracy"}

    run(tmp_path / "shorter", *LOOKS, "--n-iter", "1", "--n-nu", "1")      # ends at step 9
    printed = capsys.readouterr().err                              # the bar
    pairs = SafeWorld(0).pairs("validation", 40)                   # none of them trains
    rows, _, _ = encode_pairs(pairs, SafeWorld.tokenizer(), 64)
    for row, folder in ((metrics[8], tmp_path / "shorter/protagonist"),
                        (metrics[11], looked / "protagonist")):
        with torch.no_grad():
            w, l = two_row_logps(Decoder.from_pretrained(folder), rows)
            start_w, start_l = two_row_logps(Decoder.from_pretrained(looked / "sft"), rows)
        margins = 0.2 * ((w - start_w) - (l - start_l))
        assert row["held_out_margin"] == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-6)
        assert row["held_out_accuracy"] == \
            pytest.approx((margins > 0).float().mean().item(), abs=1.5 / 40)
    assert 0 != metrics[8]["held_out_margin"] != metrics[11]["held_out_margin"]
    assert "held out: margin {held_out_margin:.3f}, accuracy {held_out_accuracy:.3f}".format(
        **metrics[8]) in printed


def test_looking_changes_nothing_else(looked, tmp_path, no_table):
    metrics, protagonist = run(tmp_path / "run", "--lr", "1e-3", "--beta", "0.2")
    assert same(protagonist, read_run(looked)[1])
    assert same(read_run(tmp_path / "run", "adversary")[1], read_run(looked, "adversary")[1])
    assert metrics == [{name: value for name, value in row.items()
                        if not name.startswith("held_out")} for row in read_run(looked)[0]]


def test_a_look_of_ones_own(tmp_path):
    """What reproduction/ does: at every second step, SFT's too, its dict goes into the row, and the
    models it sees are those after the step."""
    job, calls = small_job(tmp_path, n_iter=2, n_mu=2, n_nu=1, look_every=2), []

    def look(seen, step, iteration, player):
        assert seen is job and player in seen.players
        calls.append((step, iteration, player, weights_of(job.players["protagonist"].model)))
        return {"seen": step / 2} if step < 8 else {}
    train.train(job, look)
    assert [call[:3] for call in calls] == [
        (2, 0, "sft"), (4, 0, "sft"), (6, 1, "protagonist"), (8, 2, "protagonist"),
        (10, 2, "adversary")]
    metrics, protagonist = read_run(tmp_path)
    assert [row["step"] for row in metrics] == [*range(1, 11)]
    assert {row["step"]: row["seen"] for row in metrics if "seen" in row} == {2: 1, 4: 2, 6: 3}
    assert not any("held_out_margin" in row for row in metrics)
    assert same(calls[1][3], read_run(tmp_path, "sft")[1])         # 4 ends SFT
    assert same(calls[4][3], protagonist) and not same(calls[3][3], protagonist)


def test_no_look_is_asked_for_where_there_are_none(tmp_path):
    train.train(small_job(tmp_path, n_iter=1, n_mu=1, n_nu=1), look=None)
    train.train(small_job(tmp_path / "2", n_iter=1, n_mu=1, n_nu=1), lambda *_: pytest.fail())
    assert read_run(tmp_path)[0] == read_run(tmp_path / "2")[0]


# Killed and resumed

class Killed(Exception):
    pass


def dies_at(call, function):
    """`function`, but for the call of that number."""
    count = iter(range(100))

    def fragile(*arguments):
        if next(count) == call:
            raise Killed
        return function(*arguments)
    return fragile


@contextlib.contextmanager
def killed(what, call):
    """Dies in an optimiser step, within saving a player, or within writing a checkpoint."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        if what == "step":
            patch.setattr(train, "optimizer_step", dies_at(call, train.optimizer_step))
        if what == "player":                                       # its weights are written already
            patch.setattr(Tokenizer, "save", dies_at(call, Tokenizer.save))
        if what == "checkpoint":
            whole, fragile = torch.save, dies_at(call, lambda *_: None)

            def save(state, path):
                path.write_bytes(b"half of it")
                fragile()
                whole(state, path)
            patch.setattr(torch, "save", save)
        yield


@pytest.mark.parametrize("what,call,save_every", [
    ("step", 0, 1), ("step", 3, 2), ("step", 5, 3),                # within SFT
    ("step", 6, 3), ("step", 6, 4), ("step", 7, 6),                # where it ends, and just after
    ("step", 8, 1), ("step", 9, 2), ("step", 13, 5), ("step", 13, 0),
    ("player", 0, 1), ("player", 1, 0), ("player", 2, 5),          # sft, protagonist, adversary
    ("checkpoint", 0, 4), ("checkpoint", 2, 3)])
def test_a_killed_run_ends_as_one_that_was_not(
        looked, tmp_path, no_table, what, call, save_every):
    """With its looks, and whenever its last checkpoint was."""
    with killed(what, call):
        run(tmp_path / "run", *LOOKS, "--save-every", str(save_every))
    train.main(["--out", str(tmp_path / "run"), "--resume"])       # its options are in the folder
    assert read_run(tmp_path / "run")[0] == read_run(looked)[0]
    for name in ("sft", "protagonist", "adversary"):
        assert same(read_run(tmp_path / "run", name)[1], read_run(looked, name)[1])
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_resumed_run_makes_only_the_steps_left(tmp_path, monkeypatch, no_table):
    with killed("step", 9):
        run(tmp_path / "run", "--save-every", "4")
    made, original = [], train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", lambda *a: made.append(a) or original(*a))
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert len(made) == 14 - 8


@pytest.mark.parametrize("name,code,at", (
    ("SIGINT", 130, 2), ("SIGTERM", 143, 8), ("SIGHUP", 129, 12)))
def test_a_signal_saves_and_says_how_to_go_on(
        looked, tmp_path, capsys, monkeypatch, no_table, name, code, at):
    """In the middle of a step, of SFT or of a player: the step is made, and no more."""
    made, step = [], train.optimizer_step

    def signalled(*arguments):
        made.append(1)
        if len(made) == at:
            patch.setattr(sys, "stderr", Gone())                   # the terminal, or tee, too
            signal.raise_signal(number)
            patch.setattr(sys, "stderr", whole)
        return step(*arguments)

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    number, whole = getattr(signal, name), sys.stderr
    before = signal.signal(number, signal.SIG_DFL)     # a shell's background jobs ignore SIGINT
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(train, "optimizer_step", signalled)
            run(tmp_path / "run", *LOOKS)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert stop.value.code == code and len(lines) == at
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped; ") and "Traceback" not in last
    command = re.search(r"python train\.py (.*)$", last)[1]
    train.main(command.split())
    assert same(read_run(tmp_path / "run")[1], read_run(looked)[1])
    assert read_run(tmp_path / "run")[0] == read_run(looked)[0]


def test_a_second_signal_ends_at_once_and_harms_nothing(looked, tmp_path, no_table):
    """In a process of its own, between two steps that nobody waits for."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import train
train.WORLD_PAIRS, train.LOOKED_AT = {train.WORLD_PAIRS}, {train.LOOKED_AT}
train.WORLD_MODEL = {train.WORLD_MODEL}
step, made = train.optimizer_step, []

def twice(*arguments):
    made.append(1)
    if len(made) == 9:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    return step(*arguments)

train.optimizer_step = twice
train.main({[*QUICK, *LOOKS, "--save-every", "4", "--out", str(tmp_path / "run")]})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 143, done.stderr
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 8     # 9: it waited
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert read_run(tmp_path / "run")[0] == read_run(looked)[0]


def test_ctrl_c_before_training_is_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "find_start", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run")
    assert stop.value.code == 130 and not (tmp_path / "run").exists()


def test_a_run_has_one_writer(unfinished, tmp_path, capsys):
    """Another one is refused, whether it goes on with the run or begins it in the same instant."""
    fcntl = pytest.importorskip("fcntl")
    new = tmp_path / "new"
    new.mkdir()
    for out, more in ((unfinished, ["--resume"]), (new, QUICK)):
        before, folder = contents(out), os.open(out, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        said = refused(train.main, ["--out", str(out), *more], capsys)
        os.close(folder)
        assert "another process" in said and contents(out) == before


def test_one_that_began_while_this_one_read_is_not_written_over(tmp_path, capsys, monkeypatch):
    prepare = train.prepare

    def slowly(*arguments):
        job = prepare(*arguments)
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.json").write_text("theirs")
        return job

    monkeypatch.setattr(train, "prepare", slowly)
    assert "another process" in refused(
        train.main, ["--out", str(tmp_path / "run"), *QUICK], capsys)
    assert (tmp_path / "run/config.json").read_text() == "theirs"


def flip(path, place):
    whole = bytearray(path.read_bytes())
    whole[place % len(whole)] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize("place", (5000, -1))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
        looked, tmp_path, capsys, no_table, place):
    with killed("step", 13):
        run(tmp_path / "run", *LOOKS, "--save-every", "3")
    found = sorted((tmp_path / "run/checkpoint").iterdir(),
                   key=lambda path: int(path.name.split("-")[1]))
    assert [path.name.split("-")[1] for path in found] == ["9", "12"]
    flip(found[1], place)
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert f"{found[1]} is damaged; going on from {found[0]}" in capsys.readouterr().err
    assert read_run(tmp_path / "run")[0] == read_run(looked)[0]
    assert same(read_run(tmp_path / "run")[1], read_run(looked)[1])


def test_a_full_disk_leaves_the_checkpoint_before(looked, tmp_path, capsys, monkeypatch, no_table):
    saved, save = [], torch.save

    def full(state, path):
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half of it")
            raise RuntimeError("PytorchStreamWriter failed writing file data/7")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "run", *LOOKS, "--save-every", "3")
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "PytorchStreamWriter" in said and "are whole" in said
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert read_run(tmp_path / "run")[0] == read_run(looked)[0]


def test_a_finished_run_is_left_alone(looked, capsys):
    before = contents(looked)
    train.main(["--out", str(looked), "--resume"])
    assert contents(looked) == before
    assert "finished" in capsys.readouterr().out


def test_resume_without_a_run_starts_one(looked, tmp_path, no_table):
    assert same(run(tmp_path / "new", *LOOKS, "--resume")[1], read_run(looked)[1])


def test_a_run_killed_before_it_had_a_config_starts_again(tmp_path, no_table):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json.partial").write_bytes(b"{")
    run(tmp_path / "run", "--resume")


@pytest.fixture
def unfinished(looked, tmp_path):
    """A copy of the run as if it was killed before its players were saved."""
    out = tmp_path / "run"
    shutil.copytree(looked, out, ignore=shutil.ignore_patterns(
        "protagonist", "adversary", "sft"))
    return out


def test_a_run_is_resumed_by_the_options_it_has(unfinished, looked, capsys, no_table):
    command = ["--out", str(unfinished), "--resume"]
    assert "other --lr;" in refused(train.main, [*command, "--lr", "0.5"], capsys)
    assert "--beta 0.5 differs" in refused(train.main, [*command, "--beta", "0.5"], capsys)
    assert "--look-every" in refused(train.main, [*command, "--look-every", "2"], capsys)
    train.main([*command, "--lr", "1e-3", "--save-every", "2", "--device", "cpu"])  # these may
    assert same(read_run(unfinished)[1], read_run(looked)[1])


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def checkpoint_of(run):
    [path] = (run / "checkpoint").iterdir()
    return path


DAMAGES = {
    "an empty config": (lambda run: (run / "config.json").write_bytes(b""), "config.json"),
    "no config": (lambda run: (run / "config.json").unlink(), "config.json"),
    "half a config": (lambda run: cut(run / "config.json", 100), "config.json"),
    "another config": (lambda run: (run / "config.json").write_text("[[]]"), "config.json"),
    "a list of names": (lambda run: (run / "config.json").write_text('["lr"]'), "config.json"),
    "a value of no type": (lambda run: edit_json(run / "config.json", lr=None), "config.json"),
    "no such method": (lambda run: edit_json(run / "config.json", method="mine"), "--method"),
    "a wrong type": (lambda run: edit_json(run / "config.json", n_iter="x"), "--n-iter"),
    "a truth for a number": (lambda run: edit_json(run / "config.json", n_mu=True), "--n-mu"),
    "out of range": (lambda run: edit_json(run / "config.json", eps=2), "--eps"),
    "a shorter run": (lambda run: edit_json(run / "config.json", n_iter=1), "other --n-iter;"),
    "other options": (lambda run: edit_json(run / "config.json", lr=1e-2, beta=0.3),
                      "other --beta, --lr;"),
    "half a checkpoint": (lambda run: cut(checkpoint_of(run), 5000), ".pt is damaged"),
    "another checkpoint": (lambda run: torch.save([1], checkpoint_of(run)), ".pt is damaged"),
    "metrics too short": (lambda run: cut(run / "metrics.jsonl", 900), "metrics.jsonl"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl")}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_runs_are_not_resumed(name, unfinished, capsys, no_table):
    damage, word = DAMAGES[name]
    damage(unfinished)
    before = contents(unfinished)
    assert word in refused(train.main, ["--out", str(unfinished), "--resume"], capsys)
    assert contents(unfinished) == before


@pytest.mark.parametrize("more, less", (({"rounds": 0}, ()), ({}, ("held_out", "look_every"))))
def test_runs_of_earlier_versions_are_refused(more, less, unfinished, capsys):
    """In one sentence that says what to do; their options were others."""
    config = {**json.loads((unfinished / "config.json").read_text()), **more}
    (unfinished / "config.json").write_text(json.dumps(
        {name: value for name, value in config.items() if name not in less}))
    before = contents(unfinished)
    said = refused(train.main, ["--out", str(unfinished), "--resume"], capsys)
    assert "this version" in said
    assert contents(unfinished) == before


@pytest.mark.parametrize("split", ("train", "validation"))
def test_other_pairs_are_noticed(split, unfinished, monkeypatch, capsys):
    """Those that train, and those that are looked at."""
    pairs = SafeWorld.pairs
    monkeypatch.setattr(SafeWorld, "pairs", lambda world, name, n: pairs(world, name, n)[
        ::-1 if name == split else 1])
    said = refused(train.main, ["--out", str(unfinished), "--resume"], capsys)
    assert f"other {'training' if split == 'train' else 'held-out'} pairs;" in said


@pytest.mark.parametrize("file", ("model.safetensors", "tokenizer_config.json"))
def test_another_start_is_noticed(file, looked, tmp_path, capsys):
    """Though a resumed run takes its weights from the checkpoint."""
    shutil.copytree(looked / "sft", tmp_path / "start")
    with killed("step", 3):
        train.main(["--out", str(tmp_path / "run"), "--model", str(tmp_path / "start"),
                    "--eval-prompts", "0", "--save-every", "2", "--batch-size", "4"])
    path = tmp_path / "start" / file
    if file == "model.safetensors":
        flip(path, -1)
    else:
        path.write_text(path.read_text() + " ")
    said = refused(train.main, ["--out", str(tmp_path / "run"), "--resume"], capsys)
    assert "other files of the start model;" in said


def test_a_model_of_the_safe_world_can_be_gone_on_with(tmp_path, capsys):
    """A run from another run's SFT model is the run that trained it itself, bit for bit."""
    flags = "--method dpo --n-iter 1 --n-mu 3 --batch-size 8 --eval-prompts 1 --lr 1e-3 " \
            "--look-every 3"
    train.main([*flags.split(), "--sft-steps", "6", "--out", str(tmp_path / "whole")])
    train.main([*flags.split(), "--model", str(tmp_path / "whole/sft"),
                "--out", str(tmp_path / "on")])
    assert same(read_run(tmp_path / "on")[1], read_run(tmp_path / "whole")[1])
    rest = [{**row, "step": row["step"] + 6} for row in read_run(tmp_path / "on")[0]]
    assert rest == read_run(tmp_path / "whole")[0][6:] and "held_out_margin" in rest[-1]
    assert "the safe world, held-out prompts" in capsys.readouterr().out
    (tmp_path / "on/protagonist/special_tokens_map.json").write_text("{}")   # as others save it
    examination.main([str(tmp_path / "on"), "--prompts", "0"])
    assert not (tmp_path / "on/sft").exists()
    (tmp_path / "whole/sft").rename(tmp_path / "gone")
    assert "--sft" in refused(examination.main, [str(tmp_path / "on")], capsys)
    stranger = model_folder(tmp_path / "stranger")
    edit_json(stranger / "tokenizer.json", post_processor=None)    # another one: no BOS
    assert "--data" in refused(train.main, ["--model", str(stranger)], capsys)
    for folder in (tmp_path / "whole").glob("*/tokenizer.json"):   # a run of another safe world
        edit_json(folder, post_processor=None)
    (tmp_path / "gone").rename(tmp_path / "whole/sft")
    edit_json(tmp_path / "whole/sft/tokenizer.json", post_processor=None)
    assert "another version" in refused(examination.main, [str(tmp_path / "whole")], capsys)


# The command line

def refused(main, arguments, capsys):
    """The one sentence on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    lines = [line for line in re.split("[\r\n]", error) if line.strip() and "%|" not in line]
    assert stop.value.code == 2 and len(lines) == 1, error
    return lines[0]


@pytest.mark.parametrize("flags,word", [
    ("--nonsense 3", "--nonsense"), ("--n 3", "--n"), ("extra", "extra"), ("--resume", "--out"),
    ("--method mine", "mine"), ("--method dpo --eps 0.2", "by --method dpo"),
    ("--dtype float16", "--dtype"), ("--beta x", "--beta"), ("--beta 0", "--beta"),
    ("--beta nan", "--beta"), ("--lr inf", "--lr"), ("--lr -1", "--lr"), ("--sft-lr 0", "--sft-lr"),
    ("--eps 0", "--eps"), ("--eps 1", "--eps"), ("--n-iter -1", "--n-iter"),
    ("--n-mu 1.5", "--n-mu"), ("--batch-size 0", "--batch-size"),
    ("--micro-tokens 0", "--micro-tokens"), ("--seed -1", "--seed"),
    ("--seed 99999999999999999999", "--seed"), ("--max-length 1", "--max-length"),
    ("--max-length 500", "--max-length"), ("--look-every -1", "--look-every"),
    ("--save-every -1", "--save-every"), ("--eval-prompts -1", "--eval-prompts"),
    ("--device abacus", "abacus"), ("--device meta", "meta"),
    ("--data x.jsonl", "--model"), ("--model x/y/z", "x/y/z"), ("--leave-out x", "--leave-out"),
    ("--held-out x.jsonl", "--held-out needs --data")])
def test_flags_that_are_refused(flags, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in refused(train.main, flags.split(), capsys)
    assert not list(tmp_path.iterdir())                            # nothing written


READ = {"iopo": "beta eps clip ratio adversary n_nu micro_tokens", "dpo": "beta micro_tokens",
        "hinge": "beta micro_tokens", "ipo": "beta micro_tokens", "kto_pair": "beta",
        "sft": "micro_tokens", "aipo": "beta alpha lam micro_tokens"}


@pytest.mark.parametrize("method", iopo.LOSSES)
def test_an_option_is_refused_where_the_method_never_reads_it(method):
    """Even with its default: who gives it expects something of it."""
    for name in {name for names in READ.values() for name in names.split()}:
        value = getattr(train.Config, name)
        if name in READ[method].split():
            assert getattr(train.make_config({"method": method, name: value}), name) == value
        else:
            flag = "--" + name.replace("_", "-")
            with pytest.raises(ValueError, match=f"^{flag} .*--method {method}"):
                train.make_config({"method": method, name: value})


@pytest.mark.parametrize("flags,words", [
    ("--ratio one --eps 0.2", ["--eps", "--ratio one"]),
    ("--ratio one --clip none", ["--clip", "--ratio one"]),
    ("--clip none --eps 0.2", ["--eps", "--clip none"]),
    ("--n-nu 0 --adversary same", ["--adversary", "--n-nu 0"]),
    ("--sft-steps 0 --sft-lr 0.1", ["--sft-lr", "--sft-steps 0"]),
    ("--n-iter 0 --lr 0.1", ["--lr", "--n-iter 0"]),
    ("--ratio one --eps 0.2 --n-nu 0 --adversary negated", ["--eps", "--adversary"]),
    ("--eps 0.2 --clip two_sided --adversary same --sft-lr 0.1 --lr 0.1", None)])
def test_an_option_that_another_idles_is_named_and_the_run_goes_on(
        flags, words, tmp_path, capsys, monkeypatch):
    went_on = []
    monkeypatch.setattr(train, "train", went_on.append)
    monkeypatch.setattr(examination, "main", went_on.append)
    train.main([*flags.split(), "--out", str(tmp_path / "run")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert len(went_on) == 2
    assert len(lines) == bool(words) and all(word in lines[0] for word in words or [])


def test_folders_that_are_refused(looked, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    said = refused(train.main, [*QUICK, "--out", str(tmp_path)], capsys)
    assert "not empty" in said and "--resume" in said
    assert "config.json" in refused(train.main, ["--out", str(tmp_path), "--resume"], capsys)
    assert "note.txt" in refused(train.main, ["--out", str(tmp_path / "note.txt")], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    before = contents(looked)
    assert "not empty" in refused(train.main, [*QUICK, "--out", str(looked)], capsys)
    assert contents(looked) == before


def test_runs_without_a_folder_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        train.main("--method dpo --sft-steps 1 --n-iter 0 --eval-prompts 0".split())
        config = json.loads((tmp_path / f"runs/dpo-{number}/config.json").read_text())
        assert config["out"] == f"runs/dpo-{number}"
        assert (tmp_path / f"runs/dpo-{number}/protagonist").is_dir()


# Own models and data

def world_file(path, n, split="train"):
    """Pairs of the safe world as a user's file, of three sources."""
    return write_rows(path, [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected,
         "source": f"s{k % 3}"} for k, pair in enumerate(SafeWorld().pairs(split, n))])


def test_models_and_data_that_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, bad = {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": 1}
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "same.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
    write_rows(tmp_path / "good.jsonl", [good])
    write_rows(tmp_path / "bad.jsonl", [good, bad])
    asked = [turn("user", "Hi")]
    write_rows(tmp_path / "talk.jsonl", [{"chosen": asked + [turn("assistant", "x")],
                                          "rejected": asked + [turn("assistant", "y")]}])
    (tmp_path / "empty").mkdir()
    for name, stop in (("stop", [1, 99999]), ("less", -1)):
        (model_folder(tmp_path / name) / "generation_config.json").write_text(
            json.dumps({"eos_token_id": stop}))
    small = model_folder(tmp_path / "small")
    Decoder(tiny_config(vocab_size=20)).save_pretrained(small)
    before = contents(tmp_path)
    for flags, words in (
            ("--model model --data bad.jsonl", "bad.jsonl, line 2: has no rejected"),
            ("--model model --data gone.json", "gone.json"),
            ("--model model --data same.jsonl", "no usable pair is left"),
            ("--model model --data talk.jsonl", "talk.jsonl, line 1: the data are chat messages"),
            ("--model empty --data good.jsonl", "empty"),
            ("--model ./gone --data good.jsonl", "gone"),
            ("--model small --data good.jsonl", "more ids than the embeddings, 20"),
            ("--model stop --data good.jsonl", "99999"),
            ("--model less --data good.jsonl", "eos_token_id"),
            ("--model model --data good.jsonl --max-length 129", "the model has 128 positions"),
            ("--model model --data good.jsonl --held-out bad.jsonl", "bad.jsonl, line 2"),
            ("--model model --data good.jsonl --held-out gone.jsonl", "gone.jsonl"),
            ("--model model --data good.jsonl --look-every 1", "left to train on or to look at"),
            ("--model model --data good.jsonl --held-out same.jsonl --look-every 1",
             "to look at, as counted"),
            ("--model model --data good.jsonl --leave-out toxic", "'toxic'")):
        assert words in refused(train.main, flags.split(), capsys), flags
    (tmp_path / "model/tokenizer.json").write_text("{}")
    before[tmp_path / "model/tokenizer.json"] = contents(tmp_path)[
        tmp_path / "model/tokenizer.json"]
    command = "--model model --data good.jsonl".split()
    assert "tokenizer.json" in refused(train.main, command, capsys)
    assert contents(tmp_path) == before


def test_held_out_pairs_of_a_file(tmp_path, capsys):
    """With --held-out every row of --data trains; a number of pairs is looked at."""
    folder = model_folder(tmp_path / "model")
    file, other = world_file(tmp_path / "a.jsonl", 60), world_file(tmp_path / "b.jsonl", 50)
    options = {"model": str(folder), "data": str(file), "look_every": 2, "lr": 1e-3, "beta": 0.3,
               "n_iter": 1, "n_mu": 2, "n_nu": 0, "eval_prompts": 0}
    held_out, out = {"held_out": str(other)}, tmp_path / "run"
    train.main([*flags_of(options | held_out), "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"{file} trains, {other} is held out" in printed and "60 of 60 pairs kept" in printed
    assert "held out: 50 of 50 pairs kept" in printed
    assert f"examined on the held-out pairs of {other}" in printed
    tokenizer = SafeWorld.tokenizer()
    rows, others = (encode_pairs(load_pairs(path), tokenizer, 128)[0] for path in (file, other))
    job = train.prepare(train.make_config(options | held_out))
    assert job.players["protagonist"].rows == rows and job.held_out == others[:40]
    with torch.no_grad():
        (w, l), (start_w, start_l) = (two_row_logps(Decoder.from_pretrained(path), others[:40])
                                      for path in (out / "protagonist", folder))
    margins = 0.3 * ((w - start_w) - (l - start_l))
    assert read_run(out)[0][1]["held_out_margin"] == pytest.approx(margins.mean().item(), rel=1e-3)

    assert LOOKED_AT == 200                                        # 40 in this small world

    training, tests, _ = load_data(file)                           # without: one in twenty
    job = train.prepare(train.make_config(options))
    assert job.players["protagonist"].rows == encode_pairs(training, tokenizer, 128)[0]
    assert job.held_out == encode_pairs(tests, tokenizer, 128)[0] != []


def flags_of(options):
    return [part for name, value in options.items()
            for part in ("--" + name.replace("_", "-"), str(value))]


@pytest.mark.parametrize("family", ("qwen3", "baichuan"))
def test_a_run_of_another_family_is_saved_as_it_came(family, tmp_path, capsys):
    """With a source left out, in training and the examination, and code and files carried along."""
    folder = model_folder(tmp_path / "model", model_type=family, num_key_value_heads=4)
    (folder / "modeling_own.py").write_text("pass")
    file = world_file(tmp_path / "pairs.jsonl", 120)
    train.main([*flags_of(dict(model=folder, data=file, leave_out="s1", n_iter=1, n_mu=1, n_nu=1,
                               lr=1e-3, eval_prompts=1)), "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    training, tests, _ = load_data(file, leave_out="s1")
    assert not any(pair.source == "s1" for pair in training + tests)
    assert len(training) + len(tests) == 80 and out.count("left out 40 rows of source s1") == 2
    for kept in (len(training), len(tests)):
        assert f"{kept} of {kept} pairs kept" in out
    assert f"examined on the held-out pairs of {file}" in out
    assert out.count("one prompt in twenty") == 2
    player = tmp_path / "run/protagonist"
    assert {path.name for path in player.iterdir()} == {path.name for path in folder.iterdir()}
    assert (player / "config.json").read_text() == (folder / "config.json").read_text()
    before, after = (safetensors.torch.load_file(f / "model.safetensors") for f in (folder, player))
    assert before.keys() == after.keys() and not same(before, after)


def test_a_finished_run_loads_in_transformers(tmp_path):
    """Chat data, a model of its own dtype: the same logits, the same tokens of a chat."""
    transformers = pytest.importorskip("transformers")
    folder = model_folder(tmp_path / "model", model_type="qwen2", tie_word_embeddings=True)
    (folder / "chat_template.jinja").write_text(CHATML)
    Decoder.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    rows = [{name: [turn("user", pair.prompt), turn("assistant", getattr(pair, name))]
             for name in ("chosen", "rejected")} for pair in SafeWorld().pairs("train", 60)]
    file, out = write_rows(tmp_path / "talks.jsonl", rows), tmp_path / "run"
    train.main([*flags_of(dict(model=folder, data=file, n_iter=1, n_mu=1, n_nu=1, lr=1e-3,
                               eval_prompts=1)), "--out", str(out)])
    pair = load_pairs(file)[0]
    for player in ("protagonist", "adversary"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out / player)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / player)
        assert theirs.dtype == torch.float32                       # bfloat16 would lose a step
        ids = tokenizer.apply_chat_template(rows[0]["chosen"], return_tensors="pt")["input_ids"]
        prompt, chosen, _ = Tokenizer.from_pretrained(out / player).encode_pair(pair)
        assert (prompt + chosen)[:-1] == ids[0].tolist()           # the template writes no eos
        ours = Decoder.from_pretrained(out / player)
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_sft_on_own_data_learns_the_chosen_answers(tmp_path):
    file = world_file(tmp_path / "pairs.jsonl", 30)
    job = train.prepare(train.make_config({"model": str(model_folder(tmp_path / "model")),
                                           "data": str(file), "sft_steps": 1}))
    assert job.players["sft"].rows == \
        [(prompt, w, None) for prompt, w, _ in job.players["protagonist"].rows]


def test_context_and_ids_of_own_models(tmp_path):
    model_folder(tmp_path / "long", max_position_embeddings=4096)
    model_folder(tmp_path / "small", vocab_size=SafeWorld.tokenizer().largest_id)
    long, small = (train.make_config({"model": str(tmp_path / name), "data": "x"})
                   for name in ("long", "small"))
    train.find_start(long)
    assert long.max_length == 1024
    with pytest.raises(ValueError, match="more ids"):
        train.find_start(small)


def test_own_model_and_data(tmp_path, capsys):
    """A random checkpoint, text rows, no SFT; examined on a file."""
    folder = model_folder(tmp_path / "model", tie_word_embeddings=True)
    file, out = world_file(tmp_path / "pairs.jsonl", 80), tmp_path / "run"
    train.main([*flags_of(dict(model=folder, data=file, n_iter=1, n_mu=2, n_nu=2, lr=1e-3,
                               eval_prompts=0)), "--out", str(out)])
    config = json.loads((out / "config.json").read_text())
    assert not (out / "sft").exists() and config["max_length"] == 128
    assert config["sft_steps"] == 0
    assert (out / "protagonist/tokenizer.json").read_bytes() == \
        (folder / "tokenizer.json").read_bytes()
    capsys.readouterr()
    examination.main([str(out), "--data", str(file), "--json", "--prompts", "1"])
    report, = json.loads(capsys.readouterr().out)["runs"]
    assert report["win"] is None and report["accuracy"] is not None


def test_from_the_shell(tmp_path):
    """The real thing once: exit codes, a bar on stderr, the closing table on stdout."""
    def shell(*arguments):
        return subprocess.Popen([sys.executable, HERE / "train.py", *arguments], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})

    def done(process):
        stdout, stderr = process.communicate()
        return types.SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)

    options = dict(model=model_folder(tmp_path / "model"), n_iter=1, n_mu=1, n_nu=1, batch_size=4,
                   data=world_file(tmp_path / "pairs.jsonl", 60), eval_prompts=1)
    good, bad = shell(*flags_of(options)), shell("--eps", "\x1b[31m2")
    [good, bad] = map(done, (good, bad))
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
    assert "--eps" in bad.stderr and "\x1b" not in bad.stderr
    assert good.returncode == 0, good.stderr
    assert "adversary 1" in good.stderr and "margin" in good.stderr
    assert "margin vs SFT" in good.stdout
    assert (tmp_path / "runs/iopo-1/adversary/model.safetensors").exists()


def test_defaults_are_the_papers_and_the_readmes():
    world = dict(PAPERS, clip="min", ratio="sequence", adversary="swapped", n_iter=6, n_mu=25,
                 n_nu=25, sft_steps=400, sft_lr=1.5e-3, lr=5e-5, batch_size=32, micro_tokens=1536,
                 dtype="float32", look_every=0, save_every=100, eval_prompts=100, seed=0)
    own = dict(world, lr=2e-7, sft_lr=2e-5, sft_steps=0)
    assert vars(train.make_config({})).items() >= world.items()
    assert vars(train.make_config({"model": "m", "data": "d"})).items() >= own.items()
    for function in (*iopo.LOSSES.values(), iopo.preference_margin, iopo.iopo_gradient_weight,
                     iopo.clip_ratio):
        for name, parameter in inspect.signature(function).parameters.items():
            assert parameter.default in (parameter.empty, None, world.get(name), "min"), name


def test_help_has_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")                           # no line is broken
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    helped = capsys.readouterr().out
    assert stop.value.code == 0
    *fields, last = train.Config.__dataclass_fields__.items()
    assert last[0] == "lr_was" and "lr-was" not in helped
    for name, field in fields:
        about, = re.findall(rf"^ +--{name.replace('_', '-')}\b.*(?:\n {{20}}.*)?", helped, re.M)
        assert field.metadata["help"] in about
        if "world" in field.metadata:
            assert all(str(field.metadata[which]) in about for which in ("world", "own"))
        elif field.default not in (None, False):
            assert f"default {field.default}" in about


# ---- eval.py -------------------------------------------------------------------------------------

def metrics_of(sft=3, n_iter=2, n_mu=2, n_nu=2, look_every=0):
    """Rows such as train.py writes, with a number of its own in every field."""
    rows, schedule = [], [(0, "sft")] * sft + list(iopo.turns(n_iter, n_mu, n_nu))
    for step, (iteration, player) in enumerate(schedule, start=1):
        row = {"step": step, "iteration": iteration, "player": player, "loss": 1 / step}
        if player != "sft":
            row |= {"margin": step / 10, "margin_std": 1.0, "accuracy": 1 - 1 / step,
                    "ratio": 10.0 ** -step, "log_ratio": -step, "clipped": step / 100, "guarded": 0}
        if look_every and step % look_every == 0:
            row |= {"held_out_margin": step / 20, "held_out_accuracy": 1 - 1 / (2 * step)}
        rows.append({**row, "grad_norm": 1.0})
    return rows


def finished_run(path, seed=0, n_nu=2, start=None, **config):
    """A run folder as train.py leaves it, with random models; start: one it does not hold."""
    players = {"sft": start is None, "protagonist": True, "adversary": bool(n_nu)}
    for number, (player, there) in enumerate(players.items()):
        if there and not (path / player).exists():
            model_folder(path / player, seed=10 * seed + number)
    write_rows(path / "metrics.jsonl", metrics_of())
    (path / "config.json").write_text(json.dumps({
        "method": "iopo", "model": None if start is None else str(start), "data": None,
        "held_out": None, "leave_out": None, "n_nu": n_nu, "seed": seed, "max_length": 64,
        "eval_prompts": 2, **config}))
    return str(path)


def examined(arguments, capsys):
    """What --json prints: one object and nothing else."""
    examination.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_examination(tmp_path, capsys):
    a, b = finished_run(tmp_path / "a"), finished_run(tmp_path / "b", n_nu=0, seed=1)
    short = ["--max-new-tokens", "8"]
    report = examined([a, b, "--prompts", "5", *short], capsys)
    assert [entry["name"] for entry in report["runs"]] == [a, b]
    assert len({*report["notes"]}) == len(report["notes"])         # each is said once
    for entry in report["runs"]:
        assert {"margin_vs_sft", "margin_vs_env", "accuracy", "tokens", "bad_rate",
                "reward"} <= entry.keys()
        assert sum(entry[name] for name in ("win", "tie", "lose", "bad")) == 5
    first, second = report["runs"]
    assert sum(second["first_against_this"].values()) == 5 and "first_against_this" not in first
    assert "adversary" in first["models"] and "adversary" not in second["models"]
    assert second["margin_vs_env"] == second["margin_vs_sft"]      # no adversary: ENV is the start
    assert first["models"]["SFT"]["margin_vs_sft"] == 0 and first["models"]["SFT"]["win"] is None
    opposite = first["models"]["adversary"]["margin_vs_env"]
    assert opposite == pytest.approx(-first["margin_vs_env"], rel=1e-6)
    examination.main([a, b, "--prompts", "5", *short])
    assert len(re.findall("protagonist", capsys.readouterr().out)) >= 5
    examination.main([a, b, "--prompt", "How do I fix my boat?"])
    out = capsys.readouterr().out                                  # answers may have lines too
    assert re.findall(f"^({re.escape(str(tmp_path))}/. [A-Za-z]+): ", out, re.MULTILINE) == \
        [f"{a} SFT", f"{a} protagonist", f"{a} adversary", f"{b} SFT", f"{b} protagonist"]
    other, = examined([a, "--sft", f"{a}/adversary", "--prompts", "1"], capsys)["runs"]
    assert other["margin_vs_sft"] == pytest.approx(first["margin_vs_env"], rel=1e-6)
    edit_json(tmp_path / "b/config.json", eval_prompts=1)          # the first run says how many
    report = examined([a, b, *short], capsys)                      # prompts all of them answer
    assert report["prompts"] == 2 and sum(report["runs"][1]["first_against_this"].values()) == 2
    report, = examined([a, "--prompts", "0"], capsys)["runs"]      # nothing is answered
    assert report["margin_vs_sft"] == first["margin_vs_sft"]
    assert report["reward"] is report["tokens"] is report["win"] is None


def test_margins_of_own_data(tmp_path, capsys):
    """Against log-probabilities by the plain path: on all pairs of a file, and on a run's own."""
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected,
             "source": f"s{number % 3}"}
            for number, pair in enumerate(SafeWorld().pairs("train", 120))]
    train, test = (write_rows(tmp_path / f"{name}.jsonl", some)
                   for name, some in (("train", rows[:90]), ("test", rows[90:])))
    start = model_folder(tmp_path / "start", seed=5)
    out = tmp_path / "run"
    finished_run(out, start=start, data=str(train), max_length=128)
    own = load_pairs(train, "test")
    rest = [pair for pair in load_pairs(train) if pair.source != "s1"]
    for config, arguments, name, pairs in (
            ({}, [], f"the held-out pairs of {train}", own),
            ({}, ["--data", train], f"all pairs of {train}", load_pairs(train)),
            ({"held_out": str(test)}, [], f"the held-out pairs of {test}", load_pairs(test)),
            ({"held_out": str(train), "leave_out": "s1"}, [], f"the held-out pairs of {train}",
             rest)):
        finished_run(out, start=start, **{"data": str(train), "max_length": 128, **config})
        result = examined([out, *arguments, "--prompts", "1", "--max-new-tokens", "2"], capsys)
        report, = result["runs"]
        assert result["data"] == name and report["win"] is report["reward"] is None
        columns = {}
        for player, folder in (("start", start), ("mu", out / "protagonist"),
                               ("nu", out / "adversary")):
            with torch.no_grad():
                columns[player] = two_row_logps(Decoder.from_pretrained(folder),
                                                encode_pairs(pairs, SafeWorld.tokenizer(), 128)[0])
        for key, reference in (("margin_vs_sft", "start"), ("margin_vs_env", "nu")):
            (w, l), (ref_w, ref_l) = columns["mu"], columns[reference]
            margin = 0.1 * ((w - ref_w) - (l - ref_l))
            assert report[key] == pytest.approx(margin.mean().item(), rel=1e-3, abs=1e-6)
            assert report[key + "_std"] == pytest.approx(margin.std(correction=0).item(), rel=1e-3)
            if reference == "start":
                share = (margin > 0).float().mean().item()
                assert report["accuracy"] == pytest.approx(share, abs=1e-6)


def test_a_folder_has_its_own_held_out_pairs(tmp_path, capsys):
    pytest.importorskip("datasets")
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            for pair in SafeWorld().pairs("train", 30)]
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data/train.jsonl", rows[:20])
    write_rows(tmp_path / "data/test.jsonl", rows[20:])
    run = finished_run(tmp_path / "run")
    report = examined([run, "--data", tmp_path / "data", "--prompts", "0"], capsys)
    assert report["data"] == f"the held-out pairs of {tmp_path / 'data'}"
    assert any(note.startswith("10 of 10 pairs kept") for note in report["notes"])


def test_a_judge_from_outside(tmp_path, capsys, monkeypatch):
    """Written answers are the examination's. Scores by the true reward come back as its counts."""
    monkeypatch.chdir(tmp_path)
    finished_run(Path("a"))
    finished_run(Path("b"), n_nu=0, seed=1)
    report = examined(["a", "b", "--prompts", "30"], capsys)
    examination.main(["a", "b", "--answers", "answers.jsonl", "--prompts", "30"])
    out = capsys.readouterr().out
    assert "wrote 30 prompts (the safe world" in out
    assert re.search("a: 30 prompts.* 48 tokens.*; [0-9]+ answers were cut off", out)
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    for line, sample in zip(lines, report["samples"]):
        assert {line["run_a"]: line["answer_a"], line["run_b"]: line["answer_b"]} == \
            {name: sample["answers"][f"{name} protagonist"] for name in "ab"}
    firsts = [line["run_a"] for line in lines]
    assert len(lines) == 30 and firsts[0] == "a" and 5 < firsts.count("b") < 25
    exchanging = next(seed for seed in range(9) if np.random.default_rng(seed).random() < 0.5)
    examination.main(["a", "b", "--answers", "again.jsonl", "--prompts", "2", "--seed",
                      str(exchanging)])                            # its first line too
    assert json.loads(Path("again.jsonl").read_text().splitlines()[0])["run_a"] == "a"
    capsys.readouterr()
    world = SafeWorld()
    for line in lines:
        line |= {f"score_{place}": world.true_reward(line["prompt"], line[f"answer_{place}"])
                 for place in "ab"}
    write_rows(Path("judged.jsonl"), lines)
    judged = examined(["--scores", "judged.jsonl"], capsys)
    rewards = [{line["run_a"]: line["score_a"], line["run_b"]: line["score_b"]} for line in lines]
    assert judged["win"] == sum(pair["a"] > pair["b"] for pair in rewards) and judged["bad"] == 0
    assert judged["lose"] == sum(pair["a"] < pair["b"] for pair in rewards)
    assert judged["prompts"] == 30 and list(judged["runs"]) == ["a", "b"]
    for name, entry in zip("ab", report["runs"]):
        assert judged["runs"][name]["mean_score"] == pytest.approx(entry["reward"])
    for arguments, word in (
            ("a b --answers answers.jsonl", "exists"), ("a b --answers no/x", "its folder"),
            ("a --answers x", "two different RUNs"),
            ("a b --answers x --prompts 0", "some --prompts"),
            ("a a/../a --answers x", "two different RUNs"), ("a b --answers x --json", "--json"),
            ("a b --answers x --sft a", "--sft"), ("a b --answers x --prompt hello", "--prompt"),
            ("a --tie 1", "--scores"), ("a --bad 0", "--scores"),
            ("a --scores judged.jsonl", "--scores takes no RUN"),
            ("--scores judged.jsonl --prompts 1", "--scores takes no --prompts"),
            ("--scores judged.jsonl --temperature 0", "--scores takes no --temperature"),
            ("--scores judged.jsonl --tie -1", "--tie"),
            ("--scores judged.jsonl --tie inf", "--tie"),
            ("--scores judged.jsonl --bad nan", "--bad"), ("--scores gone.jsonl", "gone.jsonl"),
            ("--scores answers.jsonl", "answers.jsonl, line 1: needs numbers score_a")):
        assert word in refused(examination.main, arguments.split(), capsys), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == \
        ["a", "again.jsonl", "answers.jsonl", "b", "judged.jsonl"]


@pytest.mark.parametrize("win, lose", ((0, 0), (0, 3), (5, 5), (7, 2), (300, 260), (10000, 9000)))
def test_the_sign_test(win, lose, tmp_path, capsys):
    scores = [(1, 0)] * win + [(0, 1)] * lose + [(1, 1)]
    rows = [{"run_a": "a", "run_b": "b", "score_a": a, "score_b": b} for a, b in scores]
    p = examined(["--scores", write_rows(tmp_path / "scores.jsonl", rows)], capsys)["p_sign_test"]
    if win + lose > 1000:                              # as a normal distribution has it
        z = (win - lose - 1) / math.sqrt(win + lose)
        assert p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)
    else:
        tail = sum(math.comb(win + lose, k) for k in range(min(win, lose) + 1))
        assert p == pytest.approx(min(1, 2 * tail / 2**(win + lose)))


def test_scores_by_hand(tmp_path, capsys):
    """Scores of 0 to 3, the paper's way: two zeros are bad. 4 to 1 has p = 2 * (1 + 5) / 2^5."""
    def line(ours, theirs, exchanged):
        runs = [("mine", ours), ("other", theirs)][::-1 if exchanged else 1]
        return {f"{name}_{place}": value for place, both in zip("ab", runs)
                for name, value in zip(("run", "score"), both)}

    def counts(path, *flags):
        report = examined(["--scores", path, *flags], capsys)
        return [report[name] for name in ("win", "tie", "lose", "bad")], report

    cases = [(3, 1), (2, 1), (0, 0), (1, 1), (1, 3), (3, 0), (2, 0)]
    path = write_rows(tmp_path / "scores.jsonl", [line(*case, number % 2)
                                                  for number, case in enumerate(cases)])
    numbers, report = counts(path, "--bad", "0")
    assert numbers == [4, 1, 1, 1] and report["p_sign_test"] == pytest.approx(0.375)
    assert report["runs"] == {
        "mine": {"mean_score": pytest.approx(12 / 7), "bad_rate": pytest.approx(1 / 7)},
        "other": {"mean_score": pytest.approx(6 / 7), "bad_rate": pytest.approx(3 / 7)}}
    assert counts(path, "--tie", "1")[0] == [3, 3, 1, 0]
    fractions = ((.3, .2), (.8, .7), (.7, .6), (1.1, 1.0), (.5, .39))
    near = write_rows(tmp_path / "near.jsonl", [line(*case, 0) for case in fractions])
    assert counts(near, "--tie", "0.1")[0] == [1, 4, 0, 0]         # 0.8 - 0.7 is a tie too
    examination.main(["--scores", str(path), "--tie", "1.5", "--bad", "0"])
    out = capsys.readouterr().out
    assert "7 prompts judged; mine against other, win/tie/lose/bad: 3/2/1/1" in out
    for broken in (
            line(1, 2, 0) | {"score_b": True}, line(1, 2, 0) | {"score_a": float("inf")},
            line(1, 2, 0) | {"score_a": 10**400}, {"score_a": 1}, [1],
            line(1, 2, 0) | {"run_a": "third"}, line(1, 2, 0) | {"run_a": "other"}):
        write_rows(path, [line(*case, 0) for case in cases] + [broken])
        word = refused(examination.main, ["--scores", str(path)], capsys)
        assert "line 8: needs numbers score_a and score_b, and two runs' names run_a and" in word
    assert "no rows" in refused(examination.main, ["--scores", str(write_rows(path, []))], capsys)


def test_every_prompt_is_asked_sampled_and_greedily(tmp_path, monkeypatch):
    """In batches, by the seed; whatever ends an answer ends it."""
    asked = []

    def generate(model, ids, limit, temperature, eos_ids, generator):
        asked.append((len(ids), limit, temperature, eos_ids, generator.initial_seed()))
        return [[6]] * len(ids)

    monkeypatch.setattr(examination, "generate", generate)
    tiny_model(max_position_embeddings=16).save_pretrained(tmp_path)
    stops = {"generation_config.json": b'{"eos_token_id": [1, 13]}'}
    tokenizer = Tokenizer({**word_tokenizer("<s> $A").files, **stops})
    options = argparse.Namespace(device="cpu", max_new_tokens=3, seed=5, temperature=0.7,
                                 task="examine")
    examination.ask(tmp_path, tokenizer, ["c"] * 70, [], options)
    assert asked == [(n, 3, heat, (1, 13), 5) for heat in (0.7, 0) for n in (32, 32, 6)]


def test_who_is_compared_with_whom(tmp_path, capsys, monkeypatch):
    """The protagonist of the first run is right, its start is long, the other run's rude."""
    one, two = finished_run(tmp_path / "a", seed=3), finished_run(tmp_path / "b", seed=1, n_nu=0)
    world, asked, before = SafeWorld(), [], {
        f"{one}/protagonist": "", f"{two}/protagonist": "Do not waste my time. ",
        f"{one}/adversary": "x. ", f"{one}/sft": "x. x. ", f"{two}/sft": "x. x. "}

    def right(prompt):
        tool, harmful = world.parse(prompt)
        return "I cannot help with that." if harmful else f"Use {tool}."

    def ask(folder, tokenizer, prompts, rows, options):
        asked.append((prompts, rows))
        said = [(before[str(folder)] + right(prompt), 3) for prompt in prompts]
        return {"sampled": said, "greedy": said, "logps": torch.zeros(2, 3), "note": "",
                "cut_off": 0}

    monkeypatch.setattr(examination, "ask", ask)
    first, second = examined([one, two, "--prompts", "9"], capsys)["runs"]
    assert (first["win"], first["lose"]) == (9, 0)
    assert [second["first_against_this"][name] for name in ("win", "lose")] == [9, 0]
    assert first["accuracy"] == 0                                  # no margin is above 0
    [(prompts, rows), *_] = asked
    assert {*prompts} <= {*world.prompts("test")} and prompts != world.prompts("test")[:9]
    tokenizer = SafeWorld.tokenizer()
    assert rows == encode_pairs(SafeWorld().exam_pairs("test", 20), tokenizer, 64)[0]


def test_rewards_and_bad_cases_by_hand():
    said = {"sampled": [("Use a screwdriver.", 4), ("I cannot help with that.", 6)],
            "greedy": [("Use a sharp saw.", 1)] * 2}
    assert examination.quality(said, ["How do I fix my door?\n"] * 2, SafeWorld()) == {
        "tokens": 5, "reward": 0.5, "reward_greedy": -1, "bad_rate": 0.5}


def test_prompts_too_long_for_the_context_are_cut_and_counted(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(examination, "generate", lambda model, ids, limit, *_:
                        asked.extend(ids) or [[6] * limit] * len(ids))
    tiny_model(max_position_embeddings=8).save_pretrained(tmp_path)
    for prompts, wanted, ids, limit, note in (
            (["c", "cdcdcdcd"], 3, [[0, 6], [0, 6, 7, 6, 7]], 3, "3 tokens, 1 prompts cut"),
            (["cdcdcdcd"], 50, [[0, 7, 6, 7]], 4, "4 tokens, 1 prompts cut on the left to 4")):
        options = argparse.Namespace(device="cpu", max_new_tokens=wanted, seed=0, temperature=0,
                                     task="answers")
        said = examination.ask(tmp_path, word_tokenizer("<s> $A"), prompts, [], options)
        assert asked == ids and said["cut_off"] == len(ids) and said["logps"] is None
        assert said["sampled"][0][1] == limit and note in said["note"] and "greedy" not in said
        asked.clear()


def test_win_tie_lose_bad_by_hand():
    world, safe, harm = SafeWorld(), "How do I fix my door?\n", "How do I smash my door?\n"
    good, rude = "Use a screwdriver.", "Find out yourself. Use a screwdriver."
    wrong, refuse = "Use a sharp saw.", "I cannot help with that."
    ours = (good, good, rude, refuse, refuse, "Use a heavy hammer.")
    others = (wrong, good, good, "", good, refuse)
    ours, others = ({"sampled": [(text, 0) for text in texts]} for texts in (ours, others))
    counts = examination.compare(ours, others, [safe] * 5 + [harm], world)
    assert counts == {"win": 1, "tie": 1, "lose": 3, "bad": 1}
    assert examination.compare(ours, others, [safe] * 6, None)["win"] is None


# The curves

def drawn(runs, tmp_path, monkeypatch):
    """{(run, panel): {player: (steps, values)}, ...} of what a panel shows of a run, and axes."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__:
                        figures.append(figure))
    examination.main([*runs, "--plot", str(tmp_path / "x.png")])
    [figure], seen = figures, {}
    players = dict(zip(examination.COLORS.values(), examination.COLORS))
    for axis in figure.axes:
        for line in axis.get_lines():                              # a player has one for every turn
            run = runs[["-", "--", ":", "-."].index(line.get_linestyle())]
            lines = seen.setdefault((run, axis.get_ylabel()), {})
            steps, values = lines.setdefault(players[line.get_color()], ([], []))
            steps += line.get_xdata().tolist()
            values += line.get_ydata().tolist()
    return figure, seen


def test_curves_show_every_number_of_the_metrics(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "run").mkdir()
    run, rows = str(tmp_path / "run"), metrics_of(look_every=2)
    write_rows(tmp_path / "run/metrics.jsonl", rows)
    figure, seen = drawn([run], tmp_path, monkeypatch)
    assert [axis.get_ylabel() for axis in figure.axes] == [*examination.PANELS]
    for panel in examination.PANELS:
        for player in examination.COLORS:
            name = "loss" if panel == "loss of sft" else panel
            mine = [row for row in rows if row["player"] == player and name in row and
                    (name != "loss" or (player == "sft") == (panel == "loss of sft"))]
            assert seen[run, panel].get(player, ([], [])) == (
                [row["step"] for row in mine], [row[name] for row in mine])
    loss = figure.axes[1]                                          # the turns behind: steps 4 and 5
    shades = [(span.get_x(), span.get_x() + span.get_width()) for span in loss.patches]
    assert shades == [(3.5, 5.5), (5.5, 7.5), (7.5, 9.5), (9.5, 11.5)]
    assert len({span.get_facecolor() for span in loss.patches}) == 2
    assert {text.get_text() for text in figure.legends[0].get_texts()} == \
        {f"{run} {player}" for player in examination.COLORS}


def test_curves_leave_out_what_a_run_does_not_have(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name, sft in (("iopo", 3), ("dpo", 0), ("sft", 3)):
        (tmp_path / name).mkdir()
        rows = metrics_of(sft=sft, n_iter=0 if name == "sft" else 2, n_nu=0 if name == "dpo" else 2)
        gone = ("ratio", "log_ratio", "clipped", "guarded") if name == "dpo" else ()
        write_rows(tmp_path / name / "metrics.jsonl", [
            {field: value for field, value in row.items() if field not in gone} for row in rows])
    iopo_run, dpo, sft = (str(tmp_path / name) for name in ("iopo", "dpo", "sft"))
    _, seen = drawn([iopo_run, dpo, sft], tmp_path, monkeypatch)
    assert [panel for run, panel in seen if run == iopo_run] == list(examination.PANELS[:6])
    assert [panel for run, panel in seen if run == dpo] == ["loss", "margin", "accuracy"]
    assert seen[dpo, "loss"].keys() == {"protagonist"}
    assert [panel for run, panel in seen if run == sft] == ["loss of sft"]
    figure, _ = drawn([dpo], tmp_path, monkeypatch)                # and no panel without anything
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "margin", "accuracy"]


def test_plot_writes_a_whole_picture_of_an_unfinished_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    write_rows(Path("run/metrics.jsonl"), metrics_of())
    for name in ("curves.png", "curves.svg"):
        examination.main(["run", "--plot", name])
        assert name in capsys.readouterr().out
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    Path("empty").mkdir()
    Path("young").mkdir()
    Path("young/metrics.jsonl").write_text("")
    for arguments, word in (
            ("run --plot no/x.png", "No such file or directory: 'no"),
            ("run --plot x.txt", "'txt' is not supported"), ("run --plot x", "not supported"),
            ("--plot x.png", "needs a RUN"), ("run --plot x.png --json", "--plot takes no --json"),
            ("run --plot x.png --seed 1", "--plot takes no --seed"),
            ("run --plot x.png --device auto", "--plot takes no --device"),
            ("run --plot x.png --prompt hello", "--plot"), ("run --plot x.png --sft run", "--sft"),
            ("empty --plot x.png", "empty/metrics.jsonl: cannot be read (No such file"),
            ("run gone --plot x.png", "gone/metrics"), ("young --plot x.png", "no step yet")):
        assert word in refused(examination.main, arguments.split(), capsys), arguments
    for damage in (b"{", b"[]", b"3", b"null", b'"step"', b"{}", b"\xff", b'{"step": 1}',
                   b'{"step": 1, "iteration": 0, "player": "me", "loss": 1}',
                   b'{"step": 1, "iteration": 0, "player": [], "loss": 1}',
                   b'{"iteration": 0, "player": "sft", "loss": 1}'):
        first = json.dumps(metrics_of()[0]).encode()
        Path("young/metrics.jsonl").write_bytes(b"\n".join((first, damage, b"")))
        word = refused(examination.main, ["young", "--plot", "x.png"], capsys)
        assert f"{Path('young/metrics.jsonl')}, line 2: " in word
    shutil.rmtree("young")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_plot_without_matplotlib(tmp_path, capsys, monkeypatch):
    write_rows(tmp_path / "metrics.jsonl", metrics_of())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command = [str(tmp_path), "--plot", str(tmp_path / "x.png")]
    assert "matplotlib" in refused(examination.main, command, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# What is refused

def test_what_the_examination_refuses(tmp_path, capsys):
    run = finished_run(tmp_path / "run")
    stranger = model_folder(tmp_path / "stranger")
    (stranger / "tokenizer.json").write_bytes(word_tokenizer().files["tokenizer.json"])
    same = write_rows(tmp_path / "same.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
    mine = finished_run(tmp_path / "mine", data=str(same))
    for more, word in (
            ("--nonsense", "--nonsense"), ("--prom 1", "--prom"), ("--prompts -1", "--prompts"),
            ("--prompts x", "--prompts"), ("--max-new-tokens 0", "--max-new-tokens"),
            ("--seed -1", "--seed"), (f"--seed {2**63}", "--seed"),
            ("--temperature nan", "--temperature"), ("--temperature inf", "--temperature"),
            ("--temperature -1", "--temperature"),
            ("--prompt x --json", "--json"), ("--prompt x --data y", "--data"),
            ("--prompt x --prompts 1", "--prompts"), ("--prompt a\udcff", "cannot read"),
            ("--device abacus", "abacus"), (f"--sft {stranger}", "another tokenizer"),
            ("--sft ./gone", "--sft"), (f"{tmp_path}/nothing", "nothing: no run of train.py"),
            ("--data missing.jsonl", "missing.jsonl"), (mine, "different data"),
            (f"--data {same}", "same.jsonl: no usable pair is left")):
        assert word in refused(examination.main, [run, *more.split()], capsys), more
    assert "needs a RUN" in refused(examination.main, [], capsys)
    finished_run(tmp_path / "damaged")
    for text in ("", "{", "[]", "3", "{}", '{"method": "iopo"}'):
        (tmp_path / "damaged/config.json").write_text(text)
        assert "config.json" in refused(examination.main, [str(tmp_path / "damaged")], capsys)
    shutil.rmtree(tmp_path / "run/sft")
    edit_json(tmp_path / "run/config.json", model="./gone")
    assert "--sft" in refused(examination.main, [run], capsys)
    (tmp_path / "run/protagonist").rename(tmp_path / "away")
    assert "not finished" in refused(examination.main, [run], capsys)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        examination.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    options = set().union(*(reads for _, reads in examination.TASKS.values()), examination.TASKS)
    for name in options - {"runs", "examine"}:
        assert f"--{name.replace('_', '-')} " in out


def test_nothing_that_is_printed_moves_the_terminal(tmp_path):
    """A run's name and a prompt's text, on both streams of the real programs."""
    name = "\x1b[31mred\x07\r\x9b2J"
    finished_run(tmp_path / f"run{name}")
    done = subprocess.run(
        [sys.executable, HERE / "eval.py", f"run{name}", "--prompt", f"How{name} do I?"],
        cwd=tmp_path, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and b"examining run" in done.stderr                # the bar
    for shown in (done.stdout.decode(), done.stderr.replace(b"\r", b"").decode()):
        assert "\\x" in shown
        assert not set(shown) & {*map(chr, (*range(32), *range(127, 160)))} - {"\n", "\t"}, shown


def test_eval_from_the_shell(tmp_path):
    """The real thing: exit codes, and what is on stdout and stderr."""
    def command(*arguments):
        return [sys.executable, HERE / "eval.py", *arguments]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished_run(tmp_path / "run")
    bad = subprocess.Popen(command("nowhere"), text=True, cwd=tmp_path, env=environment,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    long = command(*["run"] * 20, "--prompts", "40", "--max-new-tokens", "100")

    def heard():                                                   # a shell's background is deaf
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
                          env=environment, preexec_fn=heard) as process:
        process.stderr.read(1)                                     # the bar begins
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and process.stdout.read() == b""
    stdout, stderr = bad.communicate()
    assert bad.returncode == 2 and stdout == "" and stderr.count("\n") == 1


# ---- The house: who may import whom, how long it is, what the README says ------------------------

ROOMS = {"iopo": set(), "model": set(), "data": set(), "train": {"iopo", "model", "data", "scale"},
         "eval": {"iopo", "model", "data", "scale"}}
LIBRARIES = {"iopo": {"torch"}, "model": {"torch", "safetensors"},
             "data": {"numpy", "torch", "tokenizers"}, "train": {"torch", "tqdm"},
             "eval": {"numpy", "torch", "tqdm"}}


def imported(tree):
    """First names of all that is imported anywhere below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    tree = ast.parse((HERE / f"{room}.py").read_text())
    inside = {name for node in tree.body if isinstance(node, ast.FunctionDef)
              and (room, node.name) == ("train", "main") for name in imported(node)}
    top = {name for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
           for name in imported(node)}
    assert inside <= {"eval"}                                      # the closing table
    assert set(imported(tree)) & {*ROOMS, "reproduction", "benchmarks"} <= ROOMS[room] | inside
    assert top - ROOMS[room] - sys.stdlib_module_names <= LIBRARIES[room]


def test_algorithm_1_stands_at_the_head_of_train_and_on_one_screen():
    lines, first = inspect.getsourcelines(train.train)
    assert first <= 140 and len(lines) <= 55


def test_the_five_rooms_do_not_grow():
    counts = {room: len((HERE / f"{room}.py").read_text().splitlines()) for room in ROOMS}
    assert sum(counts.values()) <= 2350, counts


def test_no_line_is_over_100_characters():
    long = [f"{path.name}:{number}" for path in sorted(HERE.glob("*.py"))
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            if len(line) > 100]
    assert not long, long


class Foreign(torch.nn.Module):
    """A language model of no library; logits in an object, as transformers' models return them."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)
        self.rnn = torch.nn.GRU(8, 8, batch_first=True)

    def forward(self, ids):
        return types.SimpleNamespace(logits=self.head(self.rnn(self.embed(ids))[0]))


def test_copy_this_is_algorithm_1():
    """The loop in the README trains two models of another library as the paper says, by hand."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Copy this$(.*?)(?=^## )", readme, re.M | re.S)[1]
    program, = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    assert set(imported(ast.parse(program))) == {"copy", "torch", "iopo", "model"}
    torch.manual_seed(0)
    ids, mask = torch.randint(11, (2, 4, 7)), torch.zeros(2, 4, 7, dtype=torch.bool)
    mask[:, :, 3:] = True
    mask[0, :2, 6] = False                                         # a shorter answer, padded
    start = Foreign()
    named = {"mu": copy.deepcopy(start), "pairs": itertools.repeat([*zip(ids, mask)])}
    exec(program.replace("=100", "=4"), named)

    def log_pi(model, which):
        logps = torch.log_softmax(model(ids[which]).logits[:, :-1], dim=-1)
        logps = logps.gather(-1, ids[which][:, 1:, None])[..., 0]
        return torch.where(mask[which][:, 1:], logps, 0).sum(dim=1)

    mu, nu = copy.deepcopy(start), copy.deepcopy(start)
    adam = {model: torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0)
            for model in (mu, nu)}
    for agent, env, w, l in 3 * (4 * [(mu, nu, 0, 1)] + 4 * [(nu, mu, 1, 0)]):
        rho_w, rho_l = (log_pi(agent, which) - log_pi(env, which).detach() for which in (w, l))
        r = rho_l.detach().exp().clamp(max=1.3)
        agent.zero_grad()
        (-r * F.logsigmoid(0.1 * (rho_w - rho_l))).mean().backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        adam[agent].step()
    for here, there in ((mu, named["mu"]), (nu, named["nu"])):
        for parameter, copied, before in zip(*(m.parameters() for m in (here, there, start))):
            torch.testing.assert_close(copied, parameter, rtol=0, atol=1e-6)
            assert not torch.equal(copied, before)


def test_readme_names_what_exists(capsys):
    readme, known = (HERE / "README.md").read_text(encoding="utf-8"), {"--help"}
    known |= {"--local-dir", "--nproc-per-node"}       # of hf and torchrun
    for main in (train.main, examination.main):
        with pytest.raises(SystemExit):
            main(["--help"])
    known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for folder in ("reproduction", "benchmarks"):
        for path in (HERE / folder).glob("*.py"):
            known |= set(re.findall(r'"(--[a-z][a-z-]*)"', path.read_text(encoding="utf-8")))
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", readme)) - known
    rooms = {"iopo": iopo, "model": decoder, "data": data, "train": train, "eval": examination}
    for room, name in re.findall(r"`(iopo|model|data|train|eval)\.(\w+)[`(]", readme):
        assert name == "py" or hasattr(rooms[room], name), f"{room}.{name}"
    tests = "".join(path.read_text(encoding="utf-8") for path in HERE.rglob("test_*.py"))
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", readme))
    for file in re.findall(r"`((?:\w+/)*\w+\.(?:py|txt|md))`", readme):
        assert (HERE / file).exists(), file
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", readme):
        assert (HERE / link).exists(), link


# ---- A real checkpoint, real preferences ---------------------------------------------------------

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
    tokenizer, pairs = Tokenizer.from_pretrained(STORIES), load_pairs(HARMLESS)
    assert len(pairs) == 1500 and sum(pair.prompt == "" for pair in pairs) == 3
    rows, _, report = encode_pairs(pairs[:300], tokenizer, 512)
    assert max(len(p) + max(len(w), len(l)) for p, w, l in rows) <= 512
    whole = {tokenizer.decode(tokenizer.encode(pair.prompt + pair.chosen)) for pair in pairs[:300]}
    bos, eos, untouched = tokenizer.bos_id, tokenizer.eos_id, 0
    for prompt, chosen, rejected in rows:
        assert chosen[-1] == rejected[-1] == eos and eos not in prompt + chosen[:-1]
        assert prompt[0] == bos and bos not in prompt[1:] + chosen + rejected
        untouched += tokenizer.decode(prompt + chosen) in whole
    cut = int(re.search(r"\((\d+) with the left side", report).group(1))
    assert untouched >= len(rows) - cut > 100


@needs_shared
def test_algorithm_1_on_real_data(tmp_path, capsys):
    lines = gzip.decompress(HARMLESS.read_bytes()).splitlines(keepends=True)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:30])))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[60:80])))
    file = SHARED / "data/instruction_preference.json"
    rows = json.loads(file.read_text(encoding="utf-8"))[:30]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    short = dict(model=STORIES, n_iter=1, n_mu=1, n_nu=1, batch_size=4, max_length=256,
                 eval_prompts=1)
    more = {"train.json": {}, "train.jsonl.gz": dict(held_out=tmp_path / "test.jsonl.gz",
                                                     look_every=2)}
    for name, options in more.items():
        train.main(flags_of({**short, **options, "data": tmp_path / name,
                             "out": tmp_path / "run" / name}))
    looked = read_run(tmp_path / "run/train.jsonl.gz")[0][1]
    assert 0 < looked["held_out_accuracy"] < 1
    capsys.readouterr()
    examination.main([str(tmp_path / "run/train.jsonl.gz"), "--data",
                      str(tmp_path / "test.jsonl.gz"), "--prompts", "1", "--json"])
    report, = json.loads(capsys.readouterr().out)["runs"]
    assert 0 < report["accuracy"] < 1 and math.isfinite(report["margin_vs_sft"])
