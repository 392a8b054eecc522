"""Every key is checked, read and documented; every mistake is named in one line."""

import ast
import importlib.util
import pathlib
import re

import pytest
from reads import OF_GRADIENT, OF_SAMPLED

from cpnas_jax import config as configs
from cpnas_jax import config_keys, config_rules
from cpnas_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


def load(path, argument):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def test_every_key_has_a_rule():
    assert set(config_keys.flatten(configs.base_config())) == configs.RULED_KEYS


EVIDENCE = re.compile(r"\[(paper|kin|ours)\]")


def settings_in(path):
    """Yield (name, first line, last line, first line of its section) of every value that is set."""
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    (function,) = (n for n in functions if n.name in ("base_config", "get_config"))
    sections = {}
    for node in function.body:
        match node:
            case ast.Assign(targets=[_, ast.Name(id=section)]):
                sections[section] = node.lineno
            case ast.Assign(targets=[ast.Attribute() as key]):
                section, name = ast.unparse(key).rsplit(".", 1)
                yield f"{section}.{name}", node.lineno, node.end_lineno, sections.get(section)
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="update") as call) as update):
                for key in update.keywords:
                    name = f"{ast.unparse(call.value)}.{key.arg}"
                    yield name, key.value.lineno, key.value.end_lineno, node.lineno


@pytest.mark.parametrize("path", [ROOT / "cpnas_jax/config.py", *FILES], ids=lambda path: path.stem)
def test_every_value_stands_with_its_evidence(path):
    """Behind it, in the comment before it, or behind the beginning of its section."""
    lines = ["", *path.read_text().splitlines()]
    found = list(settings_in(path))
    for name, first, last, section in found:
        while lines[first - 1].lstrip().startswith("#"):
            first -= 1
        text = "\n".join([*lines[first : last + 1], lines[section] if section else ""])
        assert EVIDENCE.search(text), name
    if path not in FILES:
        assert len(found) == len(configs.RULED_KEYS)


SEARCHLESS = ("imagenet",)
"""Configs of final training alone: their cells are found on CIFAR-10."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "argument",
    [
        *(None, "small,train", "summary,medium,plus", "evaluate,plus,large"),
        *(mode + end for mode in config_rules.MODES for end in ("", ",smoke")),
    ],
)
def test_every_config_builds_and_validates(path, argument):
    mode = (argument or "").split(",")[0]
    if path.stem in SEARCHLESS and mode in ("search", "pipeline", "compare"):
        with pytest.raises(UserError, match=f"has no {mode}, only train, evaluate, summary"):
            load(path, argument)
        return
    config = load(path, argument)
    configs.validate(config, num_devices=1)
    assert config.is_locked
    assert mode in ("", config.mode, "small")
    with pytest.raises(UserError, match="'nonsense' is unknown"):
        load(path, "nonsense")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sizes_grow_and_plus_turns_its_levers_on(path):
    plain, *sizes = (
        load(path, argument).network for argument in ("train", "small", "medium", "large")
    )
    costs = [size.cells * size.channels**2 for size in sizes]
    assert costs == sorted(set(costs))
    plus = load(path, "train,plus").network
    changed = {key for key in plain if plain[key] != plus[key]}
    assert changed == {lever for lever in configs.PLUS if not plain[lever]}
    assert all(plus[lever] for lever in configs.PLUS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "fly"),
        ("seed", -1),
        ("dataset.name", ""),
        ("dataset.name", "../../etc"),
        ("dataset.image_size", 10**12),
        ("search.operations", ([], [])),
        ("search.channels", 10**12),
        ("search.cells", 101),
        ("runtime.steps_per_call", 10**26),
        ("search.learning_rate", 1e300),
        ("search.validation_fraction", 0.0),
        ("search.validation_fraction", 1.0),
        ("dataset.crop_padding", -1),
        ("search.strategy", "magic"),
        ("search.beta_p", float("nan")),
        ("search.beta_p", float("inf")),
        ("search.beta_p", 101.0),
        ("search.rounds", 0),
        ("search.operations", ("none",)),
        ("search.operations", ("none", "none")),
        ("search.operations", ("none", "conv_7x7")),
        ("search.cells", 0),
        ("search.reductions", (1, 6)),
        ("search.reductions", (3, 1)),
        ("search.batch_size", 0),
        ("search.learning_rate", 0.0),
        ("search.momentum", 1.0),
        ("search.child_optimizer", "lion"),
        ("search.edge_policy", "top3"),
        ("binarizer.activation_estimator", "relu"),
        ("binarizer.weight_scale", "row"),
        ("binarizer.pad_value", 0.5),
        ("runtime.steps_per_call", 0),
        ("runtime.formulation", "fast"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(key, value):
    config = configs.base_config()
    with config.unlocked():
        node = config
        *sections, name = key.split(".")
        for section in sections:
            node = node[section]
        with node.ignore_type():
            node[name] = value
    with pytest.raises(UserError) as caught:
        configs.validate(config, num_devices=1)
    text = str(caught.value)
    assert text.startswith(f"config.{key} is ")
    assert repr(value) in text
    assert "\n" not in text


def test_a_parent_whose_kernels_are_not_used_is_refused():
    config = configs.base_config()
    config.train.update(parent_kernel=True, reconstruction_weight=0.0)
    with pytest.raises(UserError, match=r"parent_kernel is True; .*reconstruction_weight above 0"):
        configs.validate(config, num_devices=1)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("search", r"config.search.batch_size is 256.*multiple of the 3 dev"),
        ("train", r"config.train.batch_size is 128.*multiple of the 3 dev"),
    ],
)
def test_a_batch_that_devices_do_not_divide(mode, words):
    config = configs.base_config()
    config.mode = mode
    with pytest.raises(UserError, match=words):
        configs.validate(config, num_devices=3)


INDIFFERENT = {
    *("compare.strategies", "compare.seeds", "compare.beta_p", "search.collapse_share"),
    *("export.directory", "export.iree"),
    *("predict.images", "predict.top", "predict.format", "predict.engine", "predict.batch_size"),
    # Other strategies' than the one that is chosen.
    *OF_GRADIENT,
    *OF_SAMPLED,
    "mode",
    "genotype",
    "network.precision",
    "dataset.data_dir",
    "dataset.workers",
    "dataset.max_undecodable",
    "evaluate.batch_size",
    "evaluate.checkpoint",
    "runtime.steps_per_call",
    "runtime.keep_checkpoints",
    "runtime.checkpoint_every",
    "runtime.stall_seconds",
    "runtime.tensorboard",
    "runtime.compilation_cache",
}
OF_SEARCH = {k for k in configs.RULED_KEYS if "search." in k}
OF_TRAINING = {
    *(f"dataset.{name}" for name in ("stream", "cutout", "color_jitter")),
    *(f"dataset.{name}" for name in ("crop_area", "central_crop")),
    *(k for k in configs.RULED_KEYS if k.split(".")[0] in ("network", "train", "evaluate")),
}


def another(value):
    """A value of the same type that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return (*value, *(value[:1] or (1.0,))) if isinstance(value, tuple) else value + "x"


