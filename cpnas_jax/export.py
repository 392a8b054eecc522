"""The mode `export`: a trained network as a directory that runs without this package's training.

What is written is compared with what was trained, on the whole split, before the directory is put
in its place.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.data.augment import normalise
from cpnas_jax.deploy import artefact, iree_engine
from cpnas_jax.deploy.artefact import Program, Shipped
from cpnas_jax.deploy.iree_engine import IreeError
from cpnas_jax.deploy.layout import ArtefactError
from cpnas_jax.feed import Feed
from cpnas_jax.feeds import open_feed
from cpnas_jax.folding import fold
from cpnas_jax.models.network import Network, NetworkSettings, Outputs
from cpnas_jax.modes import restored
from cpnas_jax.network_config import network_settings
from cpnas_jax.runtime import processes, stall
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.paths import user_path
from cpnas_jax.runtime.workdir import Workdir
from cpnas_jax.trained import directory_name, refuse_other, resolve_genotype

CHECKED = 16
"""Images that `selfcheck.npz` holds."""

CLOSE, MARGIN = artefact.SAME, 1e-3
"""Logits that are the same; a lead that the first class must have for its answer to be compared."""

LEAST_CLOSE, LARGEST_LOSS = 0.999, 0.0005
"""Share of images whose logits are the same, and the accuracy that may be lost or won."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How the shipped network compares with the trained one on a split.

    Attributes:
        images: how many were compared.
        close: share of images whose logits differ by at most `CLOSE`.
        largest: difference of any logit.
        turned: images with another answer, where the trained network's lead is above `MARGIN`.
        trained: accuracy of the trained network.
        shipped: accuracy of the shipped one.
    """

    images: int
    close: float
    largest: float
    turned: int
    trained: float
    shipped: float

    def problem(self) -> str | None:
        """Say what is not as it must be."""
        if self.turned:
            return f"{self.turned} of {self.images} images are answered otherwise"
        if self.close < LEAST_CLOSE:
            return f"the logits of only {self.close:.2%} of the images agree within {CLOSE:g}"
        if abs(self.trained - self.shipped) > LARGEST_LOSS:
            return f"the accuracy is {self.shipped:.4f}, that of training {self.trained:.4f}"
        return None


def export_directory(config: config_dict.ConfigDict, workdir: str | os.PathLike[str]) -> Any:
    """Return where an exported network goes, and is looked for: `config.export.directory`.

    Raises:
        UserError: it is not on this machine.
    """
    given = config.export.directory
    # What reads the directory later has no storage but this machine's.
    if "://" in (given or os.fspath(workdir)):
        raise UserError(
            f"config.export.directory is {given!r}, --workdir {os.fspath(workdir)!r}; an exported "
            "network is in a local directory: give one, and copy it"
        )
    if given:
        return user_path("config.export.directory", given)
    return user_path("--workdir", workdir) / "export"


def export_mode(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Write the trained network of a workdir to `config.export.directory`.

    Args:
        config: validated; `network.precision` says whether child or parent.
        workdir: of the training.
        reporter: prints what happens.

    Raises:
        UserError: nothing is trained there, the directory exists or cannot be written, or what was
            written answers otherwise than what was trained.
    """
    genotype = resolve_genotype(config, workdir)
    target = export_directory(config, workdir)
    _require_iree(config)
    processes.first_alone(lambda: _refuse_present(target))
    with Workdir(workdir) as directory:
        refuse_other(config, directory, "evaluate.split", "evaluate.examples")
        binary = config.network.precision == "binary"
        # Every process has its part in opening the data and in restoring.
        with contextlib.closing(open_feed(config)) as feed:
            trainer, position = restored(config, directory, genotype, feed, binary=binary)
            if trainer.real_weights(position["epoch"] - (position["step"] == 0)):
                raise UserError(
                    "the checkpoint belongs to the first part of two-step training "
                    f"(config.train.real_weights_epochs is {config.train.real_weights_epochs}), "
                    "its weights are real; train on"
                )
            variables = trainer.host_variables()
            processes.first_alone(
                lambda: _export(
                    config, directory, reporter, genotype, feed, variables, position, target
                )
            )


def _require_iree(config: config_dict.ConfigDict) -> None:
    """Refuse what would fail for a missing package when all else is done."""
    parts = ["compiler"] * bool(config.export.iree)
    parts += ["runtime"] * (iree_engine.HOST in config.export.iree)
    for part in parts:
        try:
            iree_engine.require(part)
        except IreeError as error:
            raise UserError(f"config.export.iree is {config.export.iree!r}, and {error}") from error


def _refuse_present(target: Any) -> None:
    if target.exists():
        raise UserError(f"{target} exists; delete it, or give another --config.export.directory")


