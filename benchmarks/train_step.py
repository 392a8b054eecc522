"""Steps of final training against the same steps in eager PyTorch.

The step is the product's (`cpnas_jax.train_step.make_batch_step`): forward, backward, both heads'
cross-entropies, clip, Adam, running averages; without drop path, augmentation and L_H. As in the
product, one call of a pmapped program with a donated state runs several steps. PyTorch, channels
last and with its fused Adam, runs in a subprocess (`torch_network.py`). Both start from the same
weights and see the same batch; loss and Adam's first moments after one step are compared before
anything is timed. Timed blocks of steps alternate, never two at once.

    python benchmarks/train_step.py --torch-python=/path/to/an/environment/with/torch/python

A table, then one JSON object as the last line. `seconds` are of a step, its blocks' means.
`ratio_to_pytorch` is the median, over the repeats, of a block's seconds over those of PyTorch's
next block. `peak_resident_bytes` are of the process during the timed steps, libraries included; for
JAX what compiling left behind too, hence XLA's own account of the program beside it.
"""

import argparse
import ctypes
import json
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import (
    PAUSE,
    Torch,
    compile_program,
    machine_facts,
    named_arrays,
    progress,
    relative,
    spread,
    spread_text,
)
from resident import peak_bytes, reset_peak

from cpnas_jax import train_optimizer
from cpnas_jax.architecture.named import named_genotype
from cpnas_jax.models import layers, network
from cpnas_jax.models.blocks import OperationSettings
from cpnas_jax.runtime import environment
from cpnas_jax.runtime.parallel import pmap_donated, replicate, to_host
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.train_step import LossSettings, Shard, StepSettings, TrainState, make_batch_step

FORMS = ("jax", "pytorch")
NUM_CLASSES = 10
IMAGE_SHAPE = (32, 32, 3)
LEARNING_RATE = 1e-3
GRADIENT_CLIP = 1e6
"""Out of reach, so that Adam's first moments tell the norm of the gradient; as much work."""

AUXILIARY_WEIGHT = 0.4
STEPS_PER_RUN = 100_000
"""Long enough for the learning rate's cosine to be constant here."""

TOLERANCES = {
    "float": {"loss": 1e-4, "moments": 1e-2, "loss_after_update": 1e-2},
    "binary": {"loss": 0.1, "moments": 0.1, "loss_after_update": 0.5},
}
"""Relative. Rounding flips signs, and an untrained deep child amplifies that: its bounds are a
sanity check; that both sides compute the same network is what the float ones say."""


def parse_flags() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genotype", default="DDPNAS_XNOR_1", help="a published name")
    parser.add_argument("--precision", choices=("binary", "float"), default="binary")
    parser.add_argument("--cells", type=int, default=10)
    parser.add_argument("--channels", type=int, default=36)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5, help="blocks of either")
    parser.add_argument("--steps", type=int, default=4, help="of a block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimization-level", type=int, default=3, help="of LLVM: 0 to 3")
    parser.add_argument("--formulation", choices=layers.FORMULATIONS, default="auto")
    parser.add_argument("--recompute", action="store_true", help="as network.recompute")
    parser.add_argument("--torch-python", required=True, help="a Python with PyTorch")
    flags = parser.parse_args()
    if min(flags.repeats, flags.steps) < 1:
        parser.error("--repeats and --steps are positive")
    return flags


def network_settings(flags: argparse.Namespace) -> network.NetworkSettings:
    """Return the network of the flags."""
    genotype = named_genotype(flags.genotype)
    edges = {
        kind: tuple((e.source, e.target, e.operation) for e in getattr(genotype, kind))
        for kind in ("normal", "reduce")
    }
    return network.NetworkSettings(
        **edges,
        cells=flags.cells,
        channels=flags.channels,
        num_classes=NUM_CLASSES,
        binary=flags.precision == "binary",
        recompute=flags.recompute,
        operations=OperationSettings(formulation=flags.formulation),
    )


