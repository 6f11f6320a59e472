"""How the page looks: in light and dark, on paper, on narrow screens."""

from __future__ import annotations

from collections.abc import Sequence

from distill_jax.report.page import svg


def style() -> str:
    """The page's CSS."""
    light = _variables("#fff", "#1b1f24", "#dde1e6", svg.LIGHT)
    dark = _variables("#14171b", "#e3e6ea", "#3a4047", svg.DARK)
    paper = _variables("#fff", "#000", "#ddd", svg.LIGHT)
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media print {{ :root {{ color-scheme: light; {paper} }} }}\n{_CSS}"
    )


def _variables(page: str, text: str, grid: str, colours: Sequence[str]) -> str:
    own = " ".join(f"--c{i}: {value};" for i, value in enumerate(colours))
    return f"--page: {page}; --text: {text}; --grid: {grid}; {own}"


_CSS = """\
body { margin: 0 auto; padding: 1rem; max-width: 88rem; background: var(--page);
  color: var(--text); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; border-top: 2px solid var(--text); }
h3 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
h4 { margin: 1rem 0 .3rem; }
.pictures { margin-top: .6rem; display: flex; flex-wrap: wrap; gap: 1.2rem 1.6rem;
  align-items: flex-start; }
figure { margin: 0; width: 26.5rem; max-width: 100%; break-inside: avoid; }
figcaption { font-weight: 600; }
figure svg { width: 100%; height: auto; display: block; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.legend { list-style: none; margin: .2rem 0; padding: 0; font-size: .85rem;
  display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
.note, .state { font-size: .85rem; margin: .3rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--grid); overflow-wrap: normal; }
td { min-width: 3rem; max-width: 28rem; }
.pairs td { max-width: none; min-width: 12rem; overflow-wrap: anywhere; }
.n { text-align: right; white-space: nowrap; }
pre { font-size: .8rem; white-space: pre-wrap; }
summary { cursor: pointer; }
@media print {
  body { font-size: 11px; max-width: none; padding: 0; }
  h2, h3, h4, .note { break-after: avoid; }
  .pictures { display: block; }
  figure { display: inline-block; width: 47%; margin: 0 2% 1rem 0; vertical-align: top; }
  .wide { overflow: visible; }
  table { font-size: .75rem; }
  tr { break-inside: avoid; }
}
"""
