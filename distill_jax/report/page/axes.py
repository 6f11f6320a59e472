"""Axes that several pictures have in common."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

from distill_jax.report.page import svg
from distill_jax.report.page.record import mean
from distill_jax.report.page.svg import Picture

LINE = 0.27  # inches of a line of a picture with names at its left
CHARACTER = 0.076  # inches
Curve = list[tuple[float, float]]  # (epoch, value) of a seed


def height_of(lines: int) -> float:
    """Inches of a picture with names at its left."""
    return 0.75 + LINE * lines


def named_lines(figure: Any, names: Sequence[str], label: str) -> Any:
    """Axes with a name at the left of each line, the first one on top."""
    texts = [svg.cut(name) for name in names]
    axes = svg.room(figure, 0.2 + CHARACTER * max(map(len, texts)))
    axes.set_yticks(range(len(names)), texts)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=label)
    axes.grid(visible=False, axis="y")
    axes.xaxis.get_major_locator().set_params(nbins=5)
    return axes


def lines_picture(
    name: str,
    title: str,
    lines: Sequence[tuple[str, list[Curve]]],
    label: str,
    *,
    kind: str = "",
) -> Picture:
    """Lines over epochs: means over seeds, with a band from the lowest to the highest of them.

    Args:
      name: see `svg.picture`.
      title: likewise.
      lines: text and seeds of each.
      label: of the values.
      kind: "accuracies" may leave the first epochs out, "sizes" may be logarithmic, and begin at
        zero where they are not.
    """
    counts = {count for _, own in lines for count in _seeds_by_epoch(own).values()}
    fewest, most = min(counts), max(counts)
    every = [value for _, own in lines for seed in own for _, value in seed]
    bottom = _bottom(lines) if kind == "accuracies" else None
    positive = [value for value in every if value > 0]
    # Terms of one loss differ by orders of magnitude, or do not: then zero is worth seeing.
    wide = kind == "sizes" and len(positive) == len(every) and max(every) > 30 * min(every)

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = svg.room(figure)
        for i, (_, own) in enumerate(lines):
            epochs, low, middle, high = _band(own)
            # Of many epochs marks on some tell lines apart that have one colour.
            axes.plot(epochs, middle, **svg.look(i), markevery=max(1, len(epochs) // 8))
            if most > 1:
                axes.fill_between(epochs, low, high, color=svg.colour(i), alpha=0.18, linewidth=0)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        first, last = axes.dataLim.intervalx
        if last - first < 2:
            axes.set_xlim(first - 0.5, last + 0.5)
        if wide:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
        elif kind == "sizes" and len(positive) == len(every):
            axes.set_ylim(0, 1.06 * max(every))
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        if kind == "accuracies":
            low, high = axes.get_ylim()
            axes.set_ylim(top=min(high, 100 + 0.02 * (100 - low)))

    of = f"{most} seeds"
    if fewest < most:  # some are not trained to the end, or not yet
        of = f"the seeds that have the epoch, {fewest} to {most}"
    notes = [f"mean of {of}; the band is from the lowest to the highest"] * (most > 1)
    notes += ["the first epochs lie below the picture"] * (bottom is not None)
    legend = svg.keys([text for text, _ in lines])
    return svg.picture(name, title, draw, legend=legend, note="; ".join(notes))


def _bottom(lines: Sequence[tuple[str, list[Curve]]]) -> float | None:
    """Where an axis begins that shows how later epochs differ; None where it shows that anyway."""
    points = [point for _, own in lines for seed in own for point in seed]
    last = max(epoch for epoch, _ in points)
    late = [value for epoch, value in points if epoch > last / 4]
    low, high = min(late), max(late)
    if last < 20 or low - min(value for _, value in points) < 2 * (high - low):
        return None
    return low - 0.3 * (high - low or 1.0)


def plain_ticks(axis: Any) -> None:
    """Ticks as short numbers such as 20k, few enough to stand side by side."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axis.set_minor_locator(NullLocator())
    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        decades = math.log10(high / low)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,), numticks=8))
    else:
        axis.get_major_locator().set_params(nbins=5)


def short(number: float) -> str:
    """A number as text: 0.02, 500, 20k, 1.5M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def so_far(seed: Curve) -> Curve:
    """The means of a seed's values up to each epoch."""
    return [(epoch, mean(value for _, value in seed[:n])) for n, (epoch, _) in enumerate(seed, 1)]


def scaled(seeds: list[Curve], factor: float) -> list[Curve]:
    """Each seed's values times a factor."""
    return [[(epoch, factor * value) for epoch, value in seed] for seed in seeds]


def _seeds_by_epoch(seeds: list[Curve]) -> collections.Counter[float]:
    """How many seeds have each epoch."""
    return collections.Counter(epoch for seed in seeds for epoch, _ in seed)


def _band(seeds: list[Curve]) -> tuple[list[float], ...]:
    """Epochs, and of each the lowest, the mean and the highest of the seeds that have it."""
    by_epoch: dict[float, list[float]] = {}
    for seed in seeds:
        for epoch, value in seed:
            by_epoch.setdefault(epoch, []).append(value)
    epochs = sorted(by_epoch)
    reductions: tuple[Callable[[list[float]], float], ...] = (min, mean, max)
    return (epochs, *([reduce(by_epoch[x]) for x in epochs] for reduce in reductions))
