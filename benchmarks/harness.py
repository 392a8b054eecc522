"""What the benchmarks against PyTorch share: the worker, compiled programs, spreads."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

PAUSE = 0.05
"""Seconds between steps, for the threads of the form before to fall asleep."""


class Worker:
    """A process that answers a line of JSON with a line of JSON.

    Attributes:
        facts: what it says by itself when it is ready.
    """

    def __init__(self, command: Sequence[str], hint: str = "see above") -> None:
        """Start it; `hint` is told where it ends too soon."""
        self._hint = hint
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self._answer()

    def ask(self, **request) -> dict:
        """Send a request and wait for its answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the worker."""
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended; {self._hint}")
        return json.loads(line)


class Torch(Worker):
    """A PyTorch worker."""

    def __init__(self, python: str, script: str) -> None:
        path = pathlib.Path(__file__).with_name(script)
        super().__init__(
            [python, str(path), str(num_cores())], "--torch-python names a Python with PyTorch"
        )


@dataclasses.dataclass
class Program:
    """A compiled step; what it takes to compile it and to run it."""

    compiled: Any
    facts: dict

    def step(self, *arguments) -> tuple[float, Any]:
        """Return seconds and outputs."""
        start = time.perf_counter()
        outputs = jax.block_until_ready(self.compiled(*arguments))
        return time.perf_counter() - start, outputs


def compile_program(function, *arguments, options: dict | None = None) -> Program:
    """Compile a jitted or pmapped function; keep the times and XLA's account of memory."""
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile(options)
    end = time.perf_counter()
    memory = compiled.memory_analysis()
    facts = {
        "trace_seconds": traced - start,
        "compile_seconds": end - traced,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }
    return Program(compiled, facts)


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def named_arrays(tree) -> dict[str, np.ndarray]:
    """Return dotted name -> array of a tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def relative(found: float, reference: float) -> float:
    """Return how far a number is from a reference, as a share of the latter."""
    return abs(found - reference) / abs(reference)


def progress(text: str) -> None:
    """Tell the terminal what is done."""
    print(text, file=sys.stderr, flush=True)


def spread(values) -> dict:
    """Return least, median, largest and number of some measurements."""
    values = np.ravel(values)
    return {
        "min": round(float(values.min()), 4),
        "median": round(float(np.median(values)), 4),
        "max": round(float(values.max()), 4),
        "n": int(values.size),
    }


def spread_text(found: dict) -> str:
    """Return a spread as `median [least, largest]`."""
    return f"{found['median']:.3f} [{found['min']:.3f}, {found['max']:.3f}]"


def machine_facts(load_before: float, torch: Torch | None = None) -> dict:
    """Return what the figures depend on."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cores": num_cores(),
        "processor": names[0] if names else platform.processor(),
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        **({} if torch is None else torch.facts),
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
    }
