"""What each operation of each edge contributes to an architecture's score, by ridge regression.

All of it is [ours]; derivation and measurements are in docs/indicator.md. An architecture has 28
edges, so that even without noise one operation explains about 1/28 of its score: the mean of the
scores over T rounds, the paper's indicator, repeats itself with a correlation of T / (27 + T). Here
all 28 operations of all scored architectures explain their scores together:

    score = intercept + sum over 28 edges of (kind[cell, operation] + edge[cell, edge, operation])

`kind` is what the edges of a cell type share. Both are shrunk towards 0, each by a penalty of its
own that the scores choose: the kinds are normal with variance tau_kind^2, the edges' deviations
from them with tau_edge^2, the noise of a score of weight w has sigma^2 / w; the variances are those
of largest restricted likelihood (REML) on a grid; effects and covariances are the posterior's.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import special

from cpnas_jax.architecture.sampling import SHAPE
from cpnas_jax.models.space import CELL_TYPES, NUM_EDGES, NUM_OPERATIONS

EFFECTS = (*SHAPE, NUM_OPERATIONS)
"""Shape of one number for each operation of each edge."""

_KINDS = len(CELL_TYPES) * NUM_OPERATIONS

# The grid of tau_kind^2 and of tau_edge^2, against sigma^2. Each has 2 * 14 * 7/8 = 24.5 times its
# value in the variance of uniformly drawn architectures' scores: none, or from a thousandth of the
# noise to ten thousand times the noise.
_VARIANCES = np.concatenate([[0.0], np.logspace(-3, 4, 43)]) / (
    len(CELL_TYPES) * NUM_EDGES * (1 - 1 / NUM_OPERATIONS)
)

# So much of the scores' spread remains unexplained, at least.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Credit:
    """Effects of the operations on the score, and how well they are known.

    Attributes:
        effects: f64[2, 14, 8], kind plus edge; only differences within an edge mean anything.
        covariance: f64[2, 14, 8, 8], of the effects of each edge, by the posterior.
        intercepts: f64[groups], in the order of the groups' numbers.
        kind_penalty: sigma^2 / tau_kind^2; infinite where the kinds explain nothing.
        edge_penalty: sigma^2 / tau_edge^2; infinite where the edges do not differ.
        noise: sigma, of a score of weight 1, in units of the score.
    """

    effects: np.ndarray
    covariance: np.ndarray
    intercepts: np.ndarray
    kind_penalty: float
    edge_penalty: float
    noise: float

    def predict(self, architectures: np.ndarray) -> np.ndarray:
        """Return the expected scores f64[n] of architectures int[n, 2, 14] in the last group."""
        chosen = np.take_along_axis(self.effects[None], np.asarray(architectures)[..., None], -1)
        return self.intercepts[-1] + chosen[..., 0].sum(axis=(1, 2))

    def probability_below_best(self, survivors: np.ndarray) -> np.ndarray:
        """Return how probably each effect lies below that of its edge's best survivor.

        Args:
            survivors: bool[2, 14, 8].

        Returns:
            f64[2, 14, 8]: 0 for the best itself and for what does not survive.
        """
        best = _best(self.effects, survivors)[..., None]
        variances = np.diagonal(self.covariance, axis1=-2, axis2=-1)
        shared = np.take_along_axis(self.covariance, best[..., None], axis=-1)[..., 0]
        variance = variances + np.take_along_axis(variances, best, axis=-1) - 2 * shared
        difference = np.take_along_axis(self.effects, best, axis=-1) - self.effects
        # A difference without an error is certain, none at all says nothing.
        error = np.sqrt(np.maximum(variance, np.finfo(np.float64).tiny))
        probability = np.where(survivors, special.ndtr(difference / error), 0.0)
        np.put_along_axis(probability, best, 0.0, axis=-1)
        return probability


Estimate = Callable[..., np.ndarray]
"""(architectures, scores, weights=, groups=) -> effects f64[2, 14, 8]; NaN where unknown."""


def ridge(
    architectures: np.ndarray,
    scores: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Credit:
    """Estimate the effects of operations from scored architectures.

    Args:
        architectures: int[n, 2, 14], positions in `OPERATIONS`.
        scores: f[n], such as an accuracy or a log-likelihood.
        weights: f[n], positive, how much each observation counts; 1 when not given.
        groups: int[n], what was scored with the same weights of the supernet: each group has an
            intercept of its own, so that a supernet's progress is credited to no operation. One
            group when not given.

    Returns:
        The credit. Where the scores within the groups are all equal, effects and covariance are 0.

    Raises:
        ValueError: shapes that do not fit, a score or weight that is not finite or a weight that is
            not positive, or fewer than two scores more than groups.
    """
    architectures, scores, weights, groups = _checked(architectures, scores, weights, groups)
    count = int(groups.max()) + 1
    freedom = len(scores) - count
    if freedom < 2:
        raise ValueError(f"{len(scores)} scores in {count} groups; there must be two more")
    hot = _one_hot(architectures)
    kinds, edges = hot.sum(axis=2).reshape(len(hot), -1), hot.reshape(len(hot), -1)
    roots = np.sqrt(weights)

    def without_levels(values: np.ndarray) -> np.ndarray:
        levels = _group_means(values, weights, groups)[groups]
        return roots.reshape(-1, *[1] * (values.ndim - 1)) * (values - levels)

    design = without_levels(np.concatenate([kinds, edges], axis=1))
    target = without_levels(scores)
    gram, projected, total = design.T @ design, design.T @ target, float(target @ target)
    # Differences of rounding are no spread.
    if total <= freedom * (np.finfo(np.float64).eps * np.abs(scores).max()) ** 2:
        intercepts = _group_means(scores, weights, groups)
        nothing = np.zeros((*EFFECTS, NUM_OPERATIONS))
        return Credit(np.zeros(EFFECTS), nothing, intercepts, np.inf, np.inf, 0.0)
    kind, edge = _most_likely(gram, projected, total, freedom)
    prior = np.repeat([kind, edge], [_KINDS, gram.shape[0] - _KINDS])
    values, vectors = np.linalg.eigh(np.sqrt(prior)[:, None] * gram * np.sqrt(prior))
    # The posterior's covariance, against sigma^2, is this times its transpose.
    root = np.sqrt(prior)[:, None] * vectors / np.sqrt(1.0 + np.maximum(values, 0.0))
    coefficients = root @ (root.T @ projected)
    variance = max(total - float(projected @ coefficients), total * _ROUNDING) / freedom
    effects, factors = _effects(coefficients), _effects(root)
    rest = scores - np.einsum("nceo,ceo->n", hot, effects)
    return Credit(
        effects=effects,
        covariance=variance * np.einsum("ceik,cejk->ceij", factors, factors),
        intercepts=_group_means(rest, weights, groups),
        kind_penalty=1.0 / kind if kind else np.inf,
        edge_penalty=1.0 / edge if edge else np.inf,
        noise=float(np.sqrt(variance)),
    )


def _most_likely(
    gram: np.ndarray, projected: np.ndarray, total: float, freedom: int
) -> tuple[float, float]:
    """Return tau_kind^2 and tau_edge^2, against sigma^2, of the largest restricted likelihood.

    With inputs K (kinds) and E (edges), from which the groups' levels are taken off, the scores
    have the covariance sigma^2 (A + tau_kind^2 K K') with A = I + tau_edge^2 E E'. A is diagonal in
    one eigenbasis of E'E for every tau_edge, and K has 16 columns.

    Args:
        gram: f64[240, 240], inner products of the inputs, the 16 kinds first.
        projected: f64[240], of the inputs with the scores.
        total: of the scores with themselves.
        freedom: number of scores less that of groups.
    """
    values, basis = np.linalg.eigh(gram[_KINDS:, _KINDS:])
    values = np.maximum(values, 0.0)
    crossed = basis.T @ gram[_KINDS:, :_KINDS]
    seen = basis.T @ projected[_KINDS:]
    best, chosen = np.inf, (0.0, 0.0)
    for edge in _VARIANCES:
        ratios = edge / (1.0 + edge * values)
        # K' A^-1 K, K' A^-1 y and y' A^-1 y.
        inner = gram[:_KINDS, :_KINDS] - crossed.T @ (ratios[:, None] * crossed)
        known = projected[:_KINDS] - crossed.T @ (ratios * seen)
        rest = total - ratios @ seen**2
        inside, turned = np.linalg.eigh(inner)
        inside = np.maximum(inside, 0.0)
        shrunk = _VARIANCES[:, None] / (1.0 + _VARIANCES[:, None] * inside)
        unexplained = np.maximum(rest - shrunk @ (turned.T @ known) ** 2, total * _ROUNDING)
        deviance = freedom * np.log(unexplained) + np.log1p(_VARIANCES[:, None] * inside).sum(1)
        deviance += np.log1p(edge * values).sum()
        position = int(np.argmin(deviance))
        if deviance[position] < best:
            best, chosen = deviance[position], (_VARIANCES[position], edge)
    return float(chosen[0]), float(chosen[1])


def ridge_effects(
    architectures: np.ndarray,
    scores: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Return the effects of `ridge`, f64[2, 14, 8]."""
    return ridge(architectures, scores, weights=weights, groups=groups).effects


def mean_scores(
    architectures: np.ndarray,
    scores: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Return the mean score of the architectures with each operation, what eq. 4.16 compares.

    Args:
        architectures: as of `ridge`.
        scores: likewise.
        weights: likewise.
        groups: likewise; the mean of its group is taken off each score.

    Returns:
        f64[2, 14, 8], NaN for an operation that no architecture has on that edge.

    Raises:
        ValueError: shapes or values as of `ridge`.
    """
    architectures, scores, weights, groups = _checked(architectures, scores, weights, groups)
    hot = _one_hot(architectures)
    centred = scores - _group_means(scores, weights, groups)[groups]
    sums = np.einsum("n,nceo->ceo", weights * centred, hot)
    counts = np.einsum("n,nceo->ceo", weights, hot)
    return np.divide(sums, counts, out=np.full(EFFECTS, np.nan), where=counts > 0)


def agreement(first: np.ndarray, second: np.ndarray, survivors: np.ndarray) -> float:
    """Return the correlation of two estimates of the effects, of what decides within edges.

    Args:
        first: f[2, 14, 8]; NaN where unknown, which is left out.
        second: likewise.
        survivors: bool[2, 14, 8], the operations that are compared.

    Returns:
        The correlation of the effects after their mean over the survivors of each edge is taken
        off; 0 where one of the two does not differ within any edge.
    """
    used = survivors & np.isfinite(first) & np.isfinite(second)
    counts = np.maximum(used.sum(axis=-1, keepdims=True), 1)

    def centred(effects: np.ndarray) -> np.ndarray:
        known = np.where(used, effects, 0.0)
        return (known - known.sum(axis=-1, keepdims=True) / counts)[used]

    a, b = centred(first), centred(second)
    scale = np.sqrt((a @ a) * (b @ b))
    # Rounding must not lead beyond a correlation.
    return float(np.clip(a @ b / scale, -1.0, 1.0)) if scale > 0 else 0.0


def spearman_brown(correlation: float, factor: float) -> float:
    """Return the reliability of `factor` times as many observations.

    Args:
        correlation: between two repetitions; one that is not positive is noise and returned as
            it is.
        factor: of the number of observations.
    """
    if correlation <= 0:
        return correlation
    return factor * correlation / (1.0 + (factor - 1.0) * correlation)


def reliability(
    architectures: np.ndarray,
    scores: np.ndarray,
    survivors: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    rounds: np.ndarray | None = None,
    estimate: Estimate = ridge_effects,
    splits: int = 8,
    seed: int = 0,
) -> float:
    """Return how well an estimate of the effects would repeat itself with other architectures.

    The observations are halved at random, each group by itself; the agreement of the two halves'
    estimates is averaged over the splits and stepped up to the full number by Spearman-Brown. For
    means that is exact; for ridge, which shrinks halves more, about right (tests say how much).

    What was drawn without replacement must stay together: what one half has of a round the other
    has not, and as the scores of a round have about the same sum, the halves would agree too well.

    Args:
        architectures: as of `ridge`.
        scores: likewise.
        survivors: bool[2, 14, 8], the operations that are compared.
        weights: as of `ridge`.
        groups: likewise.
        rounds: int[n], observations of the same group and round stay in the same half; each stays
            by itself when not given.
        estimate: `ridge_effects`, `mean_scores`, or what is called like them.
        splits: how many random halvings.
        seed: decides them.

    Raises:
        ValueError: as `ridge` of a half.
    """
    architectures, scores, weights, groups = _checked(architectures, scores, weights, groups)
    together = np.arange(len(scores)) if rounds is None else np.asarray(rounds)
    blocks, block_of = np.unique(np.stack([groups, together]), axis=1, return_inverse=True)
    # The raw stream, which numpy promises to keep.
    keys = np.random.PCG64(seed).random_raw((splits, 2 * blocks.shape[1]))
    found = []
    for own in keys:
        in_second = np.zeros(blocks.shape[1], bool)
        # Group after group, in a random order: those of a single round are halved at random too.
        of_rounds, of_groups = np.split(own, 2)
        in_second[np.lexsort((of_rounds, of_groups[blocks[0]]))[1::2]] = True
        first, second = (
            estimate(architectures[half], scores[half], weights=weights[half], groups=groups[half])
            for half in (~in_second[block_of.ravel()], in_second[block_of.ravel()])
        )
        found.append(agreement(first, second, survivors))
    return spearman_brown(float(np.mean(found)), 2.0)


def drops(credit: Credit, survivors: np.ndarray, certainty: float) -> np.ndarray:
    """Choose what a stage drops: the worst where most are left, elsewhere what is certainly worse.

    On every edge with the largest number of survivors the one with the smallest effect goes, so
    that a search ends. Any other, on any edge, goes if by the posterior it lies below the best of
    its edge with a probability above `certainty`. The best of an edge always stays. Of equal
    effects the one at the lowest position in `OPERATIONS` is the worst, the highest the best.

    Args:
        credit: of the scores of this stage.
        survivors: bool[2, 14, 8], at least one on every edge, on some edge two.
        certainty: from 0.5 to 1; at 1 no further ones go.

    Returns:
        What is dropped, bool[2, 14, 8].

    Raises:
        ValueError: nothing can be dropped, an edge has no survivor, or `certainty` is out of range.
    """
    if not 0.5 <= certainty <= 1:
        raise ValueError(f"certainty is {certainty}; it must be from 0.5 to 1")
    left = survivors.sum(axis=-1)
    if left.min() < 1 or left.max() < 2:
        raise ValueError(
            f"edges have {left.min()} to {left.max()} surviving operations; at least one on every "
            "edge and two on one are needed"
        )
    dropped = survivors & (credit.probability_below_best(survivors) > certainty)
    worst = np.argmin(np.where(survivors, credit.effects, np.inf), axis=-1)[..., None]
    most = (left == left.max())[..., None]
    np.put_along_axis(dropped, worst, np.take_along_axis(dropped, worst, -1) | most, axis=-1)
    return dropped


def _checked(
    architectures: np.ndarray,
    scores: np.ndarray,
    weights: np.ndarray | None,
    groups: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the observations with every default in place and the groups numbered from 0."""
    architectures = np.asarray(architectures)
    scores = np.asarray(scores, np.float64)
    count = len(scores)
    weights = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    groups = np.zeros(count, int) if groups is None else np.asarray(groups)
    shapes = (architectures.shape, scores.shape, weights.shape, groups.shape)
    if shapes != ((count, *SHAPE), (count,), (count,), (count,)):
        raise ValueError(
            f"architectures, scores, weights and groups have shapes {shapes}; they must be "
            "(n, 2, 14), (n,), (n,) and (n,)"
        )
    if not (np.isfinite(scores).all() and np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError("scores must be finite, weights finite and positive")
    return architectures, scores, weights, np.unique(groups, return_inverse=True)[1]


def _one_hot(architectures: np.ndarray) -> np.ndarray:
    """Return f64[n, 2, 14, 8], 1 at each edge's operation."""
    return np.eye(NUM_OPERATIONS)[architectures]


def _group_means(values: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the weighted means f64[groups, ...] of values f64[n, ...] over each group."""
    members = np.eye(int(groups.max()) + 1)[groups] * weights[:, None]
    totals = members.sum(axis=0).reshape(-1, *[1] * (values.ndim - 1))
    return np.tensordot(members, values, (0, 0)) / totals


def _effects(coefficients: np.ndarray) -> np.ndarray:
    """Return kind plus edge, [2, 14, 8, ...], of coefficients [kinds + edges, ...]."""
    rest = coefficients.shape[1:]
    kinds = coefficients[:_KINDS].reshape(SHAPE[0], 1, NUM_OPERATIONS, *rest)
    return kinds + coefficients[_KINDS:].reshape(*EFFECTS, *rest)


def _best(effects: np.ndarray, survivors: np.ndarray) -> np.ndarray:
    """Return the position of each edge's largest effect, int[2, 14]; the highest of equals."""
    masked = np.where(survivors, effects, -np.inf)[..., ::-1]
    return NUM_OPERATIONS - 1 - np.argmax(masked, axis=-1)
