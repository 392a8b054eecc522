"""One training step of the search, in three forms that do the same work.

general      the product's program: the architecture is an input, a runtime flag chooses child or
             parent, one compilation for everything (`supernet.apply` and `PathOptimizer`);
specialised  a program for one fixed architecture and one model: the same modules unrolled, plain
             autodiff, only the sampled operations' parameters;
pytorch      the same path in eager PyTorch, channels last, in a subprocess (`torch_supernet.py`).

A step is forward, backward, clip, SGD with momentum and weight decay. The three start from the
same weights and the same batch; loss and gradient norm of the first step are compared before
anything is timed. Timed steps alternate: general, specialised, pytorch, general, ...; never two at
once. Temporary memory is XLA's own account of the compiled program.

    python benchmarks/search_step.py --torch-python=/path/to/an/environment/with/torch/python

A table, then one JSON object as the last line. `ratio_general_to_specialised` and
`ratio_to_pytorch` are medians, over architectures and repeats, of (child + parent) over
(child + parent); `memory_ratio_general_to_specialised` is the median over architectures and models.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from harness import (
    PAUSE,
    Program,
    Torch,
    compile_program,
    machine_facts,
    named_arrays,
    progress,
    relative,
    spread,
    spread_text,
)
from step_forms import (
    OPTIMIZER,
    edge_group,
    general_step,
    sampled_names,
    sampled_params,
    specialised_rule,
    specialised_step,
)

from cpnas_jax.models import supernet
from cpnas_jax.models.operations import (
    OperationSettings,
)
from cpnas_jax.models.space import EDGES, NUM_EDGES, OPERATIONS
from cpnas_jax.path_optimizer import PathOptimizer

MODELS = ("child", "parent")
FORMS = ("general", "specialised", "pytorch")
NUM_CLASSES = 10
LOSS_TOLERANCE = 1e-4
NORM_TOLERANCE = 1e-2
"""Of the gradient's norm: in the child a rounding error can flip a sign."""

PYTORCH_CHILD_TOLERANCE = 0.1
"""Of the child's loss and gradient norm in PyTorch: no more than a sanity check.

Rounding flips signs, and an untrained deep child amplifies that. So no bound on the whole network
can be tight here; the parent's bounds are.
"""


def parse_flags() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32, help="a multiple of 4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--architectures", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with PyTorch")
    flags = parser.parse_args()
    if flags.image_size % 4 or min(vars(flags)[k] for k in ("repeats", "architectures")) < 1:
        parser.error("--image-size is a multiple of 4; --repeats and --architectures are positive")
    return flags


