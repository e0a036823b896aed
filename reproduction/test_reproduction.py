"""The reproduction's proof: its numbers by hand, a small one from end to end, rounds, Baichuan2's
tokenizer. What needs scipy, matplotlib, transformers or sentencepiece says so when it is skipped.
"""

import argparse
import concurrent.futures
import importlib
import importlib.util
import json
import math
import multiprocessing
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import eval as examination
import iopo
import train
from data import Pair, SafeWorld, Tokenizer, encode_pairs
from model import Decoder, DecoderConfig
from reproduction import baichuan2, compare, figures, game, plan, rounds, runs

torch.set_num_threads(1)            # the models are tiny, and a busy machine then costs seconds
command = importlib.import_module("reproduction.__main__")
HERE = Path(__file__).parent
MODULES = (command, compare, figures, game, plan, rounds, runs)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16, max_position_embeddings=128)


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """The safe world with fewer pairs and a smaller model: the loop is the same."""
    monkeypatch.setattr(train, "WORLD_PAIRS", 60)
    monkeypatch.setattr(train, "WORLD_MODEL", SMALL)
    monkeypatch.setattr(rounds, "VISITS", 1)
    monkeypatch.setattr(rounds, "CANDIDATES", 3)
    monkeypatch.setattr(rounds, "HELD_OUT", 20)
    monkeypatch.setattr(train, "LOOKED_AT", 20)
    for module in (examination, runs):
        monkeypatch.setattr(module, "EXAM_PAIRS", 20)


def refused(function, arguments, capsys):
    """The one sentence on stderr of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        function(arguments)
    error = capsys.readouterr().err
    lines = [line for line in re.split("[\r\n]", error) if line.strip() and "%|" not in line]
    assert stop.value.code == 2 and len(lines) == 1, error
    return lines[0]


# ---- Intervals, p values, votes, the theorems' values --------------------------------------------

def test_intervals_and_p_values_against_the_tables():
    """Student's t as any book prints it: two-sided 5% points, and closed forms for 1 and 2 degrees
    of freedom."""
    pytest.importorskip("scipy")
    for df, t in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        values = np.random.default_rng(df).normal(size=df + 1)
        error = values.std(ddof=1) / math.sqrt(df + 1)
        assert compare.half_interval(values) == pytest.approx(t * error, rel=1e-3)
        shifted = (values - values.mean()) / error + t
        assert compare.t_test(shifted) == pytest.approx(0.05, abs=1e-4)
    assert compare.t_test([1.0, 3.0]) == pytest.approx(1 - 2 / math.pi * math.atan(2), abs=1e-6)
    t = 2 / (1 / math.sqrt(3))
    p = 1 - t / math.sqrt(2 + t * t)
    assert compare.t_test([1.0, 2.0, 3.0]) == pytest.approx(p, abs=1e-6)
    assert compare.t_test([0.0, 0.0]) == 1 and compare.t_test([1.0, 1.0]) == 0
    shown = compare.difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert shown == "+2.00 ± 2.48, p = 0.074"


def test_one_seed_needs_no_scipy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert compare.difference([1.0], [2.0]) == "-1.00" and compare.plus_minus([1.0]) == "1.00"
    assert "pip install -r reproduction/requirements.txt" in refused(command.main, [], capsys)


def test_the_exact_games_end_where_algebra_says(monkeypatch):
    """With r = 1 each pair's optimum is sigmoid(beta * h) = its Bradley-Terry label, which the
    table can reach, so Q converges to the labels' own mean: sum of p * p over the sum of p."""
    monkeypatch.setattr(game, "TABLES", 2)
    values = game.exact_game(30.0, n_iter=150, ratio="one")
    mu, nu = values["protagonist"], values["adversary"]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        rewards = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)[0]
        p = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
        p = p[:, ~torch.eye(5, dtype=torch.bool)]
        for player in (mu, nu):
            assert player["eq6"][-1][seed] == pytest.approx(((p * p).sum() / p.sum()).item(),
                                                            abs=1e-4)
            assert player["eq13"] == player["eq6"]
        assert mu["eq6"][0][seed] < nu["eq6"][0][seed] < mu["eq6"][1][seed]    # they take turns


def test_a_frozen_ratio_and_a_game_of_opposites(monkeypatch):
    """r frozen within a turn is r recomputed where a turn has one step, and where r is 1. Players
    with the same labels have opposite margins, so the Q of one that moved by nothing is 1 less the
    other's."""
    monkeypatch.setattr(game, "TABLES", 2)
    one, default = {"ratio": "one"}, {}
    assert game.exact_game(3.0, 2, frozen=True, **one) == game.exact_game(3.0, 2, **one)
    assert game.exact_game(3.0, 2, frozen=True) != game.exact_game(3.0, 2)
    for adversary in ("negated", "same"):
        monkeypatch.setattr(game, "TURN_STEPS", 25)
        values = game.exact_game(1e-9, 1, adversary, **one)
        for mu, nu in zip(values["protagonist"]["eq6"][0], values["adversary"]["eq6"][0]):
            assert mu + nu == pytest.approx(1, abs=1e-12) and mu > 0.5
    monkeypatch.setattr(game, "TURN_STEPS", 1)
    assert game.exact_game(3.0, 2, frozen=True) == game.exact_game(3.0, 2, **default)


