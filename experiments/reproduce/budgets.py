"""The configs of a table at each budget: one for all of its rows that differ in guidance alone."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections

import distill_jax
from distill_jax import graph
from experiments.compare.settings import SETTINGS
from experiments.reproduce.tables import Row, Table

SMOKE, SHORT, PAPER = "smoke", "short", "paper"
BUDGETS = {
    SMOKE: "made-up images, the smallest networks, one epoch",
    SHORT: "the paper's recipe in 30 epochs at most",
    PAPER: "the paper's recipe",
}
SHORT_EPOCHS = 30
SHARED, OWN = "shared", "own"
TEACHERS = (SHARED, OWN)
# By what a name begins with, what stands for it in a smoke run; the first that fits.
SMALLEST = {
    "plane": "plane2",
    "wrn": "wrn_10_1",
    "resnet": "resnet8",
    "cifar_": "resnet8",
    "imagenet_": "resnet8",
}


class Group(NamedTuple):
    """Rows that one run trains.

    Args:
      name: of its folder.
      rows: those of the table.
      config: of the run.
      names: what each of the table's networks is called there.
    """

    name: str
    rows: tuple[Row, ...]
    config: ml_collections.ConfigDict
    names: dict[str, str]

    def key(self, table: Table, row: Row) -> tuple[str, str]:
        """Guidance and network of a row, as the run's results call them."""
        return renamed(row.guidance, self.names), self.names[table.network_of(row)]


def groups(table: Table, given: argparse.Namespace) -> list[Group]:
    """The runs of a table.

    Args:
      table: the table.
      given: the command's arguments.

    Raises:
      ValueError: fields that a config refuses.
    """
    own: dict[str, list[Row]] = {}
    for row in table.rows:
        own.setdefault(json.dumps([row.changes, row.setting]), []).append(row)
    return [_group(table, tuple(rows), given) for rows in own.values()]


def _group(table: Table, rows: tuple[Row, ...], given: argparse.Namespace) -> Group:
    smoke = given.budget == SMOKE
    names = smallest(table.networks) if smoke else {name: name for name in table.networks}
    config = distill_jax.load_config(table.config)
    changes = {**table.changes, **rows[0].changes}
    overrides = changes.pop("overrides", {})
    for path, value in changes.items():
        section, _, field = path.rpartition(".")
        setattr(config[section] if section else config, field, value)
    config = distill_jax.smoke(config) if smoke else config
    config.name = f"reproduce_{table.name}"
    config.protocol, config.seeds = given.protocol, tuple(range(given.seeds))
    config.networks = tuple(names.values())
    config.guidance = tuple(dict.fromkeys(renamed(row.guidance, names) for row in rows))
    results = {table.network_of(row) for row in rows}
    config.students = tuple(names[name] for name in table.networks if name in results)
    if given.budget == SHORT:
        config.recipe.epochs = min(SHORT_EPOCHS, config.recipe.epochs)
    config.recipe.epochs = given.epochs or config.recipe.epochs
    config.dtype = given.dtype or config.dtype
    config.dataset.data_dir = given.data_dir
    if given.dataset and given.dataset != config.dataset.name:
        config.dataset.update(name=given.dataset, mean=(), std=())
    if rows[0].setting:
        SETTINGS[rows[0].setting].apply(config)
    own = {names[name]: dict(fields) for name, fields in overrides.items()}
    if given.teachers == SHARED:
        for name in frozen(table, rows):
            own.setdefault(names[name], {})["seed"] = 0
    config.overrides = own
    name = re.sub(r"[^a-z0-9]+", "-", rows[0].label.lower()).strip("-")
    return Group(name, rows, config, names)


def frozen(table: Table, rows: Sequence[Row]) -> list[str]:
    """The networks that only teach and do not learn from those whom they teach."""
    graphs = [graph.from_spec(row.guidance.removesuffix("+drop"), table.networks) for row in rows]
    together = [one.networks for own in graphs for one in graph.plan(own) if len(one.networks) > 1]
    others = {table.network_of(row) for row in table.rows}.union(*together)
    return [name for name in table.networks if name not in others]


def smallest(networks: Sequence[str]) -> dict[str, str]:
    """By network the smallest of its family; where several are the same, draws of their own."""
    found: dict[str, str] = {}
    for name in reversed(networks):
        kind, mark, backbone = name.rpartition(":")
        begins = next(begins for begins in SMALLEST if backbone.startswith(begins))
        small = f"{kind}{mark}{SMALLEST[begins]}"
        count = sum(other.partition("#")[0] == small for other in found.values())
        found[name] = f"{small}#{count + 1}" if count else small
    return {name: found[name] for name in networks}


def renamed(spec: str, names: dict[str, str]) -> str:
    """A guidance with other names of networks."""
    return re.sub(r"[\w:]+", lambda match: names.get(match[0], match[0]), spec)
