"""The teaching graph as a picture: networks one below the other, arcs from teachers to students."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from distill_jax.report.page import svg
from distill_jax.report.page.record import RunRecord, StageRecord, number, percent
from distill_jax.report.page.svg import Key, Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW = 0.3  # inches between networks
BULGE = 1.1  # inches that arcs may take at most
MARGIN = 0.2  # inches
DPI = 200  # of a figure that is no SVG


def graphs(run: RunRecord) -> list[Picture]:
    """A picture for each guidance in which somebody teaches; one of all networks where none does.

    A guidance with the graph of another one, such as a value of a sweep, has a picture too: its
    accuracies are its own.
    """
    pictures: list[Picture] = []
    for label in run.labels:
        stages = [x for x in run.stages if label in x.guidance and not x.phase]
        if any(stage.edges for stage in stages):
            pictures.append(_graph(run, stages, label, f"graph-{len(pictures)}"))
    if not pictures and run.stages:
        pictures.append(_graph(run, run.stages, "nobody teaches", "graph-0"))
    return pictures


def graph_figure(stages: Sequence[StageRecord]) -> Figure:
    """The graph that stages make, without results, as a figure that stands alone."""
    teaching = _Teaching(stages)
    keys = teaching.legend()
    height = ROW * (len(teaching.networks) + 0.8 * len(keys))
    with svg.empty(height) as figure:
        figure.set(dpi=DPI, facecolor="white")
        share = ROW * len(teaching.networks) / height
        teaching.draw(figure.add_axes((0, 1 - share, 1, share)), lambda network: "")
        for i, key in enumerate(keys):
            x, y = MARGIN / svg.WIDTH, (1 - share) * (len(keys) - i - 0.5) / len(keys)
            figure.text(x, y, f"{key.glyph} {key.text}", color=svg.colour(i), va="center")
    return figure


def _graph(run: RunRecord, stages: list[StageRecord], label: str, name: str) -> Picture:
    teaching = _Teaching(stages, run.networks)

    def result(network: str) -> str:
        return _result(run, [stage for stage in stages if stage.network == network])

    def draw(figure: Figure) -> None:
        teaching.draw(figure.add_axes((0, 0, 1, 1)), result)

    height = ROW * len(teaching.networks)
    return svg.picture(name, label, draw, legend=teaching.legend(), height=height)


class _Teaching:
    """Who teaches whom among stages.

    Args:
      stages: of them.
      row: their networks in an order; those that it does not have follow.
    """

    def __init__(self, stages: Sequence[StageRecord], row: Sequence[str] = ()):
        own = [stage.network for stage in stages]
        self.networks = [x for x in dict.fromkeys((*row, *own)) if x in own]
        edges = {
            (teacher, stage.network, methods, teacher in stage.live): None
            for stage in stages
            for teacher, methods in stage.edges.items()
            if teacher in self.networks
        }
        self.edges = list(edges)
        self.travels = list(dict.fromkeys((methods, live) for *_, methods, live in edges))

    def legend(self) -> list[Key]:
        """What travels along the edges, by colour."""
        return [
            Key("╍╍" if live else "━━", i, ", ".join(methods) + " (live)" * live)
            for i, (methods, live) in enumerate(self.travels)
            if methods
        ]

    def draw(self, axes: Any, result: Callable[[str], str]) -> None:
        """Draws networks with their results, and arcs, on axes of ROW inches a network."""
        axes.set_axis_off()
        networks, edges = self.networks, self.edges
        height = ROW * len(networks)
        spans = [abs(networks.index(a) - networks.index(b)) for a, b, *_ in edges]
        bend = min(0.55, 2 * BULGE / max(height - ROW, ROW))
        # In inches, with the networks at 0 and the arcs left of them.
        left = -MARGIN - bend * ROW * max(spans, default=0) / 2
        right = svg.WIDTH + left - 0.05
        axes.set(xlim=(left, svg.WIDTH + left), ylim=(-height + ROW / 2, ROW / 2))
        places = {network: -ROW * i for i, network in enumerate(networks)}
        for teacher, student, methods, live in edges:
            style: dict[str, Any] = {
                "color": svg.colour(self.travels.index((methods, live))),
                "linewidth": 1.1,
            }
            if teacher == student:
                axes.text(-0.12, places[student], "↻", ha="right", va="center", size=12, **style)
                continue
            both = (student, teacher, methods, live) in edges
            if not both or networks.index(teacher) < networks.index(student):
                _arrow(axes, places[teacher], places[student], bend, live, both, style["color"])
        for network, y in places.items():
            axes.plot(0, y, "o", color=svg.TEXT, markersize=6)
            axes.text(0.14, y, svg.cut(network), va="center")
            axes.text(right, y, result(network), va="center", ha="right")


def _arrow(
    axes: Any, start: float, end: float, bend: float, live: bool, both: bool, colour: str
) -> None:
    from matplotlib.patches import FancyArrowPatch

    axes.add_patch(
        FancyArrowPatch(
            (0, start),
            (0, end),
            # Always left; upward ones are flatter, so that none hides a downward one.
            connectionstyle=f"arc3,rad={bend if end < start else -bend * 0.6}",
            arrowstyle="<|-|>" if both else "-|>",
            mutation_scale=10,
            shrinkA=4,
            shrinkB=4,
            linestyle="--" if live else "-",
            linewidth=1.1,
            color=colour,
        )
    )


def _result(run: RunRecord, stages: list[StageRecord]) -> str:
    done = [number(stage.record, "test_accuracy") for stage in stages if stage.record]
    if done:
        return percent(done)
    if stages and all(stage.given for stage in stages):
        return "given"
    return "failed" if run.lost & {stage.id for stage in stages} else "not finished"