def test_the_zero_sum_game_falls_only_where_r_leaves_float32(monkeypatch):
    """Of 16 tables within 66 turns the last one; with r in float64 none, whose range is wider."""
    monkeypatch.setattr(game, "TABLES", 16)

    def rising():
        return game.numbers(game.exact_game(30.0, 66, "negated"))["rising"]

    assert rising() == [True] * 15 + [False]
    monkeypatch.setattr(iopo, "importance_ratio",
                        lambda agent, env, _: (agent.detach() - env).exp())
    assert rising() == [True] * 16


def test_the_numbers_of_the_games_by_hand(monkeypatch):
    """Two tables, four turns: one rises and passes the stated Q, one falls and does not."""
    monkeypatch.setattr(game, "STATED", 0.58)
    mu = [[0.5, 0.5], [0.54, 0.48], [0.56, 0.47], [0.58, 0.465]]
    values = {"protagonist": {"eq6": mu, "eq13": mu},
              "adversary": {"eq6": [[0.4, 0.6]] * 4, "eq13": [[0.4, 0.6]] * 4}}
    seen = game.numbers(values)
    assert seen["rising"] == [True, False] and seen["falling"] == [False, True]
    assert seen["d3_d2"] == pytest.approx([0.5, 0.5], abs=1e-5)
    assert seen["last_change"] == pytest.approx([0.02, -0.005], abs=1e-6)
    assert seen["until"] == [4, None]
    assert seen["sum"] == pytest.approx([0.98, 1.065]) and seen["last"] == pytest.approx(mu[-1])
    assert seen["mean"] == pytest.approx([0.5, 0.51, 0.515, 0.5225])


def test_the_theorems_values_by_hand():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    start = torch.tensor([[[-5.0, -6.0]], [[-7.0, -6.5]]])         # a table of two pairs
    seen = [{"player": "protagonist", "logps": torch.tensor([[[-4.0, -6.0]], [[-9.0, -6.0]]])},
            {"player": "adversary", "logps": torch.tensor([[[-6.0, -7.0]], [[-7.0, -6.0]]])}]
    values = game.turn_values(seen, start, torch.tensor([[0.5, 0.5]]))
    mu = [sigmoid(0.1 * (1 + 2)), sigmoid(0.1 * (0 - 0.5))]
    nu = [sigmoid(0.1 * ((-7 + 9) - (-6 + 4))),                        # it prefers the rejected
          sigmoid(0.1 * ((-6 + 6) - (-7 + 6)))]
    assert values["protagonist"]["eq6"] == [pytest.approx([sum(mu) / 2])]
    assert values["adversary"]["eq6"] == [pytest.approx([sum(nu) / 2])]
    mu = (mu[0] / math.exp(-2) + mu[1] / 1.3) / 2
    nu = (nu[0] / math.exp(-2) + nu[1] / math.exp(-1)) / 2
    assert values["protagonist"]["eq13"] == [pytest.approx([mu])]
    assert values["adversary"]["eq13"] == [pytest.approx([nu])]


def test_the_vote_is_the_humans_as_expected():
    others, ours = {"quarters": [0, 4, -8]}, {"quarters": [4, 4, 0]}
    expected = [1 / (1 + math.exp(-gap)) for gap in (1, 0, 2)]
    assert plan.vote(ours, others) == pytest.approx(sum(expected) / 3)


# ---- A small reproduction ------------------------------------------------------------------------

class Inline:
    """A pool of no processes, so that the small world reaches the runs; it remembers them."""
    runs = []

    def __init__(self, *arguments):
        pass

    __enter__ = lambda self: self
    __exit__ = shutdown = lambda self, *arguments, **options: None

    def submit(self, function, run):
        self.runs.append(run)
        future = concurrent.futures.Future()
        future.set_result(function(run))
        return future


ROWS = {"DPO, beta 0.1": {"method": "dpo"}, "IOPO": {"method": "iopo", "n_nu": 2},
        "ratio alone": {"method": "iopo", "n_nu": 0}}
MORE = {"IOPO online": {"method": "iopo", "n_nu": 2, "online": True},
        "Iter-DPO": {"method": "dpo", "online": True, "keep": 0.5}}
READINGS = {"--ratio env": {"method": "iopo", "n_nu": 2, "ratio": "env"}}


