"""What experiments with several runs share: a spread over seeds, a table, a picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def spread(values: pd.Series[Any], form: str = ".3f") -> str:
    """Returns `mean (lowest to highest)`, or nothing if there are no values.

    Args:
        values: one number for each seed.
        form: format of a number.
    """
    if values.empty:
        return ""
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"


def escaped(text: str) -> str:
    """Returns a text in one line that Markdown shows as it is written, in a table too."""
    # `_` within a word, and `<` and `&` where they begin no tag or entity, mean nothing.
    special = r"[\\`*\[\]|~$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, r"\\\g<0>", " ".join(text.split()))


def paragraph(text: str) -> str:
    """Returns `escaped`, for a line of its own, which is to begin no list or heading."""
    return re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[#>+-]))", r"\1\\", escaped(text))


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    text = [f"| {' | '.join(map(str, cells))} |" for cells in lines]
    text[1] = text[1].replace(" ", "")
    return "\n".join(text)


@contextmanager
def picture(path: Path, panels: int = 1, size: tuple[float, float] = (7, 4)) -> Iterator[list[Axes]]:
    """Yields empty axes side by side; writes the picture when the context ends.

    Args:
        path: a PNG file.
        panels: number of axes.
        size: width and height in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    yield axes
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