def step_settings(settings: network.NetworkSettings, batch: int) -> StepSettings:
    """Return the step's: the two cross-entropies alone, nothing random."""
    return StepSettings(
        network=settings,
        loss=LossSettings(
            label_smoothing=0.0,
            auxiliary_weight=AUXILIARY_WEIGHT,
            reconstruction_weight=0.0,
            center_weight=0.0,
            parent_kernel=False,
        ),
        drop_path=0.0,
        average_decay=0.0,
        batch_size=batch,
        shards=Shards(1),
        crop_padding=0,
        flip=False,
        color_jitter=0.0,
        cutout=0,
        total_steps=STEPS_PER_RUN,
    )


def unstacked(params, settings: network.NetworkSettings) -> dict[str, np.ndarray]:
    """Return dotted name -> array, the cells of a scan apart."""
    cells = {}
    for stretch in network.stretches(settings):
        own = params[f"cells{stretch.first}"]
        for i in range(stretch.length):
            one = jax.tree.map(lambda x, i=i: x[i], own) if stretch.length > 1 else own
            cells[f"cells{stretch.first + i}"] = one
    return named_arrays({k: v for k, v in params.items() if not k.startswith("cells")} | cells)


def torch_cells(settings: network.NetworkSettings) -> list[dict]:
    """Return what `torch_supernet.Cell` is told."""
    cells = []
    for place in network.cell_places(settings):
        edges = [
            (
                f"edge{source}_{target}",
                source,
                target,
                2 if place.kind == "reduce" and source < 2 else 1,
                operation,
            )
            for source, target, operation in getattr(settings, place.kind)
        ]
        cells.append({**place._asdict(), "edges": edges})
    return cells


class Benchmark:
    """The program, its state, and the worker."""

    def __init__(self, flags: argparse.Namespace, torch: Torch, directory: str) -> None:
        self.flags, self.torch = flags, torch
        settings = network_settings(flags)
        rng = np.random.default_rng(flags.seed)
        images = rng.standard_normal((flags.batch, *IMAGE_SHAPE), dtype=np.float32)
        labels = rng.integers(0, NUM_CLASSES, flags.batch, dtype=np.int32)
        options = environment.compiler_options(flags.optimization_level)
        variables = jax.device_get(
            jax.jit(network.init, static_argnums=(1, 2))(
                jax.random.key(flags.seed), settings, IMAGE_SHAPE
            )
        )
        params = variables["params"]
        optimizer = train_optimizer.make_optimizer(
            "adam",
            train_optimizer.RateSettings(LEARNING_RATE, 0, STEPS_PER_RUN),
            momentum=0.0,
            weight_decay=0.0,
            gradient_clip=GRADIENT_CLIP,
            binary_kernels=jax.tree.map(lambda _: True, params),
        )
        self.state = replicate(
            TrainState(
                params=params,
                batch_stats=variables["batch_stats"],
                optimizer=optimizer.init(params),
                average=None,
                means=None,
                parent=None,
                step=np.zeros((), np.int32),
            )
        )
        batch_step = make_batch_step(step_settings(settings, flags.batch), optimizer, None)
        self.batch = replicate((images, labels))

        def block(state, images, labels, steps):
            def body(_, carry):
                whole = Shard(images, labels, jnp.arange(flags.batch, dtype=jnp.int32))
                state, metrics = batch_step(
                    carry[0], lambda _: whole, jax.random.key(0), jnp.int32(1)
                )
                return state, metrics["loss"]

            return jax.lax.fori_loop(jnp.int32(0), steps, body, (state, jnp.float32(0)))

        self.program = compile_program(
            pmap_donated(block), self.state, *self.batch, replicate(np.int32(1)), options=options
        )
        progress(f"compiled: {self.program.facts}")
        path = str(pathlib.Path(directory) / "weights.npz")
        np.savez(path, images=images, labels=labels, **unstacked(params, settings))
        self.torch.ask(
            command="load",
            name="network",
            path=path,
            cells=torch_cells(settings),
            binary=settings.binary,
            learning_rate=LEARNING_RATE,
            gradient_clip=GRADIENT_CLIP,
            auxiliary_weight=AUXILIARY_WEIGHT,
        )

    def block(self, form: str, steps: int) -> dict:
        """Take some steps; return the seconds of one and the last one's loss."""
        time.sleep(PAUSE)
        if form == "pytorch":
            answers = [self.torch.ask(command="step", name="network") for _ in range(steps)]
            seconds = sum(answer["seconds"] for answer in answers)
            return {"seconds": seconds / steps, "loss": answers[-1]["loss"]}
        count = replicate(np.int32(steps))
        seconds, (self.state, loss) = self.program.step(self.state, *self.batch, count)
        return {"seconds": seconds / steps, "loss": float(to_host(loss))}

    def check(self) -> dict:
        """Take the first two steps of both; return how far PyTorch's are from ours, relative.

        The first moments after one step are the gradient, times a constant.
        """
        first = {form: self.block(form, 1)["loss"] for form in FORMS}
        moments = {
            "jax": float(optax.global_norm(optax.tree.get(to_host(self.state.optimizer), "mu"))),
            "pytorch": self.torch.ask(command="moments", name="network")["norm"],
        }
        second = {form: self.block(form, 1)["loss"] for form in FORMS}
        found = {
            name: relative(values["pytorch"], values["jax"])
            for name, values in (
                ("loss", first),
                ("moments", moments),
                ("loss_after_update", second),
            )
        }
        progress(f"losses {first}, then {second}; relative differences {found}")
        for name, bound in TOLERANCES[self.flags.precision].items():
            if not found[name] <= bound:
                raise SystemExit(f"not the same work: {name} differs by {found[name]:.2g}")
        return found

    def measure(self) -> tuple[np.ndarray, dict[str, int]]:
        """Return seconds, f[repeats, forms], and the peak resident bytes of either process."""
        # What compiling freed would count as resident.
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak()
        self.torch.ask(command="reset_peak", name="network")
        seconds = np.array(
            [
                [self.block(form, self.flags.steps)["seconds"] for form in FORMS]
                for _ in range(self.flags.repeats)
            ]
        )
        worker = self.torch.ask(command="peak", name="network")
        return seconds, {"jax": peak_bytes(), "pytorch": worker["peak_resident_bytes"]}


