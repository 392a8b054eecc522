"""Which config keys decide a result, and the digest that names them."""

import hashlib
import json
from typing import Any

from ml_collections import config_dict

# What the other phase alone reads.
_OTHERS = {
    "search": (
        *("network.", "train.", "evaluate.", "dataset.cutout", "dataset.color_jitter"),
        *("dataset.stream", "dataset.crop_area", "dataset.central_crop", "compare."),
    ),
    "train": ("search.", "compare."),
}
# What some strategies alone read.
_GRADIENT = ("epochs", "alpha_learning_rate", "alpha_weight_decay")
_PARTS: dict[str, tuple[str, ...]] = {
    "cp": ("beta_p", "rounds"),
    "child": ("rounds",),
    "random_search": ("candidates", "rounds"),
    "random": (),
    "cp_plus": (
        *("rounds", "plus_beta_p", "measure", "max_scored", "plus_score_examples"),
        *("reliability", "certainty", "carry", "plus_training", "plus_paths"),
    ),
    "darts": (*_GRADIENT, "gradient_model", "second_order"),
    "pc_darts": (
        *(*_GRADIENT, "alpha_warmup", "gradient_model", "second_order"),
        *("partial_channels", "edge_normalisation"),
    ),
    "cp_gradient": (
        *(*_GRADIENT, "alpha_warmup", "child_weight", "parent_weight", "gate_temperature"),
    ),
}
# Keys that do not decide a result, bit by bit: another value continues the same run.
_INDIFFERENT = (
    "mode",
    # The cells decide, not the place of their file; see `trained.training_hash`.
    "genotype",
    # Child and parent of one run have directories of their own.
    "network.precision",
    "dataset.data_dir",
    "dataset.workers",
    # What is skipped depends on the data alone; the limit says whether the run goes on.
    "dataset.max_undecodable",
    "runtime.steps_per_call",
    "runtime.keep_checkpoints",
    "runtime.checkpoint_every",
    "runtime.stall_seconds",
    "search.collapse_share",
    "evaluate.checkpoint",
    "evaluate.batch_size",
    *("export.directory", "export.iree"),
    *("predict.images", "predict.top", "predict.format", "predict.engine", "predict.batch_size"),
    "runtime.tensorboard",
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


def deciding_keys(config: config_dict.ConfigDict, phase: str = "search") -> dict[str, Any]:
    """Return the flat keys that decide the result of a phase, `search` or `train`."""
    own = _PARTS.get(config.search.strategy, ())
    unread = {f"search.{name}" for names in _PARTS.values() for name in names if name not in own}
    return {
        key: value
        for key, value in flatten(config).items()
        if key not in _INDIFFERENT and key not in unread and not key.startswith(_OTHERS[phase])
    }


def config_hash(config: config_dict.ConfigDict) -> str:
    """Return 16 hexadecimal digits that name what decides the result of a search."""
    return keys_hash(deciding_keys(config))


def keys_hash(keys: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that name what decides a result."""
    text = json.dumps(keys, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
