"""The picture of where in a model the adapters use rank: layers from bottom to top, modules side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Place = tuple[int | None, str, str, float | None]
"""Layer, role, path and effective rank of one adapter."""


def rank_heatmap(places: Sequence[Place]) -> UInt8[np.ndarray, "height width 3"] | None:
    """Draws effective rank over layer and module.

    Args:
        places: the adapters; those without a layer or an effective rank are left out.

    Returns:
        The picture as RGB; None where there is nothing to draw.
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
    return _draw(values, layers, columns)


def _labels(places: list[tuple[int, str, str]]) -> list[str]:
    """Returns each adapter's column: its role, or where a layer has that twice its path without the layer."""
    counts = Counter((layer, role) for layer, role, _ in places)
    twice = {role for (_, role), count in counts.items() if count > 1}
    bare = [re.sub(rf"(^|\.){layer}\.", r"\1", path, count=1) for layer, _, path in places]
    return [path if role in twice else role for path, (_, role, _) in zip(bare, places, strict=True)]


def _draw(
    values: np.ndarray, layers: Sequence[int], columns: Sequence[str]
) -> UInt8[np.ndarray, "height width 3"]:
    height, width = 1.3 + 0.32 * len(layers), 2.2 + 0.85 * len(columns)
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    largest = np.nanmax(values, initial=1.0)
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=largest, aspect="auto", origin="lower")
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value = values[row, column]
        colour = "black" if value > 0.6 * largest else "white"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axes.set_ylabel("layer")
    axes.set_title("effective rank", fontsize=10)
    figure.colorbar(image, ax=axes)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
