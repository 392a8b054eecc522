"""Child-Parent neural architecture search for 1-bit CNNs (CP-NAS, IJCAI 2020) in JAX."""

__version__ = "0.1.0"
