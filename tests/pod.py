"""Several processes of one run on this machine, as a test starts them."""

import os
import socket
import subprocess
import sys

from command_line import ROOT


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_together(command_of, count, devices=1, **variables):
    """Run `command_of(coordinator, index)` for each index; return (status, output, errors) of all.

    A process that does not end kills its test after five minutes.
    """
    coordinator = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command_of(coordinator, index))],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, ended, strict=True)]
