import numpy as np
import pytest
from scipy import stats

from cpnas_jax.architecture.kendall import kendall_tau


@pytest.mark.parametrize("steps", [0, 4])
def test_kendall_tau_is_scipys_with_and_without_ties(steps):
    generator = np.random.default_rng(0)
    a = generator.normal(size=30)
    b = a + generator.normal(size=30)
    if steps:
        a, b = np.round(a * steps), np.round(b * steps)
        assert len(set(a)) < 30
    tau = kendall_tau(a, b)
    assert tau.value == pytest.approx(stats.kendalltau(a, b).statistic)
    rows = np.random.PCG64(0).random_raw((1000, 30)) % np.uint64(30)
    resampled = [stats.kendalltau(a[own], b[own]).statistic for own in rows[:300]]
    few = kendall_tau(a, b, resamples=300)
    np.testing.assert_allclose([few.low, few.high], np.quantile(resampled, [0.025, 0.975]))
    assert tau.n == 30
    assert tau == kendall_tau(a, b)
    assert kendall_tau(a, a).low == pytest.approx(1)
    assert kendall_tau(a, -a).high == pytest.approx(-1)


def test_the_interval_of_tau_holds_the_truth_about_as_often_as_it_says():
    truth, inside = 2 / np.pi * np.arcsin(0.5), 0
    for seed in range(200):
        pair = np.random.default_rng(seed).multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 40)
        tau = kendall_tau(*pair.T, confidence=0.8, resamples=200)
        inside += tau.low < truth < tau.high
    assert 0.72 <= inside / 200 <= 0.86


def test_what_has_no_ranking_is_refused():
    scores = np.arange(16.0)
    with pytest.raises(ValueError, match="shapes"):
        kendall_tau(scores, scores[:3])
    with pytest.raises(ValueError, match="different"):
        kendall_tau(scores, np.zeros(16))
