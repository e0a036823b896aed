"""Proof of scale/: adapters and shards. What needs peft or transformers says so when skipped."""

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as examination
import train
from data import PairBatch, SafeWorld
from model import Decoder, DecoderConfig, response_logps

torch.set_num_threads(1)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16, max_position_embeddings=128)
ROWS = [([5, 6, 7], [8, 9, 1], [10, 1]), ([5, 11], [12, 1], [13, 14, 15, 1])]
TURNS = "--n-iter 2 --n-mu 3 --n-nu 3 --lr 1e-2 --batch-size 4 --eval-prompts 0"


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    monkeypatch.setattr(train, "WORLD_PAIRS", 60)
    monkeypatch.setattr(train, "LOOKED_AT", 20)
    monkeypatch.setattr(examination, "EXAM_PAIRS", 20)


def make_base(folder, **more):
    """A random model of the safe world, with weights large enough that layers matter."""
    torch.manual_seed(1)
    world = SafeWorld.tokenizer()
    model = Decoder(DecoderConfig(vocab_size=world.largest_id + 1, eos_token_id=world.eos_id,
                                  bos_token_id=world.bos_id, **SMALL, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() == 2 else 1.0)
    model.save_pretrained(folder)
    world.save(folder)
    return model


def adapted(decoder, rank=3, base="base", random=True):
    """Two views of a decoder; `random`: with B that are not 0."""
    pytest.importorskip("peft")
    from scale import lora
    config = train.Config(model=str(base), lora_rank=rank)
    views = lora.adapters(decoder, config)
    for number, view in enumerate(views if random else []):
        torch.manual_seed(10 + number)
        for name, parameter in view.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return views


def updates(view):
    """{name of W: 2 B A}, by hand."""
    named = dict(view.named_parameters())
    return {name.replace(".lora_A", ".weight"): 2 * named[name.replace("_A", "_B")].detach() @ A
            for name, A in view.state_dict().items() if name.endswith("_A")}


def added(model, view):
    """A copy of a plain model with a view's updates added to its weights."""
    model, found = copy.deepcopy(model), updates(view)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += found.pop(name, 0.0)
    assert not found
    return model


def run(*arguments):
    train.main([*map(str, arguments)])


def refused(function, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        function([*map(str, arguments)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1, error
    return error


# ---- Adapters on one backbone --------------------------------------------------------------------

def test_both_players_start_as_the_backbone_to_the_last_bit():
    plain = Decoder(DecoderConfig(vocab_size=20, **SMALL))
    batch = PairBatch.from_ids(ROWS)
    before = torch.stack(response_logps(plain, batch))
    mu, nu = adapted(copy.deepcopy(plain), random=False)
    for view in (mu, nu):
        assert torch.equal(torch.stack(response_logps(view, batch)), before)


def test_first_adapters_are_pefts_by_the_seed():
    """A is uniform within 1 / sqrt(in), B is 0."""
    from scale import lora
    view, _ = adapted(Decoder(DecoderConfig(vocab_size=20, **SMALL)), random=False)
    some, others = (lora.first_weights(view, seed) for seed in (0, 1))
    for name, value in some.items():
        if name.endswith("_B"):
            assert not value.any()
        else:
            most = value.shape[1] ** -0.5
            assert 0.9 * most < value.abs().max() <= most and not torch.equal(value, others[name])


def test_an_adapter_is_w_plus_two_b_a():
    """Log-probabilities and gradients of both views, against plain models whose weights are
    W + 2 B A: with G the gradient there, B has 2 G A^T and A has 2 B^T G."""
    plain = Decoder(DecoderConfig(vocab_size=20, **SMALL))
    batch = PairBatch.from_ids(ROWS)
    views = adapted(copy.deepcopy(plain))
    for view in (*views, *views):                      # also after the other one has been used
        model = added(plain, view)
        expected, found = (sum(response_logps(which, batch)).sum() for which in (model, view))
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        expected.backward()
        found.backward()
        full, named = {name: parameter.grad for name, parameter in model.named_parameters()}, \
            dict(view.named_parameters())
        for name, A in named.items():
            if name.endswith("_A"):
                B, G = named[name.replace("_A", "_B")], full[name.replace(".lora_A", ".weight")]
                torch.testing.assert_close(B.grad, 2 * G @ A.T, rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(A.grad, 2 * B.T @ G, rtol=1e-3, atol=1e-5)
        for parameter in view.parameters():
            parameter.grad = None
        others = [parameter for other in views if other is not view
                  for parameter in other.parameters()]
        assert all(parameter.grad is None for parameter in others)
    assert all(parameter.grad is None for name, parameter in views[0].decoder.named_parameters()
               if "lora" not in name)


@pytest.mark.parametrize("tied", (False, True))
def test_every_projection_but_the_head_is_adapted(tied):
    """Each B alone changes what the model says: none is passed by."""
    decoder = Decoder(DecoderConfig(vocab_size=20, tie_word_embeddings=tied, **SMALL))
    linear = {name for name, module in decoder.named_modules()
              if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    mu, _ = adapted(decoder, random=False)
    named, batch = dict(mu.named_parameters()), PairBatch.from_ids(ROWS)
    assert {name.rsplit(".", 1)[0] for name in named} == linear and len(linear) == 7 * 2
    before = torch.stack(response_logps(mu, batch))
    for name, parameter in named.items():
        if name.endswith("_B"):
            with torch.no_grad():
                parameter.fill_(0.1)
                assert not torch.equal(torch.stack(response_logps(mu, batch)), before), name
                parameter.zero_()


def test_layers_are_computed_again_under_their_own_adapter():
    """ENV is asked between AGENT's forward and backward pass; gradients stay AGENT's."""
    decoder, batch = Decoder(DecoderConfig(vocab_size=20, **SMALL)), PairBatch.from_ids(ROWS)
    mu, nu = adapted(decoder)
    grads = []
    for again in (False, True):
        decoder.gradient_checkpointing = again
        loss = sum(response_logps(mu, batch)).sum()
        if again:
            with torch.no_grad():
                response_logps(nu, batch)
        loss.backward()
        grads.append([parameter.grad.clone() for parameter in mu.parameters()])
        for parameter in mu.parameters():
            parameter.grad = None
    for plain, recomputed in zip(*grads):
        assert plain.any()
        torch.testing.assert_close(recomputed, plain)
    assert all(parameter.grad is None for parameter in nu.parameters())


def test_a_run_trains_adapters_and_nothing_else(tmp_path):
    """Margin 0 and r 1 at the first step; the pairs, turns and losses of full training; files that
    hold two matrices a projection, of rank R, and no name of a player."""
    pytest.importorskip("peft")
    make_base(tmp_path / "base")
    run("--model", tmp_path / "base", "--out", tmp_path / "a", "--lora-rank", 3, *TURNS.split())
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").open()]
    assert [row["player"] for row in rows] == (["protagonist"] * 3 + ["adversary"] * 3) * 2
    assert rows[0]["margin"] == 0 and rows[0]["ratio"] == 1 and rows[3]["margin"] != 0
    [path] = (tmp_path / "a/checkpoint").iterdir()
    state = torch.load(path, weights_only=True)
    tensors = {}
    for name in ("protagonist", "adversary"):
        weights, moments, steps = state["players"][name]
        assert steps == 6 and all("lora" in name for name in weights)
        assert {moment["exp_avg"].dtype for moment in moments["state"].values()} == {torch.float32}
        tensors[name] = load_file(tmp_path / "a" / name / "adapter_model.safetensors")
        assert len(tensors[name]) == 2 * 7 * 2
        for tensor, value in tensors[name].items():
            assert re.fullmatch(r"base_model\.model\.model\.layers\.\d\.(self_attn|mlp)\."
                                r"\w+_proj\.lora_[AB]\.weight", tensor)
            assert value.shape["lora_B" in tensor] == 3 and value.any()
    assert not any(torch.equal(value, tensors["adversary"][name])
                   for name, value in tensors["protagonist"].items())


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    make_base(tmp_path / "base")
    short = ["--model", tmp_path / "base", "--lora-rank", 2, "--save-every", 2, *TURNS.split()]
    run("--out", tmp_path / "whole", *short)
    step, made = train.optimizer_step, []

    def dies(*arguments):
        made.append(1)
        if len(made) == 8:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(train, "optimizer_step", dies)
    with pytest.raises(SystemExit):
        run("--out", tmp_path / "parts", *short)
    monkeypatch.setattr(train, "optimizer_step", step)
    run("--out", tmp_path / "parts", "--resume")
    for file in ("metrics.jsonl", *(f"{player}/adapter_model.safetensors"
                                    for player in ("protagonist", "adversary"))):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_a_backbone_in_bfloat16(tmp_path):
    pytest.importorskip("peft")
    make_base(tmp_path / "base")
    config = train.make_config({"model": str(tmp_path / "base"), "lora_rank": 2,
                                "dtype": "bfloat16", "backbone_dtype": "bfloat16",
                                "out": "nowhere"})
    job = train.prepare(config)
    for player in (job.players["protagonist"], job.players["adversary"]):
        assert {parameter.dtype for parameter in player.model.parameters()} == {torch.float32}
        assert {parameter.dtype for name, parameter in player.model.decoder.named_parameters()
                if "lora" not in name} == {torch.bfloat16}
    rows = next(job.players["protagonist"].pairs)
    mu, nu = job.players["protagonist"], job.players["adversary"]
    metrics = train.optimizer_step(mu, nu, rows, config)
    assert metrics["margin"] == 0 and metrics["ratio"] == 1 and metrics["grad_norm"] > 0


# ---- Saved players -------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", (False, True))
def test_peft_in_transformers_reads_a_saved_player(tmp_path, tied):
    """Logits of peft on transformers' own Llama, of the folder read here, and of W + 2 B A."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    plain = make_base(tmp_path / "base", tie_word_embeddings=tied)
    mu, _ = adapted(copy.deepcopy(plain), base=tmp_path / "base")
    mu.save_pretrained(tmp_path / "mu")
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "mu")
    here, expected = Decoder.from_pretrained(tmp_path / "mu"), added(plain, mu)
    with torch.no_grad():
        logits = expected(ids)
        assert not torch.allclose(plain(ids), logits, atol=1e-2)
        torch.testing.assert_close(here(ids), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_eval_and_transformers_agree_on_margins(tmp_path, capsys):
    """eval.py on a run of adapters, against peft on transformers' own model."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base = make_base(tmp_path / "base")
    run("--model", tmp_path / "base", "--out", tmp_path / "a", "--lora-rank", 3, *TURNS.split())
    capsys.readouterr()
    examination.main(["--json", str(tmp_path / "a")])
    report = json.loads(capsys.readouterr().out)["runs"][0]["models"]
    tokenizer, pairs = SafeWorld.tokenizer(), SafeWorld().exam_pairs("test", 20)
    for name in ("protagonist", "adversary"):
        model = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            tmp_path / "a" / name)
        margins = []
        for pair in pairs:
            found = []
            prompt, *answers = tokenizer.encode_pair(pair)
            for answer in answers:
                ids = torch.tensor([[*prompt, *answer]])
                with torch.no_grad():
                    for which in (lambda ids: model(ids).logits, base):
                        logps = which(ids)[0].log_softmax(-1)
                        found.append(sum(logps[place - 1, ids[0, place]]
                                         for place in range(len(prompt), ids.shape[1])))
            margins.append(0.1 * ((found[0] - found[1]) - (found[2] - found[3])))
        margins = torch.stack(margins)
        assert report[name]["margin_vs_sft"] == pytest.approx(margins.mean().item(), abs=1e-4)
        assert margins.abs().mean() > 1e-2


def test_w_pack_gets_one_adapter_of_three_times_the_rank(tmp_path):
    """Baichuan2 stacks q, k and v: the saved A and B multiply to the three updates, stacked; peft
    loads them onto a module of that name; and the folder reads back."""
    peft = pytest.importorskip("peft")
    shape = {**SMALL, "num_key_value_heads": 2}
    plain = Decoder(DecoderConfig(vocab_size=20, model_type="baichuan", **shape))
    plain.save_pretrained(tmp_path / "base")
    mu, _ = adapted(copy.deepcopy(plain), base=tmp_path / "base")
    mu.save_pretrained(tmp_path / "mu")
    expected = updates(mu)
    stacked = torch.cat([expected[f"model.layers.1.self_attn.{part}_proj.weight"]
                         for part in "qkv"])
    saved = load_file(tmp_path / "mu/adapter_model.safetensors")
    A, B = (saved[f"base_model.model.model.layers.1.self_attn.W_pack.lora_{which}.weight"]
            for which in "AB")
    assert A.shape == (9, 32) and B.shape == (96, 9)
    torch.testing.assert_close(2 * B @ A, stacked)

    theirs = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList(
        torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({
            "W_pack": torch.nn.Linear(32, 96, bias=False),
            "o_proj": torch.nn.Linear(32, 32, bias=False)}),
            "mlp": torch.nn.ModuleDict({
                "gate_proj": torch.nn.Linear(32, 48, bias=False),
                "up_proj": torch.nn.Linear(32, 48, bias=False),
                "down_proj": torch.nn.Linear(48, 32, bias=False)})}) for _ in range(2))})})
    packed = theirs["model"]["layers"][1]["self_attn"]["W_pack"].weight.detach().clone()
    config = peft.LoraConfig.from_pretrained(tmp_path / "mu")
    config.task_type = None                            # these are modules, not a language model
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "mu", config=config)
    found = model.merge_and_unload()["model"]["layers"][1]["self_attn"]["W_pack"].weight
    torch.testing.assert_close(found.detach() - packed, stacked, rtol=1e-4, atol=1e-6)

    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(Decoder.from_pretrained(tmp_path / "mu")(ids),
                                   added(plain, mu)(ids), rtol=1e-5, atol=1e-5)


