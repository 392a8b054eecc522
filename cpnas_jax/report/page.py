"""The report of a run: `report.html` and the figures beside it, from the files of a workdir."""

import functools
import os
import pathlib
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from ml_collections import config_dict

from cpnas_jax import search_figures
from cpnas_jax.architecture.dot import to_dot
from cpnas_jax.architecture.notation import to_darts
from cpnas_jax.config_rules import GRADIENT_STRATEGIES
from cpnas_jax.figures import SHORT_NAMES, TITLES, cells_figure, figure_bytes, kind
from cpnas_jax.models.space import CELL_TYPES, OPERATIONS
from cpnas_jax.report import answers, running, searching
from cpnas_jax.report.contents import Contents, read_contents
from cpnas_jax.report.embedding import inline_svg, palette
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.atomic import write_atomically
from cpnas_jax.runtime.console import Reporter, duration
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.train_step import LOSS_TERMS
from cpnas_jax.training_figures import training_figure

NAME = "report.html"
FILM_FRAMES = 8
"""Frames of `film.svg`; more than fit into a column of a paper where more drop something."""


def report_mode(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Write the report of the run in a workdir, also while it runs; its own config is read there.

    Raises:
        UserError: there is no run, or one of its files is damaged; nothing is written then.
    """
    del config
    written = processes.from_first(lambda: write_report(workdir))
    reporter.say(f"Wrote {', '.join(str(path) for path in written)}.")


def refresh(workdir: str | os.PathLike[str], reporter: Reporter) -> None:
    """Write the report at the end of a phase, whose results do not depend on it.

    What keeps it from being written is said, and does not fail the phase.
    """

    def attempt() -> str:
        try:
            return f"Wrote {write_report(workdir)[0]}."
        except UserError as error:
            return f"warning: {NAME} is not written: {error}"
        # Of files that were altered by hand, values that nothing expects.
        except Exception as error:
            reason = " ".join(str(error).split())
            return f"warning: {NAME} is not written: {type(error).__name__}: {reason}"

    reporter.say(processes.from_first(attempt))


def write_report(workdir: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Write `report.html` and the figures it has as SVG files; return their paths.

    Raises:
        UserError: there is no run, or one of its files is damaged; nothing is written then.
    """
    contents = read_contents(workdir)
    figures = _figures(contents)
    files = {f"{name}.svg": figure_bytes(figure, "svg") for name, figure in figures.items()}
    page = render(contents, files)
    # The film has its place on the page as tables.
    frames = searching.frames_of(contents)
    if frames:
        film = search_figures.film_figure(searching.thinned(frames, FILM_FRAMES))
        files["film.svg"] = figure_bytes(film, "svg")
    paths: list[Any] = []
    for name, data in {NAME: page.encode(), **files}.items():
        path = contents.path / name
        # A finished run that is looked at again stays as it is.
        if not path.exists() or path.read_bytes() != data:
            write_atomically(path, data)
        paths.append(path)
    return paths


def _figures(contents: Contents) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    if contents.genotype is not None:
        figures["cells"] = cells_figure(contents.genotype)
    frames = searching.frames_of(contents)
    epochs = max((frame.epoch for frame in frames), default=0)
    if epochs:
        figures["accuracies"] = search_figures.accuracies_figure(contents.events)
        figures["operations"] = search_figures.operations_left_figure(frames, epochs)
    curves = {training.name: training.lines for training in contents.trainings if training.lines}
    if curves:
        figures["training"] = training_figure(curves, LOSS_TERMS)
    return figures


_LABELS = {
    "cells": "The normal and the reduction cell as graphs; the table of operations below says the "
    "same in words.",
    "accuracies": "Validation accuracy of child and parent over the epochs of the search, and "
    "their gap.",
    "operations": "Share of convolutions, pooling, skip connections and none among the operations "
    "left, over the search.",
    "training": "Accuracies, loss, its terms and the learning rate over the epochs of training.",
}


def render(contents: Contents, figures: dict[str, bytes]) -> str:
    """Return the page.

    Args:
        contents: of the workdir.
        figures: file name -> SVG of those that there are.
    """
    frames = searching.frames_of(contents)
    searched = running.search_state(contents)
    trainings = [running.training_state(contents, training) for training in contents.trainings]
    drawings = {
        file.removesuffix(".svg"): inline_svg(data, file.removesuffix(".svg"), label)
        for file, data in figures.items()
        if (label := _LABELS.get(file.removesuffix(".svg")))
    }
    return _template().render(
        title=contents.path.resolve().name or str(contents.path),
        path=str(contents.path),
        light=palette(dark=False),
        dark=palette(dark=True),
        style=Markup((_DIRECTORY / "page.css").read_text()),
        drawings=drawings,
        keys=contents.keys,
        differing=running.differing_keys(contents.keys),
        machines=running.machines(contents),
        genotype=_cells(contents),
        searched=searched,
        frames=searching.frame_names(frames) if frames else [],
        every_frame_shown=len(frames) <= searching.MOST_FRAMES,
        decisions=[_decision(frame) for frame in frames if frame.dropped.any()],
        frames_of_fate=searching.lateness(frames),
        value_name=_value_name(contents),
        cells=searching.cells_of(frames, contents.genotype) if frames else [],
        trainings=trainings,
        answers={training.name: answers.answers_of(training) for training in contents.trainings},
        summary=contents.summary,
        shipped={running.TRAINING_TITLES[name]: own for name, own in contents.shipped.items()},
        costs=running.costs(contents, searched),
        commands=running.commands(contents),
        kinds={name: kind(name) for name in OPERATIONS},
        short=SHORT_NAMES,
    )


def _value_name(contents: Contents) -> str:
    """Say what a frame's values are."""
    strategy = contents.keys.get("search.strategy", "cp")
    if strategy == "cp_plus":
        return "the effect on z, by ridge regression"
    return "the softmax of alpha" if strategy in GRADIENT_STRATEGIES else "e of eq. 4.16"


def _decision(frame: searching.Frame) -> dict[str, Any]:
    counts = {
        name: int(frame.dropped[..., position].sum()) for position, name in enumerate(OPERATIONS)
    }
    return {
        "name": frame.name,
        "epoch": frame.epoch,
        "dropped": {name: count for name, count in counts.items() if count},
        "left": int(frame.left.sum()),
    }


def _cells(contents: Contents) -> dict[str, Any] | None:
    genotype = contents.genotype
    if genotype is None:
        return None
    return {
        "darts": to_darts(genotype),
        "dot": to_dot(genotype),
        "policy": genotype.edge_policy,
        "counts": genotype.operation_counts(),
        "titles": {cell: TITLES[cell] for cell in CELL_TYPES},
        "provenance": dict(genotype.provenance),
    }


_DIRECTORY = pathlib.Path(__file__).parent


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_DIRECTORY),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["percent"] = lambda share, digits=1: f"{100 * share:.{digits}f} %"
    environment.filters["grouped"] = lambda value: f"{value:,.0f}"
    environment.filters["shown"] = lambda value: (
        ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    )
    return environment.get_template("page.html.jinja")
