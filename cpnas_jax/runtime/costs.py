"""What a program costs a device: operations, bytes and collectives, read from its jaxpr.

XLA's cost analysis of a whole program counts the body of a loop once, whatever the number of
passes, and of a `lax.switch` the dearest branch; compiled for a CPU it also counts what only a CPU
does (the gradient of a depthwise kernel as a dense convolution). So the program is taken apart
here: a scan counts as often as it runs, a `lax.switch` as the mean of its branches (every operation
of an edge is sampled as often as any other), a loop of unknown length once. What remains are single
primitives, and their operations and bytes are those of XLA's cost analysis of that primitive.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "checkpoint", "custom_jvp_call"}
    | {"custom_vjp_call", "custom_vjp_call_jaxpr", "shard_map"}
)
"""Primitives that are the program they carry."""

COLLECTIVES = frozenset({"psum", "psum_invariant", "pmax", "pmin", "all_gather"})

ENDING_FUSIONS = (
    *("conv_general_dilated", "dot_general", "reduce", "argmax", "argmin", "select_and_scatter"),
    *("select_and_gather", "sort", "gather", "scatter", "cumsum"),
)
"""Beginnings of the names of primitives that read and write memory even if all else is fused."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device.

    Attributes:
        matrix: operations of dot products and of convolutions that mix channels.
        depthwise: operations of convolutions with more than one group, and of their gradients.
        other: operations of the rest.
        least_bytes: read and written if all elementwise work is fused with what surrounds it.
        most_bytes: read and written if nothing is fused.
        collectives: (name, bytes of the operands together) -> how many.
    """

    matrix: float = 0.0
    depthwise: float = 0.0
    other: float = 0.0
    least_bytes: float = 0.0
    most_bytes: float = 0.0
    collectives: collections.Counter[tuple[str, int]] = dataclasses.field(
        default_factory=collections.Counter
    )

    @property
    def flops(self) -> float:
        """Return all operations."""
        return self.matrix + self.depthwise + self.other

    def num_collectives(self, largest: float = math.inf) -> float:
        """Return how many there are of at most so many bytes."""
        return sum(n for (_, size), n in self.collectives.items() if size <= largest)

    def collective_bytes(self) -> float:
        """Return what all collectives together sum or gather."""
        return sum(size * n for (_, size), n in self.collectives.items())

    def __add__(self, other: "Cost") -> "Cost":
        """Add up what runs one after the other."""
        counts = collections.Counter(self.collectives)
        for key, n in other.collectives.items():
            counts[key] += n
        numbers = (a + b for a, b in zip(_numbers(self), _numbers(other), strict=True))
        return Cost(**dict(zip(_NUMBERS, numbers, strict=True)), collectives=counts)

    def __mul__(self, times: float) -> "Cost":
        """Return the cost of so many runs."""
        counts = collections.Counter({key: n * times for key, n in self.collectives.items()})
        numbers = (number * times for number in _numbers(self))
        return Cost(**dict(zip(_NUMBERS, numbers, strict=True)), collectives=counts)


_NUMBERS = ("matrix", "depthwise", "other", "least_bytes", "most_bytes")


def _numbers(cost: Cost) -> tuple[float, ...]:
    return tuple(getattr(cost, name) for name in _NUMBERS)


def program_cost(
    function: Callable[..., Any], *shapes: Any, axis: tuple[str, int] | None = None
) -> Cost:
    """Return the cost of a function of arrays of these shapes; nothing is computed or compiled.

    Args:
        function: as it would be given to `jax.jit`, or to `jax.pmap`.
        shapes: trees of arrays or `jax.ShapeDtypeStruct`, of one device.
        axis: name and size of the mapped axis; no such devices are needed.
    """
    named = [axis] if axis else []
    return _jaxpr_cost(jax.make_jaxpr(function, axis_env=named)(*shapes).jaxpr, {})


def _jaxpr_cost(jaxpr: Any, known: dict[int, Cost]) -> Cost:
    # Equal calls share their jaxpr; `known` lives no longer than the whole, and so its numbers.
    if id(jaxpr) not in known:
        total = Cost()
        for equation in jaxpr.eqns:
            total += _equation_cost(equation, known)
        known[id(jaxpr)] = total
    return known[id(jaxpr)]


def _equation_cost(equation: Any, known: dict[int, Cost]) -> Cost:
    name, params = equation.primitive.name, equation.params

    def inner(key: str) -> Cost:
        return _jaxpr_cost(_open(params[key]), known)

    if name == "scan":
        return inner("jaxpr") * params["length"]
    if name == "while":
        return inner("cond_jaxpr") + inner("body_jaxpr")
    if name == "cond":
        branches = [_jaxpr_cost(_open(branch), known) for branch in params["branches"]]
        return functools.reduce(Cost.__add__, branches) * (1 / len(branches))
    if name in CALLS:
        return inner(next(key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params))
    if name in COLLECTIVES:
        size = sum(_bytes(variable.aval) for variable in equation.invars)
        return Cost(collectives=collections.Counter({(name, size): 1}))
    return _primitive_cost(equation)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


_PRIMITIVES: dict[Any, Cost] = {}


def _primitive_cost(equation: Any) -> Cost:
    avals = tuple(variable.aval for variable in equation.invars)
    key = (equation.primitive.name, str(sorted(equation.params.items())), tuple(map(str, avals)))
    if key not in _PRIMITIVES:
        _PRIMITIVES[key] = _analysed(equation, avals)
    return _PRIMITIVES[key]


def _analysed(equation: Any, avals: tuple[Any, ...]) -> Cost:
    name, params = equation.primitive.name, equation.params
    if name == "axis_index":
        return Cost()
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    lowered = jax.jit(lambda *arrays: equation.primitive.bind(*arrays, **params)).lower(*shapes)
    found = lowered.cost_analysis() or {}
    flops, moved = found.get("flops", 0.0), found.get("bytes accessed", 0.0)
    if name == "dynamic_update_slice":
        # In place: the slice alone is read and written.
        moved = 2 * _bytes(avals[1])
        return Cost(other=flops, least_bytes=moved, most_bytes=moved)
    kind = "other"
    if name == "dot_general":
        kind = "matrix"
    elif name == "conv_general_dilated":
        groups = params["feature_group_count"] * params["batch_group_count"]
        kind = "depthwise" if groups > 1 else "matrix"
    least = moved if name.startswith(ENDING_FUSIONS) else 0.0
    return Cost(**{kind: flops}, least_bytes=least, most_bytes=moved)
