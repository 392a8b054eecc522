"""What a workdir holds of a training, and whether it is the training that a config asks for."""

import dataclasses
import os
from typing import Any

from ml_collections import config_dict

from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.named import NAMES, named_genotype
from cpnas_jax.architecture.notation import load_genotype
from cpnas_jax.config_keys import deciding_keys, keys_hash
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.checkpoints import holds_checkpoints
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.paths import user_path
from cpnas_jax.runtime.workdir import Workdir


def directory_name(binary: bool) -> str:
    """Return where in a workdir a training keeps its files: child and parent can share one."""
    return "train" if binary else "parent"


def resolve_genotype(config: config_dict.ConfigDict, workdir: str | os.PathLike[str]) -> Genotype:
    """Return the genotype that a config names, or where it names none, the workdir's own.

    Raises:
        UserError: `config.genotype` is no name and no readable file, or is empty and the workdir
            holds none.
    """
    return processes.from_first(lambda: _resolved(config, workdir))


def _resolved(config: config_dict.ConfigDict, workdir: str | os.PathLike[str]) -> Genotype:
    name = config.genotype
    if name in NAMES:
        return named_genotype(name)
    if name and not user_path("config.genotype", name).exists():
        raise UserError(
            f"config.genotype is {name!r}, which is no file; give a genotype file or one of "
            f"{', '.join(NAMES)}"
        )
    own = user_path("--workdir", workdir) / "genotype.json"
    if not name and not own.exists():
        raise UserError(
            "config.genotype is empty; give a genotype file, the --workdir of a search (there is "
            f"no {own}), or one of {', '.join(NAMES)}"
        )
    return load_genotype(name or own)


def begun(directory: Workdir) -> bool:
    """Tell whether anything was trained in a workdir, child or parent."""
    return any(
        holds_checkpoints(directory.path / directory_name(binary) / "checkpoints")
        for binary in (True, False)
    )


def refuse_other(config: config_dict.ConfigDict, directory: Workdir, *ignored: str) -> None:
    """Compare a config with that of the run in the workdir.

    Before anything is trained there, only what a training shares with the search is compared.

    Args:
        config: validated.
        directory: the workdir.
        ignored: keys that are not compared.

    Raises:
        UserError: the workdir holds a run of another config; the differing keys are named.
    """
    keys = deciding_keys(config, "train")
    if not begun(directory):
        searched = deciding_keys(config)
        keys = {key: value for key, value in keys.items() if key in searched}
    directory.refuse_other({k: v for k, v in keys.items() if k not in ignored})


def _cells(genotype: Genotype) -> dict[str, Any]:
    return {
        cell: [list(dataclasses.astuple(edge)) for edge in edges]
        for cell, edges in genotype.cells()
    }


def training_hash(config: config_dict.ConfigDict, genotype: Genotype, *, binary: bool) -> str:
    """Return the digits that name what decides a training, the cells among it."""
    precision = "binary" if binary else "float"
    keys = {**deciding_keys(config, "train"), "network.precision": precision}
    # What is evaluated on the way does not decide the weights: they answer for any split.
    del keys["evaluate.split"], keys["evaluate.examples"]
    return keys_hash({**keys, "genotype": _cells(genotype)})


def check_cells(directory: Workdir, name: str, genotype: Genotype) -> None:
    """Compare the cells with those that were trained in this workdir before, if any were.

    A training that ended before its first checkpoint leaves the workdir to other cells.

    Raises:
        UserError: they are others.
    """

    def check() -> None:
        path = directory.path / name / "genotype.json"
        trained = holds_checkpoints(directory.path / name / "checkpoints")
        if trained and path.exists() and _cells(Genotype.load(path)) != _cells(genotype):
            raise UserError(
                f"config.genotype has other cells than were trained in {directory.path / name}, "
                f"which are in {path}; give that file, or another --workdir"
            )

    processes.first_alone(check)


def finished(
    config: config_dict.ConfigDict,
    directory: Workdir,
    reporter: Reporter,
    genotype: Genotype,
    *,
    binary: bool,
) -> bool:
    """Tell whether this training is done already, and say so.

    Raises:
        UserError: the workdir holds the results of another one.
    """
    name = directory_name(binary)
    check_cells(directory, name, genotype)
    results = (directory.read_json("results.json") or {}).get(name)
    if results is None:
        return False
    if not isinstance(results, dict):
        raise UserError(
            f"{directory.path / 'results.json'} is damaged ({name!r} is no object); restore it or "
            "use another --workdir"
        )
    if results.get("config_hash") != training_hash(config, genotype, binary=binary):
        raise UserError(
            f"{directory.path / 'results.json'} has the results of another config's training; "
            "use another --workdir"
        )
    reporter.say(
        f"The training in {directory.path / name} is finished (accuracy on "
        f"{results['split']} {results['test']['top1']:.4f}); nothing is run again."
    )
    return True
