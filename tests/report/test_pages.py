"""What a report says of made-up studies, and that its page needs nothing from elsewhere."""

import importlib
import re
import shutil
import subprocess
import sys
import time
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pandas as pd
import pytest
import yaml
from markdown_it import MarkdownIt

from lora_lab.cli import main
from lora_lab.documents.reading import yaml_text
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError
from lora_lab.report.figures import pareto
from lora_lab.report.gathering import gather
from lora_lab.report.pages import report
from lora_lab.report.wording import Numbers, verdict
from lora_lab.statistics import analyse
from tests.report.synthetic import runs, study

EFFECTS = {"lora": 0.0, "dora": 0.001, "pissa": 0.08, "adalora": 0.0, "head": -0.1}
LOST = {("adalora", 2): "diverged", ("dora", 0): "failed"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return study(tmp_path_factory.mktemp("runs") / "methods", EFFECTS, seeds=range(5), lost=LOST, noise=0.002)


@pytest.fixture(scope="module")
def made(folder):
    return report([folder])


def table(cells):
    """Returns a table of runs: cell → the metric by seed; None did not finish."""
    rows = [
        {
            "cell": cell,
            "seed": seed,
            "status": "failed" if value is None else "finished",
            "test/accuracy": value,
        }
        for cell, values in cells.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


BASE = [0.80, 0.81, 0.79]


@pytest.mark.parametrize(
    ("cells", "margin", "sentence"),
    [
        (
            {"lora": BASE, "dora": [0.900, 0.911, 0.889]},
            None,
            "In test/accuracy, dora is better than lora (+0.1000, interval +0.0975 to +0.1025).",
        ),
        (
            {"lora": BASE, "dora": [0.700, 0.711, 0.689]},
            None,
            "In test/accuracy, dora is worse than lora (−0.1000, interval −0.1025 to −0.0975).",
        ),
        (
            {"lora": BASE, "dora": [0.80, 0.82, 0.79]},
            None,
            "In test/accuracy, dora cannot be told apart from lora (a true difference that four of five such "
            "studies would find: 0.0213).",
        ),
        (
            {"lora": BASE, "dora": [0.800, 0.811, 0.789]},
            0.01,
            "In test/accuracy, dora is as good as lora within 0.0100.",
        ),
        (
            {"lora": [300, 301, 299], "dora": [300.000, 301.001, 298.999]},
            0.02,
            "In test/accuracy, dora is as good as lora within 0.02.",
        ),
        (
            {"lora": BASE, "dora": [0.80, None, None]},
            None,
            "In test/accuracy, dora has too few finished seeds in common with lora for a test; 2 of 6 runs "
            "did not finish and are in no mean.",
        ),
        (
            {"lora": [0.5, 0.25, 0.75], "dora": [0.75, 0.5, 1.0]},
            None,
            "In test/accuracy, dora differs from lora by the same amount with every seed (+0.2500), so that "
            "no test is possible.",
        ),
    ],
)
def test_a_verdict_says_what_the_statistics_do_and_no_more(cells, margin, sentence):
    assert verdict(analyse(table(cells), "test/accuracy", "lora", margin)) == sentence


def test_a_verdict_counts_cells_where_it_would_name_many_and_names_no_winner_without_a_test():
    many = {"lora": BASE, **{f"cell {place}": [0.800, 0.812, 0.791] for place in range(6)}}
    assert "6 cells cannot be told apart from lora" in verdict(analyse(table(many), "test/accuracy", "lora"))
    rivals = table({"lora": BASE, "dora": [0.80, 0.82, 0.79], "head": [0.5, 0.51, 0.49]})
    assert verdict(analyse(rivals, "test/accuracy")) == (
        "dora has the highest mean test/accuracy, 0.8033 (3 seeds, 0.7654 to 0.8413), but with other seeds "
        "lora could have it; without a baseline no difference is tested."
    )
    assert "No run has finished" in verdict(analyse(table({"lora": [None]}), "test/accuracy"))


def test_numbers_have_the_digits_of_their_size():
    assert Numbers(0.85).value(0.84321) == "0.8432"
    assert Numbers(23.4).difference(-1.239) == "−1.24"
    assert Numbers(12345.0).value(12345.6) == "12346"
    assert Numbers(2.3e-10).value(2.3456e-10) == "2.346e-10"
    # Only what is 0, to the last digit that a sum may have, is written as 0.
    assert Numbers(0.85).difference(-0.00001) == "−1e-05"
    assert Numbers(0.85).difference(0.1 + 0.2 - 0.3) == "0.0000"
    assert Numbers(2.3e-10).difference(-1e-26) == "0.000"
    # 0.6 in 12,345 would be written as 1.
    assert [Numbers(scale).exact(number) for scale, number in ((300, 0.02), (12345, 0.6), (0.85, 0.02))] == [
        "0.02", "0.6", "0.0200",
    ]  # fmt: skip


def test_the_front_holds_what_no_cheaper_cell_equals():
    points = [(3, 0.9), (1, 0.5), (2, 0.5), (2, 0.7), (4, 0.9), (1, 0.4)]
    assert pareto(points, descending=True) == [1, 3, 0]
    assert pareto(points, descending=False) == [5]


class Page(HTMLParser):
    """Collects what a page would load, its ids, and its words."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.words, self.tags = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_needs_nothing_from_elsewhere_and_says_everything(made):
    text = made.html()
    page = Page(text)
    words = " ".join(page.words)
    assert "script" not in page.tags
    assert all(link.startswith(("#", "data:,")) for link in page.links)
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text)
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    targets = {link[1:] for link in page.links if link.startswith("#")} | set(
        re.findall(r"url\(#([\w-]+)\)", text)
    )
    assert targets <= set(page.ids)
    assert set(re.findall(r"var\((--\w+)\)", text)) - {"--width"} <= set(re.findall(r"(--\w+):", text))
    assert not re.findall(r"#(0\w)\1\1\b", text)  # every stand-in for a colour has become a variable
    order = [
        "is any method better than LoRA?",
        made.verdict,
        "Table",
        "What it costs",
        "The search for",
        "Learning",
    ]
    order += ["Ranks", "What differs", "Every value", "Runs that did not finish", "To repeat it"]
    places = [words.index(part) for part in order]
    assert places == sorted(places)
    for part in (
        "AMD EPYC",
        "torch 2.13.0+cpu",
        "the loss is not finite",
        "adapter.alpha",
        "lora-lab ablate",
    ):
        assert part in words
    assert text.count("<svg") == text.count("</svg>") >= 10
    assert len(text) < 1_000_000


def test_the_verdict_of_a_study_names_the_effects_that_were_put_in(made):
    assert "pissa is better than lora" in made.verdict
    assert "head is worse than lora" in made.verdict
    assert "2 of 25 runs did not finish" in made.verdict
    cells = made.cells.set_index("cell")
    assert cells.loc["adalora", ["runs", "finished"]].tolist() == [5, 4]
    assert cells.loc["pissa", "outcome"] == "better"
    assert cells.loc["pissa", "rank"] == 1
    assert cells.loc["pissa", "corrected_resampled_low"] > 0


def test_markdown_csv_and_picture_say_the_same(folder, made, tmp_path, capsys):
    files = [
        f"--{kind}={tmp_path / name}"
        for kind, name in (("html", "a.html"), ("markdown", "a.md"), ("csv", "a.csv"))
    ]
    assert main(["report", str(folder), *files]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert made.verdict[:40] in told
    assert f"Written: {tmp_path / 'a.html'}" in told
    text = (tmp_path / "a.md").read_text()
    assert f"**{made.verdict}**" in text
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert sorted(pictures) == sorted(path.name for path in tmp_path.glob("*.svg"))
    assert len(pictures) == 1 + sum(len(section.figures) for section in made.sections) > 5
    assert "## Learning" in text
    stored = pd.read_csv(tmp_path / "a.csv").set_index("cell")
    for row in made.sections[0].table.rows:
        assert f"| {row[0]} | {row[1]} |" in text
        assert f"{stored.loc[row[0], 'mean']:.4f}" == row[2].split()[0]
    assert (tmp_path / "a.html").read_text() == made.html()
    for name in pictures:
        ElementTree.parse(tmp_path / name)


def test_markdown_shows_texts_as_they_are_written(tmp_path):
    cells = ("lora_drop", """<b>"x"&'""", "_a_ *b* `c` [d](e) ~f~ &lt; \\_ $g$ | h")
    question = "1. Is <b> | __better__ at r=8, 1e-3 < 2?"
    found = report([study(tmp_path / "names", dict.fromkeys(cells, 0.0), question=question, noise=0.05)])
    path = tmp_path / "my #1 report.md"
    found.write(markdown=path)
    text = path.read_text()
    assert "| lora_drop | baseline |" in text
    assert "r=8, 1e-3 < 2?" in text
    page = Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))
    assert {unquote(link) for link in page.links} == {file.name for file in tmp_path.glob("*.svg")}
    rows = "".join(page.words).split("\n")
    assert {question, found.verdict, *cells, *found.sections[0].notes} <= {*rows}


