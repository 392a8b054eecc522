"""Several steps in one call: which examples, which sums, and which step is said to be bad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK

from cpnas_jax.data.examples import Examples
from cpnas_jax.models.network import NetworkSettings
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.train_step import (
    LOSS_TERMS,
    LossSettings,
    StepSettings,
    TrainCall,
    make_resident_call,
    make_stream_call,
)

SKIPS = tuple((0, target, "skip_connect") for target in range(2, 6))
SETTINGS = StepSettings(
    network=NetworkSettings(SKIPS, SKIPS, 1, 4, 10),
    loss=LossSettings(0.0, 0.0, 0.0, 0.0, False),
    drop_path=0.0,
    average_decay=0.0,
    batch_size=4,
    shards=Shards(2),
    crop_padding=0,
    flip=False,
    color_jitter=0.0,
    cutout=0,
    total_steps=10,
)
# Each of the 20 images is as bright as its label; pixels are left as they are.
LABELS = np.arange(20, dtype=np.int32)
IMAGES = np.broadcast_to(LABELS[:, None, None, None], (20, 2, 2, 1)).astype(np.uint8)
MEAN, STD = np.zeros(1, np.float32), np.full(1, 1 / 255, np.float32)


def counting_step(losses):
    """A step whose loss is that of its number, and which notes the labels it sees."""

    def step(state, load, key, passes):
        del key, passes
        images, labels, _ = load(jax.lax.axis_index(AXIS))
        number, seen = state
        metrics = dict.fromkeys(LOSS_TERMS, jnp.float32(2))
        loss = jnp.asarray(losses, jnp.float32)[number]
        agree = jnp.all(images[:, 0, 0, 0] == labels.astype(jnp.float32))
        metrics |= {"loss": loss, "accuracy": agree.astype(jnp.float32)}
        metrics["finite"] = jnp.isfinite(loss)
        return (number + 1, seen.at[number].set(labels)), metrics

    return step


def call_of(first_step, num_steps):
    key = np.asarray(jax.random.key_data(jax.random.key(0)))
    zero, one = np.int32(0), np.int32(1)
    return TrainCall(zero, np.int32(first_step), np.int32(num_steps), zero, one, key)


def on_two_devices(call, batched):
    """The program of both devices; `batched` says whether each has examples of its own."""
    mapped = jax.vmap(call, in_axes=(0, 0 if batched else None, None), axis_name=AXIS)
    return jax.jit(mapped, compiler_options=QUICK)


def start():
    return jnp.zeros(2, jnp.int32), jnp.zeros((2, 5, 2), jnp.int32)


@pytest.mark.parametrize(
    ("losses", "bad"),
    [
        ((1, 2, 3), -1),
        ((1, np.nan, 3), 1),
        ((1, np.nan, np.nan), 1),
        ((np.inf, 2, np.nan), 0),
        ((1, 2, -np.inf), 2),
        # Finite each, but not their sum.
        ((3e38, 3e38, 1), 1),
    ],
)
def test_the_first_step_without_a_finite_loss_is_told(losses, bad):
    """Counted in the epoch, whose third and fourth steps the later steps of the call are."""
    examples = Examples(IMAGES, LABELS, MEAN, STD)
    program = on_two_devices(make_resident_call(SETTINGS, counting_step(losses)), False)
    for first in (0, 2):
        _, found = program(start(), examples, call_of(first, 3))
        np.testing.assert_array_equal(found["bad_step"], [bad + first * (bad >= 0)] * 2)
        if bad < 0:
            np.testing.assert_array_equal(found["loss"], [6, 6])
            np.testing.assert_array_equal(found["parent"], [6, 6])
            np.testing.assert_array_equal(found["accuracy"], [3, 3])


def test_an_epoch_in_any_portions_sees_every_example_once():
    examples = Examples(IMAGES, LABELS, MEAN, STD)
    program = on_two_devices(make_resident_call(SETTINGS, counting_step([1] * 5)), False)
    (_, whole), _ = program(start(), examples, call_of(0, 5))
    assert sorted(np.ravel(whole)) == list(LABELS)
    state = start()
    for first, count in ((0, 2), (2, 1), (3, 2)):
        state, found = program(state, examples, call_of(first, count))
        np.testing.assert_array_equal(found["loss"], [count] * 2)
    np.testing.assert_array_equal(state[1], whole)


@pytest.mark.parametrize(("loss", "bad"), [(1, -1), (np.nan, 3), (np.inf, 3)])
def test_a_streamed_step_tells_whether_it_was_bad(loss, bad):
    batch = Examples(
        IMAGES[:4].reshape(2, 2, 2, 2, 1),
        LABELS[:4].reshape(2, 2),
        *(np.stack([x] * 2) for x in (MEAN, STD)),
    )
    program = on_two_devices(make_stream_call(SETTINGS, counting_step([loss])), True)
    (_, seen), found = program(start(), batch, call_of(3, 1))
    np.testing.assert_array_equal(found["bad_step"], [bad] * 2)
    np.testing.assert_array_equal(found["accuracy"], [1, 1])
    np.testing.assert_array_equal(seen[:, 0], LABELS[:4].reshape(2, 2))
