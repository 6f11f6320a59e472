"""What is saved, verified and restored: orbax behind one module.

Every array is saved with its digest, and a restore that gives other bytes falls back to the save
before it, loudly. A save of another network, data or recipe is refused with every difference.
Orbax renames a finished save into place, so that a half-written one is never seen.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax import processes
from distill_jax.identity import differences, digest, digest_json, digests, finite, leaves, plain

log = logging.getLogger("distill_jax")
__all__ = ["CheckpointError", "Checkpoints", "Damaged", "Mismatch", "digest", "restore", "save"]
KEPT = 2
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a save that orbax has not renamed yet
_NEW, _OLD = ".new", ".old"  # a save that is to replace one of its name, and that one


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that is not what was asked for."""


class Damaged(CheckpointError):
    """Missing, cut short, or other bytes than were saved: the save before it may be whole."""


class Mismatch(CheckpointError):
    """Whole, but of other arrays or of another training: never to be passed over.

    Args:
      folder: of the checkpoint.
      differences: from what was asked for, a line each.
    """

    def __init__(self, folder: Path, differences: Sequence[str]):
        first = f"{folder} is of another training; remove it, or use another working directory:"
        super().__init__("\n  ".join((first, *differences)))
        self.differences = tuple(differences)


def save(folder: Path, arrays: Any, meta: dict[str, Any]) -> None:
    """Writes one checkpoint, waited for; one of that name is replaced when the new one is whole.

    Raises:
      CheckpointError: it cannot be written; nothing that was there before is touched.
    """
    meta = {**meta, "digests": digests(arrays), "types": _types(arrays)}
    ocp = _orbax()
    arguments = ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays),
        meta=ocp.args.JsonSave({**meta, "digest": digest_json(meta)}),
    )
    new = folder.with_name(folder.name + _NEW)
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(new.absolute(), args=arguments, force=True)
        _put_in_place(new, folder)
    except Exception as error:  # a full disk comes as any of many types
        _sweep(folder.parent)
        raise CheckpointError(
            f"could not write the checkpoint {folder} ({_first_line(error)}): expected room and "
            "permission to write; earlier checkpoints are as they were"
        ) from error


def _put_in_place(new: Path, folder: Path) -> None:
    """Renames a whole save; what it replaces is there until then, see `recover`."""
    old = folder.with_name(folder.name + _OLD)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Brings back a save that was about to be replaced when the process ended."""
    old = folder.with_name(folder.name + _OLD)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def restore(
    folder: Path, template: Any, wanted: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reads one checkpoint as `template` (arrays or their shapes) has it.

    Args:
      folder: where it was saved.
      template: arrays, or their shapes and types.
      wanted: what must have been saved as `about`; None asks nothing.

    Returns:
      The arrays, and what was saved beside them.

    Raises:
      Damaged: unreadable, or bytes other than were saved.
      Mismatch: other arrays than the template's, or another `about` than is wanted.
    """
    template = jax.eval_shape(lambda: template) if not _is_abstract(template) else template
    meta = read_meta(folder)
    found = differences(meta["types"], _types(template))
    if wanted is not None:
        found += differences(meta.get("about"), plain(wanted))
    if found:
        raise Mismatch(folder, found)
    arrays = _read(folder, arrays=_orbax().args.StandardRestore(_on_host(template)))
    if changed := differences(meta["digests"], digests(arrays)):
        names = ", ".join(line.partition(" is ")[0] for line in changed[:5])
        raise Damaged(f"{folder} is damaged: other bytes than were saved in {names}")
    return arrays, {k: v for k, v in meta.items() if k not in ("digests", "types")}


def read_meta(folder: Path) -> dict[str, Any]:
    """What was saved beside the arrays of a checkpoint, with their "digests" and "types".

    Raises:
      Damaged: unreadable, or other than was saved.
    """
    meta = _read(folder, meta=_orbax().args.JsonRestore())
    if not isinstance(meta, dict) or meta.pop("digest", None) != digest_json(meta):
        raise Damaged(f"{folder} is damaged: its metadata is not what was saved")
    return meta


