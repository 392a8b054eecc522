"""A search that is stopped by a signal, networks stood in for, and its waves of architectures."""

import itertools
import os
import signal

import numpy as np
import pytest
from oracle import FIVE, TOTAL, Oracle, log_of, replace_data, run

from cpnas_jax.architecture.replay import replay
from cpnas_jax.architecture.strategy import ChildParent
from cpnas_jax.models.space import CHILD, PARENT
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.interruptions import Stopped, handled, stop_wished


@pytest.fixture(autouse=True)
def data(monkeypatch):
    replace_data(monkeypatch)


@pytest.fixture
def handlers():
    with handled():
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("model", [CHILD, PARENT])
@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_saves_in_the_middle_of_a_sampled_epoch(
    monkeypatch, tmp_path, handlers, capfd, number, model, step
):
    undisturbed, _ = run(monkeypatch, tmp_path / "undisturbed")
    requests = Oracle.last.requests

    class Signalled(Oracle):
        def train(self, own, architectures, epoch, sums):
            stop = super().train(own, architectures, epoch, sums)
            if (epoch, own, sums.steps) == (4, model, step) and not stop:
                os.kill(os.getpid(), number)
                sum(range(10))  # the signal is looked at here
                return stop_wished()
            return stop

    where = f"in sampled epoch 5 of {TOTAL}, after step {step} of the {model}"
    with pytest.raises(Stopped, match=where):
        run(monkeypatch, tmp_path / "run", Signalled)
    assert "once more stops at once" in capfd.readouterr().err
    before = Oracle.last.requests
    genotype, said = run(monkeypatch, tmp_path / "run")
    assert f"Resumed {where}." in said
    assert genotype == undisturbed
    histories = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in log_of(tmp_path / name)]
        for name in ("run", "undisturbed")
    ]
    assert histories[0] == histories[1]
    # Nothing is done twice; a training that goes on asks again.
    for first, second in zip(before + Oracle.last.requests, requests, strict=True):
        assert first[:2] == second[:2]
        np.testing.assert_array_equal(first[2], second[2])


def test_a_signal_after_the_last_step_is_not_forgotten(monkeypatch, tmp_path, handlers):
    class Late(Oracle):
        def score(self, model, architectures):
            if len(self.requests) == 4 * TOTAL - 1:
                os.kill(os.getpid(), signal.SIGTERM)
                sum(range(10))
            return super().score(model, architectures)

    with pytest.raises(Stopped, match="after the last step"):
        run(monkeypatch, tmp_path, Late)
    assert f"Resumed after sampled epoch {TOTAL} of {TOTAL}" in run(monkeypatch, tmp_path)[1]


class Together(Oracle):
    """Trains up to three architectures of a round at the same time."""

    paths = 3


def test_waves_of_a_round_are_credited_in_its_order(monkeypatch, tmp_path):
    genotype, said = run(monkeypatch, tmp_path, Together)
    lines = log_of(tmp_path)
    # Whatever is trained together, the log is that of an Algorithm 9: it can be replayed.
    checked = replay(lines, ChildParent(seed=0, rounds=1, beta_p=2.0, operations=FIVE))
    np.testing.assert_array_equal(genotype.architecture(), checked.operations)
    assert "Up to 3 architectures of a round are trained at the same time" in said
    requests = Together.last.requests
    waves = [len(list(group)) for _, group in itertools.groupby(requests, lambda each: each[:2])]
    # A round of 5 is 3 + 2; both models are trained and then scored.
    assert waves[:8] == [3] * 4 + [2] * 4
    trained = [epoch for *what, _, epoch in requests if what == ["train", CHILD]]
    assert trained == list(range(TOTAL))


@pytest.mark.parametrize("paths", [3, 2])
def test_a_wave_is_finished_by_as_many_groups(monkeypatch, tmp_path, handlers, paths):
    class Signalled(Together):
        def train(self, own, architectures, epoch, sums):
            stop = super().train(own, architectures, epoch, sums)
            if (epoch, own, sums.steps) == (3, PARENT, 2) and not stop:
                os.kill(os.getpid(), signal.SIGTERM)
                sum(range(10))  # the signal is looked at here
                return stop_wished()
            return stop

    with pytest.raises(Stopped, match=f"in sampled epoch 4 of {TOTAL}, after step 2 of the parent"):
        run(monkeypatch, tmp_path / "run", Signalled)
    monkeypatch.setattr(Oracle, "paths", paths)
    if paths == 2:
        with pytest.raises(UserError, match=r"3 architectures were .* these devices train 2"):
            run(monkeypatch, tmp_path / "run")
    monkeypatch.setattr(Oracle, "paths", 3)
    genotype, _ = run(monkeypatch, tmp_path / "run")
    assert genotype == run(monkeypatch, tmp_path / "undisturbed")[0]
