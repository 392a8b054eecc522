"""Damage to a directory of checkpoints: to single files, and to what lies in it."""

import dataclasses
import itertools
import math
import shutil

import numpy as np
from outcomes import numbers


@dataclasses.dataclass(frozen=True)
class Damage:
    """One damage.

    Attributes:
        kind: of `FILE_KINDS`, "flipped", or of `PLACE_KINDS`.
        path: the damaged file, below the directory of checkpoints; "" where it is not one file.
        offset: of the flipped byte.
        mask: its flipped bits.
    """

    kind: str
    path: str = ""
    offset: int = 0
    mask: int = 0

    def __str__(self):
        where = f" {self.path}" if self.path else ""
        return f"{self.kind}{where}" + (f" [{self.offset}] ^ {self.mask:#04x}" if self.mask else "")


FILE_KINDS = {
    "emptied": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content[:-1],
    "a byte longer": lambda content: content + b"\0",
    "zero-filled": lambda content: bytes(len(content)),
    "deleted": lambda content: None,
}


def apply(damage, directory):
    """Damage a directory of checkpoints."""
    if damage.kind in PLACE_KINDS:
        PLACE_KINDS[damage.kind](directory, numbers(directory))
        return
    path = directory / damage.path
    content = path.read_bytes()
    if damage.kind == "flipped":
        changed = bytearray(content)
        changed[damage.offset] ^= damage.mask
        changed = bytes(changed)
    else:
        changed = FILE_KINDS[damage.kind](content)
    assert changed != content, damage
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)


def files_of_newest(directory):
    """Return the files of the newest checkpoint, below the directory, in a fixed order."""
    newest = directory / str(numbers(directory)[-1])
    return sorted(
        path.relative_to(directory).as_posix() for path in newest.rglob("*") if path.is_file()
    )


def file_damages(directory):
    """Return every kind of damage to every file of the newest checkpoint."""
    found = []
    for path in files_of_newest(directory):
        content = (directory / path).read_bytes()
        found += [
            Damage(kind, path)
            for kind, change in FILE_KINDS.items()
            # An empty file cannot be shortened.
            if change(content) != content
        ]
    return found


def flips(directory, number, seed, every_byte_up_to=0):
    """Return about so many flips of a byte, or of a bit of it, over all files of the newest.

    Args:
        directory: of checkpoints.
        number: of flips, one half shared equally among the files, one by their sizes; offsets are
            spread over each file.
        seed: decides offsets and bits.
        every_byte_up_to: files of so many bytes are flipped at every byte.
    """
    rng = np.random.default_rng(seed)
    sizes = {path: (directory / path).stat().st_size for path in files_of_newest(directory)}
    found = []
    for path, size in sizes.items():
        share = math.ceil(number / 2 * (1 / len(sizes) + size / sum(sizes.values())))
        count = size if size <= every_byte_up_to else min(share, size)
        borders = np.linspace(0, size, count + 1).astype(int)
        for low, high in itertools.pairwise(borders):
            # Of four, three lose a bit, one any bits of the byte.
            mask = 1 << rng.integers(8) if rng.integers(4) else rng.integers(1, 256)
            found.append(Damage("flipped", path, int(rng.integers(low, high)), int(mask)))
    return found


def _halve_arrays(directory, which):
    for number in which:
        files = (directory / str(number) / "state").rglob("d/*")
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(FILE_KINDS["halved"](largest.read_bytes()))


def _without(item):
    return lambda directory, found: shutil.rmtree(directory / str(found[-1]) / item)


def _renamed(pattern):
    """Rename the newest; `{n}` is its number and `{far}` one far above."""

    def change(directory, found):
        name = pattern.format(n=found[-1], far=found[-1] + 1000)
        (directory / str(found[-1])).rename(directory / name)

    return change


def _copied(pattern):
    def change(directory, found):
        name = pattern.format(n=found[-1], next=found[-1] + 1)
        shutil.copytree(directory / str(found[-1]), directory / name)

    return change


def _added(pattern):
    def change(directory, found):
        path = directory / pattern.format(n=found[-1], next=found[-1] + 1)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"something")

    return change


def _of_the_one_before(item):
    def change(directory, found):
        before, newest = (directory / str(n) / item for n in found[-2:])
        shutil.rmtree(newest)
        shutil.copytree(before, newest)

    return change


def _moved_up(directory, found):
    shutil.rmtree(directory / str(found[-1]))
    (directory / str(found[-2])).rename(directory / str(found[-1]))


def _every_other_file_gone(directory, _):
    for path in files_of_newest(directory)[::2]:
        (directory / path).unlink()


def _all_files_gone(directory, _):
    for path in files_of_newest(directory):
        (directory / path).unlink()


def _a_file_instead(directory, found):
    path = directory / str(found[-1])
    shutil.rmtree(path)
    path.write_text("")


PLACE_KINDS = {
    "the two newest damaged": lambda directory, found: _halve_arrays(directory, found[-2:]),
    "all damaged": _halve_arrays,
    "no state": _without("state"),
    "no record": _without("record"),
    "every other file gone": _every_other_file_gone,
    "all its files gone": _all_files_gone,
    "the directory gone": _without(""),
    "a file instead of the directory": _a_file_instead,
    "the state of the one before": _of_the_one_before("state"),
    "the record of the one before": _of_the_one_before("record"),
    "all of the one before": _of_the_one_before(""),
    "the one before under its number": _moved_up,
    "renamed to a higher number": _renamed("{far}"),
    "renamed with a leading zero": _renamed("0{n}"),
    "renamed with a word": _renamed("{n}.old"),
    "renamed as half-written": _renamed("{n}.orbax-checkpoint-tmp"),
    "a copy with a leading zero": _copied("0{n}"),
    "a copy with a word": _copied("{n} (copy)"),
    "a copy under the next number": _copied("{next}"),
    "a half-written next one": _copied("{next}.orbax-checkpoint-tmp"),
    "an empty next one": lambda directory, found: (directory / str(found[-1] + 1)).mkdir(),
    "a file as the next one": _added("{next}"),
    "one file in the next one": _added("{next}/_CHECKPOINT_METADATA"),
    "an extra file in it": _added("{n}/extra"),
    "an extra file in its state": _added("{n}/state/extra"),
    "an extra file among its arrays": _added("{n}/state/d/extra"),
    "an extra file in its record": _added("{n}/record/extra"),
    "an extra file beside it": _added("extra"),
    "an extra directory beside it": _added("extra/file"),
}
"""Name -> what changes the directory, given it and the numbers of its checkpoints."""