class Benchmark:
    """The programs, their states, and the steps taken."""

    def __init__(self, flags: argparse.Namespace, torch: Torch) -> None:
        self.flags, self.torch = flags, torch
        self.settings = supernet.SupernetSettings(
            cells=flags.cells,
            channels=flags.channels,
            reductions=tuple(sorted({flags.cells // 3, 2 * flags.cells // 3})),
            num_classes=NUM_CLASSES,
            operations=OperationSettings(),
        )
        rng = np.random.default_rng(flags.seed)
        size = flags.image_size
        self.images = rng.standard_normal((flags.batch, size, size, 3), dtype=np.float32)
        self.labels = rng.integers(0, NUM_CLASSES, flags.batch, dtype=np.int32)
        self.architectures = [
            rng.integers(0, len(OPERATIONS), (2, NUM_EDGES)).astype(np.int32)
            for _ in range(flags.architectures)
        ]
        params = jax.jit(supernet.init, static_argnums=(1, 2))(
            jax.random.key(flags.seed), self.settings, (size, size, 3)
        )
        self.params = jax.tree.map(np.asarray, params)
        self.optimizer = PathOptimizer(OPTIMIZER)
        self.batch = (jnp.asarray(self.images), jnp.asarray(self.labels))
        self.general = compile_program(
            jax.jit(general_step(self.settings, self.optimizer), donate_argnums=(0,)),
            self._general_state(),
            *self.batch,
            *self._general_inputs(0, 0, "child"),
        )
        progress(f"general compiled: {self.general.facts}")
        self.programs: dict[tuple[int, str], Program] = {}
        self.states: dict[tuple, tuple] = {}
        self.counts = dict.fromkeys(MODELS, 0)

    def _general_state(self):
        params = jax.tree.map(jnp.array, self.params)
        return params, self.optimizer.init(params)

    def _general_inputs(self, number: int, k: int, model: str):
        architecture = jnp.asarray(self.architectures[k])
        return jnp.int32(number), architecture, jnp.asarray(model == "child")

    def load(self, k: int, directory: str) -> None:
        """Compile the specialised programs of an architecture; give its weights to PyTorch."""
        architecture = self.architectures[k]
        chosen = sampled_params(self.params, architecture, self.settings)
        path = str(pathlib.Path(directory) / f"weights{k}.npz")
        np.savez(path, images=self.images, labels=self.labels, **named_arrays(chosen))
        for model in MODELS:
            binary = model == "child"
            params = jax.tree.map(jnp.array, chosen)
            state = (params, specialised_rule().init(params))
            step = jax.jit(
                specialised_step(self.settings, architecture, binary), donate_argnums=(0,)
            )
            self.programs[k, model] = compile_program(step, state, *self.batch)
            self.states["specialised", k, model] = state
            self.torch.ask(
                command="load",
                name=f"{k} {model}",
                path=path,
                cells=self._torch_cells(architecture),
                binary=binary,
                learning_rate=OPTIMIZER.learning_rate,
                momentum=OPTIMIZER.momentum,
                weight_decay=OPTIMIZER.weight_decay,
                gradient_clip=OPTIMIZER.gradient_clip,
            )
            progress(f"architecture {k} {model} compiled: {self.programs[k, model].facts}")

    def _torch_cells(self, architecture: np.ndarray) -> list[dict]:
        cells = []
        for shape in supernet.cell_shapes(self.settings):
            names = sampled_names(architecture, shape.kind)
            edges = [
                (f"edges.{e}", *EDGES[e], edge_group(shape.kind, e)[2], names[e])
                for e in range(NUM_EDGES)
            ]
            cells.append({**dataclasses.asdict(shape), "edges": edges})
        return cells

    def check(self, k: int) -> dict:
        """Take the first two steps of every form; return relative differences to general.

        The first compares the forward and the backward pass, the second the update too.
        """
        differences = {}
        for model in MODELS:
            self.states["general", model] = self._general_state()
            self.counts[model] = 0
            first = {form: self.step(form, k, model) for form in FORMS}
            second = {form: self.step(form, k, model) for form in FORMS}
            for form in FORMS[1:]:
                differences[f"{model} {form}"] = {
                    "loss": difference(first, form, "loss"),
                    "gradient_norm": difference(first, form, "gradient_norm"),
                    "loss_after_update": difference(second, form, "loss"),
                }
        progress(f"architecture {k} relative differences to general: {differences}")
        for name, found in differences.items():
            loose = PYTORCH_CHILD_TOLERANCE if name == "child pytorch" else 0.0
            if (
                not found["loss"] <= max(LOSS_TOLERANCE, loose)
                or not found["gradient_norm"] <= max(NORM_TOLERANCE, loose)
                or (name.startswith("parent") and not found["loss_after_update"] <= NORM_TOLERANCE)
            ):
                raise SystemExit(f"not the same work: architecture {k}, {name}: {found}")
        return differences

    def step(self, form: str, k: int, model: str) -> dict:
        """Take one step of a form; return its seconds, loss and gradient norm."""
        time.sleep(PAUSE)
        if form == "pytorch":
            return self.torch.ask(command="step", name=f"{k} {model}")
        # One supernet for all architectures, but a specialised state for each.
        key = ("general", model) if form == "general" else ("specialised", k, model)
        if form == "general":
            inputs = self._general_inputs(self.counts[model], k, model)
            program, arguments = self.general, (*self.batch, *inputs)
            self.counts[model] += 1
        else:
            program, arguments = self.programs[k, model], self.batch
        seconds, (state, loss, norm) = program.step(self.states[key], *arguments)
        self.states[key] = state
        return {"seconds": seconds, "loss": float(loss), "gradient_norm": float(norm)}

    def measure(self) -> np.ndarray:
        """Return seconds, f[repeats, architectures, models, forms]."""
        counts = (self.flags.repeats, self.flags.architectures, len(MODELS), len(FORMS))
        seconds = np.zeros(counts)
        for repeat, k, model, form in np.ndindex(*counts):
            seconds[repeat, k, model, form] = self.step(FORMS[form], k, MODELS[model])["seconds"]
        return seconds


def difference(results: dict, form: str, key: str) -> float:
    """Return how far a form is from the general one."""
    return relative(results[form][key], results["general"][key])


def step_ratios(seconds: np.ndarray, form: str) -> dict:
    """Return general over another form: child and parent together, and each alone."""
    general, other = seconds[..., 0], seconds[..., FORMS.index(form)]
    ratios = {"both": spread(general.sum(axis=2) / other.sum(axis=2))}
    for i, model in enumerate(MODELS):
        ratios[model] = spread(general[..., i] / other[..., i])
    return ratios


def summarise(
    benchmark: Benchmark, seconds: np.ndarray, differences: list[dict], load_before: float
) -> dict:
    """Return the JSON object."""
    flags, programs = benchmark.flags, benchmark.programs
    to_specialised = step_ratios(seconds, "specialised")
    to_pytorch = step_ratios(seconds, "pytorch")
    general_memory = benchmark.general.facts["temporary_bytes"]
    memory = {
        model: spread(
            [
                general_memory / programs[k, model].facts["temporary_bytes"]
                for k in range(flags.architectures)
            ]
        )
        for model in MODELS
    }
    every = [general_memory / program.facts["temporary_bytes"] for program in programs.values()]
    return {
        "benchmark": "search_step",
        "ratio_general_to_specialised": to_specialised["both"]["median"],
        "memory_ratio_general_to_specialised": spread(every)["median"],
        "ratio_to_pytorch": to_pytorch["both"]["median"],
        "ratios_general_to_specialised": to_specialised,
        "ratios_to_pytorch": to_pytorch,
        "memory_ratios_general_to_specialised": memory,
        "seconds": {
            form: {
                model: {
                    "all": spread(seconds[:, :, i, j]),
                    "architectures": [
                        spread(seconds[:, k, i, j]) for k in range(flags.architectures)
                    ],
                }
                for i, model in enumerate(MODELS)
            }
            for j, form in enumerate(FORMS)
        },
        "general": benchmark.general.facts,
        "specialised": {
            model: [programs[k, model].facts for k in range(flags.architectures)]
            for model in MODELS
        },
        "differences_to_general": differences,
        "architectures": [a.tolist() for a in benchmark.architectures],
        "sizes": {key: value for key, value in vars(flags).items() if key != "torch_python"},
        "machine": machine_facts(load_before, benchmark.torch),
    }


def print_table(benchmark: Benchmark, result: dict) -> None:
    """Print the figures for a reader."""
    header = f"{'':14}{'':8}" + "".join(f"{form:>24}" for form in FORMS)
    print(header + f"{'temporary MiB (gen/spec)':>27}")

    def cell(found: dict) -> str:
        return spread_text(found).rjust(24)

    mebibytes = benchmark.general.facts["temporary_bytes"] / 2**20
    for k in range(benchmark.flags.architectures):
        for model in MODELS:
            times = [result["seconds"][form][model]["architectures"][k] for form in FORMS]
            own = benchmark.programs[k, model].facts["temporary_bytes"] / 2**20
            text = f"architecture {k}".ljust(14) + f" {model:<7}" + "".join(map(cell, times))
            print(text + f"{mebibytes:.0f} / {own:.0f}".rjust(27))
    for model in MODELS:
        times = [result["seconds"][form][model]["all"] for form in FORMS]
        print(f"{'all':14} {model:<7}" + "".join(map(cell, times)))
    print("seconds a step: median [min, max]")
    for name in ("ratios_general_to_specialised", "ratios_to_pytorch"):
        parts = [f"{key}{cell(found)}" for key, found in result[name].items()]
        print(f"{name}: " + "; ".join(" ".join(part.split()) for part in parts))
    print(f"memory ratio: {result['memory_ratio_general_to_specialised']}")
    programs = (benchmark.general, *benchmark.programs.values())
    compiled = [p.facts["trace_seconds"] + p.facts["compile_seconds"] for p in programs]
    print("trace + compile, seconds: general, then specialised: " + _listed(compiled))


def _listed(seconds: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in seconds)


def main() -> None:
    """Check, measure, print."""
    flags = parse_flags()
    jax.config.update("jax_enable_compilation_cache", False)
    load_before = os.getloadavg()[0]
    torch = Torch(flags.torch_python, "torch_supernet.py")
    benchmark = Benchmark(flags, torch)
    differences = []
    with tempfile.TemporaryDirectory() as directory:
        for k in range(flags.architectures):
            benchmark.load(k, directory)
            differences.append(benchmark.check(k))
    seconds = benchmark.measure()
    result = summarise(benchmark, seconds, differences, load_before)
    torch.close()
    print_table(benchmark, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
