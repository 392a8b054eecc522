"""Float operations, cells and networks agree with PyTorch in value and gradient.

PyTorch computes in float64 with the same weights. Bounds are relative to the largest magnitude of
the compared array: values 1e-5, gradients with respect to inputs and to every parameter 1e-4,
running averages 1e-5. PyTorch's running variances are unbiased, flax's biased: what is compared is
the biased one (`torch_weights.BiasedVariance`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK

torch = pytest.importorskip(
    "torch", reason="parity tests need PyTorch: pip install -e '.[test,parity]'"
)

import torch_cells  # noqa: E402
import torch_weights  # noqa: E402

from cpnas_jax.architecture.named import named_genotype  # noqa: E402
from cpnas_jax.models import network  # noqa: E402
from cpnas_jax.models.blocks import OperationSettings  # noqa: E402
from cpnas_jax.models.operations import Preprocess, make_operation  # noqa: E402
from cpnas_jax.models.space import EDGES, OPERATIONS  # noqa: E402

VALUES, GRADIENTS = 1e-5, 1e-4
CHANNELS = 4
FORMS = ("native", "shifted")


def image(size, channels=CHANNELS, images=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(images, *size, channels)).astype(np.float32)


def drawn(shapes, seed=1):
    """Random parameters and running averages; scales and variances away from 0."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        values = generator.normal(size=leaf.shape) * 0.5
        if path[-1].key in ("scale", "var"):
            values = 0.5 + np.abs(values)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def close(found, expected, tolerance, name):
    error, largest = np.max(np.abs(found - expected)), np.max(np.abs(expected))
    assert found.shape == expected.shape, name
    assert error <= tolerance * largest, f"{name}: {error:.2e} of {largest:.2e}"


def agree(apply, shapes, module, inputs, lengths=(), gradients=True):
    """Compare a function of (variables, inputs) -> (outputs, changed averages) with a module.

    Args:
        apply: of the package.
        shapes: of its variables.
        module: PyTorch's, called with as many images; its mode says what BN does.
        inputs: NHWC arrays.
        lengths: see `torch_weights.torch_names`.
        gradients: whether gradients are compared too.
    """
    variables = drawn(shapes)
    params, stats = variables.get("params", {}), variables.get("batch_stats", {})
    module = module.double()
    torch_weights.load(module, params, stats, lengths)
    running = torch_weights.BiasedVariance(module)
    images = [torch_weights.to_torch(x) for x in inputs]
    expected = module(*images)
    expected = expected if isinstance(expected, tuple) else (expected,)
    expected = [y for y in expected if y is not None]

    generator = np.random.default_rng(2)
    weights = [
        generator.normal(size=torch_weights.to_numpy(y).shape).astype(np.float32) for y in expected
    ]

    def applied(params, inputs):
        outputs, changed = apply({"params": params, "batch_stats": stats}, inputs)
        return jax.tree.leaves(outputs), changed

    def run(params, inputs):
        if not gradients:
            return *applied(params, inputs), None
        outputs, pullback, changed = jax.vjp(applied, params, inputs, has_aux=True)
        return outputs, changed, pullback(list(map(jnp.asarray, weights)))

    found, changed, pulled = jax.jit(run, compiler_options=QUICK)(params, inputs)
    for i, (y, value) in enumerate(zip(found, expected, strict=True)):
        close(y, torch_weights.to_numpy(value), VALUES, f"output {i}")
    averages = running.averages(module)
    named = torch_weights.torch_names(changed, lengths)
    assert named.keys() == averages.keys()
    for name, average in named.items():
        close(average, averages[name], VALUES, name)
    if not gradients:
        return
    parts = zip(expected, map(torch_weights.to_torch, weights), strict=True)
    sum((y * weight).sum() for y, weight in parts).backward()
    for i, (gradient, x) in enumerate(zip(pulled[1], images, strict=True)):
        close(gradient, torch_weights.to_numpy(x.grad), GRADIENTS, f"gradient of input {i}")
    named = torch_weights.torch_names(pulled[0], lengths)
    values = torch_weights.gradients(module, params, lengths)
    assert named.keys() == values.keys() == dict(module.named_parameters()).keys()
    for name, gradient in named.items():
        close(gradient, values[name], GRADIENTS, f"gradient of {name}")


def parent(module):
    """The form of `agree` of one of the package's modules that is given an image and a flag."""

    def apply(variables, inputs):
        y, changed = module.apply(variables, *inputs, False, mutable=["batch_stats"])
        return y, changed.get("batch_stats", {})

    return apply


