"""The directory of a shipped network: what is in its files, written whole and read with care.

`model.safetensors` holds the tensors (see `layout`) and in its metadata everything else, see
`FIELDS`. Sums of all files' bytes (SHA-256) are among them, so that an altered file is refused.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cpnas_jax.deploy import iree_engine, program
from cpnas_jax.deploy.iree_engine import IreeError, IreeProgram
from cpnas_jax.deploy.layout import ArtefactError, blobs, from_blobs, one_line
from cpnas_jax.deploy.program import AllTensors
from cpnas_jax.deploy.structure import Structure

FORMAT = "cpnas_jax"
VERSION = 1
MODEL, PROGRAM, CHECK = "model.safetensors", "model.stablehlo", "selfcheck.npz"
GENOTYPE, README = "genotype.json", "README.md"
SAME = 1e-4
"""Logits of two engines that are the same."""

FIELDS = {
    "format": "always cpnas_jax",
    "format_version": "of this layout; a reader refuses those it does not know",
    "structure": "JSON: all that decides the steps of the network",
    "genotype": "JSON: the cells as they were found",
    "classes": "JSON: names, in the order of the logits",
    "preprocessing": "JSON: how an image file becomes the uint8 array that the network takes",
    "bit_order": "of the packed tensors",
    "padding": "what surrounds an image in 1-bit convolutions",
    "digest": "SHA-256 of all other metadata as JSON and of the tensors, both sorted by name",
    "files": "JSON: SHA-256 of the directory's other files",
}
"""The metadata of `model.safetensors`."""


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A network as it is shipped.

    Attributes:
        structure: of the network.
        tensors: of its steps; bits as bool.
        genotype: the cells, as `genotype.json` holds them.
        classes: names in the order of the logits.
        preprocessing: how an image file becomes what the network takes.
    """

    structure: Structure
    tensors: AllTensors
    genotype: Mapping[str, Any]
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any]

    def logits(self, images: np.ndarray, engine: str = "packed") -> np.ndarray:
        """Return the answers to uint8[N, H, W, C], f32[N, classes], computed step by step.

        `Program` is faster: this compiles nothing as a whole.
        """
        return np.asarray(
            program.logits(self.structure, self.tensors, jax.numpy.asarray(images), engine)
        )


