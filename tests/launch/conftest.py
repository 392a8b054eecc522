"""A stand-in gcloud before the real one, and what it was called with."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STAND_INS = pathlib.Path(__file__).parent / "stand_in"


def recorded(path):
    """Return the argument lists of a file of records `number, arguments`, each ended by NUL."""
    fields = path.read_bytes().decode().split("\0")[:-1] if path.exists() else []
    calls = []
    while fields:
        number = int(fields[0])
        calls.append(fields[1 : number + 1])
        fields = fields[number + 1 :]
    return calls


class Cloud:
    """A directory with which the stand-in answers and records."""

    def __init__(self, directory):
        self.directory = directory
        (directory / "answers").mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CPNAS_")},
            "PATH": f"{STAND_INS}:{os.environ['PATH']}",
            "STAND_IN": str(directory),
            "TMPDIR": str(directory),
        }

    def answers(self, kind, *lines):
        """Lay out answers `STATUS TEXT`; the last one is given again and again."""
        (self.directory / "answers" / kind).write_text("".join(f"{line}\n" for line in lines))

    def calls(self):
        return recorded(self.directory / "calls")

    def kinds(self):
        """Return each call in short: its kind, or the verb of the worker's script."""
        shown = []
        for call in self.calls():
            command = [word for word in call if word.startswith("--command=")]
            if command:
                program, *words = command[0].split("=", 1)[1].split()
                shown.append("log" if program == "tail" else words[1])
            else:
                shown.append("node" if call[2:4] == ["tpu-vm", "describe"] else call[3])
        return shown

    def forget(self):
        (self.directory / "calls").unlink()

    def tpu(self, *arguments, **variables):
        """Run launch/tpu.sh; return the finished process."""
        return subprocess.run(
            [ROOT / "launch" / "tpu.sh", *arguments],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)
