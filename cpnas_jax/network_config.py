"""The discrete network that a config makes of a genotype."""

import dataclasses
from typing import Any

from ml_collections import config_dict

from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.models.binarize import Binarizer
from cpnas_jax.models.blocks import Levers, OperationSettings
from cpnas_jax.models.network import CellEdges, NetworkSettings


def network_settings(
    config: config_dict.ConfigDict, genotype: Genotype, num_classes: int, *, binary: bool
) -> NetworkSettings:
    """Return the network of a config and a genotype, as child or as parent."""
    net = config.network

    def edges(cell: Any) -> CellEdges:
        return tuple((edge.source, edge.target, edge.operation) for edge in cell)

    levers = {field.name: net[field.name] for field in dataclasses.fields(Levers)}
    return NetworkSettings(
        normal=edges(genotype.normal),
        reduce=edges(genotype.reduce),
        cells=net.cells,
        channels=net.channels,
        num_classes=num_classes,
        stem=net.stem,
        auxiliary=net.auxiliary,
        binary=binary,
        recompute=net.recompute,
        operations=OperationSettings(
            binarizer=Binarizer(**config.binarizer.to_dict()),
            formulation=config.runtime.formulation,
            separable_repeats=net.separable_repeats,
            binary_preprocess=net.binary_preprocess,
            normalize_pools=net.normalize_pools,
            levers=Levers(**levers) if binary else Levers(),
        ),
    )
