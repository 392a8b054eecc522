"""What each config key must be."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from ml_collections import config_dict

from cpnas_jax.architecture.genotype import EDGE_POLICIES
from cpnas_jax.architecture.plus import MEASURES, PATHS
from cpnas_jax.architecture.sampling import num_sampled_epochs
from cpnas_jax.deploy.iree_engine import TARGETS
from cpnas_jax.models.binarize import ESTIMATORS, PAD_VALUES, WEIGHT_SCALES
from cpnas_jax.models.blocks import Levers
from cpnas_jax.models.layers import FORMULATIONS
from cpnas_jax.models.network import STEMS
from cpnas_jax.models.space import MODELS, OPERATIONS
from cpnas_jax.runtime.errors import UserError

MODES = (
    *("pipeline", "search", "train", "evaluate", "summary", "compare"),
    *("report", "export", "predict"),
)
OPTIMIZERS = ("sgd", "adam")
GRADIENT_STRATEGIES = ("darts", "pc_darts", "cp_gradient")
"""In these alpha has a gradient; see `bilevel_step`."""
STRATEGIES = ("cp", "cp_plus", "child", "random", "random_search", *GRADIENT_STRATEGIES)
PARALLEL = ("data", "path")
PRECISIONS = ("binary", "float")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a key must be: a test of the value, and the same in words."""

    test: Callable[[Any], bool]
    words: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def _integer(low: int, high: int = 2**31 - 1) -> Rule:
    words = f"an integer, at least {low}" + (f" and at most {high}" if high < 2**31 - 1 else "")
    return Rule(lambda v: _is_integer(v) and low <= v <= high, words)


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Rule:
    def test(value: Any) -> bool:
        return _is_number(value) and (low < value if open_low else low <= value) and value <= high

    words = f"a finite number {'above' if open_low else 'of at least'} {low:g}"
    return Rule(test, words + ("" if high == math.inf else f" and at most {high:g}"))


def _one_of(values: Any) -> Rule:
    return Rule(lambda v: v in tuple(values), f"one of {', '.join(map(str, values))}")


def _boolean() -> Rule:
    return Rule(lambda v: isinstance(v, bool), "True or False")


def _is_several(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and all(map(test, value)) and len(set(value)) == len(value)


def _several_of(values: tuple[str, ...]) -> Rule:
    return Rule(
        lambda v: bool(v) and _is_several(v, lambda name: name in values),
        f"a tuple of different names of {', '.join(values)}",
    )


def _is_operations(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) >= 2
        and all(isinstance(name, str) and name in OPERATIONS for name in value)
        and len(set(value)) == len(value)
    )