def test_pictures_show_names_as_they_are_written(tmp_path):
    cells = ("ada$^$", "_a$b$", "_<i>")
    found = report([study(tmp_path / "names", dict.fromkeys(cells, 0.0), noise=0.05)])
    for title, shown in (("The search for", 3), ("Learning", 3), ("Ranks", 1)):
        (drawings,) = [section.figures for section in found.sections if section.title.startswith(title)]
        for text in (f">{escape(name)}</text>" for name in cells[:shown]):
            assert all(text in drawing for drawing in drawings)
    assert found.answer is not None
    assert all(f">{escape(name)}</text>" in found.answer[0] for name in cells[1:])


def test_a_study_reports_without_its_runs_folders_searches_and_examples(folder, tmp_path):
    """Results are committed to repositories without the runs."""
    bare = tmp_path / "methods"
    bare.mkdir()
    for name in ("study.yaml", "results.csv"):
        shutil.copy(folder / name, bare / name)
    found = report([bare])
    assert "pissa is better than lora" in found.verdict
    assert "folders of the runs are not here" in found.markdown()
    assert "has none" not in found.verdict
    assert found.html()


def test_results_beside_the_file_that_a_study_was_made_from_are_reported():
    folder = Path(__file__).parents[2] / "experiments" / "method_comparison"
    found = report([folder])
    rows = pd.read_csv(folder / "results.csv").query("phase == 'compare'")
    means = rows.groupby("cell")["test/accuracy"].mean()
    assert found.cells.set_index("cell")["mean"].to_dict() == pytest.approx(means.to_dict())
    assert found.cells["mean"].is_monotonic_decreasing
    assert found.verdict.startswith("In test/accuracy, ")
    assert "method_comparison/study.yaml" in found.markdown()


