"""The networks of the gradient strategies on eight devices: one reduction cell, few operations."""

import dataclasses
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_cell import part
from reads import OF_GRADIENT, note_reads

from cpnas_jax import config as configs
from cpnas_jax import config_rules
from cpnas_jax.architecture.sampling import all_survivors
from cpnas_jax.bilevel_networks import STATE, BilevelNetworks, BilevelSums
from cpnas_jax.data.augment import normalise
from cpnas_jax.data.datasets import channel_statistics
from cpnas_jax.data.order import scoring_indices, weights_key
from cpnas_jax.diagnosis import NotFinite
from cpnas_jax.models import mixture, supernet
from cpnas_jax.models.mixture import MixtureSettings
from cpnas_jax.models.space import OPERATIONS
from cpnas_jax.path_optimizer import CHILD
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search_networks import MODELS

SOME = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")
SURVIVORS = all_survivors(SOME)
PARTS = {"train": part(70, 0), "validation": part(37, 1)}  # four steps; two validation batches


def config_of(strategy, **search):
    config = configs.base_config()
    config.dataset.crop_padding = 1
    config.search.update(
        operations=SOME,
        cells=1,
        channels=4,
        reductions=(0,),
        batch_size=16,
        score_batch_size=16,
        epochs=3,
        alpha_warmup=1,
        partial_channels=2,
        child_optimizer="adam",
        child_learning_rate=0.01,
        alpha_learning_rate=0.01,
    )
    config.search.update(search)
    config.runtime.update(optimization_level=0, steps_per_call=3)
    config.search.strategy = strategy
    return config


def networks_of(config):
    return BilevelNetworks(config, *PARTS.values(), config.search.epochs, time.monotonic())


def run(networks, epoch, sums=None):
    """The rest of an epoch; the state after every call."""
    sums, states = sums or BilevelSums(), []
    while sums.steps < networks.steps_per_epoch:
        assert not networks.train(SURVIVORS, epoch, sums)
        states.append(networks.host_state())
    return sums, states


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@dataclasses.dataclass
class Trained:
    strategy: str
    networks: BilevelNetworks
    start: dict
    epochs: list


# DARTS is PC-DARTS with less, as far as a device is concerned.
STRATEGIES = [pytest.param("darts", marks=pytest.mark.slow), "pc_darts", "cp_gradient"]


@pytest.fixture(scope="module", params=STRATEGIES)
def trained(request, compiled_once):
    """Two epochs of a strategy."""
    networks = networks_of(config_of(request.param))
    start = networks.initial_state()
    networks.load(start)
    networks.compile()
    return Trained(request.param, networks, start, [run(networks, epoch) for epoch in range(2)])


def alphas(trained):
    first, second = (states[-1][STATE].alpha for _, states in trained.epochs)
    return trained.start[STATE].alpha, first, second


def test_alpha_waits_for_the_end_of_the_warmup(trained):
    start, first, second = alphas(trained)
    waits = trained.networks.warmup > 0
    assert waits == (trained.strategy != "darts")
    changed = [
        not np.array_equal(a.alpha["reduce"], b.alpha["reduce"])
        for a, b in ((start, first), (first, second))
    ]
    assert changed == [not waits, True]
    objectives = [sums.objective for sums, _ in trained.epochs]
    assert [value != 0 for value in objectives] == [not waits, True]


def test_weights_move_from_the_first_epoch_and_learn(trained):
    before = trained.start[STATE].models.params["stem"]["kernel"]
    after = trained.epochs[0][1][-1][STATE].models.params["stem"]["kernel"]
    assert before.shape[0] == len(trained.networks.models)
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    losses = [sums.mean_losses() for sums, _ in trained.epochs]
    assert all(set(found) == set(trained.networks.models) for found in losses)
    # Single paths, another in every step, make no trend in eight steps.
    if trained.strategy != "cp_gradient":
        assert losses[1][CHILD] < losses[0][CHILD]


def test_a_resumed_run_goes_on_bitwise(trained):
    """From the state between the two calls of the second epoch."""
    networks = trained.networks
    sums, states = trained.epochs[1]
    networks.load(states[0])
    again, resumed = run(networks, 1, BilevelSums(steps=3))
    same(resumed[-1], states[-1])
    assert again.steps == sums.steps == networks.steps_per_epoch == 4


def test_scores_are_accuracies_of_what_alpha_says(trained):
    networks = trained.networks
    state = trained.epochs[1][1][-1]
    networks.load(state)
    found = networks.score(SURVIVORS)
    assert set(found) == set(networks.models)
    for number, model in enumerate(networks.models):
        params = jax.tree.map(lambda leaf, n=number: leaf[n], state[STATE].models.params)
        expected = accuracy(networks, params, networks.alpha(), model == CHILD)
        # A sign may fall otherwise where rounding differs.
        assert abs(found[model] - expected) <= 3 / 37


