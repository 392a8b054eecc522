"""N processes with D forced CPU devices each on one machine, by the same code as on a pod.

launch/local_pod.sh N D [flags of cpnas_jax.main]

With N = 1 main runs as it does without a pod. What process 0 says goes straight to the terminal,
lines of the others begin with [1], [2], ...

  LOCAL_POD_GRACE   seconds that the others may go on after a process has failed, 10 by default
  PYTHON            the interpreter that runs main, by default the one that runs this file

SIGTERM and Ctrl-C reach every process once, and the pod waits for them; a second one kills. Exit
status: that of the process that failed first (128 + N where signal N killed it), 75 when the pod
was stopped and the same command resumes, 2 for wrong usage.

No process is left behind, also when this one is killed by SIGKILL: each process begins a session
of its own, and a watcher, which sees this process end by the end of a pipe, kills what is left of
the sessions. Out of reach are a child that begins yet another session, and what remains when the
watcher is killed by SIGKILL together with this process.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

RESUMABLE = 75
# What ends a process that is stopped before it can heed the signal.
STOPPED = {RESUMABLE, 128 + signal.SIGTERM, 128 + signal.SIGINT}


def kill_session(leader: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a session's process group; none may be left of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def watch(pipe: int) -> None:
    """Kill the sessions that are left when the other end of the pipe is closed.

    Read from it are their leaders, `+1` of a session that begins and `-1` of one that has ended.
    """
    leaders = set[int]()
    with os.fdopen(pipe) as lines:
        for line in lines:
            (leaders.add if line[0] == "+" else leaders.discard)(int(line[1:]))
    for leader in leaders:
        kill_session(leader)


def start_watcher() -> tuple["subprocess.Popen[bytes]", int]:
    """Return the watcher and the end of the pipe to write to."""
    reading, writing = os.pipe()
    watcher = subprocess.Popen(
        [sys.executable, __file__, "--watch", str(reading)],
        stdin=subprocess.DEVNULL,
        pass_fds=[reading],
        start_new_session=True,
    )
    os.close(reading)
    return watcher, writing


def free_port() -> int:
    """Return a port that nobody listens on now; another program may take it meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def commands(processes: int, flags: Sequence[str]) -> list[list[str]]:
    """Return the command of each process."""
    command = [os.environ.get("PYTHON") or sys.executable, "-m", "cpnas_jax.main"]
    if processes == 1:
        return [[*command, *flags]]
    pod = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
    return [[*command, *pod, f"--process_id={index}", *flags] for index in range(processes)]


def environment(devices: int) -> dict[str, str]:
    """Return the environment of the processes: that many CPU devices and no other."""
    given = os.environ.get("XLA_FLAGS", "")
    forced = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": f"{given} {forced}".strip(), "JAX_PLATFORMS": "cpu"}


class Prefixed:
    """Hands on whole lines from a process's pipe with the process's number before each."""

    def __init__(self, index: int, source: int, target: int) -> None:
        self._source, self._target, self._rest = source, target, b""
        self._prefix = b"[%d] " % index

    def hand_on(self) -> bool:
        """Hand on what there is; return whether more can come."""
        read = os.read(self._source, 65536)
        *lines, self._rest = (self._rest + read).split(b"\n")
        if not read and self._rest:
            lines, self._rest = [self._rest], b""
        said = b"".join(self._prefix + line + b"\n" for line in lines)
        # When nobody reads any more the process goes on all the same.
        with contextlib.suppress(BrokenPipeError):
            while said:
                said = said[os.write(self._target, said) :]
        return bool(read)


