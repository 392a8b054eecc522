import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from cpnas_jax.architecture.genotype import (
    Edge,
    Genotype,
    from_architecture,
    indicator_pairs,
)
from cpnas_jax.models.space import EDGES, OPERATIONS
from cpnas_jax.runtime.errors import UserError


@st.composite
def cells(draw, policy):
    if policy == "all":
        pairs = list(EDGES)
        names = st.sampled_from(OPERATIONS)
    else:
        pairs = []
        for node in range(2, 6):
            sources = draw(st.permutations(range(node)))[:2]
            pairs += [(source, node) for source in sources]
        names = st.sampled_from(OPERATIONS[1:])
    edges = [Edge(target=t, source=s, operation=draw(names)) for s, t in pairs]
    for node in range(2, 6):
        first = next(n for n, edge in enumerate(edges) if edge.target == node)
        if all(edge.operation == "none" for edge in edges if edge.target == node):
            edges[first] = dataclasses.replace(edges[first], operation="skip_connect")
    return tuple(draw(st.permutations(edges)))


@st.composite
def indicators(draw):
    seed = draw(st.integers(0, 2**32))
    generator = np.random.default_rng(seed)
    values = generator.uniform(0.1, 1, size=(2, 14, 8))
    mask = generator.permuted(np.tile(np.arange(8), (2, 14, 1)), axis=-1) < 2
    values = np.where(mask, values, 0)
    return indicator_pairs(values / values.sum(axis=-1, keepdims=True), mask)


PROVENANCE = st.dictionaries(
    st.text(max_size=5),
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    max_size=4,
)


@st.composite
def genotypes(draw):
    policy = draw(st.sampled_from(["all", "top2"]))
    return Genotype(
        normal=draw(cells(policy)),
        reduce=draw(cells(policy)),
        edge_policy=policy,
        indicator=draw(st.none() | indicators()),
        provenance=tuple(draw(PROVENANCE).items()),
    )


def example(policy="all"):
    names = ("none", "sep_conv_3x3", "max_pool_3x3")
    rows = {}
    for cell in ("normal", "reduce"):
        pairs = EDGES if policy == "all" else [(s, t) for s, t in EDGES if s in (0, 1)]
        names = names if policy == "all" else names[1:]
        rows[cell] = tuple(
            Edge(target=t, source=s, operation=names[n % len(names)])
            for n, (s, t) in enumerate(pairs)
        )
    generator = np.random.default_rng(0)
    mask = generator.permuted(np.tile(np.arange(8), (2, 14, 1)), axis=-1) < 2
    return Genotype(
        **rows,
        edge_policy=policy,
        indicator=indicator_pairs(np.where(mask, 0.5, 0), mask),
        provenance=(("seed", 3), ("dataset", "cifar10")),
    )


@given(genotypes())
def test_json_round_trip_keeps_every_field(genotype):
    read = Genotype.from_json(genotype.to_json())
    for field in dataclasses.fields(Genotype):
        assert getattr(read, field.name) == getattr(genotype, field.name), field.name
    assert read.to_json() == genotype.to_json()


@given(genotypes())
def test_edges_are_ordered_and_the_value_is_hashable(genotype):
    for _, edges in genotype.cells():
        pairs = [(edge.source, edge.target) for edge in edges]
        assert pairs == [pair for pair in EDGES if pair in pairs]
    shuffled = dataclasses.replace(genotype, normal=genotype.normal[::-1], provenance=())
    assert shuffled == genotype
    assert len({shuffled, genotype}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        genotype.edge_policy = "all"


@given(genotypes())
def test_architecture_holds_the_edges_and_none_elsewhere(genotype):
    architecture = genotype.architecture()
    assert architecture.dtype == np.int32
    for row, (_, edges) in enumerate(genotype.cells()):
        kept = {(edge.source, edge.target): edge.operation for edge in edges}
        names = [kept.get(pair, "none") for pair in EDGES]
        assert [OPERATIONS[k] for k in architecture[row]] == names
    if genotype.edge_policy == "all":
        assert from_architecture(architecture) == genotype


def test_operation_counts():
    counts = example("top2").operation_counts()
    assert list(counts) == ["normal", "reduce"]
    assert list(counts["normal"]) == list(OPERATIONS)
    assert counts["normal"] == {name: 0 for name in OPERATIONS} | {
        "sep_conv_3x3": 4,
        "max_pool_3x3": 4,
    }


def test_save_and_load(tmp_path):
    path = tmp_path / "deep" / "genotype.json"
    genotype = example()
    genotype.save(path)
    genotype.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["genotype.json"]
    read = Genotype.load(path)
    assert read == genotype
    assert read.indicator == genotype.indicator
    assert dict(read.provenance) == {"dataset": "cifar10", "seed": 3}


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "genotype.json"
    example().save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(epath.Path(path)), "replace", fail)
    with pytest.raises(UserError, match=r"cannot be written .disk full"):
        example("top2").save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def change(*path, to):
    def apply(data):
        *parents, last = path
        for key in parents:
            data = data[key]
        data[last] = to

    return apply


