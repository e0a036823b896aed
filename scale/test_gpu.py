"""Proof on a GPU: the same numbers as on a CPU. Skipped where there is none."""

import copy
import random

import pytest
import torch

import train
from data import PairBatch
from model import Decoder, DecoderConfig, generate, response_logps
from scale.test_scale import far, make_base, run, small_world, steps_of, torchrun   # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TURNS = ("--n-iter 2 --n-mu 3 --n-nu 3 --lr 2e-5 --batch-size 4 --eval-prompts 0 --save-every 4 "
         "--look-every 3").split()
SHAPES = {"heads of groups": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=32),
          "heads that flash cannot": dict(num_attention_heads=4, num_key_value_heads=2,
                                          head_dim=20),
          "tied, one group": dict(num_attention_heads=2, num_key_value_heads=1, head_dim=64,
                                  tie_word_embeddings=True),
          "qk_norm": dict(num_attention_heads=4, num_key_value_heads=4, head_dim=16,
                          model_type="qwen3")}


def make_rows(rng, pairs=9, vocabulary=97):
    """Prompts of one token and of many, answers of all lengths, one that is not there."""
    def ids(most):
        return [rng.randrange(vocabulary) for _ in range(rng.randint(1, most))]

    return [([5], [7], [8]), ([5, 6], [7, 9], None)] + [(ids(50), ids(40), ids(40))
                                                         for _ in range(pairs)]


def model_of(shape):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(97, 128, 176, num_hidden_layers=3, **SHAPES[shape]))
    with torch.no_grad():
        for parameter in model.parameters():           # layers matter
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return model


def logps_and_gradient(model, rows, autocast=False):
    batch = PairBatch.from_ids(rows).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        logps = torch.stack(response_logps(model, batch))
    (logps * torch.linspace(-1, 1, logps.numel(), device=logps.device).view_as(logps)).sum() \
        .backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return logps.detach().cpu(), gradient.cpu()


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_says_what_a_cpu_says(shape):
    model, rows = model_of(shape), make_rows(random.Random(1))
    expected = logps_and_gradient(model, rows)
    for one, other in zip(logps_and_gradient(copy.deepcopy(model).cuda(), rows), expected):
        assert apart(one, other) < 1e-5


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_without_a_mask_is_attention_with_one(shape, checkpointing, monkeypatch):
    """In bfloat16: against float32, within its rounding, and no further than a mask is."""
    from scale import attention
    model, rows, used = model_of(shape), make_rows(random.Random(2)), []
    expected = logps_and_gradient(model, rows)
    model = model.cuda()
    model.gradient_checkpointing = checkpointing
    flash = attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **k: used.append(1) or flash(*a, **k))
    without = logps_and_gradient(model, rows, autocast=True)
    calls = 3 * (1 + checkpointing) * (shape != "heads that flash cannot")
    assert len(used) == calls
    monkeypatch.setattr(attention, "of_pairs", lambda *_: None)
    masked = logps_and_gradient(model, rows, autocast=True)
    assert len(used) == calls
    for ours, theirs, right, limit in zip(without, masked, expected, (0.02, 0.1)):
        assert apart(ours, right) < min(limit, 1.5 * apart(theirs, right) + 1e-3)


def test_generation_is_the_same():
    model = model_of("heads of groups")
    prompts = [row[0] for row in make_rows(random.Random(3))]
    answers = generate(model, prompts, 12, 0, eos_id=1)
    assert generate(model.cuda(), prompts, 12, 0, eos_id=1) == answers


@pytest.mark.parametrize("more, near", (
    ("", 1e-4), ("--gradient-checkpointing", 1e-4), ("--lora-rank 3", 1e-4),
    ("--dtype bfloat16", 5e-2), ("--lora-rank 3 --dtype bfloat16 --backbone-dtype bfloat16", 5e-2)))
def test_a_run_on_a_gpu_is_a_run(tmp_path, more, near):
    """Losses of all steps of both players, against a CPU's in float32."""
    if "lora" in more:
        pytest.importorskip("peft")
    make_base(tmp_path / "base")
    for device, options in (("cpu", more.split("--dtype")[0].split()), ("cuda", more.split())):
        run("--model", tmp_path / "base", "--out", tmp_path / device, "--device", device, *TURNS,
            *options)
    for ours, theirs in zip(steps_of(tmp_path / "cuda"), steps_of(tmp_path / "cpu"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=near, abs=near)
        assert ours["margin"] == pytest.approx(theirs["margin"], rel=near, abs=near)
    assert steps_of(tmp_path / "cuda")[0]["margin"] == 0


@pytest.mark.parametrize("file, more", (("model.safetensors", ""),
                                        ("adapter_model.safetensors", "--lora-rank 3")))
def test_resting_moments_are_in_cpu_memory_and_change_nothing(tmp_path, file, more, monkeypatch):
    """Also over a resume, and under torchrun, whose single process is another player's kind."""
    if more:
        pytest.importorskip("peft")
    make_base(tmp_path / "base")
    start = ["--model", tmp_path / "base", *TURNS, *more.split()]
    run(*start, "--out", tmp_path / "plain")
    seen, step = [], train.optimizer_step

    def watched(agent, env, *rest):
        metrics = step(agent, env, *rest)
        seen.append([{state["exp_avg"].device.type for state in player.optimizer.state.values()}
                     for player in (agent, env)])
        return metrics

    monkeypatch.setattr(train, "optimizer_step", watched)
    run(*start, "--offload-resting", "--out", tmp_path / "offloaded")
    assert len(seen) == 12 and seen[:3] == [[{"cuda"}, set()]] * 3
    assert seen[3:] == [[{"cuda"}, {"cpu"}]] * 9
    assert far(tmp_path / "plain", tmp_path / "offloaded", file) < 1e-6
    code, error = torchrun(tmp_path, 1, *start, "--offload-resting", "--out", tmp_path / "sharded")
    assert code == 0, error
    assert far(tmp_path / "plain", tmp_path / "sharded", file) < 1e-5
    seen.clear()

    def stopped(*inputs):
        if len(seen) == 9:                             # the last checkpoint is step 8's
            raise KeyboardInterrupt
        return watched(*inputs)

    monkeypatch.setattr(train, "optimizer_step", stopped)
    with pytest.raises(SystemExit):
        run(*start, "--offload-resting", "--out", tmp_path / "stopped")
    monkeypatch.setattr(train, "optimizer_step", step)
    run("--out", tmp_path / "stopped", "--resume")
    assert far(tmp_path / "plain", tmp_path / "stopped", file) < 1e-6
    for name in ("protagonist", "adversary"):          # what its checkpoint holds is written again
        (tmp_path / "sharded" / name).rename(tmp_path / "sharded" / f"{name}-before")
    code, error = torchrun(tmp_path, 1, "--out", tmp_path / "sharded", "--resume")
    assert code == 0, error
    assert far(tmp_path / "plain", tmp_path / "sharded", file) < 1e-5


def test_one_process_of_torchrun_in_bfloat16(tmp_path):
    make_base(tmp_path / "base")
    start = ["--model", tmp_path / "base", *TURNS,
             "--dtype", "bfloat16"]
    run(*start, "--out", tmp_path / "one")
    code, error = torchrun(tmp_path, 1, *start, "--out", tmp_path / "sharded")
    assert code == 0, error
    for ours, theirs in zip(steps_of(tmp_path / "sharded"), steps_of(tmp_path / "one"),
                            strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-2)
