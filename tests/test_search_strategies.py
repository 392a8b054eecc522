"""Searches by other strategies than `cp`: what they ask of their networks, and what is checked."""

import copy
import json

import numpy as np
import pytest
from oracle import FIVE, TOTAL, Oracle, log_of, replace_data, run
from reads import OF_SAMPLED, note_reads

from cpnas_jax.architecture.replay import replay
from cpnas_jax.architecture.sampling import all_survivors, operation_names
from cpnas_jax.architecture.strategy import RandomSearch
from cpnas_jax.config import base_config
from cpnas_jax.models.space import CHILD, MODELS
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


def log_of_a_run(tmp_path_factory, networks=Oracle, **settings):
    """The lines of a search that several tests alter."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        replace_data(patch)
        run(patch, workdir, networks, **settings)
    return log_of(workdir)


def events(workdir, kind):
    return [line for line in log_of(workdir) if line["event"] == kind]


def test_child_trains_no_parent(monkeypatch, tmp_path):
    genotype, said = run(monkeypatch, tmp_path, strategy="child")
    samples = events(tmp_path, "sample")
    assert len(samples) == TOTAL
    assert {request[1] for request in Oracle.last.requests} == {CHILD}
    assert {line["parent_accuracy"] for line in samples} == {None}
    assert all(line["z"] == line["child_accuracy"] for line in samples)
    assert "28 edges; 1-bit child.\n" in said
    assert dict(genotype.provenance)["strategy"] == "child"


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
    run(monkeypatch, tmp_path, Remembers, strategy="random_search", candidates=5)
    assert draws == [(epoch, epoch // 5) for epoch in range(25)]
    samples, (choice,) = events(tmp_path, "sample"), events(tmp_path, "choice")
    best = max(samples, key=lambda line: line["child_accuracy"])
    assert choice["architecture"] == best["architecture"]
    assert choice["candidate"] == best["round"]
    for candidate in range(1, 6):
        own = [line["architecture"] for line in samples if line["round"] == candidate]
        assert len(own) == 5
        assert all(architecture == own[0] for architecture in own)


# In the middle of a candidate, and in its last epoch.
@pytest.mark.parametrize("epoch", [3, 4])
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

    @pytest.fixture(scope="class")
    @classmethod
    def log(cls, tmp_path_factory):
        return log_of_a_run(tmp_path_factory, strategy="random_search", candidates=5)

    @pytest.fixture
    def lines(self, log):
        return copy.deepcopy(log)

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


def test_every_key_of_these_strategies_is_read(monkeypatch):
    config = base_config()
    read = note_reads(monkeypatch, config)
    for strategy in ("cp_plus", "random_search"):
        config.search.strategy = strategy
        sampled_strategy(config)
    # How many images are scored is the networks' business.
    assert OF_SAMPLED - {"search.plus_score_examples"} <= read


def test_scores_are_only_of_what_is_trained():
    config = base_config()
    config.search.strategy = "child"
    assert sampled_strategy(config).score({CHILD: np.float64(0.25)}) == 0.25


PLUS = {"strategy": "cp_plus", "max_scored": 48, "plus_beta_p": 0.5}


class Noisy(Oracle):
    """As uncertain as real accuracies, and the same whenever an architecture is scored again."""

    def accuracy(self, model, architecture):
        seed = int.from_bytes(architecture.astype(np.uint8).tobytes()[:8], "little")
        noise = np.random.default_rng(seed).normal(0, 0.01)
        return super().accuracy(model, architecture) + noise


def test_cp_plus_finds_what_is_best_on_every_edge(monkeypatch, tmp_path):
    genotype, said = run(monkeypatch, tmp_path, edge_policy="top2", **PLUS)
    lines = log_of(tmp_path)
    # Without any noise nearly all is certain after the first stage: 2 rounds of 5 operations.
    assert sum(line["event"] == "sample" for line in lines) == 2 * 5
    assert sum(line["event"] == "pruning" for line in lines) <= 2
    assert {edge.operation for _, edges in genotype.cells() for edge in edges} == {FIVE[-1]}
    results = json.loads((tmp_path / "results.json").read_text())["search"]
    scored = sum(len(line["child_accuracy"]) for line in lines if line["event"] == "scores")
    assert results["scored"] == scored > 0
    assert "architectures scored, reliability" in said


def test_cp_plus_trains_another_path_each_step(monkeypatch, tmp_path):
    settings = {"edge_policy": "top2", **PLUS, "plus_paths": "step"}
    _, said = run(monkeypatch, tmp_path, Noisy, **settings)
    assert "another path each step" in said
    assert Oracle.last.takes_turns
    config = base_config()
    config.search.update(rounds=1, operations=FIVE, **settings)
    strategy = sampled_strategy(config)
    first = strategy.turns(5, 1, 1, all_survivors(FIVE), 3 * 10)
    for model in MODELS:
        trained = [
            own for what, of, own, _ in Oracle.last.requests if (what, of) == ("train", model)
        ]
        # Three steps of each epoch; the first stage has two rounds of five epochs.
        assert len(trained) == 3 * len(events(tmp_path, "sample"))
        np.testing.assert_array_equal(trained[:30], first)
    # What is logged, and scored after the epoch, is what other strategies train.
    sampled = [line["architecture"] for line in events(tmp_path, "sample")[:5]]
    expected = [operation_names(own) for own in strategy.sample(5, 1, all_survivors(FIVE))]
    assert sampled == expected
    assert replay(log_of(tmp_path), strategy).finished


def test_what_cp_plus_trains_is_configured():
    config = base_config()
    config.search.update(strategy="cp_plus", rounds=1)
    usual = sampled_strategy(config)
    # Of the child alone: four rounds of 8, 4 and 2 operations.
    assert (usual.total, usual.takes_turns) == (56, True)
    config.search.update(plus_training=1, plus_paths="epoch")
    changed = sampled_strategy(config)
    assert (changed.total, changed.takes_turns) == (28, False)


def test_an_epoch_of_turns_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    class Stops(Noisy):
        def train(self, model, architectures, number, sums):
            super().train(model, architectures, number, sums)
            return (number, sums.steps) == (3, 2)

    class Remembers(Noisy):
        def train(self, model, architectures, number, sums):
            trained.append((model, number, sums.steps, architectures[sums.steps].tolist()))
            return super().train(model, architectures, number, sums)

    settings = {"edge_policy": "top2", **PLUS, "plus_paths": "step"}
    trained = []
    run(monkeypatch, tmp_path / "whole", Remembers, **settings)
    whole, trained = trained, []
    with pytest.raises(Stopped):
        run(monkeypatch, tmp_path / "stopped", Stops, **settings)
    run(monkeypatch, tmp_path / "stopped", Remembers, **settings)
    assert trained == whole[-len(trained) :]
    assert trained[0][:3] == (CHILD, 3, 2)


@pytest.mark.parametrize("after", [1, 4])
def test_a_search_stopped_while_it_scores_goes_on_bitwise(monkeypatch, tmp_path, after):
    settings = {"edge_policy": "top2", **PLUS}
    run(monkeypatch, tmp_path / "whole", Noisy, **settings)
    scored = 0

    def wished():
        nonlocal scored
        scored += 1
        return scored == after

    with monkeypatch.context() as patch:
        patch.setattr("cpnas_jax.sampled_run.stop_wished", wished)
        with pytest.raises(Stopped, match=r"scored rounds|after sampled epoch"):
            run(patch, tmp_path / "stopped", Noisy, **settings)
    run(monkeypatch, tmp_path / "stopped", Noisy, **settings)
    logs = [log_of(tmp_path / name) for name in ("whole", "stopped")]
    for line in (*logs[0], *logs[1]):
        line.pop("seconds", None)
    assert logs[0] == logs[1]


class TestReplayOfCpPlus:
    """Scored architectures follow from the seed, credit and drops from their scores."""

    @pytest.fixture
    def strategy(self):
        config = base_config()
        config.search.update(rounds=1, operations=FIVE, **PLUS)
        return sampled_strategy(config)

    @pytest.fixture(scope="class")
    @classmethod
    def log(cls, tmp_path_factory):
        return log_of_a_run(tmp_path_factory, Noisy, edge_policy="top2", **PLUS)

    @pytest.fixture
    def lines(self, log):
        return copy.deepcopy(log)

    def test_it_is_accepted_as_far_as_it_goes(self, strategy, lines):
        assert replay(lines, strategy).finished
        for length in (3, 12, len(lines) - 1):
            assert not replay(lines[:length], strategy).finished

    @pytest.mark.parametrize(
        ("kind", "change", "words"),
        [
            ("scores", {"round": 3}, "expected the scores line of stage 5, round 1"),
            ("scores", {"child_accuracy": [0.5]}, "child_accuracy has 1 numbers"),
            ("scores", {"child_accuracy": [2.0] * 5}, r"it must be a number in \[0, 1\]"),
            ("scores", {"parent_log_likelihood": 3}, "it must be a list of numbers"),
            ("scores", {"parent_accuracy": ...}, "there is no key 'parent_accuracy'"),
            ("pruning", {"dropped": 5}, "it must be two lists of 14 lists"),
            ("pruning", {"dropped": [[[["none"]]] * 14] * 2}, "it must be a list of operations"),
            ("pruning", {"scored": 7}, "scored is 7; so far it is"),
            ("pruning", {"reliability": 0.1}, "reliability is 0.1; of these scores it must be"),
            ("pruning", {"dropped": []}, "it must be two lists of 14 lists"),
        ],
    )
    def test_what_is_wrong_is_told(self, strategy, lines, kind, change, words):
        number = next(n for n, line in enumerate(lines) if line["event"] == kind)
        lines[number] = {k: v for k, v in (lines[number] | change).items() if v is not ...}
        with pytest.raises(UserError, match=f"line {number + 1}: .*{words}"):
            replay(lines, strategy)

    def test_altered_scores_show_in_the_credit(self, strategy, lines):
        first = next(n for n, line in enumerate(lines) if line["event"] == "scores")
        pruning = next(n for n, line in enumerate(lines) if line["event"] == "pruning")
        lines[first]["child_accuracy"][2] += 0.1
        with pytest.raises(UserError, match=f"line {pruning + 1}: "):
            replay(lines, strategy)

    def test_what_was_dropped_is_checked(self, strategy, lines):
        pruning = next(n for n, line in enumerate(lines) if line["event"] == "pruning")
        edge = lines[pruning]["dropped"][1][3]
        edge[0] = next(name for name in FIVE if name not in edge)
        with pytest.raises(UserError, match="dropped of the reduce cell, edge"):
            replay(lines, strategy)


class LikesSkips(Oracle):
    """Skips are worth most, then pooling."""

    worth = np.array([0.1, 0.3, 0.2, 0.9, 0.05, 0.0, 0.0, 0.0])


def test_a_collapse_is_warned_of(monkeypatch, tmp_path):
    settings = {"strategy": "cp_plus", "max_scored": 48}
    _, said = run(monkeypatch, tmp_path, LikesSkips, **settings)
    warning = "warning: 100% of the surviving operations are skip, pooling or none, more than"
    assert f"{warning} config.search.collapse_share=0.75" in said
    _, said = run(monkeypatch, tmp_path / "quiet", LikesSkips, collapse_share=1.0, **settings)
    assert "warning" not in said


def test_skips_over_the_limit_are_replaced_aloud_and_on_record(monkeypatch, tmp_path):
    genotype, said = run(
        monkeypatch,
        tmp_path,
        LikesSkips,
        strategy="cp_plus",
        max_scored=48,
        max_skips=2,
        edge_policy="top2",
    )
    counts = genotype.operation_counts()
    assert [counts[cell]["skip_connect"] for cell in ("normal", "reduce")] == [2, 2]
    results = json.loads((tmp_path / "results.json").read_text())["search"]
    assert len(results["limited"]) >= 2 * (8 - 2)
    for line in results["limited"]:
        assert "over config.search.max_skips=2" in line
        assert line in said