def shapes_of(module, *arguments):
    """Shapes of a module's variables."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: module.init(key, *arguments), key)


# Operations, with the search's BN


@pytest.mark.parametrize(("form", "size"), [("native", (7, 5)), ("shifted", (7, 6))])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name, stride, size, form):
    module = make_operation(name, CHANNELS, stride, OperationSettings(formulation=form))
    x = image(size)
    expected = torch_cells.operation(name, CHANNELS, stride, final=False)
    agree(parent(module), shapes_of(module, x, False), expected, (x,))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_equal_maxima_go_where_pytorch_sends_them(stride, form):
    module = make_operation("max_pool_3x3", 3, stride, OperationSettings(formulation=form))
    x = np.random.default_rng(0).integers(-3, 0, size=(2, 7, 6, 3)).astype(np.float32)
    expected = torch_cells.operation("max_pool_3x3", 3, stride, final=False)
    agree(parent(module), shapes_of(module, x, False), expected, (x,))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "reduce"), [((6, 5), False), ((8, 6), True), ((7, 6), True)])
def test_preprocess(size, reduce, form):
    module = Preprocess(CHANNELS, reduce, OperationSettings(formulation=form))
    x = image(size, 6)
    expected = torch_cells.preprocess(6, CHANNELS, reduce, final=False)
    agree(parent(module), shapes_of(module, x, False), expected, (x,))


# Cells and what surrounds them, with the BN of final training


def edges_of(name):
    genotype = named_genotype(name)
    return {
        kind: tuple((e.source, e.target, e.operation) for e in getattr(genotype, kind))
        for kind in ("normal", "reduce")
    }


TOP2 = edges_of("DDPNAS_XNOR_1")
ALL = {
    kind: tuple((*edge, OPERATIONS[(3 * i + first) % 8]) for i, edge in enumerate(EDGES))
    for kind, first in (("normal", 0), ("reduce", 2))
}


@pytest.mark.parametrize("normalization", ["train", "running"])
@pytest.mark.parametrize("kind", ["normal", "reduce"])
@pytest.mark.parametrize("policy", ["all", "top2"])
def test_cell(policy, kind, normalization):
    edges = {"all": ALL, "top2": TOP2}[policy][kind]
    assert any(name == "none" for *_, name in edges) == (policy == "all")
    # One of each kind has a first input of twice the resolution.
    reduce_first = (policy == "all") == (kind == "reduce")
    place = network.CellPlace(kind, CHANNELS, reduce_first)
    # The shifted form compiles for longer: one cell of each kind.
    form = "shifted" if (policy, normalization) == ("top2", "train") else "native"
    settings = OperationSettings(normalization=normalization, formulation=form)
    cell = network.Cell(edges, place, False, settings)
    inputs = (image((11, 10) if reduce_first else (6, 5), 5), image((6, 5), 6, seed=3))

    def apply(variables, inputs):
        ((_, y), _), changed = cell.apply(variables, inputs, None, mutable=["batch_stats"])
        return y, changed["batch_stats"]

    expected = torch_cells.Cell(edges, kind, (5, 6), CHANNELS, reduce_first, final=True)
    expected.train(normalization == "train")
    agree(apply, shapes_of(cell, inputs, None), expected, inputs)


@pytest.mark.parametrize(("size", "form"), [((16, 16), "native"), ((9, 11), "shifted")])
def test_imagenet_stem(size, form):
    settings = OperationSettings(normalization="train", formulation=form)
    stem = network.Stem("imagenet", CHANNELS, settings)
    x = image(size, 3)

    def apply(variables, inputs):
        outputs, changed = stem.apply(variables, *inputs, mutable=["batch_stats"])
        return outputs, changed["batch_stats"]

    agree(apply, shapes_of(stem, x), torch_cells.ImagenetStem(CHANNELS), (x,))


@pytest.mark.parametrize(("size", "stride"), [(8, 3), (7, 2)])
def test_auxiliary_head_pools_as_on_cifar_and_imagenet(size, stride):
    head = network.Auxiliary(5, OperationSettings(normalization="train"))
    x = image((size, size), 6)

    def apply(variables, inputs):
        y, changed = head.apply(variables, *inputs, mutable=["batch_stats"])
        return y, changed["batch_stats"]

    agree(apply, shapes_of(head, x), torch_cells.Auxiliary(6, 5, stride), (x,))


# Whole networks

# Few edges a cell: cheap to compile.
CHEAP = {
    "normal": (
        *((1, 2, "dil_conv_3x3"), (0, 3, "skip_connect")),
        *((0, 4, "max_pool_3x3"), (1, 5, "avg_pool_3x3")),
    ),
    "reduce": (
        *((1, 2, "skip_connect"), (0, 3, "sep_conv_3x3")),
        *((0, 4, "max_pool_3x3"), (1, 5, "avg_pool_3x3")),
    ),
}


def network_case(cells, train):
    settings = network.NetworkSettings(
        **CHEAP,
        cells=cells,
        channels=2,
        num_classes=5,
        binary=False,
        operations=OperationSettings(formulation="native"),
    )

    def apply(variables, inputs):
        outputs, changed = network.Network(settings).apply(
            variables, *inputs, train=train, mutable=["batch_stats"]
        )
        return outputs, changed["batch_stats"]

    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), settings, (32, 32, 3)))
    module = torch_cells.Network(**CHEAP, cells=cells, channels=2, classes=5).train(train)
    lengths = [(stretch.first, stretch.length) for stretch in network.stretches(settings)]
    return apply, shapes, module, (image((32, 32), 3, images=6),), lengths


def test_network_in_training():
    """Stem, a cell of every kind, auxiliary head, classifier."""
    agree(*network_case(4, True))


def test_network_in_evaluation():
    """Ten cells, of which the last two are one scan over stacked weights."""
    *case, lengths = network_case(10, False)
    assert lengths[-1] == (8, 2)
    agree(*case, lengths, gradients=False)
