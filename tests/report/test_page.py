"""The report of runs of every kind, from their files alone."""

import dataclasses
import html
import html.parser
import json
import re
import shutil
import time
import xml.etree.ElementTree as ElementTree

import made_runs
import numpy as np
import pytest

from cpnas_jax import config as configs
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.notation import to_darts
from cpnas_jax.models.space import EDGES, OPERATIONS
from cpnas_jax.report import contents, page, searching
from cpnas_jax.report.answers import MOST_CLASSES
from cpnas_jax.runtime.errors import UserError

VOID = {"meta", "link", "img", "br", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """The elements of a page; what is opened must be closed in its order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]

    def values(self, name):
        return [a[name] for _, a in self.elements if a.get(name) is not None]


def report(workdir):
    paths = page.write_report(workdir)
    assert paths[0].name == "report.html"
    return Page(paths[0].read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole run and its page; to be read only."""
    workdir = made_runs.whole_run(tmp_path_factory.mktemp("made") / "run")
    return workdir, report(workdir)


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run", ignore=shutil.ignore_patterns("*.svg"))


def check_self_contained(found):
    """Nothing is loaded, every anchor has its target, no id is given twice."""
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    for link in found.values("href"):
        assert link.startswith(("#", "data:")) or re.fullmatch(r"\w+\.svg", link)
        assert not link.startswith("#") or link[1:] in ids
    for value in found.values("clip-path") + found.values("fill"):
        assert "url(" not in value or re.fullmatch(r"url\(#(.*)\)", value)[1] in ids
    assert all(source.startswith("data:image/png;base64,") for source in found.values("src"))
    assert not found.all("script")
    assert not found.values("onclick")
    assert all(image["alt"] for image in found.all("img"))
    for name in found.values("aria-labelledby"):
        assert name in ids


def test_a_whole_run(made):
    workdir, found = made
    check_self_contained(found)
    for words in (
        "finished after 35 sampled epochs",
        "The 1-bit child is trained (6 epochs). The float parent is trained (6 epochs).",
        "Every decision below was computed again from the log",
        "61,488 of them of one bit",
        made_runs.RECORD["command"],
        "Got wrong, the surest first",
        "digraph genotype",
        "Genotype(normal=[",
    ):
        assert words in found.text
    assert {a["id"] for t, a in found.elements if t == "h2"} == {
        *("cells", "search", "film", "training", "answers", "model", "cost", "run", "commands")
    }
    assert len([t for t in found.all("table") if t.get("class") == "matrix"]) == 2
    for name in ("cells", "accuracies", "operations", "training", "film"):
        root = ElementTree.parse(workdir / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_every_value_of_the_log_is_on_the_page(made):
    """The tables of the edges, against the lines of the log."""
    workdir, _ = made
    text = (workdir / "report.html").read_text()
    tables = re.findall(r'<div class="film">(.*?)</div>', text, re.DOTALL)
    lines = [
        json.loads(line) for line in (workdir / "search/history.jsonl").read_text().splitlines()
    ]
    stages = [line for line in lines if line["event"] == "stage"]
    assert len(stages) == 7
    for row, (cell, edges) in enumerate(zip(("normal", "reduce"), tables, strict=True)):
        captioned = edges.split("<table>")[1:]
        assert len(captioned) == 14
        for edge, table in enumerate(captioned):
            boxes = [
                re.findall(r"<td(.*?)>(.*?)</td>", line) for line in table.split("<tr class")[1:]
            ]
            for column, stage in enumerate(stages):
                shown = [box[column] for box in boxes]
                values = stage["indicator"][cell][edge]
                written = [f"{value:.3f}".replace("0.", ".", 1) for value in values.values()]
                assert [text for _, text in shown if text] == written
                dropped = [n for n, (attributes, _) in enumerate(shown) if "drop" in attributes]
                assert len(dropped) == 1
                name = stage["dropped"][row][edge]
                assert shown[dropped[0]][1] == f"{values[name]:.3f}".replace("0.", ".", 1)


@pytest.mark.parametrize("strategy", ["cp", "child", "cp_plus", "random_search", "random"])
@pytest.mark.parametrize("part", [1.0, 0.6])
def test_searches_of_sampled_paths(tmp_path, strategy, part):
    config = configs.base_config()
    operations = ("none", "skip_connect", "max_pool_3x3", "sep_conv_3x3")
    config.search.update(strategy=strategy, rounds=1, operations=operations, max_scored=24)
    config.search.update(candidates=2)
    lines = made_runs.sampled_lines(config)
    kept = lines[: max(1, int(len(lines) * part))]
    finished = len(kept) == len(lines)
    made_runs.put_search(tmp_path, config, kept, finished=finished)
    found = report(tmp_path)
    check_self_contained(found)
    assert ("not finished" in found.text) != finished
    assert "could not be confirmed" not in found.text
    assert ("was computed again from the log" in found.text) == (strategy != "cp_plus")
    assert ("accuracies.svg" in found.values("href")) == (strategy != "random")
    sampled = sum(line["event"] == "sample" for line in kept)
    if sampled:
        assert f"{sampled} sampled epochs" in found.text or f"{sampled} of" in found.text


@pytest.mark.parametrize("strategy", ["darts", "pc_darts", "cp_gradient"])
@pytest.mark.parametrize("epochs", [None, 3])
def test_gradient_searches(tmp_path, strategy, epochs):
    config = configs.base_config()
    config.search.update(strategy=strategy, epochs=24, alpha_warmup=2)
    lines = made_runs.gradient_lines(config)[:epochs]
    made_runs.put_search(tmp_path, config, lines, finished=epochs is None)
    found = report(tmp_path)
    check_self_contained(found)
    assert "the softmax of alpha" in found.text
    assert ("What each stage dropped" in found.text) == (strategy == "cp_gradient" and not epochs)


@pytest.mark.parametrize("examples", [1, 3])
def test_a_search_of_a_few_epochs(tmp_path, examples):
    config = configs.base_config()
    lines = made_runs.sampled_lines(config)[:examples]
    made_runs.put_search(tmp_path, config, lines, finished=False)
    found = report(tmp_path)
    assert f"not finished , {examples} of 105 sampled epochs done" in found.text


def test_a_run_that_has_only_begun(tmp_path):
    made_runs.put_config(tmp_path, configs.base_config())
    found = report(tmp_path)
    check_self_contained(found)
    assert "Nothing is finished yet" in found.text
    assert "seed 0, that has begun." in found.text
    assert "found elsewhere" not in found.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "report.html"]


def test_a_line_that_a_kill_cut_off_is_left_out(run):
    file = run / "search/history.jsonl"
    with file.open("a") as log:
        log.write('{"event": "sam')
    assert "finished after 35" in report(run).text


def test_an_inconsistent_log_is_told(run):
    file = run / "search/history.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[3]["z"] += 0.5
    made_runs.write_lines(file, lines)
    found = report(run)
    assert "The log could not be confirmed: history.jsonl, line 4: z is" in found.text
    assert "Every decision below was computed again" not in found.text


def test_what_is_written_by_others_is_text(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    workdir = made_runs.whole_run(tmp_path / "a<b>&c", class_names=(evil, "b", "c"))
    config = json.loads((workdir / "config.json").read_text())
    config["config"]["dataset.data_dir"] = evil
    config["search"] = {**config["search"], "devices": [evil], "command": evil}
    (workdir / "config.json").write_text(json.dumps(config))
    found = report(workdir)
    check_self_contained(found)
    assert evil in found.text
    assert "a<b>&c" in found.text
    assert any(evil in image["alt"] for image in found.all("img"))


def test_many_classes_have_no_matrix_but_the_worst(tmp_path):
    names = tuple(f"n{number:04}" for number in range(1000))
    workdir = made_runs.whole_run(tmp_path / "run", class_names=names, examples=5000, size=224)
    found = report(workdir)
    check_self_contained(found)
    assert "Confusion matrix" not in found.text
    assert f"The {MOST_CLASSES} worst of 1000 classes" in found.text
    assert "Most frequent confusions" in found.text
    assert (workdir / "report.html").stat().st_size < 3e6
    evaluation = json.loads((workdir / "train/evaluation.json").read_text())
    confusion = np.array(evaluation["confusion"])
    np.fill_diagonal(confusion, 0)
    label, answer = np.unravel_index(confusion.argmax(), confusion.shape)
    assert f"{names[label]} {names[answer]} {confusion.max()} " in found.text


def test_a_long_history_is_quick_and_small(tmp_path):
    workdir = made_runs.whole_run(tmp_path / "run", rounds=3, examples=10_000, size=32, epochs=600)
    before = time.process_time()
    page.write_report(workdir)
    assert time.process_time() - before < 10
    assert (workdir / "report.html").stat().st_size < 3e6


def test_the_same_files_give_the_same_page(run):
    first = {path: (path.read_bytes(), path.stat().mtime) for path in page.write_report(run)}
    second = {path: (path.read_bytes(), path.stat().mtime) for path in page.write_report(run)}
    assert first == second


def test_an_older_run_without_its_command_and_answers(run):
    config = json.loads((run / "config.json").read_text())
    for name in ("search", "train", "parent"):
        del config[name]["command"]
    config["config"]["search.rounds"] = 1
    (run / "config.json").write_text(json.dumps(config))
    for name in ("train", "parent"):
        (run / name / "predictions.npz").unlink()
    found = report(run)
    assert f"--config=configs/cifar10.py:search --workdir={run}" in found.text
    assert "--config.search.rounds=1" in found.text
    assert "Single answers were not kept" in found.text
    assert not found.all("img")


def test_a_phase_does_not_fail_with_its_report(run, capsys):
    (run / "results.json").write_text("{")
    with page.Reporter() as reporter:
        page.refresh(run, reporter)
    assert "warning: report.html is not written: " in capsys.readouterr().out
    (run / "results.json").unlink()
    with page.Reporter() as reporter:
        page.refresh(run, reporter)
    assert f"Wrote {run}/report.html." in capsys.readouterr().out


def test_there_must_be_a_run(tmp_path):
    with pytest.raises(UserError, match=f"there is no --workdir={tmp_path}/none"):
        page.write_report(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no run: there is no config\.json"):
        page.write_report(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is no directory"):
        page.write_report(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
    assert not list((tmp_path / "empty").iterdir())


def changed(key, value):
    def change(text):
        stored = json.loads(text)
        target = stored
        *path, last = key.split("/")
        for part in path:
            target = target[part]
        target[last] = value
        return json.dumps(stored)

    return change


LINE = re.compile(r"\n.*\n")

DAMAGES = {
    "config.json": [
        (lambda text: text[:40], "is damaged .* is not JSON"),
        (lambda _: "[1]", r"is damaged \(\[1\] is no JSON object"),
        (changed("config", 5), "config is 5; it must be an object"),
        (changed("config/seed", "x"), "config.seed is 'x'; it must be an integer"),
        (changed("train", []), r"train is \[\]; it must be an object"),
    ],
    "results.json": [
        (lambda text: text[:-3], "is damaged"),
        (changed("train", 5), "train is 5; it must be an object"),
        (changed("train/seconds", "x"), "train: seconds is 'x'; it must be a finite number"),
        (changed("parent/test", {"top1": None}), "parent: top1 is None"),
        (changed("search", [1]), r"search is \[1\]; it must be an object"),
    ],
    "search/history.jsonl": [
        (lambda text: LINE.sub("\nnonsense\n", text, 1), "line 2: 'nonsense' is not JSON"),
        (lambda text: LINE.sub("\n[1]\n", text, 1), "line 2: .* is not a JSON object"),
        (lambda text: LINE.sub('\n{"event": "x"}\n', text, 1), "line 2: event is 'x'; it must"),
        (
            lambda text: text.replace('"child_accuracy": 0', '"child_accuracy": 9', 1),
            r"line 1: child_accuracy is 9\..*; it must be a number in \[0, 1\]",
        ),
    ],
    "train/metrics.jsonl": [
        (lambda text: LINE.sub("\n{}\n", text, 1), "line 2: epoch is None; it must be a finite"),
        (lambda text: text.replace('"center": 0.1', '"center": "x"', 1), "line 1: center is 'x'"),
    ],
    "train/evaluation.json": [
        (changed("confusion", [[1]]), "confusion is .*; it must be 10 rows of 10 counts"),
        (changed("class_names", "abc"), "class_names is 'abc'; it must be a list of names"),
        (changed("top1", True), "top1 is True; it must be a finite number"),
    ],
    "summary.json": [
        (changed("ops", None), "ops is None"),
        (changed("macs", 3), "macs is 3; it must be an object"),
        (changed("layers", 3), "layers is 3; it must be a list of objects"),
    ],
    "genotype.json": [(lambda _: "{}", "format is None")],
}


def test_what_was_taken_back_is_told(run):
    """An edge that the search left with `none`, and the cells have with what was dropped last."""
    genotype = Genotype.load(run / "genotype.json")
    frames = searching.frames_of(contents.read_contents(run))
    assert frames[-1].dropped[0].sum(axis=-1).tolist() == [1] * len(EDGES)
    last = frames[-1].dropped[0].argmax(axis=-1)
    own = {(e.source, e.target): e for e in genotype.normal}
    for column, place in enumerate(EDGES):
        if place not in own:
            continue
        left = OPERATIONS[frames[-1].left[0, column].argmax()]
        taken = dataclasses.replace(own[place], operation=OPERATIONS[last[column]])
        changed = tuple(taken if e is own[place] else e for e in genotype.normal)
        (normal, _) = searching.cells_of(frames, dataclasses.replace(genotype, normal=changed))
        fates = {row["name"]: row["fate"] for row in normal["edges"][column]["rows"]}
        assert fates[taken.operation] == "restored"
        assert fates[left] == "replaced"


def test_what_was_exported_is_told(run):
    record = {
        **{"bytes": 67276, "split": "test", "checkpoint": "last", "epoch": 6, "step": 0},
        **{"images": 1000, "close": 0.9995, "largest": 2e-5, "turned": 0},
        **{"trained": 0.975, "shipped": 0.974},
    }
    (run / "train/export.json").write_text(json.dumps(record))
    text = page.write_report(run)[0].read_text()
    for words in ("1-bit child was exported after epoch 6", "67,276 bytes", "accuracy 97.4"):
        assert words in text
    (run / "train/export.json").write_text(json.dumps({**record, "bytes": "many"}))
    with pytest.raises(UserError, match=r"export\.json: bytes is 'many'; it must be a finite"):
        page.write_report(run)


def test_cells_in_darts_notation_are_shown(run):
    """A workdir may be given its cells in either notation."""
    genotype = Genotype.load(run / "genotype.json")
    (run / "genotype.json").write_text(to_darts(genotype))
    page.write_report(run)
    text = (run / "report.html").read_text()
    assert to_darts(genotype) in html.unescape(text)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [(name, *case) for name, cases in DAMAGES.items() for case in cases],
)
def test_a_damaged_file_is_named_in_one_line(run, name, damage, message):
    (run / "report.html").write_text("the last one")
    file = run / name
    text = file.read_text()
    assert damage(text) != text
    file.write_text(damage(text))
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(UserError, match=message) as error:
        page.write_report(run)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in run.iterdir()) == before
    assert (run / "report.html").read_text() == "the last one"


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_damaged_answers_are_named(run, cut):
    file = run / "train/predictions.npz"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"predictions\.npz is damaged .*; delete it, then"):
        page.write_report(run)
