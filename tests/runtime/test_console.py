"""What people see: plain lines in a file, a progress line on a terminal."""

import io
import sys

import pytest
from rich.console import Console

from cpnas_jax.runtime.console import Reporter, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.6, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (90061, "25 h 1 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def told(terminal):
    """Everything that a reporter writes of a run of two epochs."""
    file = io.StringIO()
    # TERM=dumb of the surroundings would make a forced terminal a dumb one.
    console = Console(
        force_terminal=terminal,
        file=file,
        width=100,
        highlight=False,
        soft_wrap=True,
        _environ={"TERM": "xterm"},
    )
    with Reporter(console) as reporter:
        assert reporter.on_terminal == terminal
        reporter.say("edge [0->2] [bold]none[/bold] :smile:")
        reporter.start_progress(5, 0, "compiling")
        reporter.show("epoch 1/5")
        reporter.advance(1, "epoch 1/5 " + "x" * 150)
        reporter.advance(2, "epoch 2/5")
    return file.getvalue()


def test_without_a_terminal_there_are_plain_whole_lines():
    output = told(False)
    assert "\x1b" not in output
    assert "\r" not in output
    lines = output.splitlines()
    # Brackets and colons are text, not markup.
    assert lines[0] == "edge [0->2] [bold]none[/bold] :smile:"
    assert [line.partition("] ")[2] for line in lines[1:]] == [
        "compiling",
        "epoch 1/5 " + "x" * 150,
        "epoch 2/5",
    ]
    assert all(line.startswith("[") and " s] " in line for line in lines[1:])


def test_a_terminal_shows_progress_instead_of_a_log():
    output = told(True)
    assert "edge [0->2] [bold]none[/bold] :smile:" in output
    assert "\x1b" in output
    assert "2/5" in output
    assert " s] " not in output
    # The cursor was hidden for the bar and is shown again at its end.
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l") >= 0


def test_an_error_takes_the_progress_line_away():
    file = io.StringIO()
    console = Console(force_terminal=True, file=file, width=80, _environ={"TERM": "xterm"})

    def interrupted():
        with Reporter(console) as reporter:
            reporter.start_progress(5, 0, "compiling")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown = file.getvalue()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


def test_a_reporter_of_its_own_writes_to_stdout(capsys):
    with Reporter() as reporter:
        reporter.say("a line")
        reporter.start_progress(2, 1, "compiling")
        reporter.show("epoch 2/2")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "a line"
    assert second.endswith(" s] compiling")


def test_the_progress_line_of_a_phase_ends_with_the_next():
    file = io.StringIO()
    console = Console(force_terminal=True, file=file, width=80, _environ={"TERM": "xterm"})
    before = sys.stdout
    with Reporter(console) as reporter:
        for total in (5, 3, 2):
            reporter.start_progress(total, 0, "compiling")
            reporter.advance(total, "done")
    assert sys.stdout is before
    text = file.getvalue()
    # The cursor is hidden and shown again three times.
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 3
