"""What an experiment gives: rows, networks and histories, and what could not be had."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill_jax import report
from distill_jax.models import Network, Variables
from distill_jax.runs.config import Experiment
from distill_jax.runs.plan import Plan
from distill_jax.train.evaluation import StageResult
from distill_jax.train.trainer import NotFiniteError


@dataclasses.dataclass(frozen=True)
class Results:
    """What an experiment gives.

    Args:
      rows: one dict for each guidance, asked-for network and seed; one that could not be trained
        has "failed", why, in the place of accuracies.
      networks: (guidance, network, seed) -> the network and its selected variables.
      histories: (guidance, network, seed) -> one dict an epoch.
    """

    rows: list[dict[str, Any]]
    networks: dict[tuple[str, str, int], tuple[Network, Variables]]
    histories: dict[tuple[str, str, int], list[dict[str, Any]]]

    def table(self, title: str = ""):
        """The rows as a rich table, over seeds."""
        return report.results_table(self.rows, title)


class StagesFailed(NotFiniteError):
    """Some stages could not be trained to the end; the others were.

    Args:
      failed: why, by stage.
      results: those of the others, and a row marked "failed" for each result that there is not.
    """

    def __init__(self, failed: Mapping[str, str], results: Results):
        why = list(dict.fromkeys(failed.values()))
        head = "" if len(why) == 1 else f"{len(failed)} stages failed:\n  "
        super().__init__(head + "\n  ".join(why))
        self.results = results


def results_of(
    plan: Plan,
    done: Mapping[str, StageResult],
    failed: Mapping[str, str],
    experiment: Experiment,
) -> Results:
    """Of the stages that are done; of those that failed a row that says so."""
    rows, networks, histories = [], {}, {}
    comparisons = {comparison.label: comparison for comparison in experiment.comparisons}
    for (label, student, seed), stage_id in plan.results.items():
        if stage_id not in done and stage_id not in failed:
            continue
        stage = plan.stages[stage_id]
        record = done[stage_id].record if stage_id in done else {"failed": failed[stage_id]}
        rows.append(
            {
                "guidance": label,
                "graph": comparisons[label].spec,
                "changes": dict(comparisons[label].changes),
                "control": comparisons[label].control,
                "network": student,
                "backbone": stage.network.backbone.name,
                "teachers": list(stage.taught_by),
                "seed": seed,
                **record,
                "protocol": experiment.protocol,
                "selection": experiment.selection,
                "stage": stage_id,
            }
        )
        if stage_id in done:
            result = done[stage_id]
            networks[label, student, seed] = (stage.network.backbone, result.variables)
            histories[label, student, seed] = result.history
    return Results(rows, networks, histories)
