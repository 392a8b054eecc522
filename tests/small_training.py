"""The smallest training that there is, from the command line: one cell without convolutions."""

from command_line import call_main

from cpnas_jax.architecture.genotype import Edge, Genotype

CELL = tuple(
    Edge(target=target, source=source, operation=operation)
    for target in range(2, 6)
    for source, operation in ((0, "max_pool_3x3"), (target - 1, "skip_connect"))
)
GENOTYPE = Genotype(normal=CELL, reduce=CELL, edge_policy="top2")
SMALL = (
    *("--config.network.cells=1", "--config.network.auxiliary=False"),
    *("--config.network.drop_path=0.0", "--config.train.center_weight=0.0"),
    *("--config.runtime.optimization_level=0", "--config.runtime.compilation_cache=False"),
)


class Command:
    """Calls main with what all calls share; later arguments win."""

    def __init__(self, monkeypatch, files):
        self.monkeypatch, self.files = monkeypatch, files

    def __call__(self, mode, workdir, *arguments):
        return call_main(
            self.monkeypatch,
            f"--config=configs/cifar10.py:{mode},smoke",
            f"--config.dataset.data_dir={self.files / 'data'}",
            f"--config.genotype={self.files / 'cells.json'}",
            *SMALL,
            f"--workdir={workdir}",
            *arguments,
        )


def refusal(command, capsys, mode, workdir, *arguments):
    """Make a call that must fail with one line; return the line."""
    capsys.readouterr()
    assert command(mode, workdir, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error
