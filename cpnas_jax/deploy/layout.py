"""How a network's tensors lie in `model.safetensors`.

Three tensors for the stem, each cell and the classifier, as far as they have any: `<part>.bits`,
uint8, kernels and flips of 1-bit steps; `<part>.float32`; `<part>.int8`. In each the tensors of the
part's steps follow each other in the order of `structure.steps`, each in C order; every tensor of
bits begins with a byte of its own.
"""

from collections.abc import Mapping

import numpy as np

from cpnas_jax.deploy.bits import from_bytes, to_bytes
from cpnas_jax.deploy.program import AllTensors
from cpnas_jax.deploy.steps import Spec
from cpnas_jax.deploy.structure import Structure, steps

_DTYPES = {"bits": np.uint8, "float32": np.float32, "int8": np.int8}


class ArtefactError(ValueError):
    """A directory that holds no network that can be used; the message says what would be right."""


def one_line(error: Exception) -> str:
    """Return what an error says, short enough for a message."""
    return " ".join(str(error).split())[:200]


def blobs(structure: Structure, tensors: AllTensors) -> dict[str, np.ndarray]:
    """Return the tensors of `model.safetensors`."""
    parts: dict[str, list[np.ndarray]] = {}
    for step in steps(structure):
        for field, spec in step.tensors.items():
            own = tensors[step.name][field]
            flat = to_bytes(own) if spec.kind == "bits" else own.astype(_DTYPES[spec.kind]).ravel()
            parts.setdefault(f"{step.part}.{spec.kind}", []).append(flat)
    return {name: np.concatenate(own) for name, own in parts.items()}


def _stored(spec: Spec) -> int:
    """Return how many entries of a blob a tensor takes."""
    return -(-spec.size // 8) if spec.kind == "bits" else spec.size


def from_blobs(structure: Structure, stored: Mapping[str, np.ndarray]) -> AllTensors:
    """Return the tensors of all steps.

    Raises:
        ArtefactError: a blob is missing, too much or of another size.
    """
    places: dict[str, int] = {}
    tensors: dict[str, dict[str, np.ndarray]] = {}
    for step in steps(structure):
        own = tensors.setdefault(step.name, {})
        for field, spec in step.tensors.items():
            name = f"{step.part}.{spec.kind}"
            first = places.get(name, 0)
            places[name] = first + _stored(spec)
            blob = stored.get(name, np.zeros(0))
            if blob.dtype != _DTYPES[spec.kind] or len(blob) < places[name]:
                raise ArtefactError(
                    f"tensor {name!r} does not fit the cells: it ends in {step.name}"
                )
            own[field] = _unpacked(spec, blob[first : places[name]])
    for name, blob in stored.items():
        if len(blob) != places.get(name, 0):
            raise ArtefactError(
                f"tensor {name!r} does not fit the cells: it has {len(blob)} entries in place of "
                f"{places.get(name, 0)}"
            )
    return tensors


def _unpacked(spec: Spec, values: np.ndarray) -> np.ndarray:
    return from_bytes(values, spec.shape) if spec.kind == "bits" else values.reshape(spec.shape)
