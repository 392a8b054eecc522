"""Evaluate a function equation by equation and record what every convolution is given."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

PRODUCTS = ("conv_general_dilated", "dot_general")
# Where a called function stands in the parameters of the equation that calls it.
BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass
class Product:
    """A convolution or matrix product that was evaluated.

    Attributes:
        activations: left operand.
        kernel: right operand, output channels last.
        dilation: of the kernel.
        scale: factor of the output for every output channel; None where nothing multiplied it.
    """

    activations: np.ndarray
    kernel: np.ndarray
    dilation: int = 1
    scale: np.ndarray | None = None


class Recorder:
    """An interpreter of jaxprs that keeps the operands of products."""

    def __init__(self):
        self.products = []
        self._outputs = []  # (array, product); the arrays are kept alive, so `is` tells them apart

    def run(self, f, *arguments):
        """Return f(*arguments), recording its products."""
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*arguments)
        out = self._evaluate(closed, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    def _evaluate(self, closed: ClosedJaxpr, arguments: list[Any]) -> list[Any]:
        values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        values.update(zip(closed.jaxpr.invars, arguments, strict=True))

        def read(variable):
            return variable.val if isinstance(variable, Literal) else values[variable]

        for equation in closed.jaxpr.eqns:
            outputs = self._equation(equation, [read(v) for v in equation.invars])
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(v) for v in closed.jaxpr.outvars]

    def _equation(self, equation, inputs):
        name, params = equation.primitive.name, equation.params
        if name == "cond":
            index, *inputs = inputs
            return self._evaluate(params["branches"][int(index)], inputs)
        body = next((params[key] for key in BODIES if key in params), None)
        if body is not None:
            if name in ("scan", "while"):
                raise NotImplementedError(f"{name} is not evaluated equation by equation")
            return self._evaluate(body, inputs)
        outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(params))
        outputs = list(outputs) if equation.primitive.multiple_results else [outputs]
        if name in PRODUCTS:
            self._record(inputs, params, outputs[0])
        elif name == "mul":
            self._note_scale(inputs)
        return outputs

    def _record(self, inputs, params, output):
        activations, kernel = map(np.asarray, inputs)
        dilation = (params.get("rhs_dilation") or (1,))[0]
        self.products.append(Product(activations, kernel, dilation))
        self._outputs.append((output, self.products[-1]))

    def _note_scale(self, inputs):
        for output, product in self._outputs:
            for value, factor in (inputs, inputs[::-1]):
                if value is output:
                    factor = np.asarray(factor)
                    channels = np.reshape(factor, (-1, factor.shape[-1] if factor.ndim else 1))
                    assert np.all(channels == channels[:1])
                    assert product.scale is None
                    product.scale = channels[0]
