"""The frozen teachers of a stage: their outputs, few images at a time where that is faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax.models import Network, Outputs, Variables
from distill_jax.models.backend import backend
from distill_jax.models.basics import FROZEN
from distill_jax.models.kernels.cpu_conv import CPU_CHUNK
from distill_jax.models.zoo.stages import BLOCKS, alike_but_for_depth, join, stack_blocks

# What a method can need of teachers besides outputs: that they can be run on other inputs, or their
# classifiers. Both ask for the variables at every step.
APPLY, HEAD = "apply", "head"


class Group(NamedTuple):
    """The frozen variables of networks that share one compiled body.

    Args:
      own: of each network; of several with a leading axis.
      shared: the blocks of all of them in a row; none of a network that is alone.
    """

    own: Variables
    shared: Variables


class FrozenVariables(NamedTuple):
    """What frozen networks made of their variables, group by group."""

    groups: tuple[Group, ...]


class TeacherOutputs(NamedTuple):
    """Outputs of K teachers on a batch (B), or cached on a split (N in the place of B).

    Args:
      logits: (K, B, C); cached (N, K, C), so that one gather serves all.
      features: for each teacher what the methods need besides, by the field of `Outputs`.
    """

    logits: Any
    features: tuple[dict[str, Any], ...] = ()

    def each(self) -> tuple[Outputs, ...]:
        """The teachers' outputs one by one; what nobody needs is None or ()."""
        missing = {"feature": None, "stages": ()}
        features = self.features or ({},) * len(self.logits)
        return tuple(
            Outputs(logits, **{**missing, **others})  # type: ignore[arg-type]
            for logits, others in zip(self.logits, features, strict=True)
        )


def frozen_forward(
    network: Network, variables: Variables, inputs: Any, select: Callable[[Outputs], Any]
) -> Any:
    """What `select` picks of a frozen network's outputs, arrays with a leading axis of examples.

    On the CPU some images at a time, so that what is between two layers stays in the cache.

    Args:
      network: the network.
      variables: its variables, or what `Network.freeze` made of them.
      inputs: (B, H, W, channels), normalised, or what else the network takes.
      select: picks arrays (B, ...).
    """
    if not network.image_shape:
        return select(network.apply(network.freeze(variables), inputs)[0])
    images, frozen = inputs, network.freeze(variables, (inputs.shape[1], inputs.shape[2]))

    def run(part):
        return select(network.apply(frozen, part)[0])

    parts, rest = divmod(len(images), CPU_CHUNK)
    if rest or parts < 2 or backend() != "cpu":
        return run(images)
    outputs = lax.map(run, images.reshape(parts, CPU_CHUNK, *images.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(len(images), *x.shape[2:]), outputs)


@dataclasses.dataclass(frozen=True)
class FrozenTeachers:
    """The frozen teachers' networks, largest first; their variables travel apart.

    Args:
      networks: the K networks.
      needs: the outputs that the methods need of them, besides the logits.
    """

    networks: tuple[Network, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def groups(self) -> list[tuple[Network, ...]]:
        """The networks, those together that differ in depth alone and stand side by side.

        One compiled body runs them on the CPU. Elsewhere a loop whose length is not known when it
        is compiled waits for the host at each turn.
        """
        groups: list[tuple[Network, ...]] = []
        for network in self.networks:
            if groups and backend() == "cpu" and _alike(groups[-1][0], network):
                groups[-1] += (network,)
            else:
                groups.append((network,))
        return groups

    def freeze(self, variables: tuple[Variables, ...] | FrozenVariables) -> FrozenVariables:
        """What the networks make of their variables, see `Network.freeze`, to be computed once.

        Not in the step's own program, where XLA takes longer to compile it.

        Raises:
          ValueError: not as many variables as networks.
        """
        if isinstance(variables, FrozenVariables):
            return variables
        if len(variables) != len(self.networks):
            raise ValueError(f"{len(self.networks)} teachers, but {len(variables)} variables")
        left = iter(variables)
        return FrozenVariables(tuple(_freeze(g, [next(left) for _ in g]) for g in self.groups))

    def variables_of(self, k: int, variables: tuple[Variables, ...] | FrozenVariables) -> Variables:
        """The frozen variables of teacher `k` alone."""
        for networks, group in zip(self.groups, self.freeze(variables).groups, strict=True):
            if k < len(networks):
                if len(networks) == 1:
                    return group.own
                return jax.tree.map(lambda leaf, k=k: leaf[k], group.own) | group.shared
            k -= len(networks)
        raise IndexError(k)

    def outputs(
        self,
        variables: tuple[Variables, ...] | FrozenVariables,
        inputs: Any,
        mask: Array | None,
    ) -> TeacherOutputs:
        """Their outputs without gradient; a dropped teacher's are zeros and are not computed.

        Args:
          variables: of each network, or what `freeze` made of them.
          inputs: as the networks take them, (B, ...).
          mask: (K,) booleans, the same on every device; None keeps all without asking.
        """
        each: list[dict[str, Any]] = []
        for networks, group in zip(self.groups, self.freeze(variables).groups, strict=True):
            kept = None if mask is None else mask[len(each) : len(each) + len(networks)]
            each.extend(_group_outputs(networks, group, inputs, kept, self.needs))
        if not each:
            examples = len(jax.tree.leaves(inputs)[0])
            return TeacherOutputs(jnp.zeros((0, examples, 1), jnp.float32))
        logits = jnp.stack([outputs.pop("logits") for outputs in each])
        return lax.stop_gradient(TeacherOutputs(logits, tuple(each)))


def _alike(one: Network, other: Network) -> bool:
    if one.module is None or other.module is None:
        return False
    same = dataclasses.replace(one, name=other.name, module=other.module) == other
    return same and alike_but_for_depth(one.module, other.module)


def _freeze(networks: tuple[Network, ...], variables: list[Variables]) -> Group:
    network = networks[0]
    if len(networks) == 1:
        return Group(network.freeze(variables[0]), {})
    pairs = zip(networks, variables, strict=True)
    own, shared = join([stack_blocks(one.module, given) for one, given in pairs])  # type: ignore[arg-type]
    axes = {**dict.fromkeys((*own, FROZEN), 0), BLOCKS: None}
    frozen = jax.vmap(lambda own: network.freeze(own | shared), out_axes=axes)(own)
    return Group(frozen, {BLOCKS: frozen.pop(BLOCKS)})


def _group_outputs(
    networks: tuple[Network, ...],
    group: Group,
    inputs: Any,
    mask: Array | None,
    needs: tuple[str, ...],
) -> list[dict[str, Any]]:
    """What is needed of each network of a group; zeros of those that are not kept."""

    def outputs(own, kept):
        def run():
            return frozen_forward(
                networks[0],
                own | group.shared,
                inputs,
                lambda each: {name: getattr(each, name) for name in ("logits", *needs)},
            )

        if kept is None:
            return run()
        # Built in the branch: zeros that come from without are copied at every step.
        shapes = jax.eval_shape(run)
        return lax.cond(
            kept, run, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        )

    if len(networks) == 1:
        return [outputs(group.own, None if mask is None else mask[0])]
    stacked = lax.map(lambda each: outputs(*each), (group.own, mask))
    return [jax.tree.map(lambda x, k=k: x[k], stacked) for k in range(len(networks))]
