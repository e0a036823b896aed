"""Proof of the bill: against what PyTorch keeps of a pass and what a trained job holds."""

import dataclasses
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import eval as examination
import model as decoder
import train
from data import PairBatch, batches
from model import Decoder, DecoderConfig, response_logps
from scale import plan
from scale.test_scale import adapted, make_base, refused, run, small_world          # noqa: F401

ROWS = [tuple([random.Random(7 * number + which).randrange(90) for _ in range(length)]
              for which, length in enumerate((30, 25, 20))) for number in range(5)]


def shape(layers=2, **more):
    return DecoderConfig(100, 64, 160, layers, 4, 2, 16, **more)


def kept(model, view, dtype):
    """Bytes that autograd keeps of a forward pass beside the weights and the masks; of bfloat16
    copies of weights too."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {parameter.shape for parameter in model.parameters()}
    batch, seen = PairBatch.from_ids(ROWS), {}
    masks = {mask.shape for mask in batch.masks}

    def keep(tensor):
        storage = tensor.untyped_storage()
        copy = tensor.shape in shapes or tensor.T.shape in shapes if tensor.dim() == 2 else False
        if storage.data_ptr() not in weights and tensor.shape not in masks and not copy:
            seen[storage.data_ptr()] = storage         # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        response_logps(view, batch)
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("options", (
    {}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}, {"lora_rank": 4},
    {"lora_rank": 4, "dtype": "bfloat16"},
    {"lora_rank": 4, "backbone_dtype": "bfloat16", "dtype": "bfloat16"}))
def test_activations_are_what_autograd_keeps(options):
    """Of two more layers, so that neither the last layer nor the vocabulary matters."""
    measured, billed, config = [], [], train.Config(model="x", **options)
    for layers in (3, 5):
        model = Decoder(shape(layers)).to(getattr(torch, config.backbone_dtype))
        model.gradient_checkpointing = config.gradient_checkpointing
        view = adapted(model, config.lora_rank)[0] if config.lora_rank else model
        measured.append(kept(model, view, config.dtype))
        billed.append(plan.passing(plan.Sizes(shape(layers), config), config, ROWS, "cpu")[0])
    tokens = PairBatch.from_ids(ROWS).input_ids.numel() / plan.tokens(ROWS)     # the last is none
    assert (billed[1] - billed[0]) * tokens == pytest.approx(measured[1] - measured[0], rel=0.04)


@pytest.mark.parametrize("options", ({}, {"lora_rank": 3}, {"n_nu": 0}))
def test_weights_moments_and_gradient_are_what_a_job_holds(tmp_path, options):
    make_base(tmp_path)
    if options.get("lora_rank"):
        pytest.importorskip("peft")
    config = train.make_config({"model": str(tmp_path), "data": None, "batch_size": 4, **options})
    job = train.prepare(config)
    mu, nu = (job.players[name] for name in ("protagonist", "adversary"))
    for agent, env in ((mu, nu), (nu, mu))[:2 if config.n_nu else 1]:
        train.optimizer_step(agent, env, next(agent.pairs), config)
    found = plan.bill(mu.model.config, config, mu.rows[:4])
    parameters = {parameter for player in (mu, nu) for parameter in (
        player.model.decoder if config.lora_rank else player.model).parameters()}
    assert found["weights"] == sum(parameter.nbytes for parameter in parameters)
    assert found["moments"] == sum(state[name].nbytes for player in (mu, nu) for state in
                                   player.optimizer.state.values()
                                   for name in ("exp_avg", "exp_avg_sq"))
    trained = sum(parameter.nbytes for parameter in mu.model.parameters())
    passes = plan.bill(mu.model.config, dataclasses.replace(config, micro_tokens=1), mu.rows[:4])
    assert passes["gradient"] == trained


@pytest.mark.parametrize("options", ({}, {"lora_rank": 4}, {"gradient_checkpointing": True}))
def test_seconds_are_the_products_of_a_step(options):
    """As PyTorch counts them, without attention; the adapters' own and the last feed-forward of
    prompts make the difference."""
    small, config = shape(8), train.Config(model="x", batch_size=10, **options)
    model = Decoder(small)
    model.gradient_checkpointing = config.gradient_checkpointing
    view = adapted(model, config.lora_rank)[0] if config.lora_rank else model
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            response_logps(view, PairBatch.from_ids(ROWS))
        sum(response_logps(view, PairBatch.from_ids(ROWS))).sum().backward()
    made = sum(count for kind, count in counter.get_flop_counts()["Global"].items()
               if kind in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm))
    rate = 1e9
    assert plan.seconds(plan.Sizes(small, config), config, ROWS, rate) * rate / 2 == \
        pytest.approx(2 * made, rel=0.15)              # 10 pairs of a step, 5 rows


def test_the_largest_step_and_what_rests():
    rows = [([0] * length, [0], [0]) for length in range(1, 21)]
    config = train.Config(model="x", batch_size=5, n_iter=1, n_mu=4, n_nu=2)
    steps = [next(batches(rows, 5, 0, start=number)) for number in range(4)]
    assert plan.largest_step(config, rows) == max(steps, key=plan.tokens) != steps[0]
    plain, offloaded = (plan.bill(shape(), dataclasses.replace(config, offload_resting=rests), ROWS)
                        for rests in (False, True))
    assert plain["moments"] == 2 * offloaded["moments"] > 0
    assert plan.bill(shape(), config, ROWS, 2)["together"] > plain["together"] == 0


def test_what_the_closing_table_keeps(monkeypatch):
    """A whole model, and keys and values of three prompts of 30 tokens and their answers."""
    small, config = shape(3), train.Config(model="x", lora_rank=4, eval_prompts=3)
    seen, model, spied = {}, Decoder(small), decoder.attention

    def spy(q, k, v, mask):
        seen[len(seen)] = k.nbytes + v.nbytes
        return spied(q, k, v, mask)

    monkeypatch.setattr(decoder, "attention", spy)
    decoder.generate(model, [list(range(30))] * 3, 48, 0, eos_id=[])
    kept, weights = sum([*seen.values()][-3:]), sum(p.nbytes for p in model.parameters())
    none = dataclasses.replace(config, eval_prompts=0)
    most, least = (plan.closing_table(small, one, ROWS) for one in (config, none))
    assert most - least == pytest.approx(kept, rel=0.02)
    assert weights < least - plan.PROCESS["cpu"] < 1.1 * weights + 4e6


def test_plan_prints_the_bill_and_writes_nothing(tmp_path, capsys):
    make_base(tmp_path / "base")
    with pytest.raises(SystemExit) as stop:
        run("--model", tmp_path / "base", "--out", tmp_path / "out", "--plan")
    lines = capsys.readouterr().out.splitlines()
    assert not stop.value.code and not (tmp_path / "out").exists()
    assert any(line.startswith("as asked") and " yes " in line for line in lines)
    assert any(line.startswith("--lora-rank 16") for line in lines)
    assert not any(line.startswith("--offload-resting") for line in lines)      # not on a CPU
    assert lines[-1].startswith("the closing table, in one process")


def test_a_plan_offers_what_would_run():
    """Of torchrun's processes as many as there are, and nothing that is refused."""
    def names(processes=1, kind="cuda", **options):
        config = train.Config(model="x", sft_steps=0, **options)
        return {name: (other, count) for name, other, count in plan.ways(config, processes, kind)}

    assert {count for _, count in names(processes=2).values()} == {2}
    assert "torchrun, 8 processes" in names() and "torchrun, 8 processes" not in names(2)
    assert "torchrun, 8 processes" not in names(batch_size=12)
    assert all(other.method == "kto_pair" and count == 1
               for other, count in names(method="kto_pair").values())
    assert "--offload-resting" in names() and "--offload-resting" not in names(kind="cpu")


