"""The whole way in one command: what it leaves, what it does not do twice, and how it goes on."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import feeds, modes
from cpnas_jax import pipeline as pipeline_module
from cpnas_jax.architecture.genotype import Edge, Genotype
from cpnas_jax.data.datasets import Split
from cpnas_jax.pipeline import pipeline
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_once")

CELL = (
    *((0, 2, "max_pool_3x3"), (1, 2, "skip_connect")),
    *((0, 3, "avg_pool_3x3"), (2, 3, "skip_connect")),
    *((0, 4, "max_pool_3x3"), (3, 4, "skip_connect")),
    *((0, 5, "max_pool_3x3"), (4, 5, "skip_connect")),
)
EDGES = tuple(Edge(target=target, source=source, operation=name) for source, target, name in CELL)


def greys(n, seed):
    """Six classes that differ in their brightness."""
    labels = np.arange(n, dtype=np.int32) % 6
    noise = np.random.default_rng(seed).integers(0, 60, (n, 8, 8, 1))
    images = (noise + 38 * labels[:, None, None, None]).astype(np.uint8)
    return Split(images, labels, 6, tuple("abcdef"), "mnist5k")


@pytest.fixture(autouse=True)
def _data(monkeypatch):
    parts = {"train": greys(36, 0), "test": greys(13, 1)}
    monkeypatch.setattr(feeds, "load_split", lambda _, split, *__: parts[split])
    monkeypatch.setattr(modes, "describe", lambda *_: ((8, 8, 1), 6))


@pytest.fixture
def config():
    config = configs.base_config()
    config.mode = "pipeline"
    config.dataset.update(crop_padding=0, cutout=0, flip=False)
    config.network.update(cells=1, channels=4, drop_path=0.0, auxiliary=False)
    config.train.update(epochs=1, batch_size=16, evaluate_every=1)
    config.evaluate.batch_size = 16
    config.runtime.optimization_level = 0
    return config


def put_search(config, workdir):
    """Leave the files of a finished search; searching has its own tests."""
    workdir.mkdir(exist_ok=True)
    provenance = {"config_hash": configs.config_hash(config), "dataset": "mnist5k", "seed": 0}
    genotype = Genotype(EDGES, EDGES, "top2", provenance=tuple(provenance.items()))
    genotype.save(workdir / "genotype.json")
    (workdir / "results.json").write_text(json.dumps({"search": {"seconds": 3.0}}))


def run(config, workdir):
    file = io.StringIO()
    pipeline(config.copy_and_resolve_references(), workdir, Reporter(Console(file=file, width=200)))
    return file.getvalue()


def timeless(workdir):
    """What a run leaves, without its durations."""
    results = json.loads((workdir / "results.json").read_text())
    for name in ("train", "parent"):
        del results[name]["seconds"]
    names = ("train/evaluation.json", "parent/evaluation.json", "summary.json")
    return results, *(json.loads((workdir / name).read_text()) for name in names)


def test_child_parent_evaluations_and_summary_are_written(config, tmp_path):
    put_search(config, tmp_path)
    text = run(config, tmp_path)
    results, child, parent, summary = timeless(tmp_path)
    assert child["precision"] == "binary"
    assert parent["precision"] == "float"
    for name, evaluation in (("train", child), ("parent", parent)):
        assert results[name]["test"]["top1"] == evaluation["top1"]
        assert np.sum(evaluation["confusion"]) == 13
    assert results["summary"]["parameters"] == summary["parameters"]
    assert summary["parameters"]["binary"] > 0
    assert f"1-bit child {child['top1']:.4f}, float parent {parent['top1']:.4f}" in text


def test_nothing_is_run_twice(config, tmp_path, monkeypatch):
    put_search(config, tmp_path)
    run(config, tmp_path)
    before = timeless(tmp_path)

    def refused(*_, **__):
        raise AssertionError("trained or read data again")

    monkeypatch.setattr(pipeline_module, "train_network", refused)
    monkeypatch.setattr(pipeline_module, "open_feed", refused)
    text = run(config, tmp_path)
    assert text.count("nothing is run again") == 3
    assert timeless(tmp_path) == before


def test_another_checkpoint_is_evaluated_anew(config, tmp_path):
    put_search(config, tmp_path)
    run(config, tmp_path)
    path = tmp_path / "train/evaluation.json"
    assert json.loads(path.read_text())["checkpoint"] == "last"
    config.evaluate.checkpoint = "best"
    run(config, tmp_path)
    assert json.loads(path.read_text())["checkpoint"] == "best"


def test_an_evaluation_in_the_middle_of_training_is_not_the_last_word(config, tmp_path):
    put_search(config, tmp_path)
    run(config, tmp_path)
    path = tmp_path / "train/evaluation.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "epoch": 0, "top1": -1.0}))
    run(config, tmp_path)
    assert json.loads(path.read_text()) == value


def test_an_evaluation_of_fewer_examples_is_not_the_last_word(config, tmp_path):
    put_search(config, tmp_path)
    run(config, tmp_path)
    path = tmp_path / "train/evaluation.json"
    value = json.loads(path.read_text())
    fewer = config.copy_and_resolve_references()
    fewer.update(mode="evaluate")
    fewer.evaluate.examples = 5
    modes.evaluate_mode(fewer, tmp_path, Reporter(Console(file=io.StringIO())))
    assert json.loads(path.read_text())["examples"] == 5
    run(config, tmp_path)
    assert json.loads(path.read_text()) == value


def test_a_genotype_without_the_results_of_its_search(config, tmp_path):
    put_search(config, tmp_path)
    (tmp_path / "results.json").unlink()
    assert "Seconds without compiling: train" in run(config, tmp_path)
    assert "search" not in json.loads((tmp_path / "results.json").read_text())


def test_a_run_that_stopped_before_the_parent_goes_on_there(config, tmp_path, monkeypatch):
    put_search(config, tmp_path / "whole")
    run(config, tmp_path / "whole")
    trained = pipeline_module.train_network

    def until_parent(*arguments, binary):
        if not binary:
            raise KeyboardInterrupt
        trained(*arguments, binary=binary)

    put_search(config, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "train_network", until_parent)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "cut")
    assert (tmp_path / "cut/train/evaluation.json").exists()
    run(config, tmp_path / "cut")
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_other_training_keys_are_refused_before_anything_runs(config, tmp_path):
    put_search(config, tmp_path)
    run(config, tmp_path)
    config.train.epochs = 2
    with pytest.raises(UserError, match=r"train.epochs \(there 1, here 2\)"):
        run(config, tmp_path)


def test_cells_of_another_search_are_not_mixed_in(config, tmp_path):
    put_search(config, tmp_path)
    run(config, tmp_path)
    path = tmp_path / "genotype.json"
    path.write_text(path.read_text().replace("avg_pool_3x3", "max_pool_3x3"))
    with pytest.raises(UserError, match="other cells than were trained"):
        run(config, tmp_path)


def test_losing_an_evaluation_writes_it_again_without_training(config, tmp_path, monkeypatch):
    put_search(config, tmp_path)
    run(config, tmp_path)
    before = timeless(tmp_path)
    (tmp_path / "parent/evaluation.json").unlink()
    monkeypatch.setattr(pipeline_module, "train_network", None)
    run(config, tmp_path)
    assert timeless(tmp_path) == before
