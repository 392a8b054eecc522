"""Genotype: the two cells a search ends with, as a value and as a JSON file."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import numpy as np

from cpnas_jax.models.space import (
    CELL_TYPES,
    EDGES,
    NUM_EDGES,
    NUM_INPUTS,
    NUM_NODES,
    OPERATIONS,
)
from cpnas_jax.runtime.atomic import write_atomically
from cpnas_jax.runtime.errors import UserError, shown
from cpnas_jax.runtime.paths import user_path

EdgePolicy: TypeAlias = Literal["all", "top2"]
EDGE_POLICIES: tuple[EdgePolicy, ...] = ("all", "top2")
"""`all` keeps the 14 edges of a cell, `top2` two for each of its 4 nodes."""

Scalar: TypeAlias = str | int | float | bool | None
CellIndicator: TypeAlias = tuple[tuple[tuple[str, float], ...], ...]
"""For each of the 14 edges the (operation, e) pairs of the operations compared in a stage."""

FORMAT = "cpnas_jax.genotype"
VERSION = 1


@dataclasses.dataclass(frozen=True, order=True)
class Edge:
    """An operation from one node of a cell to a later one.

    Nodes 0 and 1 are the outputs of the two previous cells, 2 to 5 the intermediate nodes. Edges
    are ordered by target, then source, as `EDGES` is.
    """

    target: int
    source: int
    operation: str

    def __post_init__(self) -> None:
        for name, value in (("source", self.source), ("target", self.target)):
            if type(value) is not int:
                raise ValueError(f"{name} of an edge is {value!r}; it must be an integer")
        if (self.source, self.target) not in EDGES:
            raise ValueError(
                f"there is no edge {self.source}->{self.target}; target must be {NUM_INPUTS} to "
                f"{NUM_NODES - 1} and source from 0 to target - 1"
            )
        if self.operation not in OPERATIONS:
            raise ValueError(
                f"edge {self.source}->{self.target} has the unknown operation "
                f"{self.operation!r}; known: {', '.join(OPERATIONS)}"
            )


@dataclasses.dataclass(frozen=True)
class Genotype:
    """The result of a search: the edges of the normal and of the reduction cell.

    It is checked when it is made, a ValueError telling in one line what is wrong, and cannot be
    changed. Edges are put in the order of `EDGES`. Equality and hash look at the cells and the
    policy only, since those decide the network (and the program compiled for it).

    Attributes:
        normal: edges of the normal cell.
        reduce: edges of the reduction cell.
        edge_policy: `all`, 14 edges a cell, or `top2`, 8 edges a cell, none of them `none`.
        indicator: e of eq. 4.16 in the last stage for both cells, when a search made it.
        provenance: sorted (key, value) pairs that tell where it comes from: config_hash, seed,
            dataset and the like; `dict(genotype.provenance)` is the mapping.
    """

    normal: tuple[Edge, ...]
    reduce: tuple[Edge, ...]
    edge_policy: EdgePolicy
    indicator: tuple[CellIndicator, CellIndicator] | None = dataclasses.field(
        default=None, compare=False
    )
    provenance: tuple[tuple[str, Scalar], ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.edge_policy not in EDGE_POLICIES:
            raise ValueError(
                f"edge_policy is {self.edge_policy!r}; it must be one of {', '.join(EDGE_POLICIES)}"
            )
        for cell in CELL_TYPES:
            edges = tuple(sorted(getattr(self, cell)))
            _check_cell(cell, edges, self.edge_policy)
            object.__setattr__(self, cell, edges)
        if self.indicator is not None:
            _check_indicator(self.indicator)
        _check_provenance(self.provenance)
        # Sorted by key alone: two values need not be comparable.
        object.__setattr__(
            self, "provenance", tuple(sorted(self.provenance, key=lambda pair: pair[0]))
        )

    def cells(self) -> tuple[tuple[str, tuple[Edge, ...]], ...]:
        """Give (cell type, edges) in the order of `CELL_TYPES`."""
        return tuple((cell, getattr(self, cell)) for cell in CELL_TYPES)

    def architecture(self) -> np.ndarray:
        """Give the genotype as int32[2, 14]; an edge it does not keep is `none`."""
        positions = np.full((len(CELL_TYPES), NUM_EDGES), OPERATIONS.index("none"), np.int32)
        for row, (_, edges) in enumerate(self.cells()):
            for edge in edges:
                column = EDGES.index((edge.source, edge.target))
                positions[row, column] = OPERATIONS.index(edge.operation)
        return positions

    def operation_counts(self) -> dict[str, dict[str, int]]:
        """Count the edges of each operation: {cell type: {operation: count}}, zeros included."""
        return {
            cell: {name: sum(edge.operation == name for edge in edges) for name in OPERATIONS}
            for cell, edges in self.cells()
        }

    def to_json(self) -> str:
        """Give the text of a genotype file; one edge a line, ends with a newline."""
        lines = [f'  "format": "{FORMAT}"', f'  "version": {VERSION}']
        lines.append(f'  "edge_policy": "{self.edge_policy}"')
        for cell, edges in self.cells():
            rows = [
                {"source": edge.source, "target": edge.target, "operation": edge.operation}
                for edge in edges
            ]
            lines.append(_json_rows(cell, rows, "  "))
        if self.indicator is not None:
            tables = [
                _json_rows(cell, [dict(edge) for edge in table], "    ")
                for cell, table in zip(CELL_TYPES, self.indicator, strict=True)
            ]
            lines.append('  "indicator": {\n' + ",\n".join(tables) + "\n  }")
        lines.append(f'  "provenance": {json.dumps(dict(self.provenance))}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, name: str = "genotype") -> "Genotype":
        """Read what `to_json` wrote, or a person by hand; indicator and provenance may be absent.

        Args:
            text: JSON.
            name: what an error calls it, such as the file's path.

        Raises:
            UserError: in one line, with the name, the value found and what would be right.
        """
        try:
            return _from_data(json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{name}: not JSON ({error.msg}, line {error.lineno} column {error.colno}); "
                "it must be a whole genotype file"
            ) from error
        except RecursionError as error:
            raise UserError(f"{name}: nested too deeply to be a genotype file") from error
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the genotype file, under a temporary name that is renamed at the end."""
        write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Genotype":
        """Read a genotype file.

        Raises:
            UserError: if it cannot be read or is damaged.
        """
        return cls.from_json(read_text(path), os.fspath(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a genotype file.

    Raises:
        UserError: it cannot be read.
    """
    name = os.fspath(path)
    try:
        return user_path("genotype", path).read_bytes().decode()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{name}: cannot be read ({reason}); give a genotype file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text; give a genotype file") from error


def from_architecture(architecture: np.ndarray) -> Genotype:
    """Make the genotype with policy `all` of an architecture int[2, 14].

    Raises:
        ValueError: if a node has only `none` edges.
    """
    normal, reduce = (
        tuple(
            Edge(target=target, source=source, operation=OPERATIONS[operation])
            for (source, target), operation in zip(EDGES, cell, strict=True)
        )
        for cell in np.asarray(architecture)
    )
    return Genotype(normal=normal, reduce=reduce, edge_policy="all")


def indicator_pairs(
    indicator: np.ndarray, survivors: np.ndarray
) -> tuple[CellIndicator, CellIndicator]:
    """Give an indicator f[2, 14, 8] in the form of `Genotype.indicator`.

    Args:
        indicator: f[2, 14, 8], e of eq. 4.16.
        survivors: bool[2, 14, 8], the operations that were compared.
    """
    normal, reduce = (
        tuple(
            tuple((OPERATIONS[k], float(values[k])) for k in np.flatnonzero(mask))
            for values, mask in zip(cell, masks, strict=True)
        )
        for cell, masks in zip(indicator, survivors, strict=True)
    )
    return normal, reduce


def _check_cell(cell: str, edges: tuple[Edge, ...], policy: str) -> None:
    pairs = [(edge.source, edge.target) for edge in edges]
    for source, target in pairs:
        if pairs.count((source, target)) > 1:
            raise ValueError(f"{cell} cell: edge {source}->{target} is given twice")
    for node in range(NUM_INPUTS, NUM_NODES):
        incoming = [edge for edge in edges if edge.target == node]
        expected = node if policy == "all" else 2
        if len(incoming) != expected:
            sources = [edge.source for edge in incoming]
            raise ValueError(
                f"{cell} cell: node {node} has {len(incoming)} edges (sources {sources}); "
                f"policy {policy} needs {expected}"
            )
    for node in range(NUM_INPUTS, NUM_NODES):
        incoming = [edge for edge in edges if edge.target == node]
        if all(edge.operation == "none" for edge in incoming):
            raise ValueError(
                f"{cell} cell: node {node} is dead, all its edges are 'none'; "
                "at least one must be another operation"
            )
        for edge in incoming:
            if policy == "top2" and edge.operation == "none":
                raise ValueError(
                    f"{cell} cell: edge {edge.source}->{node} is 'none'; "
                    "policy top2 keeps edges with another operation only"
                )


def _check_indicator(indicator: tuple[CellIndicator, CellIndicator]) -> None:
    if len(indicator) != len(CELL_TYPES):
        raise ValueError(f"indicator has {len(indicator)} cells; it must have {len(CELL_TYPES)}")
    for cell, table in zip(CELL_TYPES, indicator, strict=True):
        if len(table) != NUM_EDGES:
            raise ValueError(f"indicator of {cell} has {len(table)} edges; it must be {NUM_EDGES}")
        for number, pairs in enumerate(table):
            where = f"indicator of {cell}, edge {number}"
            for operation, value in pairs:
                if operation not in OPERATIONS:
                    raise ValueError(
                        f"{where}: unknown operation {operation!r}; known: {', '.join(OPERATIONS)}"
                    )
                if type(value) not in (int, float) or not 0 <= value <= 1:
                    raise ValueError(
                        f"{where}: {operation} is {value!r}; it must be a number in [0, 1]"
                    )
            total = math.fsum(value for _, value in pairs)
            if abs(total - 1) > 1e-3:
                raise ValueError(f"{where}: the values add up to {total:.6g}; it must be 1")


def _check_provenance(provenance: Iterable[tuple[str, Scalar]]) -> None:
    for key, value in provenance:
        if type(key) is not str:
            raise ValueError(f"provenance has the key {key!r}; it must be text")
        finite = type(value) is not float or math.isfinite(value)
        if not (value is None or type(value) in (str, int, float, bool)) or not finite:
            raise ValueError(
                f"provenance {key!r} is {value!r}; it must be text, a finite number, a truth "
                "value or null"
            )


def _json_rows(key: str, rows: list[dict[str, Any]], margin: str) -> str:
    body = ",\n".join(f"{margin}  {json.dumps(row)}" for row in rows)
    return f'{margin}"{key}": [\n{body}\n{margin}]'


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of equal keys in silence.
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} is given twice")
    return dict(pairs)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number; all numbers must be finite")


def _expect_keys(value: Any, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}; it must be an object")
    for key in sorted(required - value.keys()):
        raise ValueError(f"{where} has no key {key!r}; it must have one")
    for key in sorted(value.keys() - required - optional):
        known = ", ".join(sorted(required | optional))
        raise ValueError(f"{where} has the unknown key {key!r}; known: {known}")
    return value


def _expect_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {shown(value)}; it must be a list")
    return value


def _from_data(data: Any) -> Genotype:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else data
        raise ValueError(f"format is {shown(found)}; it must be {FORMAT!r}")
    # Before the keys: another version may have other keys.
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise ValueError(f"version is {shown(data.get('version'))}; it must be {VERSION}")
    _expect_keys(
        data,
        "genotype",
        {"format", "version", "edge_policy", *CELL_TYPES},
        {"indicator", "provenance"},
    )
    cells = {}
    for cell in CELL_TYPES:
        rows = [
            _expect_keys(row, f"edge {n} of {cell}", {"source", "target", "operation"}, set())
            for n, row in enumerate(_expect_list(data[cell], cell))
        ]
        try:
            cells[cell] = tuple(Edge(**row) for row in rows)
        except ValueError as error:
            raise ValueError(f"{cell} cell: {error}") from error
    provenance = data.get("provenance", {})
    if not isinstance(provenance, dict):
        raise ValueError(f"provenance is {shown(provenance)}; it must be an object")
    return Genotype(
        normal=cells["normal"],
        reduce=cells["reduce"],
        edge_policy=data["edge_policy"],
        indicator=_indicator_from_data(data.get("indicator")),
        provenance=tuple(provenance.items()),
    )


def _indicator_from_data(data: Any) -> tuple[CellIndicator, CellIndicator] | None:
    if data is None:
        return None
    tables = _expect_keys(data, "indicator", set(CELL_TYPES), set())
    normal, reduce = (
        tuple(
            tuple(_expect_keys(edge, f"edge {n} of indicator {cell}", set(), {*OPERATIONS}).items())
            for n, edge in enumerate(_expect_list(tables[cell], f"indicator of {cell}"))
        )
        for cell in CELL_TYPES
    )
    return normal, reduce
