"""Kills a run at random moments until it has ended; compares it with one that was left alone.

python tests/faults/kills.py --mode=search|train [--kills 30] [--terms 0] [--processes 1]
    [--devices 1] [--target one|all|launcher] [--seed 0] [flags of main]

`--kills` are by SIGKILL, `--terms` by SIGTERM, in an order that the seed draws.

The run is a smoke search or training on stand-ins of CIFAR-10, long enough that it can be killed
so often. Half of the kills, drawn by the seed, fall anywhere between the start and the end of
compiling, the others in the work that follows, after a share of it that lets the run end soon
after the last kill. Genotype, history or metrics, results and digest of the last state must be
bitwise those of the run left alone. Prints a table of the kills and a JSON line; the exit status
is 1 where anything differs or went wrong.

Several processes are started by launch/local_pod.sh; a signal goes to one of them, to all, or to
the launcher, and nothing of them may be left. SIGTERM must end a run with status 75 once it has
said what it does.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

from attempts import COMPILED, ROOT, Attempt, Failure, Runs
from outcomes import OUTCOMES, differing

RESUMABLE = 75

FLAGS = {
    # 72 sampled epochs.
    "search": ["--config=configs/cifar10.py:search,smoke", "--config.search.rounds=8"],
    "train": [
        *("--config=configs/cifar10.py:train,small,smoke", "--config.genotype=DDPNAS_XNOR_1"),
        *("--config.train.epochs=60", "--config.runtime.checkpoint_every=3"),
    ],
}
RESUMED = re.compile(r"Resumed .*")


@dataclasses.dataclass(frozen=True)
class Alone:
    """What a run does that is left alone.

    Attributes:
        outcome: see `outcomes`.
        lines: of its log.
        start_seconds: until its programs are compiled.
        work_seconds: from then to its end.
    """

    outcome: dict
    lines: int
    start_seconds: float
    work_seconds: float


def left_alone(runs, workdir, output):
    """Run to the end without a signal."""
    attempt = Attempt(runs, workdir, output)
    try:
        attempt.wait_for(lambda: COMPILED.search(attempt.said()))
        start = attempt.seconds()
        status = attempt.end()
    finally:
        attempt.kill_all()
    if status:
        raise Failure(f"left alone it ended with status {status}", attempt)
    outcome = OUTCOMES[runs.mode](workdir)
    return Alone(outcome, attempt.lines(), start, attempt.seconds() - start)


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a run is killed.

    Attributes:
        compiled: wait until its programs are compiled; else from the start.
        lines: wait for so many more lines of its log.
        seconds: wait so long after that.
    """

    compiled: bool
    lines: int
    seconds: float


def moment(rng, alone, lines, later_kills):
    """Draw when the next kill falls.

    Args:
        rng: draws always the same number of numbers.
        alone: the run that was left alone.
        lines: that the log of the killed run has.
        later_kills: how many follow this one.
    """
    in_work, share, fraction = rng.random() < 0.5, rng.random(), rng.random()
    if not in_work:
        return Moment(False, 0, share * alone.start_seconds)
    # By lines and not by the clock: a run may become faster. Every other kill leaves half of its
    # share done; the last ones must not outlast the run.
    left = alone.lines - lines
    further = int(share * min(4 * left / (later_kills + 1), 0.7 * left))
    return Moment(True, further, fraction * alone.work_seconds / alone.lines)


