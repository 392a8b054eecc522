import subprocess
import sys

import pytest

SCRIPT = """
import contextlib, os, signal, sys, time, weakref
# A shell's background processes inherit that SIGINT is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from cpnas_jax.runtime.interruptions import handled

class Thing:
    def __del__(self):
        if "destructor" in sys.argv:
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(10))  # the signal is looked at here

def callback(_):
    if "callback" in sys.argv:
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(10))

thing = Thing()
reference = weakref.ref(thing, callback)
try:
    with {context}:
        del thing
        for _ in range(30):
            time.sleep(0.1)
except KeyboardInterrupt:
    print("interrupted")
"""


def outcome(context, place):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(context=context), place],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("place", ["destructor", "callback"])
def test_ctrl_c_where_python_drops_it(place):
    assert outcome("handled()", place) == ("interrupted", "")


def test_python_does_drop_it():
    """If it no longer does, the module can go."""
    found, errors = outcome("contextlib.nullcontext()", "callback")
    assert found == ""
    assert "KeyboardInterrupt" in errors
