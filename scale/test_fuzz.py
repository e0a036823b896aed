"""Rubbish in every file and flag: it works or is refused in one sentence, soon, and writes nothing.

    FUZZ=100000 python -m pytest scale/test_fuzz.py          # inputs; 2000 without it

Needs hypothesis. Without FUZZ the inputs are the same ones every time.
"""

import contextlib
import copy
import gzip
import io
import json
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as examination
import train
from scale.test_faults import nested
from test_iopo import (BIN, BIN_INDEX, INDEX, WEIGHTS, as_bin, contents, in_shards, model_folder,
                       run, small_world)

hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
resource = pytest.importorskip("resource")
st = hypothesis.strategies
INPUTS, SECONDS, GIGABYTE = int(os.environ.get("FUZZ", 2000)), 20, 2**30


def inputs(share):
    return hypothesis.settings(
        max_examples=round(INPUTS * share), deadline=None, database=None,
        derandomize="FUZZ" not in os.environ, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck))


class Hangs(BaseException):
    pass


def hang(*_):
    raise Hangs


@pytest.fixture(scope="module", autouse=True)
def bounds(small_world):
    """A gigabyte more than there is now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTE, before[1]))
    old = signal.signal(signal.SIGALRM, hang)
    yield
    signal.signal(signal.SIGALRM, old)
    resource.setrlimit(resource.RLIMIT_AS, before)


def behaves(main, arguments, folder, codes=(None, 0, 2)):
    """The exit code of a command, which is a good one; refusals are a sentence, and write nothing
    below `folder`."""
    before, code, stderr = contents(folder), None, os.dup(2)
    signal.alarm(SECONDS)
    with tempfile.TemporaryFile("w+", errors="surrogateescape") as said:
        os.dup2(said.fileno(), 2)                      # libraries write there, too
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        finally:
            signal.alarm(0)
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        lines = [line for line in re.split("[\r\n]", said.read())
                 if line.strip() and "%|" not in line]
    assert code in codes, (code, lines)
    if code == 2:
        assert len(lines) == 1 and contents(folder) == before, lines
    assert not list(folder.rglob("*.partial"))
    return code


# ---- Rubbish -------------------------------------------------------------------------------------

ODD = st.sampled_from([
    None, True, False, 0, 1, -1, 2, 7, 64, 2**31, 2**63, 10**400, 1e308, -1e-300, 0.5, float("nan"),
    float("inf"), "", " ", "a", "</s>", "<s>", "\x1b[31m\x07\x00", "\ud800", "\u202e", "x" * 5000,
    "../.."]) | st.text(max_size=9) | st.integers() | st.floats() \
    | st.sampled_from(["[]", "{}", "[[]]", '{"a": 1}', '["a", null]']).map(json.loads) \
    | st.sampled_from([60, 700]).map(nested)


def places(value, path=()):
    """Where the values within a JSON value are; not all of many alike, or of deep ones."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) \
        if isinstance(value, list) else ()
    for name, each in [*inner][:40 if len(path) < 8 else 0]:
        yield from places(each, (*path, name))


@st.composite
def odd_json(draw, value, most=3):
    """A JSON value with a few others in the place of its own, or without these."""
    holder = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(0, most))):
        *path, name = draw(st.sampled_from([(0, *path) for path in places(holder[0])]))
        inner = holder
        for part in path:
            inner = inner[part]
        if draw(st.booleans()) or inner is holder:
            inner[name] = draw(ODD)
        elif draw(st.booleans()):
            del inner[name]
        elif isinstance(inner, dict):
            inner[draw(st.text(max_size=9))] = draw(ODD)
        else:
            inner.insert(name, draw(ODD))
    return holder[0]


