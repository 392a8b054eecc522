"""Files that are either whole or absent."""

import os

from etils import epath

from cpnas_jax.runtime.errors import writing


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, then rename it.

    A reader sees the old file or the new one, never a part; a run that is killed while writing
    leaves the old file as it was. The directory is made when it does not exist.

    Args:
        path: a local path, or one that `etils.epath` opens (`gs://...`).
        data: the whole content.

    Raises:
        UserError: it cannot be written.
    """
    destination = epath.Path(path)
    with writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        # The process id keeps two processes of one machine from writing into each other's file.
        temporary = destination.parent / f".{destination.name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(data)
            temporary.replace(destination)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
