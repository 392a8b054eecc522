"""Small archives in the layouts of the originals, from which the stock builders of tfds prepare."""

import io
import tarfile
from pathlib import Path

import numpy as np
import photos
import stand_in

CIFAR_TRAIN = 10
CIFAR_TEST = 4
CIFAR10_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# Four synsets of the 1,000, in the order in which the original archive has them.
SYNSETS = ("n01440764", "n02105855", "n07583066", "n15075141")
IMAGENET_TRAIN = 6
IMAGENET_VALIDATION = 5


def _add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _planes(images):
    """Return uint8[n, 3072]: red, green, blue planes, as CIFAR's binary files have them."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_cifar10(directory):
    """Write cifar-10-binary.tar.gz; return images and labels of train and test."""
    images, labels = {}, {}
    with tarfile.open(Path(directory, "cifar-10-binary.tar.gz"), "w:gz") as archive:
        names = "\n".join(CIFAR10_NAMES) + "\n\n"
        _add(archive, "cifar-10-batches-bin/batches.meta.txt", names.encode())
        for split, files in {
            "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
            "test": ["test_batch.bin"],
        }.items():
            count = CIFAR_TRAIN if split == "train" else CIFAR_TEST
            images[split], labels[split] = (part[:count] for part in stand_in.draw(10, split))
            rows = np.concatenate(
                [labels[split][:, None].astype(np.uint8), _planes(images[split])], axis=1
            )
            for name, part in zip(files, np.array_split(rows, len(files)), strict=True):
                _add(archive, f"cifar-10-batches-bin/{name}", part.tobytes())
    return images, labels


def write_cifar100(directory):
    """Write cifar-100-binary.tar.gz; return images and fine labels of train and test."""
    images, labels = {}, {}
    with tarfile.open(Path(directory, "cifar-100-binary.tar.gz"), "w:gz") as archive:
        for kind, count in (("coarse", 20), ("fine", 100)):
            names = "".join(f"{kind}_{number:02d}\n" for number in range(count))
            _add(archive, f"cifar-100-binary/{kind}_label_names.txt", names.encode())
        for split, count in (("train", CIFAR_TRAIN), ("test", CIFAR_TEST)):
            images[split], labels[split] = (part[-count:] for part in stand_in.draw(100, split))
            both = np.stack([labels[split] // 5, labels[split]], axis=1).astype(np.uint8)
            rows = np.concatenate([both, _planes(images[split])], axis=1)
            _add(archive, f"cifar-100-binary/{split}.bin", rows.tobytes())
    return images, labels


def write_imagenet(directory):
    """Write the two ILSVRC2012 archives; return the files of train and validation by name."""
    files = {"train": {}, "validation": {}}
    with tarfile.open(Path(directory, "ILSVRC2012_img_train.tar"), "w") as archive:
        for first, synset in enumerate(SYNSETS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for index in range(first, IMAGENET_TRAIN, len(SYNSETS)):
                    name = f"{synset}_{index + 10}.JPEG"
                    files["train"][name] = stand_in.encode(photos.photo(index), "JPEG").getvalue()
                    _add(images, name, files["train"][name])
            _add(archive, f"{synset}.tar", inner.getvalue())
    with tarfile.open(Path(directory, "ILSVRC2012_img_val.tar"), "w") as archive:
        for index in range(1, IMAGENET_VALIDATION + 1):
            name = f"ILSVRC2012_val_{index:08d}.JPEG"
            files["validation"][name] = stand_in.encode(
                photos.photo(index + 100), "JPEG"
            ).getvalue()
            _add(archive, name, files["validation"][name])
    return files
