"""A report on a study or on runs: verdict, figures, tables; as a page, Markdown, CSV, or in the terminal."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import numpy as np
import pandas as pd
from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table as TerminalTable
from rich.text import Text

from lora_lab.documents.writing import write_text
from lora_lab.errors import IncompatibleError
from lora_lab.report import figures
from lora_lab.report.comparison import escaped, markdown_table, paragraph
from lora_lab.report.drawing import THEMES, alone
from lora_lab.report.gathering import WAITING, Gathered, gather
from lora_lab.report.search import good_values, search_margin
from lora_lab.report.wording import Numbers, outcome, verdict
from lora_lab.statistics import Analysis, CellSummary, analyse, higher_is_better
from lora_lab.statistics.analysis import FINISHED

TEMPLATE = Path(__file__).with_name("page.html")
NONE = "–"
WIDE = 8.0
"""Width in inches of the first figure on screens larger than a phone's."""
MACHINE = ("processor", "cores", "threads", "gpus")


@dataclass
class Table:
    """Headings and rows of text; the first column names the row."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def without(self, headings: Container[str]) -> Table:
        """Returns the table without some of its columns."""
        kept = [place for place, name in enumerate(self.headings) if name not in headings]
        rows = [[row[place] for place in kept] for row in self.rows]
        return Table([self.headings[place] for place in kept], rows)

    def markdown(self) -> str:
        """Returns it in Markdown."""
        headings, *rows = [[escaped(text) for text in row] for row in (self.headings, *self.rows)]
        return markdown_table(headings, rows)


@dataclass
class Section:
    """The contents under one heading."""

    title: str
    texts: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    """SVG."""
    table: Table | None = None
    code: list[str] = field(default_factory=list)
    """Commands."""
    notes: list[str] = field(default_factory=list)
    """Text at the end."""
    open: bool = True
    """Whether the page shows it open."""
    pictures_only: bool = False
    """Whether it has no content without figures."""


@dataclass
class Report:
    """Everything that the page, the Markdown and the CSV show."""

    title: str
    question: str | None
    verdict: str
    answer: tuple[str, str] | None
    """The first figure, wide and narrow."""
    legend: str
    """What the marks of the first figure mean."""
    sections: list[Section]
    cells: pd.DataFrame
    """One row for each cell, with plain numbers."""

    def html(self) -> str:
        """Returns one page that needs no other files."""
        if importlib.util.find_spec("jinja2") is None:
            raise IncompatibleError("--html: needs jinja2: pip install 'lora_lab[study]'")
        import jinja2

        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        return page.render(report=self, themes=THEMES)

    def pictures(self, stem: str) -> dict[str, str]:
        """Returns all figures, each by the name of its file next to the Markdown `<stem>.md`."""
        found = {f"{stem}.svg": self.answer[0]} if self.answer else {}
        drawings = [drawing for section in self.sections for drawing in section.figures]
        return found | {f"{stem}-{number}.svg": one for number, one in enumerate(drawings, 1)}

    def markdown(self, stem: str | None = None) -> str:
        """Returns the same in Markdown.

        Args:
            stem: as in `pictures`, if these are stored; else there are none.
        """
        parts = [f"# {escaped(self.title)}"]
        parts += [paragraph(self.question)] if self.question else []
        parts.append(f"**{escaped(self.verdict)}**")
        parts += [_picture(self.verdict, f"{stem}.svg")] if stem and self.answer else []
        drawn = 0
        for section in self.sections:
            if section.pictures_only and not stem:
                continue
            parts.append(f"## {escaped(section.title)}")
            parts += map(paragraph, section.texts)
            names = [f"{stem}-{drawn + number}.svg" for number in range(1, len(section.figures) + 1)]
            drawn += len(names)
            parts += [_picture(section.title, name) for name in names if stem]
            if section.table:
                parts.append(section.table.markdown())
            if section.code:
                parts.append("```bash\n" + "\n".join(section.code) + "\n```")
            parts += map(paragraph, section.notes)
        return "\n\n".join(parts) + "\n"

    def write(
        self,
        html: str | os.PathLike[str] | None = None,
        markdown: str | os.PathLike[str] | None = None,
        csv: str | os.PathLike[str] | None = None,
    ) -> None:
        """Writes the files that are named; with the Markdown also its figures, `<name>.svg` and more.

        Raises:
            CheckpointError: if a file cannot be written.
            IncompatibleError: if a page is asked for and jinja2 is missing.
        """
        page = self.html() if html else ""
        if html:
            write_text(Path(html), page)
        if markdown:
            markdown = Path(markdown)
            for name, drawing in self.pictures(markdown.stem).items():
                write_text(markdown.with_name(name), alone(drawing))
            write_text(markdown, self.markdown(markdown.stem))
        if csv:
            write_text(Path(csv), self.cells.to_csv(index=False, lineterminator="\n"))

    def terminal(self) -> RenderableType:
        """Returns verdict and table for a terminal."""
        table = TerminalTable(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        first = self.sections[0].table
        parts: list[RenderableType] = [Text(self.verdict, style="bold")]
        if first:
            for place, heading in enumerate(first.headings[:5]):
                table.add_column(heading, overflow="fold", justify="left" if place < 2 else "right")
            for row in first.rows:
                table.add_row(*(Text(text) for text in row[:5]))
            parts.append(table)
        return Group(*parts)


def report(paths: Sequence[Path]) -> Report:
    """Makes the report of a study, or of any runs.

    Args:
        paths: the folder of one study; or run folders, or folders that hold runs.

    Raises:
        LabError: if there is nothing to report, or a file cannot be read.
    """
    gathered = gather([Path(path) for path in paths])
    analysis = judge(gathered)
    answer = [figures.forest(analysis, width) for width in (WIDE, 4.2)]
    wide, narrow = (one.svg(f"answer{place}-") if one else None for place, one in enumerate(answer))
    sections = [section for section in _sections(gathered, analysis) if section is not None]
    return Report(
        gathered.title,
        gathered.question,
        verdict(analysis),
        (wide, narrow) if wide and narrow else None,
        _legend(analysis),
        sections,
        _frame(gathered, analysis),
    )


def judge(gathered: Gathered) -> Analysis:
    """Returns what may be said of the compared runs."""
    return analyse(
        gathered.compared,
        gathered.metric,
        gathered.baseline,
        gathered.margin,
        gathered.examples if gathered.baseline else None,
    )


def _legend(analysis: Analysis) -> str:
    if analysis.baseline is None:
        return "Marks are means, lines 95 % intervals, dots single seeds."
    shown = (
        "Marks are mean differences, dots single seeds. Thick lines are 95 % intervals, thin ones corrected"
    )
    band = "; the band is the margin of equivalence" if analysis.margin is not None else ""
    return f"{shown} for the number of comparisons{band}. Open grey marks cannot be told apart from 0."


def _sections(gathered: Gathered, analysis: Analysis) -> Iterator[Section | None]:
    yield cells_table(gathered, analysis)
    yield _costs(gathered, analysis)
    yield _rates(gathered, analysis)
    yield _curves(gathered, analysis)
    yield _ranks(gathered, analysis)
    yield _differences(gathered)
    yield _values(gathered, analysis)
    yield _failures(gathered)
    yield _machine(gathered)


def _frame(gathered: Gathered, analysis: Analysis) -> pd.DataFrame:
    rows = []
    for cell in figures.by_merit(analysis):
        row: dict[str, Any] = {"cell": cell.name, "metric": analysis.metric, "mean": cell.mean}
        row |= _ends("interval", cell.interval)
        row |= {"runs": sum(cell.statuses.values()), "finished": len(cell.values)}
        if analysis.baseline is not None:
            one = analysis.comparisons.get(cell.name)
            row |= {
                "outcome": "baseline" if one is None else outcome(analysis, cell.name),
                "difference": one and one.mean,
                **_ends("difference", one and one.interval),
                **_ends("corrected", one and one.corrected_interval),
                "corrected_level": one and one.corrected_interval and one.corrected_interval.level,
                "p": one and one.p,
                "corrected_p": one and one.corrected_p,
                **_ends("resampled", one and one.resampled),
                **_ends("corrected_resampled", one and one.corrected_resampled),
                "detectable": one and one.detectable,
                "equivalence_p": one and one.equivalence_p,
            }
        row |= {"rank": cell.rank, **_ends("rank", cell.rank_interval), **_prices(gathered, cell)}
        rows.append(row)
    frame = pd.DataFrame(rows)
    whole = [name for name in frame if name in ("rank", "rank_low", "rank_high")]
    return frame.astype(dict.fromkeys(whole, "Int64"))


def _ends(name: str, interval: Any) -> dict[str, float | None]:
    return {f"{name}_low": interval and interval.low, f"{name}_high": interval and interval.high}


def _prices(gathered: Gathered, cell: CellSummary) -> dict[str, float | None]:
    found = cast("pd.Series[float]", gathered.costs.loc[cell.name])
    return {str(name): float(price) if np.isfinite(price) else None for name, price in found.items()}


def cells_table(gathered: Gathered, analysis: Analysis) -> Section:
    """Returns a row for each cell, the best first."""
    write, paired = Numbers.of(analysis), analysis.baseline is not None
    headings = ["cell", *(["verdict"] if paired else []), f"{analysis.metric} (95 % interval)", "runs"]
    headings += ["difference (corrected interval)", "corrected p", "seeds and examples"] if paired else []
    headings += ["detectable"] if paired else []
    headings += ["rank", "trained parameters", "ms per step", "peak MB"]
    rows = []
    for cell in figures.by_merit(analysis):
        one = analysis.comparisons.get(cell.name)
        mean = write.value(cell.mean)
        row = [cell.name]
        if paired:
            row.append("baseline" if one is None else outcome(analysis, cell.name))
        row.append(f"{mean} ({write.range(cell.interval)})" if cell.mean is not None else NONE)
        row.append(f"{len(cell.values)} of {sum(cell.statuses.values())}")
        if paired and one is None:
            row += [NONE] * 4
        elif one is not None:
            corrected = write.range(one.corrected_interval, signed=True)
            row.append(f"{write.difference(one.mean)} ({corrected})" if one.mean is not None else NONE)
            row.append(NONE if one.corrected_p is None else _p(one.corrected_p))
            sampled = one.corrected_resampled
            row.append(write.range(sampled, signed=True) if sampled else NONE)
            row.append(write.value(one.detectable))
        interval = cell.rank_interval
        row.append(f"{cell.rank} ({interval.low:.0f} to {interval.high:.0f})" if interval else NONE)
        prices = _prices(gathered, cell)
        for name, factor in (("trained_parameters", 1), ("step_seconds", 1000), ("peak_megabytes", 1)):
            price = prices.get(name)
            row.append(NONE if price is None else f"{price * factor:,.{0 if factor == 1 else 1}f}")
        rows.append(row)
    return Section("Table", table=Table(headings, rows), notes=list(_method_notes(gathered, analysis)))


def _method_notes(gathered: Gathered, analysis: Analysis) -> Iterator[str]:
    """Explains how the numbers of the table were computed, and what they cannot show."""
    seeds = max((len(cell.values) for cell in analysis.cells), default=0)
    better = "More" if analysis.higher_is_better else "Less"
    yield (
        f"{better} {analysis.metric} is better. Means are over seeds, with Student's t intervals; ranks have "
        "bootstrap intervals, and equal means share a rank."
        if seeds > 1
        else f"{better} {analysis.metric} is better. One seed shows no spread: there are no intervals."
    )
    if analysis.baseline is not None and seeds > 1:
        tests = sum(one.p is not None for one in analysis.comparisons.values())
        text = (
            f"Differences from {analysis.baseline} are paired by seed and corrected for "
            f"{_count(tests, 'comparison')} by Holm's procedure: an interval is at the level at which the "
            "procedure tested that comparison, so that it excludes 0 exactly when the corrected p is below "
            "0.05, and only then an effect is claimed. Detectable is the true difference that four of five "
            "such studies would find."
        )
        if analysis.examples:
            text += (
                f" Where seeds and {analysis.examples:,} test examples are drawn again, that interval has to "
                "exclude 0 as well."
            )
        if analysis.margin is not None:
            text += f" Equivalent: two one-sided tests, margin {analysis.margin:g}, corrected likewise."
        yield text
    unsure = [name for name, one in analysis.comparisons.items() if one.depends_on_examples]
    if unsure:
        yield (
            f"All seeds agree on {', '.join(unsure)}, but other test examples might not: more examples would "
            "decide."
        )
    yield from analysis.notes


def _costs(gathered: Gathered, analysis: Analysis) -> Section | None:
    drawn, texts = [], []
    for place, name in enumerate(figures.COSTS):
        found = figures.cost(gathered, analysis, name)
        if found:
            drawn.append(found[0].svg(f"cost{place}-"))
            texts.append(f"{figures.COSTS[name]}: {', '.join(found[1])}")
    if not drawn:
        return None
    machines = {_machine_name(record) for record in gathered.records}
    notes = [f"No cheaper cell is as good as these, from the cheapest on. {'; '.join(texts)}."]
    if len(machines) > 1:
        notes.append("Runs were made on several machines: their step times and memory are not comparable.")
    else:
        notes.append(
            "Step times and memory were measured during training and include the effect of other work on "
            "the machine."
        )
    return Section("What it costs", notes, drawn)


def _rates(gathered: Gathered, analysis: Analysis) -> Section | None:
    if not gathered.tuning:
        return None
    first = next(iter(gathered.tuning.values()))
    key, by = first["key"], first.get("by")
    figure = figures.rates(gathered, analysis)
    higher = higher_is_better(by) if by else True
    table = search_table(gathered)
    widen = [f"lora-lab ablate … {one['widen']}" for one in gathered.tuning.values() if one.get("widen")]
    margin = _search_margin(gathered)
    near_text = "1 %" if margin is None else f"{margin:g}"
    texts = [
        f"Every cell's {key} was chosen by {by} ({'more' if higher else 'less'} is better), with other seeds "
        f"than the comparison's and without test data. Good values are within {near_text} of the best."
    ]
    if widen:
        texts.append("If the best value is at the edge of the range, a better one may be outside:")
    drawn = [figure.svg("rates-")] if figure else []
    return Section(f"The search for {key}", texts, drawn, table, list(dict.fromkeys(widen)))


def search_table(gathered: Gathered) -> Table:
    """Returns for each cell of a tuned study what its search has found."""
    rows, margin = [], _search_margin(gathered)
    by = next(iter(gathered.tuning.values())).get("by")
    for cell, found in gathered.tuning.items():
        tried = {one["value"]: one.get(by) for one in found["tried"]}
        near = good_values(tried, found["value"], margin)
        edge = "at its edge" if found.get("widen") else ""
        score = f"{tried[found['value']]:.4g}" if near else NONE
        rows.append([cell, _plain(found["value"]), score, _span(near), edge])
    return Table(["cell", "chosen", f"best {by}", "good values", "search"], rows)


def _search_margin(gathered: Gathered) -> float | None:
    """Returns the study's margin of equivalence where the search went by the metric that it is about."""
    by = str(next(iter(gathered.tuning.values())).get("by"))
    return search_margin(by, gathered.metric, gathered.margin)