def test_a_merged_folder_is_a_plain_model(tmp_path, capsys):
    pytest.importorskip("peft")
    from scale import lora
    plain = make_base(tmp_path / "base")
    mu, _ = adapted(copy.deepcopy(plain), base=tmp_path / "base")
    mu.save_pretrained(tmp_path / "mu")
    SafeWorld.tokenizer().save(tmp_path / "mu")
    lora.main([str(tmp_path / "mu"), str(tmp_path / "merged")])
    shutil.rmtree(tmp_path / "base")                   # it needs neither the base nor peft
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(Decoder.from_pretrained(tmp_path / "merged")(ids),
                                   added(plain, mu)(ids), rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "merged/adapter_config.json").exists()
    assert (tmp_path / "merged/tokenizer.json").is_file()
    assert "exists" in refused(lora.main, [tmp_path / "mu", tmp_path / "merged"], capsys)
    assert "base" in refused(lora.main, [tmp_path / "mu", tmp_path / "b"], capsys)
    assert not (tmp_path / "b").exists()


# ---- Several processes ---------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import eval, train
from scale import shard
train.WORLD_PAIRS, train.LOOKED_AT, eval.EXAM_PAIRS = 60, 20, 20
made, original = [], train.optimizer_step

def step(*arguments):
    made.append(1)
    if len(made) == int(os.environ.get("DIES_AT", 0)) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if len(made) == int(os.environ.get("TOLD_AT", 0)) and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    if len(made) == int(os.environ.get("ALL_TOLD_AT", 0)) and os.environ["RANK"] == "1":
        os.kill(os.getppid(), signal.SIGTERM)
    return original(*arguments)

