"""Networks that IREE compiled ahead; skipped where the extra `iree` is not installed."""

import sys

import pytest
from random_networks import CLASSES, images_of, shipped_of, variables_of

from cpnas_jax.deploy import artefact, iree_engine
from cpnas_jax.deploy.iree_engine import IreeError
from cpnas_jax.deploy.layout import ArtefactError
from cpnas_jax.models.network import NetworkSettings

EDGES = (
    *((0, 2, "sep_conv_3x3"), (1, 3, "max_pool_3x3"), (2, 4, "skip_connect")),
    (3, 5, "dil_conv_3x3"),
)
SIZE = 6


def shipped(binary):
    settings = NetworkSettings(EDGES, EDGES, 2, 5, len(CLASSES), auxiliary=False, binary=binary)
    return shipped_of(settings, variables_of(settings, SIZE), SIZE)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("iree.compiler", reason="no iree")
    pytest.importorskip("iree.runtime", reason="no iree")
    directory = tmp_path_factory.mktemp("exports") / "network"
    artefact.write(shipped(True), directory, images_of(SIZE, 5), iree=("host", "aarch64"))
    return directory


def test_it_answers_as_xla(written):
    network, ahead = artefact.open_program(written), artefact.open_iree(written)
    images = images_of(SIZE, 4, seed=7)
    found, expected = ahead(images), network(images)
    assert found.shape == expected.shape
    assert abs(found - expected).max() < 1e-5


def test_a_file_for_each_target(written):
    files = {path.name for path in written.iterdir()}
    assert {"model.host.vmfb", "model.aarch64.vmfb"} <= files
    text = (written / "README.md").read_text()
    assert "the machine that exported it" in text
    # A shared object for ARM of 64 bits: its machine's number in ELF's header.
    assert b"\x7fELF" in (written / "model.aarch64.vmfb").read_bytes()
    assert _machines(written / "model.aarch64.vmfb") == {183}


def _machines(path):
    data = path.read_bytes()
    found, place = set(), data.find(b"\x7fELF")
    while place >= 0:
        found.add(int.from_bytes(data[place + 18 : place + 20], "little"))
        place = data.find(b"\x7fELF", place + 4)
    return found


def test_a_float_network(tmp_path):
    pytest.importorskip("iree.compiler", reason="no iree")
    artefact.write(shipped(False), tmp_path / "it", images_of(SIZE), iree=("host",))
    assert (tmp_path / "it/model.host.vmfb").is_file()


def test_an_altered_program_is_refused(written):
    path = written / "model.host.vmfb"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ArtefactError, match="damaged or altered"):
            artefact.open_iree(written)
    finally:
        path.write_bytes(whole)


def test_what_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("iree.compiler", reason="no iree")
    compiled = iree_engine.compiled

    def wrong(structure, tensors, target):
        bias = tensors["logits"]["bias"] + 1
        return compiled(
            structure, {**tensors, "logits": {**tensors["logits"], "bias": bias}}, target
        )

    monkeypatch.setattr(iree_engine, "compiled", wrong)
    with pytest.raises(ArtefactError, match=r"nothing was written .* differ by 1\.0e\+00"):
        artefact.write(shipped(True), tmp_path / "it", images_of(SIZE), iree=("host",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["compiler", "runtime"])
def test_a_missing_package_is_told(part, monkeypatch):
    monkeypatch.setitem(sys.modules, f"iree.{part}", None)
    with pytest.raises(IreeError, match=rf"iree-base-{part} is missing; pip install .*\[iree\]"):
        iree_engine.require(part)


def test_no_program_for_this_machine(tmp_path):
    artefact.write(shipped(True), tmp_path / "it", images_of(SIZE))
    with pytest.raises(ArtefactError, match=r"has no model\.host\.vmfb"):
        artefact.open_iree(tmp_path / "it")