def allowed(number, status, phase, several):
    """Tell whether a run may end so after a signal."""
    if number == signal.SIGKILL:
        return status != 0 if several else status == -signal.SIGKILL
    # Python has not got so far that it could do anything else.
    early = phase == "importing" and status in (-number, 128 + number)
    return status == RESUMABLE or early


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was done to a run, and what the next start made of it."""

    signal: str
    seconds: float
    phase: str
    status: int
    lines: int
    resumed: str = ""


def resumed(attempt):
    """Return what a run says of where it goes on."""
    found = RESUMED.search(attempt.said())
    return found[0] if found else "from the beginning" if COMPILED.search(attempt.said()) else "-"


def killed_until_the_end(runs, workdir, scratch, alone, options):
    """Kill a run so often, then let it end; return the kills, and how the last start went on.

    Raises:
        Failure: it failed by itself, ended otherwise than it may, or left processes behind.
    """
    rng, kills = random.Random(options.seed), []
    names = ["KILL"] * options.kills + ["TERM"] * options.terms
    rng.shuffle(names)
    for count in range(len(names) + 1):
        attempt = Attempt(runs, workdir, scratch / f"output{count}")
        try:
            kill = (
                killed(attempt, rng, names[count], alone, options, len(names) - count - 1)
                if count < len(names)
                else None
            )
            status = attempt.end() if kill is None else kill.status
        finally:
            attempt.kill_all()
        if kills:
            kills[-1] = dataclasses.replace(kills[-1], resumed=resumed(attempt))
        if kill is None:
            if status:
                raise Failure(f"it ended by itself with status {status}", attempt)
            return kills
        if status == 0:
            # The signal came when all was done.
            return kills
        if not allowed(numbered(kill.signal), status, kill.phase, options.processes > 1):
            raise Failure(f"{kill.signal} in {kill.phase!r} ended it with {status}", attempt)
        kills.append(kill)
        print(f"{row(len(kills), kill)}", file=sys.stderr, flush=True)
    raise AssertionError("the last attempt returns")


def numbered(name):
    """Return the number of a signal."""
    return getattr(signal, f"SIG{name}")


def killed(attempt, rng, name, alone, options, later_kills):
    """Wait for the moment and send the signal; return the kill, None where it ended before."""
    when = moment(rng, alone, attempt.lines_before, later_kills)
    if when.compiled:
        attempt.wait_for(lambda: COMPILED.search(attempt.said()))
    # Resuming takes the lines away of which no checkpoint knows.
    target = attempt.lines() + when.lines if when.lines else 0
    attempt.wait_for(lambda: attempt.lines() >= target)
    delay = attempt.seconds() + when.seconds if when.compiled else when.seconds
    if not attempt.wait_for(lambda: attempt.seconds() >= delay):
        return None
    seconds, before = attempt.seconds(), attempt.phase()
    attempt.send(numbered(name), options.target, rng)
    status = attempt.end()
    phase = attempt.phase() if name == "KILL" else before
    return Kill(name, seconds, phase, status, attempt.lines())


HEADER = (
    f"{'kill':>4} {'by':<4} {'moment':>8}  {'phase':<30} {'status':>6} {'lines':>5}  the next start"
)


def row(number, kill):
    """Return a line of the table."""
    return (
        f"{number:4} {kill.signal:<4} {kill.seconds:6.1f} s  {kill.phase:<30} {kill.status:6} "
        f"{kill.lines:5}  {kill.resumed}"
    )


def main_runs(options, more, scratch):
    """Return the smoke runs of the options, their data made and their cache empty."""
    data = scratch / "data"
    script = str(ROOT / "tests/data/stand_in.py")
    environment = {**os.environ, "XDG_CACHE_HOME": str(options.cache or scratch / "cache")}
    subprocess.run(
        [sys.executable, script, str(data)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    flags = [*FLAGS[options.mode], f"--config.dataset.data_dir={data}", *more]
    if options.processes > 1:
        pod = ["launch/local_pod.sh", str(options.processes), str(options.devices)]
        environment["PYTHON"] = sys.executable
    else:
        pod = [sys.executable, "-m", "cpnas_jax.main"]
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    return Runs(
        options.mode,
        lambda workdir: [*pod, *flags, f"--workdir={workdir}"],
        environment,
        lambda line: "-m cpnas_jax.main" in line,
    )


def examine(runs, scratch, options):
    """Leave two runs alone and kill a third; return what the JSON line says.

    The first fills the cache of compiled programs, which runs on several CPU devices do without;
    the second says how long a run takes and whether runs repeat each other at all.
    """
    started, failures, kills, alone = time.monotonic(), [], [], None
    try:
        first = left_alone(runs, scratch / "first", scratch / "first.output")
        alone = left_alone(runs, scratch / "alone", scratch / "alone.output")
        parts = differing(first.outcome, alone.outcome)
        if parts:
            failures.append(f"two runs left alone differ in {', '.join(parts)}")
        workdir = scratch / "killed"
        kills = killed_until_the_end(runs, workdir, scratch, alone, options)
        parts = differing(OUTCOMES[runs.mode](workdir), alone.outcome)
        if parts:
            failures.append(f"the killed run differs in {', '.join(parts)}")
        if len(kills) < options.kills + options.terms:
            failures.append(f"the run ended after {len(kills)} kills; give it more epochs")
    except Failure as failure:
        failures.append(str(failure))
    print(HEADER)
    for number, kill in enumerate(kills, 1):
        print(row(number, kill))
    return {
        **{name: getattr(options, name) for name in ("mode", "processes", "devices")},
        "signals": dict(collections.Counter(kill.signal for kill in kills)),
        "phases": dict(collections.Counter(kill.phase for kill in kills)),
        "start_seconds": alone and round(alone.start_seconds, 1),
        "work_seconds": alone and round(alone.work_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
        "failures": failures,
        "bitwise_equal": not failures,
    }


def main(arguments=None):
    """Parse the flags, kill, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=sorted(FLAGS), required=True)
    parser.add_argument("--kills", type=int, default=30, help="by SIGKILL")
    parser.add_argument("--terms", type=int, default=0, help="by SIGTERM")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--target", choices=("one", "all", "launcher"), default="one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=pathlib.Path, help="of programs, where a run has one")
    parser.add_argument("--keep", type=pathlib.Path, help="directory for the runs' files")
    options, more = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as base:
        scratch = options.keep or pathlib.Path(base)
        scratch.mkdir(parents=True, exist_ok=True)
        result = examine(main_runs(options, more, scratch), scratch, options)
    print(json.dumps(result))
    return 0 if result["bitwise_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