def test_cells_are_named_as_written_and_runs_that_are_planned_are_missed(tmp_path):
    effects = {"1e-3": 0.0, "NA": 0.05, "8": -0.05, "None": 0.0}
    lost = {("8", 1): "diverged", **{("None", seed): "failed" for seed in range(3)}}
    folder = study(tmp_path / "odd", effects, lost=lost, tune=False, baseline="1e-3")
    (folder / "study.yaml").write_text(
        yaml_text(
            yaml.safe_load((folder / "study.yaml").read_text())
            | {"cells": {cell: {"match": None} for cell in effects}, "overrides": ["trainer.max_epochs=2"]}
        )
    )
    results, validations = folder / "results.csv", folder / "validations.csv"
    rows = pd.read_csv(results, dtype=str, keep_default_na=False)
    rows[(rows["cell"] != "None") & ((rows["cell"] != "NA") | (rows["seed"] != "0"))].to_csv(
        results, index=False
    )
    learned = pd.read_csv(validations, dtype=str, keep_default_na=False)
    early = learned["step"] == "10"
    learned[early | (learned["cell"] != "8") | (learned["seed"] != "1")].to_csv(validations, index=False)
    found = report([folder])
    assert found.cells.set_index("cell")["finished"].to_dict() == {"1e-3": 3, "NA": 2, "8": 2, "None": 0}
    assert found.cells.set_index("cell")["runs"].to_dict() == dict.fromkeys(effects, 3)
    assert "None has too few finished seeds in common with 1e-3" in found.verdict
    page = found.markdown()
    assert "4 planned runs not started: NA (1), None (3)." in page
    assert "--plan" not in page
    assert ".yaml trainer.max_epochs=2" in page
    # The diverged run logged once; the others go on, and its values are in no mean.
    assert set(gather([folder]).validations.query("cell == '8'")["seed"]) == {0, 2}


