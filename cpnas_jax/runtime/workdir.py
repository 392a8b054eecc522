"""The files of a workdir that every phase shares: config.json, results.json, the history."""

import fcntl
import json
import os
from collections.abc import Collection
from typing import Any

from etils import epath

from cpnas_jax.runtime import processes
from cpnas_jax.runtime.atomic import write_atomically
from cpnas_jax.runtime.errors import UserError, shown, writing
from cpnas_jax.runtime.paths import user_path


def _locked(directory: epath.Path) -> Any:
    """Return an open file that keeps other processes of this machine out until it is closed.

    The system lets go of it when the process ends, however that is. Storage that is not a local
    file system has no such lock.
    """
    if "://" in os.fspath(directory):
        return None
    file = open(directory / ".lock", "a")  # noqa: SIM115 (open as long as the workdir is used)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"another process works in --workdir={directory}; wait for it or use another"
        ) from error
    except OSError:
        # A file system without locks.
        file.close()
        return None
    return file


class Workdir:
    """A directory of one run.

    `config.json` says of which config it is; another config is refused. Of several processes the
    first alone reads and writes, and tells the others what it found or what failed; all of them
    call the same methods.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Make the directory if needed and see that it can be written.

        Raises:
            UserError: it cannot.
        """
        self.path = user_path("--workdir", path)
        processes.first_alone(self._make)
        processes.require_shared(self.path)
        self._lock: Any = None

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--workdir={os.fspath(self.path)} cannot be written "
                f"({error.strerror or error}); give a directory that can"
            ) from error

    def __enter__(self) -> "Workdir":
        """Lock the directory.

        Raises:
            UserError: another run works in it.
        """

        def lock() -> None:
            self._lock = _locked(self.path)

        processes.first_alone(lock)
        return self

    def __exit__(self, *_: object) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()

    def write_json(self, name: str, value: Any) -> None:
        """Write a file as JSON, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        text = json.dumps(value, indent=1) + "\n"
        self.write(name, text.encode())

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        processes.first_alone(lambda: write_atomically(self.path / name, data))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON object; None where the file is absent.

        Raises:
            UserError: the file is damaged.
        """
        return processes.from_first(lambda: self._read_json(name))

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text())
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({error}); restore it or use another --workdir"
            ) from error
        return value

    def claim(
        self,
        phase: str,
        config: dict[str, Any],
        record: dict[str, Any],
        own: Collection[str],
        *,
        resumed: bool,
    ) -> list[str]:
        """Write `config.json`; where it is there, only what belongs to the phase that begins.

        Args:
            phase: its name.
            config: all keys, dotted.
            record: versions, devices and what else is worth keeping of where the phase begins.
            own: the keys that decide what the phase does.
            resumed: whether the phase goes on, so that the record of its beginning stays.

        Returns:
            What of the record is otherwise than when the phase was begun, in words; the command
            may be another.
        """
        stored = self.read_json("config.json") or {"config": config}
        before = stored.get(phase) if resumed else None
        keys = {**stored["config"], **{key: config[key] for key in own}}
        self.write_json("config.json", {**stored, "config": keys, phase: before or record})
        return [
            f"{key} was {before[key]!r} and is {value!r}"
            for key, value in record.items()
            if key != "command" and before and key in before and before[key] != value
        ]

    def refuse_other(self, deciding: dict[str, Any]) -> None:
        """Compare a config with that of the run in the workdir, if there is one.

        Args:
            deciding: the dotted keys that decide the result.

        Raises:
            UserError: the workdir holds a run of another config; the differing keys are named.
        """
        stored = self.read_json("config.json")
        if stored is None:
            return
        before = stored.get("config")
        if not isinstance(before, dict):
            raise UserError(
                f"{self.path / 'config.json'} is damaged (no object 'config'); restore it or "
                "use another --workdir"
            )
        differing = [
            f"{key} (there {shown(before.get(key))}, here {shown(value)})"
            for key, value in deciding.items()
            if key not in before or before[key] != value
        ]
        if differing:
            raise UserError(
                f"{self.path} holds a run of another config; differing: {'; '.join(differing)}. "
                "Use its config or another --workdir"
            )


class History:
    """A log of whole JSON lines that survives a kill.

    The checkpoint holds the lines too: after a kill the file is brought back to what the
    checkpoint knows, so that a half-written line or one of a repeated epoch cannot stay.
    """

    def __init__(self, path: epath.Path, lines: list[dict[str, Any]]) -> None:
        """Write the file with exactly these lines.

        Raises:
            UserError: it cannot be written.
        """
        self.path = path
        self.lines = list(lines)
        text = "".join(map(_encode, self.lines))
        processes.first_alone(lambda: write_atomically(path, text.encode()))

    def append(self, line: dict[str, Any]) -> None:
        """Add a line and bring it to the disk.

        Raises:
            UserError: it cannot be written.
        """
        self.lines.append(line)
        processes.first_alone(lambda: self._append(line))

    def _append(self, line: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a") as file:
            file.write(_encode(line))
            file.flush()
            if hasattr(file, "fileno"):
                os.fsync(file.fileno())


def _encode(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