RULES = {
    "mode": _one_of(MODES),
    "seed": Rule(lambda v: _is_integer(v) and 0 <= v < 2**31, "an integer from 0 to 2**31 - 1"),
    "dataset.name": Rule(
        lambda v: isinstance(v, str) and re.fullmatch(r"\w+(/[\w.-]+)?", v) is not None,
        "the name of a tfds set, such as cifar10 or name/config",
    ),
    "dataset.data_dir": Rule(lambda v: isinstance(v, str), "a string"),
    "dataset.image_size": _integer(0, 1024),
    "dataset.stream": _boolean(),
    "dataset.workers": _integer(0, 256),
    "dataset.max_undecodable": _integer(0),
    "dataset.color_jitter": _number(0, 1),
    "dataset.crop_area": _number(0, 1, open_low=True),
    "dataset.central_crop": _number(0, 1, open_low=True),
    "dataset.crop_padding": _integer(0),
    "dataset.flip": _boolean(),
    "dataset.cutout": _integer(0),
    "genotype": Rule(lambda v: isinstance(v, str), "a genotype file or the name of one"),
    "network.cells": _integer(1, 100),
    "network.channels": _integer(1, 4096),
    "network.precision": _one_of(PRECISIONS),
    "network.stem": _one_of(STEMS),
    "network.auxiliary": _boolean(),
    "network.drop_path": Rule(lambda v: _is_number(v) and 0 <= v < 1, "in [0, 1)"),
    "network.separable_repeats": _one_of((1, 2)),
    "network.binary_preprocess": _boolean(),
    "network.normalize_pools": _boolean(),
    "network.recompute": _boolean(),
    **{f"network.{lever.name}": _boolean() for lever in dataclasses.fields(Levers)},
    "train.examples": _integer(0),
    "train.epochs": _integer(1),
    "train.batch_size": _integer(1),
    "train.learning_rate": _number(0, 1000, open_low=True),
    "train.weight_decay": _number(0),
    "train.float_learning_rate": _number(0, 1000, open_low=True),
    "train.float_weight_decay": _number(0),
    "train.momentum": Rule(lambda v: _is_number(v) and 0 <= v < 1, "in [0, 1)"),
    "train.warmup_epochs": _integer(0),
    "train.reference_batch": _integer(0),
    "train.gradient_clip": _number(0, open_low=True),
    "train.label_smoothing": Rule(lambda v: _is_number(v) and 0 <= v < 1, "in [0, 1)"),
    "train.auxiliary_weight": _number(0),
    "train.reconstruction_weight": _number(0),
    "train.center_weight": _number(0),
    "train.parent_kernel": _boolean(),
    "train.real_weights_epochs": _integer(0),
    "train.average_decay": Rule(lambda v: _is_number(v) and 0 <= v < 1, "in [0, 1)"),
    "train.evaluate_every": _integer(1),
    "evaluate.split": Rule(lambda v: isinstance(v, str) and v != "", "the name of a split"),
    "evaluate.examples": _integer(0),
    "evaluate.checkpoint": _one_of(("last", "best")),
    "evaluate.batch_size": _integer(1),
    "export.directory": Rule(lambda v: isinstance(v, str), "a directory, or empty"),
    "export.iree": Rule(
        lambda v: _is_several(v, lambda name: name in TARGETS),
        f"a tuple, empty or of different names of {', '.join(TARGETS)}",
    ),
    "predict.images": Rule(lambda v: isinstance(v, str), "files and folders, commas between"),
    "predict.top": _integer(1),
    "predict.format": _one_of(("table", "json")),
    "predict.engine": _one_of(("xla", "iree")),
    "predict.batch_size": _integer(1),
    "runtime.checkpoint_every": _integer(0),
    "runtime.stall_seconds": _number(0),
    "search.strategy": _one_of(STRATEGIES),
    "search.candidates": _integer(1),
    "search.plus_beta_p": _number(-100, 100),
    "search.measure": _one_of(MEASURES),
    "search.max_scored": _integer(8),
    "search.plus_score_examples": _integer(1),
    "search.reliability": _number(0, 1),
    "search.certainty": _number(0.5, 1),
    "search.carry": _number(0, 1, open_low=True),
    "search.plus_training": _integer(1),
    "search.plus_paths": _one_of(PATHS),
    "search.parallel": _one_of(PARALLEL),
    # Beyond, float32 alpha could not be checked against eq. 4.16 with any sense.
    "search.beta_p": _number(-100, 100),
    "search.rounds": _integer(1),
    "search.examples": _integer(0),
    "search.validation_fraction": Rule(lambda v: _is_number(v) and 0 < v < 1, "between 0 and 1"),
    "search.operations": Rule(
        _is_operations, f"a tuple of at least 2 different names of {', '.join(OPERATIONS)}"
    ),
    "search.cells": _integer(1, 100),
    "search.channels": _integer(1, 4096),
    "search.reductions": Rule(
        lambda v: isinstance(v, tuple) and all(map(_is_integer, v)) and list(v) == sorted(set(v)),
        "a tuple of increasing cell positions",
    ),
    "search.separable_repeats": _one_of((1, 2)),
    "search.binary_preprocess": _boolean(),
    "search.batch_size": _integer(1),
    "search.score_batch_size": _integer(1),
    "search.score_examples": _integer(0),
    "search.learning_rate": _number(0, 1000, open_low=True),
    "search.momentum": Rule(lambda v: _is_number(v) and 0 <= v < 1, "in [0, 1)"),
    "search.weight_decay": _number(0),
    "search.gradient_clip": _number(0, open_low=True),
    "search.child_optimizer": _one_of(OPTIMIZERS),
    "search.child_learning_rate": _number(0, 1000, open_low=True),
    "search.epochs": _integer(1),
    "search.gradient_model": _one_of(MODELS),
    "search.second_order": _boolean(),
    "search.partial_channels": _integer(1, 4096),
    "search.edge_normalisation": _boolean(),
    "search.alpha_learning_rate": _number(0, 1000, open_low=True),
    "search.alpha_weight_decay": _number(0),
    "search.alpha_warmup": _integer(0),
    "search.child_weight": _number(-100, 100),
    "search.parent_weight": _number(-100, 100),
    "search.gate_temperature": _number(0, 1000, open_low=True),
    "search.collapse_share": _number(0, 1),
    "search.max_skips": _integer(-1, 14),
    "search.edge_policy": _one_of(EDGE_POLICIES),
    "binarizer.activation_estimator": _one_of(ESTIMATORS),
    "binarizer.weight_estimator": _one_of(ESTIMATORS),
    "binarizer.weight_scale": _one_of(WEIGHT_SCALES),
    "binarizer.pad_value": _one_of(PAD_VALUES),
    "compare.strategies": _several_of(STRATEGIES),
    "compare.seeds": Rule(
        lambda v: _is_several(v, lambda seed: _is_integer(seed) and 0 <= seed < 2**31) and v,
        "a tuple of different integers from 0 to 2**31 - 1",
    ),
    "compare.beta_p": Rule(
        lambda v: _is_several(v, lambda beta: _is_number(beta) and abs(beta) <= 100),
        "a tuple of different numbers from -100 to 100",
    ),
    "runtime.steps_per_call": _integer(1),
    "runtime.keep_checkpoints": _integer(1),
    "runtime.formulation": _one_of(FORMULATIONS),
    "runtime.optimization_level": _one_of((0, 1, 2, 3)),
    "runtime.synchronise_statistics": _boolean(),
    # Every shard's gradient is held by every device.
    "runtime.deterministic": _integer(0, 1024),
    "runtime.tensorboard": _boolean(),
    "runtime.compilation_cache": _boolean(),
}


