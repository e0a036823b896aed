"""Proof of guard.py and limits.py: runs that go wrong, files that nobody should have written.

    KILLS=20 python -m pytest scale/test_faults.py        # kill more runs, and more often
"""

import contextlib
import errno
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as examination
import train
from model import generate
from scale import guard, limits
from scale.test_scale import steps_of
from test_iopo import (HERE, LOOKS, QUICK, contents, edit_json, killed, looked, model_folder,
                       no_table, player, read_run, refused, run, same, small_world, tiny_model)

KILLS = int(os.environ.get("KILLS", 1))


# ---- Runs that go wrong --------------------------------------------------------------------------

def test_a_resumed_run_may_go_slower(tmp_path, monkeypatch, capsys, no_table):
    """From its checkpoint on, which config.json says; it is then the run whose rate fell there."""
    with killed("step", 9):
        run(tmp_path / "run", *LOOKS, "--save-every", "4")
    resume, before = ["--out", str(tmp_path / "run"), "--resume"], contents(tmp_path / "run")
    assert "other --lr;" in refused(train.main, [*resume, "--lr", "2e-3"], capsys)
    assert contents(tmp_path / "run") == before
    with killed("step", 2):                                        # before it has saved
        train.main([*resume, "--lr", "5e-4"])
    with killed("step", 2):                                        # so this is no change at all
        train.main([*resume, "--lr", "1e-3"])
    assert lr_of(tmp_path / "run") == (1e-3, None)
    with killed("step", 5):                                        # after it has saved
        train.main([*resume, "--lr", "5e-4"])
    train.main(resume)
    assert lr_of(tmp_path / "run") == (5e-4, "0.001 until step 8")

    original, made = train.optimizer_step, []

    def slower(agent, *arguments):
        made.append(agent)
        for group in agent.optimizer.param_groups if len(made) > 8 else []:
            group["lr"] = 5e-4
        return original(agent, *arguments)

    monkeypatch.setattr(train, "optimizer_step", slower)
    run(tmp_path / "slower", *LOOKS)
    for name in ("protagonist", "adversary"):
        ours, theirs = (read_run(tmp_path / folder, name) for folder in ("run", "slower"))
        assert ours[0] == theirs[0] and same(ours[1], theirs[1])


def lr_of(out):
    config = json.loads((out / "config.json").read_text())
    return config["lr"], config["lr_was"]


def test_a_checkpoint_that_was_passed_over_is_not_come_upon_again(tmp_path, capsys, no_table):
    """Its weights are of another course of the run."""
    with killed("step", 13):
        run(tmp_path / "run", *LOOKS, "--save-every", "3")
    path, resume = tmp_path / "run/metrics.jsonl", ["--out", str(tmp_path / "run"), "--resume"]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:11]))
    with killed("step", 4):
        train.main([*resume, "--lr", "5e-4", "--save-every", "50"])
    assert [guard.step_of(path) for path in guard.kept(tmp_path / "run/checkpoint")] == [9]
    train.main(resume)
    assert lr_of(tmp_path / "run") == (5e-4, "0.001 until step 9")


@pytest.mark.parametrize("loss, gradient, weight, bad", (
    (1.0, 1.0, 1.0, False), (float("inf"), 1.0, 1.0, True), (float("nan"), 1.0, 1.0, True),
    (1.0, float("inf"), 1.0, True), (1.0, float("nan"), 1.0, True), (1.0, 1.0, 2e6, True),
    (1.0, 1.0, float("nan"), True)))
def test_what_a_bad_step_is(loss, gradient, weight, bad):
    agent = player(tiny_model(), descent=0.0)
    for parameter in agent.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad[0], parameter.data[0] = gradient, weight
    with pytest.raises(guard.BadStep) if bad else contextlib.nullcontext():
        agent.update(loss)


