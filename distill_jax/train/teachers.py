"""Networks that are not trained: their logits, few images at a time where that is faster."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax.models import Network, Variables
from distill_jax.models.basics import FROZEN
from distill_jax.models.kernels.cpu_conv import CPU_CHUNK
from distill_jax.models.zoo.stages import BLOCKS, alike_but_for_depth, join, stack_blocks


class Row(NamedTuple):
    """The frozen variables of the networks that one body runs.

    Args:
      own: of each network; of several with a leading axis.
      shared: the blocks of all of them in a row; none of a network that is alone.
    """

    own: Variables
    shared: Variables


class Prepared(NamedTuple):
    """What frozen networks made of their variables, row by row."""

    rows: tuple[Row, ...]


def exit_logits(network: Network, variables: Variables, images: Array) -> Array:
    """(E, B, C) logits of a network that is not trained, and of its E - 1 branches.

    Args:
      network: the network.
      variables: its variables, or what `Network.freeze` made of them.
      images: (B, H, W, channels), normalised.

    On the CPU some images at a time, so that what is between two layers stays in the cache: 0.87
    of the time for ResNet-56, 0.97 for plain CNN 10.
    """
    frozen = network.freeze(variables, (images.shape[1], images.shape[2]))

    def run(part):
        outputs = network.apply(frozen, part)[0]
        return jnp.stack([exit.logits for exit in (outputs, *outputs.branches)])

    parts, rest = divmod(len(images), CPU_CHUNK)
    if rest or parts < 2 or jax.default_backend() != "cpu":
        return run(images)
    logits = lax.map(run, images.reshape(parts, CPU_CHUNK, *images.shape[1:]))
    return logits.swapaxes(0, 1).reshape(logits.shape[1], len(images), -1)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The frozen teachers' networks, largest first; their variables travel apart."""

    networks: tuple[Network, ...] = ()

    @property
    def rows(self) -> list[tuple[Network, ...]]:
        """The networks, those together that differ in depth alone and stand side by side.

        One compiled body runs them, on the CPU: four ResNets compile in 0.5 of the time. Elsewhere
        a loop whose length is not known when it is compiled waits for the host at each turn.
        """
        rows: list[tuple[Network, ...]] = []
        for network in self.networks:
            if rows and jax.default_backend() == "cpu" and _alike(rows[-1][0], network):
                rows[-1] += (network,)
            else:
                rows.append((network,))
        return rows

    def prepare(self, variables: tuple[Variables, ...] | Prepared) -> Prepared:
        """What the networks make of their variables, see `Network.freeze`, to be computed once.

        Not in the step's own program: there XLA takes 1.6 times as long to compile four ResNets.

        Raises:
          ValueError: not as many variables as networks.
        """
        if isinstance(variables, Prepared):
            return variables
        if len(variables) != len(self.networks):
            raise ValueError(f"{len(self.networks)} teachers, but {len(variables)} variables")
        left = iter(variables)
        return Prepared(tuple(_prepare(row, [next(left) for _ in row]) for row in self.rows))

    def logits(
        self, variables: tuple[Variables, ...] | Prepared, images: Array, keep: Array | None
    ) -> Array:
        """(K, B, C) logits without gradient; a dropped teacher's are zeros and are not computed.

        Args:
          variables: of each network, or what `prepare` made of them.
          images: (B, H, W, channels), normalised.
          keep: (K,) booleans, the same on every device; None keeps all without asking.
        """
        classes = self.networks[0].classes if self.networks else 1
        empty = jnp.zeros((len(images), classes), jnp.promote_types(images.dtype, jnp.float32))
        logits, first = [empty[None][:0]], 0
        for networks, row in zip(self.rows, self.prepare(variables).rows, strict=True):
            kept = None if keep is None else keep[first : first + len(networks)]
            logits.append(_row_logits(networks, row, images, kept, empty))
            first += len(networks)
        return lax.stop_gradient(jnp.concatenate(logits))


def _alike(one: Network, other: Network) -> bool:
    same = dataclasses.replace(one, name=other.name, module=other.module) == other
    return same and alike_but_for_depth(one.module, other.module)


def _prepare(networks: tuple[Network, ...], variables: list[Variables]) -> Row:
    network = networks[0]
    if len(networks) == 1:
        return Row(network.freeze(variables[0]), {})
    pairs = zip(networks, variables, strict=True)
    own, shared = join([stack_blocks(one.module, given) for one, given in pairs])
    axes = {**dict.fromkeys((*own, FROZEN), 0), BLOCKS: None}
    frozen = jax.vmap(lambda own: network.freeze(own | shared), out_axes=axes)(own)
    return Row(frozen, {BLOCKS: frozen.pop(BLOCKS)})


def _row_logits(
    networks: tuple[Network, ...], row: Row, images: Array, keep: Array | None, empty: Array
) -> Array:
    """(K, B, C) logits of the networks of a row; `empty` of those that are not kept."""

    def logits(own, kept):
        def run():
            return exit_logits(networks[0], own | row.shared, images)[0]

        return run() if kept is None else lax.cond(kept, run, lambda: empty)

    if len(networks) == 1:
        return logits(row.own, None if keep is None else keep[0])[None]
    return lax.map(lambda each: logits(*each), (row.own, keep))
