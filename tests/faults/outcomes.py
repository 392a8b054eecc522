"""What a run has led to, durations apart: all that kills and damage on the way may not change."""

import json

TIMES = ("seconds", "images_per_second")


def numbers(directory):
    """Return the numbers of the checkpoints in a directory, ascending."""
    if not directory.exists():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def last_digest(directory):
    """Return number and digest of the newest checkpoint: weights, optimizers and all else."""
    newest = numbers(directory)[-1]
    path = directory / str(newest) / "record" / "metadata"
    return newest, json.loads(path.read_text())["digest"]


def lines(path):
    """Return a log's lines without their durations."""
    return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]


def results(workdir, phase):
    """Return what `results.json` says of a phase, without durations."""
    return _timeless(json.loads((workdir / "results.json").read_text())[phase])


def search_outcome(workdir):
    """Return genotype, history, results and last state of a finished search."""
    return {
        "genotype.json": (workdir / "genotype.json").read_text(),
        "history.jsonl": lines(workdir / "search/history.jsonl"),
        "results.json": results(workdir, "search"),
        "state": last_digest(workdir / "search/checkpoints"),
    }


def train_outcome(workdir, name="train"):
    """Return metrics, results, last and best state of a finished training."""
    return {
        "metrics.jsonl": lines(workdir / name / "metrics.jsonl"),
        "results.json": results(workdir, name),
        "state": last_digest(workdir / name / "checkpoints"),
        "best state": last_digest(workdir / name / "best"),
    }


OUTCOMES = {"search": search_outcome, "train": train_outcome}


def differing(found, expected):
    """Return the names of the parts in which two outcomes differ."""
    return [name for name in expected if found[name] != expected[name]]


def _timeless(entry):
    return {key: value for key, value in entry.items() if key not in TIMES}