class Checkpoints:
    """The checkpoints of one stage in training; the newest `KEPT` are kept.

    Args:
      folder: where they are.
      about: all that determines the stage, as JSON values; a checkpoint of another is refused.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None = None):
        self.folder, self.about = folder, about

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        for old in self.folder.glob(f"*{_OLD}"):
            recover(old.with_suffix(""))
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal())

    def newest_meta(self) -> dict[str, Any]:
        """What was saved beside the arrays of the newest checkpoint; {} where none can be read."""
        for step in reversed(self.steps()):
            with contextlib.suppress(Damaged):
                return read_meta(self.folder / str(step))
        return {}

    def save(self, step: int, arrays: Any, meta: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`, then lets go of those too many."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"could not make the folder {self.folder}: {error}") from error
        about = {} if self.about is None else {"about": self.about}
        save(self.folder / str(step), arrays, {**meta, **about})
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def restore(
        self, template: Any, among: Collection[int] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that can be believed, of the steps `among` where these are given.

        Returns:
          The arrays, and what was saved beside them; None where there is no checkpoint at all.

        Raises:
          Mismatch: the newest whole one is of another training.
          CheckpointError: there are some, and none of them can be believed.
        """
        _sweep(self.folder)
        steps = [step for step in self.steps() if among is None or step in among]
        problems = []
        for step in reversed(steps):
            folder = self.folder / str(step)
            try:
                found = restore(folder, template, self.about)
            except Damaged as error:
                problems.append(str(error))
                log.warning("%s; going back to the one before it", error)
                continue
            self._set_aside([s for s in self.steps() if s > step])
            return found
        if problems:
            raise Damaged(
                f"no checkpoint of {self.folder} can be believed; remove it to start this stage "
                "anew:\n  " + "\n  ".join(problems)
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        # So that they do not count among the newest, which are kept.
        for step in steps:
            aside = self.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.folder / str(step), aside)

    def remove(self) -> None:
        """Lets go of all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; errors are those of `write_text`."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text whole or not at all; errors are those of `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
      CheckpointError: it cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}") from error


def _types(tree: Any) -> dict[str, str]:
    return {path: f"{np.dtype(leaf.dtype)} {tuple(leaf.shape)}" for path, leaf in leaves(tree)}


def _read(folder: Path, **item: Any) -> Any:
    (name,), ocp = item, _orbax()
    try:
        with _checkpointer() as checkpointer:
            restored = checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**item))
            return getattr(restored, name)
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        raise Damaged(f"{folder} cannot be read: {_first_line(error)}") from error


def _orbax() -> Any:
    """Imported with the first save or restore: that takes long, and a first step needs neither."""
    import orbax.checkpoint

    logging.getLogger("absl").addFilter(_is_no_news_of_orbax)
    return orbax.checkpoint


def _is_no_news_of_orbax(record: logging.LogRecord) -> bool:
    """Not that its threads wait, of which it warns on slow machines; its errors are raised."""
    return "orbax" not in Path(record.pathname).parts


def _checkpointer() -> Any:
    """Of several processes this one acts by itself: the state is whole on each, and one writes."""
    ocp = _orbax()
    if processes.count() == 1:
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=str(here)
    )
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _sweep(folder: Path) -> None:
    """Mends what killed and failed saves left; only the run that holds the folder calls it."""
    for old in folder.glob(f"*{_OLD}"):
        recover(old.with_suffix(""))
    for left in (*folder.glob(f"*{_UNFINISHED}*"), *folder.glob(f"*{_NEW}")):
        shutil.rmtree(left, ignore_errors=True)


def _is_abstract(tree: Any) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _on_host(shapes: Any) -> Any:
    # Restored to one device whatever wrote it: checkpoints move between topologies.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _first_line(error: Exception) -> str:
    # tensorstore tells of its whole configuration in that line.
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:200]}"
