"""The command line inside the test process, as a shell would call it."""

import pathlib
import sys

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
