"""Weights that are given instead of trained: files of any kind, and networks of earlier runs."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax import data
from distill_jax.identity import digest_json
from distill_jax.interop.files import load_variables, read_bytes
from distill_jax.interop.torch_weights import WeightsError
from distill_jax.models import Network, Variables, backbone_name
from distill_jax.models.indices import is_indices
from distill_jax.runs.checkpoint import CheckpointError, Mismatch, read_meta, restore
from distill_jax.runs.config import LOGITS
from distill_jax.train.stage import Stage

WEIGHTS, RESULTS = "weights", "results.json"


def digest_of_given(source: str, field: str = "teacher_weights") -> str:
    """A digest of given weights: of a file's bytes, or of all arrays of a stage's.

    Args:
      source: see `load_given`.
      field: of the config, that names it.

    Raises:
      WeightsError: they cannot be read.
    """
    try:
        if source.startswith(LOGITS):
            return hashlib.sha256(_path(source).read_bytes()).hexdigest()
        folder = stage_folder(source)
        if folder is None:
            return hashlib.sha256(read_bytes(Path(source).expanduser())).hexdigest()
        return digest_json(read_meta(folder / WEIGHTS)["digests"])
    except (WeightsError, CheckpointError, OSError) as error:
        raise WeightsError(f"{field} cannot be read: {error}") from None


def load_given(stage: Stage, dataset: data.Dataset) -> Variables:
    """The variables of a stage whose weights are given; of one with branches the backbone's.

    Of a file of logits these, by split: {"params": {}, "logits": {"train", "valid", "test"}}, those
    of "train" by the places of the examples in all that there are to train on.

    Raises:
      WeightsError: they cannot be read, are of another network, or were trained on images that
        were normalised otherwise.
    """
    if stage.file.startswith(LOGITS):
        return {"params": {}, "logits": read_logits(_path(stage.file), dataset)}
    folder, network = stage_folder(stage.file), stage.network.backbone
    if folder is None:
        path = Path(stage.file).expanduser()
        return load_variables(path, network, dataset.normalisation)
    return load_of_stage(folder, network, dataset)


def _path(source: str) -> Path:
    return Path(source.removeprefix(LOGITS)).expanduser()


def read_logits(path: Path, dataset: data.Dataset) -> dict[str, np.ndarray]:
    """The logits in an .npz file: "train" and "test", and "valid" where that is not held out.

    Each is (N, C), a row an example in the order in which the data set's source has them: those
    that are held out for validation are among "train".

    Raises:
      WeightsError: a file that cannot be read, or arrays of another shape, naming both.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} cannot be read ({reason}): expected an .npz file") from None
    held = "valid" in dataset.places
    sizes = {"train": len(dataset.train.labels), "test": len(dataset.test.labels)}
    if held:
        sizes["train"] += len(dataset.valid.labels)
    elif len(dataset.valid.labels):
        sizes["valid"] = len(dataset.valid.labels)
    logits = {}
    for part, size in sizes.items():
        array = arrays.get(part)
        given = "none" if array is None else f"{array.dtype} {array.shape}"
        right = array is not None and array.shape == (size, dataset.classes)
        if array is None or not right or not np.issubdtype(array.dtype, np.floating):
            raise WeightsError(
                f"{path} has {given} as {part!r}: expected floats ({size}, {dataset.classes}), a "
                f"row an example of {dataset.name}"
            )
        if not np.isfinite(array).all():
            raise WeightsError(f"{path} has logits in {part!r} that are not finite")
        logits[part] = array.astype(np.float32)
    if held:
        logits["valid"] = logits["train"][dataset.places["valid"]]
    return logits


def load_of_stage(folder: Path, network: Network, dataset: data.Dataset) -> Variables:
    """The variables in the folder of a stage; errors are those of `load_given`."""
    try:
        meta = read_meta(folder / WEIGHTS)
        variables = restore(folder / WEIGHTS, network.shapes)[0] if _fits(meta, dataset) else None
    except Mismatch as error:
        differ = "; ".join(error.differences)
        raise WeightsError(f"{folder} is no {network.name} of these classes: {differ}") from None
    except CheckpointError as error:
        raise WeightsError(" ".join(str(error).split())) from None
    if variables is None:
        raise WeightsError(
            f"{folder} was trained on examples preprocessed by {meta['preprocessing']}: expected "
            f"{preprocessing_of(dataset)}, as this data is"
        )
    return variables


def _fits(meta: dict[str, Any], dataset: data.Dataset) -> bool:
    """Whether weights saw examples that were preprocessed as those of a data set, if that is known.

    Asked before their shapes: those of another vocabulary differ for that reason.
    """
    seen = meta.get("preprocessing")
    return seen is None or seen == preprocessing_of(dataset)


def preprocessing_of(dataset: data.Dataset) -> dict[str, Any]:
    """How images are normalised, as a JSON value; of other tasks what their indices are of."""
    if dataset.normalisation is None:
        parts = jax.tree.leaves(dataset.spec, is_leaf=is_indices)
        sources = [own.source for own in parts if is_indices(own) and own.source]
        return {"vocabularies": sources} if sources else {}
    mean, std = dataset.normalisation
    return {"mean": list(mean), "std": list(std)}


def stage_folder(source: str) -> Path | None:
    """The folder of the stage that a text names; None where it names a file.

    It is the folder itself, or RUN_FOLDER:GUIDANCE/NETWORK/SEED, a row of an earlier run.

    Raises:
      WeightsError: the run has no such row, or its network was not trained to the end.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        if (place / WEIGHTS).is_dir():
            return place
        raise WeightsError(
            f"{place} is a folder: expected a file, a stage's folder (RUN/stages/NAME-ID), or "
            f"RUN:GUIDANCE/NETWORK/SEED; distill_jax.interop.files.save_variables writes files"
        )
    head, colon, row = source.partition(":")
    while colon and not place.exists():
        run = Path(head).expanduser()
        if (run / RESULTS).is_file():
            return _of_row(run, row)
        more, colon, row = row.partition(":")
        head = f"{head}:{more}"
    return None


def _of_row(run: Path, wanted: str) -> Path:
    rows = json.loads((run / RESULTS).read_text())
    names = {f"{row['guidance']}/{row['network']}/{row['seed']}": row for row in rows}
    if wanted not in names:
        raise WeightsError(
            f"{run} has no result {wanted!r}: expected GUIDANCE/NETWORK/SEED, one of "
            f"{', '.join(names)}"
        )
    row = names[wanted]
    folder = run / "stages" / folder_name(row["network"], row["stage"])
    if row.get("epochs") == 0:
        raise WeightsError(
            f"{run} was given the weights of {wanted} and does not keep them: expected their file"
        )
    if row.get("failed") or not (folder / WEIGHTS).is_dir():
        raise WeightsError(f"{run} did not train {wanted} to the end")
    return folder


def folder_name(network: str, stage_id: str) -> str:
    """What a stage's folder is called."""
    return f"{network.replace(':', '-')}-{stage_id}"


def network_of(folder: Path) -> str:
    """The name of the network whose stage a folder is."""
    name = folder.name.rpartition("-")[0]
    branched = name.replace("-", ":", 1)
    return name if backbone_name(branched) == branched else branched
