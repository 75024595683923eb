"""SVG inside a page: it has the page's colours, in light and dark, and its points have tooltips.

Matplotlib draws with placeholder colours, which become CSS variables. Own code, because libraries for
interactive figures add megabytes of script to every page and have only one theme at a time.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = {
    name: f"#0{place:x}0{place:x}0{place:x}"
    for place, name in enumerate(
        ("ink", "muted", "line", "paper", "good", "bad", "even", *(f"c{i}" for i in range(6))), start=1
    )
}
"""Name of a CSS variable → its placeholder."""
THEMES = {
    "light": "--ink:#1c2330;--muted:#5d6779;--line:#d8dde6;--paper:#ffffff;--good:#15803d;--bad:#b42318;"
    "--even:#1d4ed8;--c0:#1d4ed8;--c1:#c2570c;--c2:#0f7b5f;--c3:#be185d;--c4:#6d28d9;--c5:#0e7490",
    "dark": "--ink:#e6e9ef;--muted:#9aa4b5;--line:#333b49;--paper:#14181f;--good:#4ade80;--bad:#f87171;"
    "--even:#7aa2ff;--c0:#7aa2ff;--c1:#fb9a4b;--c2:#4fd1a5;--c3:#f58ac0;--c4:#b79cff;--c5:#4cc9dd",
}
"""Values of the variables."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora_lab",
    "font.size": 9.5,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


class Drawing:
    """A figure of one panel."""

    def __init__(self, title: str, size: tuple[float, float]):
        self.title = title
        self.figure = Figure(figsize=size, layout="constrained")
        self.figure.patch.set_alpha(0)
        self.axes: Axes = self.figure.subplots()
        self._tips: dict[str, str] = {}

    def lay_out(self) -> None:
        """Lays out the axes around their texts, once."""
        engine = self.figure.get_layout_engine()
        if engine is not None:
            engine.execute(self.figure)
        self.figure.set_layout_engine("none")

    def tip(self, artist: Artist, text: str) -> None:
        """Gives an artist a tooltip."""
        name = f"tip{len(self._tips)}"
        artist.set_gid(name)
        self._tips[name] = text

    def svg(self, prefix: str) -> str:
        """Returns an `<svg>` element.

        Args:
            prefix: makes its ids differ from those of the page's other figures.
        """
        text = io.StringIO()
        with matplotlib.rc_context(STYLE):
            self.lay_out()
            # `savefig` would lay out and draw everything twice.
            FigureCanvasSVG(self.figure).print_svg(text, metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        for name, tip in self._tips.items():
            svg = svg.replace(f'<g id="{name}">', f'<g id="{name}"><title>{html.escape(tip)}</title>', 1)
        svg = re.sub(r'\bid="', f'id="{prefix}', svg)
        svg = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}", svg)
        for name, colour in COLOURS.items():
            svg = svg.replace(colour, f"var(--{name})")
        svg = re.sub(r"(font:[^;\"]*?[\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
        label = html.escape(self.title, quote=True)
        size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
        width = f"{float(size[1]) * 4 / 3:.0f}px" if size else "100%"
        return re.sub(
            r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ',
            lambda found: f'<svg role="img" aria-label="{label}" style="--width:{width}" {found[1] or ""}',
            svg,
            count=1,
        )


@contextmanager
def drawing(title: str, size: tuple[float, float] = (4.4, 3.1)) -> Iterator[Drawing]:
    """Yields an empty drawing under the style of the pages.

    Args:
        title: text for readers who cannot see the figure.
        size: width and height in inches; 4.4 is the width of a phone.
    """
    with matplotlib.rc_context(STYLE):
        yield Drawing(title, size)


def alone(svg: str) -> str:
    """Returns the file of a drawing that stands alone, with both themes in it."""
    style = (
        f"<style>svg{{{THEMES['light']}}}@media(prefers-color-scheme:dark){{svg{{{THEMES['dark']}}}}}</style>"
    )
    head, body = svg[: svg.index(">") + 1], svg[svg.index(">") + 1 :]
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{style}{body}'