def summarise(
    benchmark: Benchmark,
    seconds: np.ndarray,
    peaks: dict[str, int],
    differences: dict,
    load_before: float,
) -> dict:
    """Return the JSON object."""
    ratios = spread(seconds[:, 0] / seconds[:, 1])
    batch = benchmark.flags.batch
    return {
        "benchmark": "train_step",
        "ratio_to_pytorch": ratios["median"],
        "ratios_to_pytorch": ratios,
        "seconds": {form: spread(seconds[:, i]) for i, form in enumerate(FORMS)},
        "images_per_second": {
            form: round(batch / float(np.median(seconds[:, i])), 1) for i, form in enumerate(FORMS)
        },
        "peak_resident_bytes": peaks,
        "program": benchmark.program.facts,
        "differences_of_pytorch": differences,
        "sizes": {
            key: value for key, value in vars(benchmark.flags).items() if key != "torch_python"
        },
        "machine": machine_facts(load_before, benchmark.torch),
    }


def print_table(result: dict) -> None:
    """Print the figures for a reader."""
    print(f"{'':10}{'seconds a step':>24}{'images/s':>10}{'peak resident MiB':>20}")
    for form in FORMS:
        print(
            f"{form:10}{spread_text(result['seconds'][form]):>24}"
            f"{result['images_per_second'][form]:>10.1f}"
            f"{result['peak_resident_bytes'][form] / 2**20:>20.0f}"
        )
    facts = result["program"]
    print("seconds: median [least, largest]")
    print(f"ratio to PyTorch: {spread_text(result['ratios_to_pytorch'])}")
    print(
        f"trace {facts['trace_seconds']:.1f} s, compile {facts['compile_seconds']:.1f} s, "
        f"temporary memory {facts['temporary_bytes'] / 2**20:.0f} MiB"
    )


def main() -> None:
    """Check, measure, print."""
    flags = parse_flags()
    jax.config.update("jax_enable_compilation_cache", False)
    load_before = os.getloadavg()[0]
    torch = Torch(flags.torch_python, "torch_network.py")
    with tempfile.TemporaryDirectory() as directory:
        benchmark = Benchmark(flags, torch, directory)
    differences = benchmark.check()
    seconds, peaks = benchmark.measure()
    result = summarise(benchmark, seconds, peaks, differences, load_before)
    torch.close()
    print_table(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
