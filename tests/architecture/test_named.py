import pytest

from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.named import NAMES, named_genotype
from cpnas_jax.architecture.notation import from_darts
from cpnas_jax.runtime.errors import UserError

# (op@input) of nodes 2 / 3 / 4 / 5, as the tables in the papers are written down.
SHORT = {
    "BNAS_XNOR_1": (
        "id@1,d3@0 / id@0,d5@2 / mp@1,mp@0 / d5@4,s3@2",
        "s3@1,d5@0 / id@1,mp@2 / d5@0,ap@3 / id@2,d3@4",
    ),
    "DDPNAS_XNOR_1": (
        "d5@1,mp@0 / mp@1,mp@2 / s3@2,s5@0 / mp@1,ap@2",
        "s3@0,s5@1 / mp@2,d5@0 / d5@2,id@1 / s3@2,d3@0",
    ),
    "DDPNAS_MCN_2": (
        "s5@1,mp@0 / d3@2,id@0 / s3@3,ap@1 / d3@4,ap@3",
        "mp@0,s3@1 / d3@1,s3@0 / mp@1,d5@2 / d5@2,s5@1",
    ),
    "DARTS_V1": (
        "s3@1,s3@0 / id@0,s3@1 / id@0,s3@1 / s3@0,id@2",
        "mp@0,mp@1 / id@2,mp@0 / mp@0,id@2 / id@2,ap@0",
    ),
    "DARTS_V2": (
        "s3@0,s3@1 / s3@0,s3@1 / s3@1,id@0 / id@0,d3@2",
        "mp@0,mp@1 / id@2,mp@1 / mp@0,id@2 / id@2,mp@1",
    ),
    "PC_DARTS_CIFAR": (
        "s3@1,id@0 / s3@0,d3@1 / s5@0,s3@1 / ap@0,d3@1",
        "s5@1,mp@0 / s5@1,s5@2 / s3@0,s3@3 / s3@1,s3@2",
    ),
    "PC_DARTS_IMAGE": (
        "id@1,s3@0 / s3@0,id@1 / s3@1,s3@3 / s3@1,d5@4",
        "s3@0,id@1 / d5@2,mp@1 / s3@2,s3@1 / s5@0,s3@3",
    ),
}
WORDS = {
    "id": "skip_connect",
    "mp": "max_pool_3x3",
    "ap": "avg_pool_3x3",
    "s3": "sep_conv_3x3",
    "s5": "sep_conv_5x5",
    "d3": "dil_conv_3x3",
    "d5": "dil_conv_5x5",
}


def triples(short):
    return {
        (int(entry.split("@")[1]), node, WORDS[entry.split("@")[0]])
        for node, pair in enumerate(short.replace(" ", "").split("/"), start=2)
        for entry in pair.split(",")
    }


@pytest.mark.parametrize("name", NAMES)
def test_transcription(name):
    genotype = named_genotype(name)
    for (_, edges), short in zip(genotype.cells(), SHORT[name], strict=True):
        assert {(edge.source, edge.target, edge.operation) for edge in edges} == triples(short)
    assert genotype.edge_policy == "top2"
    assert dict(genotype.provenance)["name"] == name
    assert Genotype.from_json(genotype.to_json()) == genotype


def test_published_expression_of_darts_v2():
    s, k, m = "('sep_conv_3x3', {})", "('skip_connect', {})", "('max_pool_3x3', {})"
    normal = [s.format(0), s.format(1)] * 2 + [s.format(1), k.format(0), k.format(0)]
    normal.append("('dil_conv_3x3', 2)")
    reduce = [m.format(0), m.format(1), k.format(2), m.format(1)]
    reduce += [m.format(0), k.format(2), k.format(2), m.format(1)]
    text = (
        f"Genotype(normal=[{', '.join(normal)}], normal_concat=[2, 3, 4, 5], "
        f"reduce=[{', '.join(reduce)}], reduce_concat=[2, 3, 4, 5])"
    )
    assert from_darts(text) == named_genotype("DARTS_V2")


def test_names():
    assert set(NAMES) == set(SHORT)
    assert len({named_genotype(name) for name in NAMES}) == len(NAMES)
    with pytest.raises(UserError, match="'DARTS' is not a known name; known: BNAS_XNOR_1, DDPNAS"):
        named_genotype("DARTS")
