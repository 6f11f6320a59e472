"""A trained network of a run as a file for use elsewhere, read back before it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax import models
from distill_jax.interop import programs
from distill_jax.interop.files import load_variables, save_variables
from distill_jax.interop.torch_weights import WeightsError
from distill_jax.models import Network, Variables
from distill_jax.runs.ambient import pinned
from distill_jax.runs.card import accuracy_over_seeds, remove_card, write_card
from distill_jax.runs.checkpoint import read_meta, write_bytes
from distill_jax.runs.config import load_config
from distill_jax.runs.folder import resolved_of, run_folder, stage_place
from distill_jax.runs.given import WEIGHTS, folder_name
from distill_jax.runs.inputs import spec_as_json
from distill_jax.runs.load import data_name, dataset_of, load
from distill_jax.runs.predict import images_of, logits_of
from distill_jax.runs.provenance import read_run, version
from distill_jax.runs.results import Key, Results, as_it_is
from distill_jax.runs.workdir import WorkdirError

PROGRAMS = {
    "stablehlo": (programs.to_stablehlo, programs.from_stablehlo),
    "onnx": (programs.to_onnx, programs.from_onnx),
}
FORMATS = ("safetensors", "pth", "npz", *PROGRAMS)
FOLDER = "exported"  # in that of the run
EXAMPLES = 3  # that are compared; not one, as a batch may have any size
# Of the largest logit. Algorithms and precisions differ by less, another network by more.
AT_MOST = {"float32": 1e-2, "float64": 1e-2, "bfloat16": 1e-1}


class Exported(NamedTuple):
    """A file that was written.

    Args:
      path: of the file; its card stands beside it.
      difference: the largest one of a logit that was read back, and the largest logit.
    """

    path: Path
    difference: tuple[float, float]


class _Chosen(NamedTuple):
    """A network of a run, and how it is given its inputs."""

    network: Network
    variables: Variables
    preprocess: Callable[[Any], Any]
    spec: Any  # shapes and types of a batch of one, before `preprocess`
    precision: str

    def logits(self, inputs: Any) -> np.ndarray:
        return logits_of(self.network, self.variables, inputs, self.preprocess, self.precision)


def export(
    workdir: str | Path,
    guidance: str,
    network: str | None = None,
    seed: int | None = None,
    *,
    form: str = "safetensors",
    out: str | Path = "",
    normalise: bool = False,
) -> Exported:
    """Writes a trained network, reads it back, and compares it; a card stands beside the file.

    Args:
      workdir: the folder of the run.
      guidance: the label of the comparison.
      network: of its networks; the last one where None.
      seed: the first one where None.
      form: one of `FORMATS`: weights, or a program that holds them.
      out: the file; where empty it is in the run's folder.
      normalise: whether a program preprocesses by itself what the data set has.

    Raises:
      WorkdirError: there is no such network, or it is not trained yet.
      WeightsError: it cannot be written in this form, or what was read back is another network.
    """
    if form not in FORMATS:
        raise WeightsError(f"the format is {form!r}: expected one of {', '.join(FORMATS)}")
    if normalise and form not in PROGRAMS:
        raise WeightsError(
            f"{form} holds weights alone, which normalise nothing: expected one of "
            f"{', '.join(PROGRAMS)}"
        )
    ending = Path(out).suffix[1:].lower()
    if ending != form and ending in FORMATS:
        raise WeightsError(
            f"{out} ends as a file of another format than {form}, which is written: expected "
            f"--format={ending}, or another name"
        )
    folder, results = run_folder(workdir), load(workdir)
    key = _key(folder, results, guidance, network, seed)
    (row,) = (row for row in results.rows if _key_of(row) == key)
    path = Path(out) if out else folder / FOLDER / f"{folder_name(key[1], row['stage'])}.{form}"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = load_config(str(folder))
    chosen = _chosen(folder, results, key, config, normalise)
    with pinned(config.dtype, config.precision):
        write = _write_program if form in PROGRAMS else _write_weights
        difference = write(path, form, chosen, results)
    about = _about(folder, key[1], row["stage"])
    facts = _facts(path, results, row, chosen, config, about, normalise, difference)
    write_card(path, {**facts, "dataset": data_name(folder, config)})
    return Exported(path, difference)


def _key(
    folder: Path, results: Results, guidance: str, network: str | None, seed: int | None
) -> Key:
    """The network that is meant; WorkdirError where there is none."""
    saved = resolved_of(folder)
    students = {one["label"]: one["students"] for one in saved["comparisons"]}
    seeds = saved["seeds"]
    if guidance not in students:
        raise WorkdirError(f"{folder} has no {guidance!r}: expected {_listed(students)}")
    names = students[guidance]
    if network is not None and network not in names:
        raise WorkdirError(
            f"{folder} has no {network!r} of {guidance!r}: expected {_listed(names)}"
        )
    if seed is not None and seed not in seeds:
        raise WorkdirError(f"{folder} has no seed {seed}: expected {_listed(seeds)}")
    key = (guidance, network or names[-1], seeds[0] if seed is None else seed)
    failed = [row["failed"] for row in results.rows if _key_of(row) == key and row.get("failed")]
    if failed:
        raise WorkdirError(f"{folder}: {_text(key)} could not be trained: {failed[0]}")
    if key not in results.networks:
        command = read_run(folder).get("command", "the command of the run")
        raise WorkdirError(f"{folder}: {_text(key)} is not trained yet; to go on: {command}")
    return key


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(repr, values))


def _text(key: Key) -> str:
    return "/".join(map(str, key))


def _key_of(row: dict[str, Any]) -> Key:
    return row["guidance"], row["network"], row["seed"]


def _chosen(folder: Path, results: Results, key: Key, config: Any, normalise: bool) -> _Chosen:
    network, variables = results.networks[key]
    if not normalise:
        return _Chosen(network, variables, as_it_is, network.inputs, config.precision)
    images = images_of(results.preprocess)
    if images is not None:
        dtype = "uint8" if images.value_range is None else "float32"
        spec = jax.ShapeDtypeStruct((1, *network.image_shape), dtype)
    else:
        dataset = dataset_of(folder, config)
        spec = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), dataset.test.images
        )
    return _Chosen(network, variables, results.preprocess, spec, config.precision)


def _write_weights(path: Path, form: str, chosen: _Chosen, results: Results) -> tuple[float, float]:
    """Writes a file of weights under a name of its own, and renames it when it was read back."""
    images = images_of(results.preprocess)
    normalisation = (images.mean, images.std) if images is not None else None
    trial = path.with_name(f".{path.stem}.tmp.{form}")
    try:
        save_variables(trial, chosen.variables, normalisation)
        found = chosen._replace(variables=load_variables(trial, chosen.network, normalisation))
        difference = _difference(path, chosen, found.logits)
        remove_card(path)
        trial.replace(path)
    finally:
        trial.unlink(missing_ok=True)
    return difference


def _write_program(path: Path, form: str, chosen: _Chosen, results: Results) -> tuple[float, float]:
    """Writes a program when what it is read back as gives the same logits."""
    to, back = PROGRAMS[form]
    preprocess = None if chosen.preprocess is as_it_is else chosen.preprocess
    raw = to(programs.forward_of(chosen.network, chosen.variables, preprocess), chosen.spec)
    forward, _ = back(raw)
    difference = _difference(path, chosen, forward)
    remove_card(path)
    write_bytes(path, raw)
    return difference


def _difference(path: Path, chosen: _Chosen, forward: Callable[[Any], Any]) -> tuple[float, float]:
    """The largest difference of a logit of some examples, and the largest logit."""
    inputs = examples(chosen.spec, EXAMPLES)
    wanted, got = chosen.logits(inputs), np.asarray(forward(inputs))
    largest, of = float(np.abs(got - wanted).max()), float(np.abs(wanted).max())
    if not largest <= AT_MOST[chosen.network.dtype] * of:
        raise WeightsError(
            f"{path.name} is not written: read back, its logits differ by {largest:.3g}, the "
            f"largest being {of:.3g}"
        )
    return largest, of


def examples(spec: Any, n: int) -> Any:
    """Made-up inputs (n, ...): normal numbers, or integers from 0 to 1, of bytes to 255."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        shape, dtype = (n, *leaf.shape[1:]), np.dtype(leaf.dtype)
        if dtype.kind in "iub":
            return rng.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
        return rng.standard_normal(shape).astype(dtype)

    return jax.tree.map(draw, spec)


