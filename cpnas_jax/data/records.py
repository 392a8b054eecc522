"""Prepared tfds directories: finding one, opening it, reading its splits.

Everything here works on files that are already there. The registered builder classes of tfds are
never touched, because constructing one asks a bucket on the network for its metadata; a builder
made from the directory alone does not. TensorFlow is not needed, so the files must be array_record.

tfds takes half a second to import and is therefore imported inside the functions that use it.
"""

import dataclasses
import functools
import os
import resource
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.paths import user_path

# Records fetched in one call: enough to amortise the call, few enough to keep the peak memory low.
_READ_BATCH = 4096

# Files that a process has open for other ends: libraries, checkpoints, sockets.
_OTHER_FILES = 1024


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """A prepared data set whose metadata has been read and whose features suit classification.

    Attributes:
        directory: the version directory, `<data_dir>/<name>/<version>`.
        builder: the read-only tfds builder over that directory.
        image_key: name of the image feature.
        label_key: name of the class label feature.
        image_shape: (height, width, channels); None where the feature leaves an extent open.
        class_names: one name a class, in the order of the labels.
        splits: names of the stored splits.
    """

    directory: epath.Path
    builder: Any
    image_key: str
    label_key: str
    image_shape: tuple[int | None, int | None, int | None]
    class_names: tuple[str, ...]
    splits: tuple[str, ...]


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> epath.Path:
    """Return `data_dir`, or tfds's own default where it is None or empty.

    tfds reads TFDS_DATA_DIR once, at its import; here the variable is read at each call.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return user_path("config.dataset.data_dir", chosen)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def damaged(directory: os.PathLike[str] | str, reason: str) -> UserError:
    """Return the error for a data set directory whose files cannot be used as they are."""
    return UserError(
        f"the data set in {os.fspath(directory)} is damaged or incomplete ({reason}); "
        "delete that directory and prepare the data set again"
    )


def open_prepared(name: str, data_dir: str | os.PathLike[str] | None) -> PreparedSet:
    """Open the newest prepared version of a data set, reading nothing but its metadata.

    Args:
        name: name of the data set; `name/config` for a set with configurations.
        data_dir: where tfds keeps prepared sets; None for its default.

    Returns:
        The opened set.

    Raises:
        UserError: the set is not prepared there, not as array_record, damaged, or has no image of
            uint8 with a class label.
    """
    root = resolve_data_dir(data_dir)
    directory = _newest_version(name, root)
    if directory is None:
        raise UserError(_not_prepared(name, root))
    builder = _open_builder(name, root, directory)
    image_key, label_key = _supervised_keys(name, builder)
    image_shape = builder.info.features[image_key].shape
    return PreparedSet(
        directory=directory,
        builder=builder,
        image_key=image_key,
        label_key=label_key,
        image_shape=(image_shape[0], image_shape[1], image_shape[2]),
        class_names=tuple(builder.info.features[label_key].names),
        splits=tuple(sorted(builder.info.splits)),
    )


def open_split(prepared: PreparedSet, split: str) -> Any:
    """Open the records of one split for random access; no file is opened before it is read.

    Args:
        prepared: the opened set.
        split: name of the split.

    Returns:
        A sequence of serialised examples in stored order: `len`, `[index]`, and `__getitems__` for
        several at once. Threads may share it, and it can be pickled.

    Raises:
        UserError: no such split, or an empty one.
    """
    from array_record.python import array_record_data_source

    require_split(prepared, split)
    try:
        files = prepared.builder.info.splits[split].file_instructions
        allow_open_files(len(files))
        # Of array_record and not of tfds, whose own drags the builder along when it is pickled.
        source = array_record_data_source.ArrayRecordDataSource(files)
    except UserError:
        raise
    except Exception as error:
        raise damaged(prepared.directory, one_line(error)) from error
    if not len(source):
        raise damaged(prepared.directory, f"split {split!r} holds no example")
    return source


def require_split(prepared: PreparedSet, split: str) -> None:
    """See that a set has a split.

    Raises:
        UserError: it has not.
    """
    if split not in prepared.splits:
        raise UserError(
            f"the data set in {prepared.directory} has no split {split!r}; "
            f"it has {', '.join(prepared.splits)}"
        )


def split_files(prepared: PreparedSet, split: str) -> tuple[tuple[str, int, int], ...]:
    """Return (name, records left out at the start, records used) of each file of a split.

    Raises:
        UserError: no such split.
    """
    require_split(prepared, split)
    files = prepared.builder.info.splits[split].file_instructions
    return tuple((Path(file.filename).name, file.skip, file.take) for file in files)


def allow_open_files(files: int) -> None:
    """Raise the process's limit of open files, so that so many can be open beside the others.

    A reader keeps every file open that it has read from; ImageNet has 1,024 of them, which is the
    usual limit. Worker processes inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"the data set has {files} files, and this process may open only {hard}; "
            f"start it after `ulimit -n {wanted}`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def parse_example(record: bytes, image_key: str, label_key: str) -> tuple[bytes, int]:
    """Return the encoded image and the label of a serialised example.

    Raises:
        Exception: it is damaged; protobuf has its own ways of saying so.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(record).features.feature
    return feature[image_key].bytes_list.value[0], feature[label_key].int64_list.value[0]


def no_class(
    directory: os.PathLike[str] | str, split: str, num_classes: int, label: int
) -> UserError:
    """Return the error for a split with a label that is no class."""
    what = "it is unlabelled" if label == -1 else f"{label}, for one; prepare the set anew"
    return UserError(
        f"split {split!r} in {os.fspath(directory)} has labels outside 0..{num_classes - 1}: "
        f"{what}; it cannot be used"
    )


def read_examples(
    prepared: PreparedSet, split: str, failed: Callable[[int, str], None]
) -> tuple[list[bytes], list[int], list[int]]:
    """Read the encoded images and the labels of one split; no other split's file is opened.

    Args:
        prepared: the opened set.
        split: name of the split.
        failed: called with the number of an example that cannot be read, and why; it is left out.

    Returns:
        The encoded images, the class labels and the examples' numbers, in stored order.

    Raises:
        UserError: no such split, an empty one, or unlabelled examples.
    """
    source = open_split(prepared, split)
    images: list[bytes] = []
    labels: list[int] = []
    rows: list[int] = []
    for start in range(0, len(source), _READ_BATCH):
        keys = range(start, min(start + _READ_BATCH, len(source)))
        for row, record in zip(keys, _records(source, keys), strict=True):
            try:
                if isinstance(record, Exception):
                    raise record
                image, label = parse_example(record, prepared.image_key, prepared.label_key)
            except MemoryError:
                raise
            # array_record, protobuf and tfds each have their own ways of failing.
            except Exception as error:
                failed(row, one_line(error))
                continue
            images.append(image)
            labels.append(label)
            rows.append(row)
    for label in (min(labels, default=0), max(labels, default=0)):
        if not 0 <= label < len(prepared.class_names):
            raise no_class(prepared.directory, split, len(prepared.class_names), label)
    return images, labels, rows


def _records(source: Any, keys: Sequence[int]) -> Iterable[bytes | Exception]:
    """Return records at once, or where one cannot be read, one by one with the errors of those."""
    try:
        return source.__getitems__(keys)
    except MemoryError:
        raise
    except Exception:
        return map(functools.partial(_record, source), keys)


def _record(source: Any, key: int) -> bytes | Exception:
    try:
        return source[key]
    except Exception as error:
        return error


def _newest_version(name: str, root: epath.Path) -> epath.Path | None:
    """Return the directory of the highest version of `name` under `root`, None if there is none."""
    import tensorflow_datasets as tfds

    versions = []
    for entry in _entries(root / name):
        if tfds.core.Version.is_valid(entry.name) and entry.is_dir():
            versions.append((tfds.core.Version(entry.name), entry))
    return max(versions, key=lambda pair: pair[0])[1] if versions else None


def _entries(directory: epath.Path) -> Sequence[epath.Path]:
    """Return the entries of a directory, none where it does not exist or cannot be read."""
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _not_prepared(name: str, root: epath.Path) -> str:
    """Return what to tell a user whose data set was not found, with the command that makes it."""
    present = [
        entry.name
        for entry in _entries(root)
        if any(child.is_dir() and child.name[:1].isdigit() for child in _entries(entry))
    ]
    there = f"prepared there: {', '.join(present)}" if present else "nothing is prepared there"
    configs = [
        entry.name
        for entry in _entries(root / name)
        if entry.is_dir() and not entry.name.startswith("incomplete.")
    ]
    if configs:
        there = f"its configurations there: {', '.join(f'{name}/{config}' for config in configs)}"
    return (
        f"config.dataset.name={name} is not prepared under {root} ({there}); to prepare it: "
        f"{_prepare_command(name, root)}; "
        "for another place set config.dataset.data_dir or TFDS_DATA_DIR"
    )


def _prepare_command(name: str, root: epath.Path, flags: str = "") -> str:
    """Return the command that prepares a set in a place, with all that it needs."""
    place = shlex.quote(os.fspath(root))
    command = f"python -m cpnas_jax.data.prepare {shlex.quote(name)} --data_dir={place}{flags}"
    by_hand = manual_instructions(name)
    if by_hand:
        command += f" --manual_dir=DIR (with DIR what has to be downloaded by hand: {by_hand})"
    return f'pip install -e ".[prepare]" && {command}'


def stock_builder_class(name: str) -> Any:
    """Return tfds's own builder class of a set, None if it has none; nothing is constructed."""
    import tensorflow_datasets as tfds

    # A name with a colon is of a community, and would be looked up on the network.
    if ":" in name:
        return None
    try:
        return tfds.builder_cls(name.partition("/")[0])
    # No such set, or its module needs a package that is not there.
    except Exception:
        return None


