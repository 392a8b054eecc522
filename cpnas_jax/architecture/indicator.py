"""Score of a sampled architecture, indicator of its operations, and dropping (eq. 4.15, 4.16)."""

from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike

from cpnas_jax.architecture.sampling import num_surviving
from cpnas_jax.models.space import CELL_TYPES


def child_parent_score(child_accuracy: float, parent_accuracy: float, beta_p: float) -> float:
    """Score an architecture by eq. 4.15, z = beta_P * (A_P - A_C) + A_C.

    As printed: at the paper's best beta_P = 2 the child's accuracy enters with a minus sign. At
    beta_P = 0 it is the child's accuracy alone, at 1 the parent's.

    Args:
        child_accuracy: A_C in [0, 1], of the 1-bit network on the validation split.
        parent_accuracy: A_P in [0, 1], of the float network on the same examples.
        beta_p: weight of the difference.
    """
    return float(beta_p * (parent_accuracy - child_accuracy) + child_accuracy)


def indicator(alpha: Mapping[str, ArrayLike], survivors: np.ndarray) -> np.ndarray:
    """Compute e of eq. 4.16, the softmax of the mean of z over the surviving operations.

    Args:
        alpha: f[14, 8] for each cell type, the mean of z over the rounds of the stage; entries of
            dropped operations are not looked at.
        survivors: bool[2, 14, 8].

    Returns:
        f64[2, 14, 8]: sums to 1 over the survivors of each edge, 0 for the dropped.

    Raises:
        ValueError: if the mean of a surviving operation is not finite.
    """
    num_surviving(survivors)
    mean_z = np.stack([np.asarray(alpha[cell], np.float64) for cell in CELL_TYPES])
    if not np.isfinite(mean_z[survivors]).all():
        raise ValueError("alpha of a surviving operation is not finite")
    logits = np.where(survivors, mean_z, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def drop_worst(indicator: np.ndarray, survivors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the operation with the smallest indicator on every edge (Algorithm 9).

    The paper does not say what decides between equal indicators; our choice is the lowest
    position in `OPERATIONS`, which is `none` wherever it takes part.

    Args:
        indicator: f[2, 14, 8].
        survivors: bool[2, 14, 8] with at least two operations left on every edge.

    Returns:
        The new survivors, bool[2, 14, 8], and the dropped operations, int32[2, 14].

    Raises:
        ValueError: if only one operation is left on every edge, or a surviving one's indicator
            is not a number.
    """
    if num_surviving(survivors) < 2:
        raise ValueError("one operation is left on every edge; none of them can be dropped")
    if np.isnan(indicator[survivors]).any():
        raise ValueError("the indicator of a surviving operation is not a number")
    dropped = np.argmin(np.where(survivors, indicator, np.inf), axis=-1)
    remaining = survivors.copy()
    np.put_along_axis(remaining, dropped[..., None], False, axis=-1)
    return remaining, dropped.astype(np.int32)


def final_operations(survivors: np.ndarray) -> np.ndarray:
    """Give the one operation left on every edge after the last stage, int32[2, 14].

    Raises:
        ValueError: if more than one is left.
    """
    remaining = num_surviving(survivors)
    if remaining != 1:
        raise ValueError(f"{remaining} operations are left on every edge; the search is unfinished")
    return np.argmax(survivors, axis=-1).astype(np.int32)
