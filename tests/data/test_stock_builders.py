"""The builders of tfds itself prepare from archives in the original layouts, and we read that."""

import importlib.util
import io
import json
import re
import subprocess
import sys

import archives
import numpy as np
import pytest
from PIL import Image

from cpnas_jax.data import datasets, stream
from cpnas_jax.runtime.errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason='the builders of tfds need TensorFlow: pip install -e ".[prepare]"',
)

# Run apart, for TensorFlow's sake: it takes long to import, logs, and warns. The archives are not
# the originals, so the registry of tfds is told their checksums; nothing can be downloaded.
SCRIPT = """
import contextlib, io, json, pathlib, socket, sys

def refuse(*arguments, **keywords):
    raise OSError("the test has no network")

socket.socket.connect = socket.getaddrinfo = refuse

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums
from cpnas_jax.data import prepare

results = []
for known, arguments in json.loads(sys.argv[1]):
    if known:
        urls = tfds.builder_cls(arguments[0]).url_infos
        for url, info in urls.items():
            path = pathlib.Path(known, info.filename)
            urls[url] = checksums.compute_url_info(path)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = prepare.main(arguments)
    results.append([status, errors.getvalue().strip().splitlines()[-1:]])
print(json.dumps(results))
"""


def prepare_in_turn(*calls):
    """Run `prepare` for each (directory of registered archives or None, arguments)."""
    calls = [(known and str(known), [str(word) for word in words]) for known, words in calls]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def arguments_of_the_advice(name, data_dir, manual_dir):
    """Return the arguments of the command that the error of a missing set gives."""
    with pytest.raises(UserError) as error:
        stream.open_stream(name, "train", data_dir, 16)
    words = re.search(r"python -m cpnas_jax\.data\.prepare ([^;(]*)", str(error.value))[1].split()
    words = [word for word in words if not word.startswith("--manual_dir")]
    return [*words, f"--manual_dir={manual_dir}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directory of the prepared sets, and what the archives hold by set."""
    data_dir, manual = tmp_path_factory.mktemp("sets"), tmp_path_factory.mktemp("archives")
    contents = {
        "cifar10": archives.write_cifar10(manual),
        "cifar100": archives.write_cifar100(manual),
        "imagenet2012": archives.write_imagenet(manual),
    }
    results = prepare_in_turn(
        *(
            (
                manual if name.startswith("cifar") else None,
                arguments_of_the_advice(name, data_dir, manual),
            )
            for name in contents
        )
    )
    assert [status for status, _ in results] == [0, 0, 0], results
    return data_dir, contents


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar(made, name, classes, split):
    data_dir, contents = made
    images, labels = (part[split] for part in contents[name])
    loaded = datasets.load_split(name, split, data_dir)
    assert (loaded.num_classes, loaded.images.dtype) == (classes, np.uint8)
    found = {i.tobytes(): n for i, n in zip(loaded.images, loaded.labels, strict=True)}
    assert len(found) == len(labels)
    assert found == {i.tobytes(): n for i, n in zip(images, labels, strict=True)}
    expected = {"cifar10": archives.CIFAR10_NAMES[:2], "cifar100": ("fine_00", "fine_01")}
    assert loaded.class_names[:2] == expected[name]


def central(encoded, size):
    """Return the central square of an image, resized."""
    with Image.open(io.BytesIO(encoded)) as image:
        side = min(image.size)
        left, top = ((extent - side) // 2 for extent in image.size)
        return np.asarray(
            image.convert("RGB").resize(
                (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
            )
        )


# Classes of the synsets, and of the first five validation images, in every list of ImageNet's.
TRAIN_CLASSES = {"n01440764": 0, "n02105855": 230, "n07583066": 924, "n15075141": 999}
VALIDATION_CLASSES = [65, 970, 230, 809, 516]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_imagenet(made, split):
    data_dir, contents = made
    files = contents["imagenet2012"][split]
    if split == "train":
        labels = [TRAIN_CLASSES[name.partition("_")[0]] for name in files]
    else:
        labels = VALIDATION_CLASSES
    expected = {
        central(encoded, 16).tobytes(): label
        for encoded, label in zip(files.values(), labels, strict=True)
    }
    opened = stream.open_stream("imagenet2012", split, data_dir, 16)
    assert (opened.num_examples, opened.num_classes) == (len(files), 1000)
    assert opened.class_names[230] == "n02105855"
    found = {}
    for images, batch_labels, mask in opened.evaluation_batches(
        batch_size=4, process_index=0, process_count=1, central=1.0
    ):
        for image, label, counts in zip(images, batch_labels, mask, strict=True):
            if counts:
                found[image.tobytes()] = int(label)
    assert found == expected
    (batch,) = opened.training_batches(
        seed=0, epoch=0, first_step=0, batch_size=5, process_index=0, process_count=1
    )
    assert set(batch[1].tolist()) <= set(labels)
    assert len(datasets.load_split("imagenet2012", split, data_dir, 8).labels) == len(files)


def test_what_cannot_be_prepared_is_one_line(tmp_path):
    archives.write_cifar10(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    place = f"--data_dir={tmp_path / 'sets'}"
    results = prepare_in_turn(
        (None, ["cifar10", place, f"--manual_dir={tmp_path}"]),
        (None, ["imagenet2012", place, f"--manual_dir={empty}"]),
    )
    assert [status for status, _ in results] == [1, 1]
    (checksum,), (by_hand,) = (lines for _, lines in results)
    assert checksum.startswith("error: cifar10 cannot be prepared")
    assert "wrong checksum" in checksum
    assert "--manual_dir: cifar-10-binary.tar.gz" in checksum
    assert by_hand.startswith("error: imagenet2012 cannot be prepared")
    assert str(empty) in by_hand
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar" in by_hand
