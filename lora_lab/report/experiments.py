"""What the studies in a folder of experiments have found, written from their results.

    python -m lora_lab.report.experiments experiments

rewrites three things, each between two comments in a README: a study's findings, the list of all studies,
and the table of the claims that `claims/claims.yaml` names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lora_lab.documents.writing import write_text
from lora_lab.report.comparison import markdown_table
from lora_lab.report.gathering import RESULTS, STUDY, Gathered, read_study
from lora_lab.report.pages import cells_table, judge, search_table
from lora_lab.report.wording import Numbers, outcome, verdict
from lora_lab.statistics import Analysis, analyse
from lora_lab.statistics.analysis import FINISHED

START, END = "<!-- made by python -m lora_lab.report.experiments -->", "<!-- end -->"
README = "README.md"
MEASURED = ("seeds and examples", "rank", "ms per step", "peak MB")
"""Columns of a report's table that need the runs' folders, or that other work on the machine disturbs."""
UNDECIDED, NOT_RUN = "undecided at this size", "not run"


def with_block(text: str, block: str) -> str:
    """Returns a README with another text between the two comments.

    Raises:
        ValueError: if it does not have them once each, in this order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(END) < text.index(START):
        raise ValueError(f"needs '{START}' and, below it, '{END}', once each")
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{block}\n\n{END}{rest.partition(END)[2]}"


def study_folders(experiments: Path) -> list[Path]:
    """Returns the folders of all studies that have results."""
    return sorted(path.parent for path in experiments.glob(f"*/{STUDY}") if (path.parent / RESULTS).is_file())


def findings(folder: Path) -> str:
    """Returns verdict and tables of one study."""
    gathered = read_study(folder)
    analysis = judge(gathered)
    parts = [f"**{verdict(analysis)}**", _cells(gathered, analysis)]
    if gathered.tuning:
        parts.append(search_table(gathered).markdown())
    return "\n\n".join(parts)


def _cells(gathered: Gathered, analysis: Analysis) -> str:
    table = cells_table(gathered, analysis).table
    assert table is not None
    return table.without(MEASURED).markdown()


def studies_table(experiments: Path) -> str:
    """Returns a row for each study."""
    rows = []
    for folder in study_folders(experiments):
        gathered = read_study(folder)
        analysis = judge(gathered)
        seeds = max(len(cell.values) for cell in analysis.cells)
        size = f"{len(analysis.cells)} cells, {seeds} seed{'s' if seeds > 1 else ''}"
        size += f", {len(gathered.runs)} runs"
        link = f"[{folder.name}]({folder.name}/{README})"
        rows.append([link, str(gathered.question), size, verdict(analysis)])
    return markdown_table(["study", "question", "size", "verdict"], rows)


def claims_table(experiments: Path) -> str:
    """Returns a row for each claim: what its paper says, what was measured here, and the verdict."""
    claims = yaml.safe_load((experiments / "claims" / "claims.yaml").read_text(encoding="utf-8"))["claims"]
    rows = []
    for claim in claims:
        ours, judged = measured(experiments, claim)
        paper = f"[{claim['paper']}](https://arxiv.org/abs/{claim['paper']})" if claim["paper"] else "–"
        rows.append([claim["claim"], f"{paper}: {claim['says']}", ours, judged])
    return markdown_table(["claim", "paper", "here", "verdict"], rows)


def measured(experiments: Path, claim: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what the study of a claim has measured, and what follows for the claim.

    Args:
        experiments: the folder of experiments.
        claim: `study`, `cells` and `expects`: that they are `better` than the baseline, or `equivalent`; or
            `{ratio: 10}`, of their chosen rates to the baseline's. Results that are no study's have a `table`
            in its folder: `metric`, `baseline`, `margin` and `cell`, the columns that name a cell together.
    """
    folder = experiments / str(claim["study"])
    if not (folder / RESULTS).is_file():
        return "–", NOT_RUN
    link = f"[{folder.name}](../{folder.name}/{README})"
    if "table" in claim:
        analysis = _analysed(pd.read_csv(folder / RESULTS), claim["cells"], **claim["table"])
    else:
        gathered = read_study(folder)
        analysis = judge(gathered)
    if isinstance(claim["expects"], Mapping):
        return _rates(gathered, claim["cells"], float(claim["expects"]["ratio"]), link)
    write = Numbers.of(analysis)
    told = []
    for cell in claim["cells"]:
        one = analysis.comparisons[cell]
        interval = write.range(one.corrected_interval, signed=True)
        told.append(f"{cell} {write.difference(one.mean)} ({interval})")
    text = f"{link}, {analysis.metric}, against {analysis.baseline}: {'; '.join(told)}"
    return text, _judged(analysis, claim["cells"], claim["expects"])


def _analysed(
    results: pd.DataFrame,
    cells: Sequence[str],
    cell: Sequence[str],
    metric: str,
    baseline: str,
    margin: float,
) -> Analysis:
    names = results[list(cell)].astype(str).agg(" ".join, axis="columns")
    table = results.assign(cell=names, status=FINISHED)[names.isin([baseline, *cells])]
    return analyse(table, metric, baseline, margin)


def _judged(analysis: Analysis, cells: Sequence[str], expected: str) -> str:
    """Returns the verdict on a claim: all cells have to be as it says, and it falls with one that is not."""
    found = {cell: outcome(analysis, cell) for cell in cells}
    against = [cell for cell, how in found.items() if how in _against(expected)]
    if against:
        return f"does not hold here: {', '.join(f'{cell} is {found[cell]}' for cell in against)}"
    if all(how == expected for how in found.values()):
        return "holds here"
    decided = [cell for cell, how in found.items() if how == expected]
    return UNDECIDED + (f"; holds for {', '.join(decided)}" if decided else "")


def _against(expected: str) -> tuple[str, ...]:
    return ("better", "worse") if expected == "equivalent" else ("worse", "equivalent")


def _rates(gathered: Gathered, cells: Sequence[str], expected: float, link: str) -> tuple[str, str]:
    """Compares the rates that searches have chosen, to the step between those that were tried."""
    chosen = {cell: float(found["value"]) for cell, found in gathered.tuning.items()}
    tried = sorted(float(one["value"]) for one in gathered.tuning[str(gathered.baseline)]["tried"])
    step = max(high / low for low, high in zip(tried, tried[1:], strict=False))
    base = chosen[str(gathered.baseline)]
    ratios = {cell: chosen[cell] / base for cell in cells}
    told = ", ".join(f"{cell} {chosen[cell]:g}" for cell in [str(gathered.baseline), *cells])
    text = f"{link}, chosen rates: {told}; tried in steps of {step:.2g} times, one seed, so no interval"
    if all(expected / step < ratio < expected * step for ratio in ratios.values()):
        return text, f"holds here, to a factor of {step:.2g}"
    wrong = ", ".join(f"{cell} {ratio:.3g} times" for cell, ratio in ratios.items())
    return text, f"does not hold here: {wrong}"


def written(experiments: Path) -> Iterator[tuple[Path, str]]:
    """Yields each README that is made from results, and what it should say."""
    blocks = {folder / README: findings(folder) for folder in study_folders(experiments)}
    blocks[experiments / README] = studies_table(experiments)
    blocks[experiments / "claims" / README] = claims_table(experiments)
    for path, block in blocks.items():
        yield path, with_block(path.read_text(encoding="utf-8"), block)


if __name__ == "__main__":
    for readme, content in written(Path(sys.argv[1])):
        write_text(readme, content)
