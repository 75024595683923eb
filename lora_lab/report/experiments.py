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
from lora_lab.report.comparison import escaped, markdown_table
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
VALIDATED = ["cell", "seed", "step", "metric", "value"]
NEAR = 0.05
"""Share of all steps by which a validation may be earlier or later than a claim asks for."""


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
    parts = [f"**{escaped(verdict(analysis))}**", _cells(gathered, analysis)]
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
        rows.append([link, escaped(str(gathered.question)), size, escaped(verdict(analysis))])
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
        claim: `study`; `cells`, compared with the study's baseline, or `pairs` of cells, each compared with
            its own; and `expects`: that they are `better` or `equivalent`, or `{ratio: 10}` of their chosen
            rates to the baseline's. With `early: {metric: …, shares: […]}` a validation metric is compared
            after these shares of the steps.
    """
    folder = experiments / str(claim["study"])
    if not (folder / RESULTS).is_file():
        return "–", NOT_RUN
    link = f"[{folder.name}](../{folder.name}/{README})"
    gathered = read_study(folder)
    pairs = claim.get("pairs") or dict.fromkeys(claim["cells"], str(gathered.baseline))
    missing = {*pairs, *pairs.values()} - {*gathered.compared["cell"]}
    if missing:
        return f"{link} has no {', '.join(sorted(missing))} yet", NOT_RUN
    if isinstance(claim["expects"], Mapping):
        return _rates(gathered, claim["cells"], float(claim["expects"]["ratio"]), link)
    if "early" in claim:
        results, pairs = _early(gathered, pairs, **claim["early"])
        if not pairs:
            return f"{link} has no validation so early", NOT_RUN
        analysis = analyse(results, claim["early"]["metric"], pairs)
    elif "pairs" in claim:
        analysis = analyse(gathered.compared, gathered.metric, pairs, gathered.margin, gathered.examples)
    else:
        analysis = judge(gathered)
    write = Numbers.of(analysis)
    told = []
    for cell, other in pairs.items():
        one = analysis.comparisons[cell]
        interval = write.range(one.corrected_interval, signed=True)
        against = f" against {other}" if analysis.baseline is None else ""
        told.append(f"{cell}{against} {write.difference(one.mean)} ({interval})")
    common = f", against {analysis.baseline}" if analysis.baseline is not None else ""
    text = f"{link}, {analysis.metric}{common}: {'; '.join(told)}"
    return text, _judged(analysis, list(pairs), claim["expects"])


def _early(
    gathered: Gathered, pairs: Mapping[str, str], metric: str, shares: Sequence[float]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Returns a validation metric after shares of the steps as if each share were a cell, and their pairs.

    Each share takes the validation that is nearest to it, and none if that is further than `NEAR` away.
    """
    rows = gathered.validations if gathered.validations is not None else pd.DataFrame(columns=VALIDATED)
    rows = rows[rows["metric"] == metric]
    done = (rows["step"] + 1) / (rows["step"].max() + 1)
    parts, found = [], dict[str, str]()
    for share in shares:
        nearest = done.iloc[(done - share).abs().argsort()[:1]]
        if nearest.empty or abs(nearest.iloc[0] - share) > NEAR:
            continue
        own = rows[done == nearest.iloc[0]]
        after = f" after {share:.0%}"
        parts.append(
            own.assign(cell=own["cell"].astype(str) + after, status=FINISHED, **{metric: own["value"]})
        )
        found |= {cell + after: other + after for cell, other in pairs.items()}
    return (pd.concat(parts) if parts else rows), found


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