def _curves(gathered: Gathered, analysis: Analysis) -> Section | None:
    logged = gathered.logged[0]
    rows = logged if gathered.validations is None else gathered.validations
    monitored = f"validation/{analysis.metric.rpartition('/')[2]}"
    drawn = []
    for place, (found, metric) in enumerate(
        [(rows, name) for name in dict.fromkeys([monitored, "validation/loss"])] + [(logged, "train/loss")]
    ):
        one = figures.curves(found, metric, analysis)
        if one:
            drawn.append(one.svg(f"curve{place}-"))
    if not drawn:
        return None
    grey = len(analysis.cells) > figures.SHOWN
    text = "Mean over seeds; bands from the lowest to the highest seed."
    return Section(
        "Learning", [text + (" Cells without a colour are grey." if grey else "")], drawn, pictures_only=True
    )


def _ranks(gathered: Gathered, analysis: Analysis) -> Section | None:
    curves, modules = gathered.logged
    drawn, cells = [], list[str]()
    for place, metric in enumerate(("rank/mean", "rank/effective_mean", "sparsity/mean")):
        rows = figures.moving(curves, metric)
        one = figures.curves(rows, metric, analysis) if len(rows) else None
        if one and (metric != "rank/effective_mean" or cells):
            drawn.append(one.svg(f"rank{place}-"))
        if metric == "rank/mean":
            cells = [cell.name for cell in figures.by_merit(analysis) if cell.name in set(rows["cell"])]
    found = figures.module_ranks(modules, cells) if cells else None
    if found:
        drawn.append(found.svg("modules-"))
    if not drawn:
        return None
    return Section("Ranks", ["Cells whose controllers changed ranks."], drawn, pictures_only=True)


