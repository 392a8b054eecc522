"""What a search asks of its networks and does with their answers; networks are stood in for."""

import dataclasses
import io
import json

import numpy as np
import pytest
from oracle import NONE, TOTAL, Oracle, log_of, replace_data, run
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import search as search_module
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.replay import replay
from cpnas_jax.architecture.strategy import ChildParent
from cpnas_jax.diagnosis import NotFinite
from cpnas_jax.models.space import CHILD, OPERATIONS, PARENT
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search import search
from cpnas_jax.search_networks import Networks


@pytest.fixture(autouse=True)
def data(monkeypatch):
    replace_data(monkeypatch)


class LikesNothing(Oracle):
    """Best is `none` on the two edges that enter the first node of the normal cell."""

    def accuracy(self, model, architecture):
        return 0.5 * float(architecture[0, 0] == NONE) + 0.4 * float(architecture[0, 1] == NONE)


def test_both_models_are_trained_and_scored_with_what_was_sampled(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path)
    samples = [line for line in log_of(tmp_path) if line["event"] == "sample"]
    assert len(samples) == Oracle.last.total == TOTAL
    assert Oracle.last.parts == (20, 20)
    requests = iter(Oracle.last.requests)
    for epoch, line in enumerate(samples):
        names = [[OPERATIONS.index(name) for name in cell] for cell in line["architecture"]]
        for model in (CHILD, PARENT):
            for kind, number in (("train", epoch), ("score", None)):
                found = next(requests)
                assert (found[0], found[1], found[3]) == (kind, model, number)
                np.testing.assert_array_equal(found[2], names)
        worth = Oracle.worth[np.asarray(names)].mean()
        assert line["parent_accuracy"] == pytest.approx(worth)
        assert line["child_accuracy"] == pytest.approx(worth / 2)
        assert line["z"] == pytest.approx(2 * (worth - worth / 2) + worth / 2)
    assert next(requests, None) is None


@pytest.mark.parametrize(("policy", "edges"), [("all", 14), ("top2", 8)])
def test_the_edge_policy_is_that_of_the_config(monkeypatch, tmp_path, policy, edges):
    genotype, _ = run(monkeypatch, tmp_path, edge_policy=policy)
    assert genotype.edge_policy == policy
    assert (len(genotype.normal), len(genotype.reduce)) == (edges, edges)
    assert genotype == Genotype.load(tmp_path / "genotype.json")


def test_a_dead_node_is_restored_aloud_and_on_record(monkeypatch, tmp_path):
    operations = ("none", "skip_connect", "sep_conv_3x3")
    genotype, said = run(monkeypatch, tmp_path, LikesNothing, operations=operations, rounds=4)
    restored = json.loads((tmp_path / "results.json").read_text())["search"]["restored"]
    checked = replay(
        log_of(tmp_path), ChildParent(seed=0, rounds=4, beta_p=2.0, operations=operations)
    )
    differing = int((genotype.architecture() != checked.operations).sum())
    assert len(restored) == differing > 0
    for line in restored:
        assert "normal cell, edge" in line
        assert "dead node" in line
        assert line in said


def test_a_genotype_of_another_config_is_not_taken_for_a_finished_search(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path / "first")
    other = tmp_path / "second"
    other.mkdir()
    (tmp_path / "first/genotype.json").rename(other / "genotype.json")
    with pytest.raises(UserError, match="not of this config"):
        run(monkeypatch, other, beta_p=1.0)
    # Nor did the mistake claim the directory.
    assert not (other / "config.json").exists()
    assert not (other / "search").exists()


def test_checkpoints_of_another_config_are_refused_and_kept(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path)
    for name in ("config.json", "genotype.json"):
        (tmp_path / name).unlink()
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"checkpoints in .* are not of this config"):
        run(monkeypatch, tmp_path, beta_p=1.0)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"score_batch_size": 32}, r"config.search.score_batch_size is 32.*only 20 images"),
        ({"score_examples": 21}, r"config.search.score_examples is 21.*only 20 images"),
        (
            {"score_batch_size": 16, "score_examples": 8},
            r"config.search.score_batch_size is 16; only 8 images are scored",
        ),
        (
            {"strategy": "cp_plus", "plus_score_examples": 8, "score_batch_size": 16},
            r"config.search.score_batch_size is 16; only 8 images are scored",
        ),
        ({"batch_size": 24}, r"config.search.batch_size is 24.*only 20 images"),
        (
            {"channels": 4096},
            "needs about .* MiB .weights and optimizers.*lower config.search.channels",
        ),
    ],
)
def test_sizes_that_data_or_memory_do_not_allow(monkeypatch, tmp_path, settings, words):
    fitting = {"batch_size": 16, "score_batch_size": 16}
    with pytest.raises(UserError, match=words):
        run(monkeypatch, tmp_path, Networks, **{**fitting, **settings})
    assert not (tmp_path / "config.json").exists()