@pytest.mark.parametrize("phase", ["search", "train"])
@pytest.mark.parametrize("key", sorted(configs.RULED_KEYS))
def test_exactly_what_decides_a_result_changes_the_hash(key, phase):
    config = configs.base_config()
    before = config_keys.keys_hash(config_keys.deciding_keys(config, phase))
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[name] = another(node[name])
    other = OF_TRAINING if phase == "search" else OF_SEARCH
    same = config_keys.keys_hash(config_keys.deciding_keys(config, phase)) == before
    assert same == (key in INDIFFERENT | other)


@pytest.mark.parametrize("strategy", config_rules.STRATEGIES)
def test_only_keys_that_a_strategy_reads_decide_its_search(strategy):
    """So that a comparison can be asked for more of another strategy later."""
    config = configs.base_config()
    config.search.strategy = strategy
    deciding = set(config_keys.deciding_keys(config))
    if strategy == "random":
        assert not deciding & (OF_GRADIENT | OF_SAMPLED | {"search.beta_p", "search.rounds"})
    for family, keys in (
        (config_rules.GRADIENT_STRATEGIES, OF_GRADIENT),
        (("cp_plus", "random_search"), OF_SAMPLED),
    ):
        assert bool(deciding & keys) == (strategy in family)
    assert ("search.beta_p" in deciding) == (strategy == "cp")
    assert {"search.strategy", "search.edge_policy", "seed"} <= deciding


@pytest.mark.parametrize("mode", ["search", "pipeline"])
def test_a_genotype_is_not_searched(mode):
    config = configs.base_config()
    config.update(mode=mode, genotype="DARTS_V2")
    with pytest.raises(UserError, match=f"config.genotype is 'DARTS_V2'; with the mode {mode}"):
        configs.validate(config, num_devices=1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"search.strategy": "cp_plus", "search.parallel": "path"},
            r"config.search.parallel is 'path'; with config.search.strategy=cp_plus it must be",
        ),
        (
            {"search.strategy": "random_search", "search.candidates": 71, "search.rounds": 1},
            r"config.search.candidates is 71; it must be at most 70",
        ),
        (
            {"search.strategy": "cp_gradient", "search.epochs": 20},
            r"config.search.epochs is 20; after 15 epochs of .* at least 7 must follow",
        ),
        (
            {"search.strategy": "darts", "runtime.deterministic": 8},
            r"config.runtime.deterministic is 8; with config.search.strategy=darts it must be 0",
        ),
        (
            {"search.strategy": "cp_plus", "search.plus_score_examples": 100},
            r"config.search.score_batch_size is 256; cp_plus scores 100 images",
        ),
        (
            {"search.strategy": "cp_plus", "search.max_scored": 69},
            r"config.search.max_scored is 69; it must be at least 70",
        ),
        (
            {"compare.strategies": ("child",), "compare.beta_p": (1.0,)},
            r"config.compare.beta_p is \(1.0,\); without cp among",
        ),
        ({"compare.strategies": ("cp", "cp")}, r"config.compare.strategies is .* different names"),
        ({"compare.strategies": ()}, r"config.compare.strategies is \(\); it must be"),
        ({"compare.seeds": (0, -1)}, r"config.compare.seeds is \(0, -1\); it must be"),
        ({"compare.beta_p": ("two",)}, r"config.compare.beta_p is .*; it must be"),
        ({"mode": "compare", "genotype": "DARTS_V2"}, r"config.genotype is 'DARTS_V2'; with the"),
    ],
)
def test_keys_of_strategies_and_comparisons_fit_each_other(keys, words):
    config = configs.base_config()
    for key, value in keys.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    with pytest.raises(UserError, match=words):
        configs.validate(config, num_devices=1)
