"""The same step body on one device or many: under jit (over a mesh) or under pmap.

A state has the same shape in every mode, so that checkpoints move between them: it is replicated,
and what is split is the batch. Many steps are one dispatch: a loop whose bounds are traced, so that
one program serves every number of steps and stopping early computes the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import metrics
from distill_jax.step import Batch, EvalStep, TrainStep

AXIS = "devices"
MODES = ("jit", "pmap")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Over which devices a batch is split, and how.

    Args:
      mode: "jit" (one program, split by the compiler over a mesh) or "pmap".
      devices: how many; 0 takes all there are.

    Raises:
      ValueError: unknown mode, or more devices than there are.
    """

    mode: str = "jit"
    devices: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"parallel is one of {MODES}, got {self.mode!r}")
        there = jax.local_device_count()
        if not 0 <= self.devices <= there:
            raise ValueError(f"{self.devices} devices asked for, there are {there}")

    @property
    def count(self) -> int:
        """How many devices take part."""
        return self.devices or jax.local_device_count()

    @property
    def axis_name(self) -> str | None:
        """The axis that the step body has to know of."""
        return AXIS if self.mode == "pmap" else None

    @property
    def mesh(self) -> Mesh:
        """The devices in a row; its axis is "auto", as linen's layers need it."""
        return Mesh(np.asarray(jax.local_devices()[: self.count]), (AXIS,))

    def check_batch(self, batch_size: int) -> None:
        """Raises ValueError where `batch_size` is not divisible by the devices."""
        if batch_size % self.count:
            raise ValueError(f"a batch of {batch_size} is not divisible by {self.count} devices")

    def replicate(self, tree: Any) -> Any:
        """The arrays on every device, as fresh copies: donating these spares the originals."""
        return jax.tree.map(jnp.copy, self.place(tree))

    def place(self, tree: Any) -> Any:
        """The arrays on every device; not to be donated, nor the originals to be changed."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def compile(self, function: Callable, arguments: int, donated: int) -> Callable:
        """Compiles `function(device, *arguments)`, all replicated, the first `donated` given up.

        `device` is this device's index under "pmap" and None under "jit".
        """
        if self.mode == "jit":
            return jax.jit(lambda *args: function(None, *args), donate_argnums=range(donated))
        mapped = jax.pmap(
            function,
            AXIS,
            in_axes=(0, *(None,) * arguments),
            out_axes=None,
            devices=jax.local_devices()[: self.count],
            donate_argnums=range(1, donated + 1),
        )
        indices = np.arange(self.count, dtype=np.int32)
        return lambda *args: mapped(indices, *args)

    def batch(
        self, device: Array | None, images: Array, labels: Array, rows: Array, mask: Array
    ) -> Batch:
        """The examples `rows` (B,) of the resident data, or this device's share of them."""
        positions = jnp.arange(rows.shape[0], dtype=jnp.int32)
        if device is not None:
            local = rows.shape[0] // self.count
            rows, mask, positions = (
                lax.dynamic_slice_in_dim(x, device * local, local) for x in (rows, mask, positions)
            )
        batch = Batch(images[rows], labels[rows], positions, mask)
        if device is None and self.count > 1:
            sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
            batch = jax.tree.map(lambda x: lax.with_sharding_constraint(x, sharding), batch)
        return batch


def train_loop(step: TrainStep, topology: Topology) -> Callable:
    """Compiles steps `start` to `stop` of an epoch as one dispatch.

    Returns:
      (state, sums, teachers' variables, images (N, H, W, C), labels (N,), order (S, B), start,
      stop, hyper, key) -> (state, sums): row t of `order` holds the examples of step t, and `sums`
      the metrics so far. State and sums are donated.
    """

    def run(device, state, sums, variables, images, labels, order, start, stop, hyper, key):
        def body(t, carry):
            state, sums = carry
            everything = jnp.ones(order.shape[1:], bool)
            batch = topology.batch(device, images, labels, order[t], everything)
            state, new = step(state, variables, batch, hyper, key)
            return state, metrics.merge(sums, new)

        return lax.fori_loop(start, stop, body, (state, sums))

    return topology.compile(run, arguments=10, donated=2)


def eval_loop(step: EvalStep, topology: Topology) -> Callable:
    """Compiles the evaluation of a whole data set as one dispatch.

    Returns:
      (variables, images, labels, order (S, B), mask (S, B)) -> metrics.
    """

    def run(device, variables, images, labels, order, mask):
        def sums_of(t):
            batch = topology.batch(device, images, labels, order[t], mask[t])
            return step(variables, batch)

        # At least one row: evaluated once more it would count twice, so the first starts the sums.
        return lax.fori_loop(
            1, order.shape[0], lambda t, sums: metrics.merge(sums, sums_of(t)), sums_of(0)
        )

    return topology.compile(run, arguments=5, donated=0)


def predict_loop(step: EvalStep) -> Callable:
    """Compiles the logits of a whole data set as one dispatch, on one device.

    Returns:
      (variables, images, labels, order (S, B), mask (S, B)) -> logits (S, B, C).
    """
    alone = Topology()

    def run(variables, images, labels, order, mask):
        def logits_of(rows):
            return step(variables, alone.batch(None, images, labels, *rows))

        return lax.map(logits_of, (order, mask))

    return jax.jit(run)
