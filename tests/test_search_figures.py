"""Figures of a search: what is in them, against the log."""

import re
import xml.etree.ElementTree as ElementTree

import made_runs
import numpy as np
import pytest

from cpnas_jax import config as configs
from cpnas_jax.architecture.events import epoch_line, sample_line
from cpnas_jax.architecture.film import film, thinned
from cpnas_jax.architecture.parsing import parse_events
from cpnas_jax.figures import KIND_COLOURS, figure_bytes, kind
from cpnas_jax.models.space import OPERATIONS
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search_figures import (
    draw_accuracies,
    film_figure,
    kind_shares,
    operations_left_figure,
    relative,
)
from cpnas_jax.training_figures import training_figure

SVG = "{http://www.w3.org/2000/svg}"


def lines(epochs):
    generator = np.random.default_rng(0)
    stages = [stage for stage in range(8, 1, -1) for _ in range(stage)]
    return [
        sample_line(
            stage=stage,
            round_index=1,
            sample=1,
            architecture=np.zeros((2, 14), int),
            child_accuracy=generator.uniform(),
            parent_accuracy=generator.uniform(),
            z=0.5,
            seconds=1,
        )
        for stage in stages[:epochs]
    ]


@pytest.mark.parametrize("epochs", [1, 9, 35])
def test_accuracies_are_drawn_with_their_stages(epochs, tmp_path):
    png, svg = draw_accuracies(iter(lines(epochs)), tmp_path)
    first = svg.read_bytes()
    root = ElementTree.fromstring(first)
    texts = {"".join(element.itertext()).strip() for element in root.iter(f"{SVG}text")}
    stages = {line["stage"] for line in lines(epochs)}
    assert {text for text in texts if text.startswith("K = ")} == {f"K = {k}" for k in stages}
    draw_accuracies(lines(epochs), tmp_path)
    assert svg.read_bytes() == first
    assert png.name == "accuracies.png"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("event", "missing", "label"),
    [("sample", "parent", "sampled epoch"), ("epoch", "child", "epoch")],
)
def test_a_model_that_was_not_trained_is_not_drawn(tmp_path, event, missing, label):
    drawn = lines(9)
    if event == "epoch":
        alpha = {cell: np.zeros((14, 8)) for cell in ("normal", "reduce")}
        drawn = [
            epoch_line(
                epoch=n, accuracies={"parent": 0.5}, losses={}, objective=0, alpha=alpha, seconds=1
            )
            for n in range(1, 6)
        ]
    for line in drawn:
        line[f"{missing}_accuracy"] = None
    text = draw_accuracies(drawn, tmp_path)[1].read_text()
    assert (f"{missing} (" in text, f">{label}<" in text) == (False, True)


def test_a_bad_history_is_refused(tmp_path):
    with pytest.raises(UserError, match="no sampled epoch"):
        draw_accuracies([], tmp_path)
    with pytest.raises(UserError, match="line 2: there is no key 'stage'"):
        draw_accuracies([lines(1)[0], {"event": "sample"}], tmp_path)
    assert not list(tmp_path.iterdir())


def texts_of(svg):
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def frames_of(strategy, **settings):
    config = configs.base_config()
    config.search.update(strategy=strategy, rounds=1, **settings)
    lines = made_runs.search_lines(config)
    return film(parse_events(lines), config.search.operations), lines


def test_a_film_draws_every_operation_and_every_drop():
    frames, _ = frames_of("cp")
    text = figure_bytes(film_figure(frames), "svg").decode()
    texts = texts_of(text)
    assert [t for t in texts if t and t.startswith("K = ")] == [
        f"K = {k}" for k in range(8, 1, -1)
    ] * 2
    # 28 edges with 8, 7, ... 2 operations, and one cross for each drop.
    assert len(re.findall(r"stroke: #ffffff", text)) == 28 * 35
    assert len(re.findall(r"<use ", text)) == 28 * 7


def test_relative_values_go_from_an_edges_smallest_to_its_largest():
    present = np.zeros((2, 14, 8), bool)
    present[0, 0, :3] = present[0, 1, :2] = present[1, 5, 4] = True
    values = np.where(present, 0.5, np.nan)
    values[0, 0, :3] = [-1.0, 0.0, 3.0]
    values[0, 1, :2] = np.nan
    found = relative(values, present)
    np.testing.assert_array_equal(found[0, 0], [0, 0.25, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found[0, 1], [0.5, 0.5, 0, 0, 0, 0, 0, 0])
    assert found[1, 5, 4] == 0.5
    assert found.sum() == 1.25 + 1 + 0.5


def test_shares_of_the_operations_left():
    mask = np.random.default_rng(0).uniform(size=(2, 14, 8)) < 0.4
    names = [OPERATIONS[k] for k in np.nonzero(mask)[2]]
    shares = dict(zip(KIND_COLOURS, kind_shares(mask), strict=True))
    for name, share in shares.items():
        assert share == pytest.approx(np.mean([kind(operation) == name for operation in names]))
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("strategy", ["cp", "cp_gradient", "darts"])
def test_operations_left_are_told_at_every_drop(strategy):
    frames, lines = frames_of(strategy, epochs=24)
    texts = texts_of(figure_bytes(operations_left_figure(frames, len(lines)), "svg"))
    drops = [224 - 28 * n for n in range(8)] if strategy != "darts" else [224]
    assert [int(t) for t in texts if t.strip() in map(str, drops) and int(t) > 20] == drops


def test_training_has_a_panel_for_every_term_that_is_not_always_zero():
    trainings = {"train": made_runs.metrics_lines(5), "parent": made_runs.metrics_lines(4, False)}
    terms = ("cross_entropy", "auxiliary", "reconstruction", "center", "parent")
    texts = set(texts_of(figure_bytes(training_figure(trainings, terms), "svg")))
    titles = {"accuracy, %", "loss", "cross entropy", "learning rate"}
    assert titles | {"reconstruction, eq. 4.17", "center, eq. 4.18"} <= texts
    assert not texts & {"auxiliary", "parent"}
    assert {"child (1-bit), evaluated", "parent (float), training"} <= texts


def test_a_film_is_thinned_but_for_drops():
    frames, _ = frames_of("cp_gradient", epochs=50)
    short = thinned(frames, 10)
    assert len(short) == 10
    assert (short[0], short[-1]) == (frames[0], frames[-1])
    dropping = [frame.name for frame in frames if frame.dropped.any()]
    assert [frame.name for frame in short if frame.dropped.any()] == dropping
    frames, _ = frames_of("darts", epochs=50)
    epochs = [frame.epoch for frame in thinned(frames, 10)]
    assert (len(epochs), epochs[0], epochs[-1]) == (10, 1, 50)
    assert np.ptp(np.diff(epochs)) <= 1
    assert thinned((), 10) == ()
    assert thinned(frames[:1], 10) == frames[:1]
