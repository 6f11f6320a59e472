"""What an experiment gives: rows, networks and histories, and what could not be had."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from distill_jax import data, report
from distill_jax.models import Network, Variables
from distill_jax.runs.config import Experiment
from distill_jax.runs.plan import Plan
from distill_jax.runs.predict import logits_of
from distill_jax.train.evaluation import StageResult
from distill_jax.train.stage import Stage
from distill_jax.train.trainer import NotFiniteError

Key = tuple[str, str, int]  # guidance, network, seed
T = TypeVar("T")
FIELDS = ("guidance", "network", "seed")
_NAMED = 6  # of more names the first ones are listed


def as_it_is(inputs: Any) -> Any:
    """No preprocessing."""
    return inputs


@dataclasses.dataclass(frozen=True, repr=False)
class Results:
    """What an experiment gives; a notebook shows its table.

    Args:
      rows: one dict for each guidance, asked-for network and seed; one that could not be trained
        has "failed", why, in the place of accuracies, and "failed_stages", what was lost.
      networks: (guidance, network, seed) -> the network and its selected variables.
      histories: (guidance, network, seed) -> one dict an epoch.
      preprocess: makes of a batch of inputs, as the data set has them, what networks see.
      interrupted: whether it was stopped before all that was asked for was trained.
      precision: of the matrix products and convolutions of `logits`, the run's own.
    """

    rows: list[dict[str, Any]]
    networks: Mapping[Key, tuple[Network, Variables]]
    histories: Mapping[Key, list[dict[str, Any]]]
    preprocess: Callable[[Any], Any] = as_it_is
    interrupted: bool = False
    precision: str = "default"

    def __post_init__(self) -> None:
        for name in ("networks", "histories"):
            values = getattr(self, name)
            if not isinstance(values, _ByKey):
                object.__setattr__(self, name, _ByKey(values))

    def table(self, title: str = "") -> report.ResultsTable:
        """The rows as a rich table, over seeds."""
        return report.results_table(self.rows, title)

    def frame(self) -> Any:
        """The rows as a pandas DataFrame.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError(
                "frame needs pandas: install it, or take .rows, a dict each"
            ) from None
        return pandas.DataFrame(self.rows)

    def logits(
        self,
        inputs: Any,
        guidance: str | None = None,
        network: str | None = None,
        seed: int | None = None,
    ) -> np.ndarray:
        """The logits of each example, (N, C) float32.

        Args:
          inputs: (N, ...) as the data set has them, such as uint8 images; not preprocessed.
          guidance: whose network; of all that match, that of the best validation accuracy, the
            first of equals.
          network: likewise.
          seed: likewise.

        Raises:
          KeyError: there is no such network; the message names what there is.
          ValueError: inputs of another shape or type, or several networks and no validation.
        """
        chosen = self._best({"guidance": guidance, "network": network, "seed": seed})
        return logits_of(*self.networks[chosen], inputs, self.preprocess, self.precision)

    def predict(
        self,
        inputs: Any,
        guidance: str | None = None,
        network: str | None = None,
        seed: int | None = None,
    ) -> np.ndarray:
        """The class of each example, (N,) integers; arguments and errors are those of `logits`."""
        return self.logits(inputs, guidance, network, seed).argmax(-1)

    def _best(self, wanted: Mapping[str, Any]) -> Key:
        named = {name: value for name, value in wanted.items() if value is not None}
        accuracies: dict[Key, float | None] = {}
        for row in self.rows:
            key = (row["guidance"], row["network"], row["seed"])
            if named.items() <= row.items() and key in self.networks:
                accuracies[key] = row.get("valid_accuracy")
        if not accuracies:
            raise KeyError(f"no network of {named}: there are {_listed(self.networks)}")
        if len(accuracies) > 1 and None in accuracies.values():
            raise ValueError(
                f"{len(accuracies)} networks and no validation accuracy to choose by: expected "
                f"guidance, network and seed of one; there are {_listed(accuracies)}"
            )
        return max(accuracies, key=lambda key: accuracies[key] or 0.0)

    def __repr__(self) -> str:
        keys = [(row["guidance"], row["network"], row["seed"]) for row in self.rows]
        failed = sum("failed" in row for row in self.rows)
        guidances, networks, seeds = _parts(keys)
        parts = [
            f"{len(keys)} row{'s' * (len(keys) != 1)}: {_few(guidances)}",
            _few(networks),
            f"{len(seeds)} seed{'s' * (len(seeds) != 1)}",
        ]
        parts = parts if keys else ["no rows"]
        parts += [f"{failed} failed"] if failed else []
        parts += ["interrupted"] if self.interrupted else []
        return f"Results({'; '.join(parts)})"

    def _repr_mimebundle_(self, include: Any = (), exclude: Any = (), **others: Any) -> Any:
        if not self.rows:
            return {"text/plain": repr(self)}
        table = self.table(report.title(self.rows))
        return table._repr_mimebundle_(include, exclude, **others)


