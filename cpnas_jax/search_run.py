"""What every search does with its files and networks: resume, go on, save, stop, tell.

Strategies differ in what an epoch is: `sampled_run.py` trains sampled paths, `bilevel_run.py` all
operations at once or architectures drawn from alpha.
"""

import abc
import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

from ml_collections import config_dict

from cpnas_jax.architecture.collapse import parameter_free_share
from cpnas_jax.config_keys import config_hash, deciding_keys, flatten
from cpnas_jax.data.undecodable import refuse_other
from cpnas_jax.decision_text import decision_text
from cpnas_jax.diagnosis import NotFinite
from cpnas_jax.runtime import environment, stall
from cpnas_jax.runtime.board import Board, board_directory
from cpnas_jax.runtime.checkpoints import Checkpoints, Restored
from cpnas_jax.runtime.console import Reporter, duration
from cpnas_jax.runtime.interruptions import Stopped, noted
from cpnas_jax.runtime.memory import describe
from cpnas_jax.runtime.workdir import History, Workdir
from cpnas_jax.search_board import tell_line


class Steps(Protocol):
    """What counts the steps of an epoch that are done."""

    steps: int


class SearchRun(abc.ABC):
    """The loop of a search over its networks, files and messages.

    Attributes:
        total: epochs of the whole search, at most.
        epoch: epochs done.
        survivors: bool[2, 14, 8], the operations left.
        history: lines so far.
    """

    total: int

    def __init__(
        self,
        config: config_dict.ConfigDict,
        networks: Any,
        directory: Workdir,
        checkpoints: Checkpoints,
        reporter: Reporter,
        undecodable: tuple[int, ...],
    ) -> None:
        """Take what the run works with; nothing is read or compiled.

        Args:
            config: validated.
            networks: those of the strategy.
            directory: where the files go.
            checkpoints: of the search.
            reporter: prints what happens.
            undecodable: examples that are left out.
        """
        self.config, self.networks, self.directory = config, networks, directory
        self.checkpoints, self.reporter, self.undecodable = checkpoints, reporter, undecodable
        self.held: dict[int, str] = {}
        self.board: Board
        self.history: History
        self.history_path = directory.path / "search" / "history.jsonl"

    @property
    @abc.abstractmethod
    def models(self) -> tuple[str, ...]:
        """Return the models that are trained."""

    @abc.abstractmethod
    def plan(self) -> str:
        """Name the epochs and how they come about."""

    @property
    @abc.abstractmethod
    def epoch(self) -> int:
        """Return the number of epochs done."""

    @property
    @abc.abstractmethod
    def survivors(self) -> Any:
        """Return the operations left, bool[2, 14, 8]."""

    @property
    @abc.abstractmethod
    def is_over(self) -> bool:
        """Tell whether nothing is left to do."""

    @abc.abstractmethod
    def where(self) -> str:
        """Say where the search is."""

    @abc.abstractmethod
    def run_epoch(self, is_first: bool) -> None:
        """Train, score and decide for one epoch, and save."""

    @abc.abstractmethod
    def arrays(self) -> dict[str, Any]:
        """Return what a checkpoint stores beside the networks."""

    @abc.abstractmethod
    def record(self) -> dict[str, Any]:
        """Return what a checkpoint's record holds beside what all searches have."""

    @abc.abstractmethod
    def take_up(self, found: Restored) -> None:
        """Go where a checkpoint was made.

        Raises:
            UserError: it cannot be gone on with here.
        """

    @abc.abstractmethod
    def checkpoint_number(self) -> int:
        """Return the number of a checkpoint made now; it grows with every step."""

    def resume_or_start(self) -> None:
        """Take up the newest checkpoint, or begin with fresh weights and an empty history.

        Raises:
            UserError: the checkpoint is another config's.
        """
        states = self.networks.initial_state()
        found = self.checkpoints.restore_newest(
            {**states, **self.arrays()}, config_hash(self.config)
        )
        changes = self.directory.claim(
            "search",
            flatten(self.config),
            environment.record(),
            deciding_keys(self.config),
            resumed=found is not None,
        )
        if changes:
            self.reporter.say(
                f"Begun elsewhere: {'; '.join(changes)}. The search goes on, but need not end "
                "bitwise as it would have there."
            )
        if found is None:
            self.history = History(self.history_path, [])
        else:
            states = {name: found.state[name] for name in states}
            self.take_up(found)
            refuse_other("train", found.record["undecodable"], self.undecodable)
            self.history = History(self.history_path, found.record["history"])
            self.held[found.step] = self.where()
            self.reporter.say(f"Resumed {self.where()}.")
        self.networks.load(states)

    def go_on(self) -> None:
        """Run epochs until the search is over."""
        if self.is_over:
            return
        self.reporter.start_progress(self.total, self.epoch, "compiling the training program")
        self.networks.compile()
        self.reporter.say(
            f"Compiled in {self.networks.compile_seconds['train']:.1f} s; estimated memory of a "
            f"device: {describe(self.networks.memory_bytes())}."
        )
        first = self.epoch
        self.reporter.show(f"{self.epoch_name(first)}/{self.total}")
        path = board_directory(self.directory.path, "search")
        wanted = self.config.runtime.tensorboard
        self.board = Board(path, first + 1, wanted=wanted)
        with noted(), contextlib.closing(self.board):
            while not self.is_over:
                self.run_epoch(is_first=self.epoch == first)

    def epoch_name(self, done: int) -> str:
        """Name the epoch after so many."""
        return f"sampled epoch {done + 1}"

    def save(self) -> None:
        """Save everything that decides the result, in the background."""
        state = {**self.networks.host_state(), **self.arrays()}
        record = {
            **self.record(),
            "undecodable": list(self.undecodable),
            "history": self.history.lines,
            "config_hash": config_hash(self.config),
        }
        number = self.checkpoint_number()
        self.checkpoints.save(number, state, record)
        self.held[number] = self.where()

    def steps(self, sums: Steps, call: Callable[[], bool]) -> float:
        """Make the calls that an epoch's steps are left to; return the seconds they took.

        Args:
            sums: of the steps done; `call` adds to it.
            call: trains the next steps, and tells whether the run was asked to stop.

        Raises:
            Stopped: the run was asked to stop, and is saved.
        """
        before = time.monotonic()
        while sums.steps < self.networks.steps_per_epoch:
            stall.at(f"search {self.where()}")
            try:
                stop = call()
            except NotFinite as error:
                raise error.naming(self.checkpoints.last_good(self.held)) from error
            if stop:
                self.spend(time.monotonic() - before)
                self.save()
                self.checkpoints.wait()
                raise Stopped(self.where())
        return time.monotonic() - before

    @abc.abstractmethod
    def num_scored(self) -> int:
        """Return how many architectures were scored without being trained."""

    @abc.abstractmethod
    def spend(self, seconds: float) -> None:
        """Count time to the epoch under way."""

    def tell_decision(self, line: dict[str, Any]) -> None:
        """Put the end of a stage into the history, and say what it decided."""
        self.history.append(line)
        self.reporter.say(decision_text(line))

    def tell_board(self, **values: Any) -> None:
        """Show in TensorBoard the line that is the history's last, and what else is known."""
        operations = self.config.search.operations
        tell_line(self.board, self.epoch, self.history.lines, operations, self.survivors, **values)

    def warn_of_collapse(self) -> None:
        """Say when too much of what survives has no parameters."""
        share, most = parameter_free_share(self.survivors), self.config.search.collapse_share
        if share > most:
            self.reporter.say(
                f"warning: {share:.0%} of the surviving operations are skip, pooling or none, more "
                f"than config.search.collapse_share={most:g}; the search may be collapsing"
            )

    def tell_start(self, seconds: float) -> None:
        """Say how long the start took and what the whole will take, from its first epoch."""
        # A search that was stopped after the last step of an epoch begins with scoring it.
        if self.networks.first_step_seconds is not None:
            self.reporter.say(
                f"First training step {self.networks.first_step_seconds:.1f} s after the start; "
                f"all {self.total} sampled epochs will take about {duration(seconds * self.total)}."
            )
