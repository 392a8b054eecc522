"""Predictions, not measurements: what the CIFAR-10 search and the ImageNet training cost on TPUs.

Operations, bytes and collectives of a step are counted in the package's own programs (`costs.py`,
`workloads.py`). A step is then predicted as

    max(matrix / peak, (depthwise + other) / vector units, bytes / bandwidth) / share
        + reduced bytes * 2 (n - 1) / n / interconnect + rounds * latency

where `share` is the part of that roofline that is reached: assumed as a range, and for one
estimate taken from the cycles that the TPU's own compiler notes for each operation, equally
sampled, at the images a chip has (`tpu_cycles.py`; linear in the logarithm between the numbers of
images compiled for, and constant beyond them).

    python benchmarks/scaling.py --cycles=docs/tpu_cycles.json

Tables, then one JSON object as the last line. Nothing is compiled or run; some minutes.
"""

import argparse
import collections
import dataclasses
import json
import math
from typing import Any

import numpy as np
from costs import Cost
from harness import progress
from tpu_cycles import CLOCK, Case, operation_cost
from workloads import (
    CIFAR_IMAGES,
    IMAGENET_IMAGES,
    Work,
    search_config,
    search_work,
    training_config,
    training_work,
)

from cpnas_jax.models.space import NUM_OPERATIONS

INTERCONNECT = 100e9
"""Bytes a second that a chip sends in an all-reduce: two links of 50 GB/s each way."""

LATENCIES = (5e-6, 30e-6)
"""Seconds of a small all-reduce, which waits for what is before it."""

SHARES = (0.1, 0.4)
"""Of the roofline; a network of small convolutions reaches no more."""

DEVICES = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of a chip.

    Attributes:
        matrix: bf16 operations a second of the matrix units; float32 operands are rounded to bf16
            by JAX's default precision, which the package leaves as it is. Signs lose nothing.
        vector: float32 operations a second of the vector units: 8 x 128 lanes of 4 units at the
            clock that the peak of the matrix units implies, for each core.
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
    "v4": Chip(275e12, 2 * 8 * 128 * 4 * 1.05e9, 1228e9, 4, 240),
    "v5e": Chip(197e12, 8 * 128 * 4 * CLOCK, 819e9, 4, 112),
}

SLICES = {"v4-8": ("v4", 4), "v4-32": ("v4", 16), "v5e-64": ("v5e", 64)}
"""Name -> chip and number of chips; the names of v4 count cores, two a chip."""


@dataclasses.dataclass(frozen=True)
class Line:
    """What a step costs as a function of the images a chip has: all counts are linear in them."""

    few: Work
    few_images: int
    many: Work
    many_images: int
    rounds: float

    def cost(self, images: float, score: bool = False) -> Cost:
        """Return the cost of a step, or of scoring, with so many images a chip."""
        weight = (images - self.few_images) / (self.many_images - self.few_images)
        few, many = (w.score if score else w.step for w in (self.few, self.many))
        mixed = few * (1 - weight) + many * weight
        return dataclasses.replace(mixed, collectives=few.collectives)


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


def share_at(images: float, shares: dict[int, float]) -> float:
    """Return the share of the roofline at so many images a chip, from those compiled for."""
    known = sorted(shares)
    logs = np.log([float(n) for n in known])
    return float(np.interp(math.log(images), logs, [shares[n] for n in known]))


def cycle_shares(cycles: dict[str, int], sizes: tuple[tuple[int, int], ...]) -> dict[int, float]:
    """Return images -> share of the roofline that the compiler expects of equally sampled cases.

    Args:
        cycles: case -> estimated cycles on a v5e.
        sizes: (side, channels) of the cases to take.
    """
    seconds: dict[int, dict[Any, tuple[float, float]]] = collections.defaultdict(dict)
    for name, count in cycles.items():
        case = Case.parse(name)
        if case.formulation == "native" and (case.side, case.channels) in sizes:
            limits = roofline_seconds(operation_cost(case), 0, CHIPS["v5e"])
            own = max(limits.values()), count / CLOCK
            seconds[case.images][case.operation, case.side] = own
    if not seconds:
        raise SystemExit(f"--cycles has no native case of (side, channels) in {sizes}")
    # Shares of different sets of cases would not compare.
    complete = max(seconds.values(), key=len).keys()
    return {
        images: sum(least for least, _ in found.values()) / sum(slow for _, slow in found.values())
        for images, found in sorted(seconds.items())
        if found.keys() == complete
    }


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of a step: fast, slow, and by the compiler's cycles; and of what it consists."""

    roofline: dict[str, float]
    reducing: tuple[float, float]
    share: float

    @property
    def bound(self) -> str:
        """Return the limit that decides."""
        return max(self.roofline, key=self.roofline.__getitem__)

    def seconds(self) -> tuple[float, float, float]:
        """Return fast, slow and estimated; the estimate has the geometric mean of latencies."""
        least = max(self.roofline.values())
        fast, slow = self.reducing
        return (
            least / SHARES[1] + fast,
            least / SHARES[0] + slow,
            least / self.share + math.sqrt(fast * slow),
        )


