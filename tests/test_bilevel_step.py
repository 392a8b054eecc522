"""Steps of alpha and of the weights, with a small model in place of a network, by hand.

How alpha enters a network is tested with `mixture` and `relaxation`; here it is the alternation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import QUICK

from cpnas_jax.bilevel_step import (
    AlphaState,
    BilevelCall,
    BilevelSettings,
    BilevelState,
    alpha_adam,
    make_bilevel_call,
)
from cpnas_jax.data.augment import CROP_DRAWS, normalise, random_crop_flip
from cpnas_jax.data.examples import Examples
from cpnas_jax.data.order import epoch_permutation, sample_key, step_key, validation_key
from cpnas_jax.mixture_optimizer import MixtureOptimizer
from cpnas_jax.models.draws import position_draws
from cpnas_jax.models.losses import cross_entropy
from cpnas_jax.models.supernet import SupernetSettings
from cpnas_jax.path_optimizer import CHILD, PARENT, OptimizerSettings
from cpnas_jax.relaxation import Relaxation
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.search_step import ModelState, StepSettings

BATCH, CLASSES, DEVICES = 8, 5, 2
TRAINING, VALIDATION = 35, 19  # four steps an epoch, two validation batches
WARMUP = 1
KEY = np.asarray(jax.random.key_data(jax.random.key(3)))
RATES = {"alpha": 0.5, "decay": 0.02}
OPTIMIZER = OptimizerSettings(
    learning_rate=0.3,
    child_learning_rate=0.2,
    child_optimizer="sgd",
    momentum=0.9,
    weight_decay=0.05,
    gradient_clip=0.1,
    total_steps=40,
)


def examples(n, seed):
    generator = np.random.default_rng(seed)
    return Examples(
        generator.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8),
        generator.integers(0, CLASSES, n).astype(np.int32),
        np.asarray([0.4, 0.5, 0.6], np.float32),
        np.asarray([0.2, 0.3, 0.25], np.float32),
    )


DATA, OTHER = examples(TRAINING, 7), examples(VALIDATION, 8)


def toy_logits(params, images, alpha, survivors, drawn, binary):
    """Smooth in everything; what was drawn and what survives count too."""
    hidden = jnp.mean(images, axis=(1, 2)) @ params["first"]
    hidden = jnp.where(binary, jnp.tanh(hidden), jnp.sin(hidden))
    weights = jax.nn.softmax(jnp.where(survivors[0, 0], alpha["normal"][0], -1e9))
    return (hidden * (4 * weights + drawn)[None]) @ params["second"]


TOY = Relaxation(
    init=lambda key, shape: {},
    draw=lambda key, alpha, survivors: 0.1 * jax.random.normal(key, (8,)) + alpha["normal"][1],
    architecture=lambda drawn: None,
    logits=toy_logits,
    trained=toy_logits,
    score=toy_logits,
)


def settings_of(models, second_order=False, devices=DEVICES, virtual=0):
    step = StepSettings(
        supernet=SupernetSettings(1, 2, (), CLASSES),
        batch_size=BATCH,
        shards=Shards(devices, virtual),
        crop_padding=1,
        flip=True,
        steps_per_epoch=TRAINING // BATCH,
    )
    weights = (1.0,) if len(models) == 1 else (0.75, 0.25)
    return BilevelSettings(step, tuple(m == CHILD for m in models), weights, WARMUP, second_order)


def call_of(epoch, first_step=0, num_steps=1, stop=0, passes=1):
    survivors = np.ones((2, 14, 8), bool)
    survivors[0, 0, 3] = False
    return BilevelCall(
        survivors=survivors,
        model=np.int32(0),
        epoch=np.int32(epoch),
        first_step=np.int32(first_step),
        num_steps=np.int32(num_steps),
        stop=np.int32(stop),
        passes=np.int32(passes),
        key=KEY,
    )


def rule(models):
    return MixtureOptimizer(OPTIMIZER, models[0])


def start_of(models):
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    def model():
        params = {"first": normal(3, 8), "second": normal(8, CLASSES)}
        # In the middle of training: the momentum is not 0.
        state = jax.tree.map(lambda leaf: 0.1 * normal(*leaf.shape), rule(models).init(params))
        return ModelState(params, state)

    alpha = {"normal": normal(14, 8), "reduce": normal(14, 8)}
    alpha_state = alpha_adam(RATES["alpha"], RATES["decay"]).init(alpha)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(model() for _ in models))
    return BilevelState(stacked, jax.device_get(AlphaState(alpha, alpha_state)))


def on_devices(tree, devices):
    return jax.tree.map(lambda leaf: np.stack([leaf] * devices), tree)


def program_of(models, second_order=False, devices=DEVICES, virtual=0):
    """(state, call) -> state and sums, of the first of so many devices that share the batches."""
    settings = settings_of(models, second_order, devices, virtual)
    function = make_bilevel_call(
        settings, TOY, rule(models), alpha_adam(RATES["alpha"], RATES["decay"])
    )
    mapped = jax.pmap(function, AXIS, devices=jax.devices()[:devices])

    def run(state, call, data=DATA, other=OTHER):
        results = mapped(*on_devices((state, data, other, call), devices))
        for leaf in jax.tree.leaves(jax.device_get(results)):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        return jax.tree.map(lambda leaf: leaf[0], jax.device_get(results))

    return run


@pytest.fixture(scope="module")
def both():
    return program_of((CHILD, PARENT))


def quick(function):
    """As one program: its operations one by one would take longer to compile."""
    return jax.jit(function, compiler_options=QUICK)


def images_of(data, key, epoch, order_step, draw_step=None):
    """The images and labels of a step's whole batch."""
    order = np.asarray(epoch_permutation(key, epoch, len(data.labels)))
    rows = order[order_step * BATCH : (order_step + 1) * BATCH]
    positions = jnp.arange(BATCH, dtype=jnp.int32)
    draws = position_draws(step_key(key, epoch, order_step), positions, CROP_DRAWS)

    @quick
    def seen(draws, images):
        return normalise(random_crop_flip(draws, images, 1, True), data.mean, data.std)

    return seen(draws, data.images[rows]), data.labels[rows]


