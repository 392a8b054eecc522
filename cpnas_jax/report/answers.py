"""What a trained network answers, for its report: by class, confusions, and single examples."""

from typing import Any

import numpy as np

from cpnas_jax.report.contents import Training
from cpnas_jax.report.embedding import png_uri
from cpnas_jax.runtime.errors import UserError

MOST_CLASSES = 25
"""With more, the confusion matrix is no longer to be read: worst classes stand in its place."""

MOST_ROWS = 20
"""Rows of a list of the worst."""


def answers_of(training: Training) -> dict[str, Any] | None:
    """Return what the page shows of a network's answers; None where it was not evaluated."""
    found = training.evaluation
    if found is None:
        return None
    names, confusion = found["class_names"], np.array(found["confusion"], np.int64)
    confusion = confusion.reshape(len(names), len(names))
    return {
        "top1": found["top1"],
        "top5": found.get("top5"),
        "examples": found["examples"],
        "split": found.get("split", "test"),
        "checkpoint": found.get("checkpoint", "last"),
        "epoch": found["epoch"],
        "undecodable": found.get("undecodable", 0),
        "num_classes": len(names),
        "classes": _classes(names, confusion),
        "matrix": _matrix(names, confusion) if len(names) <= MOST_CLASSES else None,
        "confusions": _confusions(names, confusion),
        "shown": _shown(training, names),
    }


def _wrong(confusion: np.ndarray) -> np.ndarray:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    return wrong


def _classes(names: list[str], confusion: np.ndarray) -> list[dict[str, Any]]:
    """Return the classes that have examples, the worst first, at most `MOST_CLASSES`."""
    totals, wrong = confusion.sum(axis=1), _wrong(confusion)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "share": float(confusion[n, n] / totals[n]),
            "examples": int(totals[n]),
            "taken_for": names[int(wrong[n].argmax())] if wrong[n].any() else None,
            "times": int(wrong[n].max()),
        }
        for n, name in enumerate(names)
        if totals[n]
    ]
    return sorted(rows, key=lambda row: row["share"])[:MOST_CLASSES]


def _matrix(names: list[str], confusion: np.ndarray) -> list[dict[str, Any]]:
    totals = np.maximum(confusion.sum(axis=1), 1)
    return [
        {
            "name": name,
            "cells": [
                {"count": int(count), "share": float(count / totals[n]), "right": n == column}
                for column, count in enumerate(confusion[n])
            ],
        }
        for n, name in enumerate(names)
    ]


def _confusions(names: list[str], confusion: np.ndarray) -> list[dict[str, Any]]:
    """Return the most frequent mistakes."""
    wrong, totals = _wrong(confusion), confusion.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_ROWS]
    pairs = [divmod(int(place), len(names)) for place in order]
    return [
        {
            "name": names[label],
            "answer": names[answer],
            "times": int(wrong[label, answer]),
            "share": float(wrong[label, answer] / totals[label]),
        }
        for label, answer in pairs
        if wrong[label, answer]
    ]


def _shown(training: Training, names: list[str]) -> dict[str, list[dict[str, Any]]] | None:
    """Return the kept images, wrong and right, with what the network took them for."""
    kept = training.answers
    if kept is None:
        return None
    found: dict[str, list[dict[str, Any]]] = {"wrong": [], "right": []}
    for row, image in zip(kept["rows"].tolist(), kept["images"], strict=True):
        label, answer = int(kept["labels"][row]), int(kept["answers"][row])
        if not (0 <= label < len(names) and 0 <= answer < len(names)):
            raise UserError(
                f"{training.name}/predictions.npz: example {row} has the classes {label} and "
                f"{answer}; there are {len(names)} in {training.name}/evaluation.json. Run the "
                "same command with the mode `evaluate`"
            )
        found["right" if label == answer else "wrong"].append(
            {
                "uri": png_uri(image),
                "row": row,
                "label": names[label],
                "answer": names[answer],
                "confidence": float(kept["confidences"][row]),
            }
        )
    return found
