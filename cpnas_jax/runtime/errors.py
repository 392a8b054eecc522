"""Errors of a user's making."""


class UserError(Exception):
    """A mistake in a config, a file or the environment, told in one line.

    The message names the key or file, the value found, and what would be right. `main` prints it
    on stderr without a traceback and exits with status 1.
    """
