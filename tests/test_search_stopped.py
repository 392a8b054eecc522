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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A search without a signal: (genotype, requests, history without durations)."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        replace_data(patch)
        genotype, _ = run(patch, workdir)
    return genotype, Oracle.last.requests, history(workdir)


def history(workdir):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in log_of(workdir)]


@pytest.mark.parametrize(
    ("number", "model", "step"),
    [
        (signal.SIGTERM, CHILD, 1),
        (signal.SIGINT, CHILD, 3),
        (signal.SIGINT, PARENT, 1),
        (signal.SIGTERM, PARENT, 3),
    ],
)
def test_a_signal_saves_in_the_middle_of_a_sampled_epoch(
    monkeypatch, tmp_path, handlers, capfd, undisturbed, number, model, step
):

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
        run(monkeypatch, tmp_path, Signalled)
    assert "once more stops at once" in capfd.readouterr().err
    before = Oracle.last.requests
    genotype, said = run(monkeypatch, tmp_path)
    expected, requests, expected_history = undisturbed
    assert f"Resumed {where}." in said
    assert genotype == expected
    assert history(tmp_path) == expected_history
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
def test_a_wave_is_finished_by_as_many_groups(monkeypatch, tmp_path, handlers, undisturbed, paths):
    class Signalled(Together):
        def train(self, own, architectures, epoch, sums):
            stop = super().train(own, architectures, epoch, sums)
            if (epoch, own, sums.steps) == (3, PARENT, 2) and not stop:
                os.kill(os.getpid(), signal.SIGTERM)
                sum(range(10))  # the signal is looked at here
                return stop_wished()
            return stop

    with pytest.raises(Stopped, match=f"in sampled epoch 4 of {TOTAL}, after step 2 of the parent"):
        run(monkeypatch, tmp_path, Signalled)
    monkeypatch.setattr(Oracle, "paths", paths)
    if paths == 2:
        with pytest.raises(UserError, match=r"3 architectures were .* these devices train 2"):
            run(monkeypatch, tmp_path)
    monkeypatch.setattr(Oracle, "paths", 3)
    genotype, _ = run(monkeypatch, tmp_path)
    assert genotype == undisturbed[0]