def manual_instructions(name: str) -> str:
    """Return what tfds says of a set that it cannot download by itself; empty for any other."""
    instructions = getattr(stock_builder_class(name), "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    return " ".join((instructions or "").split()).rstrip(".")


def _open_builder(name: str, root: epath.Path, directory: epath.Path) -> Any:
    """Return the read-only builder of a version directory that holds array_record files."""
    import tensorflow_datasets as tfds

    wanted = tfds.core.FileFormat.ARRAY_RECORD
    try:
        builder = tfds.builder_from_directory(os.fspath(directory))
        stored = builder.info.available_file_formats()
        if wanted in stored and builder.info.file_format != wanted:
            builder = tfds.builder_from_directory(
                os.fspath(directory), file_format=wanted.file_suffix
            )
    except Exception as error:
        raise damaged(directory, one_line(error)) from error
    if wanted not in stored:
        formats = ", ".join(sorted(file_format.value for file_format in stored)) or "no format"
        raise UserError(
            f"{directory} holds {formats}, and array_record is needed; to prepare it again: "
            f"{_prepare_command(name, root, ' --overwrite')}"
        )
    return builder


def _supervised_keys(name: str, builder: Any) -> tuple[str, str]:
    """Return the names of the image and of the label feature.

    The set's own supervised keys decide; `image` and `label` where it has none. CIFAR-100 has two
    label features, and its supervised keys name the one with 100 classes.
    """
    import numpy as np
    import tensorflow_datasets as tfds

    keys = builder.info.supervised_keys
    if not (isinstance(keys, tuple) and len(keys) == 2 and all(isinstance(k, str) for k in keys)):
        keys = ("image", "label")
    stored = builder.info.features
    features = dict(stored.items()) if isinstance(stored, tfds.features.FeaturesDict) else {}
    image, label = (features.get(key) for key in keys)
    if (
        not isinstance(image, tfds.features.Image)
        or not isinstance(label, tfds.features.ClassLabel)
        or image.np_dtype != np.uint8
    ):
        raise UserError(
            f"config.dataset.name={name} is no image classification set: "
            f"{keys[0]!r} must be an image of uint8 and {keys[1]!r} a class label"
        )
    return keys[0], keys[1]
