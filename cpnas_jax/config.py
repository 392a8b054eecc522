"""Every config key, with its evidence, and the check of all values before anything runs.

Evidence: [paper] stated by CP-NAS; [kin] from DARTS, PC-DARTS or the same group's later code;
[ours] our choice. The files in `configs/` change a handful of these values.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import config_dict

from cpnas_jax.architecture.genotype import EDGE_POLICIES
from cpnas_jax.models.binarize import ESTIMATORS, PAD_VALUES, WEIGHT_SCALES
from cpnas_jax.models.layers import FORMULATIONS
from cpnas_jax.models.space import OPERATIONS
from cpnas_jax.runtime.errors import UserError

MODES = ("pipeline", "search")
OPTIMIZERS = ("sgd", "adam")
STRATEGIES = ("cp",)


def base_config() -> config_dict.ConfigDict:
    """Return all keys with the values of the CIFAR-10 search."""
    config = config_dict.ConfigDict()
    config.mode = "search"  # what to run, one of MODES
    config.seed = 0  # decides data parts, order, augmentation, weights and permutations

    config.dataset = dataset = config_dict.ConfigDict()
    dataset.name = "cifar10"  # a tfds image classification set, or mnist5k
    dataset.data_dir = ""  # where tfds keeps prepared sets; "" is TFDS_DATA_DIR or tfds' default
    dataset.image_size = 0  # resize to this many pixels a side; 0 keeps the stored size
    dataset.examples = 0  # use so many of the train split's, an equal share a class; 0 uses all
    dataset.validation_fraction = 0.5  # of the train split, for scoring [kin]
    dataset.crop_padding = 4  # black border of the random crop [kin]
    dataset.flip = True  # random horizontal flip [kin]

    config.search = search = config_dict.ConfigDict()
    search.strategy = "cp"  # Algorithm 9 [paper]
    search.beta_p = 2.0  # eq. 4.15; 2 is the best of the paper's ablation [paper]
    search.rounds = 3  # T, rounds of a stage [kin]
    search.operations = OPERATIONS  # the K operations every edge starts with [paper]
    search.cells = 6  # [kin]
    search.channels = 16  # C of the first cell [kin]
    search.reductions = (1, 3)  # positions of the reduction cells [kin]
    search.separable_repeats = 2  # units of a sep_conv: 2 [kin], or 1 as figure 4.8 draws it
    search.binary_preprocess = True  # 1-bit 1x1 preprocessing in the child [ours]
    search.batch_size = 256  # global, over all devices [kin]
    search.score_batch_size = 256  # global; scoring normalises by these batches [ours]
    search.learning_rate = 0.1  # cosine to 0 over the whole search [kin]
    search.momentum = 0.9  # [kin]
    search.weight_decay = 3e-4  # [kin]
    search.gradient_clip = 5.0  # global norm [kin]
    search.child_optimizer = "sgd"  # as the parent [kin]; adam learns faster at 1 bit [ours]
    search.child_learning_rate = 0.1  # as the parent [kin]; about 0.002 with adam [ours]
    search.edge_policy = "all"  # all 14 edges as Algorithm 9 prints it [paper], or top2 [kin]

    config.binarizer = binarizer = config_dict.ConfigDict()
    binarizer.activation_estimator = "bireal"  # [kin]
    binarizer.weight_estimator = "clip"  # [kin]
    binarizer.weight_scale = "channel"  # mean |H| of each output channel [kin]
    binarizer.pad_value = 0.0  # around the signs: 0 [kin], or +1 for packed inference [ours]

    config.runtime = runtime = config_dict.ConfigDict()
    runtime.steps_per_call = 50  # training steps in one call to the device
    runtime.keep_checkpoints = 2  # newest checkpoints kept
    runtime.formulation = "auto"  # of depthwise convolution and pooling, by the backend
    runtime.optimization_level = 3  # of LLVM on a CPU; 1 compiles a quarter faster
    runtime.compilation_cache = True  # keep compiled programs in ~/.cache/cpnas_jax between runs
    return config.lock()


def parse_argument(argument: str | None, default_mode: str) -> tuple[str, bool]:
    """Read what follows the colon of --config=file.py:mode,smoke.

    Returns:
        mode and whether to shrink the run to a smoke test.

    Raises:
        UserError: an unknown word.
    """
    mode, smoke = default_mode, False
    for word in filter(None, (argument or "").split(",")):
        if word == "smoke":
            smoke = True
        elif word in MODES:
            mode = word
        else:
            raise UserError(
                f"config argument {word!r} is unknown; offered are {', '.join(MODES)} and smoke"
            )
    return mode, smoke


def shrink(config: config_dict.ConfigDict) -> None:
    """Turn a config into a smoke test: every part of a search, in about a minute on one CPU."""
    config.dataset.image_size = 8
    config.dataset.crop_padding = 1
    config.search.update(
        rounds=1,
        operations=("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"),
        cells=3,
        channels=4,
        reductions=(1, 2),
        batch_size=32,
        score_batch_size=32,
        separable_repeats=1,
    )


# Keys that do not decide a search's result, bit by bit: another value continues the same run.
_INDIFFERENT = (
    "mode",
    "dataset.data_dir",
    "runtime.steps_per_call",
    "runtime.keep_checkpoints",
    "runtime.compilation_cache",
)


def flatten(config: config_dict.ConfigDict) -> dict[str, Any]:
    """Return dotted key -> JSON value (tuples as lists)."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, config_dict.ConfigDict):
                visit(f"{name}.", value)
            else:
                flat[name] = list(value) if isinstance(value, tuple) else value

    visit("", config)
    return flat


