"""Public figures of TPU chips, and the least time that they leave a program."""

import dataclasses

from cpnas_jax.runtime.costs import Cost

V5E_CLOCK = 1.5e9
"""Hertz: 197 TFLOP/s are those of four units of 128 x 128 at this clock."""

V4_CLOCK = 1.05e9
"""Hertz: 275 TFLOP/s are those of two cores with four such units each."""

INTERCONNECT = 100e9
"""Bytes a second that a chip sends in an all-reduce: two of its links, of 50 GB/s each way."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of a chip.

    Attributes:
        matrix: bf16 operations a second of the matrix units; float32 operands are rounded to bf16
            by JAX's default precision, which the package leaves as it is. Signs lose nothing.
        vector: float32 operations a second of the vector units: 8 x 128 lanes of 4 units at the
            clock, for each core.
        bandwidth: bytes a second of the memory.
        host_chips: of a host.
        host_cores: virtual CPUs of a host.
    """

    matrix: float
    vector: float
    bandwidth: float
    host_chips: int
    host_cores: int


CHIPS = {
    "v4": Chip(275e12, 2 * 8 * 128 * 4 * V4_CLOCK, 1228e9, 4, 240),
    "v5e": Chip(197e12, 8 * 128 * 4 * V5E_CLOCK, 819e9, 4, 112),
}

SLICES = {"v4-8": ("v4", 4), "v4-32": ("v4", 16), "v5e-64": ("v5e", 64)}
"""Name -> chip and number of chips; the names of v4 count cores, two a chip."""


def roofline_seconds(cost: Cost, state_bytes: float, chip: Chip) -> dict[str, float]:
    """Return the least seconds by each of the three limits.

    Args:
        cost: of a chip.
        state_bytes: read and written once beside what `cost` counts.
        chip: its peaks.
    """
    return {
        "matrix": cost.matrix / chip.matrix,
        "vector": (cost.depthwise + cost.other) / chip.vector,
        "memory": (cost.least_bytes + 2 * state_bytes) / chip.bandwidth,
    }


def collective_seconds(reduced_bytes: float, rounds: float, devices: int, latency: float) -> float:
    """Return the seconds of a step's all-reduces by rings; none on one device."""
    if devices == 1:
        return 0.0
    sent = reduced_bytes * 2 * (devices - 1) / devices
    return sent / INTERCONNECT + rounds * latency
