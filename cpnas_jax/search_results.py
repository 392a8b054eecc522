"""The end of a search: its log checked, the genotype derived from it, the results written."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from ml_collections import config_dict

from cpnas_jax import figures, search_figures
from cpnas_jax.architecture.collapse import limit_skips
from cpnas_jax.architecture.dot import to_dot
from cpnas_jax.architecture.edge_policy import Derivation, derive
from cpnas_jax.architecture.events import EPOCHS
from cpnas_jax.architecture.genotype import Genotype, indicator_pairs
from cpnas_jax.architecture.notation import to_darts
from cpnas_jax.architecture.replay import ReplayResult
from cpnas_jax.config_keys import config_hash
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.atomic import write_atomically
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.workdir import History, Workdir


def finish(
    config: config_dict.ConfigDict,
    directory: Workdir,
    reporter: Reporter,
    history: History,
    checked: ReplayResult,
    *,
    dataset: str,
    skipped: int = 0,
    flops: float | None = None,
) -> Genotype:
    """Derive the genotype from the checked log, and write the results.

    Args:
        config: of the search.
        directory: where the files go.
        reporter: prints what happens.
        history: of the whole search.
        checked: what the log says.
        dataset: name of what was searched on.
        skipped: training examples that cannot be decoded.
        flops: of training and scoring, or None where they are not counted.
    """
    lines = history.lines
    assert checked.operations is not None
    assert checked.worth is not None
    assert checked.compared is not None
    operations, compared, policy = (
        checked.operations,
        checked.compared,
        config.search.edge_policy,
    )
    changes: tuple[str, ...] = ()
    if config.search.max_skips >= 0:
        limited = limit_skips(operations, checked.worth, compared, policy, config.search.max_skips)
        operations, compared, changes = limited.operations, limited.compared, limited.changes
        for change in changes:
            reporter.say(change)
    derivation = derive(
        operations,
        checked.worth,
        compared,
        policy,
        provenance={
            "config_hash": config_hash(config),
            "seed": config.seed,
            "dataset": dataset,
            "strategy": config.search.strategy,
        },
    )
    if checked.indicator is not None:
        pairs = indicator_pairs(checked.indicator, checked.compared)
        genotype = dataclasses.replace(derivation.genotype, indicator=pairs)
        derivation = dataclasses.replace(derivation, genotype=genotype)
    for restored in derivation.restored:
        reporter.say(str(restored))
    genotype, path = derivation.genotype, directory.path
    processes.require_agreement("the end of the search", genotype=genotype.to_json())
    drawings = processes.from_first(lambda: _draw(genotype, lines, path))
    reporter.say(figures.cell_tables(genotype))
    _write_results(config, directory, derivation, changes, lines, skipped, flops)
    processes.first_alone(lambda: genotype.save(path / "genotype.json"))
    reporter.say(f"Wrote {path / 'genotype.json'} and {', '.join(p.name for p in drawings)}.")
    return genotype


def _draw(genotype: Genotype, lines: list[dict[str, Any]], path: Any) -> list[pathlib.Path]:
    drawings = figures.draw_cells(genotype, path)
    for name, text in (("cells.dot", to_dot(genotype)), ("genotype.darts", to_darts(genotype))):
        write_atomically(path / name, f"{text.rstrip()}\n".encode())
        drawings.append(path / name)
    if any(line["event"] in EPOCHS for line in lines):
        drawings += search_figures.draw_accuracies(lines, path)
    return drawings


def _write_results(
    config: config_dict.ConfigDict,
    directory: Workdir,
    derivation: Derivation,
    changes: tuple[str, ...],
    lines: list[dict[str, Any]],
    skipped: int,
    flops: float | None,
) -> None:
    samples = [line for line in lines if line["event"] in EPOCHS]
    # Sums of losses are rounded by the length of a call, which decides nothing.
    passing = ("seconds", "losses", "objective")
    timeless = [{k: v for k, v in line.items() if k not in passing} for line in lines]
    results = directory.read_json("results.json") or {}
    results["search"] = {
        "strategy": config.search.strategy,
        "sampled_epochs": len(samples),
        # Without starting and compiling.
        "seconds": sum(line.get("seconds", 0.0) for line in lines),
        # Architectures that were scored without being trained.
        "scored": sum(len(line["child_accuracy"]) for line in lines if line["event"] == "scores"),
        "flops": flops,
        "last_child_accuracy": samples[-1]["child_accuracy"] if samples else None,
        "last_parent_accuracy": samples[-1]["parent_accuracy"] if samples else None,
        "operation_counts": derivation.genotype.operation_counts(),
        # Edges that are not as the search left them, such as those of a dead node.
        "restored": [str(restored) for restored in derivation.restored],
        # Skip connections over a limit.
        "limited": list(changes),
        "undecodable": {"train": skipped},
        # Two runs took the same way exactly if these agree; durations are left out.
        "history_sha256": hashlib.sha256(json.dumps(timeless).encode()).hexdigest(),
        "config_hash": config_hash(config),
    }
    directory.write_json("results.json", results)