@pytest.fixture
def small_plan(monkeypatch, tmp_path):
    """The reproduction with fewer rows, rates, seeds and steps; one rate is beyond all bounds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Inline)
    Inline.runs.clear()
    prompts, make_config, rates = runs.shuffled_prompts, train.make_config, (1e-4, 1e-3, 1e15)
    changes = {
        "FRONTIER": ROWS, "PAPER": MORE, "ABLATION": READINGS, "RATES": rates,
        "MIDDLE_RATES": rates[:2], "TURN": 2, "LOOKS": (2, 4), "EVERY": 2,
        "PARTS": {"frontier": (ROWS, rates, (0, 1)), "tables": (MORE, rates, (0, 1)),
                  "ablation": (READINGS, rates[:2], (0, 1))},
        "SAMPLES": {"test": 2, "validation": 1}, "PAIRS": 20, "STOPPING": tuple(ROWS),
        "FAMILY": (("IOPO", "DPO, beta 0.1"),), "TABLE1": ("DPO, beta 0.1", "ratio alone"),
        "TABLE2": ("DPO, beta 0.1", "Iter-DPO"), "STEP_SIZES": (3.0,),
        "GAMES": {"short": {"n_iter": 3}}, "RESULTS": tmp_path / "results",
        "shuffled_prompts": lambda split: prompts(split)[:20]}
    for name, value in changes.items():
        for module in (*MODULES, examination):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)

    def fewer_steps(given):
        config = make_config(given)
        return replace(config, sft_steps=min(config.sft_steps, 60), batch_size=4)

    monkeypatch.setattr(train, "make_config", fewer_steps)


def test_a_small_reproduction(small_plan, tmp_path, capsys, monkeypatch):
    """From the runs to the tables, part by part; a diverging run is a hole; a second command does
    nothing; what is lost is done again."""
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    (tmp_path / "results").mkdir()
    for part in ("rounds", "tables"):
        assert "frontier first" in refused(command.main, [part], capsys)
    command.main(["--record", "--out", "out"])
    printed, out = capsys.readouterr().out, tmp_path / "out"
    count = len(Inline.runs)
    assert count == 2 + 3 * 3 * 2 + 2 + 2 * 3 * 2 + 2 * 2
    recorded = json.loads((out / "frontier.json").read_text())
    numbers = recorded["rows"]
    for table in compare.frontier_tables(numbers, None, recorded["rates"]).values():
        assert table in printed and table in (out / "frontier.md").read_text(encoding="utf-8")
    names = {f"{part}.{kind}" for part in plan.PARTS for kind in ("json", "md", "npz")}
    names |= {"theorems.json"} | {f"{name}.png"
                                  for name in ("rate", "kl", "steps", "stopping", "values")}
    assert {path.name for path in (tmp_path / "results").iterdir()} == names
    assert names <= {path.name for path in out.iterdir()}

    # a look's numbers follow from its rewards, and are what eval.py finds for the same model
    packed = np.load(out / "frontier.npz")
    assert packed["IOPO, test"].shape == (3, 2, 2, 2 * 20) and packed["IOPO, test"].dtype == np.int8
    assert (packed["IOPO, test"][2, :, -1] == -128).all()
    assert (compare.scores(numbers, "IOPO", "reward")[2, :, 1] == numbers["SFT"]["reward"]).all()
    voted = ~np.isnan(np.array(numbers["IOPO"]["vote"], dtype=float))  # where its adversary has
    assert not voted[:, :, 0].any() and voted[:2, :, 1].all()          # trained
    assert packed["SFT, 0.4"].shape == (1, 2, 1, 2 * 20)
    reward = packed["DPO, beta 0.1, test"].mean(axis=3) / 4
    assert np.allclose(np.array(numbers["DPO, beta 0.1"]["reward"], dtype=float)[:2], reward[:2],
                       atol=1e-4)
    for row in ROWS:
        assert (np.array(numbers[row]["kl"], dtype=float)[:2] > 0).all()
    run = plan.row_runs("DPO, beta 0.1", ROWS["DPO, beta 0.1"], (1e-3,), (0, 1), "out")[1]
    capsys.readouterr()
    examination.main([run.folder, "--json", "--sft", run.sft])
    [report] = json.loads(capsys.readouterr().out)["runs"]
    for name, seen in (("margin", "margin_vs_sft"), ("spread", "margin_vs_sft_std"),
                       ("accuracy", "accuracy"), ("greedy", "reward_greedy")):
        assert numbers["DPO, beta 0.1"][name][1][1][1] == pytest.approx(report[seen], abs=1e-5)
    looks = [json.loads((out / f"sft-seed{seed}/result.json").read_text())["looks"][0]["test"]
             for seed in (0, 1)]
    assert looks[0]["quarters"] != looks[1]["quarters"]               # other draws for other seeds

    # rows called online go on from the DPO model and are measured against SFT; rounds are rounds
    rate, look = compare.tuned(numbers["DPO, beta 0.1"])
    dpo = plan.dpo_runs(recorded["rates"][rate], (2, 4)[look], (0, 1), "out")
    online = plan.row_runs("Iter-DPO", MORE["Iter-DPO"], (1e-3,), (0,), "out", dpo[:1])[0]
    assert online in Inline.runs and online.rounds == 2
    assert online.options["model"] == dpo[0].model.as_posix() != online.sft
    seen = runs.finished(online)
    assert [look["steps"] for look in seen["looks"]] == [2, 4] and seen["adversary"] == []
    seen = runs.finished(plan.row_runs("IOPO", ROWS["IOPO"], (1e-3,), (0,), "out")[0])
    assert [look["steps"] for look in seen["looks"] + seen["adversary"]] == [2, 4, 2, 4]

    # a second command does nothing again and finds the same; what is lost is done again
    kept = {path.name: path.read_bytes() for path in out.glob("*.json")}
    command.main(["--out", "out"])
    assert len(Inline.runs) == count
    shutil.rmtree(out / "dpo-beta-0.1-lr0.001-seed1")
    path = out / "iopo-lr0.0001-seed0/result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "identity": {}}))
    (out / "iter-dpo-lr0.001-seed1/result.json").write_text("[]")
    (out / "sft-seed1/protagonist/model.safetensors").unlink()
    command.main(["--out", "out"])
    assert {run.folder for run in Inline.runs[count:]} == {
        f"out/{name}" for name in ("dpo-beta-0.1-lr0.001-seed1", "iopo-lr0.0001-seed0",
                                   "iter-dpo-lr0.001-seed1", "sft-seed1")}
    assert kept == {path.name: path.read_bytes() for path in out.glob("*.json")}
    count = len(Inline.runs)
    shutil.rmtree(out / "iter-dpo-lr0.001-seed1")
    shutil.rmtree(out / "dpo-beta-0.1-lr0.001-seed1")
    command.main(["rounds", "--out", "out"])                          # of all parts' runs, these
    assert [run.folder for run in Inline.runs[count:]] == ["out/iter-dpo-lr0.001-seed1"]
    command.main(["--out", "out"])
    for part in plan.PARTS:
        command.main([part, "--quick", "--out", "out"])
        assert json.loads((out / f"quick/{part}.json").read_text())["seeds"] == [0]


def test_the_weights_and_ratios_of_a_player(small_plan, tmp_path):
    """Shares and quantiles by hand, from logits in plain rows."""
    job = train.prepare(train.make_config({"method": "iopo", "beta": 3.0, "out": str(tmp_path),
                                           "device": "cpu"}))
    torch.manual_seed(1)
    for parameter in job.players["adversary"].model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)

    @torch.no_grad()
    def logp(model, prompt, answer):
        logits = model(torch.tensor([prompt + answer]))[0].double().log_softmax(dim=-1)
        return sum(logits[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer))

    for name, other in (("protagonist", "adversary"), ("adversary", "protagonist")):
        agent, env = job.players[name].model, job.players[other].model
        rho = []
        for prompt, w, l in job.players[name].rows[:20]:
            rho.append([logp(agent, prompt, some) - logp(env, prompt, some) for some in (w, l)])
        weights = [min(math.exp(l), 1.3) / (1 + math.exp(3 * (w - l))) for w, l in rho]
        found = runs.pull(job, name)
        assert found["idle"] == pytest.approx(np.mean([weight < 0.025 for weight in weights]))
        assert 0 < found["idle"] < 1
        levels = np.quantile([l for _, l in rho], np.linspace(0, 1, 11))
        assert found["log_ratio"] == pytest.approx(levels, abs=1e-3)


def test_runs_in_processes_of_their_own_come_back_in_order(tmp_path):
    """The pool that is really used: results do not depend on it."""
    options = {"method": "dpo", "n_iter": 1, "n_mu": 1, "sft_steps": 0}           # no look
    some = [runs.Run(str(tmp_path / f"run{seed}"), {**options, "seed": seed}) for seed in (0, 1)]
    spawn = multiprocessing.get_context("spawn")
    with (concurrent.futures.ProcessPoolExecutor(2, spawn, runs.start_worker) as pool,
          tqdm(disable=True, total=0) as bar):
        results = runs.carry_out_all(some, pool, bar)
        assert [result["identity"]["config"]["seed"] for result in results] == [0, 1]
        assert results == runs.carry_out_all(some, pool, bar)


def test_a_folder_of_somebody_else_is_left_alone(small_plan, tmp_path, capsys):
    folder = tmp_path / "out/sft-seed0"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    flags = ["frontier", "--quick", "--out"]
    assert "sft-seed0" in refused(command.main, [*flags, "out"], capsys)
    assert (folder / "notes.txt").read_text() == "mine"
    assert "file" in refused(command.main, [*flags, str(folder / "notes.txt")], capsys)


@pytest.mark.parametrize("flags,word", [
    ("--jobs 0", "--jobs"), ("--quick --record", "--quick"), ("--seed=3", "--seed"),
    ("theorems --tune", "--tune"), ("tuning", "invalid choice")])
def test_flags_that_are_refused(flags, word, capsys):
    assert word in refused(command.main, flags.split(), capsys)


def test_the_readme_shows_what_was_recorded():
    """Every table of what is recorded stands in README.md, and every figure."""
    pytest.importorskip("scipy")
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    games = json.loads((HERE / "results/theorems.json").read_text())
    assert compare.table_theorems(games) in readme and list(games) == list(game.GAMES)
    for part, make in (("frontier", compare.frontier_tables), ("tables", compare.paper_tables),
                       ("ablation", compare.ablation_tables)):
        if not (HERE / f"results/{part}.json").is_file():
            assert f"`{part}` is not recorded yet" in readme
            continue
        _, rates, seeds = plan.PARTS[part]
        known = json.loads((HERE / f"results/{part}.json").read_text())
        assert (known["rates"], known["seeds"]) == (list(rates), list(seeds))
        options = argparse.Namespace(out="nowhere", quick=False)
        numbers, rewards = command.cut(*command.recorded("frontier", options), rates, seeds)
        own, more = command.recorded(part, options)
        for name, table in make({**numbers, **own["rows"]}, {**rewards, **more}, rates).items():
            assert table in readme, f"{part}, {name}"
    for figure in (HERE / "results").glob("*.png"):
        assert f"results/{figure.name}" in readme


def test_readme_names_what_exists():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    files = {*re.findall(r"`(\w+\.(?:py|txt))`", readme)} - {"train.py"}
    assert files == {path.name for path in HERE.glob("*.py")} - {"__init__.py"}
    for file in re.findall(r"results/\w+\.\w+", readme):
        assert (HERE / file).is_file(), file


# ---- Frontiers -----------------------------------------------------------------------------------

def test_kl_by_the_definition():
    """Exact KL per token, against plain loops over the vocabulary: answers that ended, one that was
    cut off, an empty one, prompts of several lengths."""
    torch.manual_seed(0)
    world = SafeWorld.tokenizer()
    shape = {**train.WORLD_MODEL, "num_hidden_layers": 2}
    config = DecoderConfig(vocab_size=world.largest_id + 1, **shape)
    model, start = Decoder(config), Decoder(config)
    for each in (model, start):
        for parameter in each.parameters():
            parameter.data *= 3
    prompts = [[0, 5, 7], [0, 9], [0, 11, 12, 13], [0, 8]]
    answers = [[20, 21], [], list(range(30, 30 + runs.NEW_TOKENS)), [40]]
    total = 0.0
    for prompt, answer in zip(prompts, answers):
        ended = len(answer) < runs.NEW_TOKENS
        for k in range(len(answer) + ended):
            ids = torch.tensor([prompt + answer[:k]])
            p = torch.softmax(model(ids)[0, -1].double() / 0.7, dim=-1)
            q = torch.softmax(start(ids)[0, -1].double(), dim=-1)
            total += (p * (p / q).log()).sum().item()
    found = runs.answers_kl(model, start, prompts, answers, 0.7)
    assert found == pytest.approx(total / 4, rel=1e-5) and found > 0.1
    assert runs.answers_kl(model, model, prompts, answers, 1.0) == pytest.approx(0, abs=1e-6)


def test_the_reward_at_a_kl():
    nan = float("nan")
    assert compare.at_kl([1.0, 3.0], [2.0, 4.0], (0.0, 1.0), 2.0) == pytest.approx(3.0)
    assert compare.at_kl([1.0, 3.0], [2.0, 4.0], (0.0, 1.0), 0.5) == pytest.approx(1.5)
    assert compare.at_kl([1.0, 3.0], [2.0, 4.0], (0.0, 1.0), 3.5) is None
    assert compare.at_kl([2.0, 1.0, 4.0], [5.0, 9.0, 9.0], (0.0, 1.0), 1.5) == pytest.approx(4.0)
    assert compare.at_kl([1.0, nan], [2.0, nan], (0.0, 1.0), 2.0) is None


def test_differences_at_a_kl_are_of_seeds_that_both_reach():
    pytest.importorskip("scipy")
    numbers = {"SFT": {"kl": [0.0, 0.0], "tokens": [10.0, 20.0]},      # one rate, two seeds, a look
               "a": {"kl": [[[1.0], [2.0]]], "tokens": [[[14.0], [28.0]]]},
               "b": {"kl": [[[4.0], [0.5]]], "tokens": [[[18.0], [21.0]]]}}
    lines = compare.table_kl(numbers, "ab", "tokens", 0, ["ab"]).split("\n")[2:]
    table = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines}     # KL 0.25, .5, 1, 2
    assert table["| a minus b"] == ["0.50 ± 0.00 (2)", "1.00 ± 0.00 (2)", "2.00 (1)", "- |"]
    assert table["| a"][3] == "28.00 (1) |" and table["| b"][2] == "12.00 (1)"


def test_a_choice_is_scored_where_it_was_not_made():
    """Two rates: the first wins the votes of seeds 0 and 1, the second those of seeds 2 to 4; a
    third would win, but diverged for one seed."""
    vote = np.array([[[0.8], [0.8], [0.1], [0.1], [0.1]], [[0.5]] * 5, [[1.0]] * 4 + [[np.nan]]])
    row = {"vote": vote.tolist(), "reward": (vote * 0 + np.arange(3)[:, None, None]).tolist()}
    assert compare.tuned(row) == (1, 0)
    assert compare.tuned({**row, "vote": vote[:2].tolist()}, [0, 1]) == (0, 0)
    row = {"vote": vote[:2].tolist(), "reward": (vote[:2] * 0 + [[[1.0]], [[2.0]]]).tolist()}
    numbers = {"SFT": {"reward": [0.0, 0.1, 0.2, 0.3, 0.4]}, "row": row}
    assert compare.left_out(numbers, "row", "reward").tolist() == [2, 2, 2, 2, 2]
    row["vote"][0][2] = [0.8]                  # now it takes seeds 0 to 2 to choose the first rate
    assert compare.left_out(numbers, "row", "reward").tolist() == [2, 2, 2, 1, 1]
    found = compare.out_of_sample(numbers, "row", "reward")
    assert 1 < found["mean"] < 2 and 0 < found["spread"] < 0.5
    row["reward"][0][3] = [None]               # as JSON has it where the run diverged
    row["vote"][0][3] = [None]
    assert compare.left_out(numbers, "row", "reward").tolist() == [2, 2, 2, 0.3, 2]


def test_a_choice_within_a_kl():
    vote = [[[0.6, 0.9]] * 3, [[0.7, 0.8]] * 3]                        # 2 rates, 3 seeds, 2 looks
    kl = [[[0.5, 4.0]] * 3, [[1.0, 3.0]] * 3]
    reward = [[[1.0, 2.0]] * 3, [[3.0, 4.0]] * 3]
    numbers = {"SFT": {"reward": [0.1, 0.2, 0.3]},
               "row": {"vote": vote, "kl": kl, "reward": reward}}
    for at_most, expected in ((9, [2] * 3), (3.5, [4] * 3), (1, [3] * 3), (0.9, [1] * 3),
                              (0.4, [0.1, 0.2, 0.3])):
        assert compare.left_out(numbers, "row", "reward", at_most).tolist() == expected


def test_total_steps_count_the_adversarys_turns_before():
    """The look at 50 steps comes after one turn of the adversary, as turns has it."""
    order = [player for _, player in iopo.turns(6, 25, 25)]
    for steps in (10, 25, 50, 100, 150):
        made = [k for k, player in enumerate(order, start=1) if player == "protagonist"][steps - 1]
        assert compare.total_steps("IOPO", steps) == made
        assert compare.total_steps("ratio alone", steps) == steps


def test_shares_are_of_different_draws(monkeypatch):
    """Two samples to two prompts, against all pairs of different draws by hand."""
    monkeypatch.setattr(compare, "SAMPLES", {"test": 2})
    vote = {"vote": [[[0.5]]]}
    numbers = {"SFT": {"reward": [0.0]}, "a": vote, "b": vote}
    rewards = {"SFT, test": [[[8, 8, 8, 8]]], "a, test": [[[[1, 2, 3, 4]]]],
               "b, test": [[[[3, 0, 1, 4]]]], "SFT, greedy": [[[1, 2]]],
               "a, greedy": [[[[1, 1]]]], "b, greedy": [[[[-128, -128]]]]}
    rewards = {name: np.array(some, dtype=np.int8) for name, some in rewards.items()}
    rewards["SFT, test"], rewards["SFT, greedy"] = (
        rewards[f"SFT, {what}"][:, :, None] for what in ("test", "greedy"))
    # prompt 1: a says 1, 3, b says 3, 1; prompt 2: a says 2, 4, b says 0, 4
    assert compare.shares(numbers, rewards, "a", "b", "test") == "25/50/25"
    assert compare.shares(numbers, rewards, "a", "SFT", "test") == "0/0/100"
    assert compare.shares(numbers, rewards, "a", "b", "greedy") == "0/50/50"       # b is SFT


def test_holm_by_hand():
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_the_family_is_compared_seed_by_seed():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    gaps = rng.normal(0.5, 1, size=10)
    row = {"vote": [[[0.5]] * 10], "reward": [[[value] for value in gaps]]}
    zero = {"vote": [[[0.5]] * 10], "reward": [[[0.0]] * 10]}
    numbers = {"SFT": {"reward": [0.0] * 10}, "a": row, "b": zero}
    [found, _] = compare.comparisons(numbers, "reward", (("a", "b"), ("b", "b")))
    test = stats.ttest_1samp(gaps, 0)
    low, high = test.confidence_interval(1 - 0.05 / 2)
    assert found["p"] == pytest.approx(test.pvalue) and found["holm"] == pytest.approx(
        min(1, 2 * test.pvalue))
    assert found["difference"] - found["half"] == pytest.approx(low)
    assert found["difference"] + found["half"] == pytest.approx(high)
    # a true difference of this size is found with about 80% power, by simulation
    draws = rng.normal(found["seen"], gaps.std(ddof=1), size=(4000, 10))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05 / 2) == \
        pytest.approx(0.8, abs=0.06)


# ---- Rounds of new pairs -------------------------------------------------------------------------

def small_start(tmp_path):
    """A model of the small safe world, and the Config of a round from it on."""
    start = {"method": "sft", "n_iter": 0, "sft_steps": 40, "batch_size": 8, "device": "cpu",
             "out": str(tmp_path / "start")}
    job = train.prepare(train.make_config(start))
    train.train(job)
    return train.make_config({"method": "dpo", "model": str(tmp_path / "start/protagonist"),
                              "n_iter": 1, "n_mu": 3, "lr": 1e-3, "batch_size": 8, "device": "cpu",
                              "out": str(tmp_path / "rounds")})


def test_a_round_is_a_run_from_the_model_of_the_round_before(tmp_path, capsys):
    config, seen = small_start(tmp_path), []
    config = replace(config, look_every=3)
    rounds.rounds(config, 2, 0.5, lambda *look: seen.append(look[1:]) or {})
    assert seen == [(3, 1, "protagonist"), (3, 2, "protagonist")]
    capsys.readouterr()
    for number, model in ((1, config.model), (2, str(tmp_path / "rounds/round-1/protagonist"))):
        folder = tmp_path / f"rounds/round-{number}"
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["margin"] == 0 for row in metrics] == [True, False, False]
        assert json.loads((folder / "config.json").read_text())["model"] == model
        job = train.prepare(train.Config(**json.loads((folder / "config.json").read_text())))
        lines = (folder / "pairs.jsonl").read_text().splitlines()
        pairs = [Pair(**json.loads(line)) for line in lines]
        rows, _, _ = encode_pairs(pairs, job.tokenizer, 64)
        assert job.players["protagonist"].rows == rows                 # none is held out
        assert len(job.held_out) == 20
        again, _ = rounds.sample_pairs(model, config, 0.5, number)     # whose they are
        assert again == pairs


def test_the_judge_picks_best_and_worst_and_the_widest_gaps(tmp_path, monkeypatch):
    world, tokenizer = SafeWorld(), SafeWorld.tokenizer()
    prompts = world.prompts("train")
    said = ["Use a screwdriver.", "Use a screwdriver. Take your time. Work slowly. Keep it simple. "
            "Do it outside.", "Do not waste my time."]

    def scripted(policy, ids, room, temperature, eos, generator):
        """The first 60 prompts get three answers, the others three times the same."""
        out = []
        for row in range(len(ids)):
            number, which = divmod(scripted.seen, 3)
            text = said[which] if number < 60 else said[0]
            answer = tokenizer.backend.encode(text, add_special_tokens=False).ids
            out.append([7] * room if number == 0 and which == 0 else answer)
            scripted.seen += 1
        return out

    scripted.seen = 0
    monkeypatch.setattr(rounds, "generate", scripted)
    model = Decoder(DecoderConfig(vocab_size=tokenizer.largest_id + 1, **SMALL))
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    config = train.make_config({"method": "dpo", "device": "cpu"})
    pairs, report = rounds.sample_pairs(tmp_path, config, 0.5, 1)
    judged = {prompt: sorted((world.true_reward(prompt, text) + 0.15 * len(text.split()), text)
                             for text in said) for prompt in prompts[:60]}
    gaps = {prompt: scores[-1][0] - scores[0][0] for prompt, scores in judged.items()}
    left = [score for score, text in judged[prompts[0]] if text != said[0]]
    gaps[prompts[0]] = abs(np.subtract(*left))
    got = {pair.prompt: (pair.chosen, pair.rejected) for pair in pairs}
    assert len(got) == 30
    assert ("1 answers without an end, 228 prompts without a preference, 30 pairs of narrow gap"
            in report)
    assert min(gaps[prompt] for prompt in got) >= \
        max(gaps[prompt] for prompt in prompts[:60] if prompt not in got)
    for prompt, answers in got.items():
        if prompt != prompts[0]:
            assert answers == (judged[prompt][-1][1], judged[prompt][0][1])


def test_rounds_on_a_policy_that_says_one_thing_stop(tmp_path, monkeypatch):
    config = small_start(tmp_path)
    monkeypatch.setattr(rounds, "generate", lambda policy, ids, *rest: [[7, 8]] * len(ids))
    with pytest.raises(ValueError, match="prefers no answer"):
        rounds.rounds(config, 2, 1.0)


# ---- Baichuan2's tokenizer -----------------------------------------------------------------------

WORDS = "the cat sat on a mat and ate two of three red apples near here 1234 aaa".split()
SENTENCES = [" ".join(random.Random(k).choices(WORDS, k=12)) for k in range(300)]


@pytest.fixture
def spm():
    pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    return pytest.importorskip("sentencepiece")


def train_spm(spm, folder, **rules):
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "tokenizer"), minloglevel=2,
        hard_vocab_limit=False, **rules)
    return spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("prefix,trim,normal,fallback", [
    (False, False, "identity", True),                                  # Baichuan2's rules
    (True, False, "identity", True), (True, True, "nmt_nfkc", False),
    (True, True, "identity", True)])
def test_a_sentencepiece_model_becomes_a_tokenizer(prefix, trim, normal, fallback, spm, tmp_path):
    """The same ids as sentencepiece itself for any text, and Baichuan2's chat format by ids."""
    theirs = train_spm(spm, tmp_path, model_type="bpe", vocab_size=400, add_dummy_prefix=prefix,
                       remove_extra_whitespaces=trim, normalization_rule_name=normal,
                       byte_fallback=fallback,
                       user_defined_symbols=["<reserved_106>", "<reserved_107>"])
    (tmp_path / "config.json").write_text('{"model_type": "baichuan", "eos_token_id": 2}')
    generation = tmp_path / "generation_config.json"
    for ids in (["x", 4], [None, 4], [3, -1], [3, 10**30], [1.5, 4]):
        generation.write_text(json.dumps({"user_token_id": ids[0], "assistant_token_id": ids[1]}))
        with pytest.raises(ValueError, match="which mark the turns of Baichuan2"):
            baichuan2.convert(tmp_path)
    names = {"tokenizer.model", "tokenizer.vocab", "config.json", "generation_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names         # nothing was written
    if theirs.get_piece_size() > 196:
        generation.unlink()                                            # a base model says nothing
        baichuan2.convert(tmp_path)
        template = (tmp_path / "chat_template.jinja").read_text()
        assert theirs.id_to_piece(195) in template and theirs.id_to_piece(196) in template
        assert "USER" not in template
        (tmp_path / "tokenizer.json").unlink()
    generation.write_text('{"user_token_id": 3, "assistant_token_id": 4}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": false}')
    said = baichuan2.convert(tmp_path)
    if prefix:                              # sentencepiece puts none behind a mark, a turn has one
        assert "it reads 2 otherwise than sentencepiece, such as 'a<reserved_106>b'" in said
    else:
        assert "it reads 0 otherwise than sentencepiece" in said
    tokenizer, rng = Tokenizer.from_pretrained(tmp_path), random.Random(0)
    for text in SENTENCES[:50] + ["".join(rng.choices("aaathe  \n\té漢字😀ﬁ１.", k=30))
                                  for _ in range(200)]:
        ids = theirs.encode(text)
        assert tokenizer.encode(text) == ids, text
        if "\N{DOUBLE QUESTION MARK}" not in theirs.decode(ids):
            assert tokenizer.decode(ids) == theirs.decode(ids)
    said = [("system", "the cat"), ("user", "a mat"), ("assistant", "here"), ("user", "red")]
    talk = [{"role": role, "content": content} for role, content in said]
    prompt = (theirs.encode("the cat") + [3] + theirs.encode("a mat") + [4] + theirs.encode("here")
              + [3] + theirs.encode("red") + [4])
    assert tokenizer.encode_pair(Pair(talk, "two apples", "on")) == \
        (prompt, theirs.encode("two apples") + [2], theirs.encode("on") + [2])


def test_pieces_merge_by_their_scores_in_whatever_order_they_stand(spm, tmp_path):
    from sentencepiece import sentencepiece_model_pb2
    train_spm(spm, tmp_path, model_type="bpe", vocab_size=120, add_dummy_prefix=False,
              normalization_rule_name="identity", remove_extra_whitespaces=False)
    path = tmp_path / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    shuffled = [(piece.piece, piece.score) for piece in normal]
    random.Random(1).shuffle(shuffled)
    for piece, (text, score) in zip(normal, shuffled):
        piece.piece, piece.score = text, score
    path.write_bytes(proto.SerializeToString())
    assert "it reads 0 otherwise" in baichuan2.convert(tmp_path)


def test_what_is_no_sentencepiece_model(spm, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff nothing")
    with pytest.raises(ValueError, match="has no tokenizer.json; .*reproduction.baichuan2"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no SentencePiece model"):
        baichuan2.convert(tmp_path)
    with pytest.raises(ValueError, match="No such file"):
        baichuan2.convert(tmp_path / "gone")
    train_spm(spm, tmp_path, model_type="unigram", vocab_size=60)
    with pytest.raises(ValueError, match="only SentencePiece models of type BPE"):
        baichuan2.convert(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    shell = [sys.executable, "-m", "reproduction.baichuan2"]
    out = subprocess.run([*shell, tmp_path], capture_output=True, text=True, cwd=HERE.parent)
    assert out.returncode == 2 and out.stdout == "" and "has a tokenizer.json already" in out.stderr
    out = subprocess.run(shell, capture_output=True, text=True, cwd=HERE.parent)
    assert out.returncode == 2 and out.stderr.startswith("reproduction.baichuan2: usage")


def test_without_the_libraries_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        baichuan2.convert(tmp_path)
