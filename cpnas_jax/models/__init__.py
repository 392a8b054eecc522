"""Binarization primitives, candidate operations and the supernet: pure functions, no config."""
