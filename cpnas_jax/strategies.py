"""Which strategy a config asks for."""

from ml_collections import config_dict

from cpnas_jax.architecture.sampling import num_sampled_epochs
from cpnas_jax.architecture.strategy import ChildParent, RandomSearch, Strategy
from cpnas_jax.models.space import CHILD, MODELS


def sampled_strategy(config: config_dict.ConfigDict) -> Strategy:
    """Return the strategy of `config.search.strategy`."""
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
    )