def test_a_bad_step_is_told_with_its_pairs_and_gone_on_with_slower(tmp_path, capsys, no_table):
    """By the command that the message names, once the checkpoints of wrecked weights are gone."""
    flags = ["--lr", "1e5", "--save-every", "1"]
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *flags)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1
    found = re.search(r"step (\d+), the protagonist's (\d), is not saved: the loss is (\S+), the "
                      r"gradient's norm (\S+), the norm of the weights then (\S+); look at --lr, "
                      r".* these pairs: ([^;]*); (python train.py .*) SMALLER ", said)
    assert found, said
    step, own, loss, gradient, weights, pairs, command = found.groups()
    assert int(step) == 6 + int(own)
    order = [i for epoch in range(9) for i in np.random.default_rng([0, epoch]).permutation(60)]
    assert pairs.split(", ") == [f"train {i}" for i in order[8 * (int(own) - 1):][:8]]
    assert not np.isfinite(float(gradient)) or not float(weights) < 1e6
    assert len(steps_of(tmp_path / "run")) == int(step) - 1
    last = guard.kept(tmp_path / "run/checkpoint")[-1]
    assert f"SMALLER goes on from step {guard.step_of(last)} (" in said
    for checkpoint in guard.kept(tmp_path / "run/checkpoint"):     # of the wrecked weights
        if guard.step_of(checkpoint) > 6:
            checkpoint.unlink()
    train.main([*command.split()[2:], "1e-4"])
    assert (tmp_path / "run/adversary").is_dir()


def test_a_bad_step_of_sft_names_the_drafts(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "--sft-lr", "1e18")
    said = capsys.readouterr().err.splitlines()[-1]
    order = np.random.default_rng([0, 0]).permutation(120)         # both answers of 60 drafts
    own = int(re.search(r"step (\d+), the sft's \1, is not saved: .* look at --sft-lr", said)[1])
    pairs = ", ".join(f"train {i // 2}" for i in order[8 * (own - 1):][:8])
    assert said.endswith(f"these pairs: {pairs}")


def test_what_the_ratios_come_to_is_said_once(tmp_path, capsys, no_table):
    """Mean r below 0.01, all pairs clipped: by metrics.jsonl, in the first such step alone."""
    run(tmp_path / "run", "--lr", "1e-2", "--n-mu", "6", "--n-nu", "6")
    said = re.split("[\r\n]", capsys.readouterr().err)
    rows = [row for row in steps_of(tmp_path / "run") if "ratio" in row]
    for words, bad in (("hardly anything is learned", [row for row in rows if row["ratio"] < 0.01]),
                       ("Eq. 12 clips all pairs", [row for row in rows if row["clipped"] == 1])):
        lines = [line for line in said if words in line]
        assert len(bad) > 1 and len(lines) == 1
        assert lines[0].startswith(f"step {bad[0]['step']}, {bad[0]['player']}: ")
        assert "--lr" in lines[0]
    run(tmp_path / "calm")
    assert "step " not in capsys.readouterr().err


def test_where_metrics_are_short_the_checkpoint_before_is_used(
        looked, tmp_path, capsys, no_table):
    with killed("step", 13):
        run(tmp_path / "run", *LOOKS, "--save-every", "3")
    path = tmp_path / "run/metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:11]))
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert f"{path} has 11 of the 12 rows" in capsys.readouterr().err
    assert read_run(tmp_path / "run")[0] == read_run(looked)[0]
    assert same(read_run(tmp_path / "run")[1], read_run(looked)[1])


DAMAGE = {"a row is twice there": lambda rows: rows[:3] + rows[2:],
          "an empty row": lambda rows: rows[:3] + [b"\n"] + rows[3:],
          "rubbish": lambda rows: rows[:3] + [b"rubbish\n"] + rows[4:],
          "no end": lambda rows: [*rows[:3], rows[3][:-1]]}


@pytest.mark.parametrize("name", DAMAGE)
def test_rows_of_metrics_are_those_of_their_steps(name, looked, tmp_path, capsys, no_table):
    """Those before the damage count, and there is a checkpoint before it."""
    with killed("step", 6):
        run(tmp_path / "run", *LOOKS, "--save-every", "3")
    path = tmp_path / "run/metrics.jsonl"
    path.write_bytes(b"".join(DAMAGE[name](path.read_bytes().splitlines(keepends=True))))
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert f"{path} has 3 of the 6 rows" in capsys.readouterr().err
    assert read_run(tmp_path / "run")[0] == read_run(looked)[0]


def test_a_run_without_a_checkpoint_says_that_it_begins_again(looked, tmp_path, capsys, no_table):
    with killed("step", 5):
        run(tmp_path / "run", *LOOKS, "--save-every", "0")
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert "has no checkpoint: beginning again at step 1" in capsys.readouterr().err
    assert read_run(tmp_path / "run")[0] == read_run(looked)[0]


