"""A small supernet with its optimizer, random states of them, and what an architecture samples."""

import functools

import jax
import numpy as np
from draws import QUICK, random_architecture

from cpnas_jax import path_optimizer
from cpnas_jax.models import supernet
from cpnas_jax.models.edges import EDGE_GROUPS
from cpnas_jax.models.operations import OperationSettings
from cpnas_jax.models.space import CELL_TYPES, OPERATIONS
from cpnas_jax.models.supernet import SupernetSettings
from cpnas_jax.path_optimizer import OptimizerSettings, PathOptimizer

CLASSES = 5
NETWORK = SupernetSettings(2, 4, (0,), CLASSES, OperationSettings(separable_repeats=1))
OPTIMIZER = OptimizerSettings(
    learning_rate=0.1,
    child_learning_rate=0.02,
    child_optimizer="adam",
    momentum=0.9,
    weight_decay=0.01,
    gradient_clip=5.0,
    total_steps=12,
)


@functools.cache
def shapes(network=NETWORK):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: supernet.init(key, network, (8, 8, 3)), key)


def random_like(tree, seed, scale=1.0):
    """Normal floats, positive counts and positive second moments."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return generator.integers(1, 5, leaf.shape).astype(leaf.dtype)
        values = generator.normal(size=leaf.shape).astype(leaf.dtype) * np.float32(scale)
        return np.abs(values) if "nu" in jax.tree_util.keystr(path) else values

    return jax.tree_util.tree_map_with_path(draw, tree)


def sampled_tree(params, architecture):
    """A boolean for every weight: whether its operation was sampled; True for what is shared."""
    tree = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    for cell in tree["cells"]:
        kind = "reduce" if len(cell["edges"]) == 2 else "normal"
        for name, operations in cell["edges"].items():
            edges = EDGE_GROUPS[kind][name].edges
            for operation, leaves in operations.items():
                for leaf in jax.tree.leaves(leaves):
                    for row, edge in enumerate(edges):
                        chosen = architecture[CELL_TYPES.index(kind), edge]
                        leaf[row] = OPERATIONS[chosen] == operation
    return tree


def sampled_matrices(params, architecture):
    """The same in the layout of the optimizer's state of the edges."""
    tree = sampled_tree(params, architecture)
    _, groups = path_optimizer._split(jax.tree.map(lambda leaf: leaf.astype(np.float32), tree))
    return [np.asarray(group.values, bool) for group in groups]


@functools.cache
def compiled_update(settings=OPTIMIZER):
    optimizer = PathOptimizer(settings)

    def update(gradients, state, params, architecture, binary, step):
        return optimizer.update(
            gradients, state, params, architecture=architecture, binary=binary, step=step
        )

    arguments = (shapes(), jax.eval_shape(optimizer.init, shapes()), shapes())
    scalars = (random_architecture(0), np.asarray(True), np.int32(0))
    return jax.jit(update).lower(*arguments, *scalars).compile(QUICK)
