"""The programs of a training, lowered for the target they are meant for: eight TPU devices."""

import jax
import photos
import pytest
from jax import export
from one_cell import GENOTYPE, config_in, replace_data

from cpnas_jax import feeds
from cpnas_jax.trainer import Trainer, network_settings


def shape_of(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def lowered(config, binary):
    """Return name -> exported program, for all that a training compiles."""
    programs = {}

    def for_tpu(name, make, *arguments):
        shapes = jax.tree.map(shape_of, arguments)
        programs[name[0]] = export.export(jax.jit(make()), platforms=["tpu"])(*shapes)

    feed = feeds.open_feed(config)
    settings = network_settings(config, GENOTYPE, feed.facts.num_classes, binary=binary)
    trainer = Trainer(config, settings, feed)
    trainer._compiled = for_tpu
    key = jax.eval_shape(lambda: jax.random.key(0))
    trainer._state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((jax.device_count(), *leaf.shape), leaf.dtype),
        jax.eval_shape(trainer._make_state, key, key),
    )
    trainer._train_program(0)
    trainer._counting_program(0)
    return programs


@pytest.fixture
def config(tmp_path):
    config = config_in(tmp_path)
    config.runtime.formulation = "native"
    config.train.parent_kernel = True
    # Some of six cells are scanned.
    config.network.update(cells=6, auxiliary=True)
    return config


def check(programs):
    assert set(programs) == {"train", "evaluate"}
    for program in programs.values():
        assert (program.platforms, program.nr_devices) == (("tpu",), jax.device_count())
        assert "stablehlo.all_reduce" in program.mlir_module()


@pytest.mark.parametrize("binary", [True, False])
def test_a_training_on_resident_data_lowers_for_tpu(config, monkeypatch, binary):
    replace_data(monkeypatch)
    config.network.recompute = binary
    check(lowered(config, binary))


def test_a_training_on_a_stream_lowers_for_tpu(config, tmp_path):
    photos.prepare(tmp_path)
    config.dataset.update(name="photos", data_dir=str(tmp_path), stream=True, image_size=32)
    config.dataset.update(color_jitter=0.4)
    config.evaluate.split = "validation"
    check(lowered(config, True))
