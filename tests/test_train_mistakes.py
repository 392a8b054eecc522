"""A user's mistakes and accidents around a training: one line each, and nothing is lost.

Everything goes through the command line, on small prepared sets; one training of one cell without
convolutions serves all tests, as a copy.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest
import stand_in
from command_line import ROOT
from genotype_mistakes import MISTAKES, edge
from small_training import GENOTYPE, Command, refusal

from cpnas_jax.models import losses
from cpnas_jax.runtime import environment, parallel


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with prepared sets and a genotype file."""
    directory = tmp_path_factory.mktemp("files")
    stand_in.prepare(stand_in.Cifar10, directory / "data")
    GENOTYPE.save(directory / "cells.json")
    return directory


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert Command(patch, files)("train", workdir) == 0
    return workdir


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def command(monkeypatch, files):
    return Command(monkeypatch, files)


@pytest.fixture
def refused(command, capsys):
    return functools.partial(refusal, command, capsys)


def contents(workdir):
    """What is in a workdir, but for the lock."""
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in workdir.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def unfinished(workdir):
    """As after a kill before the very end."""
    (workdir / "results.json").unlink()
    return workdir


@pytest.mark.parametrize("name", MISTAKES)
def test_a_genotype_file_with_a_mistake(refused, tmp_path, name):
    content, words = MISTAKES[name]
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    for mode in ("train", "evaluate", "summary"):
        error = refused(mode, tmp_path / "run", f"--config.genotype={path}")
        assert error.startswith(f"error: {path}: ")
        assert words in error
        assert not (tmp_path / "run/config.json").exists()


def test_no_genotype(refused, tmp_path):
    run = tmp_path / "run"
    for mode in ("train", "evaluate", "summary"):
        error = refused(mode, run, "--config.genotype=")
        assert "config.genotype is empty; give a genotype file" in error
        assert "DDPNAS_XNOR_1" in error
    for name in (tmp_path / "absent.json", "DARTS_V3"):
        error = refused("train", run, f"--config.genotype={name}")
        assert f"config.genotype is '{name}', which is no file; give a genotype file" in error
        assert "DARTS_V2" in error
    error = refused("train", run, f"--config.genotype={tmp_path}")
    assert error.startswith(f"error: {tmp_path}: cannot be read (Is a directory); give a genotype")
    assert not run.exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.epochs=0", "config.train.epochs is 0; it must be an integer, at least 1"),
        ("train.batch_size=512", "config.train.batch_size is 512; the training split has only 320"),
        ("train.batch_size=30", "config.train.batch_size is 30; it must be a multiple of the 8"),
        ("evaluate.batch_size=9", "config.evaluate.batch_size is 9; it must be a multiple of the"),
        ("evaluate.split=dev", "has no split 'dev'; it has test, train"),
        ("train.examples=1000", "config.train.examples=1000 is more than the 320 of cifar10"),
        ("dataset.cutout=9", "config.dataset.cutout is 9; it must be at most 8, the images'"),
        ("dataset.crop_padding=9", "config.dataset.crop_padding is 9; it must be at most 8, the"),
        (
            "train.warmup_epochs=2",
            "config.train.warmup_epochs is 2; it must be below config.train.e",
        ),
        ("train.real_weights_epochs=5", "config.train.real_weights_epochs is 5; it must be below"),
        ("network.cells=0", "config.network.cells is 0; it must be an integer, at least 1"),
        ("network.precision=int8", "config.network.precision is 'int8'; it must be one of binary"),
        ("train.learning_rate=nan", "config.train.learning_rate is nan"),
    ],
)
def test_a_value_that_cannot_be_trained_with(refused, tmp_path, argument, words):
    assert words in refused("train", tmp_path / "run", f"--config.{argument}")
    assert not (tmp_path / "run/config.json").exists()


