"""Damages checkpoints in every way and looks at what is restored; a table and a JSON line.

python tests/faults/damage.py [--flips 300] [--every-byte-up-to 400] [--command-line 4] [--seed 0]

Three directories are damaged: one of a small state, those of a smoke search and of a smoke
training on mnist5k. For each damage a fresh copy is damaged and restored, and the next checkpoint
is saved there, as a resumed run does. The exit status is 1 where anything but this was found:

  harmless    arrays and record of the newest checkpoint came back bit by bit
  fell back   those of the newest undamaged one did, and a warning named the damaged one
  refused     no undamaged one was left: an error in one line, nothing was touched
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from damages import FILE_KINDS, Damage, apply, file_damages, files_of_newest, flips
from damages import PLACE_KINDS as PLACES
from outcomes import OUTCOMES, differing, numbers

from cpnas_jax import main as command_line
from cpnas_jax.runtime.checkpoints import Checkpoints, silence_orphans
from cpnas_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
KEEP = 3
GOOD = HARMLESS, FELL_BACK, REFUSED = ("harmless", "fell back", "refused")
BAD = SILENT, LOST, UNNAMED, CRASHED, HUNG = ("SILENT CHANGE", "LOST", "UNNAMED", "CRASHED", "HUNG")
PATIENCE = 60.0
"""Seconds for one restore and one save on a loaded machine; they take a fraction of one."""
LARGEST_PROCESS = 16 * 2**30
"""Bytes of address space: a damaged size must not take the machine down."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """A directory of checkpoints and what was handed over to be saved there.

    Attributes:
        directory: of `Checkpoints`.
        states: number -> state (leaves in host memory) and record.
    """

    directory: pathlib.Path
    states: dict[int, tuple[Any, dict[str, Any]]]


def made(directory):
    """Save three small states of several dtypes."""
    states = {}
    with Checkpoints(directory, KEEP) as checkpoints:
        for number in (9, 10, 11):
            rng = np.random.default_rng(number)
            state = {
                "params": {"kernel": rng.normal(size=(40, 50)).astype(np.float32)},
                "optimizer": (rng.integers(0, 9, 7).astype(np.int32), np.asarray(0.5, np.float16)),
                "survivors": rng.random((2, 14, 8)) < 0.5,
                "key": rng.integers(0, 2**32, 2, np.uint32),
            }
            record = {"position": {"epoch": number}, "lines": [{"z": 0.1 * number}] * 3}
            states[number] = (state, record)
            checkpoints.save(number, state, record)
    return Saved(directory, states)


def same(found, number, saved):
    """Tell whether all that was restored is, bit by bit, what was saved under a number."""
    if number not in saved.states:
        return False
    state, record = saved.states[number]
    pairs = zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True)
    return (
        found.step == number
        and json.dumps(found.record) == json.dumps(record)
        and jax.tree.structure(found.state) == jax.tree.structure(state)
        and all(
            (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in pairs
        )
    )


def _contents(path):
    """Return name -> bytes of every file below a path."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


