"""The trials of a search in a database: which point is next, and what became of those before."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, Trial, TrialState

from distill_jax.identity import differences, plain
from distill_jax.report.page import svg
from distill_jax.runs.workdir import WorkdirError
from experiments.search.space import Dimension, Point, Space

FILE, NAME = "search.db", "search"
ABOUT, FAILED = "about", "failed"  # attributes of a study, and of a trial that cannot be trained


@contextmanager
def opened(folder: Path, about: Mapping[str, Any]) -> Iterator[optuna.Study]:
    """The study of a folder, made where there is none; killed trials of it are to be tried again.

    Args:
      folder: held by this process alone.
      about: what all of its trials have in common, as JSON values.

    Raises:
      WorkdirError: it cannot be read, or is of another search, whose differences are named.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = sqlalchemy.URL.create("sqlite", database=str((folder / FILE).absolute()))
    try:
        # No pool, so that a connection that failed is closed.
        pooled = {"poolclass": sqlalchemy.pool.NullPool}
        storage = optuna.storages.RDBStorage(url.render_as_string(), engine_kwargs=pooled)
    except (sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
        raise _damaged(folder, error) from None
    try:
        study = optuna.create_study(
            storage=storage, study_name=NAME, direction="maximize", load_if_exists=True
        )
        _check_same(study, folder, plain(about))
        _retry_killed(study)
        yield study
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise _damaged(folder, error) from None
    finally:
        storage.remove_session()
        storage.engine.dispose()


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that are done with: trained, pruned, or not to be trained."""
    return [x for x in study.get_trials(deepcopy=False) if x.state.is_finished() and not killed(x)]


def killed(trial: FrozenTrial) -> bool:
    """Whether a trial was lost with its process, and stands there once more."""
    return trial.state == TrialState.FAIL and FAILED not in trial.user_attrs


def best(study: optuna.Study) -> FrozenTrial | None:
    """The trial of the highest value, the first of equals; None before there is one."""
    done = [x for x in study.get_trials(deepcopy=False) if x.state == TrialState.COMPLETE]
    return max(done, key=lambda x: x.value, default=None)


def grid(space: Space) -> list[Point]:
    """Every combination of choices; of a space without ranges."""
    every = itertools.product(*(dimension.choices for dimension in space.values()))
    return [dict(zip(space, values, strict=True)) for values in every]


def enqueue(study: optuna.Study, points: Sequence[Point], space: Space) -> None:
    """Has points be asked for next, those that are not there yet."""
    for point in points:
        encoded = {name: _encoded(space[name], value) for name, value in point.items()}
        study.enqueue_trial(encoded, skip_if_exists=True)


def ask(study: optuna.Study, space: Space, kind: str, seed: int, at_once: int) -> Trial:
    """The next trial, by a sampler whose draws are those of its number among all."""
    asked = sum(not killed(x) for x in study.get_trials(deepcopy=False))
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    study.sampler = _sampler(kind, seed + asked - len(waiting), at_once)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return study.ask({name: _distribution(x) for name, x in space.items()})


def point_of(trial: Trial | FrozenTrial, space: Space) -> Point:
    """The values of a trial, those of the space alone."""
    params = {name: trial.params[name] for name in space if name in trial.params}
    return {name: _decoded(space[name], value) for name, value in params.items()}


def _sampler(kind: str, seed: int, at_once: int) -> optuna.samplers.BaseSampler:
    if kind != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # What is asked for at once keeps away from each other.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=at_once > 1)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.choices:
        return CategoricalDistribution([_encoded(dimension, x) for x in dimension.choices])
    if isinstance(dimension.low, int) and isinstance(dimension.high, int):
        return IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _encoded(dimension: Dimension, value: Any) -> Any:
    """A value as the database takes it: lists and dicts as JSON."""
    plain_value = value is None or isinstance(value, (bool, int, float, str))
    return value if plain_value or not dimension.choices else json.dumps(value)


def _decoded(dimension: Dimension, value: Any) -> Any:
    texts = {_encoded(dimension, x): x for x in dimension.choices if isinstance(x, (list, dict))}
    return texts.get(value, value)


def _check_same(study: optuna.Study, folder: Path, about: Mapping[str, Any]) -> None:
    saved = study.user_attrs.get(ABOUT)
    if saved is None:
        study.set_user_attr(ABOUT, about)
    elif lines := [svg.cut(line, 200) for line in differences(saved, about)]:
        raise WorkdirError(
            f"{folder} holds another search: {'; '.join(lines)}; expected the same, or another "
            "--workdir"
        )


def _retry_killed(study: optuna.Study) -> None:
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if FAILED not in trial.user_attrs:
            study.enqueue_trial(trial.params)


def _damaged(folder: Path, error: Exception) -> WorkdirError:
    why = " ".join(str(error).partition("\n")[0].split())
    return WorkdirError(f"{folder / FILE} cannot be used as the database of a search: {why}")


def last_value(trial: FrozenTrial) -> float | None:
    """The newest value of a trial that was not trained to the end."""
    if not trial.intermediate_values:
        return None
    value = trial.intermediate_values[max(trial.intermediate_values)]
    return value if math.isfinite(value) else None
