"""Command line of cpnas_jax.

python -m cpnas_jax.main --config=FILE[:WORD,...] --workdir=DIR [--config.KEY=VALUE ...]

  --config      a file of configs/ and, in any order, what to run (pipeline, search, train,
                evaluate, summary), the final network's size (small, medium, large), plus (what
                helps 1-bit networks to train), smoke (shrinks all to a minute)
  --workdir     directory of the run; the same command resumes
  --config.KEY  any other value of a key, such as --config.search.rounds=1; see cpnas_jax/config.py
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Sequence

if __name__ == "__main__":
    # Importing takes seconds, in which Ctrl-C would show a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))

from absl import flags
from ml_collections import config_dict, config_flags

from cpnas_jax import config as configs
from cpnas_jax.modes import evaluate_mode, summary_mode
from cpnas_jax.pipeline import pipeline
from cpnas_jax.runtime import environment, interruptions
from cpnas_jax.runtime.checkpoints import silence_orphans
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search import search
from cpnas_jax.train import train

_MODES: dict[str, Callable[[config_dict.ConfigDict, str, Reporter], object]] = {
    "search": search,
    "train": train,
    "evaluate": evaluate_mode,
    "summary": summary_mode,
    "pipeline": pipeline,
}

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file and mode, such as configs/mnist5k.py:search.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the same command resumes.")


def _parse(argv: Sequence[str]) -> None:
    """Read the flags; a config file runs code while they are read."""
    configs.check_flags(argv)
    try:
        rest = flags.FLAGS(list(argv))
        given = {"config": _CONFIG.value, "workdir": _WORKDIR.value}
    except flags.IllegalFlagValueError as error:
        raise UserError(configs.explain(str(error))) from error
    except (flags.Error, UserError):
        raise
    # What a wrong key, value or file raises differs from library to library below; a config file
    # may raise anything.
    except (Exception, SystemExit) as error:
        shown = " ".join(str(error).split())
        raise UserError(f"the flags cannot be read: {shown}; see cpnas_jax/config.py") from error
    if _CONFIG.present and not isinstance(given["config"], config_dict.ConfigDict):
        raise UserError(
            "get_config of the --config file gives no ConfigDict but "
            f"{type(given['config']).__name__}"
        )
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; everything is given by --flag=value")
    for name, value in given.items():
        if value is None or value == "":
            raise flags.Error(f"--{name}=... is required")


def run(argv: Sequence[str]) -> None:
    """Parse the flags and run the mode; a mistake raises UserError or flags.Error."""
    _parse(argv)
    configs.check_values(_CONFIG.value)
    environment.fix_threads(_CONFIG.value.runtime.deterministic)
    configs.validate(_CONFIG.value, environment.device_count())
    if _CONFIG.value.runtime.compilation_cache:
        environment.cache_compiled_programs()
    with Reporter() as reporter:
        _MODES[_CONFIG.value.mode](_CONFIG.value, str(_WORKDIR.value), reporter)


def _prepare_process() -> None:
    """Let mistakes be one line each: of orbax, of the terminal's encoding, of Ctrl-C."""
    silence_orphans()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    interruptions.repeat_lost()


def main(argv: Sequence[str] = sys.argv) -> int:
    """Run; return the exit status: 0 done, 1 a mistake or an interruption, 2 usage."""
    if {"-h", "--help", "-help", "--helpshort", "--helpfull"} & set(argv[1:]):
        print(__doc__.rstrip())
        return 0
    _prepare_process()
    try:
        run(argv)
    except (UserError, flags.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, UserError) else 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command resumes", file=sys.stderr)
        return 1
    except OSError as error:
        shown = " ".join(str(error).split())
        print(f"error: {shown}; mend that, then the same command resumes", file=sys.stderr)
        if isinstance(error, BrokenPipeError):
            # Python would complain at its end that what is left cannot be written.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
