"""What processes tell each other."""

import json
import os
import socket
import subprocess
import sys

from cpnas_jax.runtime.parallel import union

SCRIPT = """
import json, sys
import jax

port, index = map(int, sys.argv[1:])
jax.distributed.initialize(f"localhost:{port}", 2, index)
from cpnas_jax.runtime.parallel import union

given = [[{7, 20, 3}, {20}], [set(), set()], [set(), {2**31 - 1, 0}]]
print(json.dumps([sorted(union(numbers[index])) for numbers in given]))
"""


def test_one_process_has_its_own():
    assert union([3, 1, 3]) == {1, 3}


def test_two_processes_have_what_either_has():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(port), str(index)],
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            # Gloo says there too who is connected.
            assert json.loads(output.splitlines()[-1]) == [[3, 7, 20], [], [0, 2**31 - 1]]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
