"""The programs of a training, lowered for the target they are meant for: one and eight TPU devices.
"""

import jax
import lowerings
import photos
import pytest
from one_cell import GENOTYPE, config_in, replace_data

from cpnas_jax import feeds
from cpnas_jax import main as command
from cpnas_jax.architecture.named import named_genotype
from cpnas_jax.trainer import Trainer, network_settings


@pytest.fixture(params=[1, 8], ids=["1 device", "8 devices"], autouse=True)
def devices(request, monkeypatch):
    lowerings.use_devices(monkeypatch, request.param)


def check_training(config, genotype, binary, channels):
    # What `auto` means on a TPU; traced here it would be a CPU's form.
    config.runtime.formulation = "native"
    feed = feeds.open_feed(config)
    settings = network_settings(config, genotype, feed.facts.num_classes, binary=binary)
    trainer = Trainer(config, settings, feed)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(trainer._make_state, key, key)
    trainer._state = lowerings.on_devices(state)
    programs = {}

    def for_tpu(name, make, *arguments):
        programs[name[0]] = lowerings.lowered_for_tpu(make(), *arguments)
        if name[0] == "train":
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
    config.train.parent_kernel = True
    # Some of six cells are scanned.
    config.network.update(cells=6, auxiliary=True)
    return config


@pytest.mark.parametrize("binary", [True, False])
def test_a_training_on_resident_data_lowers_for_tpu(config, monkeypatch, binary):
    replace_data(monkeypatch)
    config.network.recompute = binary
    check_training(config, GENOTYPE, binary, {4, 8, 16})


def use_photos(config, tmp_path, size):
    photos.prepare(tmp_path)
    config.dataset.update(name="photos", data_dir=str(tmp_path), stream=True, image_size=size)
    config.evaluate.split = "validation"


def test_a_training_on_a_stream_lowers_for_tpu(config, tmp_path):
    use_photos(config, tmp_path, 32)
    config.dataset.color_jitter = 0.4
    check_training(config, GENOTYPE, True, {4, 8, 16})