def deciding_keys(config: config_dict.ConfigDict) -> dict[str, Any]:
    """Return the flat keys that decide the result of a search."""
    return {key: value for key, value in flatten(config).items() if key not in _INDIFFERENT}


def config_hash(config: config_dict.ConfigDict) -> str:
    """Return 16 hexadecimal digits that name what decides the result."""
    text = json.dumps(deciding_keys(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What a key must be: a test of the value, and the same in words."""

    test: Callable[[Any], bool]
    words: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def _integer(low: int, high: int = 2**31 - 1) -> _Rule:
    words = f"an integer, at least {low}" + (f" and at most {high}" if high < 2**31 - 1 else "")
    return _Rule(lambda v: _is_integer(v) and low <= v <= high, words)


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> _Rule:
    def test(value: Any) -> bool:
        return _is_number(value) and (low < value if open_low else low <= value) and value <= high

    words = f"a finite number {'above' if open_low else 'of at least'} {low:g}"
    return _Rule(test, words + ("" if high == math.inf else f" and at most {high:g}"))


def _one_of(values: Any) -> _Rule:
    return _Rule(lambda v: v in tuple(values), f"one of {', '.join(map(str, values))}")


def _boolean() -> _Rule:
    return _Rule(lambda v: isinstance(v, bool), "True or False")


def _is_operations(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) >= 2
        and all(isinstance(name, str) and name in OPERATIONS for name in value)
        and len(set(value)) == len(value)
    )


_RULES = {
    "mode": _one_of(MODES),
    "seed": _Rule(lambda v: _is_integer(v) and 0 <= v < 2**31, "an integer from 0 to 2**31 - 1"),
    "dataset.name": _Rule(
        lambda v: isinstance(v, str) and re.fullmatch(r"\w+(/[\w.-]+)?", v) is not None,
        "the name of a tfds set, such as cifar10 or name/config",
    ),
    "dataset.data_dir": _Rule(lambda v: isinstance(v, str), "a string"),
    "dataset.image_size": _integer(0, 1024),
    "dataset.examples": _integer(0),
    "dataset.validation_fraction": _Rule(lambda v: _is_number(v) and 0 < v < 1, "between 0 and 1"),
    "dataset.crop_padding": _integer(0),
    "dataset.flip": _boolean(),
    "search.strategy": _one_of(STRATEGIES),
    # Beyond, float32 alpha could not be checked against eq. 4.16 with any sense.
    "search.beta_p": _number(-100, 100),
    "search.rounds": _integer(1),
    "search.operations": _Rule(
        _is_operations, f"a tuple of at least 2 different names of {', '.join(OPERATIONS)}"
    ),
    "search.cells": _integer(1, 100),
    "search.channels": _integer(1, 4096),
    "search.reductions": _Rule(
        lambda v: isinstance(v, tuple) and all(map(_is_integer, v)) and list(v) == sorted(set(v)),
        "a tuple of increasing cell positions",
    ),
    "search.separable_repeats": _one_of((1, 2)),
    "search.binary_preprocess": _boolean(),
    "search.batch_size": _integer(1),
    "search.score_batch_size": _integer(1),
    "search.learning_rate": _number(0, 1000, open_low=True),
    "search.momentum": _Rule(lambda v: _is_number(v) and 0 <= v < 1, "in [0, 1)"),
    "search.weight_decay": _number(0),
    "search.gradient_clip": _number(0, open_low=True),
    "search.child_optimizer": _one_of(OPTIMIZERS),
    "search.child_learning_rate": _number(0, 1000, open_low=True),
    "search.edge_policy": _one_of(EDGE_POLICIES),
    "binarizer.activation_estimator": _one_of(ESTIMATORS),
    "binarizer.weight_estimator": _one_of(ESTIMATORS),
    "binarizer.weight_scale": _one_of(WEIGHT_SCALES),
    "binarizer.pad_value": _one_of(PAD_VALUES),
    "runtime.steps_per_call": _integer(1),
    "runtime.keep_checkpoints": _integer(1),
    "runtime.formulation": _one_of(FORMULATIONS),
    "runtime.optimization_level": _one_of((0, 1, 2, 3)),
    "runtime.compilation_cache": _boolean(),
}


def validate(config: config_dict.ConfigDict, num_devices: int) -> None:
    """Check every key against its rule, and the keys against each other.

    Args:
        config: to be checked.
        num_devices: over all processes; they share each batch.

    Raises:
        UserError: the first bad key, its value and what would be right.
    """
    for key in flatten(config):
        if key not in _RULES:
            raise UserError(f"config.{key} is not a key; see cpnas_jax/config.py")
    for key, rule in _RULES.items():
        value = config
        for part in key.split("."):
            if part not in value:
                raise UserError(f"config.{key} is missing; it must be {rule.words}")
            value = value[part]
        if not rule.test(value):
            raise UserError(f"config.{key} is {value!r}; it must be {rule.words}")
    search = config.search
    outside = [position for position in search.reductions if not 0 <= position < search.cells]
    if outside:
        raise UserError(
            f"config.search.reductions is {tuple(search.reductions)!r}; with "
            f"config.search.cells={search.cells} positions are 0 to {search.cells - 1}"
        )
    for key in ("batch_size", "score_batch_size"):
        if search[key] % num_devices:
            raise UserError(
                f"config.search.{key} is {search[key]}; it must be a multiple of the "
                f"{num_devices} devices that share it"
            )


def check_flags(argv: Sequence[str]) -> None:
    """Look at --config and its overrides before they are parsed, to name what is wrong with them.

    Raises:
        UserError: a config file that does not exist, or an override of an unknown key.
    """
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if name == "config":
            path = (value if equals else following).partition(":")[0]
            if not path.startswith("-") and not os.path.isfile(path):
                raise UserError(f"--config={path} is no file; the configs are in configs/")
        elif name.startswith("config."):
            key = name.removeprefix("config.")
            if key not in RULED_KEYS:
                near = difflib.get_close_matches(key, RULED_KEYS, n=1)
                hint = f"did you mean config.{near[0]}?" if near else "see cpnas_jax/config.py"
                raise UserError(f"config.{key} is not a key; {hint}")


def explain(message: str) -> str:
    """Add to an error of a flag's value what the value must be."""
    # ml_collections puts the traceback of a config file's own error into the message.
    if "Traceback (most recent call last)" in message:
        # The last unindented "Type: text"; the text may go over several lines.
        last = re.split(r"\n(?=[\w.]+: )", message)[-1]
        message = "the config file raises " + " ".join(last.split())
    found = re.search(r"--config\.([\w.]+)", message)
    if not found or found[1] not in _RULES:
        return message
    return f"{message}; config.{found[1]} must be {_RULES[found[1]].words}"


RULED_KEYS = frozenset(_RULES)
"""Every key has a rule; a test compares this with `base_config`."""
