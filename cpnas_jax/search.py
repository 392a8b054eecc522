"""The search phase: Algorithm 9 of CP-NAS or another strategy, resumable at every epoch.

Reads the train split alone; the test split's file is never opened.
"""

import os

from ml_collections import config_dict

from cpnas_jax import figures
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.sampling import all_survivors
from cpnas_jax.bilevel_networks import BilevelNetworks
from cpnas_jax.bilevel_run import BilevelRun
from cpnas_jax.config_keys import config_hash, deciding_keys, flatten
from cpnas_jax.data.datasets import limit_examples, load_split, train_validation_parts
from cpnas_jax.data.undecodable import tell_skipped
from cpnas_jax.decision_text import decision_text
from cpnas_jax.runtime import environment, processes, stall
from cpnas_jax.runtime.checkpoints import Checkpoints, holds_checkpoints
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.workdir import History, Workdir
from cpnas_jax.sampled_run import SampledRun
from cpnas_jax.search_board import tell_cells
from cpnas_jax.search_networks import Networks
from cpnas_jax.search_results import finish
from cpnas_jax.search_run import SearchRun
from cpnas_jax.search_text import plan_text
from cpnas_jax.strategies import gradient_rule, has_gradient, replayed, sampled_strategy


def search(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> Genotype:
    """Run or resume a search; return its genotype.

    Args:
        config: validated.
        workdir: where all files go (README, "Files of a run"); one that holds a run of the same
            config is resumed, a finished one is not run again.
        reporter: prints what happens.

    Returns:
        The genotype, also written to `genotype.json`.

    Raises:
        UserError: see the errors of the data, the workdir and the checkpoints.
    """
    with Workdir(workdir) as directory:
        return search_in(config, directory, reporter)


def search_in(config: config_dict.ConfigDict, directory: Workdir, reporter: Reporter) -> Genotype:
    """Do what `search` does, in a workdir that is open already."""
    started = environment.process_start()
    _refuse_other(config, directory)
    genotype = _finished(directory, config)
    if genotype is not None:
        reporter.say(f"The search in {directory.path} is finished; nothing is run again.")
        reporter.say(figures.cell_tables(genotype))
        return genotype

    if config.search.strategy == "random":
        return _without_training(config, directory, reporter)
    dataset = config.dataset
    # The first process may have to prepare what the others read.
    with stall.waiting("the data to be read"):
        split = processes.first_before_others(
            lambda: load_split(
                dataset.name,
                "train",
                dataset.data_dir or None,
                dataset.image_size or None,
                dataset.max_undecodable,
            )
        )
    processes.require_agreement("reading the data", undecodable=split.undecodable)
    undecodable = split.undecodable
    tell_skipped(reporter, {"train": len(undecodable)})
    split = limit_examples(split, config.search.examples, config.seed, "search.examples")
    fraction = config.search.validation_fraction
    train, validation = train_validation_parts(split, fraction, config.seed)
    checkpoints = Checkpoints(
        directory.path / "search" / "checkpoints", config.runtime.keep_checkpoints
    )
    flops = None
    with checkpoints:
        shared = (directory, checkpoints, reporter, undecodable)
        run: SearchRun
        if has_gradient(config):
            rule = gradient_rule(config)
            bilevel = BilevelNetworks(config, train, validation, rule.epochs, started)
            run = BilevelRun(config, bilevel, *shared, rule)
        else:
            strategy = sampled_strategy(config)
            networks = Networks(
                config,
                train,
                validation,
                strategy.schedule,
                started,
                strategy.models,
                strategy.takes_turns,
            )
            run = SampledRun(config, networks, *shared, strategy)
        reporter.say(plan_text(config, train, validation, run))
        run.resume_or_start()
        run.go_on()
        if config.mode == "compare":
            reporter.log("counting the operations of the programs")
            flops = run.networks.flops(run.epoch, run.num_scored())
    checked = replayed(config, run.history.lines, str(run.history.path))
    assert (checked.survivors == run.survivors).all()
    genotype = finish(
        config,
        directory,
        reporter,
        run.history,
        checked,
        dataset=train.name,
        skipped=len(undecodable),
        flops=flops,
    )
    tell_cells(directory.path, genotype, run.epoch, wanted=config.runtime.tensorboard)
    return genotype


def _without_training(
    config: config_dict.ConfigDict, directory: Workdir, reporter: Reporter
) -> Genotype:
    """Draw an architecture, which needs neither data nor networks."""
    strategy = sampled_strategy(config)
    history = History(directory.path / "search" / "history.jsonl", [])
    directory.claim(
        "search",
        flatten(config),
        environment.record(),
        deciding_keys(config),
        resumed=False,
    )
    survivors = all_survivors(strategy.operations)
    alpha, _ = strategy.begin_alpha()
    decision = strategy.decide(len(strategy.operations), alpha, survivors, [])
    history.append(decision.line)
    reporter.say(decision_text(decision.line))
    result = replayed(config, history.lines, str(history.path))
    return finish(
        config, directory, reporter, history, result, dataset=config.dataset.name, flops=0.0
    )


def _refuse_other(config: config_dict.ConfigDict, directory: Workdir) -> None:
    """Compare a config with that of the run in the workdir.

    Before anything is searched there, only what a search shares with a training is compared.

    Raises:
        UserError: the workdir holds a run of another config; the differing keys are named.
    """
    keys, path = deciding_keys(config), directory.path
    searched = holds_checkpoints(path / "search" / "checkpoints")
    if not searched and not processes.from_first((path / "genotype.json").exists):
        trained = deciding_keys(config, "train")
        keys = {key: value for key, value in keys.items() if key in trained}
    directory.refuse_other(keys)


def _finished(directory: Workdir, config: config_dict.ConfigDict) -> Genotype | None:
    """Return the genotype of a finished search of this config, if the workdir holds it."""
    return processes.from_first(lambda: _found(directory, config))


def _found(directory: Workdir, config: config_dict.ConfigDict) -> Genotype | None:
    path = directory.path / "genotype.json"
    if not path.exists():
        return None
    try:
        genotype = Genotype.load(path)
    except UserError as error:
        raise UserError(
            f"{error}. Delete it: the same command writes it again from the checkpoint"
        ) from error
    found, expected = dict(genotype.provenance).get("config_hash"), config_hash(config)
    if found != expected:
        raise UserError(
            f"{path} is not of this config (its config_hash is {found!r}, here {expected!r}); "
            "move it away or use another --workdir"
        )
    return genotype
