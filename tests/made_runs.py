"""Workdirs as runs leave them, made without training: the strategies are real, accuracies drawn."""

import json

import numpy as np

from cpnas_jax import config as configs
from cpnas_jax import config_keys, predictions
from cpnas_jax.architecture.events import epoch_line, sample_line, scores_line
from cpnas_jax.architecture.genotype import Genotype, from_architecture
from cpnas_jax.architecture.sampling import LAST_STAGE, all_survivors
from cpnas_jax.evaluate import Evaluation
from cpnas_jax.models.space import CHILD, PARENT
from cpnas_jax.strategies import gradient_rule, has_gradient, sampled_strategy, stored_rule

RECORD = {
    "command": "python -m cpnas_jax.main --config=configs/cifar10.py:search --workdir=runs/a",
    "versions": {"cpnas_jax": "0.1.0", "jax": "0.10.2"},
    "devices": ["cpu"],
    "backend": "cpu",
}


def sampled_lines(config, seed=0):
    """The log of a whole search of sampled paths."""
    strategy, generator = sampled_strategy(config), np.random.default_rng(seed)
    stage, survivors, lines = len(strategy.operations), all_survivors(strategy.operations), []
    while stage >= LAST_STAGE:
        alpha, state = strategy.begin_alpha()
        for t in range(1, strategy.rounds(stage) + 1):
            drawn = strategy.sample(stage, t, survivors)
            for s, architecture in enumerate(drawn, start=1):
                found = {model: float(generator.uniform()) for model in strategy.models}
                z = strategy.score(found)
                alpha, state = strategy.credit(alpha, state, architecture, z, t)
                lines.append(
                    sample_line(
                        stage=stage,
                        round_index=t,
                        sample=s,
                        architecture=architecture,
                        child_accuracy=found[CHILD],
                        parent_accuracy=found.get(PARENT),
                        z=z,
                        seconds=0.5,
                    )
                )
        scored = 0
        while not strategy.is_enough(stage, survivors, lines):
            scored += 1
            number = len(strategy.to_score(stage, scored, survivors))
            accuracy = generator.uniform(size=number)
            measures = {"child_accuracy": accuracy, "child_log_likelihood": accuracy - 1}
            lines.append(
                scores_line(stage=stage, round_index=scored, measures=measures, seconds=0.1)
            )
        alpha, state = strategy.end_alpha(alpha, state, lines)
        decision = strategy.decide(stage, alpha, survivors, lines)
        lines.append(decision.line)
        survivors = decision.survivors
        stage = int(survivors.sum(axis=-1).max())
    return lines


def gradient_lines(config, seed=0):
    """The log of a whole search by a gradient strategy."""
    rule, generator = gradient_rule(config), np.random.default_rng(seed)
    survivors, lines = all_survivors(rule.operations), []
    alpha = {cell: np.zeros((14, 8)) for cell in ("normal", "reduce")}
    if rule.edges:
        alpha |= {f"{cell}_edges": np.zeros(14) for cell in ("normal", "reduce")}
    for epoch in range(1, rule.epochs + 1):
        if epoch > rule.warmup:
            alpha = {n: leaf + generator.normal(size=leaf.shape) for n, leaf in alpha.items()}
        lines.append(
            epoch_line(
                epoch=epoch,
                accuracies={model: float(generator.uniform()) for model in rule.models},
                losses={},
                objective=0,
                alpha=alpha,
                seconds=2,
            )
        )
        if rule.ends_stage(epoch):
            decision = rule.decide(alpha, survivors)
            survivors = decision.survivors
            lines.append(decision.line)
    return lines


def search_lines(config):
    return gradient_lines(config) if has_gradient(config) else sampled_lines(config)


def metrics_lines(epochs, binary=True):
    return [
        {
            "event": "epoch",
            "epoch": n,
            "step": 10 * n,
            "loss": 2.3 / n,
            "cross_entropy": 2.2 / n,
            "auxiliary": 0.0,
            "reconstruction": 50.0 + n if binary else 0.0,
            "center": 0.1,
            "parent": 0.0,
            "accuracy": 1 - 0.9 / n,
            "learning_rate": 0.01 * (1 - n / epochs),
            "images_per_second": 100.0,
            "seconds": 3.0,
            **({"test_accuracy": 1 - 0.95 / n, "test_loss": 2.4 / n} if n % 2 == 0 else {}),
        }
        for n in range(1, epochs + 1)
    ]


