"""What benchmarks/indicator_report.py makes of files in which the truth is known."""

import json
import shutil

import indicator
import indicator_report
import numpy as np
import pytest

from cpnas_jax.architecture.genotype import from_architecture
from cpnas_jax.architecture.sampling import FIRST_STAGE
from cpnas_jax.models.space import OPERATIONS


def planted_rows(architectures, seed):
    """The child is good at what its convolutions are, the parent knows nothing."""
    worth = np.array(["conv" in name for name in OPERATIONS])
    draws = np.random.default_rng(seed).normal(scale=0.01, size=(4, len(architectures)))
    child = 0.3 + 0.01 * worth[architectures].sum(axis=(1, 2))
    return {
        "architectures": architectures.astype(np.int8),
        "accuracy": np.stack([child + draws[0], 0.4 + draws[1]]),
        "log_likelihood": np.stack([-2 + draws[2], -1 + draws[3]]),
    }


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    base = tmp_path_factory.mktemp("keep")
    (base / "step-0").mkdir()
    drawn = indicator.scored_architectures(120)
    rows = {f"frozen.{name}": values for name, values in planted_rows(drawn, 0).items()}
    indicator.save(base / "step-0/round04.npz", rows)
    for position in indicator.trained_positions(24):
        for seed in (0, 1) if position < 8 else (0,):
            own = planted_rows(drawn[position][None], 1000 * seed + position)
            path = base / f"alone/{position}-{seed}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"accuracy": own["accuracy"][0, 0]}))
    return base


def test_validity_and_spread_of_planted_scores(keep):
    supernets, trained = indicator_report.load(keep)
    assert list(supernets["step-0"]) == ["frozen 4"]
    assert set(trained) == {"alone"}
    table = indicator_report.validity(supernets, trained["alone"])
    assert table["counts"]["convolutions"].value > 0.6
    assert table["counts"]["convolutions"].n == 24
    for way in ("direct", "ridge"):
        found = table[f"step-0 frozen 4 {way}"]
        assert found["z 0"].low > 0.4
        assert found["z 3"].value < -0.3  # 3 A_P - 2 A_C
    assert abs(table["step-0 frozen 4 direct"]["z 1"].value) < 0.35
    # Where the scores know nothing, ridge predicts the same for all.
    assert "z 1" not in table["step-0 frozen 4 ridge"]
    spread = indicator_report.spread_of(trained["alone"])
    assert spread["n"] == 24
    assert spread["between_seeds"] == pytest.approx(0.01, rel=0.6)
    assert spread["between_architectures"] > 2 * spread["between_seeds"]


def test_what_is_predicted_takes_no_part_in_the_estimate(keep):
    supernets, _ = indicator_report.load(keep)
    rows = supernets["step-0"]["frozen 4"]
    positions = indicator.trained_positions(24)
    values = rows["accuracy"][0]
    spoilt = values.copy()
    spoilt[positions] = 1e6
    one, other = (
        indicator_report.predicted(rows, own, positions, rows) for own in (values, spoilt)
    )
    np.testing.assert_array_equal(one, other)


def test_scores_of_several_ages_are_carried_with_a_level_each(keep):
    supernets, trained = indicator_report.load(keep)
    (rows,) = supernets["step-0"].values()
    # The supernet's progress: all are better later.
    later = {**rows, "accuracy": rows["accuracy"] + 0.1, "groups": rows["groups"] * 0}
    of = {"frozen 1": rows, "frozen 4": rows, "frozen 12": later}
    found, values = indicator_report.carried(of, "z 0")
    assert set(found["groups"]) == {0, 1}
    assert len(values) == len(found["groups"]) == 2 * len(rows["architectures"])
    own = indicator_report.validity({"step-0": of}, trained["alone"])["step-0 carried ridge"]
    assert own["z 0"].low > 0.4