class _Warnings(logging.Handler):
    """Collects what is warned of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def examine(saved, damage, scratch):
    """Damage a copy, restore it and go on with it; return the verdict and its reason.

    Args:
        saved: what is copied.
        damage: what is done to the copy.
        scratch: a directory; the copy in it is deleted again.
    """
    copy = pathlib.Path(tempfile.mkdtemp(dir=scratch)) / "checkpoints"
    shutil.copytree(saved.directory, copy)
    apply(damage, copy)
    whole = [
        n for n in saved.states if _contents(copy / str(n)) == _contents(saved.directory / str(n))
    ]
    warnings = _Warnings()
    logger = logging.getLogger("cpnas_jax.runtime.checkpoints")
    logger.addHandler(warnings)
    try:
        return _verdict(saved, copy, whole, warnings)
    # Whatever is not a UserError would be a traceback to the user.
    except Exception as error:
        return CRASHED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        logger.removeHandler(warnings)
        shutil.rmtree(copy.parent)


def _verdict(saved, copy, whole, warnings):
    newest = max(saved.states)
    newest_there = copy / str(newest)
    there, before = newest_there.is_dir(), _contents(copy)
    like = jax.tree.map(np.zeros_like, saved.states[newest][0])
    with Checkpoints(copy, KEEP) as checkpoints:
        try:
            found = checkpoints.restore_newest(like)
        except UserError as error:
            if whole:
                return LOST, f"refused, though {whole} are whole: {error}"
            if "\n" in str(error) or _contents(copy) != before:
                return CRASHED, f"refused otherwise than in one line, or files changed: {error}"
            return REFUSED, str(error)
        if found is None:
            return LOST, "taken for a directory without checkpoints"
        if not same(found, found.step, saved):
            return SILENT, f"restored as {found.step}"
        if found.step not in (newest, max(whole, default=newest)):
            return LOST, f"fell back to {found.step}, though {whole} are whole"
        named = any(str(newest_there) in text for text in warnings.texts)
        if found.step != newest and there and not named:
            return UNNAMED, f"fell back to {found.step}, warnings {warnings.texts}"
        # Another state, so that nothing of the damaged one is taken for it.
        state = jax.tree.map(lambda leaf: np.roll(leaf, 1), found.state)
        following = Saved(copy, {found.step + 1: (state, {"next": True})})
        checkpoints.save(found.step + 1, state, {"next": True})
    with Checkpoints(copy, KEEP) as checkpoints:
        again = checkpoints.restore_newest(like)
    if again is None or not same(again, found.step + 1, following):
        return SILENT, "the checkpoint saved afterwards did not come back"
    return (HARMLESS if found.step == newest else FELL_BACK), " ".join(warnings.texts)


def _answer(connection, path, scratch):
    """Examine damage after damage, in a process of its own: damage may end or stop it."""
    resource.setrlimit(resource.RLIMIT_AS, (LARGEST_PROCESS, LARGEST_PROCESS))
    silence_orphans()
    logging.getLogger("cpnas_jax.runtime.checkpoints").propagate = False
    with open(path, "rb") as file:
        saved = pickle.load(file)
    while True:
        connection.send(examine(saved, connection.recv(), scratch))


class Examiner:
    """Asks a process of its own, and a new one where that has died or hangs."""

    def __init__(self, saved, scratch):
        self._scratch, self._path = scratch, scratch / "saved.pickle"
        self._path.write_bytes(pickle.dumps(saved))
        self._process = None

    def __call__(self, damage):
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            arguments = (other, self._path, self._scratch)
            self._process = context.Process(target=_answer, args=arguments, daemon=True)
            self._process.start()
            other.close()
        self._connection.send(damage)
        try:
            if self._connection.poll(PATIENCE):
                return self._connection.recv()
            verdict = (HUNG, f"no answer after {PATIENCE:.0f} s")
        except EOFError:
            self._process.join()
            verdict = (CRASHED, f"the process ended with {self._process.exitcode}")
        self.close()
        return verdict

    def close(self):
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _run_and_note(arguments, path):
    """Run a command of main in this process; pickle what it gave to be saved, by directory."""
    states = collections.defaultdict(dict)
    save = Checkpoints.save

    def noting(self, step, state, record):
        # As it is now: the run goes on to change both.
        host = jax.tree.map(np.array, state)
        states[str(self._directory)][step] = (host, json.loads(json.dumps(record)))
        save(self, step, state, record)

    Checkpoints.save = noting
    sys.argv = ["main", *arguments]
    with contextlib.redirect_stdout(io.StringIO()):
        status = command_line.main(sys.argv)
    if status == 0:
        path.write_bytes(pickle.dumps(dict(states)))
    sys.exit(status)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished smoke run."""

    mode: str
    workdir: pathlib.Path
    arguments: tuple[str, ...]
    saved: Saved