def _digest(stored: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    whole = hashlib.sha256()
    rest = {name: text for name, text in metadata.items() if name != "digest"}
    whole.update(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(stored):
        whole.update(name.encode())
        whole.update(stored[name].tobytes())
    return whole.hexdigest()


def write(
    shipped: Shipped,
    directory: str | os.PathLike[str],
    images: np.ndarray,
    check: Callable[["Program"], None] | None = None,
    iree: Iterable[str] = (),
) -> None:
    """Write the directory, whole or not at all.

    Args:
        shipped: the network.
        directory: that does not exist yet.
        images: uint8[n, H, W, C] that `selfcheck.npz` keeps with their answers.
        check: called with what was written, read back; if it raises, nothing is left.
        iree: of `iree_engine.TARGETS`, what IREE compiles the network for beside it; what it
            compiles for this machine is run on `images`.

    Raises:
        ArtefactError: it exists, or it cannot be written; IREE cannot compile it, or what it
            compiled answers otherwise.
    """
    target = pathlib.Path(directory)
    if target.exists():
        raise ArtefactError(f"{target} exists; give a directory that does not, or delete it")
    made = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ArtefactError(f"{target} cannot be written ({error.strerror or error})") from error
    try:
        _write_files(shipped, scratch, images, tuple(iree))
        written = open_program(scratch)
        if iree_engine.HOST in iree:
            _check_iree(open_iree(scratch), written)
        if check is not None:
            check(written)
        scratch.chmod(0o755)
        os.replace(scratch, target)
    except OSError as error:
        raise ArtefactError(f"{target} cannot be written ({error.strerror or error})") from error
    except IreeError as error:
        raise ArtefactError(f"nothing was written to {target}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        # Innermost first; one that holds something stays, with those around it.
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _check_iree(found: IreeProgram, written: "Program") -> None:
    difference = float(np.abs(found(written.images) - written.expected).max())
    # A sign of a sum that is rounded otherwise would change much more.
    if difference > SAME:
        raise IreeError(f"what IREE compiled gives logits that differ by {difference:.1e}")


def _write_files(
    shipped: Shipped, directory: pathlib.Path, images: np.ndarray, iree: tuple[str, ...]
) -> None:
    network = program.exported(shipped.structure, shipped.tensors)
    check = io.BytesIO()
    np.savez(check, images=images, logits=np.asarray(network.call(images)))
    files = {
        PROGRAM: bytes(network.serialize()),
        CHECK: check.getvalue(),
        GENOTYPE: (json.dumps(shipped.genotype, indent=1) + "\n").encode(),
    }
    for target in iree:
        own = iree_engine.compiled(shipped.structure, shipped.tensors, target)
        files[iree_engine.file_name(target)] = own
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MODEL] = model_file(shipped, digests)
    files[README] = readme(shipped, iree).encode()
    for name, data in files.items():
        (directory / name).write_bytes(data)


def model_file(shipped: Shipped, digests: Mapping[str, str]) -> bytes:
    """Return the content of `model.safetensors`.

    Args:
        shipped: the network.
        digests: SHA-256 of the directory's other files.
    """
    stored = blobs(shipped.structure, shipped.tensors)
    pad = shipped.structure.pad_value
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "structure": json.dumps(shipped.structure.to_dict()),
        "genotype": json.dumps(shipped.genotype),
        "classes": json.dumps(list(shipped.classes)),
        "preprocessing": json.dumps(dict(shipped.preprocessing)),
        "bit_order": "C order, lowest bit of a byte first; 1 is +1, 0 is -1",
        "padding": f"symmetric, dilation * (k // 2) wide, value {pad}",
        "files": json.dumps(dict(digests)),
    }
    metadata["digest"] = _digest(stored, metadata)
    assert set(metadata) == set(FIELDS)
    return save(stored, metadata)


def readme(shipped: Shipped, iree: Iterable[str] = ()) -> str:
    """Return the text that tells people what the directory is.

    Args:
        shipped: the network.
        iree: what IREE compiled it for.
    """
    ahead = "".join(
        f"| {iree_engine.file_name(target)} | the same for one image, compiled by IREE for "
        f"{'the machine that exported it' if target == iree_engine.HOST else target} |\n"
        for target in iree
    )
    height, width, channels = shipped.structure.image
    kind = "A 1-bit child" if shipped.structure.binary else "A float parent"
    classes, platforms = shipped.structure.num_classes, ", ".join(program.PLATFORMS)
    layout = "`cpnas_jax/deploy/artefact.py`, `layout.py`"
    return f"""# {kind} network, exported by cpnas_jax

Takes uint8[n, {height}, {width}, {channels}] images, n > 0, and gives f32[n, {classes}] logits.

    from cpnas_jax.deploy import artefact
    network = artefact.open_program("this directory")
    logits = network(images)

| file | what it is |
|---|---|
| {MODEL} | packed bits, thresholds as int8, the rest float32; layout and metadata: {layout} |
| {PROGRAM} | the network as a StableHLO program for {platforms}: `jax.export.deserialize` |
| {GENOTYPE} | the cells |
| {CHECK} | images and the logits that they must give |
{ahead}
Preprocessing of an image file: {json.dumps(dict(shipped.preprocessing))}.
"""


def read(directory: str | os.PathLike[str]) -> Shipped:
    """Read what `write` wrote.

    Raises:
        ArtefactError: there is no such directory, or it is damaged, altered, or of the future.
    """
    return _read(pathlib.Path(directory))[0]


def _read(directory: pathlib.Path) -> tuple[Shipped, dict[str, str]]:
    """Return the network, and the digests of the other files."""
    path = directory / MODEL
    if not path.is_file():
        raise ArtefactError(f"{directory} has no {MODEL}; the mode `export` writes one")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            # First: a later format may have tensors of types that are not known here.
            _refuse_other_format(path, metadata)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ArtefactError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path} is damaged ({one_line(error)}); export it again") from error
    if metadata.get("digest") != _digest(stored, metadata):
        raise ArtefactError(f"{path} is damaged (its digest is another); export it again")
    try:
        structure = Structure.from_dict(json.loads(metadata["structure"]))
        tensors = from_blobs(structure, stored)
        shipped = Shipped(
            structure,
            tensors,
            json.loads(metadata["genotype"]),
            tuple(json.loads(metadata["classes"])),
            json.loads(metadata["preprocessing"]),
        )
        digests = json.loads(metadata["files"])
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}; export it again") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtefactError(f"{path} is damaged ({one_line(error)}); export it again") from error
    return shipped, digests


