"""What XLA is told of the machine."""

import jax
import pytest

from cpnas_jax.runtime import environment


@pytest.mark.parametrize(
    ("backend", "processes", "expected"),
    [
        ("tpu", 4, {}),
        ("cpu", 1, {"xla_backend_optimization_level": 2}),
        (
            *("cpu", 2),
            {
                "xla_backend_optimization_level": 2,
                "xla_cpu_enable_concurrency_optimized_scheduler": False,
            },
        ),
    ],
)
def test_options_of_a_kind_of_device(monkeypatch, backend, processes, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert environment.compiler_options(2) == expected
