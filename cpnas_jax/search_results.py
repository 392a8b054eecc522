"""The end of a search: its log checked, the genotype derived from it, the results written."""

import hashlib
import json
from typing import Any

import numpy as np
from ml_collections import config_dict

from cpnas_jax import figures
from cpnas_jax.architecture.edge_policy import Derivation, derive
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.indicator import indicator
from cpnas_jax.architecture.replay import replay
from cpnas_jax.config import config_hash
from cpnas_jax.models.space import CELL_TYPES
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.workdir import History, Workdir


def finish(
    config: config_dict.ConfigDict,
    directory: Workdir,
    reporter: Reporter,
    history: History,
    survivors: np.ndarray,
    *,
    dataset: str,
) -> Genotype:
    """Check the whole log, derive the genotype from it, and write the results.

    Args:
        config: of the search.
        directory: where the files go.
        reporter: prints what happens.
        history: of the whole search.
        survivors: bool[2, 14, 8], what the search itself kept.
        dataset: name of what was searched on.
    """
    lines = history.lines
    checked = replay(
        lines,
        seed=config.seed,
        rounds=config.search.rounds,
        beta_p=config.search.beta_p,
        operations=tuple(config.search.operations),
        name=str(history.path),
    )
    assert checked.operations is not None
    assert checked.mean_z is not None
    assert checked.compared is not None
    assert (checked.survivors == survivors).all()
    derivation = derive(
        checked.operations,
        checked.mean_z,
        checked.compared,
        config.search.edge_policy,
        indicator=indicator(dict(zip(CELL_TYPES, checked.mean_z, strict=True)), checked.compared),
        provenance={
            "config_hash": config_hash(config),
            "seed": config.seed,
            "dataset": dataset,
        },
    )
    for restored in derivation.restored:
        reporter.say(str(restored))
    genotype, path = derivation.genotype, directory.path
    processes.require_agreement("the end of the search", genotype=genotype.to_json())
    drawings = processes.from_first(
        lambda: figures.draw_cells(genotype, path) + figures.draw_accuracies(lines, path)
    )
    reporter.say(figures.cell_tables(genotype))
    _write_results(config, directory, derivation, lines)
    processes.first_alone(lambda: genotype.save(path / "genotype.json"))
    reporter.say(f"Wrote {path / 'genotype.json'} and {', '.join(p.name for p in drawings)}.")
    return genotype


def _write_results(
    config: config_dict.ConfigDict,
    directory: Workdir,
    derivation: Derivation,
    lines: list[dict[str, Any]],
) -> None:
    samples = [line for line in lines if line["event"] == "sample"]
    timeless = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    results = directory.read_json("results.json") or {}
    results["search"] = {
        "sampled_epochs": len(samples),
        # Of the sampled epochs; starting and compiling the training program not included.
        "seconds": sum(line["seconds"] for line in samples),
        "last_child_accuracy": samples[-1]["child_accuracy"],
        "last_parent_accuracy": samples[-1]["parent_accuracy"],
        "operation_counts": derivation.genotype.operation_counts(),
        # Edges that are not as the search left them, such as those of a dead node.
        "restored": [str(restored) for restored in derivation.restored],
        # Two runs took the same way exactly if these agree; durations are left out.
        "history_sha256": hashlib.sha256(json.dumps(timeless).encode()).hexdigest(),
        "config_hash": config_hash(config),
    }
    directory.write_json("results.json", results)
