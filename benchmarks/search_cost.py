"""What a whole search costs: Algorithm 9 here, PC-DARTS here, and PC-DARTS in PyTorch.

cp           a sampled step of the child, one of the parent, and the share of scoring both: the
             search's own programs, random architectures
specialised  the same two training steps by a program for one fixed architecture
pc_darts     a bilevel step here, and a step of the weights alone, as in the warm-up
pytorch      both of them in eager PyTorch, channels last, in a subprocess (`torch_pc_darts.py`)

Data, batch, cells and channels are the same, PC-DARTS is float in both. Its first steps here and in
PyTorch are compared (loss of alpha's and of the weights' batch) before anything is timed. Steps
alternate, never two at once. The JAX forms, but for the specialised one, gather and crop their
images in the step; PyTorch finds them ready. What a search augments besides is left out everywhere.

A whole search is extrapolated from the steps, without compiling: `cp` is 35 * T sampled epochs of
child and parent, both scored after each on the validation part; `cp_plus` is 56 * T of the child
alone and all the scored architectures that it may have, on a tenth of that part; PC-DARTS is 50
epochs, 15 of them of the weights alone, and never scored. An epoch is half of 50,000 images, the
other half validates.

    python benchmarks/search_cost.py --torch-python=/path/to/an/environment/with/torch/python

A table, then one JSON object as the last line. `ratio_to_pytorch_pc_darts` and `ratio_to_pc_darts`
are whole-search times of cp and cp_plus over those of the other, medians over the repeats.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

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
    sampled_params,
    specialised_rule,
    specialised_step,
)

from cpnas_jax.architecture.sampling import num_sampled_epochs
from cpnas_jax.bilevel_step import (
    AlphaState,
    BilevelCall,
    BilevelSettings,
    BilevelState,
    alpha_adam,
    make_bilevel_call,
)
from cpnas_jax.config import base_config
from cpnas_jax.data.augment import normalise
from cpnas_jax.data.examples import Examples
from cpnas_jax.data.order import epoch_permutation, validation_key
from cpnas_jax.mixture_optimizer import MixtureOptimizer
from cpnas_jax.models import mixture, supernet
from cpnas_jax.models.mixture import MixtureSettings
from cpnas_jax.models.space import NUM_EDGES, OPERATIONS
from cpnas_jax.path_optimizer import PARENT, PathOptimizer
from cpnas_jax.relaxation import mixture_of
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.search_step import (
    Call,
    ModelState,
    StepSettings,
    make_score_call,
    make_train_call,
)
from cpnas_jax.strategies import sampled_strategy

MODELS = ("child", "parent")
NUM_CLASSES = 10
TRAINING, VALIDATION = 25_000, 25_000
ROUNDS = (1, 3)
TIMED = (
    *("cp child", "cp parent", "cp score child", "cp score parent"),
    *("specialised child", "specialised parent"),
    *("pc_darts bilevel", "pc_darts weights", "pytorch bilevel", "pytorch weights"),
)
TOLERANCES = {"first": 1e-4, "second": 1e-2}
"""Of the losses of two steps here and in PyTorch, relative; the second is after both updates."""


def parse_flags() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    search = base_config().search
    parser.add_argument("--cells", type=int, default=8, help="at least 3, for both cell types")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32, help="a multiple of 4")
    parser.add_argument("--partial", type=int, default=search.partial_channels)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--architectures", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with PyTorch")
    flags = parser.parse_args()
    too_few = flags.cells < 3 or min(flags.repeats, flags.architectures) < 1
    if flags.image_size % 4 or too_few:
        parser.error(
            "--image-size is a multiple of 4, --cells at least 3; --repeats and --architectures "
            "are positive"
        )
    return flags


def mapped(tree):
    """Give arrays the axis of the one device."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def on_one_device(function, donate: bool):
    """pmap a function over one device, as the search does over all."""
    donated = (0,) if donate else ()
    return jax.pmap(function, AXIS, devices=jax.devices()[:1], donate_argnums=donated)


