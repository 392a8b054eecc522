"""All parameters of a mixture move by the rules that a sampled path has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from path_cases import NETWORK, OPTIMIZER, random_like, shapes

from cpnas_jax.mixture_optimizer import MixtureOptimizer
from cpnas_jax.models.space import OPERATIONS
from cpnas_jax.path_optimizer import CHILD, PARENT, PathOptimizer

ONE_CELL = dataclasses.replace(NETWORK, cells=1)


@pytest.mark.parametrize("model", [CHILD, PARENT])
@pytest.mark.parametrize("child_optimizer", ["adam", "sgd"])
def test_the_sampled_operations_move_as_with_the_optimizer_of_paths(model, child_optimizer):
    """Both clip the same gradient; that of paths leaves the operations that are not sampled."""
    settings = dataclasses.replace(
        OPTIMIZER, child_optimizer=child_optimizer, learning_rate=0.03, gradient_clip=1.0
    )
    params = random_like(shapes(ONE_CELL), 0)
    gradients = random_like(shapes(ONE_CELL), 1)
    own, paths = MixtureOptimizer(settings, model), PathOptimizer(settings)
    position = OPERATIONS.index("dil_conv_3x3")
    architecture = np.full((2, 14), position, np.int32)

    def both(params, gradients):
        step = np.int32(5)
        mixed, state = own.update(gradients, own.init(params), params, step=step)
        path, _ = paths.update(
            gradients,
            paths.init(params),
            params,
            architecture=architecture,
            binary=np.asarray(model == CHILD),
            step=step,
        )
        nothing = jax.tree.map(jnp.zeros_like, gradients)
        again, _ = own.update(nothing, state, mixed, step=step)
        return mixed, path, again

    mixed, path, again = jax.device_get(jax.jit(both)(params, gradients))
    for cell_mixed, cell_path in zip(mixed["cells"], path["cells"], strict=True):
        for group in cell_mixed["edges"]:
            a, b = (cell["edges"][group]["dil_conv_3x3"] for cell in (cell_mixed, cell_path))
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b)
    np.testing.assert_allclose(mixed["stem"]["kernel"], path["stem"]["kernel"], rtol=1e-5)
    # Everything moves, and without a gradient by its momentum.
    for x, y, z in zip(*map(jax.tree.leaves, (params, mixed, again)), strict=True):
        assert (x != y).mean() > 0.9
        assert (y != z).mean() > 0.9
