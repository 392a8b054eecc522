"""Strict numerics for every test: warnings are errors (pyproject), promotion never silent."""

import os

# Eight devices for the pmap tests; set before jax is imported anywhere.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "hermetic", deadline=None, derandomize=True, max_examples=30, database=None
)
hypothesis.settings.load_profile("hermetic")
