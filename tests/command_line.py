"""The command line inside the test process, as a shell would call it."""

import pathlib
import signal
import sys
import time

from absl import flags

from cpnas_jax import main

ROOT = pathlib.Path(__file__).parents[1]


def call_main(monkeypatch, *arguments):
    """Return the exit status; ml_collections looks for overrides in sys.argv itself."""
    monkeypatch.chdir(ROOT)
    # Overrides of an earlier call are flags of their own; other libraries' flags must stay.
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    for flag in (main._CONFIG, main._WORKDIR):
        flags.FLAGS[flag.name].value = None
    # The tests' own process leaves the user's cache alone.
    monkeypatch.setattr(main.environment, "cache_compiled_programs", lambda: None)
    monkeypatch.setattr(sys, "argv", ["main", *map(str, arguments)])
    return main.main(sys.argv)


def kill_after_a_line(process, log, delay):
    """Kill a process so many seconds after its log has one more line."""
    before = log.read_text().count("\n") if log.exists() else 0
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") > before:
            break
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
