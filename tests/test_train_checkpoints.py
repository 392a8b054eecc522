"""Checkpoints of a training: resume, the best and the last, the moving average."""

import dataclasses
import io
import json
import shutil

import pytest
from one_cell import (
    config_in,
    final_state,
    lines_of,
    replace_data,
    reporter_to,
    results_of,
    run,
    trainer_of,
)

from cpnas_jax import modes
from cpnas_jax.runtime.checkpoints import Checkpoints
from cpnas_jax.runtime.packing import digest
from cpnas_jax.trainer import Trainer


@pytest.fixture(autouse=True, scope="module")
def data():
    with pytest.MonkeyPatch.context() as patch:
        replace_data(patch)
        yield


ACCURACIES = {2: 0.3, 4: 0.9, 5: 0.5}
"""What the evaluations are made to say: neither the first nor the last is the best."""


@pytest.fixture(scope="module")
def scripted():
    """Evaluations that tell these accuracies, after so many epochs of four steps."""
    original = Trainer.evaluate

    def told(self, epoch):
        assert epoch + 1 == int(self.host_state().step) // 4
        return dataclasses.replace(original(self, epoch), top1=ACCURACIES[epoch + 1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", told)
        yield original


def longer(directory):
    config = config_in(directory)
    config.network.auxiliary = False
    config.train.update(epochs=5, evaluate_every=2)
    config.runtime.keep_checkpoints = 10
    return config


@pytest.fixture(scope="module")
def kept(scripted, data, tmp_path_factory):
    """A directory with the run, whose evaluations are not at every epoch."""
    directory = tmp_path_factory.mktemp("kept")
    run(longer(directory), directory / "run")
    return directory


class Killed(Exception):
    pass


def test_resume_in_the_middle_of_an_epoch(kept, tmp_path, monkeypatch):
    """Killed after the first checkpoint inside the second epoch, in other portions of steps."""
    config = longer(tmp_path)
    config.runtime.update(checkpoint_every=1, steps_per_call=2)
    original = Trainer.train

    def killed(self, epoch, first_step, num_steps, sums):
        if (epoch, first_step) == (1, 2):
            raise Killed
        original(self, epoch, first_step, num_steps, sums)

    monkeypatch.setattr(Trainer, "train", killed)
    with pytest.raises(Killed):
        run(config, tmp_path / "run")
    monkeypatch.setattr(Trainer, "train", original)
    assert "Resumed in epoch 2 of 5, after step 2" in run(config, tmp_path / "run")
    like = trainer_of(config).initial_state()
    expected, found = (final_state(like, path / "run") for path in (kept, tmp_path))
    assert digest(found) == digest(expected)
    for a, b in zip(lines_of(tmp_path / "run"), lines_of(kept / "run"), strict=True):
        assert a.pop("event") == b.pop("event")
        # Sums of three steps and one, or of single steps, may differ in the last digit.
        assert a == pytest.approx(b, rel=1e-6)


def states(directory, kind):
    """Number -> state of each checkpoint."""
    like = trainer_of(longer(directory)).initial_state()
    with Checkpoints(directory / "run/train" / kind, 10) as checkpoints:
        numbers = checkpoints._manager.all_steps()
        return {number: checkpoints._restore(number, like, None).state for number in numbers}


def test_evaluations_are_every_other_epoch_and_at_the_end(kept):
    told = {line["epoch"]: line.get("test_accuracy") for line in lines_of(kept / "run")}
    assert told == {epoch: ACCURACIES.get(epoch) for epoch in range(1, 6)}
    results = results_of(kept / "run")
    assert (results["best_epoch"], results["best_test_accuracy"]) == (4, 0.9)
    assert results["test"]["top1"] == 0.5


def test_best_and_last_are_kept_and_can_be_evaluated(kept, scripted, monkeypatch):
    best, last = states(kept, "best"), states(kept, "checkpoints")
    assert max(best) == 4
    # Four steps an epoch, and one for its end.
    assert set(last) == {5, 10, 15, 20, 25}
    assert digest(best[4]) == digest(last[20])
    monkeypatch.setattr(Trainer, "evaluate", scripted)
    for name, state, epoch in (("best", best[4], 4), ("last", last[25], 5)):
        config = longer(kept)
        config.evaluate.checkpoint = name
        modes.evaluate_mode(config, kept / "run", reporter_to(io.StringIO()))
        value = json.loads((kept / "run/train/evaluation.json").read_text())
        assert (value["checkpoint"], value["epoch"]) == (name, epoch)
        # What answers is the moving average: the same as weights without an average.
        config.train.average_decay = 0.0
        plain = trainer_of(config)
        plain.load(state.replace(**state.average, average=None))
        assert value["loss"] == pytest.approx(plain.evaluate(0).loss, rel=1e-6)
        plain.load(state.replace(average=None))
        assert value["loss"] != pytest.approx(plain.evaluate(0).loss, rel=1e-5)


def test_best_without_a_last_is_begun_again(kept, scripted, tmp_path):
    """As after a kill between the two saves, or when only `checkpoints` was deleted."""
    workdir = shutil.copytree(kept / "run", tmp_path / "run")
    shutil.rmtree(workdir / "train/checkpoints")
    (workdir / "results.json").unlink()
    run(longer(tmp_path), workdir)
    expected, found = results_of(kept / "run"), results_of(workdir)
    for results in (expected, found):
        del results["seconds"]
    assert found == expected
    assert lines_of(workdir) == lines_of(kept / "run")
    assert "4" in {path.name for path in (workdir / "train/best").iterdir()}


def test_a_best_one_that_is_gone_is_not_what_others_are_compared_to(kept, scripted, tmp_path):
    """All of `best` was deleted: the next evaluation is the best again."""
    workdir = shutil.copytree(kept / "run", tmp_path / "run")
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / "train/best")
    shutil.rmtree(workdir / "train/checkpoints/25")
    run(longer(tmp_path), workdir)
    results = results_of(workdir)
    assert (results["best_epoch"], results["best_test_accuracy"]) == (5, 0.5)
    assert [path.name for path in (workdir / "train/best").iterdir()] == ["5"]
