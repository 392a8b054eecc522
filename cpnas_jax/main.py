"""Command line: flags, one-line errors, dispatch on config.mode."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from cpnas_jax import config as configs
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search import search

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file and mode, such as configs/mnist5k.py:search.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the same command resumes.")


def _cache_compiled_programs() -> None:
    """Keep compiled programs between processes: a resumed run starts without compiling."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "cpnas_jax" / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _parse(argv: Sequence[str]) -> None:
    """Read the flags; a config file runs code while they are read."""
    configs.check_flags(argv)
    try:
        rest = flags.FLAGS(list(argv))
    except (flags.Error, UserError):
        raise
    # What a wrong key, value or file raises differs from library to library below.
    except Exception as error:
        shown = " ".join(str(error).split())
        raise UserError(f"the flags cannot be read: {shown}; see cpnas_jax/config.py") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; everything is given by --flag=value")
    for name, flag in (("config", _CONFIG), ("workdir", _WORKDIR)):
        if not flag.value:
            raise flags.Error(f"--{name}=... is required")


def run(argv: Sequence[str]) -> None:
    """Parse the flags and run the mode.

    Raises:
        UserError: a mistake in the config or what it names.
        flags.Error: a missing, malformed or unknown flag.
    """
    _parse(argv)
    configs.validate(_CONFIG.value, jax.device_count())
    if _CONFIG.value.runtime.compilation_cache:
        _cache_compiled_programs()
    with Reporter() as reporter:
        search(_CONFIG.value, str(_WORKDIR.value), reporter)


def main(argv: Sequence[str] = sys.argv) -> int:
    """Run; return the exit status: 0 done, 1 a mistake or an interruption, 2 usage."""
    try:
        run(argv)
    except (UserError, flags.IllegalFlagValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command resumes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