def remove(*path):
    def apply(data):
        *parents, last = path
        for key in parents:
            data = data[key]
        del data[last]

    return apply


def kill_node(data):
    for edge in data["reduce"][2:5]:
        edge["operation"] = "none"


def repeat_edge(data):
    data["normal"][3] = dict(data["normal"][2])


FIRST = ("normal", 0)
DAMAGES = {
    "format": (change("format", to="png"), "format is 'png'; it must be 'cpnas_jax.genotype'"),
    "no format": (remove("format"), "format is None"),
    "version": (change("version", to=2), "version is 2; it must be 1"),
    "version type": (change("version", to=True), "version is True; it must be 1"),
    "policy": (change("edge_policy", to="top3"), "edge_policy is 'top3'; it must be one of all"),
    "policy type": (change("edge_policy", to=["all"]), r"edge_policy is \['all'\]"),
    "other policy": (change("edge_policy", to="top2"), "policy top2 needs 2"),
    "no cell": (remove("reduce"), "genotype has no key 'reduce'"),
    "unknown key": (change("colour", to=1), "unknown key 'colour'"),
    "cell type": (change("normal", to={}), r"normal is \{\}; it must be a list"),
    "edge type": (change(*FIRST, to=[0, 2]), r"edge 0 of normal is \[0, 2\]; it must be an object"),
    "edge key": (remove(*FIRST, "source"), "edge 0 of normal has no key 'source'"),
    "operation": (
        change(*FIRST, "operation", to="conv"),
        "normal cell: edge 0->2 has the unknown operation 'conv'; known: none, max_pool_3x3",
    ),
    "operation type": (change(*FIRST, "operation", to=["x"]), r"unknown operation \['x'\]"),
    "backward edge": (change(*FIRST, "source", to=4), "there is no edge 4->2"),
    "edge to input": (change(*FIRST, "target", to=1), "there is no edge 0->1"),
    "float node": (change(*FIRST, "target", to=2.0), "target of an edge is 2.0; it must be an int"),
    "bool node": (change(*FIRST, "source", to=True), "source of an edge is True; it must be an"),
    "missing edge": (remove(*FIRST), "normal cell: node 2 has 1 edges .* needs 2"),
    "double edge": (repeat_edge, "normal cell: edge 0->3 is given twice"),
    "dead node": (kill_node, "reduce cell: node 3 is dead"),
    "indicator type": (change("indicator", to=[]), r"indicator is \[\]; it must be an object"),
    "indicator edges": (
        remove("indicator", "normal", 0),
        "indicator of normal has 13 edges; it must be 14",
    ),
    "indicator operation": (
        change("indicator", "normal", 0, to={"conv": 1.0}),
        "edge 0 of indicator normal has the unknown key 'conv'",
    ),
    "indicator sum": (
        change("indicator", "reduce", 13, to={"none": 0.3, "skip_connect": 0.3}),
        "indicator of reduce, edge 13: the values add up to 0.6; it must be 1",
    ),
    "indicator value": (
        change("indicator", "reduce", 13, to={"none": 2}),
        r"none is 2; it must be a number in \[0, 1\]",
    ),
    "indicator text": (change("indicator", "reduce", 13, to={"none": "1"}), "none is '1'; it must"),
    "NaN": (change("indicator", "reduce", 13, to={"none": float("nan")}), "NaN is not a number"),
    "infinite": (change("provenance", "a", to=float("inf")), "Infinity is not a number"),
    "provenance type": (change("provenance", to=[1]), r"provenance is \[1\]; it must be an object"),
    "provenance value": (change("provenance", "a", to=[1]), r"provenance 'a' is \[1\]; it must be"),
}


def assert_one_line(error, path):
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_in_one_line(tmp_path, damage):
    apply, message = DAMAGES[damage]
    data = json.loads(example().to_json())
    apply(data)
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as error:
        Genotype.load(path)
    assert_one_line(error, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"genotype", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", r"format is \[\]"),
        (b"3", "format is 3"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format": "a", "format": "b"}', "key 'format' is given twice"),
        (b'{"format": 1e999}', "format is inf"),
    ],
)
def test_files_of_another_kind(tmp_path, content, message):
    path = tmp_path / "genotype.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Genotype.load(path)
    assert_one_line(error, path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    text = example().to_json()
    for length in range(0, len(text) - 2, 7):
        with pytest.raises(UserError):
            Genotype.from_json(text[:length])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file") as error:
        Genotype.load(tmp_path / "no.json")
    assert_one_line(error, tmp_path / "no.json")
    with pytest.raises(UserError, match="cannot be read"):
        Genotype.load(tmp_path)


def test_indicator_and_provenance_may_be_absent_from_a_file():
    data = json.loads(example().to_json())
    del data["indicator"], data["provenance"]
    read = Genotype.from_json(json.dumps(data))
    assert read == example()
    assert read.indicator is None


def test_a_top2_cell_has_no_none():
    edges = example("top2").normal
    with pytest.raises(ValueError, match="edge 0->2 is 'none'"):
        Genotype(
            normal=(dataclasses.replace(edges[0], operation="none"), *edges[1:]),
            reduce=edges,
            edge_policy="top2",
        )