@dataclasses.dataclass
class ByHand:
    """One step on one device."""

    state: BilevelState
    models: tuple
    epoch: int
    number: int

    def __post_init__(self):
        key, self.survivors = jax.random.wrap_key_data(KEY), call_of(0).survivors
        self.batch = images_of(DATA, key, self.epoch, self.number)
        self.other = images_of(OTHER, validation_key(key), self.epoch, self.number % 2)
        own_key = sample_key(key, self.epoch, self.number)
        self.drawn = TOY.draw(own_key, self.state.alpha.alpha, self.survivors)
        self.rows = [
            jax.tree.map(lambda leaf, i=i: leaf[i], self.state.models)
            for i in range(len(self.models))
        ]
        self.steps_done = np.int32(self.epoch * 4 + self.number)

    def loss(self, params, alpha, batch, model):
        logits = toy_logits(params, batch[0], alpha, self.survivors, self.drawn, model == CHILD)
        return cross_entropy(logits, batch[1])

    def virtual(self, row, alpha, model):
        """Eq. 7: the weights after a step of SGD, differentiable in alpha."""
        gradient = jax.grad(self.loss)(row.params, alpha, self.batch, model)
        cosine = (1 + np.cos(np.pi * self.steps_done / 40)) / 2
        rate = np.float32(OPTIMIZER.child_learning_rate * cosine)
        return jax.tree.map(
            lambda w, g, m: w - rate * (g + 0.05 * w + 0.9 * m),
            row.params,
            gradient,
            row.optimizer[1].trace,
        )

    def alpha_gradient(self, second_order=False):
        """Alpha's objective, and its gradient with decay."""

        def objective(alpha):
            total = 0.0
            weights = settings_of(self.models).weights
            for row, model, weight in zip(self.rows, self.models, weights, strict=True):
                params = self.virtual(row, alpha, model) if second_order else row.params
                total = total + weight * self.loss(params, alpha, self.other, model)
            return total

        alpha = self.state.alpha.alpha
        value, gradient = quick(jax.value_and_grad(objective))(alpha)
        return value, jax.tree.map(lambda g, a: g + RATES["decay"] * a, gradient, alpha)

    def alpha(self):
        """Alpha after its first step of Adam."""
        _, gradient = self.alpha_gradient()
        alpha, adam = self.state.alpha.alpha, optax.scale_by_adam(b1=0.5, b2=0.999)
        with jax.numpy_dtype_promotion("standard"):
            direction, _ = quick(adam.update)(gradient, adam.init(alpha))
        return jax.tree.map(lambda a, d: a - RATES["alpha"] * d, alpha, direction)

    def weights(self, alpha):
        """Loss and parameters of each model after the step, with an alpha."""
        found = []
        for row, model in zip(self.rows, self.models, strict=True):

            @quick
            def step(row, model=model):
                value, gradient = jax.value_and_grad(self.loss)(
                    row.params, alpha, self.batch, model
                )
                params, _ = rule(self.models).update(
                    gradient, row.optimizer, row.params, step=self.steps_done
                )
                return value, params

            found.append(step(row))
        return found


def close(found, expected, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), found, expected)


