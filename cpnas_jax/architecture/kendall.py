"""Agreement of two rankings of architectures: Kendall's tau with a confidence interval."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tau:
    """Kendall's tau-b of n pairs with the ends of its confidence interval."""

    value: float
    low: float
    high: float
    n: int


def kendall_tau(
    first: np.ndarray,
    second: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Tau:
    """Return Kendall's tau-b of two rankings with a confidence interval by the bootstrap of pairs.

    Args:
        first: f[n].
        second: f[n].
        confidence: share of the resamples' values between the ends of the interval.
        resamples: drawn with replacement.
        seed: decides them.

    Raises:
        ValueError: lengths that differ, or fewer than two different values in one of them.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"rankings of shapes {first.shape} and {second.shape}")
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        raise ValueError("a ranking needs at least two different values")
    count = len(first)
    signs = [np.sign(own[:, None] - own) for own in (first, second)]
    rows = np.random.PCG64(seed).random_raw((resamples, count)) % np.uint64(count)
    # How often each pair was drawn; first the sample as it is.
    times = np.concatenate([np.ones((1, count)), (rows[..., None] == np.arange(count)).sum(axis=1)])

    def over_pairs(values: np.ndarray) -> np.ndarray:
        return np.einsum("ri,ij,rj->r", times, values, times, optimize=True)

    untied = np.sqrt(over_pairs(signs[0] ** 2) * over_pairs(signs[1] ** 2))
    # A resample of one value has no tau.
    values = over_pairs(signs[0] * signs[1])[untied > 0] / untied[untied > 0]
    low, high = np.quantile(values[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Tau(float(values[0]), float(low), float(high), count)
