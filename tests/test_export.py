"""The modes `export` and `predict`, from the command line, after the smallest training."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import stand_in
from PIL import Image
from small_training import GENOTYPE, Command, refusal

from cpnas_jax import export
from cpnas_jax.deploy import artefact
from cpnas_jax.export import Agreement
from cpnas_jax.predict import image_files, open_engine, read_image
from cpnas_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    stand_in.prepare(stand_in.Cifar10, files / "data")
    GENOTYPE.save(files / "cells.json")
    return files


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def exported(patched, files, tmp_path_factory):
    """A workdir of a training that was exported."""
    workdir = tmp_path_factory.mktemp("run")
    command = Command(patched, files)
    assert command("train", workdir, "--config.train.epochs=1") == 0
    assert command("export", workdir, "--config.train.epochs=1") == 0
    return workdir


@pytest.fixture
def command(monkeypatch, files):
    own = Command(monkeypatch, files)
    return lambda mode, workdir, *more: own(mode, workdir, "--config.train.epochs=1", *more)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, mode, size in (
        ("b.png", "RGB", (40, 30)),
        ("a.JPG", "L", (8, 8)),
        ("c.gif", "P", (9, 20)),
    ):
        pixels = rng.integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
        with (folder / name).open("wb") as file:
            Image.fromarray(pixels).convert(mode).save(
                file, {"JPG": "JPEG"}.get(name[2:], name[2:])
            )
    (folder / "notes.txt").write_text("no image")
    return folder


def test_what_is_exported_answers_as_it_was_evaluated(command, exported):
    network = artefact.open_program(exported / "export")
    assert network.self_check() == 0
    found = json.loads((exported / "train/export.json").read_text())
    assert found["close"] == 1
    assert found["turned"] == 0
    assert found["bytes"] == (exported / "export" / artefact.MODEL).stat().st_size
    assert command("evaluate", exported) == 0
    evaluated = json.loads((exported / "train/evaluation.json").read_text())
    assert found["shipped"] == pytest.approx(evaluated["top1"])
    assert found["images"] == evaluated["examples"]
    assert network.shipped.classes == tuple(evaluated["class_names"])
    stored = json.loads((exported / "export" / artefact.GENOTYPE).read_text())
    assert stored == network.shipped.genotype == json.loads(GENOTYPE.to_json())


def test_images_are_classified(command, exported, photos, capsys):
    capsys.readouterr()
    images = f"--config.predict.images={photos},{photos / 'b.png'}"
    assert command("predict", exported, images, "--config.predict.format=json") == 0
    answers = json.loads(capsys.readouterr().out)
    names = [answer["image"] for answer in answers]
    assert names == [str(photos / name) for name in ("a.JPG", "b.png", "c.gif", "b.png")]
    assert answers[1] == answers[3]
    classes = artefact.read(exported / "export").classes
    for answer in answers:
        own = [found["probability"] for found in answer["classes"]]
        assert len(own) == 5
        assert own == sorted(own, reverse=True)
        assert {found["name"] for found in answer["classes"]} <= set(classes)
    assert command("predict", exported, images, "--config.predict.top=1") == 0
    lines = capsys.readouterr().out.splitlines()
    first = answers[0]["classes"][0]
    assert lines[:2] == [str(photos / "a.JPG"), f"  {first['probability']:.3f}  {first['name']}"]
    assert len(lines) == 2 * 4
    # All classes: probabilities.
    assert (
        command(
            "predict",
            exported,
            images,
            "--config.predict.top=99",
            "--config.predict.format=json",
            "--config.predict.batch_size=3",
        )
        == 0
    )
    (whole, *_) = json.loads(capsys.readouterr().out)
    assert sum(found["probability"] for found in whole["classes"]) == pytest.approx(1)


@pytest.mark.parametrize(
    "change",
    [
        {"form": "whole"},
        {"height": 9},
        {"share": 0.9},
        {"form": "central part"},
        {"form": "central part", "share": 2},
        {"form": None},
        {"form": ["central square"]},
        {"form": "central part", "share": "7/8"},
    ],
)
def test_an_unknown_preprocessing_is_told_before_any_image(exported, monkeypatch, change):
    directory = exported / "export"
    shipped = artefact.read(directory)
    form = {**shipped.preprocessing, **change}
    program = dataclasses.replace(
        artefact.open_program(directory), shipped=dataclasses.replace(shipped, preprocessing=form)
    )
    monkeypatch.setattr(artefact, "open_program", lambda _: program)
    with pytest.raises(UserError, match=r"export has preprocessing \{.*use the one that wrote it"):
        open_engine(directory, "xla")


def test_alpha_that_hides_nothing_changes_nothing(exported, tmp_path):
    form = artefact.read(exported / "export").preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "plain.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(
        *(read_image(tmp_path / name, form) for name in ("plain.png", "alpha.png"))
    )


def test_names_of_images(tmp_path):
    for name in ("a,b.png", "c.png", "._c.png", "text"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = image_files(str(tmp_path))
    assert [path.name for path in found] == ["a,b.png", "c.png"]
    assert image_files(f"{tmp_path / 'a,b.png'}") == found[:1]
    assert image_files(f"{tmp_path / 'c.png'}, {tmp_path / 'text'}")[1].name == "text"


def test_an_image_of_the_set_is_seen_as_in_evaluation(exported, tmp_path):
    """A stored image that is read from a file is the array that evaluation had."""
    network = artefact.open_program(exported / "export")
    Image.fromarray(network.images[0]).save(tmp_path / "it.png")
    found = read_image(tmp_path / "it.png", network.shipped.preprocessing)
    np.testing.assert_array_equal(found, network.images[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_photo_is_turned_as_its_camera_was(exported, tmp_path, orientation, mode):
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 255, (2, 3, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    seen = Image.fromarray(pixels).convert(mode)
    # How a camera stores what is to be seen so: the opposite of what a viewer does.
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = seen
    for turn in turns.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "it.tif", exif=exif)
    seen.save(tmp_path / "plain.tif")
    form = artefact.read(exported / "export").preprocessing
    np.testing.assert_array_equal(
        read_image(tmp_path / "it.tif", form), read_image(tmp_path / "plain.tif", form)
    )


def test_export_says_what_is_wrong(command, capsys, exported, tmp_path):
    line = refusal(command, capsys, "export", exported)
    assert f"{exported / 'export'} exists; delete it, or give another" in line
    line = refusal(command, capsys, "export", tmp_path / "new")
    assert "run the same command with the mode `train` first" in line
    line = refusal(command, capsys, "export", exported, "--config.export.directory=gs://bucket/it")
    assert "an exported network is in a local directory" in line
    (tmp_path / "file").write_text("")
    line = refusal(
        command, capsys, "export", exported, f"--config.export.directory={tmp_path / 'file/it'}"
    )
    assert "cannot be written" in line


def test_a_missing_iree_is_told_before_anything_is_done(command, capsys, exported, monkeypatch):
    for part in ("compiler", "runtime"):
        monkeypatch.setitem(sys.modules, f"iree.{part}", None)
    target = exported / "other"
    line = refusal(
        *(command, capsys, "export", exported, f"--config.export.directory={target}"),
        "--config.export.iree=('host',)",
    )
    assert "config.export.iree is ('host',), and the package iree-base-compiler is missing" in line
    assert not target.exists()
    line = refusal(command, capsys, "export", exported, "--config.export.iree=('riscv',)")
    assert "different names of host, aarch64" in line


def test_a_network_that_answers_otherwise_is_not_written(
    command, capsys, exported, tmp_path, monkeypatch
):
    fold = export.fold

    def wrong(*arguments):
        structure, tensors = fold(*arguments)
        tensors["logits"]["bias"] = tensors["logits"]["bias"] + np.arange(10, dtype=np.float32)
        return structure, tensors

    monkeypatch.setattr(export, "fold", wrong)
    target = tmp_path / "wrong"
    line = refusal(command, capsys, "export", exported, f"--config.export.directory={target}")
    assert f"nothing was written to {target}: " in line
    assert list(tmp_path.iterdir()) == []


def test_predict_says_what_is_wrong(command, capsys, exported, photos, tmp_path):
    def line(*arguments, workdir=exported):
        return refusal(command, capsys, "predict", workdir, *arguments)

    assert "config.predict.images is empty; give image files" in line()
    assert f"there is no {tmp_path / 'none'}" in line(
        f"--config.predict.images={tmp_path / 'none'}"
    )
    (tmp_path / "empty").mkdir()
    assert "has no image (.bmp" in line(f"--config.predict.images={tmp_path / 'empty'}")
    text = photos / "notes.txt"
    assert f"{text} is no image that can be read" in line(f"--config.predict.images={text}")
    encoded = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(encoded[: len(encoded) // 2])
    assert "b.png is no image that can be read" in line(f"--config.predict.images={photos}")
    assert "config.predict.images is ','; give image files" in line("--config.predict.images=,")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    deep = line(f"--config.predict.images={tmp_path / 'deep.png'}")
    assert "more than 8 bits; convert it" in deep
    for mode, see_through in (("RGBA", (0, 0, 0, 0)), ("LA", (255, 254))):
        Image.new(mode, (9, 9), see_through).save(tmp_path / "glass.png")
        glass = line(f"--config.predict.images={tmp_path / 'glass.png'}")
        assert "glass.png is no image that can be read (parts of it are transparent; put" in glass
    absent = line(f"--config.predict.images={photos}", workdir=tmp_path / "other")
    assert "has no model.safetensors" in absent
    assert "the mode `export` writes one" in absent
    ahead = line(f"--config.predict.images={photos}", "--config.predict.engine=iree")
    assert "has no model.host.vmfb" in ahead
    assert "export it with --config.export.iree=" in ahead


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"close": 0.9985}, "only 99.85% of the images agree"),
        ({"turned": 2}, "2 of 1000 images are answered otherwise"),
        ({"shipped": 0.501}, "the accuracy is 0.5010, that of training 0.5000"),
    ],
)
def test_what_does_not_agree_is_told(changes, words):
    found = Agreement(
        **{
            **{"images": 1000, "close": 0.9995, "largest": 0.1, "turned": 0},
            **{"trained": 0.5, "shipped": 0.5004},
            **changes,
        }
    )
    problem = found.problem()
    assert (problem is None) if words is None else (words in problem)