@pytest.mark.parametrize(("epoch", "number"), [(0, 1), (1, 0), (1, 3)])
def test_two_devices_step_as_one_by_hand(both, epoch, number):
    """Also in the warm-up, and with the second batch of a smaller validation part."""
    models = (CHILD, PARENT)
    start = start_of(models)
    new, found = both(start, call_of(epoch, number))
    hand = ByHand(start, models, epoch, number)
    if epoch < WARMUP:
        jax.tree.map(np.testing.assert_array_equal, new.alpha, start.alpha)
        alpha, value = start.alpha.alpha, 0.0
    else:
        alpha, value = hand.alpha(), hand.alpha_gradient()[0]
        assert np.abs(new.alpha.alpha["normal"][0] - start.alpha.alpha["normal"][0]).max() > 0.2
    close(new.alpha.alpha, alpha)
    expected = hand.weights(new.alpha.alpha)
    for i, (loss, params) in enumerate(expected):
        close(jax.tree.map(lambda leaf, i=i: leaf[i], new.models.params), params)
        close(found["loss"][i], loss)
    close(found["objective"], value)
    assert found["bad_step"] == -1


def test_the_weights_step_with_the_new_alpha(both):
    """By hand the old one gives something else, so that the test above can fail."""
    start = start_of((CHILD, PARENT))
    hand = ByHand(start, (CHILD, PARENT), 1, 0)
    new, _ = both(start, call_of(1, 0))
    (_, params), _ = hand.weights(start.alpha.alpha)
    assert np.abs(new.models.params["second"][0] - params["second"]).max() > 1e-4


@pytest.mark.parametrize("devices", [1, 2])
def test_second_order_is_the_gradient_through_the_virtual_step(devices):
    """By finite differences, against exact differentiation; it is not the first order."""
    program = program_of((CHILD,), second_order=True, devices=devices)
    start = start_of((CHILD,))
    new, found = program(start, call_of(1, 2))
    hand = ByHand(start, (CHILD,), 1, 2)
    value, exact = hand.alpha_gradient(second_order=True)
    _, first_order = hand.alpha_gradient()
    # Adam's first moment after one step is half the gradient.
    close(jax.tree.map(lambda m: 2 * m, new.alpha.optimizer[1][0].mu), exact, 2e-4)
    close(found["objective"], value)
    assert np.abs(exact["normal"] - first_order["normal"]).max() > 2e-3


def test_virtual_shards_are_the_same_up_to_rounding_on_one_device_and_on_two():
    models = (CHILD, PARENT)
    start, found = start_of(models), []
    for devices in (1, 2):
        program = program_of(models, False, devices, virtual=2)
        found.append(program(start, call_of(1, 2, passes=2 // devices)))
    close(*found, 1e-6)
    value, _ = ByHand(start, models, 1, 2).alpha_gradient()
    close(found[0][1]["objective"], value)


def test_with_adam_the_virtual_step_is_the_plain_gradient():
    optimizer = MixtureOptimizer(dataclasses.replace(OPTIMIZER, child_optimizer="adam"), CHILD)
    params, gradient = {"w": np.ones(3, np.float32)}, {"w": np.arange(3, dtype=np.float32)}
    moved = optimizer.virtual(gradient, optimizer.init(params), params, step=np.int32(0))
    np.testing.assert_allclose(moved["w"], 1 - 0.2 * np.arange(3), rtol=1e-6)


def test_several_steps_of_a_call_are_those_of_several_calls(both):
    start = start_of((CHILD, PARENT))
    together, sums = both(start, call_of(1, 1, 3))
    state, total = start, 0.0
    for number in (1, 2, 3):
        state, found = both(state, call_of(1, number))
        total = total + found["loss"]
    jax.tree.map(np.testing.assert_array_equal, together, state)
    close(sums["loss"], total)


def test_a_stop_is_told_of(both):
    start = start_of((CHILD, PARENT))
    assert [both(start, call_of(0, stop=stop))[1]["stop"] for stop in (0, 1)] == [0, 1]


@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_bad_step_changes_nothing_and_is_named(both, part):
    start = start_of((CHILD, PARENT))
    bad = dataclasses.replace(DATA if part == "training" else OTHER, std=np.zeros(3, np.float32))
    good = (DATA, OTHER)
    data = (bad, good[1]) if part == "training" else (good[0], bad)
    new, found = both(start, call_of(1, 1, 3), *data)
    assert found["bad_step"] == 1
    assert np.isfinite(found["objective"]) == (part == "training")
    assert np.isfinite(found["loss"]).all() == (part == "validation")
    jax.tree.map(np.testing.assert_array_equal, new, start)


def test_settings_that_contradict_each_other_are_refused():
    one = settings_of((CHILD,))
    with pytest.raises(ValueError, match="2 weights of 1 models"):
        dataclasses.replace(one, weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="second order with 2 models"):
        settings_of((CHILD, PARENT), second_order=True)
