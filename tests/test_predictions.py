"""Which examples are kept as images, and the file that they are kept in."""

import dataclasses

import made_runs
import numpy as np
import pytest

from cpnas_jax import predictions
from cpnas_jax.runtime.errors import UserError


def test_wrong_ones_come_first_the_surest_ahead_then_right_ones_of_every_class():
    found = made_runs.evaluation(5, 200)
    rows = predictions.rows_to_show(found)
    right = found.answers[rows] == found.labels[rows]
    assert right.tolist() == [False] * 12 + [True] * 12
    assert len(set(rows.tolist())) == 24
    shown, wrong = found.confidences[rows[:12]], found.answers != found.labels
    assert (np.diff(shown) <= 0).all()
    assert (np.sort(found.confidences[wrong])[-12:] == shown[::-1]).all()
    # In turn, the classes that come first in the split's order of their right answers.
    np.testing.assert_array_equal(found.labels[rows[12:]], [*range(5), *range(5), 0, 1])


def test_what_was_not_counted_is_not_shown():
    found = made_runs.evaluation(3, 20)
    lost = np.arange(20) % 2 == 0
    found = dataclasses.replace(
        found,
        answers=np.where(lost, -1, found.answers).astype(np.int32),
        labels=np.where(lost, -1, found.labels).astype(np.int32),
    )
    assert sorted(predictions.rows_to_show(found).tolist()) == list(range(1, 20, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_comes_back(tmp_path, channels):
    found = made_runs.evaluation(3, 20)
    feed = made_runs.Images(4, channels)
    (tmp_path / "a.npz").write_bytes(predictions.encoded(found, feed))
    kept = predictions.load(tmp_path / "a.npz")
    for name in ("answers", "labels", "confidences"):
        np.testing.assert_array_equal(kept[name], getattr(found, name))
    np.testing.assert_array_equal(kept["rows"], predictions.rows_to_show(found))
    np.testing.assert_array_equal(kept["images"], feed.test_images(kept["rows"]))
    assert predictions.load(tmp_path / "none.npz") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(3, np.int32)}, "answers is int32"),
        ({"answers": np.zeros(20)}, "answers is float64"),
        ({"rows": np.array([20])}, "rows must be positions below 20"),
        ({"images": np.zeros((1, 2, 2, 3))}, "images is float64"),
        ({"images": np.zeros((2, 2, 2, 3), np.uint8)}, r"images is uint8\[2, 2, 2, 3\]"),
        (
            {"rows": np.arange(2), "images": np.zeros((2, 2, 2, 2), np.uint8)},
            "2 channels; it must be 1 or 3",
        ),
    ],
)
def test_a_file_that_says_nonsense_is_named(tmp_path, change, message):
    (tmp_path / "a.npz").write_bytes(
        predictions.encoded(made_runs.evaluation(3, 20), made_runs.Images(4, 3))
    )
    kept = predictions.load(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", **{**kept, **change})
    with pytest.raises(UserError, match=f"a.npz is damaged .*{message}.*`evaluate`"):
        predictions.load(tmp_path / "a.npz")