def test_what_cannot_fit_is_refused_unless_anyway(tmp_path, capsys, monkeypatch):
    make_base(tmp_path / "base")
    given = ["--model", tmp_path / "base", "--out", tmp_path / "out", "--n-iter", 1, "--n-mu", 1,
             "--n-nu", 1, "--eval-prompts", 0]
    monkeypatch.setattr(plan, "memory", lambda device: 1e8)
    error = refused(train.main, given, capsys)
    assert "0.4 GB and 0.1 GB are free here (cpu)" in error and "--anyway" in error
    assert not (tmp_path / "out").exists()
    run(*given, "--anyway")
    assert (tmp_path / "out/protagonist").is_dir()
    monkeypatch.setattr(plan, "memory", lambda device: None)           # unknown: not refused
    run(*given[:3], tmp_path / "other", *given[4:])


def test_memory_that_is_short_is_a_sentence(tmp_path, capsys, monkeypatch):
    """In the training, and in the closing table, when both players are saved."""
    make_base(tmp_path / "base")
    given = ["--model", tmp_path / "base", "--n-iter", 1, "--n-mu", 1, "--n-nu", 1, "--out"]

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for program, place, name in (("train.py", train, "optimizer_step"),
                                 ("eval.py", examination, "pair_logps")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(place, name, full)
            run(*given, tmp_path / program)
        assert stop.value.code == 2
        assert f"{program}: CUDA out of memory." in capsys.readouterr().err
        assert (tmp_path / program / "adversary").exists() == (program == "eval.py")


def test_memory_is_less_than_the_machine_has():
    if (free := plan.memory(torch.device("cpu"))) is not None:
        assert 1e8 < free < 1e14


def test_offloading_is_refused_where_there_is_nowhere_to_go(tmp_path, capsys):
    make_base(tmp_path / "base")
    given = ["--model", tmp_path / "base", "--out", tmp_path / "out", "--device", "cpu"]
    for more in ([], ["--plan"]):
        assert "--offload-resting needs a GPU" in refused(
            train.main, [*given, "--offload-resting", *more], capsys)
    assert not (tmp_path / "out").exists()


def test_bills_of_gpus_that_are_not_here(capsys, monkeypatch):
    monkeypatch.setattr(plan.sys, "argv", ["plan", "7B", "--dtype", "bfloat16"])
    plan.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["fits", "into"] and len(lines) > 6
    parameters = plan.Sizes(plan.SHAPES["7B"], train.Config()).whole
    assert f"{8 * parameters / 1e9:.2f}" in lines[1].split()           # two models, float32
