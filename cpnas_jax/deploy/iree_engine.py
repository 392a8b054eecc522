"""IREE as an engine: the packed program compiled ahead, for this machine or for ARM, for one image.

What is compiled needs no JAX where it runs, but IREE's runtime: `pip install iree-base-runtime`, or
its C library on a device. Both packages of IREE are the extra `iree`.
"""

import functools
import importlib.util
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from cpnas_jax.deploy import program
from cpnas_jax.deploy.layout import one_line
from cpnas_jax.deploy.program import AllTensors
from cpnas_jax.deploy.structure import Structure

TARGETS = {
    "host": ("--iree-llvmcpu-target-cpu=host",),
    # Any of 64 bits: a Raspberry Pi, a phone; the file needs no operating system's loader.
    "aarch64": (
        "--iree-llvmcpu-target-triple=aarch64-linux-gnu",
        "--iree-llvmcpu-target-cpu=generic",
    ),
}
"""What programs are compiled for -> what the compiler is told."""

HOST = "host"


class IreeError(ValueError):
    """IREE is missing, or what it was given it cannot compile or run; the message says which."""


def file_name(target: str) -> str:
    """Return the name of a compiled program's file."""
    return f"model.{target}.vmfb"


def require(part: str) -> None:
    """See that a part of IREE, `compiler` or `runtime`, is installed.

    Raises:
        IreeError: it is not.
    """
    try:
        found = importlib.util.find_spec(f"iree.{part}")
    # Without `iree` at all, or hidden by an entry None in sys.modules.
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise IreeError(
            f'the package iree-base-{part} is missing; pip install "cpnas_jax[iree]", in a '
            'checkout pip install -e ".[iree]"'
        )


def compiled(structure: Structure, tensors: AllTensors, target: str) -> bytes:
    """Compile a network for one image, uint8[1, H, W, C] to f32[1, classes].

    Args:
        structure: of the network; a float one runs by its products.
        tensors: of its steps.
        target: of `TARGETS`.

    Returns:
        What IREE's runtime loads.

    Raises:
        IreeError: the compiler is missing or failed.
    """
    require("compiler")
    # Not before it is wanted: an extra.
    from iree import compiler

    engine = "packed" if structure.binary else "signed on cpu"
    network = functools.partial(program.logits, structure, tensors, engine=engine, for_xla=False)
    image = jax.ShapeDtypeStruct((1, *structure.image), jnp.uint8)
    lowered = export.export(jax.jit(network), platforms=("cpu",))(image)
    try:
        found = compiler.compile_str(
            lowered.mlir_module_serialized,
            input_type="stablehlo",
            target_backends=["llvm-cpu"],
            extra_args=list(TARGETS[target]),
        )
    except compiler.CompilerToolError as error:
        raise IreeError(f"IREE cannot compile for {target!r} ({one_line(error)})") from error
    assert isinstance(found, bytes)
    return found


class IreeProgram:
    """A compiled program that is loaded: a function of images, on one thread."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Load a file that `compiled` made for this machine.

        Raises:
            IreeError: the runtime is missing, or cannot load the file.
        """
        require("runtime")
        from iree import runtime

        data = pathlib.Path(path).read_bytes()
        try:
            self._module: Any = runtime.load_vm_flatbuffer(data, driver="local-sync")
        # Of the runtime's own and of many types, such as for another processor.
        except Exception as error:
            raise IreeError(
                f"{path} cannot be loaded ({one_line(error)}); export it again"
            ) from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return f32[N, classes] of uint8[N, H, W, C], one after the other."""
        rows = [np.asarray(self._module.main(images[row : row + 1])) for row in range(len(images))]
        return np.concatenate(rows)
