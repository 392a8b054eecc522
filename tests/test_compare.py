"""The mode `compare`: the runs it makes of a config, what it leaves; a run is stood in for."""

import io
import json

import pytest
from rich.console import Console

from cpnas_jax import compare as module
from cpnas_jax import config as configs
from cpnas_jax import config_keys
from cpnas_jax.architecture.named import named_genotype
from cpnas_jax.compare import compare, kind_shares, run_config, variants
from cpnas_jax.comparison import KINDS, Outcome
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError


def config_of(**keys):
    config = configs.base_config()
    config.mode = "compare"
    config.compare.update(keys)
    return config


def run(config, workdir):
    file = io.StringIO()
    compare(config, workdir, Reporter(Console(file=file, width=300)))
    return file.getvalue()


@pytest.fixture
def runs(monkeypatch):
    """What was run: strategy, beta_P, seed and directory."""
    done = []

    def fake(config, directory, reporter, name, feed_of):
        del reporter, feed_of
        search = config.search
        done.append((search.strategy, search.beta_p, config.seed, directory.path.name))
        assert directory.path.is_dir()
        return Outcome(
            variant=name,
            seed=config.seed,
            accuracy=0.5 + 0.01 * search.beta_p + 0.001 * config.seed,
            seconds=10.0,
            epochs=35,
            flops=1e9,
            kinds=dict(zip(KINDS, (0.25, 0.25, 0.25, 0.25), strict=True)),
            parameters=100,
            ops=1e6,
            train_seconds=1.0,
        )

    monkeypatch.setattr(module, "_run", fake)
    # Other tests of this process go on with what is compiled.
    monkeypatch.setattr(module.environment, "forget_programs", lambda: None)
    return done


def test_every_strategy_and_seed_is_run_seed_by_seed(runs, tmp_path):
    config = config_of(strategies=("cp", "random"), seeds=(3, 1))
    said = run(config, tmp_path)
    assert runs == [
        (strategy, 2.0, seed, f"seed{seed}") for seed in (3, 1) for strategy in ("cp", "random")
    ]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["cp", "random"]
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["finished"]
    assert found["variants"]["cp"]["seeds"] == [3, 1]
    table = (tmp_path / "compare.md").read_text()
    assert table.strip() in said
    assert (tmp_path / "compare.svg").exists()
    assert not (tmp_path / "beta.svg").exists()


def test_the_programs_of_a_run_are_forgotten_before_the_next(runs, monkeypatch, tmp_path):
    done_before = []
    monkeypatch.setattr(
        module.environment, "forget_programs", lambda: done_before.append(len(runs))
    )
    run(config_of(strategies=("cp", "random"), seeds=(3, 1)), tmp_path)
    assert done_before == [1, 2, 3, 4]


def test_cp_is_run_for_every_beta(runs, tmp_path):
    config = config_of(strategies=("child", "cp"), seeds=(0,), beta_p=(0.0, 0.5, 2))
    run(config, tmp_path)
    assert [(strategy, beta) for strategy, beta, *_ in runs] == [
        ("child", 2.0),
        ("cp", 0.0),
        ("cp", 0.5),
        ("cp", 2.0),
    ]
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["child", "cp", "cp-beta_P0", "cp-beta_P0.5"]
    assert (tmp_path / "beta.svg").exists()


def test_a_stopped_comparison_leaves_its_first_runs(runs, monkeypatch, tmp_path):
    fake = module._run

    def stops(config, *arguments):
        if config.seed == 1:
            raise UserError("the data is gone")
        return fake(config, *arguments)

    monkeypatch.setattr(module, "_run", stops)
    with pytest.raises(UserError, match="gone"):
        run(config_of(strategies=("cp", "random"), seeds=(0, 1)), tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert not found["finished"]
    assert [outcome["seed"] for outcome in found["outcomes"]] == [0, 0]


def test_a_longer_comparison_keeps_what_is_known(runs, monkeypatch, tmp_path):
    run(config_of(strategies=("cp", "random"), seeds=(0, 1)), tmp_path)
    fake = module._run

    def stops(config, *arguments):
        if config.search.strategy == "child":
            raise UserError("the data is gone")
        return fake(config, *arguments)

    monkeypatch.setattr(module, "_run", stops)
    with pytest.raises(UserError, match="gone"):
        run(config_of(strategies=("cp", "child"), seeds=(0, 1)), tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert not found["finished"]
    # Of what is asked for, both seeds; `random` is no longer.
    assert [(o["variant"], o["seed"]) for o in found["outcomes"]] == [("cp", 0), ("cp", 1)]
    (tmp_path / "compare.json").write_text('{"outcomes": [{"variant": "cp"}]}')
    with pytest.raises(UserError, match=r"compare.json is damaged or of another version"):
        run(config_of(strategies=("cp",), seeds=(0,)), tmp_path)


def test_a_mistake_in_the_last_run_is_told_before_the_first(runs, tmp_path):
    config = config_of(strategies=("random", "cp_gradient"), seeds=(0,))
    config.search.epochs = 20
    with pytest.raises(UserError, match=r"config.search.epochs is 20"):
        run(config, tmp_path)
    assert runs == []


def test_a_run_is_that_of_its_own_command():
    """What `search` or `train` with the same keys would take for its own run."""
    config = config_of(strategies=("cp",), seeds=(5,), beta_p=(1.0,))
    (variant,) = variants(config)
    own = run_config(config, variant, 5)
    alone = configs.base_config()
    alone.seed, alone.search.beta_p = 5, 1.0
    for phase in ("search", "train"):
        assert config_keys.deciding_keys(own, phase) == config_keys.deciding_keys(alone, phase)
    assert config.seed == 0


def test_shares_are_of_the_edges_that_are_kept():
    shares = kind_shares(named_genotype("DDPNAS_XNOR_1"))
    assert sum(shares.values()) == pytest.approx(1)
    # 16 edges: 5 pools, 1 skip.
    assert shares == {"convolution": 9 / 16, "pooling": 6 / 16, "skip": 1 / 16, "none": 0}
