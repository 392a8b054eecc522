"""The loop of a search that trains sampled paths, in stages, rounds and samples."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from cpnas_jax.architecture.events import sample_line, scores_line
from cpnas_jax.architecture.sampling import LAST_STAGE, all_survivors
from cpnas_jax.architecture.strategy import Strategy
from cpnas_jax.models.space import CHILD, PARENT
from cpnas_jax.runtime import processes, stall
from cpnas_jax.runtime.checkpoints import Checkpoints, Restored
from cpnas_jax.runtime.console import Reporter, duration
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.interruptions import Stopped, stop_wished
from cpnas_jax.runtime.workdir import Workdir
from cpnas_jax.search_networks import Networks
from cpnas_jax.search_run import SearchRun
from cpnas_jax.search_state import Position, Progress, Underway


class SampledRun(SearchRun):
    """A search by a `Strategy`."""

    networks: Networks

    def __init__(
        self,
        config: config_dict.ConfigDict,
        networks: Networks,
        directory: Workdir,
        checkpoints: Checkpoints,
        reporter: Reporter,
        undecodable: tuple[int, ...],
        strategy: Strategy,
    ) -> None:
        """Stand before the first stage; arguments as in `SearchRun`."""
        super().__init__(config, networks, directory, checkpoints, reporter, undecodable)
        self.strategy, self.total = strategy, strategy.total
        self.progress = Progress(
            Position(len(strategy.operations)),
            all_survivors(strategy.operations),
            *strategy.begin_alpha(),
        )

    @property
    def models(self) -> tuple[str, ...]:
        """Return the strategy's models."""
        return self.strategy.models

    def plan(self) -> str:
        """Say what the strategy does."""
        return f"sampled epochs ({self.strategy.describe()})"

    @property
    def epoch(self) -> int:
        """Return the number of sampled epochs done."""
        return self.progress.position.epoch

    @property
    def survivors(self) -> np.ndarray:
        """Return the operations left."""
        return self.progress.survivors

    @property
    def is_over(self) -> bool:
        """Tell whether one operation is left on every edge."""
        return self.progress.position.stage < LAST_STAGE

    def num_scored(self) -> int:
        """Return how many architectures were scored without being trained."""
        return sum(
            len(line["child_accuracy"]) for line in self.history.lines if line["event"] == "scores"
        )

    def arrays(self) -> dict[str, Any]:
        """Return survivors, alpha and its optimizer's state."""
        return self.progress.arrays()

    def record(self) -> dict[str, Any]:
        """Return the position and the epoch under way."""
        return {
            "position": dataclasses.asdict(self.progress.position),
            "underway": dataclasses.asdict(self.progress.underway),
            "paths": self.networks.paths,
        }

    def take_up(self, found: Restored) -> None:
        """Go where a checkpoint was made.

        Raises:
            UserError: some architectures are half trained, and here another number is trained
                together.
        """
        progress = Progress(
            Position(**found.record["position"]),
            found.state["survivors"],
            found.state["alpha"],
            found.state["alpha_state"],
            Underway.from_record(found.record["underway"]),
        )
        stored, here = found.record["paths"], self.networks.paths
        if progress.underway.sums and stored != here:
            raise UserError(
                f"the search was stopped while {stored} architectures were trained at the same "
                f"time, and these devices train {here}; finish them on a number of devices that "
                f"makes {stored} groups (config.search.parallel is "
                f"{self.config.search.parallel!r})"
            )
        self.progress = progress

    def checkpoint_number(self) -> int:
        """Return the number of a checkpoint made now."""
        return self.progress.number(self.networks.steps_per_epoch, len(self.strategy.models))

    def where(self) -> str:
        """Say where the search is."""
        position, underway = self.progress.position, self.progress.underway
        if not underway.sums:
            scored = f" and {position.scored} scored rounds" if position.scored else ""
            return f"after sampled epoch {position.epoch} of {self.total}{scored}"
        model = underway.next_model(self.strategy.models)
        return (
            f"in sampled epoch {position.epoch + 1} of {self.total}, after step "
            f"{underway.own_sums(model).steps} of the {model}"
        )

    def spend(self, seconds: float) -> None:
        """Count time to the epoch under way."""
        self.progress.underway.seconds += seconds

    def run_epoch(self, is_first: bool) -> None:
        """Train and score the next architecture, or as many as are trained at the same time.

        Where the stage's training is over, a round of architectures is scored instead.
        """
        if not self._trains():
            self._score_round()
            if self._trains() or self.is_over:
                self.save()
            return
        progress, position = self.progress, self.progress.position
        compiled = sum(self.networks.compile_seconds.values())
        permutations = self.strategy.sample(
            position.stage, position.round_index, progress.survivors
        )
        first = position.sample - 1
        architectures = permutations[first : first + self.networks.paths]
        if self.strategy.restarts and first == 0 and not progress.underway.sums:
            self.networks.load(self.networks.initial_state(position.round_index - 1))
        for model in self.strategy.models[len(progress.underway.accuracies) :]:
            self._train_and_score(model, architectures)
        underway, progress.underway = progress.underway, Underway()
        # What was compiled on the way is no cost of the search.
        underway.seconds -= sum(self.networks.compile_seconds.values()) - compiled
        for number, architecture in enumerate(architectures):
            line = self._credit(architecture, underway, number, len(architectures))
            self._tell_epoch(line, underway, len(architectures), is_first and number == 0)
            self._advance(len(permutations))
        self.save()

    def _train_and_score(self, model: str, architectures: np.ndarray) -> None:
        """Take a model through its part of the sampled epoch."""
        networks, underway, epoch = self.networks, self.progress.underway, self.epoch
        sums = underway.own_sums(model)
        trained = self._turns() if self.strategy.takes_turns else architectures
        self.spend(self.steps(sums, lambda: networks.train(model, trained, epoch, sums)))
        before = time.monotonic()
        underway.accuracies[model] = networks.score(model, architectures)
        self.spend(time.monotonic() - before)

    def _turns(self) -> np.ndarray:
        """Return what the steps of the next sampled epoch train."""
        position = self.progress.position
        return self.strategy.turns(
            position.stage,
            position.round_index,
            position.sample,
            self.survivors,
            self.networks.steps_per_epoch,
        )

    def _credit(
        self, architecture: np.ndarray, underway: Underway, number: int, together: int
    ) -> dict[str, Any]:
        """Give alpha what an architecture's accuracies say; return the line of the history."""
        progress, position = self.progress, self.progress.position
        accuracies = {model: values[number] for model, values in underway.accuracies.items()}
        z = self.strategy.score(accuracies)
        progress.alpha, progress.alpha_state = self.strategy.credit(
            progress.alpha, progress.alpha_state, architecture, z, position.round_index
        )
        line = sample_line(
            stage=position.stage,
            round_index=position.round_index,
            sample=position.sample,
            architecture=architecture,
            child_accuracy=accuracies[CHILD],
            parent_accuracy=accuracies.get(PARENT),
            z=z,
            seconds=underway.seconds / together,
        )
        processes.require_agreement(
            f"sampled epoch {position.epoch + 1}",
            architecture=architecture,
            accuracies=accuracies,
            alpha=progress.alpha,
            survivors=progress.survivors,
        )
        self.history.append(line)
        position.epoch += 1
        return line

    def _tell_epoch(
        self,
        line: dict[str, Any],
        underway: Underway,
        together: int,
        is_first: bool,
    ) -> None:
        """Say what a sampled epoch gave, and how long it takes."""
        models = self.strategy.models
        seconds = underway.seconds / together
        images = len(models) * self.networks.steps_per_epoch * self.config.search.batch_size
        losses = " / ".join(f"{underway.sums[model].mean_loss:.2f}" for model in models)
        parent = "" if PARENT not in models else f" A_P {line['parent_accuracy']:.3f}"
        left = int(self.survivors.sum())
        self.tell_board(
            images_per_second=images / seconds,
            losses={model: underway.sums[model].mean_loss for model in models},
        )
        self.reporter.advance(
            self.epoch,
            f"epoch {self.epoch}/{self.total} stage {line['stage']} round {line['round']} "
            f"sample {line['sample']}: A_C {line['child_accuracy']:.3f}{parent} "
            f"z {line['z']:.3f} loss {losses}, {left} operations left, "
            f"{images / seconds:.0f} images/s, {duration(seconds * (self.total - self.epoch))} "
            "left",
        )
        if is_first:
            self.tell_start(seconds)

    def _advance(self, samples: int) -> None:
        """Go to the next sample of a round that has so many; at the end of a stage decide."""
        position = self.progress.position
        position.sample += 1
        if position.sample > samples:
            position.sample, position.round_index = 1, position.round_index + 1
        self._end_stages()

    def _end_stages(self) -> None:
        """Decide, as long as neither training nor scoring is left to the stage."""
        while not (self.is_over or self._trains()) and self._has_scored_enough():
            self._end_stage()

    def _trains(self) -> bool:
        position = self.progress.position
        return position.round_index <= self.strategy.rounds(position.stage)

    def _has_scored_enough(self) -> bool:
        progress = self.progress
        # Linear algebra may be rounded otherwise on another host.
        return processes.from_first(
            lambda: self.strategy.is_enough(
                progress.position.stage, progress.survivors, self.history.lines
            )
        )

    def _end_stage(self) -> None:
        progress, position, lines = self.progress, self.progress.position, self.history.lines
        progress.alpha, progress.alpha_state = processes.from_first(
            lambda: jax.device_get(
                self.strategy.end_alpha(progress.alpha, progress.alpha_state, lines)
            )
        )
        decision = processes.from_first(
            lambda: self.strategy.decide(position.stage, progress.alpha, progress.survivors, lines)
        )
        processes.require_agreement(
            f"the end of stage {position.stage}",
            alpha=progress.alpha,
            survivors=decision.survivors,
        )
        self.tell_decision(decision.line)
        progress.survivors = decision.survivors
        self.tell_board()
        self.warn_of_collapse()
        position.stage = int(decision.survivors.sum(axis=-1).max())
        position.scored_before += position.scored
        position.round_index, position.scored = 1, 0
        progress.alpha, progress.alpha_state = self.strategy.begin_alpha()

    def _score_round(self) -> None:
        """Score the stage's next architectures, which are not trained.

        Raises:
            Stopped: the run was asked to stop, and is saved.
        """
        position = self.progress.position
        stall.at(f"search {self.where()}")
        before = time.monotonic() - sum(self.networks.compile_seconds.values())
        architectures = self.strategy.to_score(
            position.stage, position.scored + 1, self.progress.survivors
        )
        measures: dict[str, list[float]] = {}
        for model in self.strategy.models:
            for architecture in architectures:
                found = self.networks.scores(model, architecture[None])
                for name, values in found.items():
                    measures.setdefault(f"{model}_{name}", []).extend(values)
        position.scored += 1
        line = scores_line(
            stage=position.stage,
            round_index=position.scored,
            measures=measures,
            seconds=time.monotonic() - sum(self.networks.compile_seconds.values()) - before,
        )
        processes.require_agreement(
            f"scored round {position.scored} of stage {position.stage}", measures=measures
        )
        self.history.append(line)
        self.reporter.show(f"stage {position.stage}: round {position.scored} scored")
        self._end_stages()
        if processes.any_process(stop_wished()):
            self.save()
            self.checkpoints.wait()
            raise Stopped(self.where())