def odd_checkpoints(folder):
    """Names and contents that no run has written."""
    for name in ("step-x-y.pt", "step-\u00b2-a.pt", "step-99-zz.pt"):
        (folder / name).write_bytes(b"")
    (folder / "step-98-aa.pt").mkdir()
    for content in ({}, [1], {"made_of": {}, "step": 97}):
        torch.save(content, folder / "state")
        (folder / "state").rename(folder / f"step-97-{guard.checksum(folder / 'state')}.pt")


def test_what_is_no_checkpoint_is_passed_over(looked, tmp_path, capsys, no_table):
    with killed("step", 9):
        run(tmp_path / "run", *LOOKS, "--save-every", "4")
    path = tmp_path / "run/metrics.jsonl"
    row = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(row[:9]) + b"".join(b'{"step": %d}\n' % n for n in range(10, 100)))
    odd_checkpoints(tmp_path / "run/checkpoint")
    (tmp_path / "run/checkpoint/step-98-aa.pt").rmdir()            # a folder stays where it is
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert "is damaged; going on from" in capsys.readouterr().err
    assert read_run(tmp_path / "run")[0] == read_run(looked)[0]


def test_a_full_disk_is_told_and_a_reader_that_has_gone_is_no_error(tmp_path):
    """Of eval.py's output: /dev/full takes nothing; a closed stream; `| true`, that reads none."""
    path = tmp_path / "scores.jsonl"
    path.write_text('{"run_a": "a", "run_b": "b", "score_a": 1, "score_b": 2}\n')
    started = [subprocess.Popen(f"{sys.executable} {HERE / 'eval.py'} --scores {path} {redirected}",
                                shell=True, stderr=subprocess.PIPE, text=True)
               for redirected in ("> /dev/full", ">&-", "| true")]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [2, 0, 0]
    assert "No space left" in said[0] and said[0].count("\n") == 1 and said[1:] == ["", ""]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "runs")
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "Read-only" in refused(train.main, [*QUICK, "--out", str(tmp_path / "run")], capsys)
    assert "such a name" in refused(train.main, [*QUICK, "--out", str(tmp_path / "\x1b")], capsys)
    job = SimpleNamespace(config=SimpleNamespace(out="run\udcff"))           # bytes of no UTF-8
    with pytest.raises(ValueError, match="such a name"), guard.guarded(job, True):
        pass


CHILD = """
import sys
sys.path.insert(0, {here!r})
import eval, train
train.WORLD_PAIRS, train.LOOKED_AT, train.WORLD_MODEL = {world!r}
eval.main = lambda arguments: None
train.main(sys.argv[1:])
"""


def begun_at(out):
    """When a start of the run began to train: it writes config.json."""
    path = out / "config.json"
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"] * KILLS)
def test_a_run_that_is_killed_at_any_moment(name, looked, tmp_path, capfd, no_table):
    """And gone on with: the same weights, the same metrics."""
    code, out = CHILD.format(here=str(HERE), world=(60, 40, train.WORLD_MODEL)), tmp_path / "run"
    arguments, codes = [*QUICK, *LOOKS, "--save-every", "2"], []
    for _ in range(min(KILLS, 3)):
        before = begun_at(out)
        child = subprocess.Popen([sys.executable, "-c", code, "--out", str(out), *arguments],
                                 env={**os.environ, "OMP_NUM_THREADS": "1"})
        while child.poll() is None and begun_at(out) == before:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.4))
        child.send_signal(getattr(signal, name))
        codes.append(child.wait(timeout=100))
        arguments = ["--resume"]
    expected = {-9} if name == "SIGKILL" else {143, -15}           # the latter: after training
    assert {*codes} <= {0, *expected}, codes                       # 0: it was too fast for us
    train.main(["--out", str(out), "--resume"])
    assert "Traceback" not in capfd.readouterr().err
    assert read_run(out)[0] == read_run(looked)[0]
    for role in ("sft", "protagonist", "adversary"):
        assert same(read_run(out, role)[1], read_run(looked, role)[1])
    assert not list(out.rglob("*.partial"))


# ---- Files that nobody should have written -------------------------------------------------------

def tokenizer_json(**changes):
    return lambda folder: edit_json(folder / "tokenizer.json", **changes)


