"""The results of a run, read from its folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_jax import data, graph, models
from distill_jax.data.task import Images
from distill_jax.identity import differences
from distill_jax.models import Network, Variables
from distill_jax.runs.checkpoint import CheckpointError, read_meta, restore
from distill_jax.runs.config import load_config
from distill_jax.runs.folder import read_rows, resolved_of, run_folder, stage_place
from distill_jax.runs.given import WEIGHTS
from distill_jax.runs.ids import digest_of
from distill_jax.runs.inputs import spec_of
from distill_jax.runs.plan import named, of_users
from distill_jax.runs.results import Results
from distill_jax.runs.workdir import WorkdirError

Key = tuple[str, str, int]


def load(workdir: str | Path) -> Results:
    """Reads what a run has given so far; weights are read when they are asked for.

    The config file that the run came from is run where names that it registers are not known here.

    Raises:
      WorkdirError: there is no such run, or what it wrote cannot be read.
      ConfigError: it uses names that are not registered.
    """
    folder = run_folder(workdir)
    config = load_config(str(folder))
    saved = resolved_of(folder)
    rows = read_rows(folder)
    # Weights that were given have no epochs, and no folder.
    done = {
        (row["guidance"], row["network"], row["seed"]): (
            stage_place(folder, row["network"], row["stage"]) if row.get("epochs") != 0 else None
        )
        for row in rows
        if not row.get("failed")
    }
    return Results(
        rows,
        _Networks(done, saved),
        _Histories(done),
        preprocess=_preprocessing(saved, folder, config),
        precision=config.precision,
    )


class _OnDemand(Mapping):
    """Something of each result, read from its stage's folder when it is asked for."""

    def __init__(self, places: Mapping[Key, Path | None]):
        self.places = places

    def __iter__(self) -> Iterator[Key]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class _Networks(_OnDemand):
    """(guidance, network, seed) -> the network and its selected variables."""

    def __init__(self, places: Mapping[Key, Path | None], saved: Mapping[str, Any]):
        super().__init__(places)
        self.saved = saved

    def __getitem__(self, key: Key) -> tuple[Network, Variables]:
        place = self.places[key]
        if place is None:
            raise WorkdirError(
                f"{key} has weights that were given, which the run does not keep: expected a "
                "network that it trained, or the file itself"
            )
        saved, (base, _) = self.saved, graph.architecture(key[1])
        if saved["inputs"] is None:
            raise WorkdirError(
                f"the weights of {key} are of inputs whose structure is not written down: expected "
                "arrays, or dicts, lists and tuples of them"
            )
        inputs = spec_of(saved["inputs"])
        network = named(models.build(base, saved["classes"], inputs, saved["dtype"]), key[1])
        own = of_users({key[1]: network.identity})
        lines = differences(saved["registered"].get("networks", {}).get(key[1]), own.get(key[1]))
        if lines:
            raise WorkdirError(f"{key} was trained as another network:\n  " + "\n  ".join(lines))
        try:
            variables, _ = restore(place / WEIGHTS, network.backbone.shapes)
        except CheckpointError as error:
            raise WorkdirError(f"the weights of {key} cannot be read: {error}") from error
        return network.backbone, variables


class _Histories(_OnDemand):
    """(guidance, network, seed) -> one dict an epoch."""

    def __getitem__(self, key: Key) -> list[dict[str, Any]]:
        place = self.places[key]
        try:
            return [] if place is None else read_meta(place / WEIGHTS)["history"]
        except CheckpointError as error:
            raise WorkdirError(f"the history of {key} cannot be read: {error}") from error


def dataset_of(folder: Path, config: Any) -> data.Dataset:
    """The data set that a run was trained on, by its config.

    Raises:
      WorkdirError: it was another, such as one that was given to `run`.
    """
    dataset = data.load(**config.dataset)
    saved = resolved_of(folder)
    if saved.get("data") != digest_of(dataset):
        raise WorkdirError(
            f"{folder} was trained on {saved.get('given', 'other data')}, and its config names "
            f"{dataset.name}: expected what it was trained on"
        )
    return dataset


def data_name(folder: Path, config: Any) -> str:
    """The name of the data set that a run was trained on: the config's, or the given one's."""
    name: str = resolved_of(folder).get("given", config.dataset.name)
    return name


def _preprocessing(saved: Mapping[str, Any], folder: Path, config: Any) -> Callable[[Any], Any]:
    """What networks see of raw inputs; for other tasks than images their data set is loaded."""
    known = saved["preprocessing"]
    if known:
        low_high = known["value_range"]
        return Images(
            tuple(known["mean"]), tuple(known["std"]), tuple(low_high) if low_high else None
        ).evaluate

    @functools.cache
    def preprocessing():
        return dataset_of(folder, config).preprocessing

    return lambda inputs: preprocessing().evaluate(inputs)
