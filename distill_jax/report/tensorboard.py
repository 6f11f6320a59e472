"""TensorBoard: a writer of event files, by tensorboardX."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_jax.report.page.graph import graph_figure
from distill_jax.report.page.record import StageRecord
from distill_jax.report.writers import EpochEnded, Record, StageInfo, StageStarted, Writer

_SPLITS = ("train_", "valid_", "test_")
_ACCURACIES = ("test_accuracy", "valid_accuracy")  # beside the hyper-parameters


@contextlib.contextmanager
def tensorboard_writer(
    folder: Path, teaching: Mapping[str, Sequence[StageRecord]]
) -> Iterator[Writer]:
    """A writer of event files, in a folder for each stage; closed when the context ends.

    The files of a stage that goes on are written anew, so that none has an epoch twice.

    Args:
      folder: of all of them.
      teaching: by the id of each stage what its picture shows: itself and all that teach it.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    from tensorboardX import SummaryWriter

    files: dict[str, Any] = {}

    def tensorboard(record: Record) -> None:
        stage = record.stage
        if isinstance(record, StageStarted):
            if stage.id in files:  # stages that were trained with it diverged
                files.pop(stage.id).close()
            place = folder / stage.folder
            shutil.rmtree(place, ignore_errors=True)
            files[stage.id] = file = SummaryWriter(str(place))
            file.add_figure("graph", graph_figure(teaching[stage.id]), close=False)
            for epoch in record.history:
                _add_epoch(file, epoch)
        elif isinstance(record, EpochEnded):
            _add_epoch(files[stage.id], record)
            files[stage.id].flush()
        else:
            file = files.pop(stage.id)
            _add_end(file, stage, record.values)
            file.close()

    try:
        yield tensorboard
    finally:
        for file in files.values():
            file.close()


def is_complete(place: Path) -> bool:
    """Whether the event files of a stage reach to its end."""
    return any(b"session_end_info" in path.read_bytes() for path in place.glob("events.*"))


def _add_epoch(file: Any, record: EpochEnded) -> None:
    for name, value in record.values.items():
        file.add_scalar(_tag(name), value, record.epoch)


def _add_end(file: Any, stage: StageInfo, values: Mapping[str, float]) -> None:
    """The final numbers, and the hyper-parameters with the accuracies that they gave."""
    from tensorboardX.summary import hparams

    for name, value in values.items():
        file.add_scalar(_final(name), value)
    about = {"network": stage.network, "seed": stage.seed}
    about |= {"teachers": " ".join(stage.teachers), "guidance": "; ".join(stage.guidance)}
    accuracies = {_final(name): values[name] for name in _ACCURACIES if name in values}
    # Not by `add_hparams`, which makes another run of them, in a folder of its own.
    for summary in hparams({**about, **stage.hyper}, accuracies):
        file.file_writer.add_summary(summary)


def _tag(name: str) -> str:
    """TensorBoard's form of a name: those of a split together, without what it does not take."""
    for split in _SPLITS:
        if name.startswith(split):
            name = f"{split.removesuffix('_')}/{name.removeprefix(split)}"
    return re.sub(r"[^-/\w.]", "_", name)


def _final(name: str) -> str:
    return _tag(f"final/{name}")