def check_fits_images(key: str, value: int, image_shape: tuple[int, ...]) -> None:
    """See that a number of pixels is at most the side of images [height, width, channels].

    Raises:
        UserError: it is not.
    """
    side = min(image_shape[:2])
    if value > side:
        raise UserError(f"{key} is {value}; it must be at most {side}, the images' pixels a side")


def check_gradient_strategy(search: config_dict.ConfigDict, shards: int) -> None:
    """Check the keys of a gradient strategy against each other; of others nothing.

    Args:
        search: section of a config.
        shards: `runtime.deterministic`.

    Raises:
        UserError: the first bad key, its value and what would be right.
    """
    strategy = search.strategy
    if strategy not in GRADIENT_STRATEGIES:
        return
    if shards:
        # Alpha is rounded otherwise on another number of devices: programs for several go through
        # other passes of XLA, which then write a division by a broadcast number (of softmax, of
        # Adam's bias correction) as a multiplication in other places.
        raise UserError(
            f"config.runtime.deterministic is {shards}; with config.search.strategy={strategy} it "
            "must be 0: only the searches of sampled paths have it"
        )
    if search.parallel != "data":
        raise UserError(
            f"config.search.parallel is {search.parallel!r}; with config.search.strategy="
            f"{strategy}, whose devices share each step, it must be data"
        )
    if strategy != "darts" and search.alpha_warmup >= search.epochs:
        raise UserError(
            f"config.search.alpha_warmup is {search.alpha_warmup}; it must be below "
            f"config.search.epochs={search.epochs}"
        )
    if strategy == "pc_darts" and search.channels % search.partial_channels:
        raise UserError(
            f"config.search.partial_channels is {search.partial_channels}; it must divide "
            f"config.search.channels={search.channels}"
        )
    if strategy == "cp_gradient" and search.second_order:
        raise UserError(
            "config.search.second_order is True; with config.search.strategy=cp_gradient it must "
            "be False: only the strategies of a single mixture, darts and pc_darts, have it"
        )
    if strategy == "cp_gradient" and search.epochs - search.alpha_warmup < (
        len(search.operations) - 1
    ):
        raise UserError(
            f"config.search.epochs is {search.epochs}; after {search.alpha_warmup} epochs of "
            f"config.search.alpha_warmup at least {len(search.operations) - 1} must follow, one "
            "for each operation that is dropped"
        )


def check_sampled_strategy(search: config_dict.ConfigDict) -> None:
    """Check the keys of strategies of sampled paths against each other.

    Args:
        search: section of a config.

    Raises:
        UserError: the first bad key, its value and what would be right.
    """
    least = 2 * sum(range(2, len(search.operations) + 1))
    if search.strategy == "cp_plus" and search.max_scored < least:
        raise UserError(
            f"config.search.max_scored is {search.max_scored}; it must be at least {least}, two "
            f"rounds of each stage of {len(search.operations)} operations"
        )
    scored = search.score_examples or search.plus_score_examples
    if search.strategy == "cp_plus" and search.score_batch_size > scored:
        raise UserError(
            f"config.search.score_batch_size is {search.score_batch_size}; cp_plus scores "
            f"{scored} images (config.search.plus_score_examples)"
        )
    if search.parallel == "path" and search.strategy not in ("cp", "child"):
        raise UserError(
            f"config.search.parallel is 'path'; with config.search.strategy={search.strategy} it "
            "must be 'data': only the architectures of cp and child share no operation in a round"
        )
    most = len(MODELS) * num_sampled_epochs(search.rounds, len(search.operations))
    if search.strategy == "random_search" and search.candidates > most:
        raise UserError(
            f"config.search.candidates is {search.candidates}; it must be at most {most}, the "
            f"epochs that the search has with config.search.rounds={search.rounds}"
        )
