"""The whole way in one command: what it leaves, what it does not do twice, and how it goes on.

One run serves all tests that begin with a finished one; each has its own copy.
"""

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import config_keys, feeds, modes
from cpnas_jax import pipeline as pipeline_module
from cpnas_jax.architecture.genotype import Edge, Genotype
from cpnas_jax.data.datasets import Split
from cpnas_jax.models.space import EDGES
from cpnas_jax.pipeline import pipeline
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError

# As little to compile as there can be; the 1-bit convolutions are those before the edges.
POOLS = {
    (0, 2): "max_pool_3x3",
    (1, 3): "max_pool_3x3",
    (2, 4): "avg_pool_3x3",
    (4, 5): "max_pool_3x3",
}
CELL = tuple(
    Edge(target=target, source=source, operation=POOLS.get((source, target), "none"))
    for source, target in EDGES
)


def greys(n, seed):
    """Six classes that differ in their brightness."""
    labels = np.arange(n, dtype=np.int32) % 6
    noise = np.random.default_rng(seed).integers(0, 60, (n, 8, 8, 1))
    images = (noise + 38 * labels[:, None, None, None]).astype(np.uint8)
    return Split(images, labels, 6, tuple("abcdef"), "mnist5k")


@pytest.fixture(autouse=True, scope="module")
def data():
    parts = {"train": greys(36, 0), "test": greys(13, 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeds, "load_split", lambda _, split, *__: parts[split])
        patch.setattr(modes, "describe", lambda *_: ((8, 8, 1), 6))
        yield


def small_config():
    config = configs.base_config()
    config.mode = "pipeline"
    config.dataset.update(crop_padding=0, cutout=0, flip=False)
    config.network.update(cells=1, channels=4, drop_path=0.0, auxiliary=False)
    config.train.update(epochs=1, batch_size=16, evaluate_every=1)
    config.evaluate.batch_size = 16
    config.runtime.optimization_level = 0
    return config


@pytest.fixture
def config():
    return small_config()


def put_search(config, workdir):
    """Leave the files of a finished search; searching has its own tests."""
    workdir.mkdir(exist_ok=True)
    provenance = {"config_hash": config_keys.config_hash(config), "dataset": "mnist5k", "seed": 0}
    genotype = Genotype(CELL, CELL, "all", provenance=tuple(provenance.items()))
    genotype.save(workdir / "genotype.json")
    (workdir / "results.json").write_text(json.dumps({"search": {"seconds": 3.0}}))


def run(config, workdir):
    file = io.StringIO()
    pipeline(config.copy_and_resolve_references(), workdir, Reporter(Console(file=file, width=200)))
    return file.getvalue()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run: (its directory, what it said)."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    put_search(small_config(), workdir)
    return workdir, run(small_config(), workdir)


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished[0], tmp_path / "run")


def timeless(workdir):
    """What a run leaves, without its durations."""
    results = json.loads((workdir / "results.json").read_text())
    for name in ("train", "parent"):
        del results[name]["seconds"]
    names = ("train/evaluation.json", "parent/evaluation.json", "summary.json")
    return results, *(json.loads((workdir / name).read_text()) for name in names)


def test_child_parent_evaluations_and_summary_are_written(finished):
    workdir, text = finished
    results, child, parent, summary = timeless(workdir)
    assert child["precision"] == "binary"
    assert parent["precision"] == "float"
    for name, evaluation in (("train", child), ("parent", parent)):
        assert results[name]["test"]["top1"] == evaluation["top1"]
        assert np.sum(evaluation["confusion"]) == 13
    assert results["summary"]["parameters"] == summary["parameters"]
    assert summary["parameters"]["binary"] > 0
    assert f"1-bit child {child['top1']:.4f}, float parent {parent['top1']:.4f}" in text


def test_nothing_is_run_twice(config, workdir, monkeypatch):
    before = timeless(workdir)

    def refused(*_, **__):
        raise AssertionError("trained or read data again")

    monkeypatch.setattr(pipeline_module, "train_network", refused)
    monkeypatch.setattr(pipeline_module, "open_feed", refused)
    text = run(config, workdir)
    assert text.count("nothing is run again") == 3
    assert timeless(workdir) == before


def test_another_checkpoint_is_evaluated_anew(config, workdir):
    path = workdir / "train/evaluation.json"
    assert json.loads(path.read_text())["checkpoint"] == "last"
    config.evaluate.checkpoint = "best"
    run(config, workdir)
    assert json.loads(path.read_text())["checkpoint"] == "best"


def test_an_evaluation_in_the_middle_of_training_is_not_the_last_word(config, workdir):
    path = workdir / "train/evaluation.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "epoch": 0, "top1": -1.0}))
    run(config, workdir)
    assert json.loads(path.read_text()) == value


def test_an_evaluation_of_fewer_examples_is_not_the_last_word(config, workdir):
    path = workdir / "train/evaluation.json"
    value = json.loads(path.read_text())
    fewer = config.copy_and_resolve_references()
    fewer.update(mode="evaluate")
    fewer.evaluate.examples = 5
    modes.evaluate_mode(fewer, workdir, Reporter(Console(file=io.StringIO())))
    assert json.loads(path.read_text())["examples"] == 5
    run(config, workdir)
    assert json.loads(path.read_text()) == value


def test_a_genotype_without_the_results_of_its_search(config, workdir):
    (workdir / "results.json").unlink()
    assert "Seconds without compiling: train" in run(config, workdir)
    assert "search" not in json.loads((workdir / "results.json").read_text())


def test_a_run_that_stopped_before_the_parent_goes_on_there(
    config, finished, tmp_path, monkeypatch
):
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
    assert timeless(tmp_path / "cut") == timeless(finished[0])


def test_other_training_keys_are_refused_before_anything_runs(config, workdir):
    config.train.epochs = 2
    with pytest.raises(UserError, match=r"train.epochs \(there 1, here 2\)"):
        run(config, workdir)


def test_cells_of_another_search_are_not_mixed_in(config, workdir):
    path = workdir / "genotype.json"
    path.write_text(path.read_text().replace("avg_pool_3x3", "max_pool_3x3"))
    with pytest.raises(UserError, match="other cells than were trained"):
        run(config, workdir)


def test_losing_an_evaluation_writes_it_again_without_training(config, workdir, monkeypatch):
    before = timeless(workdir)
    (workdir / "parent/evaluation.json").unlink()
    monkeypatch.setattr(pipeline_module, "train_network", None)
    run(config, workdir)
    assert timeless(workdir) == before
