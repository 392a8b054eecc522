"""Checkpoints: what comes back, what damage is noticed, and what is used instead."""

import errno
import logging
import shutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from cpnas_jax.runtime import stall
from cpnas_jax.runtime.checkpoints import Checkpoints
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.packing import digest, packed, unpacked


class Moments(typing.NamedTuple):
    """As optimizer states are."""

    count: np.ndarray
    values: tuple


def tree(seed):
    """Several dtypes in dictionaries, tuples and a named tuple; enough bytes to damage."""
    generator = np.random.default_rng(seed)
    return {
        "params": {"kernel": generator.normal(size=(40, 50)).astype(np.float32)},
        "optimizer": (
            Moments(
                generator.integers(0, 9, 7).astype(np.int32),
                (generator.normal(size=3), np.asarray(generator.normal(), np.float16)),
            ),
            (),
        ),
        "survivors": generator.random((2, 14, 8)) < 0.5,
        "key": generator.integers(0, 2**32, 2, np.uint32),
        "image": generator.integers(0, 256, 5, np.uint8),
    }


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, np.ndarray)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints 1 and 2."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, tree(step), {"position": step, "lines": [{"z": 0.1 + step}]})
    checkpoints.close()
    return tmp_path


def test_what_is_waited_for_is_known(tmp_path, monkeypatch):
    named, wait = [], stall.waiting
    monkeypatch.setattr(stall, "waiting", lambda what: named.append(what) or wait(what))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, tree(1), {})
        checkpoints.wait()
        checkpoints.restore_newest(tree(1))
    assert named == [
        f"checkpoint 7 to be saved in {tmp_path}",
        f"the last save in {tmp_path}",
        f"a checkpoint to be read from {tmp_path}",
        f"the last save in {tmp_path}",
    ]


def test_the_last_good_one_is_named(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.last_good({}) == "no checkpoint was written yet"
        for step in (3, 5):
            checkpoints.save(step, tree(step), {})
        told = f"the last good checkpoint is {tmp_path / '5'}"
        assert checkpoints.last_good({3: "early"}) == told
        assert checkpoints.last_good({3: "early", 5: "after epoch 5"}) == f"{told}, after epoch 5"


def restore(directory, like=None):
    checkpoints = Checkpoints(directory, keep=2)
    try:
        return checkpoints.restore_newest(tree(0) if like is None else like)
    finally:
        checkpoints.close()


def data_files(directory):
    """Files that hold arrays, the largest first."""
    files = [path for path in directory.rglob("*") if path.is_file() and "/d/" in str(path)]
    assert files
    return sorted(files, key=lambda path: -path.stat().st_size)


def test_what_was_saved_comes_back_bitwise(saved):
    found = restore(saved)
    assert found.step == 2
    assert found.record == {"position": 2, "lines": [{"z": 2.1}]}
    assert_same(found.state, tree(2))
    assert isinstance(found.state["optimizer"][0], Moments)


def test_an_empty_directory_has_none(tmp_path):
    assert restore(tmp_path / "new") is None


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_what_is_saved_may_change_at_once(tmp_path):
    """Training goes on while the file is written."""
    state = tree(1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    state["params"]["kernel"][:] = 0
    state["survivors"][:] = False
    checkpoints.close()
    assert_same(restore(tmp_path).state, tree(1))


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, empty])
def test_a_damaged_newest_is_passed_over_and_named(saved, damage, caplog):
    damage(data_files(saved / "2")[0])
    with caplog.at_level(logging.WARNING):
        found = restore(saved)
    assert found.step == 1
    assert found.record["position"] == 1
    assert_same(found.state, tree(1))
    messages = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert len(messages) == 1
    assert str(saved / "2") in messages[0]


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, empty])
@pytest.mark.parametrize("part", ["state", "record"])
def test_a_damaged_newest_is_an_error_where_no_other_will_do(saved, damage, part):
    files = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    own = [path for path in files if path.is_relative_to(saved / "2" / part)]
    damaged = max(own, key=lambda path: len(files[path]))
    damage(damaged)
    files[damaged] = damaged.read_bytes()
    with Checkpoints(saved, keep=2) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore_only_newest(tree(0), None, "do this")
    text = str(caught.value)
    assert text.startswith(f"the checkpoint {saved / '2'} is damaged (")
    assert text.endswith("); do this")
    assert "\n" not in text
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == files


def test_only_the_newest_is_read(saved):
    with Checkpoints(saved, keep=2) as checkpoints:
        assert_same(checkpoints.restore_only_newest(tree(0), None, "").state, tree(2))
    with Checkpoints(saved / "new", keep=2) as checkpoints:
        assert checkpoints.restore_only_newest(tree(0), None, "") is None


