"""Facts of the process and the machine that a run records."""

import gc
import importlib.metadata
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax

from cpnas_jax import __version__
from cpnas_jax.runtime.errors import UserError

_IMPORTED = time.monotonic()

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def process_start() -> float:
    """Return when the process began, on the clock of `time.monotonic()`.

    Where the system does not tell, it is when this module was imported.
    """
    try:
        with open("/proc/self/stat") as file:
            # The 22nd field, counted behind the command in parentheses: clock ticks since boot.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
        age = uptime - ticks / 100
    except (OSError, ValueError, IndexError):
        return _IMPORTED
    return time.monotonic() - max(age, time.monotonic() - _IMPORTED)


def fix_threads(shards: int) -> None:
    """Let what a CPU computes not depend on how many devices the process makes of it.

    A matrix product with a long sum is cut among the threads of XLA's pool, which are as many as
    the cores or, where that is more, the process' devices. With as many as there are virtual
    shards, which no number of devices exceeds, it is cut the same way on any number of devices.

    Args:
        shards: of the deterministic mode; 0 changes nothing. To be called before JAX looks for its
            devices.
    """
    if shards:
        os.environ["NPROC"] = str(shards)


def device_count() -> int:
    """Return the number of devices of all processes.

    Raises:
        UserError: JAX finds none, such as where JAX_PLATFORMS names a platform that is not there.
    """
    try:
        return jax.device_count()
    # JAX reports a missing platform by several types, AssertionError among them.
    except Exception as error:
        asked = os.environ.get("JAX_PLATFORMS")
        raise UserError(
            f"JAX finds no device (JAX_PLATFORMS is {asked!r}): {' '.join(str(error).split())}"
        ) from error


def devices_text(batch_size: int) -> str:
    """Say what shares a global batch."""
    devices, processes = jax.device_count(), jax.process_count()
    of_several = f" of {processes} processes" if processes > 1 else ""
    return (
        f"{devices} {jax.default_backend()} device{'s' * (devices > 1)}{of_several}, batch "
        f"{batch_size} in all, {batch_size // devices} a device."
    )


def compiler_options(level: int) -> dict[str, int]:
    """Return XLA's options for an optimization level of LLVM, which a CPU alone has."""
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_backend_optimization_level": level}


def device_memory() -> int | None:
    """Return the bytes a local device has, or None where the platform does not tell.

    CPU devices share the machine's memory.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        try:
            whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError):
            return None
        return whole // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def command() -> str:
    """Return the command line that started this process, as a shell takes it."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def record() -> dict[str, Any]:
    """Return command, versions and devices, for `config.json`."""
    return {
        "command": command(),
        "versions": {
            "cpnas_jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
    }


def cache_compiled_programs() -> None:
    """Keep compiled programs between processes: a resumed run starts without compiling.

    Not those of several CPU devices. What XLA:CPU reads back has lost the order of collectives that
    do not need each other: several processes wait for ever or end with an error of Gloo, which
    tells collectives apart by their order alone; one process of several devices crashes.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # A cache may have been asked for by JAX's own variable.
        jax.config.update("jax_enable_compilation_cache", False)
        return
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "cpnas_jax" / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def forget_programs() -> None:
    """Let go of the programs that JAX keeps for functions it has seen; used again, they compile.

    For a process that goes from run to run: on a CPU every program has hundreds of mappings of
    memory, of which Linux gives a process 65,530 (`vm.max_map_count`). LLVM then has no memory to
    compile into, however much there is.
    """
    jax.clear_caches()
    gc.collect()
