"""Strategies side by side: searches over seeds, their cells trained alike, one table.

Every search and training is a run with a workdir of its own, which the modes `search` and `train`
could resume just as well; what is finished is not run again, and more strategies, seeds or values
of beta_P can be asked for later.
"""

import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

from ml_collections import config_dict

from cpnas_jax import figures
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.comparison import KINDS, Outcome, summary, table
from cpnas_jax.comparison_figures import draw_beta_curve, draw_comparison
from cpnas_jax.config import validate
from cpnas_jax.feed import Feed
from cpnas_jax.feeds import open_feed
from cpnas_jax.modes import evaluate_network, evaluated, write_summary
from cpnas_jax.runtime import environment, processes
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.workdir import Workdir
from cpnas_jax.search import search_in
from cpnas_jax.train import train_network
from cpnas_jax.trained import finished, refuse_other


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: also of its directory.
        keys: of `config.search`, that make it.
    """

    name: str
    keys: dict[str, Any]

    @property
    def directory(self) -> str:
        """Return the name of its directory."""
        return self.name.replace(", ", "-").replace(" ", "")


def beta_variants(config: config_dict.ConfigDict) -> dict[str, float]:
    """Return name -> beta_P of the variants of `cp`; the one of `search.beta_p` is just `cp`."""
    default = config.search.beta_p
    return {
        "cp" if beta_p == default else f"cp, beta_P {beta_p:g}": float(beta_p)
        for beta_p in config.compare.beta_p or (default,)
    }


def variants(config: config_dict.ConfigDict) -> list[Variant]:
    """Return what a config compares: its strategies, `cp` once for each beta_P."""
    found = []
    for strategy in config.compare.strategies:
        if strategy == "cp":
            for name, beta_p in beta_variants(config).items():
                found.append(Variant(name, {"strategy": strategy, "beta_p": beta_p}))
        else:
            found.append(Variant(strategy, {"strategy": strategy}))
    return found


def run_config(config: config_dict.ConfigDict, variant: Variant, seed: int) -> Any:
    """Return the config of one search and training."""
    own = copy.deepcopy(config).unlock()
    own.seed, own.genotype = seed, ""
    own.search.update(variant.keys)
    return own.lock()


def compare(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Run what is not finished yet, then write table, figures and JSON.

    Args:
        config: validated.
        workdir: where all files go; each run has `<variant>/seed<n>` in it.
        reporter: prints what happens.

    Raises:
        UserError: see the errors of the phases.
    """
    runs = {
        seed: [(variant, run_config(config, variant, seed)) for variant in variants(config)]
        for seed in config.compare.seeds
    }
    # A mistake that only the last run would find, after many hours.
    for own in (own for group in runs.values() for _, own in group):
        processes.first_alone(functools.partial(validate, own, environment.device_count()))
    asked = [(variant.name, seed) for seed, group in runs.items() for variant, _ in group]
    with Workdir(workdir) as directory:
        outcomes = _known(directory, asked)
        done = 0
        for seed, group in runs.items():
            with contextlib.ExitStack() as stack:
                feed_of = _once_opened(stack)
                for variant, own in group:
                    done += 1
                    reporter.say(f"\n{variant.name}, seed {seed} (run {done} of {len(asked)})")
                    with Workdir(directory.path / variant.directory / f"seed{seed}") as place:
                        found = _run(own, place, reporter, variant.name, feed_of)
                    # What the next run compiles is another network.
                    environment.forget_programs()
                    outcomes[variant.name, seed] = found
                    known = [outcomes[key] for key in asked if key in outcomes]
                    _write(directory, config, known, whole=done == len(asked))
        reporter.say(f"\n{table(known)}\n")
        reporter.say(f"Wrote compare.json, compare.md and compare.svg to {directory.path}.")


def _known(directory: Workdir, asked: list[tuple[str, int]]) -> dict[tuple[str, int], Outcome]:
    """Return what is asked for and was finished before, so that a longer table never shrinks.

    Raises:
        UserError: `compare.json` is damaged.
    """
    stored = directory.read_json("compare.json") or {}
    try:
        outcomes = [Outcome(**outcome) for outcome in stored.get("outcomes", [])]
    except TypeError as error:
        raise UserError(
            f"{directory.path / 'compare.json'} is damaged or of another version ({error}); "
            "delete it, the runs themselves are kept"
        ) from error
    found = {(outcome.variant, outcome.seed): outcome for outcome in outcomes}
    return {key: outcome for key, outcome in found.items() if key in asked}


def _once_opened(stack: contextlib.ExitStack) -> Callable[[config_dict.ConfigDict], Feed]:
    """Return what opens the data of a seed at its first use; all its trainings share it."""
    opened: list[Feed] = []

    def feed_of(config: config_dict.ConfigDict) -> Feed:
        if not opened:
            opened.append(stack.enter_context(contextlib.closing(open_feed(config))))
        return opened[0]

    return feed_of


def _run(
    config: config_dict.ConfigDict, directory: Workdir, reporter: Reporter, name: str, feed_of: Any
) -> Outcome:
    """Search, train and evaluate the child, as far as that is not done."""
    refuse_other(config, directory)
    genotype = search_in(config, directory, reporter)
    done = finished(config, directory, reporter, genotype, binary=True)
    if not (done and evaluated(config, directory, binary=True)):
        feed = feed_of(config)
        if not done:
            train_network(config, directory, reporter, genotype, feed, binary=True)
        evaluate_network(config, directory, reporter, genotype, feed, binary=True)
    costs = write_summary(config, directory, genotype, binary=True).to_dict()
    results = directory.read_json("results.json") or {}
    evaluation = directory.read_json("train/evaluation.json") or {}
    if "search" not in results:
        raise UserError(
            f"{directory.path / 'results.json'} says nothing of the search, whose cost is "
            f"compared; restore it, or delete {directory.path} to search again"
        )
    return Outcome(
        variant=name,
        seed=config.seed,
        accuracy=evaluation["top1"],
        seconds=results["search"]["seconds"],
        epochs=results["search"]["sampled_epochs"],
        flops=results["search"]["flops"],
        kinds=kind_shares(genotype),
        parameters=costs["parameters"]["total"],
        ops=costs["ops"],
        train_seconds=results["train"]["seconds"],
    )


def kind_shares(genotype: Genotype) -> dict[str, float]:
    """Return the share of each kind of operation in the edges that both cells keep."""
    kinds = [figures.kind(edge.operation) for _, edges in genotype.cells() for edge in edges]
    return {kind: kinds.count(kind) / len(kinds) for kind in KINDS}


def _write(
    directory: Workdir, config: config_dict.ConfigDict, outcomes: list[Outcome], *, whole: bool
) -> None:
    """Write what is known so far; a comparison that is stopped leaves its first runs' table."""
    directory.write_json("compare.json", {"finished": whole, **summary(outcomes)})
    directory.write("compare.md", (table(outcomes) + "\n").encode())
    betas = beta_variants(config)
    processes.first_alone(lambda: draw_comparison(outcomes, directory.path))
    if len(betas) > 1:
        processes.first_alone(lambda: draw_beta_curve(outcomes, betas, directory.path))
