"""What a run tells people: a progress line on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def duration(seconds: float) -> str:
    """Write seconds as people read them: '42 s', '3 min 5 s', '2 h 10 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Console(Console):
    """A console that raises when nobody reads it any more, where rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("standard output was closed")


class Reporter:
    """Prints lines; between `with` and its end also a progress line, on a terminal only."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        """Write to a console, or to none, as in all processes of a run but the first."""
        # soft_wrap: a log line stays one line, whatever the width of a pipe is taken for.
        self._console = console or _Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._progress: Progress | None = None
        self._started = time.monotonic()

    @property
    def on_terminal(self) -> bool:
        """Tell whether a person is likely to look on."""
        return self._console.is_terminal

    def say(self, text: str) -> None:
        """Print a line, or several, as they are."""
        self._console.print(text, markup=False, emoji=False)

    def log(self, text: str) -> None:
        """Print a line with the seconds since the start; not on a terminal, which has the bar."""
        if not self.on_terminal:
            self.say(f"[{time.monotonic() - self._started:8.1f} s] {text}")

    def start_progress(self, total: int, completed: int, text: str) -> None:
        """Begin the progress line of a phase over `total` epochs; that of the phase before ends."""
        self.log(text)
        if not self.on_terminal:
            return
        self._stop_progress()
        self._progress = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(text, total=total, completed=completed)
        self._progress.start()

    def show(self, text: str) -> None:
        """Put a text into the progress line, where there is one."""
        if self._progress is not None:
            self._progress.update(self._task, description=text)

    def advance(self, completed: int, text: str) -> None:
        """Show a text and how far it is; a log line where there is no terminal."""
        self.log(text)
        if self._progress is not None:
            self._progress.update(self._task, completed=completed, description=text)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the progress line away, so that an error is not printed into it."""
        self._stop_progress()

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = None
