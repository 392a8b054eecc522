"""Examples that cannot be decoded: named, counted, and skipped up to a configured limit.

The limit, `config.dataset.max_undecodable`, holds for each split and counts distinct examples: one
that is met in every epoch counts once. A process counts what it meets itself; what several
processes have met is put together where `shared_rows` is called, at every checkpoint. The limit
changes no result: it only says whether a run stops, so that the same run goes on under a higher
one.
"""

import logging
import os
from collections.abc import Iterable

from cpnas_jax.data import records
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError

_LOGGER = logging.getLogger(__name__)

_TOLD = 10
"""Examples of a split that get a warning of their own."""


class Undecodable:
    """The examples of one split that could not be decoded, and the limit of their number."""

    def __init__(self, prepared: records.PreparedSet, split: str, limit: int) -> None:
        """Begin with none.

        Args:
            prepared: the data set.
            split: name of a stored split.
            limit: so many distinct examples are skipped.
        """
        self._directory, self._split, self._limit = prepared.directory, split, limit
        self._files = records.split_files(prepared, split)
        self._rows: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    @property
    def rows(self) -> list[int]:
        """Return the examples that this process knows of, ascending."""
        return sorted(self._rows)

    def note(self, row: int, reason: str) -> None:
        """Count an example, unless it is known, and warn of it.

        Raises:
            UserError: it is one too many.
        """
        if row in self._rows:
            return
        self._rows.add(row)
        what = f"example {row} of split {self._split!r}, {self._place(row)}"
        if len(self) > self._limit:
            raise self._too_many(f"{what}: {reason}")
        if len(self) <= _TOLD:
            _LOGGER.warning(
                "%s in %s cannot be decoded and is skipped: %s (%d of at most %d, see "
                "config.dataset.max_undecodable)%s",
                what,
                os.fspath(self._directory),
                reason,
                len(self),
                self._limit,
                "; further ones of this split are only counted" if len(self) == _TOLD else "",
            )

    def take_in(self, rows: Iterable[int]) -> None:
        """Count examples that were met before or elsewhere, of which there was a warning there.

        Raises:
            UserError: they are too many.
        """
        self._rows.update(rows)
        if len(self) > self._limit:
            last = max(self._rows)
            raise self._too_many(
                f"example {last} of split {self._split!r}, {self._place(last)}, among others"
            )

    def shared_rows(self) -> list[int]:
        """Return the examples that any process knows of; every process must call it.

        Raises:
            UserError: they are too many, in every process alike.
        """
        known = processes.union(self._rows, f"which examples of split {self._split!r} they skipped")
        processes.together(lambda: self.take_in(known))
        return self.rows

    def _place(self, row: int) -> str:
        first = 0
        for name, skipped, count in self._files:
            if row < first + count:
                return f"record {row - first + skipped} of {name}"
            first += count
        raise IndexError(row)

    def _too_many(self, reason: str) -> UserError:
        error = records.damaged(
            self._directory,
            f"{reason}; undecodable are {len(self)}, config.dataset.max_undecodable is "
            f"{self._limit}",
        )
        return UserError(
            f"{error}, or raise config.dataset.max_undecodable to skip such examples, and the "
            "same command goes on"
        )


def nothing_decodes(directory: os.PathLike[str] | str, split: str) -> UserError:
    """Return the error for a split without a single example that could be used."""
    return records.damaged(directory, f"no example of split {split!r} can be decoded")


def refuse_other(split: str, stored: Iterable[int], found: Iterable[int]) -> None:
    """Compare the examples that a set in memory leaves out with those before a resumption.

    Raises:
        UserError: they are others, so that the batches of the same run would be others.
    """
    before, now = set(stored), set(found)
    if before != now:
        kinds = {"can no longer be decoded": now - before, "can be decoded again": before - now}
        texts = [
            f"example {', '.join(map(str, sorted(rows)))} {what}"
            for what, rows in kinds.items()
            if rows
        ]
        raise UserError(
            f"split {split!r} of the data is not what the run began with: {'; '.join(texts)}. "
            "Restore the data as they were, or begin in a new workdir"
        )


def tell_skipped(reporter: Reporter, counts: dict[str, int]) -> None:
    """Say how many examples of each split were skipped, if any were."""
    each = [f"{count} of split {split!r}" for split, count in counts.items() if count]
    if each:
        reporter.say(f"Examples skipped because they cannot be decoded: {', '.join(each)}.")
