"""Whole searches in processes of their own, as a shell would start them."""

import os
import subprocess
import sys

from command_line import ROOT

SMALL = (
    # A reduction cell, whose edges have both strides; a normal one is searched elsewhere.
    *("--config.search.examples=640", "--config.search.cells=1", "--config.search.reductions=(0,)"),
    "--config.search.operations=('none','skip_connect','sep_conv_3x3')",
    "--config.search.edge_policy=all",
    "--config.runtime.optimization_level=0",  # compiling takes longer than these searches
)
"""Flags that cut a smoke search down to seconds."""


def start_search(base, workdir, *arguments, words="search,smoke", largest_file=None):
    """Start a search of mnist5k on one device.

    `base` has the data and the compiled programs; processes of a test share it.
    """
    command = [sys.executable, "-m", "cpnas_jax.main"]
    command += [f"--config=configs/mnist5k.py:{words}", f"--workdir={workdir}"]
    command += [f"--config.dataset.data_dir={base / 'data'}", *arguments]
    if largest_file:
        # A file that may not grow fails as one on a full disk does.
        command = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "bash", *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(base / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, seconds=300):
    """Return what a process said that ends well."""
    try:
        output, error = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return output