def evaluation(classes, examples, seed=0):
    """Answers of which about four in five are right."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(examples) % classes).astype(np.int32)
    others = generator.integers(0, classes, examples)
    answers = np.where(generator.uniform(size=examples) < 0.8, labels, others).astype(np.int32)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, answers), 1)
    return Evaluation(
        examples=examples,
        top1=float((labels == answers).mean()),
        top5=0.9 if classes > 5 else None,
        loss=0.7,
        confusion=confusion,
        answers=answers,
        labels=labels,
        confidences=generator.uniform(0.2, 1, examples).astype(np.float32),
    )


class Images:
    """What `predictions.encoded` asks of a feed."""

    def __init__(self, size, channels):
        self.shape = (size, size, channels)

    def test_images(self, rows):
        noise = np.random.default_rng(0).integers(0, 256, (len(rows), *self.shape), np.uint8)
        return noise


SUMMARY = {
    "parameters": {"total": 71770, "binary": 61488, "float": 10282},
    "memory_bytes": {"packed": 48814.0, "float": 287080.0},
    "compression": 5.5,
    "macs": {"binary": 2651136, "binary_depthwise": 612480, "float": 87232},
    "ops": 138226.0,
    "layers": [{"name": "stem/conv0", "kind": "Convolution", "output_shape": [14, 14, 48]}],
}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def put_config(workdir, config, phases=("search",)):
    workdir.mkdir(parents=True, exist_ok=True)
    stored = {"config": config_keys.flatten(config), **dict.fromkeys(phases, RECORD)}
    (workdir / "config.json").write_text(json.dumps(stored))


def put_search(workdir, config, lines=None, finished=True):
    """A search, whose genotype is what its last line leaves."""
    put_config(workdir, config)
    lines = search_lines(config) if lines is None else lines
    write_lines(workdir / "search/history.jsonl", lines)
    if not finished:
        return
    # Any genotype will do for a page; of every operation one is there.
    genotype = from_architecture(np.arange(28).reshape(2, 14) % 8)
    genotype.save(workdir / "genotype.json")
    results = {"search": {"seconds": 17.5, "restored": [], "limited": [], "flops": 1e12}}
    (workdir / "results.json").write_text(json.dumps(results))


def put_training(workdir, name, class_names, *, examples=60, size=8, channels=3, epochs=6):
    """A finished and evaluated training, in a workdir with a config."""
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**config, name: RECORD}))
    write_lines(workdir / name / "metrics.jsonl", metrics_lines(epochs, name == "train"))
    found = evaluation(len(class_names), examples)
    file = workdir / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[name] = {
        "epochs": epochs,
        "split": "test",
        "seconds": 18.0,
        "test": {"top1": found.top1},
        "best_test_accuracy": found.top1 + 0.01,
        "best_epoch": 2,
    }
    file.write_text(json.dumps(results))
    value = {"split": "test", "checkpoint": "last", "epoch": epochs, "undecodable": 0}
    value |= {"class_names": list(class_names), **found.to_dict()}
    (workdir / name / "evaluation.json").write_text(json.dumps(value))
    data = predictions.encoded(found, Images(size, channels))
    (workdir / name / predictions.NAME).write_bytes(data)
    Genotype.load(workdir / "genotype.json").save(workdir / name / "genotype.json")


def whole_run(workdir, rounds=1, class_names=tuple("0123456789"), **sizes):
    """Everything that a pipeline leaves for a report."""
    config = configs.base_config()
    config.search.rounds = rounds
    put_search(workdir, config)
    for name in ("train", "parent"):
        put_training(workdir, name, class_names, **sizes)
    (workdir / "summary.json").write_text(json.dumps(SUMMARY))
    assert stored_rule(config_keys.flatten(config)).total == 35 * rounds
    return workdir