@st.composite
def odd_bytes(draw, content):
    """Bytes with some of them changed, taken out or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        change = draw(st.sampled_from(["flip", "cut", "drop", "add"]))
        if change == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del content[at:]
        elif change == "drop":
            del content[at:at + draw(st.integers(1, 20))]
        else:
            content[at:at] = draw(st.binary(max_size=20) | st.sampled_from(
                [b"\n", b"{", b"]", b"\xff", b"\xef\xbb\xbf", b"NaN", b'"']))
    return bytes(content)


@st.composite
def odd_file(draw, path):
    """What to write in the place of a JSON file, or of any other."""
    content = path.read_bytes()
    if path.suffix == ".json" and draw(st.integers(0, 4)):
        return json.dumps(draw(odd_json(json.loads(content)))).encode()
    return draw(odd_bytes(content))


TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
ROWS = [{"prompt": "a b", "chosen": "c d", "rejected": "e"},
        {"chosen": "a b c", "rejected": "a b d", "source": "x"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
        {"chosen": TALK, "rejected": [TALK[0], {**TALK[1], "content": "d"}]},
        {"prompt": [TALK[0]], "chosen": [TALK[1]], "rejected": [{**TALK[1], "content": "d"}]},
        {"prompt": "a", "chosen": [TALK[1]], "rejected": [{**TALK[1], "content": "d"}]}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}" \
    "{% if add_generation_prompt %}assistant: {% endif %}"
PIECES = ["{{ messages }}", "{{ messages[0].content * 10**9 }}", "{{ x.y.z }}", "{{ 1 / 0 }}",
          "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{% if",
          "{{ ''.__class__ }}", "{{ self.__init__.__globals__ }}", "{{ raise_exception('no') }}",
          "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | tojson }}",
          "{% break %}", "{{ eos_token }}", "{% generation %}", "\x00", "\ud800",
          "{{ 'a' | center(10**9) }}", "{{ lipsum(99) }}", "{{ range(10**12) | list }}",
          "{% include 'x' %}", "{{ cycler.__init__ }}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder whose files all are there."""
    folder = model_folder(tmp_path_factory.mktemp("model") / "model")
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": TEMPLATE}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1]}')
    (folder / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "</s>", "special": true}, "unk_token": "<s>"}')
    return folder