def _differences(gathered: Gathered) -> Section | None:
    if not gathered.differences:
        return None
    baseline = gathered.differences[0]["baseline"]
    rows = []
    for found in gathered.differences:
        for key in found["keys"]:
            theirs, mine = found["values"][key]
            rows.append([found["cell"], key, _plain(mine), _plain(theirs)])
    for cell, match in gathered.matches.items():
        facts = ", ".join(f"{name} {_plain(value)}" for name, value in match.items())
        rows.append([cell, "matched size", facts, NONE])
    if not rows:
        return Section("What differs", [f"Cells differ from {baseline} only in the keys of the grid."])
    text = f"Keys in which a cell differs from {baseline} beyond the grid; each may cause a difference."
    if gathered.baseline is None:
        text = f"Keys in which a cell differs from {baseline}, the first one; there is no baseline."
    return Section("What differs", [text], table=Table(["cell", "key", "here", baseline], rows))


def _values(gathered: Gathered, analysis: Analysis) -> Section:
    write = Numbers.of(analysis)
    seeds = sorted({seed for cell in analysis.cells for seed in cell.values})
    rows = [
        [cell.name, *(write.value(cell.values.get(seed)) for seed in seeds)]
        for cell in figures.by_merit(analysis)
    ]
    return Section(
        "Every value",
        [f"{analysis.metric} by seed."],
        table=Table(["cell", *(f"seed {seed}" for seed in seeds)], rows),
        open=False,
    )


