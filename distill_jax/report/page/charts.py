"""The pictures of a run besides its graph, each from its records; none where there is nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_jax.report.page import svg
from distill_jax.report.page.axes import (
    height_of,
    lines_picture,
    named_lines,
    plain_ticks,
    scaled,
    so_far,
)
from distill_jax.report.page.record import Group, Row, RunRecord, mean, number, spread
from distill_jax.report.page.svg import Key, Picture

BARS = 16  # of a picture, at most
_RELIABILITY = (
    "test set, in bins of confidence, larger where more examples are; on the diagonal it is as "
    "often right as it is sure"
)


def results(runs: Sequence[RunRecord]) -> list[Picture]:
    """The accuracies of each network by guidance, each seed and their mean; over all runs."""
    several = len(runs) > 1
    pictures: list[Picture] = []
    rows = [(run, row) for run in runs for row in run.trained]
    for network in dict.fromkeys(row["network"] for _, row in rows):
        lines: dict[str, list[float]] = {}
        for run, row in rows:
            if row["network"] == network:
                label = f"{run.name}: {row['guidance']}" if several else row["guidance"]
                lines.setdefault(label, []).append(100 * number(row, "test_accuracy"))

        def draw(figure: Any, lines=lines) -> None:
            axes = named_lines(figure, list(lines), "test accuracy, %")
            for i, values in enumerate(lines.values()):
                style: dict[str, Any] = {"color": svg.colour(0), "zorder": 3}
                axes.plot(values, [i] * len(values), "o", mfc="none", alpha=0.6, **style)
                axes.errorbar(mean(values), i, xerr=spread(values), fmt="D", capsize=3, **style)

        note = "◆ mean ± standard deviation, ○ each seed"
        name = f"results-{len(pictures)}"
        pictures.append(
            svg.picture(
                name, f"Test accuracy of {network}", draw, note=note, height=height_of(len(lines))
            )
        )
    return pictures


def curves(run: RunRecord) -> list[Picture]:
    """A picture for each network: its accuracy by epoch, a line for each way of training it."""
    pictures: list[Picture] = []
    for network in dict.fromkeys(group.network for group in run.groups):
        groups = [x for x in run.groups if x.network == network and x.names("epoch")]
        names = [name for group in groups for name in group.names("")]
        wanted = ("valid_accuracy", "test_accuracy", "train_accuracy")
        if not (found := [name for name in wanted if name in names]):
            continue
        lines = [(group.label, group.curves(found[0])) for group in groups]
        split = found[0].partition("_")[0].replace("valid", "validation")
        pictures.append(
            lines_picture(
                f"curves-{len(pictures)}",
                network,
                [(label, scaled(own, 100)) for label, own in lines],
                f"{split} accuracy, %",
                kind="accuracies",
            )
        )
    return pictures


def terms(run: RunRecord) -> list[Picture]:
    """A picture for each way of training a network: what each term adds to its loss."""
    pictures: list[Picture] = []
    for group in run.groups:
        names = group.names("train_weighted_")
        lines = [(x.removeprefix("train_weighted_"), group.curves(x)) for x in names]
        if len(names) > 1:
            lines.insert(0, ("their sum", group.curves("train_loss")))
        if lines:
            title = f"{group.network}: {group.label}"
            name = f"terms-{len(pictures)}"
            pictures.append(
                lines_picture(name, title, lines, "weighted term of the loss", kind="sizes")
            )
    return pictures


def kept(run: RunRecord) -> list[Picture]:
    """A picture for each network some of whose teachers are dropped: how often each was kept."""
    pictures: list[Picture] = []
    for group in run.groups:
        prefix = "train_kept_"
        lines = [(x.removeprefix(prefix), group.curves(x)) for x in group.names(prefix)]
        if lines:
            own = [(label, [so_far(seed) for seed in scaled(x, 100)]) for label, x in lines]
            title = f"{group.network}: {group.label}"
            name = f"kept-{len(pictures)}"
            pictures.append(lines_picture(name, title, own, "kept so far, % of the steps"))
    return pictures


def efficiency(run: RunRecord) -> list[Picture]:
    """Accuracy against parameters, and against latency where that is known."""
    groups = [x for x in run.groups if x.done and not x.stages[0].phase]
    networks = list(dict.fromkeys(group.network for group in groups))
    parameters = {x.network: number(x.done[0].record, "parameters") for x in groups}
    milliseconds = {k: 1000 * v for k, v in run.latency.seconds.items() if k in networks}
    pictures: list[Picture] = []
    for name, title, of, label in (
        ("parameters", "Accuracy against parameters", parameters, "parameters of the network"),
        ("latency", "Accuracy against latency", milliseconds, "time for one example, ms"),
    ):
        own = [group for group in groups if group.network in of]
        if own:
            pictures.append(_scatter(name, title, run, own, of, label))
    return pictures


def agreement(run: RunRecord) -> list[Picture]:
    """A picture for each network: how often it predicts what its teachers do."""
    pictures: list[Picture] = []
    for network in dict.fromkeys(row["network"] for row in run.rows):
        rows = [x for x in run.trained if x["network"] == network and x.get("agreement")]
        teachers = list(dict.fromkeys(name for row in rows for name in row["agreement"]))
        lines: dict[str, list[Row]] = {}
        for row in rows:
            lines.setdefault(row["guidance"], []).append(row["agreement"])
        if not lines:
            continue

        def draw(figure: Any, lines=lines, teachers=teachers) -> None:
            axes = named_lines(figure, list(lines), "agreement with the teacher, % of the test set")
            for k, teacher in enumerate(teachers):
                style = {**svg.look(k), "linestyle": "none"}
                for i, own in enumerate(lines.values()):
                    values = [100 * number(x, teacher) for x in own if teacher in x]
                    axes.errorbar(mean(values), i, xerr=spread(values), capsize=2, **style)

        height, name = height_of(len(lines)), f"agreement-{len(pictures)}"
        legend = svg.keys(teachers)
        title = f"Agreement of {network} with its teachers"
        pictures.append(svg.picture(name, title, draw, legend=legend, height=height))
    return pictures


def reliability(run: RunRecord) -> list[Picture]:
    """A picture for each network: how often it is right, against how sure it is."""
    pictures: list[Picture] = []
    for network in dict.fromkeys(row["network"] for row in run.rows):
        rows = [x for x in run.trained if x["network"] == network and x.get("reliability")]
        lines: dict[str, list[Row]] = {}
        for row in rows:
            lines.setdefault(row["guidance"], []).append(row)
        if not lines:
            continue

        def draw(figure: Any, lines=lines) -> None:
            axes = svg.room(figure)
            axes.plot([0, 100], [0, 100], color=svg.GRID, linewidth=1)
            for i, own in enumerate(lines.values()):
                confidence, right, sizes = _bins([row["reliability"] for row in own])
                style = svg.look(i)
                axes.plot(confidence, right, linewidth=0.9, **{**style, "marker": ""})
                axes.scatter(
                    confidence, right, s=sizes, c=style["color"], marker=style["marker"], zorder=3
                )
            axes.set(xlim=(0, 102), ylim=(-2, 102))
            axes.set(xlabel="confidence, %", ylabel="right, %")

        errors = [100 * mean(number(row, "ece") for row in own) for own in lines.values()]
        names = [f"{x}, ECE {error:.2f} %" for x, error in zip(lines, errors, strict=True)]
        name = f"reliability-{len(pictures)}"
        title = f"Reliability of {network}"
        pictures.append(svg.picture(name, title, draw, legend=svg.keys(names), note=_RELIABILITY))
    return pictures


def costs(run: RunRecord) -> list[Picture]:
    """Time and memory of the stages, of each the mean over seeds."""
    taken = [(x, mean(number(s.record, "seconds") for s in x.done)) for x in run.groups if x.done]
    peaks = [(x, [s.memory[0] for s in x.stages if s.memory]) for x in run.groups]
    needed = [(x, max(own) / 2**20) for x, own in peaks if own]
    pictures: list[Picture] = []
    for name, title, values, label in (
        ("time", "Time", [(x, value) for x, value in taken if value], "seconds, mean over seeds"),
        ("memory", "Memory", needed, "most memory in use until then, MiB"),
    ):
        for part in range(0, len(values), BARS):
            own = values[part : part + BARS]
            names = [f"{x.network}: {x.label}" for x, _ in own]

            def draw(figure: Any, own=own, names=names, label=label) -> None:
                axes = named_lines(figure, names, label)
                axes.barh(range(len(own)), [value for _, value in own], 0.6, color=svg.colour(0))

            height = height_of(len(own))
            pictures.append(svg.picture(f"{name}-{part}", title, draw, height=height))
    return pictures


def _scatter(
    name: str,
    title: str,
    run: RunRecord,
    groups: Sequence[Group],
    of: dict[str, float],
    label: str,
) -> Picture:
    labels, networks = run.labels, list(dict.fromkeys(group.network for group in groups))
    glyphs = dict(zip(svg.MARKERS, svg.MARKERS.values(), strict=True))
    markers = {x: list(glyphs)[i % len(glyphs)] for i, x in enumerate(networks)}
    # A network that several guidances use, as a teacher is, has the colour of none of them.
    own = {group.label: group.guidance[0] for group in groups if len(group.guidance) == 1}
    shared = any(len(group.guidance) > 1 for group in groups)

    def colour(group: Group) -> str:
        return svg.colour(labels.index(own[group.label])) if group.label in own else svg.TEXT

    def draw(figure: Any) -> None:
        from matplotlib.transforms import ScaledTranslation

        axes, drawn = svg.room(figure), dict.fromkeys(networks, 0)
        axes.margins(x=0.12)
        for group in groups:
            # Networks of one size stand side by side.
            aside = ScaledTranslation(drawn[group.network] * 5 / 72, 0, figure.dpi_scale_trans)
            drawn[group.network] += 1
            values = [100 * x for x in group.accuracies]
            # Draws nothing: what is moved aside does not count for the limits.
            reach = spread(values) or 0.0
            ends = [mean(values) - reach, mean(values) + reach]
            axes.plot([of[group.network]] * 2, ends, linestyle="none")
            axes.errorbar(
                of[group.network],
                mean(values),
                yerr=spread(values),
                fmt=markers[group.network],
                color=colour(group),
                capsize=2,
                transform=axes.transData + aside,
            )
        if max(of.values()) > 4 * min(of.values()):
            axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set(xlabel=label, ylabel="test accuracy, %")

    legend = [Key(glyphs[marker], None, network) for network, marker in markers.items()]
    legend += [Key("■", i, label) for i, label in enumerate(labels) if label in own.values()]
    note = "ways of training one network stand side by side"
    note += "; in the colour of the text: part of several" if shared and own else ""
    return svg.picture(name, title, draw, legend=legend, note=note)


def _bins(records: Sequence[Row]) -> tuple[list[float], list[float], list[float]]:
    """Mean confidence and share that is right, %, and size of each bin that has examples."""
    sums = [
        [sum(values) for values in zip(*(record[name] for record in records), strict=True)]
        for name in ("count", "confidence", "right")
    ]
    filled = [(c, s, r) for c, s, r in zip(*sums, strict=True) if c]
    total = sum(c for c, *_ in filled)
    return (
        [100 * s / c for c, s, _ in filled],
        [100 * r / c for c, _, r in filled],
        [6 + 80 * c / total for c, *_ in filled],
    )
