"""Tables and verdicts from the rows of `adapter_cost`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from lora_lab.bench.adapter_cases import CASES

HEADINGS = (
    "method",
    "step / PEFT's (rounds)",
    "goal",
    "saved / PEFT's",
    "goal",
    "step / limit",
    "saved / limit",
    "peak / limit",
    "inject, ms",
    "merge, ms",
    "file, MB",
)
TABLES = {
    "ours / PEFT's": (0, 1, 2, 3, 4),
    "PEFT's → ours, over the frozen base": (0, 5, 6, 7),
    "PEFT's → ours, once": (0, 8, 9, 10),
}
"""Titles of the tables and which of `HEADINGS` they show; one table would be too wide for a terminal."""


def read_rows(path: Path) -> pd.DataFrame:
    """Reads what `adapter_cost` wrote."""
    return pd.read_csv(path)


def cells(rows: pd.DataFrame, shapes: str) -> list[list[str]]:
    """Returns a line for each method on one model's shapes, under `HEADINGS`.

    Numbers are medians over the rounds of ratios within a round.
    """
    chosen = rows[rows["shapes"] == shapes]
    return [_line(name, chosen[chosen["method"] == name], shapes) for name in chosen["method"].unique()]


def _line(name: str, rows: pd.DataFrame, shapes: str) -> list[str]:
    wide = rows.pivot(index=["measure", "round"], columns="side", values="value")
    against_peft, goal = wide["ours"] / wide["peft"], CASES[name]
    time, saved = against_peft["step_seconds"], against_peft["saved_bytes"].median()
    on_limit = wide[["peft", "ours"]].div(wide["limit"], axis=0)

    def pair(values: pd.DataFrame, measure: str, form: str, unit: float = 1.0) -> str:
        middle: Any = values.loc[measure].median() / unit
        return f"{middle['peft']:{form}} → {middle['ours']:{form}}"

    return [
        name,
        f"{time.median():.2f} ({time.min():.2f} … {time.max():.2f})",
        _verdict(time.median(), goal.time),
        f"{saved:.2f}",
        _verdict(saved, goal.saved) if shapes == "bert" else "",
        *(pair(on_limit, measure, ".2f") for measure in ("step_seconds", "saved_bytes", "peak_bytes")),
        *(pair(wide, measure, ".0f", 1e-3) for measure in ("inject_seconds", "merge_seconds")),
        pair(wide, "file_bytes", ".2f", 1e6),
    ]


def _verdict(value: float, goal: float) -> str:
    return f"{goal:.2f} {'met' if round(value, 2) <= goal else 'missed'}"


def show_tables(rows: pd.DataFrame, console: Console) -> None:
    """Prints the tables of each model's shapes, and how many goals are met."""
    for shapes in rows["shapes"].unique():
        lines = cells(rows, shapes)
        for title, columns in TABLES.items():
            table = Table(*(HEADINGS[column] for column in columns), title=f"{shapes}: {title}")
            for line in lines:
                shown = (line[column] for column in columns)
                table.add_row(*(f"[red]{cell}[/]" if cell.endswith("missed") else cell for cell in shown))
            console.print(table)
        verdicts = [line[column] for line in lines for column in (2, 4) if line[column]]
        met = sum(verdict.endswith("met") for verdict in verdicts)
        console.print(f"{met} of {len(verdicts)} goals met on the shapes of {shapes}.")


def show_markdown(rows: pd.DataFrame) -> str:
    """Returns the same tables for a README."""
    found = []
    for shapes in rows["shapes"].unique():
        lines = cells(rows, shapes)
        for title, columns in TABLES.items():
            shown = [[line[column] for column in columns] for line in [HEADINGS, *lines]]
            shown.insert(1, ["---"] * len(columns))
            table = "\n".join(f"| {' | '.join(line)} |" for line in shown)
            found.append(f"`{shapes}`: {title}\n\n{table}")
    return "\n\n".join(found)
