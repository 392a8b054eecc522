"""Ctrl-C that is not lost."""

import os
import signal
import sys
import threading

_DELAY = 0.1
"""Seconds until a lost interruption is repeated; by then Python is out of the callback."""


def repeat_lost() -> None:
    """Let Ctrl-C interrupt wherever it falls.

    Python drops what is raised in a destructor or in the callback of a weak reference, of which JAX
    has many: a run would go on as if nothing had been pressed.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    usual = sys.unraisablehook

    def hook(raised: "sys.UnraisableHookArgs") -> None:
        if not isinstance(raised.exc_value, KeyboardInterrupt):
            usual(raised)
            return
        # Raised from here it would be dropped again.
        again = threading.Timer(_DELAY, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
