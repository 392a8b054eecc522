"""Predictions, not measurements: what the CIFAR-10 search and the ImageNet training cost on TPUs.

Operations, bytes and collectives of a step are counted in the package's own programs (`costs.py`,
`workloads.py`). A step is then predicted as

    max(matrix / peak, (depthwise + other) / vector units, bytes / bandwidth) / share
        + reduced bytes * 2 (n - 1) / n / interconnect + rounds * latency

where `share` is the part of that roofline that is reached: assumed as a range, and for one
estimate taken from the cycles that the TPU's own compiler notes for each operation, equally
sampled, at the images a chip has (`tpu_cycles.py`; linear in the logarithm between the numbers of
images compiled for, and constant beyond them).

    python benchmarks/scaling.py --cycles=docs/tpu_cycles.json --decoded=267

Tables, then one JSON object as the last line. Nothing is compiled or run; some minutes.
"""

import argparse
import collections
import dataclasses
import json
import math
from typing import Any

import numpy as np
from chips import CHIPS, SLICES, V5E_CLOCK, Chip, collective_seconds, roofline_seconds
from harness import progress
from tpu_cycles import Case, operation_cost
from workloads import (
    CIFAR_IMAGES,
    IMAGENET_IMAGES,
    Work,
    full_config,
    search_work,
    training_work,
)

from cpnas_jax.models.space import NUM_OPERATIONS
from cpnas_jax.runtime.costs import Cost

LATENCIES = (5e-6, 30e-6)
"""Seconds of a small all-reduce, which waits for what is before it."""

SHARES = (0.1, 0.4)
"""Of the roofline; a network of small convolutions reaches no more."""

COLUMNS = ("fast", "slow", "compiler")
"""The larger share and the least latency, the smaller and the largest, the compiler's share."""

DEVICES = (1, 2, 4, 8, 16, 32, 64)


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
            own = max(limits.values()), count / V5E_CLOCK
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
    """What a step takes on some devices.

    Attributes:
        roofline: limit -> least seconds.
        reducing: seconds of collectives with the least and the largest latency.
        share: of the roofline, by the compiler's cycles.
    """

    roofline: dict[str, float]
    reducing: tuple[float, float]
    share: float

    @property
    def bound(self) -> str:
        """Return the limit that decides."""
        return max(self.roofline, key=self.roofline.__getitem__)

    def middle_reducing(self) -> float:
        """Return the geometric mean of the seconds of collectives."""
        return math.sqrt(self.reducing[0] * self.reducing[1])

    def seconds(self) -> np.ndarray:
        """Return the seconds of a step by the `COLUMNS`."""
        least = max(self.roofline.values())
        fast, slow = self.reducing
        return np.array(
            [
                least / SHARES[1] + fast,
                least / SHARES[0] + slow,
                least / self.share + self.middle_reducing(),
            ]
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


def columns(values: np.ndarray, digits: int) -> str:
    """Return a figure for each of `COLUMNS`."""
    return "".join(f"{value:>10,.{digits}f}" for value in values)


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
        "largest_collective_megabytes": max(size for _, size in cost.collectives) / 1e6,
        "collectives": cost.num_collectives(),
        "rounds": line.rounds,
    }
    print(f"\n{name}, a step of {batch} images")
    for key, value in facts.items():
        print(f"  {key:<30}{value:>12,.1f}")
    return facts


def main() -> None:
    """Count, predict, print."""
    flags = parse_flags()
    with open(flags.cycles) as file:
        cycles = {case["case"]: case["cycles"] for case in json.load(file)["cases"]}
    config, training = full_config("cifar10", "search"), full_config("imagenet", "train")
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
    heading = "".join(f"{column:>10}" for column in COLUMNS)
    print(f"\n{name}: {steps:,} steps")
    print(f"{'slice':<8}{'chips':>6}{'images':>7}  {'bound':<8}   ms: {heading}  hours: {heading}")
    for slice_, (chip, devices) in SLICES.items():
        found = predict(line, batch, devices, CHIPS[chip], shares)
        whole = steps * found.seconds()
        if name == "search":
            scored = predict(line, batch, devices, CHIPS[chip], shares, score=True)
            whole += 2 * epochs * scored.seconds()
        hours = whole / 3600
        print(
            f"{slice_:<8}{devices:>6}{batch // devices:>7}  {found.bound:<8}   ms: "
            f"{columns(1e3 * found.seconds(), 1)}  hours: {columns(hours, 2)}"
        )
        rows[slice_] = {
            **dataclasses.asdict(found),
            "step_seconds": dict(zip(COLUMNS, found.seconds(), strict=True)),
            "hours": dict(zip(COLUMNS, hours, strict=True)),
        }
    return rows


def report_growth(name: str, line: Line, batch: int, shares: dict[int, float]) -> list[dict]:
    """Print and return images a second of v5e chips: the batch fixed, and growing with them."""
    rows = []
    part = batch // 4
    print(
        f"\n{name} on v5e: images/s by the compiler's share, batch of {batch}, and of {part} a chip"
    )
    print(f"{'chips':>6}{'fixed':>12}{'collectives':>13}{'growing':>12}{'collectives':>13}")
    for devices in DEVICES:
        row = {"devices": devices}
        for kind, size in (("fixed", batch), ("growing", part * devices)):
            found = predict(line, size, devices, CHIPS["v5e"], shares)
            estimate = found.seconds()[2]
            row[kind] = {
                "images_per_second": size / estimate,
                "collective_share": found.middle_reducing() / estimate,
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
    print(f"\nImageNet input: images/s that a host must decode, by {', '.join(COLUMNS)}")
    for slice_, (name, devices) in SLICES.items():
        chip = CHIPS[name]
        hosts = devices // chip.host_chips
        rates = batch / hosts / predict(line, batch, devices, chip, shares).seconds()
        rows[slice_] = {
            "hosts": hosts,
            "images_per_second": dict(zip(COLUMNS, rates, strict=True)),
            "host_cores": chip.host_cores,
        }
        print(f"{slice_:<8}{hosts:>4} hosts   images/s: {columns(rates, 0)}")
        if decoded is not None:
            cores = columns(rates / decoded, 1)
            print(f"{'':<20}cores:    {cores} of {chip.host_cores}")
    return rows


if __name__ == "__main__":
    main()