def _export(
    config: config_dict.ConfigDict,
    directory: Workdir,
    reporter: Reporter,
    genotype: Genotype,
    feed: Feed,
    variables: Any,
    position: dict[str, int],
    target: Any,
) -> None:
    binary = config.network.precision == "binary"
    settings = network_settings(config, genotype, feed.facts.num_classes, binary=binary)
    mean, std = feed.statistics()
    structure, tensors = fold(settings, variables, mean, std, feed.facts.image_shape)
    shipped = Shipped(
        structure,
        tensors,
        json.loads(genotype.to_json()),
        feed.facts.class_names,
        preprocessing(config, feed.facts.image_shape),
    )
    images, _ = next(feed.test_batches(CHECKED))
    found: list[Agreement] = []

    def check(network: Program) -> None:
        split, batches = config.evaluate.split, _batches(config, feed)
        reporter.say(f"Comparing it with the trained network on the split {split}")
        found.append(agreement(network, settings, variables, (mean, std), batches))
        problem = found[0].problem()
        if problem:
            raise ArtefactError(f"nothing was written to {target}: {problem}")

    reporter.say("Compiling the network for shipping")
    try:
        artefact.write(shipped, pathlib.Path(target), images, check, config.export.iree)
    except ArtefactError as error:
        raise UserError(str(error)) from error
    size = (pathlib.Path(target) / artefact.MODEL).stat().st_size
    (agreed,) = found
    # The auxiliary classifier is for training alone.
    params = {name: own for name, own in variables["params"].items() if name != "auxiliary"}
    as_float = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    weights = f"{config.evaluate.checkpoint} checkpoint, after epoch {position['epoch']}"
    weights += f" and {position['step']} steps" * (position["step"] > 0)
    reporter.say(
        f"Wrote {target} ({weights}): {artefact.MODEL} has {size:,} bytes, the parameters in "
        f"float32 would have {as_float:,}. On {agreed.images} images of {config.evaluate.split} "
        f"{agreed.close:.2%} have the trained network's logits within {CLOSE:g}, the largest "
        f"difference is {agreed.largest:.1e}; accuracy {agreed.shipped:.4f}, of the trained "
        f"network {agreed.trained:.4f}."
    )
    value = {
        **{"bytes": size, "split": config.evaluate.split},
        **{"checkpoint": config.evaluate.checkpoint, **position},
        **dataclasses.asdict(agreed),
    }
    directory.write_json(f"{directory_name(binary)}/export.json", value)


def preprocessing(
    config: config_dict.ConfigDict, image: tuple[int, int, int]
) -> dict[str, str | int | float]:
    """Say how image files become what the network takes: as those of its evaluation did."""
    height, width, channels = image
    common: dict[str, str | int | float] = {"height": height, "width": width, "channels": channels}
    if config.dataset.stream:
        return {"form": "central part", "share": config.dataset.central_crop, **common}
    return {"form": "central square", **common}


def _batches(config: config_dict.ConfigDict, feed: Feed) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return feed.test_batches(config.evaluate.batch_size)


def agreement(
    network: Program,
    settings: NetworkSettings,
    variables: Any,
    statistics: tuple[np.ndarray, np.ndarray],
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
) -> Agreement:
    """Compare the shipped network with the trained one.

    Args:
        network: what is shipped, as it was read back.
        settings: of the trained network.
        variables: {"params", "batch_stats"}.
        statistics: mean and deviation of the channels.
        batches: images uint8[n, H, W, C] and labels int32[n].
    """

    @jax.jit
    def trained(variables: Any, images: jax.Array) -> jax.Array:
        given = normalise(images, jnp.asarray(statistics[0]), jnp.asarray(statistics[1]))
        return cast(Outputs, Network(settings).apply(variables, given, train=False)).logits

    differences, turned, right = [], 0, np.zeros(2, int)
    size = done = 0
    for images, labels in batches:
        stall.at(f"comparing what is exported, image {done}")
        done += len(labels)
        # The last batch is filled up, so that nothing is compiled for it.
        size = max(size, len(labels))
        filled = np.resize(images, (size, *images.shape[1:]))
        expected, own = (
            np.asarray(function)[: len(labels)]
            for function in (trained(variables, jnp.asarray(filled)), network(filled))
        )
        differences.append(np.abs(expected - own).max(axis=1))
        best = np.sort(expected, axis=1)
        clear = best[:, -1] - best[:, -2] > MARGIN
        answers = [logits.argmax(axis=1) for logits in (expected, own)]
        turned += int((clear & (answers[0] != answers[1])).sum())
        right += [int((answer == labels).sum()) for answer in answers]
    largest = np.concatenate(differences)
    return Agreement(
        images=len(largest),
        close=float((largest <= CLOSE).mean()),
        largest=float(largest.max()),
        turned=turned,
        trained=float(right[0] / len(largest)),
        shipped=float(right[1] / len(largest)),
    )
