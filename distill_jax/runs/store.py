"""Finished stages that several working directories share, by their ids."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from distill_jax.runs.checkpoint import CheckpointError
from distill_jax.runs.given import WEIGHTS


class Store:
    """A folder with a copy of each finished stage, under the name that it has in a run.

    Copies are made beside their place and renamed into it, so that runs at work at the same time
    see whole ones or none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._damaged: set[str] = set()

    def fetch(self, place: Path) -> None:
        """Copies a stage to its place in a working directory, where it is here and not there."""
        if (self.folder / place.name / WEIGHTS).is_dir() and not place.exists():
            _copy(self.folder / place.name, place)

    def distrust(self, place: Path) -> None:
        """Has `keep` replace what is here: a copy of it turned out damaged."""
        self._damaged.add(place.name)

    def keep(self, place: Path) -> None:
        """Copies a finished stage from its place in a working directory, where it is not here."""
        target = self.folder / place.name
        if place.name in self._damaged or not (target / WEIGHTS).is_dir():
            _copy(place, target, replace=True)
            self._damaged.discard(place.name)


def _copy(source: Path, target: Path, replace: bool = False) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".copying-") as folder:
            copied = Path(folder) / target.name
            shutil.copytree(source, copied, ignore=shutil.ignore_patterns("progress"))
            if replace and target.exists():
                os.replace(target, Path(folder) / "replaced")
            if not target.exists():
                os.replace(copied, target)
    except OSError as error:
        if not target.exists():  # else another run was faster
            raise CheckpointError(f"could not copy {source} to {target}: {error}") from error
