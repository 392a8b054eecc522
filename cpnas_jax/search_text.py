"""What a search says of itself before it begins."""

from ml_collections import config_dict

from cpnas_jax.data.datasets import Split
from cpnas_jax.models.space import CHILD, PARENT
from cpnas_jax.runtime.environment import devices_text
from cpnas_jax.search_run import SearchRun

_MODELS = {CHILD: "1-bit child", PARENT: "float parent"}


def plan_text(
    config: config_dict.ConfigDict, train: Split, validation: Split, run: SearchRun
) -> str:
    """Say what will happen, in a few lines."""
    search, networks = config.search, run.networks
    together = networks.paths
    groups = ""
    if together > 1:
        groups = (
            f"Up to {together} architectures of a round are trained at the same time, each by its "
            "own group of devices: "
        )
    elif search.parallel == "path":
        groups = (
            "One architecture at a time, as by search.parallel=data: this number of devices makes "
            f"no several groups of at most {len(search.operations)}. "
        )
    size = "x".join(map(str, train.images.shape[1:]))
    return "\n".join(
        [
            f"Searching by {search.strategy} on {train.name}: {len(train.labels)} training and "
            f"{len(validation.labels)} validation images of {size}, "
            f"{train.num_classes} classes; the test split stays closed.",
            f"Supernet: {search.cells} cells (reductions at "
            f"{', '.join(map(str, search.reductions)) or 'none'}), C {search.channels}, "
            f"{len(search.operations)} operations on each of 28 edges; "
            f"{' and '.join(_MODELS[model] for model in run.models)}.",
            f"{run.total} {run.plan()}, each of {networks.steps_per_epoch} steps"
            + (" of both models." if len(run.models) > 1 else "."),
            groups + devices_text(search.batch_size * together),
        ]
    )
