"""Stages of residual blocks, and what follows from the blocks of a stage being alike.

Outside training a stage's blocks after its first are one loop on a CPU, so that they are compiled
once; and networks that differ in the numbers of their blocks alone are one body, run for each in
turn. Elsewhere a loop would cut every block's weights out of the stack anew, and compile no faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from distill_jax.models.backend import backend
from distill_jax.models.basics import FROZEN, Mode, Variables

BLOCKS = "blocks"  # the collection of the variables of equal blocks, stacked; one entry a loop
BOUNDS = "bounds"  # that of the first and after the last block that is a network's own


class Block(Protocol):
    """What makes a residual block: its width, its stride and its name.

    Called with (x, mode), a block gives its output and one map before a ReLU, shaped as its output
    where its input is: that of the output, or of its input.
    """

    def __call__(
        self, features: int, stride: int, *, name: str | None = None, parent: Any = None
    ) -> nn.Module: ...


class Stages(NamedTuple):
    """What stages of residual blocks give.

    Args:
      ends: the output of each stage.
      first_preacts: the map before a ReLU that the first block of each stage gives.
      last_preacts: that of the last block.
    """

    ends: tuple[Array, ...]
    first_preacts: tuple[Array, ...]
    last_preacts: tuple[Array, ...]


class Staged(nn.Module):
    """A network of stages of residual blocks, `blocks` of them in each.

    Its blocks consist of the layers of `layers`.
    """

    blocks: tuple[int, ...]

    @staticmethod
    def block_name(stage: int, index: int) -> str:
        """What a block is called; stages count from 1, blocks from 0."""
        return f"layer{stage}.{index}"

    @nn.nowrap
    def equal_blocks(self, stage: int) -> list[str]:
        """The names of the blocks of a stage that are alike: all but its first."""
        return [self.block_name(stage, index) for index in range(1, self.blocks[stage - 1])]

    @nn.nowrap
    def run_stages(
        self,
        x: Array,
        mode: Mode,
        block: Block,
        widths: Sequence[int],
        strides: Sequence[int] | None = None,
        start: int = 1,
    ) -> Stages:
        """Runs the stages; every one but the first halves the map, or as `strides` have it.

        To be called from the compact method. Outside training equal blocks are one loop on a CPU,
        where they are stacked: it compiles faster and runs no slower.

        Args:
          x: what the first of these stages takes.
          mode: how the network is run.
          block: makes a block.
          widths: of the stages.
          strides: of the first block of each.
          start: the number of the first of them, where others went before.
        """
        strides = strides or tuple(1 if start + i == 1 else 2 for i in range(len(widths)))
        ends, first_preacts, last_preacts = [], [], []
        for stage, (width, stride) in enumerate(zip(widths, strides, strict=True), start):
            first = block(width, stride, name=self.block_name(stage, 0))
            x, preact = first(x, mode)
            first_preacts.append(preact)
            names = self.equal_blocks(stage)
            if not names or not self.has_variable(BLOCKS, names[0]):
                for name in names:
                    x, preact = block(width, 1, name=name)(x, mode)
            else:
                x, preact = _loop(self, names[0], block(width, 1, parent=None), x, mode)
            ends.append(x)
            last_preacts.append(preact)
        return Stages(tuple(ends), tuple(first_preacts), tuple(last_preacts))


def _loop(
    module: nn.Module, name: str, block: nn.Module, x: Array, mode: Mode
) -> tuple[Array, Array]:
    """Equal blocks in a row, by their variables stacked; gives what the last of them gives."""
    blocks: Variables = module.get_variable(BLOCKS, name)
    if mode.freezing:
        made = jax.vmap(lambda own: block.apply(own, x, mode, mutable=(FROZEN,))[1])(blocks)
        module.put_variable(BLOCKS, name, made)
        return x, x
    first, last = 0, len(jax.tree.leaves(blocks)[0])
    if module.has_variable(BOUNDS, name):
        first, last = module.get_variable(BOUNDS, name)

    def run(i, carry):
        x, _ = carry  # XLA drops the second where nobody asks for the last block's
        own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), blocks)
        return block.apply(own, x, mode)

    return lax.fori_loop(first, last, run, (x, x))


def _loops_blocks() -> bool:
    """Whether equal blocks are run as a loop outside training."""
    return backend() == "cpu"


def _loops(module: nn.Module) -> list[list[str]]:
    """The names of equal blocks, those of a stage together."""
    if not isinstance(module, Staged):
        return []
    stages = range(1, len(module.blocks) + 1)
    return [names for names in map(module.equal_blocks, stages) if names]


def stack_blocks(module: nn.Module, variables: Variables) -> Variables:
    """`variables` with equal blocks stacked, where they are run as a loop."""
    loops = _loops(module) if _loops_blocks() else []
    stacked = {
        names[0]: {
            kind: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[name] for name in names))
            for kind, tree in variables.items()
        }
        for names in loops
    }
    looped = {name for names in loops for name in names}
    others = {
        kind: {name: own for name, own in tree.items() if name not in looped}
        for kind, tree in variables.items()
    }
    return {**others, BLOCKS: stacked}


def draw_stages(
    module: nn.Module, key: Array, draw: Callable[[nn.Module, Array], Variables]
) -> Variables:
    """What `draw` draws of `module`, equal blocks at once: compiling a hundred takes seconds."""
    loops = _loops(module)
    if not isinstance(module, Staged) or not loops:
        return draw(module, key)
    keys = jax.random.split(jax.random.fold_in(key, 1), max(map(len, loops)))
    one, two = (module.clone(blocks=tuple(min(n, c) for c in module.blocks)) for n in (1, 2))
    variables, equal = draw(one, key), jax.vmap(functools.partial(draw, two))(keys)
    places = {name: (names[0], i) for names in loops for i, name in enumerate(names)}
    return {
        kind: tree
        | {
            name: jax.tree.map(lambda leaf, i=i: leaf[i], equal[kind][first])
            for name, (first, i) in places.items()
        }
        for kind, tree in variables.items()
    }


def alike_but_for_depth(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks differ in their `blocks` alone, and have loops in the same stages."""
    if not isinstance(one, Staged) or not isinstance(other, Staged):
        return False
    loops = [[names[0] for names in _loops(module)] for module in (one, other)]
    return loops[0] == loops[1] and one.clone(blocks=other.blocks) == other


def join(each: Sequence[Variables]) -> tuple[Variables, Variables]:
    """Variables, with stacked blocks, of networks that are `alike_but_for_depth`, for one body.

    Returns:
      (own, shared): `own` has a leading axis of networks, and what belongs to one of them is its
      slice of `own` and all that is `shared`, the blocks of all in a row.
    """
    loops = [variables[BLOCKS] for variables in each]
    counts = {name: [len(jax.tree.leaves(loop[name])[0]) for loop in loops] for name in loops[0]}
    ends = {name: np.cumsum([0, *lengths], dtype=np.int32) for name, lengths in counts.items()}
    alone = [{k: tree for k, tree in variables.items() if k != BLOCKS} for variables in each]
    own = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    own[BOUNDS] = {
        name: (jnp.asarray(end[:-1]), jnp.asarray(end[1:])) for name, end in ends.items()
    }
    return own, {BLOCKS: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *loops)}
