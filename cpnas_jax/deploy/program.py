"""A shipped network as a function of images, for one kind of device or, exported, for several."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from cpnas_jax.deploy import packed, signed
from cpnas_jax.deploy.steps import Step
from cpnas_jax.deploy.structure import Structure, steps

ENGINES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "packed": packed.STEPS,
    "signed": signed.STEPS,
    "signed on cpu": signed.ON_CPU,
}
PLATFORMS = ("cpu", "cuda", "tpu")
"""What exported programs are lowered for."""

_BINARY = ("binary_depthwise", "binary_pointwise")
_APART = ("sign", "binary_depthwise", "max_pool", "avg_pool")
"""Steps of `packed` that XLA:CPU would compute again for each place that reads them."""

AllTensors = Mapping[str, Mapping[str, np.ndarray]]
"""Name of a step -> field -> tensor; bits as bool."""


def apart(function: Callable[..., jax.Array], always: jax.Array) -> Callable[..., jax.Array]:
    """Return a function that XLA computes once, before what reads its result.

    XLA:CPU fuses cheap operations into all that read them: the bits of a depthwise convolution
    would be computed again for every output channel of the 1x1 convolution behind it, ten times
    the time of the whole network. A branch is the border of fusions that outlives `jax.export`
    (calls are inlined there, optimization barriers removed).

    Args:
        function: of arrays.
        always: bool[], true, but not to be known when a program is compiled.
    """

    def branched(*values: jax.Array) -> jax.Array:
        result = jax.eval_shape(function, *values)
        return lax.cond(always, function, lambda *_: jnp.zeros(result.shape, result.dtype), *values)

    return branched


def take(
    structure: Structure,
    step: Step,
    tensors: Mapping[str, Any],
    values: list[Any],
    engine: str,
    always: jax.Array | None = None,
) -> jax.Array:
    """Take one step with an engine; `always` is for `apart`, without it XLA fuses as it likes."""
    function: Callable[..., jax.Array] = functools.partial(ENGINES[engine][step.op], step, tensors)
    if step.op in _BINARY:
        function = functools.partial(function, pad_value=structure.pad_value)
    if always is not None and step.op in _APART:
        function = apart(function, always)
    # Profiles and error messages of XLA name the step.
    with jax.named_scope(step.op):
        return function(*values)


def logits(
    structure: Structure,
    tensors: AllTensors,
    images: jax.Array,
    engine: str,
    *,
    for_xla: bool = True,
) -> jax.Array:
    """Return what the network answers.

    Args:
        structure: of the network.
        tensors: of its steps.
        images: uint8[N, H, W, C].
        engine: of `ENGINES`.
        for_xla: whether it is XLA that compiles it, whose fusions are given borders.

    Returns:
        f32[N, classes].
    """
    values: dict[str, jax.Array] = {"images": images}
    always = None
    if engine == "packed" and for_xla:
        always = images[0, 0, 0, 0].astype(jnp.int32) < 256
    for step in steps(structure):
        inputs = [values[name] for name in step.inputs]
        values[step.name] = take(
            structure, step, tensors.get(step.name, {}), inputs, engine, always
        )
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
