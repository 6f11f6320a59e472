"""The plain CIFAR-10 row, 10, 8, 6, 4, 2, each taught by all larger ones, in bfloat16."""

from __future__ import annotations

import ast
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import distill_jax
from configs import dgkd_plain
from distill_jax import data
from experiments.benchmark import trained_row
from experiments.gpu_row.job import Setting
from experiments.gpu_row.lines import Lines

SIZE = "synthetic:32x32x3:10:50000:10000"  # CIFAR-10's


def changed(config: Any, changes: Mapping[str, str]) -> Any:
    """The config with fields changed, each from its text.

    Raises:
      KeyError: a field that there is not.
    """
    config.update_from_flattened_dict({field: _value(text) for field, text in changes.items()})
    return config


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def config(setting: Setting, seeds: int, epochs: int = 0) -> Any:
    """The published row in half precision; `epochs` in the place of its own, where above 0."""
    told = dgkd_plain.get_config("smoke" if setting.smoke else "")
    told.guidance, told.dtype, told.seeds = ("dense",), "bfloat16", tuple(range(seeds))
    if setting.smoke:
        told.networks = ("plane4", "plane2")
        told.recipe.epochs = 2  # from two on teachers are looked up, as in the row itself
    else:
        told.dataset.update(name=setting.dataset, data_dir=setting.data_dir)
    told.checkpoint_every = "20 seconds"
    if epochs:
        told.recipe.epochs = epochs
    return changed(told, setting.changes)


def check(lines: Lines, setting: Setting) -> None:
    """Fails, in words, where the config or the data set of the row is not in order."""
    told = config(setting, 1)
    distill_jax.resolve(told)
    data.load(**told.dataset.to_dict())


def short(lines: Lines, setting: Setting, *, name: str) -> None:
    """Four epochs of each network on made-up images: how long until the first step and the end.

    Args:
      lines: where to.
      setting: of the command.
      name: "cold" compiles everything, "warm" has what that has compiled.
    """
    told, scratch = config(setting, 1, 4), Path(setting.scratch) / "row4"
    if not setting.smoke:
        told.dataset.update(name=SIZE, data_dir="")
    tell = lines.adding(name=name).add
    trained_row.train(told, scratch / name, scratch / "compiled", setting.started, tell)


def whole(lines: Lines, setting: Setting, *, seeds: int) -> None:
    """The row by the published recipe; what a workdir has of it is gone on with."""
    folder = Path(setting.workdir or setting.scratch) / f"{setting.variant}row-{seeds}"
    told = config(setting, seeds)
    # By `attempt` the lines of one process are told from those of one that goes on.
    tell = lines.adding(name="row", seeds=seeds, dataset=told.dataset.name, attempt=time.time()).add
    trained_row.train(told, folder, folder / "compiled", setting.started, tell)
