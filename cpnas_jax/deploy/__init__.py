"""Trained networks as they are shipped: what reads and runs them needs numpy and JAX alone.

`structure` says which steps a network takes and which tensors they need, `artefact` reads and
writes the directory of an exported network, `program` runs it. Nothing here imports the rest of the
package; `cpnas_jax.export` makes what is shipped of what was trained.
"""