def test_a_damaged_number_is_saved_again(saved):
    truncate(data_files(saved / "2")[0])
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.restore_newest(tree(0)).step == 1
    checkpoints.save(2, tree(7), {"position": 2})
    checkpoints.close()
    found = restore(saved)
    assert found.step == 2
    assert_same(found.state, tree(7))
    assert [path.name.split("-")[1] for path in saved.glob("damaged-*")] == ["2"]


def test_a_number_below_the_newest_is_not_silently_left_out(saved):
    with Checkpoints(saved, keep=2) as checkpoints, pytest.raises(ValueError, match="step 1"):
        checkpoints.save(1, tree(1), {})


def test_arrays_of_another_number_are_noticed_by_the_digest(saved, caplog):
    """Files of a whole checkpoint in the place of another's: every file is valid by itself."""
    for path in sorted((saved / "1" / "state").rglob("*"), reverse=True):
        if path.is_file():
            (saved / "2" / path.relative_to(saved / "1")).unlink(missing_ok=True)
    for path in (saved / "2" / "state").rglob("*"):
        if path.is_file():
            path.unlink()
    for path in (saved / "1" / "state").rglob("*"):
        if path.is_file():
            target = saved / "2" / path.relative_to(saved / "1")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert restore(saved).step == 1
    assert "digest" in caplog.text


def test_a_damaged_record_is_noticed(saved):
    record = next(path for path in (saved / "2" / "record").rglob("*") if path.is_file())
    truncate(record)
    assert restore(saved).step == 1


def test_a_valid_record_of_other_content_is_noticed(saved):
    path = next(path for path in (saved / "2" / "record").rglob("*") if path.is_file())
    text = path.read_text()
    assert "2.1" in text
    path.write_text(text.replace("2.1", "2.2"))
    assert restore(saved).step == 1


def test_a_directory_that_cannot_be_changed_does_not_make_whole_ones_damaged(saved, monkeypatch):
    truncate(data_files(saved / "2")[0])

    def refuse(self, _):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(epath.Path(saved).__class__, "rename", refuse)
    with pytest.raises(OSError, match=r"Read-only file system.*/2'"):
        restore(saved)
    monkeypatch.undo()
    assert restore(saved).step == 1


def rename_up(directory):
    (directory / "2").rename(directory / "7")


def copy_up(directory):
    shutil.copytree(directory / "2", directory / "7")


@pytest.mark.parametrize(("move", "step"), [(rename_up, 1), (copy_up, 2)])
def test_a_whole_checkpoint_under_another_number_is_passed_over(saved, move, step, caplog):
    """Its record would say another position than its number, and nothing could be saved next."""
    move(saved)
    with caplog.at_level(logging.WARNING):
        found = restore(saved)
    assert found.step == found.record["position"] == step
    assert_same(found.state, tree(step))
    assert f"{saved / '7'} is damaged and passed over: it was not saved under" in caplog.text


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "checkpoints", keep=1)


def test_none_readable_is_an_error_in_one_line(saved):
    for step in ("1", "2"):
        truncate(data_files(saved / step)[0])
    with pytest.raises(UserError) as caught:
        restore(saved)
    text = str(caught.value)
    assert str(saved) in text
    assert "delete the directory to start again" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "kernel", [np.zeros((50, 40), np.float32), np.zeros((40, 50), np.int32)], ids=["shape", "dtype"]
)
def test_another_shape_or_dtype_is_not_taken(saved, kernel):
    like = tree(0)
    like["params"]["kernel"] = kernel
    with pytest.raises(UserError, match=r"no checkpoint.*other dtypes or shapes"):
        restore(saved, like)


def test_leaves_are_stored_as_one_vector_for_each_dtype():
    leaves = [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(4, dtype=np.uint32)[::2],
        np.float32(7),
        np.zeros((0, 5), np.float32),
        np.asarray([1, 2], jnp.bfloat16),
    ]
    vectors = packed(leaves)
    assert {name: vector.tolist() for name, vector in vectors.items()} == {
        "float32": [0, 1, 2, 3, 4, 5, 7],
        "uint32": [0, 2],
        "bfloat16": [1, 2],
    }
    for again, leaf in zip(unpacked(vectors, leaves), leaves, strict=True):
        assert (again.dtype, again.shape) == (leaf.dtype, leaf.shape)
        np.testing.assert_array_equal(again, leaf)


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)


def test_the_digest_sees_values_names_shapes_and_dtypes():
    states = [
        {"a": np.zeros(4, np.float32)},
        {"a": np.zeros(4, np.int32)},
        {"a": np.zeros((2, 2), np.float32)},
        {"b": np.zeros(4, np.float32)},
        {"a": np.asarray([0, 0, 0, -0.0], np.float32)},
        {"a": np.zeros(4, np.float32), "b": np.zeros(0, np.float32)},
    ]
    assert len({digest(state) for state in states}) == len(states)
    assert digest(states[0]) == digest({"a": np.zeros(8, np.float32)[::2]})
