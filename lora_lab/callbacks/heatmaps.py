"""Pictures of where in a model the adapters use rank, and how this has changed during a run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Picture = UInt8[np.ndarray, "height width 3"]
"""RGB."""

Place = tuple[int | None, str, str, float | None]
"""Layer, role, path and effective rank of one adapter."""

MOST_COLUMNS = 120
"""Most steps that one picture shows; of more, this many at equal distances."""


def rank_heatmap(places: Sequence[Place]) -> Picture | None:
    """Draws effective rank over layer, from bottom to top, and module, side by side.

    Args:
        places: the adapters; those without a layer or an effective rank are left out.

    Returns:
        The picture; None if there is nothing to draw.
    """
    drawn = [
        (layer, role, path, rank)
        for layer, role, path, rank in places
        if layer is not None and rank is not None
    ]
    if not drawn:
        return None
    labels = _labels([(layer, role, path) for layer, role, path, _ in drawn])
    columns = list(dict.fromkeys(labels))
    layers = sorted({layer for layer, *_ in drawn})
    values = np.full((len(layers), len(columns)), np.nan)
    for label, (layer, _, _, rank) in zip(labels, drawn, strict=True):
        values[layers.index(layer), columns.index(label)] = rank
    figure, axes, largest = _draw(values, (2.2 + 0.85 * len(columns), 1.3 + 0.32 * len(layers)))
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value = values[row, column]
        colour = "black" if value > 0.6 * largest else "white"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
    slanted: Any = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), columns, fontsize=8, parse_math=False, **slanted)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axes.set_ylabel("layer")
    axes.set_title("effective rank", fontsize=10)
    return _pixels(figure)


def history_heatmap(
    places: Sequence[Place], steps: Sequence[int], ranks: Float[np.ndarray, "moments adapters"]
) -> Picture | None:
    """Draws rank over adapter, layers from bottom to top, and optimizer step.

    Args:
        places: the adapters.
        steps: steps done at each time, ascending.
        ranks: ranks in use at each time; NaN for methods without a rank.

    Returns:
        The picture; None if no rank ever changed.
    """
    if len(steps) < 2 or not (ranks != ranks[0]).any():
        return None
    chosen = np.unique(np.linspace(0, len(steps) - 1, MOST_COLUMNS).round().astype(int))
    order = sorted(range(len(places)), key=lambda i: (places[i][0] is None, places[i][0] or 0, i))
    values = ranks[chosen][:, order].T
    names = _labels([(layer or 0, role, path) for layer, role, path, _ in places])
    rows = [f"{names[i]} {'' if places[i][0] is None else places[i][0]}" for i in order]
    figure, axes, _ = _draw(values, (8.0, 1.3 + 0.17 * len(rows)))
    marks = np.unique(np.linspace(0, len(chosen) - 1, 9).round().astype(int))
    axes.set_xticks(marks, [str(steps[chosen[mark]]) for mark in marks], fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=6, parse_math=False)
    axes.set_xlabel("optimizer step")
    axes.set_title("rank in use", fontsize=10)
    return _pixels(figure)


def _labels(places: list[tuple[int, str, str]]) -> list[str]:
    """Returns each adapter's column: its role, or its path without the layer if the role occurs twice."""
    counts = Counter((layer, role) for layer, role, _ in places)
    twice = {role for (_, role), count in counts.items() if count > 1}
    bare = [re.sub(rf"(^|\.){layer}\.", r"\1", path, count=1) for layer, _, path in places]
    return [path if role in twice else role for path, (_, role, _) in zip(bare, places, strict=True)]


def _draw(values: np.ndarray, size: tuple[float, float]) -> tuple[Figure, Axes, float]:
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.add_subplot()
    largest = float(np.nanmax(values, initial=1.0))
    image = axes.imshow(
        values, cmap="viridis", vmin=0, vmax=largest, aspect="auto", origin="lower", interpolation="nearest"
    )
    figure.colorbar(image, ax=axes)
    return figure, axes, largest


def _pixels(figure: Figure) -> Picture:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
