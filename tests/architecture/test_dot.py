"""Cells in DOT, read back by an independent parser."""

import warnings

import numpy as np
import pytest

from cpnas_jax.architecture.dot import to_dot
from cpnas_jax.architecture.genotype import Edge, Genotype, from_architecture
from cpnas_jax.architecture.named import NAMES, named_genotype
from cpnas_jax.models.space import CELL_TYPES

pydot = pytest.importorskip("pydot", reason="pydot parses DOT; pip install -e '.[test]'")


def read_back(text, policy):
    """The genotype of a graph, by pydot."""
    with warnings.catch_warnings():
        # pydot 4.0 calls pyparsing 3.3 by names that are going out of use.
        warnings.simplefilter("ignore")
        (graph,) = pydot.graph_from_dot_data(text)
    clusters = {cluster.get_name(): cluster for cluster in graph.get_subgraphs()}
    assert sorted(clusters) == [f"cluster_{cell}" for cell in sorted(CELL_TYPES)]
    cells = {}
    for cell in CELL_TYPES:
        cluster = clusters[f"cluster_{cell}"]
        labels = {n.get_name(): n.get_label().strip('"') for n in cluster.get_nodes()}
        assert [labels[f"{cell}_{node}"] for node in range(6)] == [
            *("c_{k-2}", "c_{k-1}", "0", "1", "2", "3")
        ]
        cells[cell], concatenated = [], []
        for edge in cluster.get_edges():
            source, target = (
                end.removeprefix(f"{cell}_") for end in (edge.get_source(), edge.get_destination())
            )
            if target == "output":
                concatenated.append(int(source))
                continue
            operation = edge.get_label().strip('"')
            cells[cell].append(Edge(target=int(target), source=int(source), operation=operation))
        assert concatenated == [2, 3, 4, 5]
    return Genotype(tuple(cells["normal"]), tuple(cells["reduce"]), policy)


@pytest.mark.parametrize("name", NAMES)
def test_named_genotypes_come_back(name):
    genotype = named_genotype(name)
    assert read_back(to_dot(genotype), genotype.edge_policy) == genotype


def test_all_operations_on_all_edges_come_back():
    genotype = from_architecture(np.arange(28).reshape(2, 14) % 8)
    text = to_dot(genotype)
    assert read_back(text, "all") == genotype
    assert text.isascii()
