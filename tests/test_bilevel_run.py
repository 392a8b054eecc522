"""The loop of gradient strategies, with networks that are stood in for."""

import json

import numpy as np
import pytest
from oracle import FIVE, log_of, replace_data, run

from cpnas_jax import search as search_module
from cpnas_jax.architecture.parsing import parse_line
from cpnas_jax.models.space import CHILD, MODELS, OPERATIONS
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.interruptions import Stopped, stop_wished
from cpnas_jax.strategies import check_search

SETTINGS = {"epochs": 6, "alpha_warmup": 2, "alpha_learning_rate": 0.1}


class Ascent:
    """Alpha that moves towards the last operations of `FIVE`, a little each step."""

    paths, steps_per_epoch, first_step_seconds = 1, 3, 1.0
    stops: tuple[int, int] | None = None

    def __init__(self, config, train, validation, epochs, started):
        del train, validation, started
        self.epochs, self.warmup = epochs, config.search.alpha_warmup
        self.models = MODELS if config.search.strategy == "cp_gradient" else (CHILD,)
        self.compile_seconds = {"train": 0.0, "score": 0.0}
        self.masks = []
        Ascent.last = self

    def initial_state(self):
        alpha = {cell: np.zeros((14, 8), np.float32) for cell in ("normal", "reduce")}
        return {"bilevel": {"alpha": alpha}}

    def load(self, states):
        self.state = states["bilevel"]

    def host_state(self):
        return {"bilevel": self.state}

    def alpha(self):
        return self.state["alpha"]

    def compile(self):
        pass

    def memory_bytes(self):
        return {"weights": 2**20}

    def train(self, survivors, epoch, sums):
        if not sums.steps:
            self.masks.append(survivors.copy())
        if epoch >= self.warmup:
            slope = np.arange(8, dtype=np.float32) + 0.01 * np.arange(14)[:, None]
            self.state = {
                "alpha": {k: v + slope.astype(np.float32) for k, v in self.alpha().items()}
            }
        sums.steps += 1
        sums.objective += 2.0
        for model in self.models:
            sums.losses[model] = sums.losses.get(model, 0.0) + 1.5
        return (epoch, sums.steps) == self.stops or stop_wished()

    def score(self, survivors):
        return {model: 0.1 * number + 0.3 for number, model in enumerate(self.models)}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    replace_data(monkeypatch)
    monkeypatch.setattr(search_module, "BilevelNetworks", Ascent)


def test_cp_gradient_drops_until_one_is_left(monkeypatch, tmp_path):
    genotype, said = run(monkeypatch, tmp_path, strategy="cp_gradient", **SETTINGS)
    assert {edge.operation for _, edges in genotype.cells() for edge in edges} == {FIVE[-1]}
    lines = log_of(tmp_path)
    assert [line["event"] for line in lines] == ["epoch"] * 3 + ["stage", "epoch"] * 3 + ["stage"]
    assert [int(mask.sum(axis=-1).max()) for mask in Ascent.last.masks] == [5, 5, 5, 4, 3, 2]
    assert [line["objective"] for line in lines if line["event"] == "epoch"] == [0, 0, 2, 2, 2, 2]
    assert "alpha waits" in said
    assert "alpha's objective 2.000" in said
    results = json.loads((tmp_path / "results.json").read_text())["search"]
    assert results["sampled_epochs"] == 6
    assert results["last_parent_accuracy"] == pytest.approx(0.4)


@pytest.mark.parametrize("strategy", ["darts", "pc_darts"])
def test_a_mixture_keeps_all_until_the_end(monkeypatch, tmp_path, strategy):
    settings = {"edge_policy": "top2", "edge_normalisation": False, **SETTINGS}
    genotype, _ = run(monkeypatch, tmp_path, strategy=strategy, **settings)
    assert [line["event"] for line in log_of(tmp_path)] == ["epoch"] * 6
    assert {edge.operation for _, edges in genotype.cells() for edge in edges} == {FIVE[-1]}
    assert all(line["parent_accuracy"] is None for line in log_of(tmp_path))


@pytest.mark.parametrize("stops", [(0, 2), (3, 1), (3, 3), (5, 3)])
def test_a_stopped_search_goes_on_bitwise(monkeypatch, tmp_path, stops):
    settings = {"strategy": "cp_gradient", **SETTINGS}
    whole, _ = run(monkeypatch, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Ascent, "stops", stops)
        with pytest.raises(Stopped, match="in epoch"):
            run(patch, tmp_path / "stopped", **settings)
    again, said = run(monkeypatch, tmp_path / "stopped", **settings)
    assert again == whole
    assert f"Resumed in epoch {stops[0] + 1} of 6, after step {stops[1]}" in said
    logs = [log_of(tmp_path / name) for name in ("whole", "stopped")]
    for line in (*logs[0], *logs[1]):
        line.pop("seconds", None)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("strategy", ["cp", "cp_plus", "random", "darts", "cp_gradient"])
def test_a_search_is_checked_from_its_workdir(monkeypatch, tmp_path, strategy):
    run(monkeypatch, tmp_path, strategy=strategy, max_scored=8, **SETTINGS)
    found = check_search(tmp_path)
    assert found.finished
    path = tmp_path / "search/history.jsonl"
    lines = path.read_text().splitlines()
    changed = json.loads(lines[0])
    parse_line(changed)
    key = {"random": "candidate", "darts": "epoch", "cp_gradient": "epoch"}.get(strategy, "sample")
    changed[key] += 1
    path.write_text("\n".join([json.dumps(changed), *lines[1:], ""]))
    with pytest.raises(UserError, match=r"history.jsonl, line 1: "):
        check_search(tmp_path)


def test_no_search_cannot_be_checked(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*config.json; give the --workdir of a"):
        check_search(tmp_path)
    (tmp_path / "search").mkdir()
    (tmp_path / "search/history.jsonl").write_text("")
    for text in ("{}", '{"config": {"seed": 0}}', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config.json is damaged or of another version"):
            check_search(tmp_path)


def test_the_last_operation_is_not_none(monkeypatch, tmp_path):
    """Where all alphas are equal the first dropped is `none`, so that no node dies."""
    monkeypatch.setattr(Ascent, "train", lambda self, mask, epoch, sums: _count(sums))
    genotype, _ = run(monkeypatch, tmp_path, strategy="cp_gradient", **SETTINGS)
    assert OPERATIONS[0] not in {edge.operation for _, e in genotype.cells() for edge in e}


def _count(sums):
    sums.steps += 1
    sums.losses = {model: 1.0 for model in MODELS}
    return False
