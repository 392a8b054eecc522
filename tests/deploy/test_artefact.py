"""The directory of a shipped network: what it holds, and what is refused."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from random_networks import CLASSES, images_of, shipped_of, variables_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cpnas_jax.deploy import artefact, program
from cpnas_jax.deploy.layout import ArtefactError
from cpnas_jax.deploy.structure import steps
from cpnas_jax.models.network import NetworkSettings

EDGES = (
    *((0, 2, "sep_conv_3x3"), (1, 3, "max_pool_3x3"), (2, 4, "skip_connect")),
    (3, 5, "avg_pool_3x3"),
)
SETTINGS = NetworkSettings(EDGES, EDGES, 1, 5, len(CLASSES), auxiliary=False)
SIZE = 6


@pytest.fixture(scope="module")
def shipped():
    return shipped_of(SETTINGS, variables_of(SETTINGS, SIZE), SIZE)


@pytest.fixture(scope="module")
def written(shipped, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exports") / "network"
    artefact.write(shipped, directory, images_of(SIZE))
    return directory


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "network")


def test_what_is_read_is_what_was_written(shipped, written):
    back = artefact.read(written)
    assert back.structure == shipped.structure
    assert (back.genotype, back.classes, back.preprocessing) == (
        *(shipped.genotype, CLASSES, {"size": SIZE}),
    )
    for name, own in shipped.tensors.items():
        for field, tensor in own.items():
            found = back.tensors[name][field]
            np.testing.assert_array_equal(found, tensor)
            assert found.dtype == tensor.dtype


def test_the_program_takes_any_number_of_images(shipped, written):
    network = artefact.open_program(written)
    assert network.self_check() == 0
    expected = shipped.logits(network.images)
    np.testing.assert_allclose(network.expected, expected, rtol=1e-5, atol=1e-5)
    for number in (1, 2):
        np.testing.assert_allclose(network(network.images[:number]), expected[:number], atol=1e-5)
    assert set(network.exported.platforms) == {"cpu", "cuda", "tpu"}


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((0, SIZE, SIZE, 3), np.uint8), rf"uint8\[0, {SIZE}, {SIZE}, 3\]; .*N at least 1"),
        (np.zeros((1, SIZE, SIZE, 1), np.uint8), rf"takes uint8\[N, {SIZE}, {SIZE}, 3\]"),
        (np.zeros((1, SIZE, SIZE, 3), np.float32), "images are float32"),
    ],
)
def test_what_the_program_does_not_take(written, images, words):
    with pytest.raises(ValueError, match=words):
        artefact.open_program(written)(images)


def test_the_borders_of_fusions_outlive_the_export(shipped, written, monkeypatch):
    """A conditional for each step that XLA:CPU would compute again wherever it is read."""

    def branches(exported):
        return len(re.findall(r"stablehlo\.(?:case|if)\b", exported.mlir_module()))

    borders = [step for step in steps(shipped.structure) if step.op in program._APART]
    found = branches(artefact.open_program(written).exported)
    monkeypatch.setattr(program, "_APART", ())
    without = branches(program.exported(shipped.structure, shipped.tensors))
    assert found - without == len(borders) == 7


def test_a_bit_takes_a_bit(shipped, written):
    """But for the last byte of each tensor."""
    stored = load_file(written / artefact.MODEL)
    bits = [
        tensor.size
        for own in shipped.tensors.values()
        for tensor in own.values()
        if tensor.dtype == bool
    ]
    packed = sum(tensor.size for name, tensor in stored.items() if name.endswith(".bits"))
    assert packed == sum(-(-size // 8) for size in bits)
    assert {str(tensor.dtype) for tensor in stored.values()} == {"uint8", "float32", "int8"}


def test_all_else_in_the_file_is_small():
    """From four cells of the paper's width on: within 5 % of its bits and its float rest."""
    edges = tuple((0, node, "sep_conv_5x5") for node in (2, 3, 4, 5))
    settings = NetworkSettings(edges, edges, 4, 36, len(CLASSES), auxiliary=False)
    own = shipped_of(settings, variables_of(settings, 32), 32)
    tensors = [tensor for of_step in own.tensors.values() for tensor in of_step.values()]
    bits = sum(tensor.size for tensor in tensors if tensor.dtype == bool)
    rest = sum(tensor.nbytes for tensor in tensors if tensor.dtype != bool)
    size = len(artefact.model_file(own, dict.fromkeys(("a", "b", "c"), "0" * 64)))
    assert bits / 8 + rest < size < 1.05 * (bits / 8 + rest)


