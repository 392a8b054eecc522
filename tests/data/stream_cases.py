"""What tests of streams share."""

import time

import numpy as np
import photos
import pytest

from cpnas_jax.runtime.errors import UserError

SIZE = 24
BATCH = 12
STEPS = photos.TRAIN // BATCH


def training(opened, **changes):
    defaults = {
        "seed": 3,
        "epoch": 0,
        "first_step": 0,
        "batch_size": BATCH,
        "process_index": 0,
        "process_count": 1,
    }
    return opened.training_batches(**(defaults | changes))


def evaluation(opened, **changes):
    defaults = {"batch_size": 8, "process_index": 0, "process_count": 1}
    return opened.evaluation_batches(**(defaults | changes))


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for array, wanted in zip(one, other, strict=True):
            assert array.dtype == wanted.dtype
            np.testing.assert_array_equal(array, wanted)


def refusal(action):
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


def gone(condition):
    deadline = time.monotonic() + 10
    while condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not condition()
