"""Pictures as SVG that stands in an HTML page: text stays text, colours are those of the theme."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Placeholders, which the page's style replaces: each theme has colours of its own.
TEXT, GRID = "#010203", "#040506"
# Told apart by colour-blind readers too (Okabe and Ito 2008), yellow left out on white.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b8649b", "#d18f00", "#3fa0d8", "#7d7d7d")
DARK = ("#4aa8e8", "#f0803c", "#2bc095", "#dd9ac0", "#edb13d", "#9ad2f7", "#a8a8a8")
DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 2, 1.2, 2)))
LINES = ("━", "╍", "┅", "┉")  # in a legend
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
WIDTH = 4.4  # inches
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "distill_jax",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "text.parse_math": False,
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


class Key(NamedTuple):
    """An entry of a legend: glyph, number of its colour (None is that of text), and what it is."""

    glyph: str
    colour: int | None
    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with what is said below it.

    Args:
      name: an identifier, its own among those of a page.
      title: above it.
      svg: the picture.
      legend: of what is drawn.
      note: how to read it.
    """

    name: str
    title: str
    svg: str
    legend: list[Key]
    note: str = ""


def colour(i: int) -> str:
    """The colour of the i-th of several things."""
    return LIGHT[i % len(LIGHT)]


def keys(names: Sequence[str]) -> list[Key]:
    """The legend of lines that have each their look."""
    glyphs = list(MARKERS.values())
    return [
        Key(LINES[i // len(LIGHT) % len(LINES)] + glyphs[i % len(glyphs)], i, name)
        for i, name in enumerate(names)
    ]


def look(i: int) -> dict[str, Any]:
    """Colour, dashes and marker of the i-th of several lines."""
    markers = list(MARKERS)
    return {
        "color": colour(i),
        "linestyle": DASHES[i // len(LIGHT) % len(DASHES)],
        "marker": markers[i % len(markers)],
    }


def cut(text: str, length: int = 26) -> str:
    """A text that is not longer, its middle left out where it is."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - half]}…{text[-half:]}"


def room(figure: Figure, left: float = 0.72) -> Any:
    """Axes with inches for what is written around them; measuring that takes most of the time."""
    width, height = figure.get_size_inches()
    below, beside = 0.46, 0.14
    places = (left / width, below / height, 1 - (left + beside) / width)
    return figure.add_axes((*places, 1 - (below + beside) / height))


@contextlib.contextmanager
def empty(height: float) -> Iterator[Figure]:
    """A figure to draw on, in the style of all pictures, which lasts as long as the context.

    Args:
      height: inches.
    """
    import matplotlib  # takes half a second, which nothing else should
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own are
        matplotlib.rcParams.update(_STYLE)
        yield Figure(figsize=(WIDTH, height))


def picture(
    name: str,
    title: str,
    draw: Callable[[Figure], None],
    *,
    legend: Sequence[Key] = (),
    note: str = "",
    height: float = 2.9,
) -> Picture:
    """Draws a picture.

    Args:
      name: see `Picture`.
      title: likewise.
      draw: on an empty figure.
      legend: see `Picture`.
      note: likewise.
      height: inches.
    """
    with empty(height) as figure:
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Picture(name, title, _inlined(text.getvalue(), name, title), list(legend), note)


def _inlined(svg: str, name: str, title: str) -> str:
    """The SVG without what a page has no use for, its ids made the page's own."""
    svg = svg[svg.index("<svg") :]
    for part in (r"<metadata>.*?</metadata>", r"<!--.*?-->", r"<style.*?</style>"):
        svg = re.sub(part, "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg.strip())
    for placeholder, variable in _variables().items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    label = html.escape(title)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _variables() -> dict[str, str]:
    return {TEXT: "text", GRID: "grid", **{value: f"c{i}" for i, value in enumerate(LIGHT)}}
