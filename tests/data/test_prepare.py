import importlib.util

import pytest

from cpnas_jax.data import prepare


def refusal(capsys, *arguments):
    assert prepare.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_without_tensorflow_the_extra_is_named(capsys, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else found(name)
    )
    message = refusal(capsys, "cifar10", f"--data_dir={tmp_path}")
    assert 'pip install -e ".[prepare]"' in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["no_such_set", "huggingface:mnist"])
def test_set_that_tfds_does_not_have(capsys, tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert repr(name) in refusal(capsys, name, f"--data_dir={tmp_path}")


def test_usage(capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main([])
    assert end.value.code == 2
    assert "NAME" in capsys.readouterr().err
