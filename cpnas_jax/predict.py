"""The mode `predict`: what an exported network says of image files."""

import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import config_dict
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from scipy import special

from cpnas_jax.data import views
from cpnas_jax.data.decode import MODES, decode_images
from cpnas_jax.deploy import artefact
from cpnas_jax.deploy.artefact import Shipped
from cpnas_jax.deploy.iree_engine import IreeError
from cpnas_jax.deploy.layout import ArtefactError
from cpnas_jax.export import export_directory
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.paths import user_path

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Names of image files end so, in a folder."""


def predict_mode(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Print the classes of the images in `config.predict.images`, likeliest first.

    Args:
        config: validated.
        workdir: whose exported network is asked, unless `config.export.directory` names another.
        reporter: prints the answers.

    Raises:
        UserError: there is no such network, it is damaged, or a file is no image.
    """
    processes.first_alone(lambda: _predict(config, workdir, reporter))


def _predict(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    directory, options = export_directory(config, workdir), config.predict
    # Before the network: reading and compiling it takes longer than a wrong name.
    files = image_files(options.images)
    shipped, network = open_engine(directory, options.engine)
    answers = []
    size = min(options.batch_size, len(files))
    for paths, images in _read(files, shipped.preprocessing, options.batch_size):
        # The last batch is filled up, so that nothing is compiled for it.
        length = size if options.engine == "xla" else len(images)
        filled = np.resize(images, (length, *images.shape[1:]))
        answers += answers_of(network(filled)[: len(paths)], paths, shipped.classes, options.top)
    if options.format == "json":
        reporter.say(json.dumps(answers, indent=1))
        return
    for answer in answers:
        lines = [f"  {own['probability']:.3f}  {own['name']}" for own in answer["classes"]]
        reporter.say("\n".join([answer["image"], *lines]))


def open_engine(
    directory: str | os.PathLike[str], engine: str
) -> tuple[Shipped, Callable[[np.ndarray], np.ndarray]]:
    """Open an exported network with what runs it.

    Args:
        directory: that `export` wrote.
        engine: `xla`, or `iree` where it was exported with `config.export.iree`.

    Returns:
        What is shipped; the function from uint8[n, H, W, C] to f32[n, classes].

    Raises:
        UserError: there is no such network, it is damaged, or the package of the engine is missing.
    """
    network: Callable[[np.ndarray], np.ndarray]
    try:
        if engine == "xla":
            program = artefact.open_program(directory)
            shipped, network = program.shipped, program
        else:
            shipped, network = artefact.read(directory), artefact.open_iree(directory)
        _check_form(directory, shipped)
        return shipped, network
    except IreeError as error:
        raise UserError(f"config.predict.engine is {engine!r}, and {error}") from error
    except ArtefactError as error:
        raise UserError(str(error)) from error


def _check_form(directory: str | os.PathLike[str], shipped: Shipped) -> None:
    """See that the preprocessing is one that `read_image` knows, before it blames an image."""
    form, image = shipped.preprocessing, shipped.structure.image
    fields = {"central part": {"form", "share"}, "central square": {"form"}}
    sides = dict(zip(("height", "width", "channels"), image, strict=True))
    known = fields.get(str(form.get("form", "")))
    if (
        known is None
        or not isinstance(form.get("share", 1), int | float)
        or set(form) != known | set(sides)
        or any(form[name] != size for name, size in sides.items())
        or not 0 < form.get("share", 1) <= 1
        or image[2] not in MODES
    ):
        raise ArtefactError(
            f"{directory} has preprocessing {json.dumps(dict(form))[:200]}, which this cpnas_jax "
            f"does not know for images of {list(image)}; use the one that wrote it"
        )


def image_files(given: str) -> list[pathlib.Path]:
    """Return the files that `config.predict.images` names: files and folders, with commas between.

    Raises:
        UserError: there is none.
    """
    if not given:
        raise UserError(
            "config.predict.images is empty; give image files and folders, with commas between"
        )
    # A name may have commas of its own.
    whole = user_path("config.predict.images", given)
    names = [given] if whole.exists() else filter(None, map(str.strip, given.split(",")))
    files: list[pathlib.Path] = []
    for name in names:
        path = pathlib.Path(user_path("config.predict.images", name))
        if path.is_dir():
            own = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in SUFFIXES
                and file.is_file()
                # Of macOS, beside files on other file systems.
                and not file.name.startswith("._")
            )
            if not own:
                raise UserError(
                    f"config.predict.images: the folder {path} has no image ({' '.join(SUFFIXES)})"
                )
            files += own
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"config.predict.images: there is no {path}; give files or folders")
    if not files:
        raise UserError(f"config.predict.images is {given!r}; give image files and folders")
    return files


