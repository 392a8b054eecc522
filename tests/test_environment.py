"""What XLA is told of the machine."""

import weakref

import jax
import pytest

from cpnas_jax.runtime import environment


@pytest.mark.parametrize(
    ("backend", "expected"), [("tpu", {}), ("cpu", {"xla_backend_optimization_level": 2})]
)
def test_options_of_a_kind_of_device(monkeypatch, backend, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert environment.compiler_options(2) == expected


@pytest.mark.parametrize(
    ("backend", "devices", "kept"),
    [("cpu", 1, True), ("cpu", 2, False), ("tpu", 8, True), ("gpu", 1, True)],
)
def test_programs_that_are_kept(monkeypatch, tmp_path, backend, devices, kept):
    set_to = {}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment.cache_compiled_programs()
    assert ("jax_compilation_cache_dir" in set_to) == kept
    assert ("jax_enable_compilation_cache" in set_to) != kept
    if kept:
        assert set_to["jax_compilation_cache_dir"] == str(tmp_path / "cpnas_jax/programs")


def test_forgotten_programs_are_compiled_again():
    doubled = jax.jit(lambda x: 2 * x)
    held = weakref.ref(doubled.lower(1.0).compile())
    doubled(1.0)
    assert doubled._cache_size() == 1
    environment.forget_programs()
    assert doubled._cache_size() == 0
    assert held() is None
    assert doubled(1.0) == 2.0
