"""What is saved, verified and restored: orbax behind one module.

Every array is saved with its digest, and a restore that gives other bytes falls back to the save
before it, loudly. Orbax renames a finished save into place, so that a half-written one is never
seen.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

log = logging.getLogger("distill_jax")
KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that is not what was asked for."""


def digests(tree: Any) -> dict[str, str]:
    """The sha256 of every array (type, shape and bytes), by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    return {jax.tree_util.keystr(path): _digest(np.asarray(leaf)) for path, leaf in leaves}


def digest(tree: Any) -> str:
    """One sha256 of a whole tree; equal for equal names, types, shapes and bytes."""
    return hashlib.sha256(json.dumps(digests(tree), sort_keys=True).encode()).hexdigest()


def save(folder: Path, arrays: Any, meta: dict[str, Any]) -> None:
    """Writes one checkpoint, waited for; an existing one of that name is replaced.

    Raises:
      CheckpointError: it cannot be written; nothing that was there before is touched.
    """
    meta = {**meta, "digests": digests(arrays)}
    arguments = ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
    )
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder.absolute(), args=arguments, force=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"could not write the checkpoint {folder}: {error}") from error


def restore(folder: Path, template: Any) -> tuple[Any, dict[str, Any]]:
    """Reads one checkpoint as `template` (arrays or their shapes) has it.

    Returns:
      The arrays, and what was saved beside them.

    Raises:
      CheckpointError: unreadable, arrays other than the template's, or bytes other than were saved.
    """
    shapes = jax.eval_shape(lambda: template) if not _is_abstract(template) else template
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            meta = checkpointer.restore(
                folder.absolute(), args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            ).meta
            arrays = checkpointer.restore(
                folder.absolute(),
                args=ocp.args.Composite(arrays=ocp.args.StandardRestore(_on_host(shapes))),
            ).arrays
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        raise CheckpointError(f"{folder} cannot be read: {_first_line(error)}") from error
    found, saved = digests(arrays), meta.pop("digests")
    differing = sorted(set(found.items()) ^ set(saved.items()))
    if differing:
        raise CheckpointError(
            f"{folder} is damaged: other bytes than were saved in "
            + ", ".join(sorted({name for name, _ in differing})[:5])
        )
    return arrays, meta


class Checkpoints:
    """The checkpoints of one stage in training; the newest `KEPT` are kept."""

    def __init__(self, folder: Path):
        self.folder = folder

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())

    def save(self, step: int, arrays: Any, meta: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`, then lets go of those too many."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self.folder / str(step), arrays, meta)
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def restore(
        self, template: Any, among: Collection[int] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that can be believed, of the steps `among` where these are given.

        Returns:
          The arrays, and what was saved beside them; None where there is no checkpoint at all.

        Raises:
          CheckpointError: there are some, and none of them can be believed.
        """
        steps = [step for step in self.steps() if among is None or step in among]
        problems = []
        for step in reversed(steps):
            try:
                return restore(self.folder / str(step), template)
            except CheckpointError as error:
                problems.append(str(error))
                log.warning("%s; going back to the one before it", error)
        if problems:
            raise CheckpointError(
                f"no checkpoint of {self.folder} can be believed; remove it to start this stage "
                "anew:\n  " + "\n  ".join(problems)
            )
        return None

    def remove(self) -> None:
        """Lets go of all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def _digest(array: np.ndarray) -> str:
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _is_abstract(tree: Any) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _on_host(shapes: Any) -> Any:
    # Restored to one device whatever wrote it: checkpoints move between topologies.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
