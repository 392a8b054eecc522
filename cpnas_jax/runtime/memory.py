"""Device memory: refusing what cannot fit before it runs."""

import contextlib
from collections.abc import Iterator

import jax

from cpnas_jax.runtime import environment
from cpnas_jax.runtime.errors import UserError


def describe(parts: dict[str, int]) -> str:
    """Return the estimate as text: the sum, and each part."""
    each = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in parts.items())
    return f"{sum(parts.values()) / 2**20:.0f} MiB ({each})"


def out_of_memory(reason: str, knobs: str) -> UserError:
    """Return the error for a run that a device cannot hold."""
    return UserError(f"this run does not fit on a device: {reason}; lower {knobs}")


def check_memory(parts: dict[str, int], knobs: str) -> None:
    """Compare what a device would hold with what it has, where the platform tells.

    Args:
        parts: name -> bytes of a device.
        knobs: the keys to lower.

    Raises:
        UserError: it is more than the device has.
    """
    available = environment.device_memory()
    if available is not None and sum(parts.values()) > available:
        raise out_of_memory(
            f"it needs about {describe(parts)}, a device has {available / 2**20:.0f} MiB", knobs
        )


@contextlib.contextmanager
def exhaustion_explained(knobs: str) -> Iterator[None]:
    """Turn a compiler's or allocator's report that a device's memory is exhausted into a UserError.

    Raises:
        UserError: what JAX says in one line, and the keys to lower.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise out_of_memory(str(error).splitlines()[0], knobs) from error