def accuracy(networks, params, alpha, binary):
    """On whole batches of one device."""
    images, labels = PARTS["validation"].images, PARTS["validation"].labels
    rows, mask = scoring_indices(37, 16)
    mean, std = channel_statistics(PARTS["train"].images)
    settings = dataclasses.replace(
        networks._settings,
        operations=dataclasses.replace(networks._settings.operations, statistics=None),
    )

    @jax.jit
    def logits_of(images):
        images = normalise(images, mean, std)
        if len(networks.models) == 1:
            partial = 2 if "reduce_edges" in alpha else 1
            mixed = MixtureSettings(settings, partial, partial > 1, SOME)
            return mixture.apply(params, images, alpha, settings=mixed, binary=binary)
        values = np.stack([alpha["normal"], alpha["reduce"]])
        best = np.argmax(np.where(SURVIVORS, values, -np.inf), axis=-1).astype(np.int32)
        return supernet.apply(params, images, jnp.asarray(best), settings=settings, binary=binary)

    hits = [np.argmax(logits_of(images[row]), axis=1) == labels[row] for row in rows]
    return np.sum(np.stack(hits) * mask) / 37


def test_where_one_operation_is_left_alpha_has_no_gradient(trained):
    """Only its decay moves it, as Adam's first moment shows."""
    networks = trained.networks
    networks.load(trained.epochs[1][1][-1])
    left = np.zeros_like(SURVIVORS)
    left[..., OPERATIONS.index("skip_connect")] = True
    before = networks.host_state()[STATE].alpha
    networks.train(left, 1, BilevelSums())
    after = networks.host_state()[STATE].alpha
    steps = after.optimizer[1][0].count - before.optimizer[1][0].count
    assert steps == 3
    moment, alpha = before.optimizer[1][0].mu["reduce"], before.alpha["reduce"]
    for _ in range(steps):
        moment = 0.5 * moment + 0.5 * 1e-3 * alpha
    # Alpha itself moves by a hundredth a step, of which the decay is a hundred thousandth.
    np.testing.assert_allclose(after.optimizer[1][0].mu["reduce"], moment, atol=5e-5)
    assert np.abs(before.optimizer[1][0].mu["reduce"]).max() > 1e-3


def test_what_is_not_finite_is_told(trained):
    networks = trained.networks
    bad = jax.tree.map(np.copy, trained.epochs[0][1][-1])
    bad[STATE].models.params["classifier"]["bias"][:] = np.nan
    networks.load(bad)
    with pytest.raises(NotFinite, match="is not finite in step 1 of epoch 2; an update left"):
        networks.train(SURVIVORS, 1, BilevelSums())


def test_initial_weights_are_those_of_the_other_strategies(trained):
    networks = trained.networks
    for number, model in enumerate(networks.models):
        key = weights_key(jax.random.key(networks._seed), MODELS.index(model))
        expected = jax.device_get(networks._relaxation.init(key, (8, 8, 1)))
        found = jax.tree.map(lambda leaf, n=number: leaf[n], trained.start[STATE].models.params)
        # Another program, which may round otherwise.
        chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)


def test_every_key_of_a_gradient_strategy_is_read(monkeypatch):
    read = set()
    for strategy in config_rules.GRADIENT_STRATEGIES:
        config = config_of(strategy)
        with monkeypatch.context() as patch:
            noted = note_reads(patch, config)
            BilevelNetworks(config, *PARTS.values(), 3, time.monotonic())
            read |= noted
    # The loop counts the epochs.
    assert OF_GRADIENT - {"search.epochs"} <= read


def test_a_validation_part_below_a_batch_is_refused():
    config = config_of("darts", batch_size=40)
    with pytest.raises(
        UserError, match=r"batch_size is 40; the validation part, which gives .* 37"
    ):
        networks_of(config)


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        ("darts", {"parallel": "path"}, "search.parallel is 'path'; with .*darts, .* must be data"),
        ("pc_darts", {"alpha_warmup": 3}, "alpha_warmup is 3; it must be below .*epochs=3"),
        ("pc_darts", {"partial_channels": 3}, "partial_channels is 3; it must divide .*channels=4"),
        ("cp_gradient", {"second_order": True}, "second_order is True; with .*cp_gradient"),
    ],
)
def test_keys_that_contradict_each_other_are_named(strategy, settings, message):
    config = config_of(strategy)
    if strategy == "cp_gradient":
        config.search.epochs = 4
    config_rules.check_gradient_strategy(config.search, 0)
    config.search.update(settings)
    with pytest.raises(UserError, match=message):
        config_rules.check_gradient_strategy(config.search, 0)


def test_keys_of_other_strategies_are_not_looked_at():
    config = config_of("cp")
    config.search.update(parallel="path", alpha_warmup=9, partial_channels=3, second_order=True)
    config_rules.check_gradient_strategy(config.search, 0)
    config.search.update(strategy="darts", parallel="data")
    config_rules.check_gradient_strategy(config.search, 0)
