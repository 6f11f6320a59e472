"""The same step body on one device or many: under jit (and shard_map) or under pmap.

A state has the same shape in every mode, so that checkpoints move between them: it is replicated,
and what is split is the batch. Many steps are one dispatch: a loop whose bounds are traced, so that
one program serves every number of steps and stopping early computes the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import processes, traced
from distill_jax.models import run_once
from distill_jax.models.backend import platform_of, traced_for
from distill_jax.train import metrics
from distill_jax.train.state import Batch, DeviceDataset, Order, Rows, examples_of
from distill_jax.train.step import TrainStep

AXIS = "devices"
MODES = ("jit", "pmap")
MEMBERS_A_DEVICE = 8  # of a population, where none are asked for
# From how many members on a device one `vmap` takes less time than one after the other. On an H100
# 2 take 2.6 times that of separate runs, 5 take 1.3 and 8 take 0.9 (docs/speed.md).
VMAP_FROM = {"gpu": 8, "tpu": 2}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Over which devices a batch is split, and how.

    Args:
      mode: "jit" (one program over a mesh, by `shard_map` where it has several devices) or "pmap".
      devices: how many, of all processes; 0 takes all there are.

    Raises:
      ValueError: unknown mode, more devices than there are, or not as many of each process.
    """

    mode: str = "jit"
    devices: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"parallel is one of {MODES}, got {self.mode!r}")
        if self.devices == 1:
            return  # known to be there: asking would start JAX wherever this module is imported
        there = jax.device_count()
        if not 0 <= self.devices <= there:
            raise ValueError(
                f"{self.devices} devices asked for, there are {there} (a CPU counts as several "
                "only where they are asked for before JAX starts)"
            )
        if several := processes.count() > 1 and self._refused(processes.count(), there):
            raise ValueError(several)

    def _refused(self, several: int, there: int) -> str:
        """Why these cannot be devices of several processes; "" where they can."""
        if self.mode == "pmap":
            return f"parallel is 'pmap' with {several} processes: expected 'jit', which runs on all"
        if there != several * jax.local_device_count() or self.devices % several:
            return (
                f"{self.devices or there} devices of {several} processes, this one has "
                f"{jax.local_device_count()}: expected as many of each process"
            )
        return ""

    @property
    def count(self) -> int:
        """How many devices take part."""
        return self.devices or jax.device_count()

    @property
    def processes(self) -> int:
        """Of how many processes they are: one device is this one's."""
        return 1 if self.devices == 1 else processes.count()

    @property
    def axis_name(self) -> str | None:
        """The axis that the step body has to know of."""
        return AXIS if self.mode == "pmap" or self.count > 1 else None

    @property
    def mesh(self) -> Mesh:
        """The devices in a row; its axis is "auto", as linen's layers need it."""
        if self.processes == 1:
            return Mesh(np.asarray(jax.local_devices()[: self.count]), (AXIS,))
        each = self.count // self.processes
        by_process = [
            [device for device in jax.devices() if device.process_index == i][:each]
            for i in range(self.processes)
        ]
        return Mesh(np.asarray(by_process).reshape(-1), (AXIS,))

    @property
    def backend(self) -> str:
        """The platform of its devices, "cpu", "gpu" or "tpu": it chooses the algorithms."""
        return platform_of(self.mesh.devices.flat[0])

    @property
    def kind(self) -> str:
        """What its devices call themselves, such as "cpu" or "NVIDIA H100 80GB HBM3"."""
        return self.mesh.devices.flat[0].device_kind

    @property
    def replicated(self) -> NamedSharding:
        """Of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def shared_parts(self) -> NamedSharding:
        """Of parts (P, B, ...) of which every device holds its share."""
        return NamedSharding(self.mesh, PartitionSpec(None, AXIS))

    def check_batch(self, batch_size: int) -> None:
        """Raises ValueError where `batch_size` is not divisible by the devices."""
        if batch_size % self.count:
            raise ValueError(f"a batch of {batch_size} is not divisible by {self.count} devices")

    def population(self, asked: int, most: int) -> int:
        """How many of `asked` networks to train at once, at most `most` (0: as pays).

        They are spread evenly over the devices; several share one where `vmap` gains by it.
        """
        if not most:
            each = min(asked // self.count, MEMBERS_A_DEVICE)
            most = self.count * (each if self.vmaps(each) else 1)
        even = min(asked, most) // self.count * self.count
        return max(even, 1)

    def vmaps(self, members: int) -> bool:
        """Whether so many members on each device train under one `vmap`."""
        return members >= VMAP_FROM.get(self.backend, math.inf)

    def replicate(self, tree: Any) -> Any:
        """The arrays on every device, as fresh copies: donating these spares the originals."""
        return _copied(self.device_put(tree))

    def stack(self, members: Sequence[Any]) -> Any:
        """The trees of several members as one with a leading axis, spread over the devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        stacked = jax.tree.map(_stack, *jax.device_get(list(members)))
        return _copied(_placed(stacked, sharding))  # what is donated must not be NumPy's

    def member(self, i: int, tree: Any) -> Any:
        """The tree of member `i` of those that `stack` made one, on every device, as a copy."""
        return _member_program(self.replicated, self.backend)(tree, i)

    def device_put(self, tree: Any) -> Any:
        """Puts arrays on every device; not to be donated, nor the originals to be changed."""
        return _placed(tree, self.replicated)

    def put_parts(self, inputs: Any, batch_size: int) -> Any:
        """Puts parts (P, B, ...) where devices share each; of B a process has its `own` places."""
        if self.processes == 1:
            return jax.device_put(inputs, self.shared_parts)
        return _placed_own(inputs, self.shared_parts, 1, batch_size)

    def own(self, batch_size: int) -> slice:
        """The places of a batch whose examples the devices of this process take."""
        each = batch_size // self.processes
        return slice(place := jax.process_index() * each, place + each)

    def put_own(self, data: DeviceDataset, steps: int) -> DeviceDataset:
        """Puts this process's examples of some steps, in their order, each on the device it is for.

        The data that each device then holds is its share of every step, see `own_order`.
        """
        here = self.count // self.processes

        def by_device(x):
            local = x.reshape(steps, here, -1, *x.shape[1:]).swapaxes(0, 1)
            return local.reshape(-1, *x.shape[1:])

        examples = len(data.labels) * self.processes
        spread = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return _placed_own(jax.tree.map(by_device, data), spread, 0, examples)

    def own_order(self, steps: int, batch_size: int) -> np.ndarray:
        """The rows (S, B) of what `put_own` put: of each device among its own."""
        each = batch_size // self.count
        place = np.arange(batch_size, dtype=np.int32) % each
        return np.arange(steps, dtype=np.int32)[:, None] * each + place

    def fetch(self, tree: Any) -> Any:
        """The whole arrays on the host, on that of every process."""
        if self.processes > 1 and not all(
            x.is_fully_replicated or x.is_fully_addressable for x in jax.tree.leaves(tree)
        ):
            tree = _everywhere(self.replicated)(tree)
        return jax.device_get(tree)

    def hold(self, data: DeviceDataset) -> DeviceDataset:
        """The data as these devices take it at each dispatch: on a TPU inputs are rows."""
        if self.backend != "tpu":
            return data
        return data._replace(inputs=jax.tree.map(Rows.of, data.inputs))

    def compile(
        self,
        function: Callable,
        arguments: int,
        donated: int,
        key: Any = None,
        spread: int | None = None,
    ) -> Callable:
        """Compiles `function(device, *arguments)`, all replicated, the first `donated` given up.

        Of the argument at place `spread` each device has a share of its own.

        `key` is all that decides what it computes; see `traced.Program`.

        `device` is this device's index, None where there is but one and no axis. A device picks its
        own examples: left to the compiler, a loop over parts of a batch has each fetch all of them.
        """
        if self.mode == "jit":

            def on_this_device(*args):
                device = None if self.axis_name is None else lax.axis_index(AXIS)
                return function(device, *args)

            on_this_device.__name__ = function.__name__  # what logs and profiles call it
            if self.axis_name is not None:
                on_this_device = jax.shard_map(
                    on_this_device,
                    mesh=self.mesh,
                    in_specs=_specs(arguments, spread),
                    out_specs=PartitionSpec(),
                    check_vma=False,
                )
                on_this_device.__name__ = function.__name__
            return traced.Program(on_this_device, key, donated)
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

    def batch(self, device: Array | None, data: DeviceDataset, order: Order) -> Batch:
        """The examples of one step, or this device's share of them.

        One set of rows gathers inputs, labels and cached teachers' outputs, so that no image meets
        another's logits.
        """
        rows, partners = order
        positions = jnp.arange(rows.shape[0], dtype=jnp.int32)
        if device is not None:
            local = rows.shape[0] // self.count
            rows, positions, partners = jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, device * local, local),
                (rows, positions, partners),
            )
        inputs, labels, teachers, index = jax.tree.map(lambda x: x[rows], data)
        inputs = examples_of(inputs)
        if partners is not None:
            partners = examples_of(jax.tree.map(lambda x: x[partners], data.inputs))
        places = rows if index is None else index
        return Batch(inputs, labels, places, positions, teachers, partners)


