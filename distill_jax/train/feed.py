"""Which examples the steps of an epoch see, and how they come to the devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from distill_jax import data, processes
from distill_jax.train.replica import Replica
from distill_jax.train.sharding import Topology
from distill_jax.train.stage import data_needs_of
from distill_jax.train.state import DeviceDataset, Order


class Chunk(NamedTuple):
    """Some steps of an epoch, from its step `start` on, with the examples that they need."""

    start: int
    steps: int
    data: DeviceDataset
    order: Order  # of (S, B) rows, or (replicas, S, B)


class Feed:
    """The training examples of a replica, or of several that are trained at once.

    Args:
      replicas: they; only one where examples are streamed.
      topology: the devices.
      held: the training split on the devices; None where it is streamed.
      workers: how many processes decode what is streamed, 0 for threads.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        topology: Topology,
        held: DeviceDataset | None,
        workers: int,
    ):
        self.replicas, self.topology, self.held = replicas, topology, held
        self.recipe = replicas[0].recipe
        self.own_data = held is None and processes.count() > 1
        self.needs_partners = "partner" in data_needs_of(replicas[0].stages)
        self._asked = workers
        self._started: data.Workers | None = None

    def orders(self, epoch: int) -> list[Order]:
        """Who sees which examples when, (replicas, S, B); a smaller last batch apart."""
        orders = [
            data.epoch_order(
                r.examples,
                self.recipe.batch_size,
                seed=r.seed,
                epoch=epoch,
                last_batch=self.recipe.last_batch,
            )
            for r in self.replicas
        ]
        whole = np.stack([order for order, _ in orders])
        rest = np.stack([order[None] for _, order in orders])
        return [self._with_partners(x, epoch) for x in (whole, rest) if x.size]

    def _with_partners(self, rows: np.ndarray, epoch: int) -> Order:
        if not self.needs_partners:
            return Order(rows)
        tables = [
            data.partners(r.dataset.train.labels, seed=r.seed, epoch=epoch) for r in self.replicas
        ]
        return Order(rows, np.stack([table[own] for table, own in zip(tables, rows, strict=True)]))

    def chunks(self, orders: Order, epoch: int, first: int, step: int) -> Iterator[Chunk]:
        """The steps of `orders`, from the chunk that holds `step` on.

        Args:
          orders: of `orders(epoch)`.
          epoch: they are of it.
          first: the step of the training with which they begin.
          step: the next one.
        """
        steps, skip = orders.rows.shape[1], step - first
        if self.held is None:
            yield from self._streamed(orders.rows[0], epoch, skip, step)
        elif skip < steps:
            own = orders if len(self.replicas) > 1 else jax.tree.map(lambda x: x[0], orders)
            yield Chunk(0, steps, self.held, own)

    def _streamed(self, rows: np.ndarray, epoch: int, skip: int, step: int) -> Iterator[Chunk]:
        """Chunks of streamed examples, decoded while the devices are at work on those before."""
        (replica,) = self.replicas
        split = data.at_epoch(replica.dataset.train, replica.seed, epoch)
        own = rows[:, self.topology.own(rows.shape[1])] if self.own_data else rows
        workers = self._workers(step)
        read = None if workers is None else workers.read
        for chunk in data.chunks(split, own, skip=skip, read=read):
            part = DeviceDataset(chunk.images, chunk.labels, index=chunk.places)
            held, order = self.topology.hold(part), chunk.order
            if self.own_data:
                placed = self.topology.put_own(held, len(order))
                order = self.topology.own_order(len(order), rows.shape[1])
            else:
                placed = self.topology.device_put(held)
            yield Chunk(chunk.start, chunk.steps, placed, Order(order))

    def _workers(self, step: int) -> data.Workers | None:
        """The processes that decode, from `step` on, where there are to be any."""
        if self._started is None and self._asked:
            (replica,) = self.replicas
            reading = data.Reading(
                replica.dataset.train.images,
                self.recipe.batch_size,
                replica.seed,
                self.recipe.epochs,
                self.recipe.last_batch,
                jax.process_index() if self.own_data else 0,
                processes.count() if self.own_data else 1,
            )
            self._started = data.Workers(reading, self._asked, step)
        return self._started

    def close(self) -> None:
        """Ends the processes that decode."""
        if self._started is not None:
            self._started.close()
