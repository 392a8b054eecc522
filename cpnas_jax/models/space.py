"""The search space: operations and edges of a cell (CP-NAS section 4.3; names of DARTS)."""

import jax

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The K = 8 candidate operations of an edge; their positions are the architecture's integers."""

CELL_TYPES = ("normal", "reduce")
"""Order of the two cell types in the leading axis of an architecture."""

EDGE_PARAMETERS = {"normal": "normal_edges", "reduce": "reduce_edges"}
"""Cell type -> name of its edges' own parameters in alpha, where they are normalised."""

Alpha = dict[str, jax.Array]
"""The architecture parameters: one f32[14, 8] under each cell type, and with edge normalisation
also one f32[14] under each name of `EDGE_PARAMETERS`."""

NUM_INPUTS = 2
"""Nodes 0 and 1 are the outputs of the two previous cells."""

NUM_NODES = 6
"""Input nodes plus four intermediate nodes."""

NODE_NAMES = ("c_{k-2}", "c_{k-1}", "0", "1", "2", "3")
"""What people call the nodes: the inputs by their cells, the others from 0 on."""

EDGES = tuple(
    (source, target) for target in range(NUM_INPUTS, NUM_NODES) for source in range(target)
)
"""The 14 (source, target) pairs, ordered by target node, then source."""


def node_text(node: int) -> str:
    """Return a node's name as it stands in a sentence: `c_{k-1}`, `node 0`."""
    return NODE_NAMES[node] if node < NUM_INPUTS else f"node {NODE_NAMES[node]}"


NUM_EDGES = len(EDGES)
NUM_OPERATIONS = len(OPERATIONS)

CHILD, PARENT = "child", "parent"
"""The two models of an architecture: weights and activations of one bit, and float."""

MODELS = (CHILD, PARENT)