def test_means_are_compared_over_disjoint_rounds(keep):
    supernets, _ = indicator_report.load(keep)
    rows = supernets["step-0"]["frozen 4"]
    found = indicator_report.of_means(rows["architectures"], rows["accuracy"][0], 3)
    assert len(found) == 2  # five sets of three rounds, the last has no other
    assert -0.2 < np.mean(found) < 0.5


def test_what_is_trained_alone_can_be_trained():
    positions = indicator.trained_positions(40)
    drawn = indicator.scored_architectures(positions[-1] + 1)
    assert len(positions) == len(set(positions)) == 40
    for position, own in enumerate(drawn):
        if position in positions:
            from_architecture(own)
        else:
            with pytest.raises(ValueError, match="dead"):
                from_architecture(own)


@pytest.mark.parametrize("first", [0, 3, 8, 20])
def test_scored_architectures_are_whole_rounds_from_the_first_on(first):
    drawn = indicator.scored_architectures(64)
    start = first // FIRST_STAGE * FIRST_STAGE
    np.testing.assert_array_equal(
        indicator.scored_architectures(16, first), drawn[start : start + 16]
    )


def test_supernets_of_several_seeds_are_compared_pair_by_pair():
    drawn = indicator.scored_architectures(160)
    supernets = [
        {"frozen 4": {**planted_rows(drawn, seed), "groups": np.zeros(len(drawn), int)}}
        for seed in (1, 2, 3)
    ]
    found = indicator_report.between_seeds(supernets)
    means, by_ridge = found["frozen 4 z 0"]
    # The truth is the same, and additive: ridge finds it, means of 20 rounds in part.
    mean, low, high = (float(part.strip("[],")) for part in by_ridge.split())
    assert 0.8 < low <= mean <= high <= 1
    assert float(means.split()[0]) < mean
    # Of what a parent knows nothing of, supernets agree on nothing.
    assert abs(float(found["frozen 4 z 1"][0].split()[0])) < 0.3
    assert indicator_report.between_seeds(supernets[:1]) == {}


def test_carried_scores_are_more_reliable_than_those_of_an_age(keep):
    supernets, _ = indicator_report.load(keep)
    (rows,) = supernets["step-0"].values()
    later = {**rows, **planted_rows(indicator.scored_architectures(240)[120:], 5)}
    of = {"frozen 1": rows, "frozen 4": rows, "frozen 12": later}
    (whole,), number = indicator_report.reliability_of_carried(of, "z 0")
    (alone,) = indicator_report.by_halves(rows, rows["accuracy"][0], 120)
    assert number == 240
    assert whole > alone > 0.3


def test_the_report_of_two_supernets(keep, monkeypatch, tmp_path):
    shutil.copytree(keep, tmp_path, dirs_exist_ok=True)
    shutil.copytree(keep / "step-0", tmp_path / "step-1")
    whole = indicator_report.scores
    # Each score takes seconds.
    monkeypatch.setattr(indicator_report, "scores", lambda rows: {"z 0": whole(rows)["z 0"]})
    said = []
    indicator_report.report(tmp_path, said.append)
    found = json.loads(said[-1])
    first, second = (found["reliability"][f"step-{seed} frozen 4 z 0"] for seed in (0, 1))
    assert first == second
    assert list(first) == ["T=1", "T=3", "T=8", "n=24", "n=80", "all"]
    # The supernets are the same: their mean is each one's value, and they agree in all.
    value = first["all"].split()[0]
    heading = next(line for line in said if line.startswith("The same over the supernets, step"))
    together = said[said.index(heading) + 1]
    assert together.split()[:3] == ["frozen", "4", "z"]
    assert f"{value} [{value}, {value}]" in together
    assert found["reliability"]["seeds step frozen 4 z 0"][1] == "1.00 [1.00, 1.00]"
    assert found["validity"]["alone"]["step-1 frozen 4 ridge"]["z 0"][0] > 0.4