def _read(
    files: list[pathlib.Path], form: Mapping[str, Any], batch_size: int
) -> Iterator[tuple[list[pathlib.Path], np.ndarray]]:
    for first in range(0, len(files), batch_size):
        own = files[first : first + batch_size]
        yield own, np.stack([read_image(path, form) for path in own])


def read_image(path: pathlib.Path, form: Mapping[str, Any]) -> np.ndarray:
    """Read an image file as the network's evaluation read its images.

    Args:
        path: of the file.
        form: `Shipped.preprocessing`.

    Returns:
        uint8[H, W, C].

    Raises:
        UserError: it is no image that can be read.
    """
    height, width, channels = (int(form[name]) for name in ("height", "width", "channels"))
    try:
        encoded = plain(path.read_bytes(), with_alpha=channels == 4)
        if form["form"] == "central part":
            return views.read_view(
                encoded,
                MODES[channels],
                height,
                lambda w, h: views.central_box(w, h, float(form["share"])),
                quick=False,
            )
        return _whole(encoded, height, width, channels)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no image that can be read (no known format)") from error
    # Pillow reports broken images by errors of many types.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is no image that can be read ({reason})") from error


def plain(encoded: bytes, *, with_alpha: bool = False) -> bytes:
    """Return an image file whose pixels lie as its EXIF orientation says they are to be seen.

    Args:
        encoded: the file.
        with_alpha: whether the network sees transparency too.

    Raises:
        ValueError: grey pixels have more than 8 bits, or some can be seen through: what is left of
            either without the rest need not be what a person sees.

    Phones store photos as the sensor lay. The images of data sets have no such note, or it was
    ignored where they were trained on.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError("its pixels have more than 8 bits; convert it to 8 bits a channel")
        if not with_alpha and image.has_transparency_data and _least_alpha(image) < 255:
            raise ValueError("parts of it are transparent; put it on a background first")
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return encoded
        turned = ImageOps.exif_transpose(image)
        if turned.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            turned = turned.convert("RGB")
        file = io.BytesIO()
        turned.save(file, "PNG")
        return file.getvalue()


def _least_alpha(image: Image.Image) -> float:
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return float(lowest)  # type: ignore[arg-type]


def _whole(encoded: bytes, height: int, width: int, channels: int) -> np.ndarray:
    def failed(_: int, error: Exception) -> None:
        raise error

    # Images that are not square were trained on as they are stored.
    size = height if height == width else None
    (image,) = decode_images([encoded], (None, None, channels), size, failed)
    if image.shape[:2] != (height, width):
        raise ValueError(f"it has {image.shape[1]}x{image.shape[0]} pixels, not {width}x{height}")
    return image


def answers_of(
    logits: np.ndarray, paths: list[pathlib.Path], names: Sequence[str], top: int
) -> list[dict[str, Any]]:
    """Return the likeliest classes of images with their probabilities."""
    probabilities = special.softmax(logits.astype(np.float64), axis=1)
    return [
        {
            "image": str(path),
            "classes": [
                {"name": names[place], "probability": float(own[place])}
                for place in np.argsort(-own, kind="stable")[:top]
            ],
        }
        for path, own in zip(paths, probabilities, strict=True)
    ]
