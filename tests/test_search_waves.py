"""Whole searches that train two architectures of a round at the same time, on groups of devices."""

import io

import jax
import numpy as np
import pytest
from outcomes import search_outcome
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import search as search_module
from cpnas_jax import search_networks
from cpnas_jax.data.datasets import Split
from cpnas_jax.diagnosis import NotFinite
from cpnas_jax.models.space import OPERATIONS, PARENT
from cpnas_jax.runtime import environment
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.interruptions import Stopped
from cpnas_jax.search import search
from cpnas_jax.search_networks import EpochSums, Networks

CHOICES = ("none", "skip_connect", "sep_conv_3x3")


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """Forty grey images, brighter by class."""
    labels = np.arange(40, dtype=np.int32) % 4
    noise = np.random.default_rng(0).integers(0, 60, (40, 8, 8, 1))
    images = (noise + 60 * labels[:, None, None, None]).astype(np.uint8)
    split = Split(images, labels, 4, tuple("abcd"), "greys")
    monkeypatch.setattr(search_module, "load_split", lambda *_: split)
    return split


def config_of(**search_keys):
    config = configs.base_config()
    config.dataset.crop_padding = 1
    config.search.update(rounds=1, operations=CHOICES, cells=1, reductions=(0,), channels=4)
    config.search.update(batch_size=8, score_batch_size=8, separable_repeats=1, parallel="path")
    config.search.update(search_keys)
    config.runtime.update(optimization_level=0, steps_per_call=1)
    return config


def run(workdir):
    file = io.StringIO()
    search(config_of(), workdir, Reporter(Console(file=file, width=300)))
    return file.getvalue()


def test_a_search_that_is_stopped_within_a_wave_ends_bitwise_the_same(monkeypatch, tmp_path):
    said = run(tmp_path / "undisturbed")
    assert jax.device_count() == 8
    assert "Up to 2 architectures of a round are trained at the same time" in said
    assert "8 cpu devices, batch 16 in all, 2 a device" in said
    calls = iter(range(1000))
    # The second step of the parent, of the second wave.
    with monkeypatch.context() as here:
        here.setattr(search_networks, "stop_wished", lambda: next(calls) == 11)
        with pytest.raises(Stopped, match=r"in sampled epoch 3 of 5, after step 2 of the parent"):
            run(tmp_path / "run")
    assert "Resumed in sampled epoch 3 of 5" in run(tmp_path / "run")
    assert search_outcome(tmp_path / "run") == search_outcome(tmp_path / "undisturbed")


def test_the_weights_are_made_at_the_optimization_level_too(monkeypatch, data):
    monkeypatch.setattr(environment, "compiler_options", lambda level: {f"xla_level_{level}": 1})
    with pytest.raises(RuntimeError, match="xla_level_0"):
        Networks(config_of(), data, data, 5, 0.0).initial_state()


@pytest.mark.slow
def test_what_one_architecture_of_a_wave_spoils_is_told(data):
    """The second one's epoch, and its operation."""
    networks = Networks(config_of(), data, data, 5, 0.0)
    states = networks.initial_state()
    sampled = np.full((2, 2, 14), OPERATIONS.index("none"), np.int32)
    sampled[1, 1, 0] = OPERATIONS.index("sep_conv_3x3")

    def spoilt(path, leaf):
        # Edge 0->2 is the first that has stride 2.
        here = "stride2" in path and "sep_conv_3x3" in path and "kernel" in path
        return (
            np.where(
                np.arange(len(leaf)).reshape(-1, *[1] * (leaf.ndim - 1)) == 0, np.nan, leaf
            ).astype(leaf.dtype)
            if here
            else leaf
        )

    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: spoilt(jax.tree_util.keystr(path), np.asarray(leaf)),
        states[PARENT].params,
    )
    states[PARENT] = states[PARENT].replace(params=params)
    networks.load(states)
    with pytest.raises(
        NotFinite, match=r"sampled epoch 4 to 5; .*sep_conv_3x3.*, in sampled epoch 5"
    ):
        networks.train(PARENT, sampled, 3, EpochSums())
