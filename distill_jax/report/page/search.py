"""A search of hyperparameters on the page: what it tried, and what each field made of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from distill_jax.report.page import svg
from distill_jax.report.page.axes import plain_ticks
from distill_jax.report.page.record import RecordError, Row, check, number
from distill_jax.report.page.sections import Table
from distill_jax.report.page.svg import Key, Picture

_FIELDS = {"name": str, "guidance": str, "network": str, "seeds": list, "space": dict}
_FIELDS |= {"trials": list, "config": dict, "sampler": str, "pruner": str}
_TRIAL = {"trial": int, "state": str, "point": dict}
STATES = ("complete", "pruned", "failed")
_DOTS = {"complete": "o", "pruned": "X"}  # markers
_KEYS = [Key("●", 0, "a trial"), Key("✖", 6, "pruned: the last that it had")]
CUT = 14  # characters of a choice


@dataclasses.dataclass(frozen=True)
class SearchRecord:
    """A search as its folder has it.

    Args:
      name: of the folder.
      found: the content of `search.json`.

    Raises:
      RecordError: something in it is of another kind than a search writes.
    """

    name: str
    found: dict[str, Any]

    def __post_init__(self) -> None:
        check(self.found, _FIELDS, "search.json")
        for field, dimension in self.found["space"].items():
            _check_dimension(field, dimension)
        for trial in self.trials:
            check(trial, _TRIAL, "a trial")
            if trial["state"] not in STATES:
                raise RecordError(f"a trial has state={trial['state']!r}: expected {STATES}")
            _check_trial(trial, self.space)

    @property
    def trials(self) -> list[Row]:
        """In the order in which they were asked for."""
        return self.found["trials"]

    @property
    def space(self) -> dict[str, Row]:
        """By field its "choices", or "low", "high" and "log"."""
        return self.found["space"]

    @property
    def best(self) -> Row | None:
        """The trial of the highest accuracy, the first of equals; None before there is one."""
        done = [x for x in self.trials if x["state"] == "complete"]
        return max(done, key=lambda x: number(x, "accuracy"), default=None)

    @property
    def measured(self) -> list[Row]:
        """The trials that have an accuracy, pruned ones too."""
        return [x for x in self.trials if x["state"] in _DOTS and x.get("accuracy") is not None]


def state(search: SearchRecord) -> str:
    """How far the search is and what it found, in a line."""
    counts = {x: sum(trial["state"] == x for trial in search.trials) for x in STATES}
    parts = [_count(len(search.trials), "trial")]
    parts += [f"{counts[x]} {x}" for x in ("pruned", "failed") if counts[x]]
    about = search.found
    parts.append(
        f"validation accuracy of {about['network']} under {about['guidance']}, mean over "
        f"{_count(len(about['seeds']), 'seed')}"
    )
    if search.best is None:
        return "; ".join([*parts, "no trial is finished yet"])
    accuracy, point = 100 * number(search.best, "accuracy"), point_text(search.best["point"])
    return "; ".join([*parts, f"best: {accuracy:.2f} % by trial {search.best['trial']}, {point}"])


def table(search: SearchRecord) -> Table:
    """The trials, the best first."""
    fields = list(search.space)
    headings = ["trial", "validation accuracy %", *fields, "seconds", "state"]
    ordered = sorted(search.trials, key=_order)
    rows = [
        [
            str(trial["trial"]),
            "" if trial.get("accuracy") is None else f"{100 * number(trial, 'accuracy'):.2f}",
            *(value_text(trial["point"].get(field, "")) for field in fields),
            "" if trial.get("seconds") is None else f"{number(trial, 'seconds'):.1f}",
            trial["state"] + (f": {trial['failed']}" if trial.get("failed") else ""),
        ]
        for trial in ordered
    ]
    words = {
        i for i, x in enumerate(fields, 2) if any(map(_is_word, search.space[x].get("choices", ())))
    }
    return Table(headings, rows, tuple(x for x in range(3 + len(fields)) if x not in words))


def made(search: SearchRecord) -> Table:
    """How it was searched, and where."""
    rows = [["sampler", search.found["sampler"]], ["pruner", search.found["pruner"]]]
    rows += [[field, _space_text(dimension)] for field, dimension in search.space.items()]
    return Table(["", ""], rows)


def config(search: SearchRecord) -> str:
    """The config's fields as JSON."""
    return json.dumps(search.found["config"], indent=1, ensure_ascii=False)


def pictures(search: SearchRecord) -> list[Picture]:
    """The accuracies in the order of trials, and against each field."""
    if not search.measured:
        return []
    slices = [_slice(search, field, i) for i, field in enumerate(search.space)]
    return [_history(search), *slices]


def point_text(point: Mapping[str, Any]) -> str:
    """A point in a line."""
    return ", ".join(f"{name}={value_text(value)}" for name, value in point.items())


