"""The whole way in one command: search, train the child, train the parent, evaluate, summarise."""

import contextlib
import os

from ml_collections import config_dict

from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.feed import Feed
from cpnas_jax.feeds import open_feed
from cpnas_jax.models.summary import totals_text
from cpnas_jax.modes import evaluate_network, evaluated, write_summary
from cpnas_jax.report.page import refresh
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.workdir import Workdir
from cpnas_jax.search import search_in
from cpnas_jax.train import train_network
from cpnas_jax.trained import directory_name, finished, refuse_other


def pipeline(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Run every phase that is not done yet; what `results.json` holds is the whole result.

    Args:
        config: validated; its `network.precision` is not read, both are trained.
        workdir: where all files go; a started one is resumed.
        reporter: prints what happens.

    Raises:
        UserError: see the errors of the phases.
    """
    with Workdir(workdir) as directory:
        refuse_other(config, directory)
        genotype = search_in(config, directory, reporter)
        refresh(directory.path, reporter)
        _train_both(config, directory, reporter, genotype)
        costs = write_summary(config, directory, genotype, binary=True)
        reporter.say(totals_text(costs))
        summary = costs.to_dict()
        results = directory.read_json("results.json") or {}
        results["summary"] = {key: value for key, value in summary.items() if key != "layers"}
        directory.write_json("results.json", results)
        child, parent = (
            (directory.read_json(f"{directory_name(binary)}/evaluation.json") or {})["top1"]
            for binary in (True, False)
        )
        # The results of a search whose genotype was brought here are elsewhere.
        seconds = {
            name: results[name]["seconds"]
            for name in ("search", "train", "parent")
            if name in results
        }
        reporter.say(
            f"Accuracy on {config.evaluate.split}, {config.evaluate.checkpoint} checkpoint: 1-bit "
            f"child {child:.4f}, float parent {parent:.4f}; the child is "
            f"{summary['compression']:.1f} times smaller. Seconds without compiling: "
            + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
            + f". All of it is in {directory.path / 'results.json'}."
        )


def _train_both(
    config: config_dict.ConfigDict, directory: Workdir, reporter: Reporter, genotype: Genotype
) -> None:
    """Train and evaluate child and parent, as far as that is not done; data is opened once."""
    feed: Feed | None = None
    with contextlib.ExitStack() as stack:
        for binary in (True, False):
            done = finished(config, directory, reporter, genotype, binary=binary)
            if done and evaluated(config, directory, binary=binary):
                continue
            if feed is None:
                feed = stack.enter_context(contextlib.closing(open_feed(config)))
            if not done:
                train_network(config, directory, reporter, genotype, feed, binary=binary)
            evaluate_network(config, directory, reporter, genotype, feed, binary=binary)
            refresh(directory.path, reporter)