def test_a_border_wider_than_the_image(monkeypatch, tmp_path):
    monkeypatch.setattr(search_module, "Networks", Networks)
    config = configs.base_config()
    config.search.update(batch_size=16, score_batch_size=16)
    config.dataset.crop_padding = 5
    with pytest.raises(UserError, match=r"config.dataset.crop_padding is 5.*at most 4"):
        search(config, tmp_path, Reporter(Console(file=io.StringIO())))


def test_a_damaged_genotype_of_a_finished_search_is_made_again(monkeypatch, tmp_path):
    genotype, _ = run(monkeypatch, tmp_path)
    path = tmp_path / "genotype.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(UserError, match="Delete it: the same command writes it again"):
        run(monkeypatch, tmp_path)
    path.unlink()
    assert run(monkeypatch, tmp_path)[0] == genotype
    assert path.read_text() == whole
    assert Oracle.last.requests == []


def test_what_was_not_decoded_is_told_and_on_record(monkeypatch, tmp_path):
    split = search_module.load_split()
    fewer = dataclasses.replace(split, undecodable=(3, 8))
    monkeypatch.setattr(search_module, "load_split", lambda *_: fewer)
    _, said = run(monkeypatch, tmp_path)
    assert "skipped because they cannot be decoded: 2 of split 'train'." in said
    results = json.loads((tmp_path / "results.json").read_text())["search"]
    assert results["undecodable"] == {"train": 2}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((7,), "example 3 can be decoded again"),
        ((3, 7, 9), "example 7, 9 can no longer be decoded"),
    ],
)
def test_other_damaged_examples_than_before_are_refused(monkeypatch, tmp_path, rows, words):
    class Stops(Oracle):
        def train(self, model, architectures, epoch, sums):
            if epoch == 4:
                raise UserError("stop")
            return super().train(model, architectures, epoch, sums)

    whole = search_module.load_split()
    monkeypatch.setattr(
        search_module, "load_split", lambda *_: dataclasses.replace(whole, undecodable=(3,))
    )
    with pytest.raises(UserError, match="stop"):
        run(monkeypatch, tmp_path, Stops)
    monkeypatch.setattr(
        search_module, "load_split", lambda *_: dataclasses.replace(whole, undecodable=rows)
    )
    with pytest.raises(UserError, match=words):
        run(monkeypatch, tmp_path)
    monkeypatch.setattr(
        search_module, "load_split", lambda *_: dataclasses.replace(whole, undecodable=(3,))
    )
    run(monkeypatch, tmp_path)


def test_a_step_that_is_not_finite_names_what_is_saved(monkeypatch, tmp_path):
    class Bad(Oracle):
        def train(self, model, architecture, epoch, sums):
            if (model, epoch, sums.steps) == (PARENT, 4, 2):
                raise NotFinite("step 3 is not", "conv 0", "Try another")
            return super().train(model, architecture, epoch, sums)

    with pytest.raises(UserError) as caught:
        run(monkeypatch, tmp_path, Bad)
    # Two models of three steps and one more number each.
    path = tmp_path / "search/checkpoints" / str(4 * 2 * 4)
    assert str(caught.value) == (
        f"step 3 is not; conv 0; the last good checkpoint is {path}, after sampled epoch 4 of "
        f"{TOTAL}. Try another"
    )
    assert path.exists()
    assert processes.is_everywhere(caught.value)
    assert f"Resumed after sampled epoch 4 of {TOTAL}" in run(monkeypatch, tmp_path)[1]


def test_another_machine_is_told(monkeypatch, tmp_path):
    class Stops(Oracle):
        def train(self, model, architectures, epoch, sums):
            if epoch == 4:
                raise UserError("stop")
            return super().train(model, architectures, epoch, sums)

    with pytest.raises(UserError, match="stop"):
        run(monkeypatch, tmp_path, Stops)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    stored["search"]["devices"] = ["TPU v4"] * 32
    path.write_text(json.dumps(stored))
    _, said = run(monkeypatch, tmp_path)
    assert "Begun elsewhere: devices was ['TPU v4'" in said
    assert f"Resumed after sampled epoch 4 of {TOTAL}" in said
