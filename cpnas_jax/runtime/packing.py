"""A tree of arrays as the few vectors that a checkpoint stores, and its digest.

Each array that orbax stores costs about a millisecond of processor time, and a supernet has
hundreds: all leaves of a dtype become one vector.
"""

import hashlib
from typing import Any

import jax
import numpy as np


def digest(state: Any) -> str:
    """Return the SHA-256 of a tree's structure, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};".encode())
        # Its bytes as they lie; `tobytes` would copy them.
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def shapes(state: Any) -> list[list[Any]]:
    """Return dtype and shape of every leaf, as JSON has them."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return [[str(leaf.dtype), list(leaf.shape)] for leaf in leaves]


def packed(leaves: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return one vector for each dtype, of the leaves in their order.

    Their structure is not stored: optimizer states are tuples of types that a file need not know.
    """
    of_dtype: dict[str, list[np.ndarray]] = {}
    for leaf in leaves:
        of_dtype.setdefault(str(leaf.dtype), []).append(leaf.reshape(-1))
    return {dtype: np.concatenate(parts) for dtype, parts in of_dtype.items()}


def unpacked(vectors: dict[str, np.ndarray], like: list[np.ndarray]) -> list[np.ndarray]:
    """Return the leaves of the shapes and dtypes of `like`; the inverse of `packed`."""
    leaves, ends = [], dict.fromkeys(vectors, 0)
    for leaf in like:
        dtype = str(leaf.dtype)
        start, ends[dtype] = ends[dtype], ends[dtype] + leaf.size
        leaves.append(np.asarray(vectors[dtype])[start : ends[dtype]].reshape(leaf.shape))
    return leaves