class Benchmark:
    """The programs, their states, and the steps taken."""

    def __init__(self, flags: argparse.Namespace, torch: Torch) -> None:
        self.flags, self.torch = flags, torch
        self.search = base_config().search
        self.network = supernet.SupernetSettings(
            cells=flags.cells,
            channels=flags.channels,
            reductions=tuple(sorted({flags.cells // 3, 2 * flags.cells // 3})),
            num_classes=NUM_CLASSES,
        )
        rng = np.random.default_rng(flags.seed)
        self.examples, self.others = (self._examples(rng) for _ in range(2))
        self.architectures = rng.integers(
            0, len(OPERATIONS), (flags.architectures, 2, NUM_EDGES), dtype=np.int32
        )
        self.key = np.asarray(jax.random.key_data(jax.random.key(flags.seed)))
        self.step_settings = StepSettings(
            supernet=self.network,
            batch_size=flags.batch,
            shards=Shards(1),
            # What PyTorch gets must be the same images.
            crop_padding=0,
            flip=False,
            steps_per_epoch=TRAINING // flags.batch,
        )
        self.programs: dict[str, Program] = {}
        self.states: dict[str, Any] = {}
        self.counts = dict.fromkeys(TIMED, 0)
        self._make_cp()
        self._make_specialised()
        self._make_pc_darts()

    def _examples(self, rng: np.random.Generator) -> Examples:
        size = self.flags.image_size
        return Examples(
            rng.integers(0, 256, (self.flags.batch, size, size, 3)).astype(np.uint8),
            rng.integers(0, NUM_CLASSES, self.flags.batch).astype(np.int32),
            np.full(3, 0.5, np.float32),
            np.full(3, 0.25, np.float32),
        )

    def _compile(self, name: str, function, *arguments) -> None:
        self.programs[name] = compile_program(function, *arguments)
        progress(f"{name} compiled: {self.programs[name].facts}")

    def _make_cp(self) -> None:
        size = self.flags.image_size
        optimizer = PathOptimizer(OPTIMIZER)

        def initial(key) -> ModelState:
            params = supernet.init(key, self.network, (size, size, 3))
            return ModelState(params, optimizer.init(params))

        start = jax.device_get(jax.jit(initial)(jax.random.key(self.flags.seed)))
        for model in MODELS:
            self.states[f"cp {model}"] = mapped(start)
        self.params = start.params
        self.data = mapped(self.examples)
        train = on_one_device(make_train_call(self.step_settings, optimizer), donate=True)
        self._compile("cp", train, self.states["cp child"], self.data, self._cp_call(0, "child"))
        score = on_one_device(
            make_score_call(self.network, self.flags.batch, self.flags.batch, Shards(1)),
            donate=False,
        )
        params = self.states["cp child"].params
        self._compile("cp score", score, params, self.data, self._cp_call(0, "child"))

    def _cp_call(self, k: int, model: str) -> Call:
        return mapped(
            Call(
                architecture=self.architectures[k],
                active=np.float32(1),
                binary=np.asarray(model == "child"),
                epoch=np.int32(0),
                rate_epoch=np.int32(0),
                first_step=np.int32(0),
                num_steps=np.int32(1),
                stop=np.int32(0),
                passes=np.int32(1),
                key=self.key,
            )
        )

    def _make_specialised(self) -> None:
        """For the first architecture alone; `search_step.py` has more."""
        architecture = self.architectures[0]
        chosen = sampled_params(self.params, architecture, self.network)
        images = jax.jit(normalise)(self.examples.images, self.examples.mean, self.examples.std)
        self.batch = (images, jnp.asarray(self.examples.labels))
        for model in MODELS:
            params = jax.tree.map(jnp.array, chosen)
            state = (params, specialised_rule().init(params))
            step = specialised_step(self.network, architecture, model == "child")
            name = f"specialised {model}"
            self._compile(name, jax.jit(step, donate_argnums=(0,)), state, *self.batch)
            self.states[name] = state

    def _make_pc_darts(self) -> None:
        flags, search = self.flags, self.search
        settings = MixtureSettings(self.network, flags.partial, edge_normalisation=True)
        relaxation = mixture_of(settings)
        # PyTorch's rate is constant, and these steps are those of a late epoch.
        constant = dataclasses.replace(OPTIMIZER, total_steps=10**9)
        optimizer = MixtureOptimizer(constant, PARENT)
        rule = alpha_adam(search.alpha_learning_rate, search.alpha_weight_decay)

        def initial(key) -> BilevelState:
            params = relaxation.init(key, (flags.image_size, flags.image_size, 3))
            alpha = mixture.init_alpha(key, True)
            models = jax.tree.map(
                lambda leaf: leaf[None], ModelState(params, optimizer.init(params))
            )
            return BilevelState(models, AlphaState(alpha, rule.init(alpha)))

        self.bilevel_start = jax.device_get(jax.jit(initial)(jax.random.key(flags.seed)))
        self.states["pc_darts"] = mapped(self.bilevel_start)
        self.other_data = mapped(self.others)
        bilevel = BilevelSettings(self.step_settings, (False,), (1.0,), search.alpha_warmup)
        function = on_one_device(
            make_bilevel_call(bilevel, relaxation, optimizer, rule), donate=True
        )
        state = self.states["pc_darts"]
        call = self._bilevel_call(search.alpha_warmup)
        self._compile("pc_darts", function, state, self.data, self.other_data, call)

    def _bilevel_call(self, epoch: int) -> BilevelCall:
        return mapped(
            BilevelCall(
                survivors=np.ones((2, NUM_EDGES, len(OPERATIONS)), bool),
                model=np.int32(0),
                epoch=np.int32(epoch),
                first_step=np.int32(0),
                num_steps=np.int32(1),
                stop=np.int32(0),
                passes=np.int32(1),
                key=self.key,
            )
        )

    def load_pytorch(self, directory: str) -> None:
        """Give weights, alpha and both batches to PyTorch."""
        key, epoch = jax.random.wrap_key_data(self.key), self.search.alpha_warmup
        arrays = {}
        for prefix, own, part in (
            ("", key, self.examples),
            ("other_", validation_key(key), self.others),
        ):
            rows = np.asarray(epoch_permutation(own, epoch, len(part.labels)))
            images = jax.jit(normalise)(part.images[rows], part.mean, part.std)
            arrays[f"{prefix}images"] = np.asarray(images)
            arrays[f"{prefix}labels"] = part.labels[rows]
        params = jax.tree.map(lambda leaf: leaf[0], self.bilevel_start.models.params)
        shapes = supernet.cell_shapes(self.network)
        cells = []
        for shape, cell in zip(shapes, params["cells"], strict=True):
            edges = {}
            for edge in range(NUM_EDGES):
                group, row, _ = edge_group(shape.kind, edge)
                edges[str(edge)] = jax.tree.map(lambda x, r=row: x[r], cell["edges"][group])
            cells.append({**cell, "edges": edges})
        arrays |= named_arrays({**params, "cells": tuple(cells)})
        alpha = self.bilevel_start.alpha.alpha
        arrays |= {f"alpha.{name}": own for name, own in alpha.items()}
        path = str(pathlib.Path(directory) / "pc_darts.npz")
        np.savez(path, **arrays)
        self.torch.ask(
            command="load",
            name="pc_darts",
            path=path,
            cells=[dataclasses.asdict(shape) for shape in shapes],
            partial=self.flags.partial,
            learning_rate=OPTIMIZER.learning_rate,
            momentum=OPTIMIZER.momentum,
            weight_decay=OPTIMIZER.weight_decay,
            gradient_clip=OPTIMIZER.gradient_clip,
            alpha_learning_rate=self.search.alpha_learning_rate,
            alpha_weight_decay=self.search.alpha_weight_decay,
        )

    def check(self) -> dict:
        """Take two bilevel steps here and in PyTorch; return how far the losses are apart.

        The second compares the updates of alpha and of the weights too.
        """
        differences = {}
        for number in ("first", "second"):
            here, there = self.take("pc_darts bilevel", 0), self.take("pytorch bilevel", 0)
            for name in ("objective", "loss"):
                differences[f"{number} {name}"] = relative(here[name], there[name])
        progress(f"relative differences to PyTorch: {differences}")
        if not all(found <= TOLERANCES[name.split()[0]] for name, found in differences.items()):
            raise SystemExit(f"not the same work: {differences}")
        return differences

    def take(self, name: str, k: int) -> dict:
        """Take one step; return its seconds and what it tells."""
        time.sleep(PAUSE)
        form, kind = name.split(maxsplit=1)
        if form == "pytorch":
            command = "step" if kind == "bilevel" else "weights_step"
            return self.torch.ask(command=command, name="pc_darts")
        if form == "pc_darts":
            epoch = self.search.alpha_warmup if kind == "bilevel" else 0
            arguments = (self.data, self.other_data, self._bilevel_call(epoch))
            seconds, (state, found) = self.programs["pc_darts"].step(
                self.states["pc_darts"], *arguments
            )
            self.states["pc_darts"] = state
            return {
                "seconds": seconds,
                "objective": float(found["objective"][0]),
                "loss": float(found["loss"][0, 0]),
            }
        if form == "specialised":
            seconds, (state, *_) = self.programs[name].step(self.states[name], *self.batch)
            self.states[name] = state
            return {"seconds": seconds}
        model = kind.split()[-1]
        call = self._cp_call(k, model)
        if kind.startswith("score"):
            params = self.states[f"cp {model}"].params
            return {"seconds": self.programs["cp score"].step(params, self.data, call)[0]}
        seconds, (state, _) = self.programs["cp"].step(self.states[name], self.data, call)
        self.states[name] = state
        return {"seconds": seconds}

    def measure(self) -> dict[str, np.ndarray]:
        """Return seconds of every timed step, f[repeats]; of cp means over the architectures."""
        seconds = {name: np.zeros(self.flags.repeats) for name in TIMED}
        for repeat in range(self.flags.repeats):
            for name in TIMED:
                count = self.flags.architectures if name.startswith("cp") else 1
                found = [self.take(name, k)["seconds"] for k in range(count)]
                seconds[name][repeat] = np.mean(found)
            progress(f"repeat {repeat + 1} of {self.flags.repeats}")
        return seconds


def plus_epochs(search, rounds: int) -> int:
    """Return the sampled epochs of the child that `cp_plus` trains."""
    config = base_config()
    config.search.update(strategy="cp_plus", rounds=rounds, plus_beta_p=search.plus_beta_p)
    return sampled_strategy(config).total


def whole_searches(seconds: dict[str, np.ndarray], batch: int, search) -> dict[str, np.ndarray]:
    """Return the seconds of each whole search, f[repeats]."""
    steps, scorings = TRAINING // batch, -(-VALIDATION // batch)
    epoch = sum(
        steps * seconds[f"cp {model}"] + scorings * seconds[f"cp score {model}"] for model in MODELS
    )
    whole = {f"cp T{rounds}": num_sampled_epochs(rounds) * epoch for rounds in ROUNDS}
    score = -(-search.plus_score_examples // batch) * seconds["cp score child"]
    for rounds in ROUNDS:
        own = plus_epochs(search, rounds)
        trained = own * steps * seconds["cp child"]
        whole[f"cp_plus T{rounds}"] = trained + (own + search.max_scored) * score
    moving = search.epochs - search.alpha_warmup
    for form in ("pc_darts", "pytorch"):
        whole[form] = steps * (
            moving * seconds[f"{form} bilevel"] + search.alpha_warmup * seconds[f"{form} weights"]
        )
    return whole


def summarise(
    benchmark: Benchmark, seconds: dict[str, np.ndarray], differences: dict, load_before: float
) -> dict:
    """Return the JSON object."""
    flags = benchmark.flags
    whole = whole_searches(seconds, flags.batch, benchmark.search)
    ratios = {
        form: {own: spread(whole[own] / whole[form]) for own in whole if own.startswith("cp")}
        for form in ("pytorch", "pc_darts")
    }
    pair = seconds["cp child"] + seconds["cp parent"]
    memory = {name: program.facts for name, program in benchmark.programs.items()}
    memory["pytorch"] = benchmark.torch.ask(command="memory", name="pc_darts")

    def medians(form: str) -> dict:
        return {name: found["median"] for name, found in ratios[form].items()}

    return {
        "benchmark": "search_cost",
        "ratio_to_pytorch_pc_darts": medians("pytorch"),
        "ratio_to_pc_darts": medians("pc_darts"),
        "ratios_to_pytorch_pc_darts": ratios["pytorch"],
        "ratios_to_pc_darts": ratios["pc_darts"],
        "ratio_pc_darts_to_pytorch": spread(whole["pc_darts"] / whole["pytorch"]),
        "ratio_pair_to_specialised": spread(
            pair / (seconds["specialised child"] + seconds["specialised parent"])
        ),
        "step_seconds": {name: spread(found) for name, found in seconds.items()},
        "search_hours": {name: spread(found / 3600) for name, found in whole.items()},
        "memory": memory,
        "differences_to_pytorch": differences,
        "sizes": {key: value for key, value in vars(flags).items() if key != "torch_python"},
        "machine": machine_facts(load_before, benchmark.torch),
    }


def print_table(result: dict) -> None:
    """Print the figures for a reader."""
    print(f"{'step':22}{'seconds: median [min, max]':>30}")
    for name, found in result["step_seconds"].items():
        print(f"{name:22}{spread_text(found):>30}")
    print(f"{'whole search':22}{'hours':>30}")
    for name, found in result["search_hours"].items():
        print(f"{name:22}{spread_text(found):>30}")
    print(f"{'memory':22}{'MiB beside arguments':>30}{'arguments MiB':>20}")
    for name, found in result["memory"].items():
        if name == "pytorch":
            print(f"{name:22}{found['peak_bytes'] / 2**20:>30.0f}{'(all, resident)':>20}")
            continue
        own = found["temporary_bytes"] / 2**20, found["argument_bytes"] / 2**20
        print(f"{name:22}{own[0]:>30.0f}{own[1]:>20.0f}")
    for name in ("ratios_to_pytorch_pc_darts", "ratios_to_pc_darts"):
        texts = [f"{rounds} {spread_text(found)}" for rounds, found in result[name].items()]
        print(f"{name}: {'; '.join(texts)}")


def main() -> None:
    """Check, measure, print."""
    flags = parse_flags()
    jax.config.update("jax_enable_compilation_cache", False)
    load_before = os.getloadavg()[0]
    torch = Torch(flags.torch_python, "torch_pc_darts.py")
    benchmark = Benchmark(flags, torch)
    with tempfile.TemporaryDirectory() as directory:
        benchmark.load_pytorch(directory)
        differences = benchmark.check()
    seconds = benchmark.measure()
    result = summarise(benchmark, seconds, differences, load_before)
    torch.close()
    print_table(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
