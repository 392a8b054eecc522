"""A step that is not finite: it is named with its layer and the last checkpoint, on eight devices.

What was injected is what must be found.
"""

import re

import numpy as np
import pytest
from injected import with_value
from one_cell import config_in, replace_data, trainer_of

from cpnas_jax.runtime.errors import UserError
from cpnas_jax.trainer import EpochSums

SCALE = "cells0/preprocess1/ending/norm/affine/scale"


@pytest.fixture(autouse=True)
def _data(monkeypatch):
    replace_data(monkeypatch)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A child after a first step; the diagnosis is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        replace_data(patch)
        trainer = trainer_of(config_in(tmp_path_factory.mktemp("child")))
    return trainer, trainer.initial_state()


def message(trainer, state, epoch=0, first=1, count=2):
    trainer.load(state)
    with pytest.raises(UserError) as caught:
        trainer.train(epoch, first, count, EpochSums())
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "layer"),
    [
        ("cells0/edge2_4/unit0/depthwise/kernel", np.nan, "an update left cell 0 (reduce), edge "
         "2->4 dil_conv_3x3, unit 0 depthwise kernel that is not"),
        ("stem/conv0/kernel", np.inf, "an update left stem, conv 0 kernel that is not"),
        ("stem/conv0/kernel", 3e38, "the first output that is not is that of stem, conv 0"),
        (SCALE, 3e38, "the first output that is not is that of cell 0 (reduce), preprocessing of "
         "input 1, ending norm"),
        ("classifier/bias", (3e38, -3e38) * 3, "the outputs are, the loss term "
         "'cross_entropy' is not"),
    ],
)  # fmt: skip
def test_the_layer_is_named(trainer, name, value, layer):
    trainer, state = trainer
    text = message(trainer, with_value(state, name, value))
    found = re.match(
        r"the loss, its gradient or the update is not finite in step 2 of epoch 1; (.*?)\. Try a "
        r"smaller config\.train\.learning_rate in a new workdir$",
        text,
    )
    assert found is not None, text
    assert found[1] == layer


def test_a_good_state_goes_on(trainer):
    trainer, state = trainer
    trainer.load(state)
    trainer.train(0, 0, 1, EpochSums())


def test_images_that_are_not_finite(trainer, monkeypatch):
    trainer, state = trainer
    feed = trainer._feed
    images = feed._train.replace(mean=feed._train.mean * np.float32(np.nan))
    monkeypatch.setattr(feed, "_train", images)
    assert "the first output that is not is that of stem, conv 0." in message(trainer, state)