def test_the_reader_needs_numpy_jax_and_safetensors_alone(written):
    """And nothing of the package beside `deploy`."""
    script = f"""
import sys
from cpnas_jax.deploy import artefact
network = artefact.open_program({str(written)!r})
assert network.self_check() == 0
own = {{name for name in sys.modules if name.startswith("cpnas_jax.")}}
others = {{name for name in own if not name.startswith("cpnas_jax.deploy")}}
assert not others, others
assert not {{"flax", "optax", "orbax", "tensorflow_datasets"}} & set(sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_nothing_is_overwritten_and_nothing_half_written_is_left(
    shipped, written, tmp_path, monkeypatch
):
    with pytest.raises(ArtefactError, match="exists; give a directory that does not"):
        artefact.write(shipped, written, images_of(SIZE))

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact, "_write_files", fails)
    with pytest.raises(ArtefactError, match=r"cannot be written .No space left"):
        artefact.write(shipped, tmp_path / "some/where/new", images_of(SIZE))
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot be written"):
        artefact.write(shipped, tmp_path / "file/new", images_of(SIZE))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def resaved(directory, change):
    """Save the model with other tensors or metadata, as another writer might."""
    path = directory / artefact.MODEL
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def without_digest(change):
    """Make a change, and the digest that of what is left."""

    def changed(tensors, metadata):
        change(tensors, metadata)
        metadata["digest"] = artefact._digest(tensors, metadata)

    return changed


def other_cells(tensors, metadata):
    structure = json.loads(metadata["structure"])
    structure["normal"][0][2] = "sep_conv_5x5"
    structure["reduce"] = structure["normal"]
    metadata["structure"] = json.dumps(structure)


def fewer_cells(tensors, metadata):
    structure = json.loads(metadata["structure"])
    structure["cells"] = []
    metadata["structure"] = json.dumps(structure)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: m.update(format_version="2"), "format version '2', this cpnas_jax reads 1"),
        (lambda t, m: m.update(format="other"), "is no network of cpnas_jax"),
        (without_digest(lambda t, m: m.pop("structure")), "is damaged .'structure'"),
        (without_digest(lambda t, m: m.update(structure="{")), "is damaged"),
        (without_digest(lambda t, m: m.update(structure="[]")), "is damaged"),
        (lambda t, m: m.update(classes="[]"), "its digest is another"),
        (lambda t, m: t["cells.0.int8"].__setitem__(0, 7), "its digest is another"),
        (lambda t, m: t.pop("cells.0.bits"), "its digest is another"),
        (without_digest(lambda t, m: t.pop("cells.0.bits")), "'cells.0.bits' does not fit"),
        (without_digest(other_cells), "does not fit the cells"),
        (without_digest(fewer_cells), "does not fit"),
    ],
)
def test_another_model_is_refused(copy, change, words):
    resaved(copy, change)
    with pytest.raises(ArtefactError, match=words) as error:
        artefact.open_program(copy)
    assert "\n" not in str(error.value)
    assert artefact.MODEL in str(error.value)


@pytest.mark.parametrize(
    ("version", "words"), [("9", "format version '9', this cpnas_jax reads 1"), ("1", "is damaged")]
)
def test_a_later_format_is_told_whatever_its_tensors_are(copy, version, words):
    path = copy / artefact.MODEL
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["format_version"] = version
    for name, own in header.items():
        if name.endswith(".bits"):
            # Eight-bit floats, which numpy does not have.
            own["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ArtefactError, match=words):
        artefact.open_program(copy)


@pytest.mark.parametrize(
    "name", [artefact.MODEL, artefact.PROGRAM, artefact.CHECK, artefact.GENOTYPE]
)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "deleted"])
def test_a_damaged_file_is_named(copy, name, damage):
    path = copy / name
    data = bytearray(path.read_bytes())
    match damage:
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "emptied":
            path.write_bytes(b"")
        case "flipped":
            data[-3] ^= 16
            path.write_bytes(data)
        case "deleted":
            path.unlink()
    with pytest.raises(ArtefactError, match=name) as error:
        artefact.open_program(copy)
    assert "\n" not in str(error.value)


def test_every_byte_of_the_model_counts(copy, shipped):
    """Of the header too: names, shapes and metadata."""
    path = copy / artefact.MODEL
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 60).astype(int):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        try:
            found = artefact.read(copy)
        except ArtefactError:
            continue
        # A blank of the header.
        assert found.structure == shipped.structure
        assert whole[place : place + 1] == b" "
