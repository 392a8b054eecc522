"""One step on two devices, against gradients and averages put together by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import QUICK

from cpnas_jax.data.examples import Examples
from cpnas_jax.models.network import DropPath, Network, NetworkSettings, init
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.train_step import (
    LOSS_TERMS,
    LossSettings,
    Shard,
    StepSettings,
    TrainCall,
    TrainState,
    make_batch_step,
    make_resident_call,
    make_stream_call,
)

EDGES = (
    *((0, 2, "max_pool_3x3"), (1, 3, "skip_connect")),
    *((2, 4, "dil_conv_3x3"), (4, 5, "skip_connect")),
)
CLASSES, PER_DEVICE, SIDE, RATE, PARENT_RATE = 5, 4, 8, 0.1, 0.2
SETTINGS = StepSettings(
    network=NetworkSettings(EDGES, EDGES, 1, 4, CLASSES),
    loss=LossSettings(
        label_smoothing=0.1,
        auxiliary_weight=0.4,
        reconstruction_weight=0.05,
        center_weight=0.3,
        parent_kernel=False,
    ),
    drop_path=0.8,
    average_decay=0.9,
    batch_size=2 * PER_DEVICE,
    shards=Shards(2),
    crop_padding=0,
    flip=False,
    color_jitter=0.0,
    cutout=0,
    total_steps=10,
)


SEEN = jnp.asarray([1, 1, 1, 0, 1], jnp.float32)


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def binary_kernels(params):
    return {
        jax.tree_util.keystr(path): kernel
        for path, kernel in jax.tree_util.tree_leaves_with_path(params)
        if path[0].key.startswith("cells") and path[-1].key == "kernel"
    }


def objective(trained, stats, means, images, labels, positions, key, drop_path):
    """Eq. 4.17 and 4.18 with smoothed labels and the auxiliary classifier, of one device.

    With a parent beside the child H are the parent's kernels, and its own loss is added.
    """

    def applied(name):
        return Network(dataclasses.replace(SETTINGS.network, binary=name == "child")).apply(
            {"params": trained[name], "batch_stats": stats[name]},
            images,
            train=True,
            drop_path=DropPath(jnp.float32(drop_path), positions),
            rngs={"drop_path": key},
            mutable=["batch_stats"],
        )

    smooth = np.full((CLASSES, CLASSES), 0.1 / CLASSES) + 0.9 * np.eye(CLASSES)
    targets = jnp.asarray(smooth, jnp.float32)[labels]

    def entropy(logits):
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))

    outputs, changed = applied("child")
    changes, parent_loss = {"child": changed["batch_stats"]}, jnp.float32(0)
    latent = own = binary_kernels(trained["child"])
    if "parent" in trained:
        answers, changed = applied("parent")
        changes["parent"] = changed["batch_stats"]
        parent_loss = entropy(answers.logits) + 0.4 * entropy(answers.auxiliary)
        latent = binary_kernels(trained["parent"])
    errors = []
    for path, kernel in own.items():
        axes = tuple(range(kernel.ndim - 1))
        scale = jnp.mean(jnp.abs(kernel), axis=axes, keepdims=True)
        signs = jnp.where(kernel >= 0, jnp.float32(1), jnp.float32(-1))
        if latent is own:
            reconstructed = jax.lax.stop_gradient(signs * scale)
        else:
            clipped = jnp.clip(kernel, -1, 1)
            reconstructed = (clipped + jax.lax.stop_gradient(signs - clipped)) * scale
        error = jnp.square(latent[path] - reconstructed)
        errors.append(jnp.sum(jnp.mean(error, axis=axes)))
    assert len(errors) == 6  # two preprocessings, a factorized reduce, a separable unit
    terms = {
        "cross_entropy": entropy(outputs.logits),
        "auxiliary": entropy(outputs.auxiliary),
        "reconstruction": sum(errors),
        "center": 0.5
        * jnp.mean(
            jnp.square(outputs.features - means[labels]) * SEEN[labels][:, None, None, None]
        ),
        "parent": parent_loss,
    }
    weights = {
        **{"cross_entropy": 1.0, "auxiliary": 0.4, "reconstruction": 0.05, "center": 0.3},
        "parent": 1.0,
    }
    total = sum(weights[name] * term for name, term in terms.items())
    return total, (terms, outputs, changes)


def mean_of(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def agree(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, rtol=2e-4, atol=2e-5), found, expected
    )
    jax.tree.map(lambda a: np.testing.assert_array_equal(a[0], a[1]), found)


def initial(seed, binary):
    network = dataclasses.replace(SETTINGS.network, binary=binary)
    make = jax.jit(lambda key: init(key, network, (SIDE, SIDE, 3)), compiler_options=QUICK)
    return jax.device_get(make(jax.random.key(seed)))


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param(False, id="alone"),
        # Off by default.
        pytest.param(True, id="beside its parent", marks=pytest.mark.slow),
    ],
)
def test_a_step_on_two_devices(beside):
    images = normal((2, PER_DEVICE, SIDE, SIDE, 3), 0)
    # Class 4 is nowhere, class 0 on both devices.
    labels = np.array([[0, 1, 2, 0], [0, 3, 3, 2]], np.int32)
    variables = initial(0, True)
    # Nothing is known of class 3 yet.
    means = normal((CLASSES, SIDE // 2, SIDE // 2, 32), 1)
    means[3] = 0
    optimizer, parent_optimizer = optax.sgd(RATE), optax.sgd(PARENT_RATE, momentum=0.9)
    parent = None
    if beside:
        parent = initial(1, False)
        velocity = jax.tree.map(lambda leaf: normal(leaf.shape, 3), parent["params"])
        parent["optimizer"] = (optax.TraceState(velocity), optax.EmptyState())
    state = TrainState(
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        optimizer=optimizer.init(variables["params"]),
        average=jax.tree.map(lambda leaf: normal(leaf.shape, 2), dict(variables)),
        means=means,
        parent=parent,
        step=np.int32(5),
    )
    key, positions = jax.random.key(7), np.arange(2 * PER_DEVICE, dtype=np.int32).reshape(2, -1)
    loss = dataclasses.replace(SETTINGS.loss, parent_kernel=beside)
    step = make_batch_step(
        dataclasses.replace(SETTINGS, loss=loss), optimizer, parent_optimizer if beside else None
    )

    def on_a_device(*own):
        return step(state, lambda _: Shard(*own), key, jnp.int32(1))

    program = jax.jit(jax.vmap(on_a_device, axis_name=AXIS), compiler_options=QUICK)
    found, metrics = program(images, labels, positions)

    # Half of the steps are done: half of the rate of dropping.
    gradient = jax.jit(
        jax.value_and_grad(functools.partial(objective, drop_path=0.4), has_aux=True),
        compiler_options=QUICK,
    )
    trained, averages = {"child": state.params}, {"child": state.batch_stats}
    if beside:
        trained["parent"], averages["parent"] = parent["params"], parent["batch_stats"]
    devices = [
        gradient(trained, averages, means, *own, key)
        for own in zip(images, labels, positions, strict=True)
    ]
    gradients = mean_of([gradients for _, gradients in devices])
    params = jax.tree.map(lambda p, g: p - RATE * g, state.params, gradients["child"])
    agree(found.params, params)
    stats = mean_of([own for (_, (*_, own)), _ in devices])
    agree(found.batch_stats, stats["child"])
    if beside:
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradients["parent"])
        moved = jax.tree.map(lambda p, v: p - PARENT_RATE * v, parent["params"], velocity)
        agree(found.parent["params"], moved)
        agree(found.parent["batch_stats"], stats["parent"])
        agree(found.parent["optimizer"][0].trace, velocity)
    else:
        assert found.parent is None
    # Early on it forgets faster than its decay of 0.9 says.
    share = (1 + 5) / (10 + 5)
    new = {"params": params, "batch_stats": stats["child"]}
    agree(found.average, jax.tree.map(lambda a, b: share * a + (1 - share) * b, state.average, new))
    assert list(found.step) == [6, 6]

    expected_terms = mean_of([terms for (_, (terms, *_)), _ in devices])
    agree({name: metrics[name] for name in expected_terms}, expected_terms)
    agree(metrics["loss"], mean_of([loss for (loss, _), _ in devices]))
    assert list(metrics["finite"]) == [True, True]
    assert set(metrics) == {"loss", "accuracy", "finite", *LOSS_TERMS}

    features = np.concatenate([outputs.features for (_, (_, outputs, _)), _ in devices])
    moved = means.copy()
    for label in range(4):
        own = features[labels.ravel() == label].mean(axis=0)
        moved[label] = own if label == 3 else 0.9 * means[label] + 0.1 * own
    agree(found.means, moved)
    answers = np.concatenate([outputs.logits for (_, (_, outputs, _)), _ in devices]).argmax(axis=1)
    assert metrics["accuracy"][0] == pytest.approx((answers == labels.ravel()).mean())


PIXELS = np.random.default_rng(3).integers(1, 256, (8, SIDE, SIDE, 3)).astype(np.uint8)
MEAN, STD = np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32)
NORMALISED = ((PIXELS / 255.0 - 0.5) / 0.25).astype(np.float32)


def seen_by_a_step(resident, **augmentation):
    """The images of an epoch of one step, by label, as the step is given them."""
    settings = dataclasses.replace(SETTINGS, shards=Shards(1), **augmentation)

    def step(state, load, key, passes):
        del key, passes
        images, labels, _ = load(jnp.int32(0))
        terms = dict.fromkeys(("loss", *LOSS_TERMS, "accuracy"), jnp.float32(0))
        return state.at[labels].set(images), {**terms, "finite": jnp.bool(True)}

    make = make_resident_call if resident else make_stream_call
    # A streamed step is told whether one before it was bad.
    before = () if resident else (np.int32(-1),)
    shared = (None,) * (2 + len(before))
    program = jax.jit(
        jax.vmap(make(settings, step), in_axes=(0, *shared), axis_name=AXIS),
        compiler_options=QUICK,
    )
    examples = Examples(PIXELS, np.arange(8, dtype=np.int32), MEAN, STD)
    key = np.asarray(jax.random.key_data(jax.random.key(1)))
    call = TrainCall(np.int32(0), np.int32(0), np.int32(1), np.int32(0), np.int32(1), key)
    state, _ = program(jnp.zeros((1, *PIXELS.shape), jnp.float32), examples, call, *before)
    return np.asarray(state[0])


def shifted(image, row, column):
    """With a black border of one pixel."""
    black = (0 - 0.5) / 0.25
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=black)
    return padded[1 + row : 1 + row + SIDE, 1 + column : 1 + column + SIDE]


ALLOWED = {
    "nothing": ({}, lambda image: [image]),
    "flip": ({"flip": True}, lambda image: [image, image[:, ::-1]]),
    "crop": (
        {"crop_padding": 1},
        lambda image: [shifted(image, row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)],
    ),
}


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", ALLOWED)
def test_images_of_a_step_are_moved(resident, name):
    augmentation, allowed = ALLOWED[name]
    chosen = set()
    for image, own in zip(seen_by_a_step(resident, **augmentation), NORMALISED, strict=True):
        fits = [np.allclose(image, other, atol=1e-5) for other in allowed(own)]
        assert sum(fits) == 1
        chosen.add(fits.index(True))
    assert len(chosen) > 1 or name == "nothing"


@pytest.mark.parametrize("resident", [True, False])
def test_images_of_a_step_are_cut(resident):
    found = seen_by_a_step(resident, cutout=4)
    cut = np.all(found == 0, axis=-1)
    np.testing.assert_allclose(found[~cut], NORMALISED[~cut], atol=1e-5)
    assert np.all(cut.sum(axis=(1, 2)) >= 4)
    assert np.all(cut.sum(axis=(1, 2)) <= 16)


@pytest.mark.parametrize("resident", [True, False])
def test_images_of_a_step_change_colour(resident):
    found = seen_by_a_step(resident, color_jitter=0.4)
    changed = np.abs(found - NORMALISED).max(axis=(1, 2, 3))
    assert np.all(changed > 0.01)
    assert np.abs(found).max() <= 2 + 1e-5  # pixels stay within [0, 255]