def smoke_run(mode, scratch, *more):
    """Run a smoke search or training; keep what it saved."""
    workdir = scratch / mode
    arguments = (
        f"--config=configs/mnist5k.py:{mode},smoke",
        f"--config.dataset.data_dir={scratch / 'data'}",
        f"--config.runtime.keep_checkpoints={KEEP}",
        "--config.runtime.optimization_level=0",
        *more,
    )
    path = scratch / f"{mode}.pickle"
    process = multiprocessing.get_context("spawn").Process(
        target=_run_and_note, args=([*arguments, f"--workdir={workdir}"], path)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the smoke {mode} failed with status {process.exitcode}")
    directory = workdir / mode / "checkpoints"
    with open(path, "rb") as file:
        states = pickle.load(file)[str(directory)]
    saved = Saved(directory, {number: states[number] for number in numbers(directory)})
    return Run(mode, workdir, arguments, saved)


def command_line_damages(directory):
    """Return some damages for which a whole run is worth while, the last one to all."""
    files = files_of_newest(directory)
    arrays = max((f for f in files if "/d/" in f), key=lambda f: (directory / f).stat().st_size)
    record = next(f for f in files if f.endswith("record/metadata"))
    middle = (directory / arrays).stat().st_size // 2
    return [
        Damage("flipped", arrays, middle, 0x10),
        Damage("halved", arrays),
        Damage("zero-filled", record),
        Damage("no state"),
        Damage("the one before under its number"),
        Damage("all damaged"),
    ]


def examine_by_command(run, damage, scratch):
    """Damage the checkpoints of an unfinished copy of a run and run its command again."""
    workdir = pathlib.Path(tempfile.mkdtemp(dir=scratch)) / "run"
    shutil.copytree(run.workdir, workdir)
    # Without these the run is not finished.
    for name in ("results.json", "genotype.json"):
        (workdir / name).unlink(missing_ok=True)
    apply(damage, workdir / run.mode / "checkpoints")
    command = [sys.executable, "-m", "cpnas_jax.main", *run.arguments, f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if damage.kind == "all damaged":
        lines = done.stderr.splitlines()
        told = bool(lines) and lines[-1].startswith("error: no checkpoint in ")
        good = done.returncode == 1 and told and "Traceback" not in done.stderr
        verdict = (REFUSED, lines[-1]) if good else (CRASHED, done.stderr[-300:])
    elif done.returncode:
        verdict = (CRASHED, done.stderr[-300:])
    else:
        parts = differing(OUTCOMES[run.mode](workdir), OUTCOMES[run.mode](run.workdir))
        verdict = (SILENT, f"other {', '.join(parts)}") if parts else (FELL_BACK, done.stderr)
    shutil.rmtree(workdir.parent)
    return verdict


class Tally:
    """Counts verdicts by state and kind; keeps what went wrong."""

    def __init__(self):
        self.counts = collections.defaultdict(collections.Counter)
        self.failures = []

    def add(self, state, damage, verdict, reason):
        """Count one."""
        kind = "at a changed place" if damage.kind in PLACES else damage.kind
        self.counts[state, kind][verdict] += 1
        if verdict not in GOOD:
            self.failures.append(f"{state}: {damage}: {verdict}: {reason}")
            print(self.failures[-1], file=sys.stderr, flush=True)

    def total(self, *verdicts, kind=None):
        """Return how often any of these verdicts was given, of one kind or of all."""
        return sum(
            counts[verdict]
            for (_, found), counts in self.counts.items()
            for verdict in verdicts
            if kind in (None, found)
        )

    def table(self):
        """Return lines: state, kind, how many, of each verdict."""
        columns = (*GOOD, "wrong")
        rows = [("state", "damage", "cases", *columns)]
        for (state, kind), counts in self.counts.items():
            wrong = sum(counts[verdict] for verdict in BAD)
            cells = (*(counts[verdict] for verdict in GOOD), wrong)
            rows.append((state, kind, str(counts.total()), *map(str, cells)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return [
            "  ".join(
                [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
                + [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            )
            for row in rows
        ]


def main():
    """Damage everything, print a table and a JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=300, help="for each of the three directories")
    parser.add_argument(
        "--every-byte-up-to", type=int, default=400, help="size of files flipped at every byte"
    )
    parser.add_argument(
        "--command-line", type=int, default=6, help="damages after which a command is run again"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started, tally = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory() as base:
        scratch = pathlib.Path(base)
        os.environ.setdefault("XDG_CACHE_HOME", str(scratch / "cache"))
        search = smoke_run("search", scratch)
        train = smoke_run(
            "train",
            scratch,
            f"--config.genotype={search.workdir / 'genotype.json'}",
            "--config.train.epochs=4",
        )
        states = {"made": made(scratch / "made"), "search": search.saved, "train": train.saved}
        for name, saved in states.items():
            examiner = Examiner(saved, scratch)
            damages = [*map(Damage, PLACES), *file_damages(saved.directory)]
            damages += flips(saved.directory, options.flips, options.seed, options.every_byte_up_to)
            for damage in damages:
                tally.add(name, damage, *examiner(damage))
            examiner.close()
        for run in (search, train):
            damages = command_line_damages(run.saved.directory)
            for damage in damages[len(damages) - options.command_line :]:
                tally.add(f"{run.mode} command", damage, *examine_by_command(run, damage, scratch))
    print("\n".join(tally.table()))
    result = {
        "cases": tally.total(*GOOD, *BAD),
        "flips": tally.total(*GOOD, *BAD, kind="flipped"),
        **{verdict: tally.total(verdict) for verdict in (*GOOD, *BAD)},
        "failures": tally.failures,
        "file_kinds": list(FILE_KINDS),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
