"""Errors of a user's making."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """A mistake in a config, a file or the environment, told in one line.

    The message names the key or file, the value found, and what would be right. `main` prints it
    on stderr without a traceback and exits with status 1.
    """


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Turn what a full or broken disk raises into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); mend that or free space, then "
            "the same command resumes"
        ) from error


def shown(value: object) -> str:
    """Write a value a user gave for a one-line message, however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
