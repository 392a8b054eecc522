"""What TensorBoard is given, read back; and that an interrupted run gives no step twice."""

import importlib.util
import io
import struct
import sys

import numpy as np
import pytest
from command_line import call_main
from oracle import FIVE, TOTAL, Oracle, log_of, replace_data
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import search as search_module
from cpnas_jax.runtime.board import Board
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search import search

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("tensorboardX") is None,
    reason="no tensorboardX; pip install -e '.[tensorboard]'",
)


def events(directory):
    """All events of a directory, in the order in which they were written."""
    from tensorboardX.proto import event_pb2

    found = []
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def shown(directory):
    """Tag -> step -> values, as TensorBoard shows them: a start hides what is from there on."""
    tags = {}
    for event in events(directory):
        if event.session_log.status == 1:
            for steps in tags.values():
                for step in [step for step in steps if step >= event.step]:
                    del steps[step]
        for value in event.summary.value:
            kept = value.simple_value if value.HasField("simple_value") else value.image
            tags.setdefault(value.tag, {}).setdefault(event.step, []).append(kept)
    return tags


class Killed(Exception):
    """The end of a process, as far as its files go."""


class Mortal(Oracle):
    """Networks that die in their fifth sampled epoch."""

    def score(self, model, architectures):
        if len(self.requests) > 16:
            raise Killed
        return super().score(model, architectures)


def searched(monkeypatch, workdir, networks=Oracle):
    monkeypatch.setattr(search_module, "Networks", networks)
    config = configs.base_config()
    config.search.update(rounds=1, operations=FIVE)
    config.runtime.tensorboard = True
    search(config, workdir, Reporter(Console(file=io.StringIO())))


@needs_package
def test_a_killed_search_shows_every_step_once(monkeypatch, tmp_path):
    replace_data(monkeypatch)
    with pytest.raises(Killed):
        searched(monkeypatch, tmp_path, Mortal)
    before = shown(tmp_path / "tb/search")
    assert 2 <= len(before["child_accuracy"]) < TOTAL
    # As if more had been written than was saved.
    board = Board(tmp_path / "tb/search", len(before["child_accuracy"]) + 1, wanted=True)
    board.scalars(len(before["child_accuracy"]) + 1, {"child_accuracy": -1.0})
    board.close()
    searched(monkeypatch, tmp_path)
    tags = shown(tmp_path / "tb/search")
    samples = [line for line in log_of(tmp_path) if line["event"] == "sample"]
    for key in ("child_accuracy", "parent_accuracy", "z", "stage"):
        assert list(tags[key]) == list(range(1, TOTAL + 1))
        for step, line in enumerate(samples, start=1):
            (value,) = tags[key][step]
            assert value == pytest.approx(line[key])
    for step, line in enumerate(samples, start=1):
        gap = line["parent_accuracy"] - line["child_accuracy"]
        assert tags["gap"][step] == [pytest.approx(gap)]
        assert len(tags["images_per_second"][step]) == len(tags["losses/child"][step]) == 1
    # After the last epoch of every stage, of K = 5, 4, 3 and 2.
    assert list(tags["indicator"]) == [5, 9, 12, 14]
    assert tags["operations_left"][14][-1] == 28
    assert list(tags["cells"]) == [15]
    (image,) = tags["cells"][15]
    assert image.width > 500


@needs_package
def test_tensorboard_reads_it_so(monkeypatch, tmp_path):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard"
    )
    for first, steps in ((1, range(1, 6)), (4, range(4, 9))):
        board = Board(tmp_path, first, wanted=True)
        for step in steps:
            board.scalars(step, {"a": 10.0 * first + step})
            board.image("i", step, np.zeros((4, 4, 3), np.uint8))
        board.close()
    found = accumulators.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("a")] == [
        *((1, 11), (2, 12), (3, 13)),
        *((4, 44), (5, 45), (6, 46), (7, 47), (8, 48)),
    ]


@needs_package
def test_only_numbers_are_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Board(tmp_path / "file", 1, wanted=True)
    board = Board(tmp_path / "tb", 1, wanted=True)
    board.scalars(1, {"a": 1, "b": None, "c": float("nan"), "d": "x", "e": {"f": 2.0}})
    board.close()
    assert set(shown(tmp_path / "tb")) == {"a", "e/f"}


def test_nothing_is_written_where_it_is_not_wanted_or_not_the_first_process(monkeypatch, tmp_path):
    for wanted, first in ((False, True), (True, False)):
        monkeypatch.setattr("cpnas_jax.runtime.processes.is_first", lambda first=first: first)
        board = Board(tmp_path / "tb", 1, wanted=wanted)
        board.scalars(1, {"a": 1})
        board.image("i", 1, np.zeros((4, 4, 3), np.uint8))
        board.close()
    assert not (tmp_path / "tb").exists()


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    status = call_main(
        monkeypatch,
        "--config=configs/mnist5k.py:search,smoke",
        f"--workdir={tmp_path / 'run'}",
        "--config.runtime.tensorboard=True",
    )
    error = capsys.readouterr().err
    assert status == 1
    assert 'pip install -e ".[tensorboard]"' in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    # Modes that write no events do without it.
    config = configs.base_config()
    config.runtime.tensorboard = True
    config.mode = "report"
    configs.validate(config, 1)
