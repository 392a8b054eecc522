"""Functions that XLA compiles apart from what surrounds them.

XLA:CPU likes to compute again inside a fusion what it needs of its producers, once for every place
that reads it: the packing of signs for every output channel of the 1x1 convolution behind it. A
call that is not inlined ends a fusion. (`lax.optimization_barrier` does not: XLA:CPU removes it
before it fuses.)
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def apart(function: Callable[..., Any], static: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Return the function as one that is a call of its own in XLA's program.

    Args:
        function: of arrays, and of static arguments, all by position.
        static: positions of the latter.
    """

    def inner(*arguments: Any) -> Any:
        # What is called inside is inlined as usual.
        with set_xla_metadata(inlineable=None):
            return function(*arguments)

    jitted = jax.jit(inner, static_argnums=static)

    def outer(*arguments: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return jitted(*arguments)

    return outer
