"""The files of a workdir: claimed once, refused to another config, whole or absent."""

import json
import os

import pytest

from cpnas_jax.runtime import atomic
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.workdir import History, Workdir


def test_it_is_made_and_leaves_no_probe(tmp_path):
    workdir = Workdir(tmp_path / "a" / "b")
    assert list(workdir.path.iterdir()) == []
    Workdir(tmp_path / "a" / "b")


@pytest.mark.parametrize("parts", [("file",), ("file", "run")])
def test_a_file_in_the_way_is_named(tmp_path, parts):
    (tmp_path / "file").write_text("kept")
    path = tmp_path.joinpath(*parts)
    with pytest.raises(UserError) as caught:
        Workdir(path)
    assert f"--workdir={path} cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_claim_writes_what_is_its_own(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.claim("search", {"seed": 1, "rate": 2}, {"backend": "cpu"}, (), resumed=False)
    workdir.claim("train", {"seed": 3, "rate": 4}, {"backend": "tpu"}, ["rate"], resumed=False)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "config": {"seed": 1, "rate": 4},
        "search": {"backend": "cpu"},
        "train": {"backend": "tpu"},
    }


def test_the_same_config_is_let_in_and_another_is_refused_with_both_values(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.refuse_other({"seed": 1})
    claimed = {"seed": 1, "search.beta_p": 2.0, "search.reductions": [1, 2], "mode": "search"}
    workdir.claim("search", claimed, {}, (), resumed=False)
    workdir.refuse_other({"seed": 1, "search.beta_p": 2.0, "search.reductions": [1, 2]})
    with pytest.raises(UserError) as caught:
        workdir.refuse_other({"seed": 1, "search.beta_p": 0.5, "search.reductions": [1], "new": 3})
    text = str(caught.value)
    assert "search.beta_p (there 2.0, here 0.5)" in text
    assert "search.reductions (there [1, 2], here [1])" in text
    assert "new (there None, here 3)" in text
    assert "seed" not in text
    assert str(tmp_path) in text


@pytest.mark.parametrize("content", ["", '{"config": {', "[1]", "null", "\x00"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        Workdir(tmp_path).refuse_other({"seed": 1})


def test_bytes_that_are_no_text_are_damage_too(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"config": "\xff\xfe"}')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        Workdir(tmp_path).read_json("config.json")


@pytest.mark.parametrize("content", ["{}", '{"config": 3}'])
def test_a_config_file_without_a_config_is_damaged(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="no object 'config'"):
        Workdir(tmp_path).refuse_other({"seed": 1})


def test_json_comes_back_and_an_absent_file_is_none(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.read_json("results.json") is None
    workdir.write_json("results.json", {"accuracy": 0.1 + 0.2})
    assert workdir.read_json("results.json") == {"accuracy": 0.1 + 0.2}


def test_a_history_is_brought_back_to_what_is_known(tmp_path):
    path = tmp_path / "search" / "history.jsonl"
    history = History(path, [])
    history.append({"z": 0.1})
    history.append({"z": 1 / 3})
    with path.open("a") as file:
        file.write('{"event": "sam')  # killed here
    known = [json.loads(line) for line in path.read_text().splitlines()[:1]]
    repaired = History(path, known)
    assert path.read_text() == '{"z": 0.1}\n'
    repaired.append({"z": 5})
    assert path.read_text() == '{"z": 0.1}\n{"z": 5}\n'
    assert repaired.lines == [{"z": 0.1}, {"z": 5}]
    # The caller's list stays its own.
    assert known == [{"z": 0.1}]


def test_a_line_is_in_the_file_as_soon_as_it_is_added(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path, [])
    for number in range(3):
        history.append({"number": number})
        assert len(path.read_text().splitlines()) == number + 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    atomic.write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(atomic.epath.Path(path)), "replace", full)
    with pytest.raises(UserError, match=r"results.json cannot be written .No space left"):
        atomic.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_only_one_process_works_in_a_directory(tmp_path):
    with (
        Workdir(tmp_path),
        pytest.raises(UserError, match="another process works in"),
        Workdir(tmp_path),
    ):
        pass
    with Workdir(tmp_path):
        pass


@pytest.mark.parametrize("path", ["gs://no-such-bucket/run", "wrong://x", "a\0b", "\udcff"])
def test_a_path_that_cannot_be_opened_is_named(path):
    with pytest.raises(UserError) as caught:
        Workdir(path)
    text = str(caught.value)
    assert text.startswith(f"--workdir={path!r} cannot be opened")
    assert "\n" not in text


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(Workdir("~/run").path) == str(tmp_path / "run")


def test_what_changed_since_the_claim_is_told(tmp_path):
    """Each phase is compared with its own beginning, not with that of the one before."""

    def claim(phase, devices, resumed):
        record = {"devices": ["cpu"] * devices, "backend": "cpu"}
        return Workdir(tmp_path).claim(phase, {"seed": 0}, record, (), resumed=resumed)

    assert claim("search", 1, resumed=False) == []
    assert claim("search", 1, resumed=True) == []
    assert claim("train", 2, resumed=False) == []
    assert claim("train", 2, resumed=True) == []
    assert claim("train", 1, resumed=True) == ["devices was ['cpu', 'cpu'] and is ['cpu']"]
    assert claim("search", 2, resumed=True) == ["devices was ['cpu'] and is ['cpu', 'cpu']"]
    # What a fresh beginning replaces is not compared.
    assert claim("search", 2, resumed=False) == []
    assert claim("search", 2, resumed=True) == []
