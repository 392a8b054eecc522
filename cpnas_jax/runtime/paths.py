"""Paths that a user gives: local ones, and those that `etils.epath` opens (`gs://...`)."""

import os

from etils import epath

from cpnas_jax.runtime.errors import UserError


def user_path(name: str, path: str | os.PathLike[str]) -> epath.Path:
    """Return a path, `~` replaced, that can at least be asked for.

    Args:
        name: what an error calls it, such as `--workdir`.
        path: as the user wrote it.

    Raises:
        UserError: nothing can be there, such as where a file stands in the way, or where the
            package for its kind of storage is missing.
    """
    try:
        if "\0" in os.fspath(path):
            raise ValueError("null byte")
        os.fspath(path).encode()
        found = epath.Path(path).expanduser()
        found.exists()
    # A missing gcsfs is an ImportError, a null byte a ValueError, an unknown scheme a KeyError.
    except (OSError, ImportError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{name}={path!r} cannot be opened ({reason})") from error
    return found