def value_text(value: Any) -> str:
    """A value, numbers in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _history(search: SearchRecord) -> Picture:
    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = svg.room(figure)
        xs, ys, top = [], [], -math.inf
        for trial in search.trials:
            if trial["state"] == "complete":
                top = max(top, 100 * number(trial, "accuracy"))
            if top > -math.inf:
                xs.append(trial["trial"])
                ys.append(top)
        axes.plot(xs, ys, color=svg.colour(1), drawstyle="steps-post", zorder=2)
        _dots(axes, [(x, x["trial"]) for x in search.measured])
        axes.set(xlabel="trial", ylabel="validation accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.set_xlim(-0.5, max(x["trial"] for x in search.trials) + 0.5)

    legend = [*_legend(search), Key("━", 1, "best so far")]
    return svg.picture("history-0", "Accuracy over trials", draw, legend=legend)


def _slice(search: SearchRecord, field: str, i: int) -> Picture:
    """The accuracy against one field; choices stand side by side."""
    dimension = search.space[field]
    choices = dimension.get("choices")
    texts = [value_text(choice) for choice in choices] if choices else []
    own = [trial for trial in search.measured if field in trial["point"]]

    def draw(figure: Any) -> None:
        axes = svg.room(figure)
        if choices:
            _dots(axes, _beside(own, field, choices))
            step = math.ceil(len(choices) * max(map(len, map(_cut, texts))) / 60)
            shown = range(0, len(choices), step)
            axes.set_xticks(list(shown), [_cut(texts[k]) for k in shown])
            axes.set_xlim(-0.5, len(choices) - 0.5)
        else:
            _dots(axes, [(trial, number(trial["point"], field)) for trial in own])
            low, high = number(dimension, "low"), number(dimension, "high")
            if dimension.get("log"):
                axes.set_xscale("log")
                low, high = low / (high / low) ** 0.04, high * (high / low) ** 0.04
            else:
                low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
            axes.set_xlim(low, high)
            plain_ticks(axes.xaxis)
        axes.set(xlabel=field, ylabel="validation accuracy, %")

    legend = [*_legend(search), Key("○", 1, "the best")]
    return svg.picture(f"slice-{i}", f"Accuracy by {field}", draw, legend=legend)


def _beside(trials: list[Row], field: str, choices: list[Any]) -> list[tuple[Row, float]]:
    """Each trial with the place of its choice; those of one choice side by side around it."""
    places: list[tuple[Row, float]] = []
    for k, choice in enumerate(choices):
        own = [trial for trial in trials if trial["point"][field] == choice]
        apart = min(0.07, 0.7 / max(len(own), 1))
        places += [(x, k + apart * (i - (len(own) - 1) / 2)) for i, x in enumerate(own)]
    return places


def _dots(axes: Any, places: list[tuple[Row, float]]) -> None:
    """A dot for each trial at its accuracy; the best of those that were finished is ringed."""
    done = [(trial, x) for trial, x in places if trial["state"] == "complete"]
    for kind, marker in _DOTS.items():
        own = [(x, 100 * number(t, "accuracy")) for t, x in places if t["state"] == kind]
        style = {"linestyle": "none", "alpha": 0.75, "zorder": 3}
        colour = svg.colour(0 if kind == "complete" else 6)
        axes.plot([x for x, _ in own], [y for _, y in own], marker, color=colour, **style)
    if done:
        trial, x = max(done, key=lambda pair: number(pair[0], "accuracy"))
        ring = {"markersize": 10, "markeredgewidth": 1.6, "zorder": 4}
        y = 100 * number(trial, "accuracy")
        axes.plot([x], [y], "o", mfc="none", color=svg.colour(1), **ring)


def _legend(search: SearchRecord) -> list[Key]:
    pruned = any(trial["state"] == "pruned" for trial in search.measured)
    return _KEYS if pruned else _KEYS[:1]


def _is_word(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _cut(text: str) -> str:
    return svg.cut(text, CUT)


def _order(trial: Row) -> tuple[int, float]:
    accuracy = trial.get("accuracy")
    return STATES.index(trial["state"]), -(accuracy if accuracy is not None else 0.0)


def _space_text(dimension: Row) -> str:
    if choices := dimension.get("choices"):
        return "one of " + ", ".join(map(value_text, choices))
    low, high = value_text(dimension["low"]), value_text(dimension["high"])
    return f"from {low} to {high}" + (", by its logarithm" if dimension.get("log") else "")


def _check_trial(trial: Row, space: Mapping[str, Row]) -> None:
    accuracy = trial.get("accuracy")
    if accuracy is not None:
        number(trial, "accuracy")
    elif trial["state"] == "complete":
        raise RecordError("a trial is complete and has no accuracy: expected one")
    for field, value in trial["point"].items():
        choices = space.get(field, {}).get("choices")
        if choices is None:
            number(trial["point"], field)
        elif value not in choices:
            raise RecordError(f"a trial has {field}={value!r}: expected one of {choices}")


def _check_dimension(field: str, dimension: Any) -> None:
    check(dimension, {}, f"the space of {field}")
    if "choices" in dimension:
        check(dimension, {"choices": list}, f"the space of {field}")
        return
    for name in ("low", "high"):
        number(dimension, name)