@contextlib.contextmanager
def begun(model, rows=ROWS):
    """A copy of the model with pairs beside it, and the arguments that begin a run of both, which
    ends where training would begin."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", lambda job: None)
        patch.setattr(examination, "main", lambda arguments: None)
        folder = Path(name)
        shutil.copytree(model, folder / "model")
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield folder, ["--model", folder / "model", "--data", folder / "pairs.jsonl", "--out",
                       folder / "run", "--held-out", folder / "pairs.jsonl", "--batch-size", 2]


# ---- Every file, every flag ----------------------------------------------------------------------

@inputs(0.3)
@hypothesis.given(st.data())
def test_rows(model, data):
    rows = data.draw(st.lists(st.sampled_from(ROWS).flatmap(odd_json), min_size=1, max_size=4))
    name = data.draw(st.sampled_from(["pairs.jsonl", "pairs.json", "pairs.jsonl.gz"]))
    text = json.dumps(rows) if name == "pairs.json" else "\n".join(map(json.dumps, rows))
    content = text.encode()
    if data.draw(st.booleans()):
        content = data.draw(odd_bytes(content))
    content = gzip.compress(content) if name.endswith(".gz") else content
    if name.endswith(".gz") and data.draw(st.booleans()):
        content = data.draw(odd_bytes(content))
    with begun(model) as (folder, arguments):
        (folder / name).write_bytes(content)
        arguments[3] = folder / name
        behaves(train.main, arguments, folder)


@inputs(0.2)
@hypothesis.given(st.data())
def test_config_json(model, data):
    with begun(model) as (folder, arguments):
        path = folder / "model/config.json"
        path.write_bytes(data.draw(odd_file(path)))
        behaves(train.main, arguments, folder)


@inputs(0.2)
@hypothesis.given(st.data())
def test_files_of_the_tokenizer(model, data):
    with begun(model) as (folder, arguments):
        path = folder / "model" / data.draw(st.sampled_from([
            "tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
            "special_tokens_map.json", "chat_template.jinja"]))
        if path.exists():
            path.write_bytes(data.draw(odd_file(path)))
        else:
            pieces = data.draw(st.lists(st.sampled_from(PIECES), max_size=4))
            text = "".join(pieces) if data.draw(st.booleans()) else TEMPLATE + "".join(pieces)
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        behaves(train.main, arguments, folder)


@inputs(0.15)
@hypothesis.given(st.data())
def test_weights_and_their_index(model, data):
    with begun(model) as (folder, arguments):
        file = data.draw(st.sampled_from([WEIGHTS, INDEX, BIN, BIN_INDEX]))
        path, tensors = folder / "model" / file, load_file(folder / "model" / WEIGHTS)
        if file == BIN:
            as_bin(folder / "model")
        elif file != WEIGHTS:
            suffix, save = (".safetensors", save_file) if file == INDEX else (".bin", torch.save)
            where = {name: f"{number % 2}{suffix}" for number, name in enumerate(tensors)}
            in_shards(folder / "model", tensors, where, file, save)
        path.write_bytes(data.draw(odd_file(path)))
        behaves(train.main, arguments, folder)


FLAGS = [f"--{name.replace('_', '-')}" for name in train.Config.__dataclass_fields__]
VALUES = st.sampled_from(["0", "1", "-1", "3", "0.5", "1e300", "-inf", "nan", "", " ", "iopo",
                          "dpo", "none", "cpu", "sequence", "negated", "99999999999999999999",
                          "\x1b[2J", "bfloat16", "float32", "a,b", "/", "\u202e"]) \
    | st.text(max_size=6)


@inputs(0.1)
@hypothesis.given(st.lists(st.tuples(st.sampled_from([*FLAGS, "--resume", "--plan", "--anyway",
                                                      "--nonsense"]), VALUES), max_size=4))
def test_flags_of_train(model, given):
    with begun(model) as (folder, arguments), contextlib.chdir(folder):
        switches = "--resume", "--plan", "--anyway"
        own = [part for flag, value in given for part in
               ([flag] if flag in switches or "checkpointing" in flag else [flag, value])]
        if not {"--out", "--model", "--data", "--held-out"} & {*own}:          # hub names, too
            behaves(train.main, [*arguments, *own], folder)


@pytest.fixture(scope="module")
def runs(small_world, tmp_path_factory):
    """A finished run, and one that two steps are missing of."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examination, "main", lambda arguments: None)
        run(folder / "done", "--save-every", "12")
    shutil.copytree(folder / "done", folder / "left", ignore=shutil.ignore_patterns(
        "protagonist", "adversary"))
    for path in (folder / "left/checkpoint").glob("step-14-*"):
        path.unlink()
    return folder


@inputs(0.025)
@hypothesis.given(st.data())
def test_run_folders_that_are_gone_on_with(runs, data):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(examination, "main", lambda arguments: None)
        shutil.copytree(runs / "left", Path(name) / "run")
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        path = data.draw(st.sampled_from([path for path in files if "sft" not in path.parts]))
        path.write_bytes(data.draw(odd_file(path)))
        behaves(train.main, ["--out", f"{name}/run", "--resume"], Path(name))


@inputs(0.025)
@hypothesis.given(st.data())
def test_run_folders_that_are_examined(runs, data):
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(runs / "done", Path(name) / "run")
        path = data.draw(st.sampled_from(sorted(
            path for path in Path(name).rglob("*.*") if path.suffix != ".pt")))
        path.write_bytes(data.draw(odd_file(path)))
        flags = data.draw(st.sampled_from([
            "--prompts 2", "--json --prompts 1", "--prompts 0", "--prompts 1 --temperature 1e-300",
            "--prompt a", "--plot x.png"]))
        with contextlib.chdir(name):
            behaves(examination.main, ["run", *flags.split()], Path(name))
