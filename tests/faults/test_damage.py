"""Damage to checkpoints, in short: some of each kind, on a small state."""

import damage as script
import pytest
from damage import CRASHED, FELL_BACK, HARMLESS, LOST, REFUSED, SILENT, UNNAMED
from damages import FILE_KINDS, PLACE_KINDS, Damage, apply, file_damages, files_of_newest, flips

from cpnas_jax.runtime import checkpoints as module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return script.made(tmp_path_factory.mktemp("saved"))


def examine(saved, damages, scratch):
    return {damage: script.examine(saved, damage, scratch) for damage in damages}


def test_damaged_files(saved, tmp_path):
    """Every file once, every kind in turn; the long form does all."""
    every = file_damages(saved.directory)
    found = examine(saved, every[:: len(FILE_KINDS) - 1], tmp_path)
    assert {damage.path for damage in found} == set(files_of_newest(saved.directory))
    assert {damage.kind for damage in found} == set(FILE_KINDS)
    assert {verdict for verdict, _ in found.values()} == {HARMLESS, FELL_BACK}


def test_flipped_bytes(saved, tmp_path):
    found = examine(saved, flips(saved.directory, 20, seed=1), tmp_path)
    assert {damage.path for damage in found} == set(files_of_newest(saved.directory))
    assert {verdict for verdict, _ in found.values()} == {HARMLESS, FELL_BACK}


EXPECTED = {
    "all damaged": REFUSED,
    **dict.fromkeys(
        (
            *("a copy with a leading zero", "a copy with a word", "a copy under the next number"),
            *("a half-written next one", "an empty next one", "a file as the next one"),
            *("one file in the next one", "an extra file in it", "an extra file in its state"),
            *("an extra file among its arrays", "an extra file in its record"),
            *("an extra file beside it", "an extra directory beside it"),
        ),
        HARMLESS,
    ),
}


@pytest.mark.parametrize("kind", PLACE_KINDS)
def test_damaged_places(saved, tmp_path, kind):
    verdict, reason = script.examine(saved, Damage(kind), tmp_path)
    assert verdict == EXPECTED.get(kind, FELL_BACK), reason


def test_flips_are_spread_over_files_and_bytes(saved):
    found = flips(saved.directory, 200, seed=0)
    assert len(set(found)) == len(found) >= 200
    sizes = {
        path: (saved.directory / path).stat().st_size for path in files_of_newest(saved.directory)
    }
    for path, size in sizes.items():
        offsets = [damage.offset for damage in found if damage.path == path]
        assert len(offsets) >= min(size, 100 // len(sizes))
        assert max(offsets) < size
        assert min(offsets) < size / 4
        assert max(offsets) >= size * 3 / 4
    small = {path for path, size in sizes.items() if size <= 100}
    every = flips(saved.directory, 1, seed=0, every_byte_up_to=100)
    for path in small:
        assert sorted(d.offset for d in every if d.path == path) == list(range(sizes[path]))


def flip_the_largest(saved):
    path = max(
        (path for path in files_of_newest(saved.directory) if "/state/ocdbt.process_0/d/" in path),
        key=lambda path: (saved.directory / path).stat().st_size,
    )
    return Damage("flipped", path, (saved.directory / path).stat().st_size // 2, 1)


class TestWhatAnUnsafeRestoreIsCalled:
    """The examination sees what it is there for: checks are taken out of the restore."""

    def test_without_the_digest(self, saved, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "digest", lambda _: "the same for all")
        own = script.made(tmp_path / "own")
        verdict, _ = script.examine(own, flip_the_largest(own), tmp_path)
        assert verdict == SILENT

    def test_without_the_warning(self, saved, tmp_path, monkeypatch):
        monkeypatch.setattr(module._LOGGER, "warning", lambda *_: None)
        verdict, _ = script.examine(saved, flip_the_largest(saved), tmp_path)
        assert verdict == UNNAMED

    def test_without_the_one_before(self, saved, tmp_path, monkeypatch):
        steps = module.Checkpoints._steps
        monkeypatch.setattr(module.Checkpoints, "_steps", lambda self: steps(self)[::2])
        verdict, reason = script.examine(saved, flip_the_largest(saved), tmp_path)
        assert (verdict, "[9, 10] are whole" in reason) == (LOST, True)

    def test_with_an_error_of_another_kind(self, saved, tmp_path, monkeypatch):
        def broken(*_):
            raise OSError("no such luck")

        monkeypatch.setattr(module.Checkpoints, "_put_aside", broken)
        verdict, reason = script.examine(saved, flip_the_largest(saved), tmp_path)
        assert (verdict, reason) == (CRASHED, "OSError: no such luck")


def test_a_process_that_dies_is_told_and_replaced(saved, tmp_path):
    examiner = script.Examiner(saved, tmp_path)
    try:
        assert examiner(Damage("no such kind", "no such file"))[0] == CRASHED
        assert examiner(Damage("an extra file in it"))[0] == HARMLESS
    finally:
        examiner.close()


def test_the_table_counts_and_keeps_what_went_wrong(capsys):
    tally = script.Tally()
    tally.add("made", Damage("no state"), FELL_BACK, "")
    tally.add("made", Damage("no record"), HARMLESS, "")
    tally.add("made", Damage("flipped", "3/file", 2, 8), SILENT, "restored as 3")
    assert tally.failures == ["made: flipped 3/file [2] ^ 0x08: SILENT CHANGE: restored as 3"]
    assert [line.split() for line in tally.table()[1:]] == [
        ["made", "at", "a", "changed", "place", "2", "1", "1", "0", "0"],
        ["made", "flipped", "1", "0", "0", "0", "1"],
    ]
    assert (tally.total(SILENT), tally.total(SILENT, kind="halved")) == (1, 0)


def test_no_damage_is_none(saved, tmp_path):
    with pytest.raises(AssertionError):
        apply(Damage("flipped", files_of_newest(saved.directory)[0], 0, 0), saved.directory)