class Pod:
    """The processes, their output, and what became of them."""

    def __init__(self, processes: int, devices: int, flags: Sequence[str], grace: float) -> None:
        self._grace = grace
        self._deadline = float("inf")
        self._asked: int | None = None  # the signal by which the pod was asked to stop
        self._statuses: list[int] = []  # in the order in which the processes ended
        self._selector = selectors.DefaultSelector()
        self._wake()
        self._watcher, self._pipe = start_watcher()
        self._children: list[subprocess.Popen[bytes]] = []
        for index, command in enumerate(commands(processes, flags)):
            self._children.append(self._start(index, command, environment(devices)))

    def _wake(self) -> None:
        """Let a signal end the waiting for output; Python hands it over as a byte of a pipe."""
        self._signals, writing = os.pipe()
        os.set_blocking(writing, False)
        os.set_blocking(self._signals, False)
        signal.set_wakeup_fd(writing)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._selector.register(self._signals, selectors.EVENT_READ)

    def _start(
        self, index: int, command: list[str], variables: dict[str, str]
    ) -> "subprocess.Popen[bytes]":
        def begin_session() -> None:
            # Known to the watcher before it does anything else; nothing can come between.
            os.setsid()
            os.write(self._pipe, b"+%d\n" % os.getpid())

        output = None if index == 0 else subprocess.PIPE
        child = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            bufsize=0,
            preexec_fn=begin_session,  # there are no threads here
        )
        for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            if source is not None:
                prefixed = Prefixed(index, source.fileno(), target.fileno())
                self._selector.register(source, selectors.EVENT_READ, prefixed)
        return child

    def run(self) -> int:
        """Wait until all have ended; return the pod's exit status."""
        while len(self._statuses) < len(self._children):
            timeout = max(0.0, self._deadline - time.monotonic())
            events = self._selector.select(None if timeout == float("inf") else timeout)
            for key, _ in events:
                if key.data is None:
                    self._heed(os.read(self._signals, 64))
                elif not key.data.hand_on():
                    self._selector.unregister(key.fileobj)
            if time.monotonic() >= self._deadline:
                print(
                    f"local_pod: others still run {self._grace:g} s after a process failed; "
                    "they are killed",
                    file=sys.stderr,
                )
                self._kill()
        self._drain()
        return self._status()

    def _heed(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGCHLD:
                continue
            if self._asked is not None:
                self._kill()
            self._asked = self._asked or number
            for child in self._running():
                # Only to the process itself: what it has started is its own to end.
                os.kill(child.pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        self._reap()

    def _running(self) -> list["subprocess.Popen[bytes]"]:
        return [child for child in self._children if child.returncode is None]

    def _kill(self) -> None:
        self._deadline = float("inf")
        for child in self._running():
            kill_session(child.pid)

    def _reap(self) -> None:
        for child in self._running():
            ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                continue
            # What it left behind is killed while its number cannot be another process's.
            kill_session(child.pid)
            code = child.wait()
            os.write(self._pipe, b"-%d\n" % child.pid)
            status = code if code >= 0 else 128 - code
            self._statuses.append(status)
            # Others wait for one that has failed, maybe for ever; one that saves takes its time.
            orderly = self._asked is not None and status in STOPPED
            if status != 0 and not orderly:
                self._deadline = min(self._deadline, time.monotonic() + self._grace)

    def _drain(self) -> None:
        """Hand on what is left in the pipes; all who could write are dead."""
        self._selector.unregister(self._signals)
        while self._selector.get_map():
            events = self._selector.select(1)
            if not events:
                return
            for key, _ in events:
                if not key.data.hand_on():
                    self._selector.unregister(key.fileobj)

    def _status(self) -> int:
        failed = [status for status in self._statuses if status != 0]
        if self._asked is not None and STOPPED & set(failed):
            return RESUMABLE
        return failed[0] if failed else 0

    def close(self) -> None:
        """Kill whatever is left, and let the watcher end."""
        self._kill()
        for child in self._children:
            child.wait()
        os.close(self._pipe)
        self._watcher.wait()


def usage_error(message: str) -> int:
    """Say what is wrong in one line; return the exit status."""
    print(f"error: {message}; launch/local_pod.sh N D [flags of main]", file=sys.stderr)
    return 2


def main(arguments: Sequence[str]) -> int:
    """Run the pod; return its exit status."""
    if arguments[:1] == ["--watch"]:
        watch(int(arguments[1]))
        return 0
    if {"-h", "--help"} & set(arguments[:1]):
        print((__doc__ or "").rstrip())
        return 0
    if len(arguments) < 2:
        return usage_error("the numbers of processes and of devices are missing")
    for name, value in zip(("processes", "devices"), arguments, strict=False):
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            return usage_error(f"the number of {name} is {value!r}, not a positive whole number")
    given = os.environ.get("LOCAL_POD_GRACE", "10")
    try:
        grace = float(given)
    except ValueError:
        return usage_error(f"LOCAL_POD_GRACE={given} is no number of seconds")
    processes, devices = int(arguments[0]), int(arguments[1])
    try:
        pod = Pod(processes, devices, arguments[2:], grace)
    except OSError as error:
        print(f"error: a process cannot be started ({error})", file=sys.stderr)
        return 1
    try:
        return pod.run()
    finally:
        pod.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
