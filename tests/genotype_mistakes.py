"""Genotype files with a mistake, and what is said of each."""

import json

from small_training import GENOTYPE


def cells(change):
    data = json.loads(GENOTYPE.to_json())
    change(data)
    return json.dumps(data).encode()


def edge(cell, number, **values):
    return cells(lambda data: data[cell][number].update(values))


def lone_none(data):
    """Policy `all`, where an edge may be `none`; but not all of a node's."""
    data["edge_policy"] = "all"
    for cell in ("normal", "reduce"):
        data[cell] = [
            {"source": source, "target": target, "operation": "skip_connect"}
            for target in range(2, 6)
            for source in range(target)
        ]
    for entry in data["reduce"][2:5]:
        entry["operation"] = "none"


MISTAKES = {
    "operation": (
        edge("normal", 0, operation="conv_7x7"),
        "normal cell: edge 0->2 has the unknown operation 'conv_7x7'; known: none, max_pool_3x3",
    ),
    "missing edge": (
        cells(lambda data: data["normal"].pop(0)),
        "normal cell: node 2 has 1 edges (sources [1]); policy top2 needs 2",
    ),
    "cycle": (
        edge("reduce", 2, source=4),
        "reduce cell: there is no edge 4->3; target must be 2 to 5 and source from 0 to target - 1",
    ),
    "loop": (edge("reduce", 2, source=3), "reduce cell: there is no edge 3->3"),
    "node without input": (cells(lone_none), "reduce cell: node 3 is dead, all its edges are"),
    "none in top2": (edge("normal", 0, operation="none"), "edge 0->2 is 'none'; policy top2 keeps"),
    "sixth node": (edge("normal", 7, target=6), "there is no edge 4->6; target must be 2 to 5"),
    "one cell": (cells(lambda data: data.pop("reduce")), "genotype has no key 'reduce'"),
    "third cell": (
        cells(lambda data: data.update(third=[])),
        "genotype has the unknown key 'third'; known: edge_policy, format",
    ),
    "empty": (b"", "not JSON"),
    "cut": (GENOTYPE.to_json()[:200].encode(), "not JSON"),
    "bytes": (bytes(range(256)), "not UTF-8 text; give a genotype file"),
    "another JSON": (b'{"a": 1}', "format is None; it must be 'cpnas_jax.genotype'"),
    "a list": (b"[1, 2]", "format is [1, 2]; it must be 'cpnas_jax.genotype'"),
}