def config_json(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


def empty_eos(folder):
    """The eos token's text is nothing, so that every answer ends in it for ever."""
    edit_json(folder / "tokenizer_config.json", eos_token=None, bos_token=None)
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["vocab"][""] = number = len(whole["model"]["vocab"])
    edit_json(folder / "tokenizer.json", **whole)
    edit_json(folder / "config.json", eos_token_id=number, vocab_size=number + 1)


def one_number_for_all(folder):
    """Terabytes of weights, which all are one number of the file."""
    big = {"vocab_size": 2**20, "hidden_size": 2**16}
    edit_json(folder / "config.json", **big)
    (folder / "model.safetensors").unlink()
    from model import Decoder, DecoderConfig
    with torch.device("meta"):
        model = Decoder(DecoderConfig.from_json(folder / "config.json"))
    one = torch.ones(1)
    torch.save({name: one.expand(value.shape) for name, value in model.state_dict().items()},
               folder / "pytorch_model.bin")


def link_out(folder):
    (folder.parent / "secret").write_text("key")
    (folder / "modeling.py").symlink_to(folder.parent / "secret")


post = {"type": "TemplateProcessing", "pair": []}
FOLDERS = {
    "a tokenizer that panics as it is read": (
        tokenizer_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "tokenizer.json cannot be read"),
    "one that panics as it reads": (
        tokenizer_json(pre_tokenizer={"type": "FixedLength", "length": 0}),
        "tokenizer.json cannot be read"),
    "one that panics at some texts": (
        tokenizer_json(normalizer={"type": "Prepend", "prepend": ""}),
        "pairs.jsonl, line 1: the tokenizer cannot read"),
    "a first token beyond the vocabulary": (
        tokenizer_json(post_processor={
            **post, "single": [{"SpecialToken": {"id": "<z>", "type_id": 0}},
                               {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<z>": {"id": "<z>", "ids": [10**6], "tokens": ["<z>"]}}}),
        "more ids than the embeddings"),
    "one that reads otherwise each time": (
        lambda folder: edit_json(folder / "tokenizer.json", model={
            **json.loads((folder / "tokenizer.json").read_text())["model"], "dropout": 0.5}),
        "has a dropout"),
    "an eos token without a text": (empty_eos, "no answer could end"),
    "a config of 900 lists": (config_json(extra=nested(900)), "nested more than 50 deep"),
    "rotary positions of 900 lists": (config_json(rope_scaling=nested(900)), "nested more than"),
    "a name of a megabyte": (config_json(hidden_act="x" * 10**6), "hidden_act 'xxx"),
    "20,000 layers": (config_json(num_hidden_layers=20000), "num_hidden_layers is 20000"),
    "one number for all weights": (one_number_for_all, "too small for the shapes"),
    "a link out of the folder": (link_out, "is a link out of its folder")}


@pytest.mark.parametrize("name", FOLDERS)
def test_models_that_are_refused(name, tmp_path, capfd):
    damage, words = FOLDERS[name]
    folder = model_folder(tmp_path / "model")
    damage(folder)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": " a", "chosen": "b", "rejected": "c"}\n')
    before, begun = contents(tmp_path), time.time()
    said = refused(train.main, ["--model", str(folder), "--data", str(tmp_path / "pairs.jsonl"),
                                "--out", str(tmp_path / "run"), "--anyway"], capfd)
    assert words in said and str(tmp_path) in said and len(said) < 5000
    assert time.time() - begun < 5
    assert contents(tmp_path) == before


def test_a_panic_at_an_answer_is_a_sentence(tmp_path, capfd):
    folder = model_folder(tmp_path / "model")
    edit_json(folder / "tokenizer.json",
              decoder={"type": "Strip", "content": "a", "start": 0, "stop": 5})
    tokenizer = limits.Tokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="cannot decode an answer"):
        tokenizer.decode(tokenizer.encode("a"))
    assert capfd.readouterr().err == ""


def test_links_within_a_folder_and_the_hubs_cache_are_followed(tmp_path):
    folder = model_folder(tmp_path / "models--a--b/snapshots/1234")
    (tmp_path / "models--a--b/blobs").mkdir()
    for path in list(folder.iterdir()):
        blob = path.rename(tmp_path / "models--a--b/blobs" / path.name)
        path.symlink_to(os.path.relpath(blob, folder))
    (folder / "added_tokens.json").symlink_to("vocab.json")
    limits.Tokenizer.from_pretrained(folder)
    (tmp_path / "models--a--b/blobs/config.json").unlink()
    (tmp_path / "models--a--b/blobs/config.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="config.json is a link out"):
        limits.Tokenizer.from_pretrained(folder)


TEMPLATES = {
    "multiplied": "{{ 'a' * 10**10 }}", "in a loop": "{% for _ in range(99) %}{{ 'a' * 10**8 }}"
    "{% endfor %}", "doubled": "{% set n = namespace(a='a') %}{% for _ in range(60) %}"
    "{% set n.a = n.a ~ n.a %}{% endfor %}", "centered": "{{ 'a'.center(10**10) }}",
    "a list": "{{ [1] * 10**10 }}", "endless": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "long": "{{ 'a' * 2 * 10**6 }}"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_make_too_much(name, tmp_path, capfd):
    folder = model_folder(tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATES[name])
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"chosen": talk, "rejected": [talk[0], {**talk[1], "content": "c"}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    begun = time.time()
    said = refused(train.main, ["--model", str(folder), "--data", str(tmp_path / "pairs.jsonl"),
                                "--out", str(tmp_path / "run")], capfd)
    reason = {"endless": "recursion depth", "long": "has 2000000 characters"}
    assert re.search(f"pairs.jsonl, line 1: .*{reason.get(name, 'MemoryError')}", said), said
    assert time.time() - begun < 10 and not (tmp_path / "run").exists()
    bytearray(2**29)                                   # the limit is gone


def test_pairs_that_are_refused(tmp_path, capfd):
    folder, row = model_folder(tmp_path / "model"), {"prompt": "a", "chosen": "b"}
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b"\n" * 2**20) * 400)
    large = tmp_path / "large.jsonl"
    large.write_text(json.dumps({**row, "rejected": "c"}) + "\n" +
                     json.dumps({**row, "rejected": "c" * 50 * 10**6}))
    book = tmp_path / "book.jsonl"
    book.write_text(json.dumps({**row, "rejected": "c" * 10**6}))
    assert "over 100 times" in refused(examination.main, ["--scores", str(bomb)], capfd)
    for path, words in ((bomb, "unpacked it is over 100 times as large"),
                        (book, f"{book}, line 1: has 10000"),
                        (large, f"{large}: has a line of over 8000000 bytes")):
        for flag in ("--data", "--held-out"):
            (tmp_path / "good.jsonl").write_text(json.dumps({**row, "rejected": "c"}) + "\n")
            files = {"--data": tmp_path / "good.jsonl", flag: path}
            begun = time.time()
            said = refused(train.main, ["--model", str(folder), "--out", str(tmp_path / "run"), *(
                str(part) for pair in files.items() for part in pair)], capfd)
            assert words in said and time.time() - begun < 10


def test_what_is_no_file_is_refused(tmp_path, capfd):
    folder, pipe = model_folder(tmp_path / "model"), tmp_path / "pairs.jsonl"
    os.mkfifo(pipe)
    for main, flags in ((train.main, ["--model", str(folder), "--data"]),
                        (examination.main, ["--scores"])):
        assert "neither a file nor a folder" in refused(main, [*flags, str(pipe)], capfd)
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(ValueError, match="chat_template.jinja is no file"):
        limits.Tokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    for name in ("vocab.json", "modeling.py"):
        with (folder / name).open("wb") as file:
            file.truncate(2**32)                       # of no blocks
        with pytest.raises(ValueError, match=f"{name} is no file, or one of over"):
            limits.Tokenizer.from_pretrained(folder)
        (folder / name).unlink()


def test_a_small_file_may_unpack_to_a_megabyte(tmp_path):
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(row.encode() * 10**4))
    training, held_out, _ = limits.load_data(str(tmp_path / "pairs.jsonl.gz"))
    assert len(training) + len(held_out) == 10**4


@pytest.mark.parametrize("temperature", (1e-300, 5e-324, 1e-38, 1e-20))
def test_a_temperature_near_0_takes_the_likeliest_token(temperature):
    model, prompts = tiny_model(), [[3, 4, 5], [6, 7]]
    assert generate(model, prompts, 8, temperature, 2) == generate(model, prompts, 8, 0, 2)