def predict(
    line: Line, batch: int, devices: int, chip: Chip, shares: dict[int, float], score: bool = False
) -> Prediction:
    """Predict a step, or scoring once, on so many devices that share a batch."""
    images = batch / devices
    cost = line.cost(images, score)
    state = 0 if score else line.few.state_bytes
    rounds = line.rounds
    if score:
        # Every sum is of statistics but the last.
        rounds = cost.num_collectives() / 2
    fast, slow = (
        collective_seconds(cost.collective_bytes(), rounds, devices, latency)
        for latency in LATENCIES
    )
    return Prediction(roofline_seconds(cost, state, chip), (fast, slow), share_at(images, shares))


def measure(work_of, config, batch: int, few: int, many: int) -> Line:
    """Count the costs on two numbers of devices, and the rounds of collectives."""
    lines = {}
    for devices in (many, few):
        lines[devices] = work_of(config, devices)
        progress(f"counted for {devices} devices")
    config.runtime.synchronise_statistics = False
    apart = work_of(config, many)
    config.runtime.synchronise_statistics = True
    statistics = lines[many].step.num_collectives() - apart.step.num_collectives()
    # Mean and mean of squares go together, or the gradients of both; those of all weights too.
    return Line(lines[many], batch // many, lines[few], batch // few, statistics / 2 + 1)


def sampled_epochs(rounds: int) -> int:
    """Return the sampled epochs of a search: in a round each operation is sampled once."""
    return rounds * sum(range(2, NUM_OPERATIONS + 1))


def text_of(seconds: tuple[float, ...], scale: float, digits: int) -> str:
    """Return `estimate [fast, slow]` in another unit."""
    fast, slow, estimate = (f"{value * scale:,.{digits}f}" for value in seconds)
    return f"{estimate} [{fast}, {slow}]"


def parse_flags() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", required=True, help="a file that tpu_cycles.py wrote")
    parser.add_argument("--genotype", default="DDPNAS_XNOR_1", help="a published name")
    parser.add_argument("--decoded", type=float, help="images/s of a core, by decode_rate.py")
    return parser.parse_args()


def report_counts(name: str, line: Line, batch: int) -> dict:
    """Print and return what a step asks for, on one chip and altogether."""
    cost = line.cost(batch)
    facts = {
        "gigaflops": cost.flops / 1e9,
        "matrix_gigaflops": cost.matrix / 1e9,
        "depthwise_gigaflops": cost.depthwise / 1e9,
        "least_gigabytes": cost.least_bytes / 1e9,
        "most_gigabytes": cost.most_bytes / 1e9,
        "state_megabytes": line.few.state_bytes / 1e6,
        "reduced_megabytes": cost.collective_bytes() / 1e6,
        "collectives": cost.num_collectives(),
        "rounds": line.rounds,
    }
    print(f"\n{name}, a step of {batch} images")
    for key, value in facts.items():
        print(f"  {key:<22}{value:>12,.1f}")
    return facts


def main() -> None:
    """Count, predict, print."""
    flags = parse_flags()
    with open(flags.cycles) as file:
        cycles = {case["case"]: case["cycles"] for case in json.load(file)["cases"]}
    config, training = search_config(), training_config()
    shares = {
        "search": cycle_shares(cycles, _sizes(32, config.search.channels)),
        "training": cycle_shares(cycles, _sizes(28, training.network.channels)),
    }
    batches = {"search": config.search.batch_size, "training": training.train.batch_size}
    lines = {
        "search": measure(search_work, config, batches["search"], 4, 64),
        "training": measure(
            lambda config, devices: training_work(config, flags.genotype, devices),
            training,
            batches["training"],
            16,
            64,
        ),
    }
    epochs = sampled_epochs(config.search.rounds)
    trained = round(CIFAR_IMAGES * (1 - config.search.validation_fraction))
    steps = {
        "search": 2 * epochs * (trained // batches["search"]),
        "training": training.train.epochs * (IMAGENET_IMAGES // batches["training"]),
    }
    result = {"benchmark": "scaling", "prediction": True, "shares": shares, "steps": steps}
    for name, line in lines.items():
        result[name] = {
            "counts": report_counts(name, line, batches[name]),
            "slices": report_slices(name, line, batches[name], steps[name], epochs, shares[name]),
            "growth": report_growth(name, line, batches[name], shares[name]),
        }
    result["input"] = report_input(
        lines["training"], batches["training"], shares["training"], flags.decoded
    )
    print(json.dumps(result))


def _sizes(side: int, channels: int) -> tuple[tuple[int, int], ...]:
    """Return what cells work on, from the first to those after the last reduction."""
    return tuple((side // n, channels * n) for n in (1, 2, 4))


def report_slices(
    name: str, line: Line, batch: int, steps: int, epochs: int, shares: dict[int, float]
) -> dict:
    """Print and return the predicted step and hours on each slice."""
    rows = {}
    print(f"\n{name}: {steps:,} steps; estimate [fast, slow]")
    print(f"{'slice':<8}{'chips':>6}{'images':>7}  {'bound':<8}{'ms a step':>26}{'hours':>26}")
    for slice_, (chip, devices) in SLICES.items():
        found = predict(line, batch, devices, CHIPS[chip], shares)
        whole = [steps * seconds for seconds in found.seconds()]
        if name == "search":
            scored = predict(line, batch, devices, CHIPS[chip], shares, score=True)
            extra = scored.seconds()
            whole = [w + 2 * epochs * e for w, e in zip(whole, extra, strict=True)]
        print(
            f"{slice_:<8}{devices:>6}{batch // devices:>7}  {found.bound:<8}"
            f"{text_of(found.seconds(), 1e3, 1):>26}{text_of(tuple(whole), 1 / 3600, 1):>26}"
        )
        rows[slice_] = {
            "roofline": found.roofline,
            "reducing": found.reducing,
            "share": found.share,
            "step_seconds": found.seconds(),
            "hours": [seconds / 3600 for seconds in whole],
        }
    return rows


def report_growth(name: str, line: Line, batch: int, shares: dict[int, float]) -> list[dict]:
    """Print and return images a second of v5e chips: the batch fixed, and growing with them."""
    rows = []
    part = batch // 4
    print(f"\n{name} on v5e: estimated images/s, batch of {batch}, and of {part} a chip")
    print(f"{'chips':>6}{'fixed':>12}{'collectives':>13}{'growing':>12}{'collectives':>13}")
    for devices in DEVICES:
        row = {"devices": devices}
        for kind, size in (("fixed", batch), ("growing", part * devices)):
            found = predict(line, size, devices, CHIPS["v5e"], shares)
            estimate = found.seconds()[2]
            row[kind] = {
                "images_per_second": size / estimate,
                "collective_share": math.sqrt(found.reducing[0] * found.reducing[1]) / estimate,
            }
        fixed, growing = row["fixed"], row["growing"]
        print(
            f"{devices:>6}{fixed['images_per_second']:>12,.0f}{fixed['collective_share']:>13.0%}"
            f"{growing['images_per_second']:>12,.0f}{growing['collective_share']:>13.0%}"
        )
        rows.append(row)
    return rows


def report_input(
    line: Line, batch: int, shares: dict[int, float], decoded: float | None
) -> dict[str, dict]:
    """Print and return what a host must decode for its chips."""
    rows = {}
    print("\nImageNet input: images/s that a host must decode, estimate [slow, fast]")
    for slice_, (name, devices) in SLICES.items():
        chip = CHIPS[name]
        hosts = devices // chip.host_chips
        rates = [batch / s / hosts for s in predict(line, batch, devices, chip, shares).seconds()]
        rows[slice_] = {"hosts": hosts, "images_per_second": rates, "host_cores": chip.host_cores}
        print(f"{slice_:<8}{hosts:>4} hosts  {rates[2]:>8,.0f} [{rates[1]:,.0f}, {rates[0]:,.0f}]")
        if decoded is not None:
            print(f"{'':<8}{rates[2] / decoded:>10,.1f} of {chip.host_cores} cores")
    return rows


if __name__ == "__main__":
    main()
