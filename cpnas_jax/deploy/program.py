"""A shipped network as a function of images, for one kind of device or, exported, for several."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from cpnas_jax.deploy import packed, signed
from cpnas_jax.deploy.apart import apart
from cpnas_jax.deploy.structure import Step, Structure, steps

ENGINES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "packed": packed.STEPS,
    "signed": signed.STEPS,
    "signed on cpu": signed.ON_CPU,
}
_ON_CPU = ("packed", "signed on cpu")
PLATFORMS = ("cpu", "cuda", "tpu")
"""What exported programs are lowered for."""

_BINARY = ("binary_depthwise", "binary_pointwise")
_APART = (
    *("sign", *_BINARY, "signed_depthwise", "depthwise", "convolution", "max_pool", "avg_pool"),
)
"""Steps that XLA:CPU must not compute again for each place that reads them."""

AllTensors = Mapping[str, Mapping[str, np.ndarray]]
"""Name of a step -> field -> tensor; bits as bool."""


def take(
    structure: Structure, step: Step, tensors: Mapping[str, Any], values: list[Any], engine: str
) -> jax.Array:
    """Take one step with an engine."""
    function: Callable[..., jax.Array] = functools.partial(ENGINES[engine][step.op], step, tensors)
    if step.op in _BINARY:
        function = functools.partial(function, pad_value=structure.pad_value)
    if step.op in _APART and engine in _ON_CPU:
        function = apart(function)
    # Profiles and error messages of XLA name the step.
    with jax.named_scope(step.op):
        return function(*values)


def logits(structure: Structure, tensors: AllTensors, images: jax.Array, engine: str) -> jax.Array:
    """Return what the network answers.

    Args:
        structure: of the network.
        tensors: of its steps.
        images: uint8[N, H, W, C].
        engine: of `ENGINES`.

    Returns:
        f32[N, classes].
    """
    values: dict[str, jax.Array] = {"images": images}
    for step in steps(structure):
        inputs = [values[name] for name in step.inputs]
        values[step.name] = take(structure, step, tensors.get(step.name, {}), inputs, engine)
    return values["logits"]


def function_of(structure: Structure, tensors: AllTensors) -> Callable[[jax.Array], jax.Array]:
    """Return the network for every platform: bits on CPUs, numbers elsewhere."""

    def network(images: jax.Array) -> jax.Array:
        own = functools.partial(logits, structure, tensors)
        if not structure.binary:
            return lax.platform_dependent(
                images,
                cpu=functools.partial(own, engine="signed on cpu"),
                default=functools.partial(own, engine="signed"),
            )
        return lax.platform_dependent(
            images,
            cpu=functools.partial(own, engine="packed"),
            default=functools.partial(own, engine="signed"),
        )

    return network


def exported(structure: Structure, tensors: AllTensors) -> export.Exported:
    """Lower a network for all of `PLATFORMS` and any number of images."""
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *structure.image), jnp.uint8)
    return export.export(jax.jit(function_of(structure, tensors)), platforms=PLATFORMS)(images)