def _about(folder: Path, network: str, stage_id: str) -> dict[str, Any]:
    """What determines a stage; the weights that its training began with are its first phase's."""
    about = read_meta(stage_place(folder, network, stage_id) / WEIGHTS)["about"]
    if start := about.get("start"):
        return {**about, "initial": _about(folder, network, start).get("initial")}
    return about


def _initial(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    """The weights that its training began with: as the config names them, and by their digest."""
    own = about.get("initial")
    return {"weights": config.init.weights, **own} if own else {}


def _facts(
    path: Path,
    results: Results,
    row: dict[str, Any],
    chosen: _Chosen,
    config: Any,
    about: dict[str, Any],
    normalise: bool,
    difference: tuple[float, float],
) -> dict[str, Any]:
    """What the card says; see `write_card`."""
    images = images_of(results.preprocess)
    alike = [
        other
        for other in results.rows
        if _key_of(other)[:2] == _key_of(row)[:2] and not other.get("failed")
    ]
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "network": chosen.network.name,
        "classes": chosen.network.classes,
        "dtype": chosen.network.dtype,
        "precision": config.precision,
        "inputs": spec_as_json(chosen.spec),
        "sees": spec_as_json(chosen.network.inputs),
        "normalised_inside": normalise,
        "preprocessing": dataclasses.asdict(images) if images is not None else {},
        "parameters": models.count_parameters(chosen.network),
        "flops": models.count_flops(chosen.network),
        "guidance": row["guidance"],
        "teachers": row["teachers"],
        "seed": row["seed"],
        "stage": row["stage"],
        "selection": row["selection"],
        "test_accuracy": row["test_accuracy"],
        "accuracy": accuracy_over_seeds(alike),
        "recipe": about.get("recipe", {}),
        "methods": about.get("methods", []),
        "initial": _initial(config, about),
        "difference": {"largest": difference[0], "of": difference[1]},
        "distill_jax": version(),
        "jax": jax.__version__,
    }