def _failures(gathered: Gathered) -> Section:
    waiting = gathered.runs[gathered.runs["status"] == WAITING]
    lost = gathered.runs[~gathered.runs["status"].isin([FINISHED, WAITING])]
    texts = []
    if len(waiting):
        cells = (f"{cell} ({count})" for cell, count in waiting.groupby("cell", sort=False).size().items())
        texts.append(f"{_count(len(waiting), 'planned run')} not started: {', '.join(cells)}.")
    if lost.empty:
        done = len(gathered.runs) - len(waiting)
        texts.append(f"All others, {done}, finished." if texts else f"None: all {done} finished.")
        return Section("Runs that did not finish", texts)
    rows = [
        [str(run["cell"]), str(run["phase"]), str(run["seed"]), str(run["status"]), _text(run.get("error"))]
        for _, run in lost.iterrows()
    ]
    texts += [
        f"{len(lost)} of {len(gathered.runs)} runs; they are in no mean, which can flatter their cells."
    ]
    return Section(
        "Runs that did not finish", texts, table=Table(["cell", "phase", "seed", "status", "error"], rows)
    )


def _machine(gathered: Gathered) -> Section:
    texts = [f"Machine: {name}." for name in sorted({_machine_name(record) for record in gathered.records})]
    versions: dict[str, list[str]] = {}
    for record in gathered.records:
        for name, version in {"python": record.get("python"), **(record.get("packages") or {})}.items():
            known = versions.setdefault(name, [])
            if version and version not in known:
                known.append(version)
    if versions:
        said = [f"{name} {' and '.join(found)}" for name, found in versions.items() if found]
        texts.append(f"Versions: {', '.join(said)}.")
    commits = sorted({str(record["git_commit"]) for record in gathered.records if record.get("git_commit")})
    if commits:
        texts.append(f"Commit: {', '.join(commits)}.")
    if not gathered.records:
        texts.append("The folders of the runs are not here, so that machine and versions are not known.")
    seconds = pd.to_numeric(gathered.runs.get("seconds", pd.Series(dtype=float)), errors="coerce").sum()
    texts.append(f"{len(gathered.runs)} runs took {seconds / 3600:.2f} hours of training in all.")
    return Section("To repeat it", texts, code=list(gathered.commands))


def _machine_name(record: Any) -> str:
    hardware = record.get("hardware") or {}
    gpus = hardware.get("gpus") or []
    cores = f"{hardware.get('cores')} cores, {hardware.get('threads')} threads in use"
    return ", ".join([str(hardware.get("processor")), cores, *([" + ".join(gpus)] if gpus else [])])


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _span(values: Sequence[Any]) -> str:
    if not values:
        return NONE
    if len(values) > 2 and all(isinstance(value, int | float) for value in values):
        return f"{min(values):.3g} to {max(values):.3g}"
    return ", ".join(map(_plain, values))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "null" if value is None else str(value)


def _text(value: Any) -> str:
    return NONE if value is None or (isinstance(value, float) and np.isnan(value)) else str(value)


def _picture(text: str, name: str) -> str:
    return f"![{escaped(text)}]({quote(name)})"
