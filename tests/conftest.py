"""Strict numerics for every test: warnings are errors (pyproject), promotion never silent."""

import os

# Eight devices for the pmap tests; set before jax is imported anywhere.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("MPLBACKEND", "Agg")
# Threads of numpy's BLAS wait for each other by spinning: with a core for each worker of the tests
# a regression of 10 ms took seconds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "hermetic", deadline=None, derandomize=True, max_examples=30, database=None
)
hypothesis.settings.load_profile("hermetic")


_LONG = (
    *("test_search.py", "test_pipeline.py", "test_train_checkpoints.py", "test_pods.py"),
    *("test_feeds.py", "test_search_step.py", "test_train_killed.py"),
)
"""Files that take longest; begun last, one of them would leave a worker waiting for the other."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory):
    """Each trainer compiles its own programs; equal ones come from a cache of the test's process.

    Of the process, since JAX writes to a cache without regard to others that read.
    """
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Had anything been compiled before, JAX would keep to having no cache.
    compilation_cache.reset_cache()