class _ByKey(Mapping[Key, T], Generic[T]):
    """A mapping whose KeyError names what there is."""

    def __init__(self, values: Mapping[Key, T]):
        self._values, self._keys = values, dict.fromkeys(values)  # values may be read when asked

    def __getitem__(self, key: Key) -> T:
        if key not in self._keys:
            raise KeyError(f"no {key!r}, as (guidance, network, seed): there are {_listed(self)}")
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"{{{len(self)} of {_listed(self)}}}"


def _parts(keys: Iterable[Key]) -> list[list[Any]]:
    """The guidances, networks and seeds among keys, each once."""
    every = list(keys)
    return [list(dict.fromkeys(key[i] for key in every)) for i in range(len(FIELDS))]


def _listed(keys: Iterable[Key]) -> str:
    """What there is of each part of the keys."""
    pairs = zip(FIELDS, _parts(keys), strict=True)
    return "; ".join(f"{name} {_few(values) or 'none'}" for name, values in pairs)


def _few(values: Sequence[Any]) -> str:
    """The values; of many the first ones, and how many there are."""
    texts = [repr(x) if "," in str(x) else str(x) for x in values[:_NAMED]]
    listed = ", ".join(texts)
    return listed if len(values) <= _NAMED else f"{listed} ... ({len(values)})"


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
    dataset: data.Dataset,
) -> Results:
    """Of the stages that are done; of those that failed a row that says so."""
    swept = {
        name: None for one in experiment.comparisons if not one.control for name, _ in one.changes
    }
    fields = tuple(dict.fromkeys(("temperature", "kd_weight", *swept)))
    rows, networks, histories = [], {}, {}
    comparisons = {comparison.label: comparison for comparison in experiment.comparisons}
    for (label, student, seed), stage_id in plan.results.items():
        if stage_id not in done and stage_id not in failed:
            continue
        stage = plan.stages[stage_id]
        record = done[stage_id].record if stage_id in done else _failure(plan, failed, stage_id)
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
                **{name: _used(stage, name, dict(comparisons[label].changes)) for name in fields},
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
    preprocess = dataset.preprocessing.evaluate
    return Results(rows, networks, histories, preprocess, precision=experiment.precision)


def _failure(plan: Plan, failed: Mapping[str, str], stage_id: str) -> dict[str, Any]:
    """Why a stage could not be trained, and which stages were lost for that: it, or its teachers'.

    Args:
      plan: has it.
      failed: why, by stage.
      stage_id: of the stage.
    """
    found, left = dict[str, None](), [stage_id]
    while left:
        one = left.pop()
        if one in failed and one not in found:
            found[one] = None
            left += (*plan.together[one], *plan.teachers[one], plan.stages[one].start)
    return {"failed": failed[stage_id], "failed_stages": list(found)}


def _used(stage: Stage, name: str, changes: Mapping[str, Any]) -> Any:
    """The value of a recipe field, or of a method's weight, that trained a stage; None of none.

    Args:
      stage: of the result; another comparison's, where they differ in what concerns neither.
      name: of the field; a weight is "methods.NAME".
      changes: of the result's comparison.
    """
    if stage.file:
        return None
    if name.startswith("methods."):
        names = [method for method, _ in stage.methods]
        weights = dict(zip(names, stage.weights, strict=True))
        return weights.get(name.removeprefix("methods."))
    recipe = {**vars(stage.recipe.optim), **vars(stage.recipe), **changes}
    return recipe[name]
