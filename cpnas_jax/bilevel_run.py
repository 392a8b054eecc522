"""The loop of a search whose alpha has a gradient: epochs of steps of alpha and of the weights."""

import dataclasses
import time
from typing import Any

import numpy as np
from ml_collections import config_dict

from cpnas_jax.architecture.events import epoch_line
from cpnas_jax.architecture.gradient import GradientRule
from cpnas_jax.architecture.sampling import all_survivors
from cpnas_jax.bilevel_networks import BilevelNetworks, BilevelSums
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.checkpoints import Checkpoints, Restored
from cpnas_jax.runtime.console import Reporter, duration
from cpnas_jax.runtime.workdir import Workdir
from cpnas_jax.search_run import SearchRun


class BilevelRun(SearchRun):
    """A search by `darts`, `pc_darts` or `cp_gradient`."""

    networks: BilevelNetworks

    def __init__(
        self,
        config: config_dict.ConfigDict,
        networks: BilevelNetworks,
        directory: Workdir,
        checkpoints: Checkpoints,
        reporter: Reporter,
        undecodable: tuple[int, ...],
        rule: GradientRule,
    ) -> None:
        """Stand before the first epoch; arguments as in `SearchRun`."""
        super().__init__(config, networks, directory, checkpoints, reporter, undecodable)
        self.rule, self.total = rule, rule.epochs
        self._epoch, self._seconds, self._sums = 0, 0.0, BilevelSums()
        self._survivors = all_survivors(rule.operations)

    @property
    def models(self) -> tuple[str, ...]:
        """Return the strategy's models."""
        return self.networks.models

    def plan(self) -> str:
        """Say when alpha moves, and how often operations are dropped."""
        drops = f", {len(self.rule.stage_ends())} drops" if self.rule.drops else ""
        return f"epochs (alpha moves after {self.networks.warmup}{drops})"

    @property
    def epoch(self) -> int:
        """Return the number of epochs done."""
        return self._epoch

    @property
    def survivors(self) -> np.ndarray:
        """Return the operations left."""
        return self._survivors

    @property
    def is_over(self) -> bool:
        """Tell whether all epochs are done."""
        return self._epoch == self.total

    def epoch_name(self, done: int) -> str:
        """Name the epoch after so many."""
        return f"epoch {done + 1}"

    def arrays(self) -> dict[str, Any]:
        """Return the survivors; alpha is the networks'."""
        return {"survivors": self._survivors}

    def record(self) -> dict[str, Any]:
        """Return the number of epochs done and the sums of the one under way."""
        return {
            "epoch": self._epoch,
            "seconds": self._seconds,
            "sums": dataclasses.asdict(self._sums),
        }

    def take_up(self, found: Restored) -> None:
        """Go where a checkpoint was made."""
        self._survivors = found.state["survivors"]
        self._epoch, self._seconds = found.record["epoch"], found.record["seconds"]
        self._sums = BilevelSums(**found.record["sums"])

    def checkpoint_number(self) -> int:
        """Return the number of a checkpoint made now."""
        return self._epoch * (self.networks.steps_per_epoch + 1) + self._sums.steps

    def where(self) -> str:
        """Say where the search is."""
        if not self._sums.steps:
            return f"after epoch {self._epoch} of {self.total}"
        return f"in epoch {self._epoch + 1} of {self.total}, after step {self._sums.steps}"

    def spend(self, seconds: float) -> None:
        """Count time to the epoch under way."""
        self._seconds += seconds

    def num_scored(self) -> int:
        """Return 0: nothing is scored that is not trained."""
        return 0

    def run_epoch(self, is_first: bool) -> None:
        """Move alpha and the weights through the training part, score, and drop."""
        networks = self.networks
        compiled = sum(networks.compile_seconds.values())
        self.spend(
            self.steps(self._sums, lambda: networks.train(self._survivors, self._epoch, self._sums))
        )
        before = time.monotonic()
        accuracies = networks.score(self._survivors)
        self.spend(time.monotonic() - before)
        alpha = networks.alpha()
        # What was compiled on the way is no cost of the search.
        seconds = self._seconds - (sum(networks.compile_seconds.values()) - compiled)
        sums = self._sums
        self._epoch, self._seconds, self._sums = self._epoch + 1, 0.0, BilevelSums()
        moving = self._epoch > networks.warmup
        objective = sums.objective / sums.steps if moving else 0.0
        processes.require_agreement(f"epoch {self._epoch}", accuracies=accuracies, alpha=alpha)
        self.history.append(
            epoch_line(
                epoch=self._epoch,
                accuracies=accuracies,
                losses=sums.mean_losses(),
                objective=objective,
                alpha=alpha,
                seconds=seconds,
            )
        )
        losses = ", ".join(f"{model} {loss:.2f}" for model, loss in sums.mean_losses().items())
        scores = ", ".join(f"{model} {value:.3f}" for model, value in accuracies.items())
        images = sums.steps * self.config.search.batch_size / seconds
        left = int(self._survivors.sum())
        self.tell_board(images_per_second=images)
        self.reporter.advance(
            self._epoch,
            f"epoch {self._epoch}/{self.total}: accuracy {scores}, loss {losses}, "
            + (f"alpha's objective {objective:.3f}, " if moving else "alpha waits, ")
            + f"{left} operations left, {images:.0f} images/s, "
            f"{duration(seconds * (self.total - self._epoch))} left",
        )
        if is_first:
            self.tell_start(seconds)
        if self.rule.ends_stage(self._epoch):
            decision = self.rule.decide(alpha, self._survivors)
            self._survivors = decision.survivors
            self.tell_decision(decision.line)
            self.tell_board()
            self.warn_of_collapse()
        self.save()
