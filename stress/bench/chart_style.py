"""How every chart looks: paper, ink and colours in light and in dark, letters, and the same bytes each time.

Guarantees: text is text, in whatever sans-serif the reader has; nothing in a file depends on when or where it was
drawn. Colours are those of Okabe and Ito, which people with any colour vision can tell apart; no line is told from
another by its colour alone.

What does not belong here: what is drawn (`charts`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["LABELS", "OURS", "THEMES", "WIDTH", "Axes", "Chart", "Theme", "label_of", "rendered"]

Axes: TypeAlias = Any

OURS = "async_ckpt"
WIDTH = 410.0
"""Of every chart, in points: about 550 pixels, so that letters can still be read on a telephone."""

LABELS = {
    OURS: "async-ckpt",
    "Lightning": "Lightning’s plugin",
    "dcp.async_save": "torch DCP",
    "dcp.async_save, kept stager": "torch DCP, stager kept",
    "dcp.async_save, process": "torch DCP, process",
    "torch.save": "torch.save",
}
"""What a reader knows the contestants by; what is not here has a good name already."""

_LETTERS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # what is measured with; it is wider than what readers have
    "font.size": 10.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "async-ckpt",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours for one kind of paper."""

    name: str
    paper: str
    ink: str
    soft: str
    grid: str
    colours: dict[str, str]

    def of(self, name: str) -> str:
        """Return the colour of a contestant."""
        return next((colour for start, colour in self.colours.items() if name.startswith(start)), self.soft)


THEMES = (
    Theme(
        name="light",
        paper="#ffffff",
        ink="#1f2328",
        soft="#59636e",
        grid="#d8dee4",
        colours={OURS: "#0072b2", "Lightning": "#c04f00", "dcp": "#007f5c"},
    ),
    Theme(
        name="dark",
        paper="#131416",
        ink="#e6edf3",
        soft="#9aa4af",
        grid="#343b44",
        colours={OURS: "#56b4e9", "Lightning": "#f0a030", "dcp": "#2fc59a"},
    ),
)


class Chart:
    """A figure of which everything has its place in points from the top left, under a title and a line below it."""

    def __init__(self, theme: Theme, *, height: float, title: str, subtitle: str) -> None:
        self.theme = theme
        self._height = height
        self.figure = Figure(figsize=(WIDTH / 72, height / 72))
        self.figure.patch.set_visible(False)
        self.text(2, 4, title, size=12.5, weight="bold")
        self.text(2, 22 + 16 * title.count("\n"), subtitle, color=theme.soft, size=9.5)

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        """Put *words* with their upper left corner at a point."""
        style.setdefault("color", self.theme.ink)
        self.figure.text(x / WIDTH, 1 - y / self._height, words, va="top", linespacing=1.25, **style)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return axes with a grid that stays behind what is drawn."""
        box = (
            left / WIDTH,
            1 - (top + height) / self._height,
            width / WIDTH,
            height / self._height,
        )
        axes = self.figure.add_axes(box)
        axes.patch.set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(colors=self.theme.soft, length=0, labelsize=9.5, pad=4)
        for spine in axes.spines.values():
            spine.set_color(self.theme.grid)
        return axes


def label_of(name: str) -> str:
    """Return what a reader knows a contestant by."""
    return LABELS.get(name, name.replace(OURS, LABELS[OURS]))


def rendered(draw: Callable[[Theme], Chart], theme: Theme) -> str:
    """Return a chart as SVG: the same bytes each time, with the same matplotlib."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the reader's own settings are
        matplotlib.rcParams.update(_LETTERS)
        figure = draw(theme).figure
        FigureCanvasSVG(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r" <metadata>.*?</metadata>\n", "", text, flags=re.DOTALL)
    text = re.sub(r'(width|height)="([\d.]+)pt"', _in_pixels, text)
    text = re.sub(r"font-family: 'DejaVu Sans'[^;\"]*", "font-family: system-ui, sans-serif", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", text)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _in_pixels(size: re.Match[str]) -> str:
    return f'{size[1]}="{float(size[2]) * 4 / 3:.0f}"'