def _refuse_other_format(path: pathlib.Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ArtefactError(
            f"{path} is no network of {FORMAT}; give a directory that `export` wrote"
        )
    version = metadata.get("format_version", "")
    if version != str(VERSION):
        raise ArtefactError(
            f"{path} has format version {version!r}, this cpnas_jax reads {VERSION}; "
            "use the one that wrote it, or export again"
        )


def _checked(directory: pathlib.Path, name: str, digests: Mapping[str, str]) -> bytes:
    path = directory / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read ({error.strerror or error}); export it again"
        ) from error
    if hashlib.sha256(data).hexdigest() != digests.get(name):
        raise ArtefactError(
            f"{path} is damaged or altered (its digest is another); export it again"
        )
    return data


@dataclasses.dataclass(frozen=True)
class Program:
    """The StableHLO program of a shipped network.

    Attributes:
        shipped: the network.
        exported: what `jax.export` made of it.
        images: uint8[n, H, W, C] of the self-check.
        expected: f32[n, classes] that they must give.
    """

    shipped: Shipped
    exported: export.Exported
    images: np.ndarray
    expected: np.ndarray

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return f32[N, classes] of uint8[N, H, W, C]; compiled once for each N.

        Raises:
            ValueError: N is 0, or the images are of another shape or type.
        """
        shape = (*self.shipped.structure.image,)
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise ValueError(
                f"images are {images.dtype}{list(images.shape)}; this network takes "
                f"uint8[N, {', '.join(map(str, shape))}], N at least 1"
            )
        return np.asarray(self.exported.call(images))

    def self_check(self) -> float:
        """Return how far the answers to the stored images are from the stored ones."""
        return float(np.abs(self(self.images) - self.expected).max())


def open_program(directory: str | os.PathLike[str]) -> Program:
    """Read a directory with its program and self-check.

    Raises:
        ArtefactError: see `read`; or a file is missing, damaged or altered.
    """
    base = pathlib.Path(directory)
    shipped, digests = _read(base)
    data = {name: _checked(base, name, digests) for name in (PROGRAM, CHECK, GENOTYPE)}
    try:
        network = export.deserialize(bytearray(data[PROGRAM]))
        with np.load(io.BytesIO(data[CHECK])) as check:
            images, expected = check["images"], check["logits"]
    except ImportError as error:
        raise ArtefactError(f"{base / PROGRAM} cannot be read here: {one_line(error)}") from error
    # Whatever flatbuffers and numpy raise on data that has the digest but is not theirs.
    except Exception as error:
        raise ArtefactError(
            f"{base} cannot be read ({one_line(error)}); export it again"
        ) from error
    return Program(shipped, network, images, expected)


def open_iree(directory: str | os.PathLike[str]) -> IreeProgram:
    """Return the program that IREE compiled for this machine.

    Raises:
        ArtefactError: see `read`; there is none, or it is damaged or altered.
        IreeError: IREE's runtime is missing, or cannot load it.
    """
    base = pathlib.Path(directory)
    digests = _read(base)[1]
    name = iree_engine.file_name(iree_engine.HOST)
    if name not in digests:
        raise ArtefactError(
            f"{base} has no {name}; export it with --config.export.iree=\"('{iree_engine.HOST}',)\""
        )
    _checked(base, name, digests)
    return IreeProgram(base / name)
