"""The teaching graph as a picture: networks one below the other, arcs from teachers to students."""

from __future__ import annotations

from typing import Any

from distill_jax.report.page import svg
from distill_jax.report.page.record import RunRecord, StageRecord, number, percent
from distill_jax.report.page.svg import Key, Picture

ROW = 0.3  # inches between networks
BULGE = 1.1  # inches that arcs may take at most
MARGIN = 0.2  # inches


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


def _graph(run: RunRecord, stages: list[StageRecord], label: str, name: str) -> Picture:
    row = (*run.networks, *(stage.network for stage in stages))
    networks = [x for x in dict.fromkeys(row) if any(x == stage.network for stage in stages)]
    edges = {
        (teacher, stage.network, methods, teacher in stage.live): None
        for stage in stages
        for teacher, methods in stage.edges.items()
        if teacher in networks
    }
    travels = list(dict.fromkeys((methods, live) for *_, methods, live in edges))

    def draw(figure: Any) -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
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
                "color": svg.colour(travels.index((methods, live))),
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
            own = [stage for stage in stages if stage.network == network]
            axes.text(right, y, _result(run, own), va="center", ha="right")

    legend = [
        Key("╍╍" if live else "━━", i, ", ".join(methods) + " (live)" * live)
        for i, (methods, live) in enumerate(travels)
        if methods
    ]
    return svg.picture(name, label, draw, legend=legend, height=ROW * len(networks))


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
    return "failed" if run.lost & {stage.id for stage in stages} else "not finished"