def refuses(*arguments):
    raise ValueError("own.jsonl: is not there")

train.optimizer_step = step
if os.environ["RANK"] == "1":
    train.WORLD_PAIRS += int(os.environ.get("READS_MORE", 0))
    train.prepare = refuses if "REFUSES" in os.environ else train.prepare
shard.main()
"""


def torchrun(*arguments, **more):
    """(exit code, standard error) of train.py under torchrun, in the small world."""
    return end_of(begin(*arguments, **more))


def begin(folder, processes, *arguments, script=None, **environment):
    if script is None:
        script = folder / "driver.py"
        script.write_text(DRIVER.format(root=str(ROOT)))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), str(script), *map(str, arguments)], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def end_of(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def steps_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def far(one, other, file):
    """The largest difference of any weight of both players."""
    gaps = []
    for name in ("protagonist", "adversary"):
        ours, theirs = (load_file(folder / name / file) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        gaps += [(ours[part] - theirs[part]).abs().max().item() for part in ours]
    return max(gaps)


def test_every_process_has_as_many_passes_and_every_row_is_seen_once():
    rng = random.Random(0)
    for _ in range(200):
        processes = rng.choice([1, 2, 3, 4])
        rows = [tuple([number] * rng.randint(1, 40) for _ in range(3))
                for number in range(processes * rng.randint(1, 6))]
        from scale import shard
        found = shard.shares(rows, processes, rng.choice([1, 60, 200, 10**6]))
        assert len(found) == processes and len({*map(len, found)}) == 1
        seen = [row for own in found for some in own for row in some]
        assert sorted(seen) == sorted(rows) and all(some for own in found for some in own)
        assert len({sum(map(len, own)) for own in found}) == 1


@pytest.mark.parametrize("more, file", (
    ("", "model.safetensors"), ("--lora-rank 3", "adapter_model.safetensors")))
def test_two_processes_train_as_one_does(tmp_path, more, file):
    """Losses of 20 steps over turns of both players, and saved weights; then a run that loses a
    process goes on on one and on two, and ends with the same weights."""
    if more:
        pytest.importorskip("peft")
    make_base(tmp_path / "base")
    options = ["--model", tmp_path / "base", *"--n-iter 2 --n-mu 5 --n-nu 5 --lr 2e-5 --batch-size "
               "8 --eval-prompts 0 --micro-tokens 100 --save-every 4 --look-every 5".split(),
               *more.split()]
    run("--out", tmp_path / "one", *options)
    code, errors = torchrun(tmp_path, 2, "--out", tmp_path / "two", *options, DIES_AT="14")
    assert code != 0 and errors.count("a process of this run has died") == 1
    assert len(steps_of(tmp_path / "two")) == 13       # the last checkpoint is step 12's
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    [part, *_] = (tmp_path / "alone/checkpoint/step-12").glob("*.distcp")
    part.write_bytes(bytes([part.read_bytes()[0] ^ 1]) + part.read_bytes()[1:])
    resumed = {name: begin(tmp_path, processes, "--out", tmp_path / name, "--resume")
               for name, processes in (("two", 2), ("alone", 1))}
    for name, process in resumed.items():
        code, errors = end_of(process)
        assert code == 0, errors
        assert ("step-12" in errors and "is damaged; going on from" in errors) == (name == "alone")
        ours, theirs = steps_of(tmp_path / "one"), steps_of(tmp_path / name)
        assert [row["player"] for row in ours] == [row["player"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            for key in ("loss", "margin", "held_out_margin", "grad_norm"):
                assert b.get(key, 0) == pytest.approx(a.get(key, 0), rel=1e-3, abs=1e-4), key
        assert far(tmp_path / "one", tmp_path / name, file) < 1e-5
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "protagonist", "adversary", "checkpoint"}


def test_a_signal_stops_all_processes_at_one_step(tmp_path, capsys):
    """Though only one has heard it, or (with KILLS) torchrun itself; and what torchrun began,
    torchrun alone goes on with."""
    make_base(tmp_path / "base")
    code, errors = torchrun(tmp_path, 2, "--out", tmp_path / "two", "--model", tmp_path / "base",
                            *TURNS.split(), "--n-iter", "30", TOLD_AT="7")
    assert code != 0 and errors.count("stopped; go on by: torchrun") == 1, errors
    assert len(steps_of(tmp_path / "two")) == 7
    if "KILLS" in os.environ:
        code, errors = torchrun(tmp_path, 2, "--out", tmp_path / "two", "--resume", "--lr", "1e-3",
                                ALL_TOLD_AT="2")
        assert code != 0 and errors.count("stopped; go on by: torchrun") == 1, errors
        assert 9 <= len(steps_of(tmp_path / "two")) < 180
        config = json.loads((tmp_path / "two/config.json").read_text())
        assert config["lr_was"] == "0.01 until step 7"
    capsys.readouterr()
    assert "other command;" in refused(train.main, ["--out", tmp_path / "two", "--resume"], capsys)


def test_a_run_of_processes_has_one_writer(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    make_base(tmp_path / "base")
    (tmp_path / "two").mkdir()
    folder = os.open(tmp_path / "two", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    code, errors = torchrun(tmp_path, 2, "--out", tmp_path / "two", "--model", tmp_path / "base",
                            *TURNS.split(), script=ROOT / "train.py")
    os.close(folder)
    said = [line for line in errors.splitlines() if line.startswith("train.py: ")]
    assert code != 0 and len(said) == 1 and "another process writes this run" in said[0], errors
    assert not any((tmp_path / "two").iterdir())


def test_refusals_of_torchrun(monkeypatch, tmp_path):
    from scale import shard
    monkeypatch.setattr(shard.dist, "get_world_size", lambda: 2)
    (tmp_path / "adapter_config.json").touch()
    for options, folder, words in (({"method": "kto_pair"}, None, "kto_pair needs the whole"),
                                   ({"batch_size": 3}, None, "multiple of the 2"),
                                   ({}, tmp_path, "is an adapter itself")):
        with pytest.raises(ValueError, match=words):
            shard.Job.models(train.Config(**options), None, folder)


@pytest.mark.parametrize("how, said", (("REFUSES", "own.jsonl: is not there"),
                                       ("READS_MORE", "do not have the same training pairs")))
def test_what_one_process_finds_wrong_ends_all(tmp_path, how, said):
    make_base(tmp_path / "base")
    code, errors = torchrun(tmp_path, 2, "--out", tmp_path / "two", "--model", tmp_path / "base",
                            *TURNS.split(), **{how: "1"})
    assert code != 0 and errors.count("train.py: ") == errors.count(said) == 1, errors
    assert not (tmp_path / "two").exists()


# ---- What a GPU does, without one ----------------------------------------------------------------

def test_attention_without_a_mask_reads_what_each_token_may(monkeypatch):
    """A loop over sequences stands for the kernel, whose causal queries end with their keys."""
    from scale import attention

    def kernel(q, k, v, q_ends, k_ends, longest_q, longest_k, window_size, enable_gqa=True):
        assert window_size == (-1, 0) and enable_gqa
        assert q_ends[-1] == len(q) and k_ends[-1] == len(k)
        read = torch.full_like(q, torch.nan)
        for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:]):
            assert b - a <= longest_q and d - c <= longest_k
            sees = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            inputs = (some.transpose(0, 1) for some in (q[a:b], k[c:d], v[c:d]))
            read[a:b] = torch.nn.functional.scaled_dot_product_attention(
                *inputs, attn_mask=sees, enable_gqa=True).transpose(0, 1)
        return read

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    torch.manual_seed(0)
    batch = PairBatch.from_ids([*ROWS, ([5], [7], [8]), ([5, 6], [7, 9], None)])
    q, k, v = (torch.randn(1, heads, batch.input_ids.shape[1], 8) for heads in (4, 2, 2))
    read, place = attention.of_pairs(batch, 8)(0, q, k, v), 0
    for (context, *answers) in (([5, 6], [7, 8, 9], [7, 10]), ([5], [11, 12], [11, 13, 14, 15]),
                                ([], [5], [5]), ([5], [6, 7], [])):
        start, place = place, place + len(context)
        seen = [[*range(start, start + number + 1)] for number in range(len(context))]
        for answer in answers:
            seen += [[*range(start, start + len(context)), *range(place, place + number + 1)]
                     for number in range(len(answer))]
            place += len(answer)
        for token, keys in enumerate(seen, start):
            for head in range(4):
                weights = (k[0, head // 2, keys] @ q[0, head, token] / 8 ** 0.5).softmax(dim=0)
                torch.testing.assert_close(read[0, head, token], weights @ v[0, head // 2, keys])
    assert place == len(q[0, 0])
    assert attention.of_pairs(batch, 20) is None       # no kernel has such heads


def test_resting_moments_go_when_the_turn_changes(monkeypatch):
    """`moved` only writes down where a moment is: both places are this machine's memory."""
    from scale import offload
    place, gpu = {}, SimpleNamespace(device=torch.device("cuda"))

    def moved(value, device, parameter=None):
        place[value] = "rests" if parameter is None else "acts"
        assert device == (torch.device("cpu") if parameter is None else parameter.device)
        return value

    def where(optimizer):
        return {place.get(state[name], "new") for state in optimizer.state.values()
                for name in ("exp_avg", "exp_avg_sq")}

    monkeypatch.setattr(offload, "moved", moved)
    players = {}
    for name in ("sft", "protagonist", "adversary"):
        weights = [torch.ones(3, requires_grad=True) for _ in range(2)]
        players[name] = SimpleNamespace(optimizer=torch.optim.AdamW(weights), model=gpu)
    offload.take_turns(players)
    sft, mu, nu = (player.optimizer for player in players.values())

    def step(optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones(3)
        optimizer.step()
        return [where(one) for one in (sft, mu, nu)]

    assert step(sft) == [{"new"}, set(), set()]
    assert step(mu) == [{"rests"}, {"new"}, set()]
    assert step(mu) == [{"rests"}, {"acts"}, set()]
    assert step(nu) == [{"rests"}, {"rests"}, {"new"}]
    assert step(mu) == [{"rests"}, {"acts"}, {"rests"}]
    mu.load_state_dict(mu.state_dict())                # a resumed run's
    assert where(mu) == {"rests"}


# ---- Refusals ------------------------------------------------------------------------------------

def test_refusals(tmp_path, capsys, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    make_base(base)
    for arguments, words in ((["--lora-rank", 2], "--lora-rank needs --model"),
                             (["--lora-rank", 0, "--model", base], "--lora-rank cannot be 0"),
                             (["--lora-rank", 2, "--model", base, "--sft-steps", 5],
                              "--sft-steps 0"),
                             (["--lora-rank", 2, "--model", base, "--backbone-dtype", "bfloat16"],
                              "needs --dtype bfloat16")):
        assert words in refused(train.main, ["--out", out, *arguments], capsys)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        assert "pip install" in refused(
            train.main, ["--out", out, "--lora-rank", 2, "--model", base], capsys)
    assert not out.exists()


def test_damaged_and_foreign_adapters(tmp_path, capsys):
    pytest.importorskip("peft")
    from scale import lora
    base, mu = tmp_path / "base", tmp_path / "mu"
    view, _ = adapted(make_base(base), base=base)
    view.save_pretrained(mu)
    SafeWorld.tokenizer().save(mu)
    assert "plain model" in refused(train.main, ["--out", tmp_path / "out", "--model", mu,
                                                 "--lora-rank", 2], capsys)
    config, weights = ((mu / name).read_bytes() for name in (lora.CONFIG, lora.WEIGHTS))
    tensors = load_file(mu / lora.WEIGHTS)
    first = next(iter(tensors))

    def written(**more):
        (mu / lora.CONFIG).write_text(json.dumps({**json.loads(config), **more}))

    def stored(**more):
        found = {name: more.get("all", value) for name, value in tensors.items()}
        save_file({**found, **more.get("plus", {})}, mu / lora.WEIGHTS)

    cases = [(lambda: (mu / lora.WEIGHTS).write_bytes(weights[:-9]), "is the file whole?"),
             (lambda: (mu / lora.WEIGHTS).unlink(), lora.WEIGHTS),
             (lambda: stored(plus={first: tensors[first] * float("nan")}), first),
             (lambda: stored(plus={first: tensors[first][:1]}), first),
             (lambda: stored(plus={"other": torch.ones(1)}), "other"),
             (lambda: (mu / lora.CONFIG).write_text("{"), lora.CONFIG),
             *((lambda more=more: written(**more), "no adapter that train.py saved")
               for more in ({"use_dora": True}, {"r": None}, {"lora_alpha": 1}, {"bias": "all"},
                            {"peft_type": "IA3"}, {"base_model_name_or_path": None},
                            {"alpha_pattern": {"q_proj": 8}}, {"rank_pattern": {"q_proj": None}},
                            {"use_qalora": True})),
             (lambda: written(base_model_name_or_path=str(tmp_path / "moved")), "is not there")]
    for damage, words in cases:
        (mu / lora.CONFIG).write_bytes(config)
        (mu / lora.WEIGHTS).write_bytes(weights)
        damage()
        assert words in refused(lora.main, [mu, tmp_path / "merged"], capsys)
        assert not (tmp_path / "merged").exists()
    assert "name a player" in refused(lora.main, [base, tmp_path / "merged"], capsys)