def _specs(arguments: int, spread: int | None) -> Any:
    if spread is None:
        return PartitionSpec()
    return tuple(PartitionSpec(AXIS) if i == spread else PartitionSpec() for i in range(arguments))


def _placed_own(tree: Any, sharding: NamedSharding, axis: int, length: int) -> Any:
    """Arrays of which each process has its share, along an axis that is `length` long in all."""

    def put(x):
        shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put, tree)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    """`device_put` of what every process has whole; each puts what its devices hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(x):
        if isinstance(x, Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        if not jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


@functools.cache
def _everywhere(sharding: NamedSharding) -> Callable:
    return jax.jit(lambda tree: tree, out_shardings=sharding)


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _stack(*leaves: Any) -> Any:
    """On the host, where nothing is compiled for it; random keys are no NumPy arrays."""
    keys = jnp.issubdtype(jnp.result_type(leaves[0]), jax.dtypes.prng_key)
    return (jnp if keys else np).stack(leaves)


@functools.cache
def _member_program(sharding, platform):
    def member(tree, i):
        return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree)

    return jax.jit(member, out_shardings=sharding, compiler_options=run_once(platform))


def train_loop(
    step: TrainStep, topology: Topology, key: Any = None, *, own_data: bool = False
) -> Callable:
    """Compiles steps `start` to `stop` of an epoch as one dispatch.

    Args:
      step: of what.
      topology: on which devices.
      key: all that decides what the step computes; see `traced.Program`.
      own_data: whether each device has but its own examples, see `Topology.put_own`.

    Returns:
      (state, sums, teachers' variables, data, order, start, stop, hyper, key) -> (state, sums):
      `data` is a `DeviceDataset`, `order` an `Order` or its rows (S, B) alone, row t of which holds
      the examples of step t, and `sums` the metrics so far. State and sums are donated.
    """
    spread = 3 if own_data else None
    return topology.compile(_steps(step, topology), arguments=9, donated=2, key=key, spread=spread)


def _steps(step: TrainStep, topology: Topology) -> Callable:
    def train_steps(device, state, sums, variables, data, order, start, stop, hyper, key):
        order = order if isinstance(order, Order) else Order(order)

        def body(t, carry):
            state, packed = carry
            batch = topology.batch(device, data, jax.tree.map(lambda x: x[t], order))
            state, new = step(state, variables, batch, hyper, key)
            return state, metrics.merge(packed, metrics.pack(new))

        state, packed = lax.fori_loop(start, stop, body, (state, metrics.pack(sums)))
        return state, metrics.unpack(packed, sums)

    return train_steps


def population_loop(step: TrainStep, topology: Topology, *, shared_data: bool) -> Callable:
    """As `train_loop`, for several networks at once that never meet.

    State, sums, teachers' variables, order, hyper and key have a leading axis of members, which are
    spread evenly over the devices; the data has one too unless it is shared. A device runs its only
    member by the program of `train_loop`, to the bit; several under `vmap` on a GPU or TPU, and on
    a CPU one after the other (there `vmap` makes grouped convolutions, 2.4 times slower).
    """
    run = functools.partial(_steps(step, Topology()), None)
    images_axis = None if shared_data else 0
    # The cache of teachers' outputs is always a member's own; the index is None.
    axes = (0, 0, 0, images_axis, images_axis, 0, None, 0, None, None, 0, 0)

    def one(state, sums, variables, inputs, labels, teachers, index, *rest):
        return run(state, sums, variables, DeviceDataset(inputs, labels, teachers, index), *rest)

    def members_here(state, sums, variables, data, *rest):
        arguments = (state, sums, variables, *data, *rest)
        split = tuple(x for x, axis in zip(arguments, axes, strict=True) if axis == 0)

        def member(own):
            own = iter(own)
            pairs = zip(arguments, axes, strict=True)
            return one(*(x if axis is None else next(own) for x, axis in pairs))

        here = jax.tree.leaves(split)[0].shape[0]
        if here == 1:
            alone = member(jax.tree.map(lambda x: x[0], split))
            return jax.tree.map(lambda x: x[None], alone)
        return jax.vmap(member)(split) if topology.vmaps(here) else lax.map(member, split)

    specs = tuple(PartitionSpec() if axis is None else PartitionSpec(AXIS) for axis in axes)
    spread = jax.shard_map(
        members_here,
        mesh=topology.mesh,
        in_specs=(*specs[:3], DeviceDataset(*specs[3:7]), *specs[7:]),  # type: ignore[arg-type]
        out_specs=PartitionSpec(AXIS),
        check_vma=False,
    )
    return jax.jit(spread, donate_argnums=(0, 1))


def forward_loop(
    freeze: Callable, forward: Callable, topology: Topology, key: Any = None
) -> Callable:
    """Compiles the outputs of a network on some parts of a split as one dispatch.

    Args:
      freeze: variables -> what `forward` takes; once for all parts.
      forward: (frozen variables, inputs (B, ...)) -> arrays (B, ...).
      topology: its devices share every part, under `shard_map` in both modes.
      key: all that decides what they compute; see `traced.Program`.

    Returns:
      (variables, inputs (P, B, ...), parts) -> arrays (P, B, ...), zeros from `parts` on: it is
      traced, so that one program serves splits of every size.
    """

    def forward_parts(variables, inputs, parts):
        frozen = freeze(variables)

        def at(i):
            return jax.tree.map(lambda x: x[i], inputs)

        count, shapes = len(jax.tree.leaves(inputs)[0]), jax.eval_shape(forward, frozen, at(0))

        def part(i, outputs):
            new = forward(frozen, at(i))
            return jax.tree.map(lambda all, one: all.at[i].set(one), outputs, new)

        empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
        return lax.fori_loop(0, parts, part, empty)

    shared = jax.shard_map(
        traced_for(topology.backend, forward_parts),
        mesh=topology.mesh,
        in_specs=(PartitionSpec(), topology.shared_parts.spec, PartitionSpec()),
        out_specs=topology.shared_parts.spec,
        check_vma=False,
    )
    return traced.Program(shared, key)
