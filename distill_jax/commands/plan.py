"""`distill_jax plan`: what a config comes to, before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from rich import box
from rich.table import Table

from distill_jax import models, report
from distill_jax.commands.arguments import Command, Flag
from distill_jax.commands.train import STORE, WORKDIR, use_compilation_cache
from distill_jax.runs import config as config_lib
from distill_jax.runs import initial
from distill_jax.runs.ambient import pinned
from distill_jax.runs.folder import StageState, stage_place, stage_state
from distill_jax.runs.given import folder_name
from distill_jax.runs.plan import Plan, warnings
from distill_jax.runs.prepare import Prepared, prepare
from distill_jax.runs.workdir import folder_of
from distill_jax.train import memory
from distill_jax.train.cost import Estimator, StageCost
from distill_jax.train.stage import Stage, steps_per_epoch

TAUGHT_BY = 20  # characters of a line; more teachers take more lines
MEASURE = Flag("measure", "yes: time a few steps of each kind of stage; no.", "yes", ("yes", "no"))


def plan(given: SimpleNamespace) -> int:
    """Prints the stages in the order of training, alike ones in a line."""
    workdir = folder_of(given.workdir or f"runs/{given.config.name}")
    store = folder_of(given.store) if given.store else None
    experiment = config_lib.resolve(given.config)
    console = report.console()
    with pinned(experiment.dtype, experiment.precision):
        prepared = prepare(experiment)
        states = _states(prepared.plan, workdir, store)
        if workdir.is_dir():
            use_compilation_cache(workdir)
        costs = _costs(prepared, states) if given.measure == "yes" else {}
    starts = initial.lines(prepared.plan.stages.values(), prepared.beginnings)
    for line in (*warnings(prepared.plan, experiment), *starts):
        console.print(line)
    console.print(_table(prepared, states, costs))
    for line in _summary(prepared.plan, states, costs, workdir):
        console.print(line)
    return 0


def _states(plan: Plan, workdir: Path, store: Path | None) -> dict[str, StageState]:
    """How far each stage is, in the working directory or in the store."""
    states = {}
    for stage_id, stage in plan.stages.items():
        # Those of a cycle are saved as one, in the place of the first.
        first = plan.together[stage_id][0]
        begun = stage_state(stage_place(workdir, plan.stages[first].network.name, first))
        places = [stage_place(workdir, stage.network.name, stage_id)]
        if store is not None:
            places.append(store / folder_name(stage.network.name, stage_id))
        done = bool(stage.file) or any(stage_state(place).done for place in places)
        states[stage_id] = StageState(done, begun.step)
    return states


def _costs(prepared: Prepared, states: Mapping[str, StageState]) -> dict[str, StageCost]:
    """The cost of each stage that is to be trained, of a cycle at its first."""
    experiment, plan = prepared.experiment, prepared.plan
    estimator = Estimator(prepared.dataset, experiment.topology, experiment.teacher_logits)
    costs = {}
    for together in dict.fromkeys(plan.together.values()):
        if not states[together[0]].done:
            stages = [plan.stages[stage_id] for stage_id in together]
            with memory.told(report.describe(*stages)):
                costs[together[0]] = estimator.cost(stages)
    return costs


def _table(
    prepared: Prepared, states: Mapping[str, StageState], costs: Mapping[str, StageCost]
) -> Table:
    plan, dataset = prepared.plan, prepared.dataset
    title = f"The plan of {prepared.experiment.name}, in the order of training"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("network", no_wrap=True)
    table.add_column("taught by", max_width=TAUGHT_BY)
    for heading in ("params", "steps", "done", *(("step", "all", "MiB") if costs else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in _alike(plan):
        stage = plan.stages[group[0]]
        examples = len(dataset.limited(stage.recipe.train_limit, stage.seed).train.labels)
        steps = 0 if stage.file else stage.recipe.epochs * steps_per_epoch(examples, stage.recipe)
        table.add_row(
            stage.network.name + (" (phase)" if stage.phase else ""),
            _taught_by(stage),
            short(models.count_parameters(stage.network.backbone)),
            f"{steps:,}",
            _done(group, states),
            *(_cost([costs[x] for x in group if x in costs]) if costs else ()),
        )
    return table


def _taught_by(stage: Stage) -> str:
    """The teachers, and whether some are dropped."""
    dropped = ("(some dropped)",) if stage.recipe.dropping.kind != "none" else ()
    given = "weights are given" if stage.file else "-"
    return " ".join((*stage.taught_by, *dropped)) or given


def _alike(plan: Plan) -> list[list[str]]:
    """The ids of stages, those together that differ in seeds alone."""
    groups: dict[Any, list[str]] = {}
    for stage_id, stage in plan.stages.items():
        labels = tuple(sorted({label for (label, *_), x in plan.results.items() if x == stage_id}))
        unseeded = dataclasses.replace(stage, seed=0, id="", start="")
        groups.setdefault((unseeded, labels), []).append(stage_id)
    return list(groups.values())


def _done(group: Sequence[str], states: Mapping[str, StageState]) -> str:
    done = sum(states[stage_id].done for stage_id in group)
    begun = [states[x].step for x in group if states[x].step and not states[x].done]
    at = f"\nat {', '.join(map(str, begun))}" if begun else ""
    return f"{done}/{len(group)}{at}"


def short(number: float) -> str:
    """A number with three digits: 812, 82.8k, 2.49M, 1.82G."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:.0f}"


def _cost(costs: Sequence[StageCost]) -> tuple[str, str, str]:
    """A step, the stages of a line, and memory."""
    if not costs:
        return "", "", ""
    sizes = [cost.device_bytes for cost in costs if cost.device_bytes is not None]
    return (
        _step(costs[0].step_seconds),
        report.duration(sum(cost.seconds for cost in costs)),
        f"{max(sizes) / 2**20:,.0f}" if sizes else "",
    )


def _step(seconds: float) -> str:
    value, unit = (seconds, "s") if seconds >= 1 else (1000 * seconds, "ms")
    return f"{value:#.3g}".rstrip(".") + f" {unit}"


def _summary(
    plan: Plan,
    states: Mapping[str, StageState],
    costs: Mapping[str, StageCost],
    workdir: Path,
) -> list[str]:
    left = sum(not state.done for state in states.values())
    lines = [f"{len(states)} stages, {left} to be trained; in {workdir}"]
    if costs:
        seconds = sum(cost.seconds for cost in costs.values())
        device, lasts = jax.devices()[0].device_kind, report.duration(seconds)
        lines.append(
            f"about {lasts} for these, one at a time on {device}, compiling apart; "
            "from a few steps of each kind"
        )
    return lines


PLAN = Command(
    about="Shows the stages of a config, what is done of them, and what the rest will take.",
    run=plan,
    flags=(WORKDIR, STORE, MEASURE),
    config="required",
)
