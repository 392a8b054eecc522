"""Facts of the process and the machine that a run records."""

import importlib.metadata
import platform
import time
from typing import Any

import jax

from cpnas_jax import __version__

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


def record() -> dict[str, Any]:
    """Return versions and devices, for `config.json`."""
    return {
        "versions": {
            "cpnas_jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
    }
