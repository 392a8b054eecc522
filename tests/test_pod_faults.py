"""What one of two processes meets stops both, by one message."""

import re

import photos
import pytest
from pod import run_together
from small_training import GENOTYPE, SMALL
from spoiling import spoil

# The channels' statistics, which look at all examples in all processes, would meet the damage.
SCRIPT = """
import sys
import numpy as np
from cpnas_jax.data.stream import Stream
from cpnas_jax.main import main

half = np.full(3, 0.5, np.float32)
Stream.channel_statistics = lambda self: (half, half)
sys.exit(main())
"""
ARGUMENTS = (
    *("--config=configs/cifar10.py:train,smoke", *SMALL, "--config.dataset.name=photos"),
    *("--config.dataset.stream=True", "--config.dataset.crop_padding=0"),
    *("--config.dataset.cutout=0", "--config.train.batch_size=8", "--config.train.epochs=1"),
    *("--config.evaluate.split=validation", "--config.evaluate.batch_size=16"),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    (files / "script.py").write_text(SCRIPT)
    GENOTYPE.save(files / "cells.json")
    photos.prepare(files / "data")
    return files


def together(files, data, workdir, *arguments):
    return run_together(
        lambda coordinator, index: (
            *(files / "script.py", *ARGUMENTS, f"--config.genotype={files / 'cells.json'}"),
            *(f"--config.dataset.data_dir={data}", f"--workdir={workdir}", *arguments),
            *(f"--coordinator={coordinator}", "--num_processes=2", f"--process_id={index}"),
        ),
        2,
        XDG_CACHE_HOME=str(files / "cache"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_example_that_one_process_cannot_decode(files, tmp_path, split):
    directory = photos.prepare(tmp_path / "data")
    # In evaluation the second process has the second half of each batch.
    spoil(directory, split, [9])
    ended = together(files, tmp_path / "data", tmp_path / "run")
    errors = [
        [line for line in errors.splitlines() if line.startswith("error")] for *_, errors in ended
    ]
    assert [status for status, *_ in ended] == [1, 1], ended
    assert errors[1] == []
    (error,) = errors[0]
    assert f"of 2: the data set in {directory} is damaged or incomplete (example 9 of" in error
    assert "undecodable are 1, config.dataset.max_undecodable is 0" in error


@pytest.mark.slow
def test_a_step_that_is_not_finite(files, tmp_path):
    arguments = (
        *("--config.network.precision=float", "--config.train.float_learning_rate=1000"),
        *("--config.train.gradient_clip=1e30", "--config.train.epochs=4"),
    )
    ended = together(files, files / "data", tmp_path / "run", *arguments)
    assert [status for status, *_ in ended] == [1, 1], ended
    (error,) = (
        line for *_, said in ended for line in said.splitlines() if line.startswith("error")
    )
    assert re.match(
        r"error: the loss, its gradient or the update is not finite in step \d+ of epoch \d; .*"
        r"(an update left|first output that is not is that of|nearest to the output is that of) "
        r".+; (the last good checkpoint is .+|no checkpoint was written yet)\. Try a smaller ",
        error,
    )
