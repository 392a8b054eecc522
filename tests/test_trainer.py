"""A network in training by itself: what it refuses, and which part of a training it is in."""

import numpy as np
import pytest
from one_cell import config_in, replace_data, trainer_of

from cpnas_jax.runtime import environment
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.trainer import EpochSums


@pytest.fixture(autouse=True)
def _data(monkeypatch):
    replace_data(monkeypatch)


@pytest.fixture
def config(tmp_path):
    return config_in(tmp_path)


def test_a_float_network_has_no_part_with_real_weights(config):
    config.train.real_weights_epochs = 1
    assert [trainer_of(config, binary=True).real_weights(epoch) for epoch in (0, 1)] == [
        True,
        False,
    ]
    assert not trainer_of(config, binary=False).real_weights(0)


def test_the_weights_are_made_at_the_optimization_level_too(config, monkeypatch):
    monkeypatch.setattr(environment, "compiler_options", lambda level: {f"xla_level_{level}": 1})
    with pytest.raises(RuntimeError, match="xla_level_0"):
        trainer_of(config).initial_state()


@pytest.mark.parametrize(
    ("binary", "beside", "words"),
    [
        (True, False, r"smaller config\.train\.learning_rate in a new"),
        (False, False, r"smaller config\.train\.float_learning_rate in a new"),
        (True, True, r"smaller config\.train\.learning_rate or config\.train\.float_learning_rate"),
    ],
)
def test_the_rates_to_lower_are_named(config, monkeypatch, binary, beside, words):
    config.train.parent_kernel = beside
    trainer = trainer_of(config, binary)
    trainer.load(trainer.initial_state())
    monkeypatch.setattr(trainer, "_train_program", lambda _: None)
    monkeypatch.setattr(trainer, "_bad_layer", lambda *_: None)
    bad = {"bad_step": np.int32(2)}
    monkeypatch.setattr(trainer._feed, "train", lambda _, state, call: (state, bad))
    with pytest.raises(UserError, match=f"not finite in step 3 of epoch 1; .*{words}"):
        trainer.train(0, 0, 4, EpochSums())


def test_an_evaluation_that_does_not_fit_is_refused_before_the_training(config, monkeypatch):
    config.evaluate.batch_size = 8192
    trainer = trainer_of(config)
    trainer.load(trainer.initial_state())
    trainer.compile(0, 0)
    room = sum(trainer.memory_bytes("train").values())
    assert sum(trainer.memory_bytes("evaluate").values()) > room
    monkeypatch.setattr(environment, "device_memory", lambda: room)
    with pytest.raises(UserError, match=r"does not fit.*; lower config\.evaluate\.batch_size"):
        trainer.compile(0, 0)
