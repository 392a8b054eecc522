"""Genotypes in the notation of the DARTS code base, out and in.

    Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), reduce=[...], ...)

Entries stand in the order of their target node: two for each node (8 a cell, policy `top2`) or
one from every earlier node (14 a cell, policy `all`). The number is the source node.
"""

import ast
import os
import warnings
from collections.abc import Sequence
from typing import Any

from cpnas_jax.architecture.genotype import Edge, EdgePolicy, Genotype, read_text
from cpnas_jax.models.space import EDGES, NUM_INPUTS, NUM_NODES
from cpnas_jax.runtime.errors import UserError

_CONCAT = tuple(range(NUM_INPUTS, NUM_NODES))
_POLICIES: dict[int, EdgePolicy] = {8: "top2", 14: "all"}
_FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
# Far more than a genotype needs, and it bounds what the parser may be given.
_MAX_LENGTH = 20_000


def cell_edges(entries: Sequence[tuple[str, int]]) -> tuple[Edge, ...]:
    """Give the edges of a cell from its (operation, source) entries.

    Args:
        entries: 8 or 14 entries in the order of their target nodes.

    Raises:
        ValueError: on another number of entries, or an edge that does not exist.
    """
    if len(entries) not in _POLICIES:
        raise ValueError(f"a cell has {len(entries)} entries; it must be 8 (top2) or 14 (all)")
    if len(entries) == len(EDGES):
        targets = [target for _, target in EDGES]
    else:
        targets = [node for node in range(NUM_INPUTS, NUM_NODES) for _ in range(2)]
    return tuple(
        Edge(target=target, source=source, operation=operation)
        for (operation, source), target in zip(entries, targets, strict=True)
    )


def to_darts(genotype: Genotype) -> str:
    """Write a genotype in DARTS notation, in one line; its provenance is left out."""
    parts = []
    for cell, edges in genotype.cells():
        parts.append(f"{cell}={[(edge.operation, edge.source) for edge in edges]!r}")
        parts.append(f"{cell}_concat=range({NUM_INPUTS}, {NUM_NODES})")
    return f"Genotype({', '.join(parts)})"


def from_darts(text: str, name: str = "DARTS notation") -> Genotype:
    """Read DARTS notation, with or without a leading `NAME =`. Nothing in it is executed.

    Args:
        text: the expression; the concat may be `range(2, 6)` or a list.
        name: what an error calls it.

    Raises:
        UserError: in one line, with the name, the value found and what would be right.
    """
    try:
        fields = _fields(_parse(text))
        cells = {cell: _entries(cell, fields[cell]) for cell in ("normal", "reduce")}
        for cell in cells:
            _check_concat(cell, fields[f"{cell}_concat"])
        if len(cells["normal"]) != len(cells["reduce"]):
            raise ValueError(
                f"normal has {len(cells['normal'])} entries and reduce {len(cells['reduce'])}; "
                "both must have 8 (top2) or both 14 (all)"
            )
        normal, reduce = cell_edges(cells["normal"]), cell_edges(cells["reduce"])
        return Genotype(normal=normal, reduce=reduce, edge_policy=_POLICIES[len(normal)])
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def load_genotype(path: str | os.PathLike[str]) -> Genotype:
    """Read a genotype file, whether it has our JSON or DARTS' notation.

    Raises:
        UserError: it cannot be read or is damaged.
    """
    text, name = read_text(path), os.fspath(path)
    is_json = text.lstrip()[:1] in ("{", "[", "")
    return Genotype.from_json(text, name) if is_json else from_darts(text, name)


def _parse(text: str) -> ast.expr:
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"{len(text)} characters; a genotype has at most {_MAX_LENGTH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else type(error).__name__
        raise ValueError(
            f"not readable ({reason}); it must be Genotype(normal=[...], ...)"
        ) from None
    statement = body[0] if len(body) == 1 else None
    if isinstance(statement, ast.Expr | ast.Assign) and statement.value is not None:
        return statement.value
    raise ValueError(f"{len(body)} statements; it must be one Genotype(...) expression")


def _fields(node: ast.expr) -> dict[str, ast.expr]:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
    if not isinstance(node, ast.Call) or called != "Genotype" or node.args:
        raise ValueError(f"{_shown(node)}; it must be Genotype(normal=[...], ...)")
    names = [str(keyword.arg) for keyword in node.keywords]
    if sorted(names) != sorted(_FIELDS):
        raise ValueError(
            f"Genotype has the fields {', '.join(names) or 'none'}; it must be {', '.join(_FIELDS)}"
        )
    return {str(keyword.arg): keyword.value for keyword in node.keywords}


def _entries(cell: str, node: ast.expr) -> list[tuple[str, int]]:
    if not isinstance(node, ast.List | ast.Tuple):
        raise ValueError(f"{cell} is {_shown(node)}; it must be a list of ('operation', source)")
    entries = []
    for element in node.elts:
        items = element.elts if isinstance(element, ast.List | ast.Tuple) else []
        values = [item.value if isinstance(item, ast.Constant) else None for item in items]
        if [type(value) for value in values] != [str, int]:
            raise ValueError(
                f"{cell} has the entry {_shown(element)}; it must be ('operation', source)"
            )
        entries.append((values[0], values[1]))
    return entries  # type: ignore[return-value]


def _check_concat(cell: str, node: ast.expr) -> None:
    items: list[Any] = []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        bounds = [arg.value if isinstance(arg, ast.Constant) else None for arg in node.args]
        # Compared, not evaluated: range(2, 10**12) must not be made.
        items = list(_CONCAT) if bounds == [NUM_INPUTS, NUM_NODES] and not node.keywords else []
    elif isinstance(node, ast.List | ast.Tuple):
        items = [item.value if isinstance(item, ast.Constant) else None for item in node.elts]
    if tuple(items) != _CONCAT:
        raise ValueError(
            f"{cell}_concat is {_shown(node)}; it must be range({NUM_INPUTS}, {NUM_NODES}), "
            "as a cell's output is all its intermediate nodes"
        )


def _shown(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 60 else text[:57] + "..."