def test_a_batch_that_two_devices_cannot_share(files, tmp_path):
    """A process of its own, with all that a shell would see."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cpnas_jax.main", "--config=configs/cifar10.py:train,smoke"),
            f"--config.dataset.data_dir={files / 'data'}",
            f"--config.genotype={files / 'cells.json'}",
            *("--config.train.batch_size=33", f"--workdir={tmp_path / 'run'}"),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "error: config.train.batch_size is 33; it must be a multiple of the 2 devices that share "
        "it\n"
    )
    assert not (tmp_path / "run").exists()


def test_evaluating_before_training(refused, tmp_path):
    error = refused("evaluate", tmp_path / "run")
    assert f"{tmp_path / 'run/train/checkpoints'} holds no checkpoint" in error
    assert "mode `train` first" in error


OTHERS = {
    "channels": ("--config.network.channels=8", "network.channels (there 4, here 8)"),
    "cells": ("--config.network.cells=2", "network.cells (there 1, here 2)"),
    "stem": ("--config.network.stem=imagenet", "network.stem (there 'cifar', here 'imagenet')"),
    "image size": ("--config.dataset.image_size=16", "dataset.image_size (there 8, here 16)"),
    "data set": ("--config.dataset.name=cifar100", "dataset.name (there 'cifar10', here 'cif"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_network(refused, copied, name):
    argument, words = OTHERS[name]
    unfinished(copied)
    before = contents(copied)
    for mode in ("train", "evaluate"):
        error = refused(mode, copied, argument)
        assert f"error: {copied} holds a run of another config" in error
        assert words in error
    assert contents(copied) == before


def test_other_cells_in_the_same_workdir(refused, copied):
    unfinished(copied)
    before = contents(copied)
    for mode in ("train", "evaluate"):
        error = refused(mode, copied, "--config.genotype=DARTS_V2")
        assert f"config.genotype has other cells than were trained in {copied / 'train'}" in error
        assert str(copied / "train/genotype.json") in error
    assert contents(copied) == before


def test_the_parent_of_a_trained_child_is_not_trained_yet(refused, copied):
    error = refused("evaluate", copied, "--config.network.precision=float")
    assert f"{copied / 'parent/checkpoints'} holds no checkpoint" in error


def test_another_network_without_its_config(refused, copied, tmp_path):
    """The checkpoints themselves tell, of whatever shapes, where nothing else does."""
    unfinished(copied)
    (copied / "config.json").unlink()
    (copied / "train/genotype.json").unlink()
    pools = tmp_path / "pools.json"
    pools.write_bytes(edge("reduce", 0, operation="avg_pool_3x3"))
    before = contents(copied)
    for argument in ("network.channels=8", f"genotype={pools}"):
        for mode in ("train", "evaluate"):
            error = refused(mode, copied, f"--config.{argument}")
            assert f"the checkpoints in {copied / 'train/checkpoints'} are not of this" in error
    assert contents(copied) == before


def arrays(directory):
    """The files that hold the arrays of checkpoints."""
    return [path for path in directory.rglob("d/*") if path.is_file()]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut])
def test_no_checkpoint_is_whole(refused, copied, damage):
    unfinished(copied)
    paths = arrays(copied / "train/checkpoints")
    assert len(paths) > 1
    for path in paths:
        damage(path)
    before = contents(copied)
    error = refused("train", copied)
    assert f"no checkpoint in {copied / 'train/checkpoints'} can be read" in error
    assert "to start again" in error
    error = refused("evaluate", copied)
    assert error.startswith(f"error: the checkpoint {newest(copied / 'train/checkpoints')} is dam")
    assert contents(copied) == before


def newest(directory):
    """The checkpoint with the largest number."""
    return max(directory.iterdir(), key=lambda path: int(path.name))


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize(("asked", "kind"), [("last", "checkpoints"), ("best", "best")])
def test_a_damaged_checkpoint_is_not_evaluated_by_another(
    refused, command, copied, capsys, asked, kind, done
):
    """The other of `last` and `best` still answers, and says that it does."""
    if not done:
        unfinished(copied)
    path = newest(copied / "train" / kind)
    for file in arrays(path):
        cut(file)
    before = contents(copied)
    error = refused("evaluate", copied, f"--config.evaluate.checkpoint={asked}")
    assert error.startswith(f"error: the checkpoint {path} is damaged (")
    other = "best" if asked == "last" else "last"
    again = f"delete {copied / 'train'} and 'train' in {copied / 'results.json'}, then run the same"
    assert ("the mode `train` resumes from the one before" in error) == (
        asked == "last" and not done
    )
    assert (f"give --config.evaluate.checkpoint={other}" in error) == (asked == "best" or done)
    assert (again in error) == done
    assert contents(copied) == before
    assert command("evaluate", copied, f"--config.evaluate.checkpoint={other}") == 0
    epoch = json.loads((copied / "train/evaluation.json").read_text())["epoch"]
    said = f"{other} checkpoint, after epoch {epoch}, on the split test, 80 examples: top-1 "
    assert said in capsys.readouterr().out


def test_a_lost_checkpoint_of_a_finished_training_is_not_evaluated_by_the_one_before(
    refused, command, copied, capsys
):
    directory = copied / "train/checkpoints"
    shutil.rmtree(newest(directory))
    error = refused("evaluate", copied)
    assert f"{directory} holds epoch 1, but not epoch 2 of the finished training; restore" in error
    unfinished(copied)
    assert command("evaluate", copied) == 0
    assert "last checkpoint, after epoch 1, on the split test, 80 ex" in capsys.readouterr().out


def test_the_newest_checkpoint_is_cut(command, trained, copied, caplog):
    """The training goes on from the one before and ends as it would have."""
    unfinished(copied)
    damaged = newest(copied / "train/checkpoints")
    for path in arrays(damaged):
        cut(path)
    assert command("train", copied) == 0
    assert f"checkpoint {damaged} is damaged and passed over" in caplog.text
    results = [
        json.loads((path / "results.json").read_text())["train"] for path in (trained, copied)
    ]
    for entry in results:
        del entry["seconds"]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"config": {'),
        ("config.json", '{"config": 3}'),
        ("results.json", "{"),
        ("results.json", "[]"),
        ("results.json", '{"train": 3}'),
    ],
)
def test_a_damaged_file_of_the_workdir(refused, copied, name, content):
    (copied / name).write_text(content)
    before = contents(copied)
    error = refused("train", copied)
    assert f"{copied / name} is damaged" in error
    assert "use another --workdir" in error
    assert contents(copied) == before


def test_a_loss_that_is_not_finite(refused, tmp_path):
    """The float network of the same cells, by steps far too large; the same command fails again."""
    arguments = (
        *("--config.network.precision=float", "--config.train.float_learning_rate=1000"),
        *("--config.train.gradient_clip=1e30", "--config.runtime.checkpoint_every=1"),
        "--config.runtime.keep_checkpoints=50",
    )
    error = refused("train", tmp_path / "run", *arguments)
    found = re.match(
        r"error: the loss, its gradient or the update is not finite in step (\d+) of epoch 1; "
        r"(.+); the last good checkpoint is (.+), after step (\d+) of epoch 1\. Try a smaller ",
        error,
    )
    assert found is not None
    assert re.match(
        r"an update left .+ that is not$|the first output that is not is that", found[2]
    )
    path = tmp_path / "run/parent/checkpoints" / found[4]
    assert (found[3], int(found[4])) == (str(path), int(found[1]) - 1)
    assert "config.train.float_learning_rate" in error
    kept = contents(tmp_path / "run")
    numbers = {int(path.name) for path in (tmp_path / "run/parent/checkpoints").iterdir()}
    assert numbers == set(range(1, int(found[1])))
    assert refused("train", tmp_path / "run", *arguments) == error
    assert contents(tmp_path / "run") == kept


def test_a_gradient_that_is_not_finite(refused, tmp_path, monkeypatch):
    """Of a finite loss: the step itself is named, and what it made of the weights is not saved."""
    monkeypatch.setattr(losses, "center", lambda features, *_: jnp.sqrt(jnp.sum(features * 0)))
    arguments = ("--config.train.center_weight=1e-3", "--config.runtime.checkpoint_every=1")
    error = refused("train", tmp_path / "run", *arguments)
    assert "not finite in step 1 of epoch 1; the loss is, and of the gradients that are" in error
    assert re.search(r"the nearest to the output is that of cell 0 .+ norm bias; no check", error)
    assert list((tmp_path / "run/train/checkpoints").iterdir()) == []


def test_another_split_is_evaluated_with_the_same_checkpoint(command, copied):
    assert command("evaluate", copied, "--config.evaluate.split=train") == 0
    value = json.loads((copied / "train/evaluation.json").read_text())
    assert (value["split"], value["examples"]) == ("train", 320)


def test_an_evaluation_that_does_not_fit_is_refused(refused, copied, monkeypatch):
    monkeypatch.setattr(environment, "device_memory", lambda: 2**40)
    monkeypatch.setattr(parallel.Program, "temporary_bytes", lambda _: 2**41)
    (copied / "train/evaluation.json").unlink(missing_ok=True)
    error = refused("evaluate", copied)
    assert "evaluation program 2097152), a device has 1048576 MiB" in error
    assert error.endswith("; lower config.evaluate.batch_size\n")
    assert not (copied / "train/evaluation.json").exists()


def test_a_stem_without_channels(refused, tmp_path):
    arguments = ("--config.network.stem=imagenet", "--config.network.channels=1")
    error = refused("summary", tmp_path / "run", *arguments)
    assert "config.network.channels is 1; with config.network.stem=imagenet it must be at" in error


def test_all_epochs_are_done_but_not_the_results(command, copied, capsys):
    unfinished(copied)
    assert command("train", copied) == 0
    assert "Resumed after the last of 2 epochs." in capsys.readouterr().out


def test_a_finished_training_without_its_checkpoints(refused, command, copied):
    shutil.rmtree(copied / "train/checkpoints")
    error = refused("evaluate", copied)
    assert f"{copied / 'train/checkpoints'} holds no checkpoint of the finished training" in error
    assert f"delete {copied / 'train'} and 'train' in {copied / 'results.json'}" in error
    shutil.rmtree(copied / "train")
    (copied / "results.json").write_text("{}")
    assert command("train", copied) == 0
    assert command("evaluate", copied) == 0


def test_other_cells_before_anything_was_trained(command, copied, files, tmp_path):
    """As after a kill in the first epoch: only the cells were written down."""
    unfinished(copied)
    shutil.rmtree(copied / "train/checkpoints")
    text = (files / "cells.json").read_text()
    other = tmp_path / "other.json"
    other.write_text(text.replace("max_pool_3x3", "avg_pool_3x3"))
    assert command("train", copied, f"--config.genotype={other}") == 0
    assert "avg_pool_3x3" in (copied / "train/genotype.json").read_text()
