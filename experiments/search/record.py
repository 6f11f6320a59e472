"""What a search leaves: `search.json`, the config `best.py`, and the table that is printed."""

from __future__ import annotations

import pprint
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.table import Table

from distill_jax.identity import finite
from distill_jax.report.page.search import point_text
from distill_jax.runs.config import SECTIONS, default_config, fields_of
from experiments.search.space import Fields, Point, Space, config_of
from experiments.search.study import FAILED, best, killed, last_value, point_of

SHOWN = 24  # trials of a table, at most
ACCURACIES, FOLDER = "accuracies", "folder"  # attributes of a trial: by seed, where it is
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
Line = dict[str, Any]


def lines_of(study: optuna.Study, space: Space) -> list[Line]:
    """Each trial as `search.json` has it; those that were lost with their process are left out."""
    trials = study.get_trials(deepcopy=False)
    return [_line(x, space) for x in trials if x.state in STATES and not killed(x)]


def _line(trial: FrozenTrial, space: Space) -> Line:
    seconds = trial.duration.total_seconds() if trial.duration else None
    complete = trial.state == TrialState.COMPLETE
    return {
        "trial": trial.number,
        "state": STATES[trial.state],
        "point": point_of(trial, space),
        "accuracy": trial.value if complete else last_value(trial),
        "accuracies": trial.user_attrs.get(ACCURACIES, {}),
        "failed": trial.user_attrs.get(FAILED, ""),
        "seconds": seconds,
        "folder": trial.user_attrs.get(FOLDER, ""),
    }


def numbers(study: optuna.Study, space: Space, about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `search.json`.

    Args:
      study: the search.
      space: what was searched.
      about: the config, and how it is searched.
    """
    found = best(study)
    return finite(
        {
            **about,
            "space": {name: dimension.as_json() for name, dimension in space.items()},
            "trials": lines_of(study, space),
            "best": None if found is None else found.number,
        }
    )


def best_config(
    fields: Fields, point: Point, about: Mapping[str, Any], registering: str = ""
) -> str:
    """A config file that trains the best trial again.

    Args:
      fields: that all trials share.
      point: the trial's own.
      about: "trial", "trials" and "accuracy".
      registering: a config whose file registers names that it uses; "" where it uses none.
    """
    made, default = fields_of(config_of(fields, [point])), default_config().to_dict()
    lines = []
    for name, value in made.items():
        if name in SECTIONS:
            changed = {k: v for k, v in value.items() if v != default[name][k]}
            lines += [f"config.{name}.{k} = {_literal(v)}" for k, v in changed.items()]
        elif value != default[name]:
            lines.append(f"config.{name} = {_literal(value)}")
    first = [f"load_config({registering!r})  # registers what is used below"] if registering else []
    names = "default_config, load_config" if registering else "default_config"
    body = "\n".join(["config = default_config()", *lines, "return config"])
    indented = "\n".join(f"    {line}" for line in "\n".join([*first, body]).splitlines())
    return (
        f'"""Trial {about["trial"]}, the best of {about["trials"]} of a search: '
        f"{100 * about['accuracy']:.2f} % of the validation split.\n\n"
        "  python -m distill_jax train --config=best.py\n"
        f'"""\n\nfrom distill_jax import {names}\n\n\n'
        f'def get_config():\n    """The config; its last network is {made["networks"][-1]}."""\n'
        f"{indented}\n"
    )


def _literal(value: Any) -> str:
    return pprint.pformat(value, width=88, sort_dicts=False)


def accuracy_text(line: Line) -> str:
    """The accuracy in percent; of one that was pruned the last that it had."""
    if line["state"] == "failed" or line["accuracy"] is None:
        return line["state"]
    mark = " pruned" if line["state"] == "pruned" else ""
    return f"{100 * line['accuracy']:.2f}{mark}"


def rich_table(lines: Sequence[Line], title: str) -> Table:
    """The trials with the best so far, for a terminal of 80 columns; of many the best ones."""
    best_so_far: dict[int, float | None] = {}
    top = None
    for line in lines:
        if line["state"] == "complete" and (top is None or line["accuracy"] > top):
            top = line["accuracy"]
        best_so_far[line["trial"]] = top
    shown = list(lines)
    if len(lines) > SHOWN:
        shown.sort(key=lambda x: -(x["accuracy"] or 0.0) if x["state"] == "complete" else 1.0)
    left = f"the {SHOWN} best of {len(lines)}; all are in search.json"
    table = Table(
        title=title,
        caption=left if len(lines) > SHOWN else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in ("trial", "valid\naccuracy %", "best\nso far %"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("parameters", overflow="fold")
    for line in shown[:SHOWN]:
        so_far = best_so_far[line["trial"]]
        table.add_row(
            str(line["trial"]),
            accuracy_text(line),
            "" if so_far is None else f"{100 * so_far:.2f}",
            point_text(line["point"]),
        )
    return table
