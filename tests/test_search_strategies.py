"""Searches by other strategies than `cp`: what they ask of their networks, and what is checked."""

import json

import numpy as np
import pytest
from oracle import FIVE, TOTAL, Oracle, log_of, replace_data, run

from cpnas_jax.architecture.replay import replay
from cpnas_jax.architecture.strategy import RandomSearch
from cpnas_jax.config import base_config
from cpnas_jax.models.space import CHILD
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.interruptions import Stopped
from cpnas_jax.strategies import sampled_strategy


@pytest.fixture(autouse=True)
def data(monkeypatch):
    replace_data(monkeypatch)


class Remembers(Oracle):
    """Says which draw of the weights was trained."""

    def train(self, model, architectures, epoch, sums):
        if not sums.steps:
            draws.append((epoch, float(self.states[model]["weights"][0])))
        return super().train(model, architectures, epoch, sums)


draws = []


def events(workdir, kind):
    return [line for line in log_of(workdir) if line["event"] == kind]


def test_child_trains_no_parent(monkeypatch, tmp_path):
    genotype, said = run(monkeypatch, tmp_path, strategy="child")
    samples = events(tmp_path, "sample")
    assert len(samples) == TOTAL
    assert {request[1] for request in Oracle.last.requests} == {CHILD}
    assert {line["parent_accuracy"] for line in samples} == {None}
    assert all(line["z"] == line["child_accuracy"] for line in samples)
    assert "steps of the child." in said
    assert dict(genotype.provenance)["strategy"] == "child"
    assert (tmp_path / "accuracies.svg").exists()


def test_random_reads_no_data_and_trains_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("cpnas_jax.search.load_split", None)
    genotype, _ = run(monkeypatch, tmp_path, None, strategy="random", edge_policy="top2")
    assert [line["event"] for line in log_of(tmp_path)] == ["choice"]
    again, said = run(monkeypatch, tmp_path, None, strategy="random", edge_policy="top2")
    assert again == genotype
    assert "nothing is run again" in said
    results = json.loads((tmp_path / "results.json").read_text())["search"]
    assert (results["sampled_epochs"], results["seconds"]) == (0, 0)
    assert results["last_child_accuracy"] is None


def test_a_random_search_trains_each_candidate_from_fresh_weights(monkeypatch, tmp_path):
    draws.clear()
    # 28 epochs in all, 5 of each candidate.
    genotype, _ = run(monkeypatch, tmp_path, Remembers, strategy="random_search", candidates=5)
    assert draws == [(epoch, epoch // 5) for epoch in range(25)]
    samples, (choice,) = events(tmp_path, "sample"), events(tmp_path, "choice")
    best = max(samples, key=lambda line: line["child_accuracy"])
    assert choice["architecture"] == best["architecture"]
    assert choice["candidate"] == best["round"]
    for candidate in range(1, 6):
        own = [line["architecture"] for line in samples if line["round"] == candidate]
        assert len(own) == 5
        assert all(architecture == own[0] for architecture in own)
    names = [genotype.architecture().tolist()]
    assert names


@pytest.mark.parametrize("epoch", [3, 4, 5])
def test_a_stopped_random_search_ends_as_if_it_had_not_been(monkeypatch, tmp_path, epoch):
    class Stops(Remembers):
        def train(self, model, architectures, number, sums):
            super().train(model, architectures, number, sums)
            return number == epoch and sums.steps == 2

    settings = {"strategy": "random_search", "candidates": 5}
    run(monkeypatch, tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        run(monkeypatch, tmp_path / "stopped", Stops, **settings)
    draws.clear()
    run(monkeypatch, tmp_path / "stopped", Remembers, **settings)
    # What was under way goes on with its own weights.
    assert draws == [(number, number // 5) for number in range(epoch + 1, 25)]
    logs = [log_of(tmp_path / name) for name in ("whole", "stopped")]
    for line in (*logs[0], *logs[1]):
        line.pop("seconds", None)
    assert logs[0] == logs[1]


class TestReplayOfARandomSearch:
    """Its log says how it ended, and every line of it is checked."""

    @pytest.fixture
    def strategy(self):
        config = base_config()
        config.search.update(strategy="random_search", candidates=5, rounds=1, operations=FIVE)
        return sampled_strategy(config)

    @pytest.fixture
    def lines(self, monkeypatch, tmp_path):
        run(monkeypatch, tmp_path, strategy="random_search", candidates=5)
        return log_of(tmp_path)

    def test_it_is_accepted_as_far_as_it_goes(self, strategy, lines):
        assert isinstance(strategy, RandomSearch)
        assert replay(lines, strategy).finished
        unfinished = replay(lines[:-1], strategy)
        assert not unfinished.finished
        assert unfinished.sampled_epochs == 25

    @pytest.mark.parametrize(
        ("number", "change", "words"),
        [
            (25, {"candidate": 2}, "candidate is 2; the highest accuracy"),
            (25, {"child_accuracy": 0.9}, "child_accuracy is 0.9; after its last epoch it had"),
            (7, {"z": 0.9}, "z is 0.9; of these accuracies"),
            (7, {"parent_accuracy": 0.5}, "the parent is not trained by this strategy"),
            (7, {"child_accuracy": None}, "child_accuracy is None; it must be a number"),
            (7, {"sample": 4}, "expected the sample line of stage 5, round 2, sample 3"),
            (7, {"event": "choice", "candidate": 1}, "expected the sample line"),
        ],
    )
    def test_what_is_wrong_is_told(self, strategy, lines, number, change, words):
        lines[number].update(change)
        with pytest.raises(UserError, match=f"line {number + 1}: .*{words}"):
            replay(lines, strategy)

    def test_another_architecture_than_the_candidates(self, strategy, lines):
        cell = lines[25]["architecture"][0]
        cell[0] = next(name for name in FIVE if name != cell[0])
        with pytest.raises(UserError, match="architecture of the normal cell, edge 0->2"):
            replay(lines, strategy)


def test_the_end_of_a_log_of_another_strategy(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, strategy="random")
    strategy = sampled_strategy(base_config())
    with pytest.raises(UserError, match="it is the choice line of stage 5; expected the sample"):
        replay(log_of(tmp_path), strategy)


def test_scores_are_only_of_what_is_trained():
    config = base_config()
    config.search.strategy = "child"
    assert sampled_strategy(config).score({CHILD: np.float64(0.25)}) == 0.25
