"""Which layers' outputs are not finite: noted while a network is traced, for a diagnosis.

Nothing of this is in a program that trains or evaluates.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

COLLECTION = "watched"
"""Variables of a diagnosis: module -> {`BAD`: f32[]}, like the tree of the parameters."""

BAD = "bad"
"""0 where a module's output is finite, above 0 where it is not."""


def badness(output: Any) -> jax.Array:
    """Return 1 if an array of an output is not finite, else 0, f32[]."""
    flags = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(output)]
    return 1 - jnp.stack(flags).all().astype(jnp.float32)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Let every module note its output, where `COLLECTION` is mutable."""

    def note(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            context.module.sow(
                COLLECTION,
                BAD,
                badness(output),
                init_fn=lambda: jnp.zeros((), jnp.float32),
                reduce_fn=jnp.add,
            )
        return output

    with nn.intercept_methods(note):
        yield
