"""Which strategy a config asks for, and the check of a search by the strategy that made it."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import config_dict

from cpnas_jax.architecture.gradient import GradientRule, replay_gradient
from cpnas_jax.architecture.parsing import parse_history
from cpnas_jax.architecture.plus import ChildParentPlus, PlusSettings
from cpnas_jax.architecture.replay import ReplayResult, replay
from cpnas_jax.architecture.sampling import num_sampled_epochs
from cpnas_jax.architecture.strategy import ChildParent, RandomSearch, Strategy
from cpnas_jax.config_rules import GRADIENT_STRATEGIES
from cpnas_jax.models.space import CHILD, MODELS
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.paths import user_path


def has_gradient(config: config_dict.ConfigDict) -> bool:
    """Tell whether the strategy's alpha has a gradient; the others train sampled paths."""
    return config.search.strategy in GRADIENT_STRATEGIES


def sampled_strategy(config: config_dict.ConfigDict) -> Strategy:
    """Return a strategy of sampled paths, `config.search.strategy`."""
    search = config.search
    name, operations = search.strategy, tuple(search.operations)
    if name in ("cp", "child"):
        return ChildParent(
            seed=config.seed,
            rounds=search.rounds,
            beta_p=search.beta_p if name == "cp" else 0.0,
            operations=operations,
            models=MODELS if name == "cp" else (CHILD,),
        )
    if name == "cp_plus":
        return ChildParentPlus(
            seed=config.seed,
            rounds=search.rounds,
            settings=PlusSettings(
                beta_p=search.plus_beta_p,
                measure=search.measure,
                max_scored=search.max_scored,
                reliability=search.reliability,
                certainty=search.certainty,
                carry=search.carry,
                training=search.plus_training,
                paths=search.plus_paths,
            ),
            operations=operations,
            # What has no say is not trained.
            models=MODELS if search.plus_beta_p else (CHILD,),
        )
    assert name in ("random", "random_search"), name
    candidates = search.candidates if name == "random_search" else 1
    # As many epochs of a child as `cp` trains child and parent for.
    epochs = len(MODELS) * num_sampled_epochs(search.rounds, len(operations)) // candidates
    return RandomSearch(
        seed=config.seed,
        candidates=candidates,
        epochs=epochs if name == "random_search" else 0,
        policy=search.edge_policy,
        operations=operations,
        max_skips=search.max_skips,
    )


def gradient_rule(config: config_dict.ConfigDict) -> GradientRule:
    """Return when a gradient strategy, `config.search.strategy`, drops operations."""
    search = config.search
    both, partial = search.strategy == "cp_gradient", search.strategy == "pc_darts"
    return GradientRule(
        operations=tuple(search.operations),
        epochs=search.epochs,
        # DARTS begins at once.
        warmup=search.alpha_warmup if search.strategy != "darts" else 0,
        drops=both,
        models=MODELS if both else (search.gradient_model,),
        edges=partial and search.edge_normalisation,
    )


def replayed(
    config: config_dict.ConfigDict, lines: Iterable[Mapping[str, Any]], name: str
) -> ReplayResult:
    """Check a log by the strategy of its config.

    Args:
        config: of the search.
        lines: of the history.
        name: what an error calls the log.

    Raises:
        UserError: at the first inconsistent line.
    """
    rule = gradient_rule(config) if has_gradient(config) else sampled_strategy(config)
    return replayed_by(rule, lines, name)


def replayed_by(
    rule: GradientRule | Strategy, lines: Iterable[Mapping[str, Any]], name: str
) -> ReplayResult:
    """Check a log by what decided in the search; as `replayed` does."""
    if isinstance(rule, GradientRule):
        return replay_gradient(lines, rule, name)
    return replay(lines, rule, name)


def check_search(workdir: str | os.PathLike[str]) -> ReplayResult:
    """Check the search in a workdir, finished or not, from its config and its log alone.

    Raises:
        UserError: a file is missing or damaged, or the first line that is not what follows from
            those before it.
    """
    path = user_path("workdir", workdir)
    found = {}
    for name in ("config.json", "search/history.jsonl"):
        if not (path / name).exists():
            raise UserError(f"there is no {path / name}; give the --workdir of a search")
        found[name] = (path / name).read_text()
    try:
        rule = stored_rule(json.loads(found["config.json"])["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / 'config.json'} is damaged or of another version ({error}); restore it"
        ) from error
    name = os.fspath(path / "search/history.jsonl")
    return replayed_by(rule, parse_history(found["search/history.jsonl"], name), name)


def stored_rule(keys: Mapping[str, Any]) -> GradientRule | Strategy:
    """Return what decides in the search of a stored config.

    Args:
        keys: all of them, dotted, as `config.json` has them.

    Raises:
        ValueError: they are of another version, or damaged.
    """
    try:
        section = {
            key.removeprefix("search."): value
            for key, value in keys.items()
            if key.startswith("search.")
        }
        config = config_dict.ConfigDict({"seed": keys["seed"], "search": section})
        return gradient_rule(config) if has_gradient(config) else sampled_strategy(config)
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(str(error)) from error
