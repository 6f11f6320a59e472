"""Streamed images decoded by worker processes, which grain starts and orders.

Workers are told nothing but where to start: from the images, the seed and the place of a step each
works out by itself which examples it decodes, by the order of `order.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from types import ModuleType
from typing import Any

import numpy as np

from distill_jax.data.checks import DataError
from distill_jax.data.order import epoch_order
from distill_jax.data.streamed import Streamed

GROUP = 32  # images at most that a worker decodes before it hands them over
BUFFERED = 2  # groups of a worker that wait to be fetched
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one process reads in training: its share of every batch, epoch by epoch.

    Args:
      images: the training images.
      batch_size: of the whole batch.
      seed: of the order and of the crops.
      epochs: as many are trained.
      last_batch: "drop" or "keep", see `epoch_order`.
      process: which of the processes this is.
      processes: that share each batch.
    """

    images: Streamed
    batch_size: int
    seed: int
    epochs: int
    last_batch: str = "drop"
    process: int = 0
    processes: int = 1

    @property
    def steps(self) -> int:
        """Of an epoch."""
        rows, rest = self._order(0)
        return len(rows) + bool(len(rest))

    @property
    def groups(self) -> int:
        """Into how many a step's share is divided; the same in a smaller last batch."""
        return math.ceil(self.batch_size / self.processes / GROUP)

    def __len__(self) -> int:
        return self.epochs * self.steps * self.groups

    def __getitem__(self, index: int) -> np.ndarray:
        """The images of a group, counted from the first step of the first epoch."""
        place, group = divmod(int(index), self.groups)
        epoch, step = divmod(place, self.steps)
        rows, rest = self._order(epoch)
        batch = rows[step] if step < len(rows) else rest
        each = len(batch) // self.processes
        own = batch[self.process * each : (self.process + 1) * each]
        view = dataclasses.replace(self.images, view=(self.seed, epoch))
        return np.asarray(view[np.array_split(own, self.groups)[group]])

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return _epoch_order(len(self.images), self.batch_size, self.seed, epoch, self.last_batch)


@functools.lru_cache(2)
def _epoch_order(n: int, size: int, seed: int, epoch: int, last_batch: str) -> Any:
    return epoch_order(n, size, seed=seed, epoch=epoch, last_batch=last_batch)


class Workers:
    """Processes that decode what training reads, ahead of it, from one epoch into the next.

    Args:
      reading: what is read.
      number: of processes.
      step: the first that is read, from the first epoch on; nothing before it is decoded.

    Raises:
      DataError: grain is not installed, or the images cannot be given to another process.
    """

    def __init__(self, reading: Reading, number: int, step: int = 0):
        grain = check_grain(number)
        steps = grain.MapDataset.source(reading)[step * reading.groups :]
        here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        ahead = grain.MultiprocessingOptions(number, BUFFERED)
        self._lock, self._closed = threading.Lock(), False
        self._groups = iter(steps.to_iter_dataset(here).mp_prefetch(ahead, _begin))

    def read(self, out: np.ndarray) -> None:
        """Fills `out` (N, H, W, C) with the images of the next steps, which have N of them.

        Raises:
          DataError: an image cannot be read, or a process has gone.
        """
        done = 0
        while done < len(out):
            group = self._next()
            out[done : done + len(group)] = group
            done += len(group)

    def _next(self) -> np.ndarray:
        with self._lock:
            if self._closed:
                raise DataError("the worker processes are closed: expected them to be open")
            try:
                return next(self._groups)
            except DataError as error:
                raise DataError(str(error)) from None  # without where in the other process
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise DataError(
                    f"a worker process cannot go on ({reason}): expected images that can be given "
                    "to it by pickle, enough memory and, in a script, training to be under "
                    "if __name__ == '__main__'; workers=0 decodes in this process"
                ) from error

    def close(self) -> None:
        """Ends the processes."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._groups.close()


def check_grain(number: int) -> ModuleType:
    """grain, ready to start processes.

    Raises:
      DataError: it is not installed.
    """
    try:
        grain = importlib.import_module("grain")
    except ImportError as error:
        raise DataError(
            f"workers is {number} and grain cannot be imported ({error}): expected it to be "
            "installed, as by pip install 'distill_jax[workers]', or workers=0"
        ) from error
    from absl import flags

    if not flags.FLAGS.is_parsed():  # it asks for flags of its own, which nobody need give
        flags.FLAGS.mark_as_parsed()
    return grain


def _begin(index: int, number: int) -> None:
    """In a worker: signals are for the process that trains, and it ends with that one."""
    from distill_jax.data import streamed

    for one in _SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    streamed.THREADS = 1
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
