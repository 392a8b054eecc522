"""Published genotypes by name.

BNAS, DDPNAS: 1-bit searches of the group that published CP-NAS (whose own genotype is not
published). DARTS, PC-DARTS: searches of float networks, the baselines and the check of the
parameter counter.
"""

from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.notation import cell_edges
from cpnas_jax.runtime.errors import UserError

_Cell = tuple[tuple[str, int], ...]

SKIP, MAX, AVG = "skip_connect", "max_pool_3x3", "avg_pool_3x3"
SEP3, SEP5 = "sep_conv_3x3", "sep_conv_5x5"
DIL3, DIL5 = "dil_conv_3x3", "dil_conv_5x5"

# Name: (source, normal cell, reduction cell). A line of a cell holds the two edges of a node.
_PUBLISHED: dict[str, tuple[str, _Cell, _Cell]] = {
    "BNAS_XNOR_1": (
        "BNAS",
        (
            *((SKIP, 1), (DIL3, 0)),
            *((SKIP, 0), (DIL5, 2)),
            *((MAX, 1), (MAX, 0)),
            *((DIL5, 4), (SEP3, 2)),
        ),
        (
            *((SEP3, 1), (DIL5, 0)),
            *((SKIP, 1), (MAX, 2)),
            *((DIL5, 0), (AVG, 3)),
            *((SKIP, 2), (DIL3, 4)),
        ),
    ),
    "DDPNAS_XNOR_1": (
        "DDPNAS",
        (
            *((DIL5, 1), (MAX, 0)),
            *((MAX, 1), (MAX, 2)),
            *((SEP3, 2), (SEP5, 0)),
            *((MAX, 1), (AVG, 2)),
        ),
        (
            *((SEP3, 0), (SEP5, 1)),
            *((MAX, 2), (DIL5, 0)),
            *((DIL5, 2), (SKIP, 1)),
            *((SEP3, 2), (DIL3, 0)),
        ),
    ),
    "DDPNAS_MCN_2": (
        "DDPNAS",
        (
            *((SEP5, 1), (MAX, 0)),
            *((DIL3, 2), (SKIP, 0)),
            *((SEP3, 3), (AVG, 1)),
            *((DIL3, 4), (AVG, 3)),
        ),
        (
            *((MAX, 0), (SEP3, 1)),
            *((DIL3, 1), (SEP3, 0)),
            *((MAX, 1), (DIL5, 2)),
            *((DIL5, 2), (SEP5, 1)),
        ),
    ),
    "DARTS_V1": (
        "DARTS, first order",
        (
            *((SEP3, 1), (SEP3, 0)),
            *((SKIP, 0), (SEP3, 1)),
            *((SKIP, 0), (SEP3, 1)),
            *((SEP3, 0), (SKIP, 2)),
        ),
        (
            *((MAX, 0), (MAX, 1)),
            *((SKIP, 2), (MAX, 0)),
            *((MAX, 0), (SKIP, 2)),
            *((SKIP, 2), (AVG, 0)),
        ),
    ),
    "DARTS_V2": (
        "DARTS, second order",
        (
            *((SEP3, 0), (SEP3, 1)),
            *((SEP3, 0), (SEP3, 1)),
            *((SEP3, 1), (SKIP, 0)),
            *((SKIP, 0), (DIL3, 2)),
        ),
        (
            *((MAX, 0), (MAX, 1)),
            *((SKIP, 2), (MAX, 1)),
            *((MAX, 0), (SKIP, 2)),
            *((SKIP, 2), (MAX, 1)),
        ),
    ),
    "PC_DARTS_CIFAR": (
        "PC-DARTS, searched on CIFAR-10",
        (
            *((SEP3, 1), (SKIP, 0)),
            *((SEP3, 0), (DIL3, 1)),
            *((SEP5, 0), (SEP3, 1)),
            *((AVG, 0), (DIL3, 1)),
        ),
        (
            *((SEP5, 1), (MAX, 0)),
            *((SEP5, 1), (SEP5, 2)),
            *((SEP3, 0), (SEP3, 3)),
            *((SEP3, 1), (SEP3, 2)),
        ),
    ),
    "PC_DARTS_IMAGE": (
        "PC-DARTS, searched on ImageNet",
        (
            *((SKIP, 1), (SEP3, 0)),
            *((SEP3, 0), (SKIP, 1)),
            *((SEP3, 1), (SEP3, 3)),
            *((SEP3, 1), (DIL5, 4)),
        ),
        (
            *((SEP3, 0), (SKIP, 1)),
            *((DIL5, 2), (MAX, 1)),
            *((SEP3, 2), (SEP3, 1)),
            *((SEP5, 0), (SEP3, 3)),
        ),
    ),
}

NAMES = tuple(_PUBLISHED)
"""Names that `named_genotype` knows."""


def named_genotype(name: str) -> Genotype:
    """Give a published genotype; its provenance holds the name and the source.

    Raises:
        UserError: if the name is unknown; it lists the known ones.
    """
    if name not in _PUBLISHED:
        raise UserError(f"genotype {name!r} is not a known name; known: {', '.join(NAMES)}")
    source, normal, reduce = _PUBLISHED[name]
    return Genotype(
        normal=cell_edges(normal),
        reduce=cell_edges(reduce),
        edge_policy="top2",
        provenance=(("name", name), ("source", source)),
    )
