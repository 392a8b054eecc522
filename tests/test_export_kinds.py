"""Exports of every kind of training: each answers as `evaluate` of the same checkpoint counts."""

import json
import pathlib

import numpy as np
import photos
import pytest
import stand_in
from PIL import Image
from pod import run_together
from small_training import GENOTYPE, SMALL, Command
from test_train_data import STREAMED

from cpnas_jax.deploy import artefact
from cpnas_jax.predict import read_image

pytestmark = pytest.mark.slow


@pytest.fixture
def command(monkeypatch, tmp_path):
    stand_in.prepare(stand_in.Cifar10, tmp_path / "data")
    photos.prepare(tmp_path / "data")
    GENOTYPE.save(tmp_path / "cells.json")
    return Command(monkeypatch, tmp_path)


def check(workdir: pathlib.Path, name="train"):
    """The files of a workdir that was evaluated and exported with the same arguments."""
    network = artefact.open_program(workdir / "export")
    assert network.self_check() == 0
    found, evaluated = (
        json.loads((workdir / name / f"{file}.json").read_text())
        for file in ("export", "evaluation")
    )
    assert (found["close"], found["turned"]) == (1, 0)
    assert found["shipped"] == pytest.approx(evaluated["top1"])
    assert found["images"] == evaluated["examples"]
    assert [found[key] for key in ("split", "checkpoint", "epoch")] == [
        evaluated[key] for key in ("split", "checkpoint", "epoch")
    ]
    return network, found


def made(command, workdir, *arguments):
    for mode in ("train", "evaluate", "export"):
        assert command(mode, workdir, *arguments) == 0


def test_a_float_parent(command, tmp_path):
    made(command, tmp_path / "run", "--config.train.epochs=1", "--config.network.precision=float")
    network, _ = check(tmp_path / "run", "parent")
    assert not network.shipped.structure.binary
    text = (tmp_path / "run/export/README.md").read_text()
    assert text.startswith("# A float parent network")


def test_averages_are_what_is_shipped(command, tmp_path):
    """Not the weights that were trained on: those answer otherwise."""
    arguments = ("--config.train.epochs=2", "--config.train.average_decay=0.9")
    made(command, tmp_path / "run", *arguments)
    averaged, _ = check(tmp_path / "run")
    made(command, tmp_path / "plain", "--config.train.epochs=2")
    plain, _ = check(tmp_path / "plain")
    assert np.abs(averaged.expected - plain.expected).max() > 1e-3


def test_the_best_checkpoint_and_the_last(command, tmp_path):
    workdir, arguments = tmp_path / "run", ("--config.train.epochs=3",)
    made(command, workdir, *arguments, "--config.evaluate.checkpoint=last")
    last, record = check(workdir)
    assert record["epoch"] == 3
    (workdir / "export").rename(workdir / "last")
    best = json.loads((workdir / "results.json").read_text())["train"]["best_epoch"]
    for mode in ("evaluate", "export"):
        assert command(mode, workdir, *arguments, "--config.evaluate.checkpoint=best") == 0
    network, record = check(workdir)
    assert record["epoch"] == best
    same = np.array_equal(network.expected, last.expected)
    assert same == (best == 3)


def test_a_training_that_is_not_finished(command, tmp_path, monkeypatch):
    """The newest checkpoint is shipped, and the record says after which step."""
    workdir, arguments = tmp_path / "run", ("--config.train.epochs=3",)

    def stops(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # At the end of the first epoch, when it is to be evaluated.
        patch.setattr("cpnas_jax.trainer.Trainer.evaluate", stops)
        assert command("train", workdir, *arguments, "--config.runtime.checkpoint_every=1") == 75
    last = "--config.evaluate.checkpoint=last"
    for mode in ("evaluate", "export"):
        assert command(mode, workdir, *arguments, last) == 0
    _, record = check(workdir)
    assert record["epoch"] < 3
    assert not (workdir / "results.json").exists()


def test_a_streamed_set(command, tmp_path):
    """Its images are the central part of files of any size, as `predict` takes them too."""
    workdir = tmp_path / "run"
    arguments = (*STREAMED, "--config.evaluate.checkpoint=last")
    made(command, workdir, *arguments)
    network, found = check(workdir)
    form = network.shipped.preprocessing
    assert form["form"] == "central part"
    assert found["images"] == photos.VALIDATION
    # The first images of the split, from their files.
    sources = tmp_path / "files"
    sources.mkdir()
    for index in range(photos.VALIDATION):
        (sources / f"{index:02d}.jpg").write_bytes(photos.encoded(index).getvalue())
    read = {path.name: read_image(path, form) for path in sources.iterdir()}
    for image in network.images:
        assert any(np.array_equal(image, own) for own in read.values())
    # And a photo of another format and size.
    Image.new("CMYK", (70, 33)).save(sources / "other.jpg")
    assert read_image(sources / "other.jpg", form).shape == network.shipped.structure.image


def test_two_processes(command, tmp_path):
    """One of them writes; both end well, and a mistake of one ends both."""
    del command

    def of(mode):
        return [
            *("-m", "cpnas_jax.main", f"--config=configs/cifar10.py:{mode},smoke"),
            *(f"--config.dataset.data_dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}"),
            *(*SMALL, f"--config.genotype={tmp_path / 'cells.json'}", "--config.train.epochs=1"),
        ]

    def together(mode):
        return run_together(
            lambda coordinator, index: [
                *of(mode),
                *(f"--coordinator={coordinator}", "--num_processes=2", f"--process_id={index}"),
            ],
            *(2, 2),
        )

    for mode in ("train", "evaluate", "export"):
        ended = together(mode)
        assert [status for status, *_ in ended] == [0, 0], ended
    check(tmp_path / "run")
    ended = together("export")
    assert [status for status, *_ in ended] == [1, 1], ended
    assert f"{tmp_path / 'run/export'} exists; delete it" in ended[0][2]
