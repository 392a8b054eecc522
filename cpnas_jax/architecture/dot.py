"""Genotypes as directed graphs in Graphviz' DOT, for other programs to draw or read."""

from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.models.space import NODE_NAMES, NUM_INPUTS, NUM_NODES

OUTPUT = "output"


def to_dot(genotype: Genotype) -> str:
    """Write both cells as one digraph, a cluster for each; its provenance is left out.

    A node is `<cell>_<number>` with the number of `Edge`, and `<cell>_output` what a cell gives on,
    the concatenation of its intermediate nodes by dashed edges. An edge has its operation as label.
    """
    lines = ["digraph genotype {", "  rankdir=LR;", "  node [shape=box, style=rounded];"]
    for cell, edges in genotype.cells():
        lines += [f"  subgraph cluster_{cell} {{", f'    label="{cell}";']
        for node in range(NUM_NODES):
            lines.append(f'    {cell}_{node} [label="{NODE_NAMES[node]}"];')
        lines.append(f'    {cell}_{OUTPUT} [label="{OUTPUT}"];')
        lines += [
            f'    {cell}_{edge.source} -> {cell}_{edge.target} [label="{edge.operation}"];'
            for edge in edges
        ]
        lines += [
            f"    {cell}_{node} -> {cell}_{OUTPUT} [style=dashed];"
            for node in range(NUM_INPUTS, NUM_NODES)
        ]
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"