def test_runs_of_no_study_are_cells_without_a_baseline(tmp_path):
    found = report([runs(tmp_path / "runs", 6)])
    assert found.cells["cell"].tolist() == ["dora", "lora"]
    assert found.cells["finished"].tolist() == [3, 3]
    assert "outcome" not in found.cells
    assert "without a baseline no difference is tested" in found.verdict
    assert "adapter.method" in found.markdown()
    one = report([tmp_path / "runs" / "lora-0"])
    assert one.verdict.startswith("lora has the highest mean test/accuracy")
    assert one.html()


def test_what_cannot_be_reported_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="neither a study nor runs"):
        report([tmp_path])
    with pytest.raises(CheckpointError, match="give it alone"):
        report([folder, tmp_path])
    empty = tmp_path / "started"
    empty.mkdir()
    shutil.copy(folder / "study.yaml", empty)
    with pytest.raises(CheckpointError, match="no results yet; lora-lab ablate"):
        report([empty])
    twice = tmp_path / "twice"
    twice.mkdir()
    shutil.copy(folder / "study.yaml", twice)
    rows = pd.read_csv(folder / "results.csv")
    pd.concat([rows, rows]).to_csv(twice / "results.csv", index=False)
    with pytest.raises(ConfigError, match="two runs of seed"):
        report([twice])
    (twice / "results.csv").write_text("cell,seed\n")
    with pytest.raises(
        CheckpointError, match="not a study that lora-lab ablate wrote: phase, status, run missing"
    ):
        report([twice])
    unread = runs(tmp_path / "unread", 1)
    (unread / "lora-0" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        report([unread])
    levels = [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 40)]
    for bomb in ("\n".join(["a0: &a0 {x: 1}", *levels]), "adapter: " + "[" * 5000 + "]" * 5000):
        bombs = runs(tmp_path / f"bombs-{len(bomb)}", 1)
        (bombs / "lora-0" / "config.yaml").write_text(bomb)
        with pytest.raises(CheckpointError, match="config.yaml"):
            report([bombs])


def test_without_scipy_one_message_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lora_lab.statistics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(IncompatibleError, match=r"pip install 'lora_lab\[study\]'"):
        importlib.import_module("lora_lab.statistics")


def cpu_seconds(action) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def within(limit: float, action) -> bool:
    """Whether an action takes fewer seconds on a core of its own, at the second try at the latest.

    What shares the core slows it down; a loop of 0.1 seconds tells how much.
    """

    def seconds() -> float:
        before = cpu_seconds(lambda: [None for _ in range(4_000_000)])
        return cpu_seconds(action) / max(1.0, before / 0.1)

    return seconds() < limit or seconds() < limit


@pytest.mark.slow
def test_large_studies_are_collected_quickly(tmp_path):
    effects = {f"method {place}": 0.002 * place for place in range(30)}
    large = study(tmp_path / "large", effects, seeds=range(5), tune=False)
    assert within(5, lambda: report([large]).html())
    many = runs(tmp_path / "runs", 1000, [f"m{place}" for place in range(20)])
    assert within(10, lambda: report([many]))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_page_opens_in_a_browser_without_a_word_on_its_console(made, tmp_path):
    (tmp_path / "page.html").write_text(made.html())
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert made.title in shown.stdout
    assert "CONSOLE" not in shown.stderr
