import concurrent.futures
import itertools
import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cpnas_jax.architecture.genotype import from_architecture
from cpnas_jax.architecture.named import NAMES, named_genotype
from cpnas_jax.figures import (
    SHORT_NAMES,
    cell_tables,
    cells_figure,
    draw_cells,
    kind,
)
from cpnas_jax.models.space import CELL_TYPES, OPERATIONS

SVG = "{http://www.w3.org/2000/svg}"


def full():
    """14 edges a cell, all operations and the widest labels."""
    architecture = np.arange(28).reshape(2, 14) % 8
    architecture[1] = OPERATIONS.index("max_pool_3x3")
    return from_architecture(architecture)


def genotypes():
    return {name: named_genotype(name) for name in NAMES} | {"full": full()}


def labels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    names = set(SHORT_NAMES.values())
    return [
        (axes, text.get_window_extent(canvas.get_renderer()))
        for axes in figure.axes
        for text in axes.texts
        if text.get_text() in names
    ]


@pytest.mark.parametrize("name", genotypes())
def test_every_edge_has_its_label_in_the_svg(name, tmp_path):
    genotype = genotypes()[name]
    png, svg = draw_cells(genotype, tmp_path / "report")
    assert [path.name for path in (png, svg)] == ["cells.png", "cells.svg"]
    assert sorted(path.name for path in png.parent.iterdir()) == ["cells.png", "cells.svg"]
    assert png.read_bytes().startswith(b"\x89PNG")
    root = ElementTree.fromstring(svg.read_text())
    texts = Counter("".join(element.itertext()).strip() for element in root.iter(f"{SVG}text"))
    edges = [edge for _, edges in genotype.cells() for edge in edges]
    for operation, count in Counter(edge.operation for edge in edges).items():
        in_legend = operation == "none"
        in_legend |= SHORT_NAMES[operation] == "skip"
        assert texts[SHORT_NAMES[operation]] == count + in_legend
    groups = {element.get("id") for element in root.iter(f"{SVG}g")}
    for cell, cell_edges in genotype.cells():
        for edge in cell_edges:
            assert f"{cell}-{edge.source}-{edge.target}-{edge.operation}" in groups


@pytest.mark.parametrize("name", genotypes())
def test_no_label_overlaps_another(name):
    genotype = genotypes()[name]
    found = labels(cells_figure(genotype))
    assert len(found) == sum(len(edges) for _, edges in genotype.cells())
    for (axes, first), (other, second) in itertools.combinations(found, 2):
        assert axes is not other or not first.expanded(1.1, 1.2).overlaps(second)
    for axes, box in found:
        assert axes.bbox.contains(box.x0, box.y0)
        assert axes.bbox.contains(box.x1, box.y1)


def test_bytes_are_the_same_from_any_thread(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        drawn = list(
            pool.map(lambda n: draw_cells(full(), tmp_path / str(n)), range(3), timeout=120)
        )
    for paths in drawn[1:]:
        for path, first in zip(paths, drawn[0], strict=True):
            assert path.read_bytes() == first.read_bytes()
    assert "<dc:date>" not in drawn[0][1].read_text()


def test_kinds():
    kinds = {kind(operation) for operation in OPERATIONS}
    assert kinds == {"none", "pooling", "skip", "convolution"}
    assert kind("max_pool_3x3") == kind("avg_pool_3x3") == "pooling"
    assert set(SHORT_NAMES) == set(OPERATIONS)


def test_tables_list_every_edge_and_count():
    text = cell_tables(named_genotype("DDPNAS_XNOR_1"))
    assert "  node 0 = max_pool_3x3(c_{k-2}) + dil_conv_5x5(c_{k-1})\n" in text
    assert "  node 3 = dil_conv_3x3(c_{k-2}) + sep_conv_3x3(node 0)\n" in text
    assert "max_pool_3x3         4       1" in text
    assert "none" not in text
    for genotype in genotypes().values():
        text = cell_tables(genotype)
        table, _, counts = text.partition("\noperation ")
        assert max(map(len, text.splitlines())) <= 90
        for operation in OPERATIONS:
            total = [genotype.operation_counts()[cell][operation] for cell in CELL_TYPES]
            assert table.count(f"{operation}(") == sum(total)
            rows = [row.split()[1:] for row in counts.splitlines() if row.startswith(operation)]
            assert rows == ([[str(count) for count in total]] if any(total) else [])
