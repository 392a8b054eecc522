"""Command line of cpnas_jax.

python -m cpnas_jax.main --config=FILE[:WORD,...] --workdir=DIR [--config.KEY=VALUE ...]

  --config      a file of configs/ and, in any order, what to run (pipeline, search, train,
                evaluate, summary, compare, report, export, predict), the final network's size
                (small, medium, large), plus (what helps 1-bit networks to train), smoke (shrinks
                all to a minute)
  --workdir     directory of the run; the same command resumes a run that was stopped or killed
  --config.KEY  any other value of a key, such as --config.search.rounds=1; see cpnas_jax/config.py

Several processes, such as the hosts of a pod, each run this command. On a TPU they find each other;
elsewhere, or with --distributed=off, by

  --coordinator=HOST:PORT --num_processes=N --process_id=I
  --distributed auto (default), on (also under Slurm or Open MPI), off

Exit status: 0 done; 1 failed, the reason on stderr; 2 usage; 75 stopped by SIGTERM or Ctrl-C and
saved: the same command goes on.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Sequence

if __name__ == "__main__":
    _SIGNALS = (signal.SIGINT, signal.SIGTERM)
    # Importing takes seconds, in which Ctrl-C would show a traceback.
    for number in _SIGNALS:
        signal.signal(number, lambda *_: os._exit(75))
    # Registered first, called last: while Python takes itself apart a signal would still give a
    # status of its own to a run that is done.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in _SIGNALS])

from absl import flags
from ml_collections import config_dict, config_flags

from cpnas_jax import config as configs
from cpnas_jax import config_keys
from cpnas_jax.compare import compare
from cpnas_jax.export import export_mode
from cpnas_jax.modes import evaluate_mode, summary_mode
from cpnas_jax.pipeline import pipeline
from cpnas_jax.predict import predict_mode
from cpnas_jax.report.page import refresh, report_mode
from cpnas_jax.runtime import environment, interruptions, processes, stall
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.ending import exit_status
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search import search
from cpnas_jax.train import train

_MODES: dict[str, Callable[[config_dict.ConfigDict, str, Reporter], object]] = {
    "search": search,
    "train": train,
    "evaluate": evaluate_mode,
    "summary": summary_mode,
    "pipeline": pipeline,
    "compare": compare,
    "report": report_mode,
    "export": export_mode,
    "predict": predict_mode,
}
_REPORTED = ("search", "train", "evaluate", "pipeline")
"""Modes at whose end the workdir's report is made again."""

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file and mode, such as configs/mnist5k.py:search.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the same command resumes.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", processes.DETECTION, "Whether JAX looks for the other processes itself."
)


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
    config, workdir = _CONFIG.value, str(_WORKDIR.value)
    configs.check_values(config)
    environment.fix_threads(config.runtime.deterministic)
    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value)
    with interruptions.handled():
        _run_mode(config, workdir)


def _run_mode(config: config_dict.ConfigDict, workdir: str) -> None:
    devices = environment.device_count()
    with stall.watched(config.runtime.stall_seconds, processes.name()):
        _run_watched(config, workdir, devices)


def _run_watched(config: config_dict.ConfigDict, workdir: str, devices: int) -> None:
    processes.first_alone(lambda: configs.validate(config, devices))
    versions = environment.record()["versions"]
    processes.require_agreement(
        "the start", config=config_keys.flatten(config), workdir=workdir, versions=versions
    )
    if config.runtime.compilation_cache:
        environment.cache_compiled_programs()
    with Reporter(quiet=not processes.is_first()) as reporter:
        _MODES[config.mode](config, workdir, reporter)
        if config.mode in _REPORTED:
            refresh(workdir, reporter)


def main(argv: Sequence[str] = sys.argv) -> int:
    """Run; return the exit status, see the module."""
    if {"-h", "--help", "-help", "--helpshort", "--helpfull"} & set(argv[1:]):
        print(__doc__.rstrip())
        return 0
    return exit_status(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
