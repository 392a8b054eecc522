"""The programs of a training, lowered for the target they are meant for, one and eight devices."""

import jax
import lowerings
import photos
import pytest
from one_cell import GENOTYPE, config_in, replace_data
from workloads import full_config

from cpnas_jax import feeds
from cpnas_jax.architecture.named import named_genotype
from cpnas_jax.network_config import network_settings
from cpnas_jax.trainer import Trainer


def check_training(patch, config, genotype, binary, channels):
    config.runtime.formulation = lowerings.formulation_on_tpus(patch)
    feed = feeds.open_feed(config)
    settings = network_settings(config, genotype, feed.facts.num_classes, binary=binary)
    trainer = Trainer(config, settings, feed)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(trainer._make_state, key, key)
    trainer._state = lowerings.on_devices(state)
    programs = {}

    def for_tpu(name, make, *arguments):
        programs[name[0]] = lowerings.lowered_for_tpu(make(), *arguments)
        if name[0] == "train" and jax.device_count() > 1:
            # The state becomes the next state; another lowering, so not on each number of devices.
            lowerings.check_donated(make(), *arguments)

    trainer._compiled = for_tpu
    trainer._train_program(0)
    trainer._counting_program(0)
    assert set(programs) == {"train", "evaluate"}
    for program in programs.values():
        lowerings.check_program(program)
    lowerings.check_gradients(programs["train"], state.params)
    if state.parent is not None:
        lowerings.check_gradients(programs["train"], state.parent["params"])
    lowerings.check_depthwise(programs["train"], channels, backward=True)
    lowerings.check_depthwise(programs["evaluate"], channels, backward=False)


@pytest.fixture
def config(tmp_path):
    config = config_in(tmp_path)
    config.network.auxiliary = True
    return config


def use_photos(config, directory, size):
    photos.prepare(directory)
    config.dataset.update(name="photos", data_dir=str(directory), stream=True, image_size=size)
    config.evaluate.split = "validation"


@pytest.mark.parametrize("devices", [1, 8])
def test_a_training_lowers_for_tpu(config, monkeypatch, devices):
    lowerings.use_devices(monkeypatch, devices)
    replace_data(monkeypatch)
    check_training(monkeypatch, config, GENOTYPE, True, {8})


def test_a_training_on_a_stream_lowers_for_tpu(config, monkeypatch, tmp_path):
    lowerings.use_devices(monkeypatch, 8)
    use_photos(config, tmp_path, 32)
    config.dataset.color_jitter = 0.4
    config.network.auxiliary = False
    check_training(monkeypatch, config, GENOTYPE, False, {8})


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_training_with_all_that_costs_lowers_for_tpu(config, monkeypatch, devices, binary):
    lowerings.use_devices(monkeypatch, devices)
    replace_data(monkeypatch)
    config.train.parent_kernel = True
    # Some of six cells are scanned.
    config.network.update(cells=6, recompute=True)
    check_training(monkeypatch, config, GENOTYPE, binary, {4, 8, 16})


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_the_training_of_the_config_lowers_for_tpu(monkeypatch, tmp_path, devices):
    lowerings.use_devices(monkeypatch, devices)
    config = full_config("imagenet", "train")
    use_photos(config, tmp_path, config.dataset.image_size)
    # As many steps as there are images for.
    config.train.batch_size = config.evaluate.batch_size = 16
    genotype = named_genotype("DDPNAS_XNOR_1")
    check_training(monkeypatch, config, genotype, True, {100, 200, 400})
