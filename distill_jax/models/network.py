"""A network as pure functions: what every kind of network offers, and the built-in kind."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax import identity, traced
from distill_jax.models.backend import backend
from distill_jax.models.basics import FROZEN, Mode, Outputs, Variables
from distill_jax.models.branched import backbone_name, split_name
from distill_jax.models.zoo.branches import Branched
from distill_jax.models.zoo.stages import BLOCKS, BOUNDS, draw_stages, stack_blocks

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
_NOT_STATE = ("params", FROZEN, BLOCKS, BOUNDS)  # what `freeze` makes is no state of a network


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as pure functions; hashable, holds no arrays.

    This class runs the built-in networks, modules called with (images, `Mode`). A subclass for
    networks of another kind defines `init`, `apply`, `head` and `freeze`.

    Args:
      name: what it is called.
      module: its linen module; None where there is none.
      classes: C.
      image_shape: (H, W, channels) of its images; () of a network that sees others than images.
      dtype: of the computation, one of `DTYPES`. Variables are float32; in float64, which asks for
        `jax.enable_x64(True)`, they are that.
      version: under which it was registered; None of a network that comes with the library.
    """

    name: str
    module: nn.Module | None
    classes: int
    image_shape: tuple[int, ...]
    dtype: str = "float32"
    version: str | None = None

    @property
    def backbone(self) -> Network:
        """The network that stays when the branches of one go; any other is its own."""
        if not isinstance(self.module, Branched):
            return self
        name = backbone_name(self.name)
        return dataclasses.replace(self, name=name, module=self.module.backbone)

    @property
    def inputs(self) -> Any:
        """The shapes and types of a batch of one, as it takes it."""
        return jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)

    @property
    def branches(self) -> int:
        """The number of its branches."""
        return 0 if self.backbone is self else len(self.output_shapes.branches)

    @property
    def method(self) -> str | None:
        """The name of the method that trains its branches; None where it has none."""
        kind = split_name(self.name).kind
        return kind.method if kind and isinstance(self.module, Branched) else None

    @property
    def shapes(self) -> Variables:
        """The shapes and types of what `init` gives, without computing any of it."""
        return _shapes(self)

    @property
    def output_shapes(self) -> Outputs:
        """The shapes and types of its outputs for a batch of one."""
        return _output_shapes(self)

    @property
    def identity(self) -> Any:
        """All that the network is, as a JSON value: equal for equal networks in every process.

        A built-in network is its name and dtype. A registered one is also its version, the shapes
        of its variables and the text of its code, see `distill_jax.identity.describe`.
        """
        if self.version is None:
            return [self.name, self.dtype]
        shapes = {path: f"{leaf.dtype} {leaf.shape}" for path, leaf in identity.leaves(self.shapes)}
        return {
            "name": self.name,
            "version": self.version,
            "shapes": shapes,
            "repr": self._describe(),
        }

    def _describe(self) -> str:
        return identity.describe([self.module, self.dtype])

    def init(self, key: Array) -> Variables:
        """Draws fresh {"params": ..., other collections} in one compiled call."""
        if isinstance(key, jax.core.Tracer):  # part of a larger program, or asked for its shapes
            return self._draw(key)
        return _compiled_draw(self, backend())(key)

    def _draw(self, key: Array) -> Variables:
        images = jnp.zeros((1, *self.image_shape))
        wide = jnp.promote_types(self._type, jnp.float32)
        drawn = draw_stages(
            self._linen,
            key,
            lambda module, key: dict(module.init(key, images, Mode(train=True))),
        )
        return jax.tree.map(lambda leaf: leaf.astype(wide), drawn)

    def freeze(self, variables: Variables, size: tuple[int, int] | None = None) -> Variables:
        """Makes of `variables` what running the network untrained makes of them, for `apply`.

        BatchNorms are folded into the convolutions, kernels brought into the form in which they are
        fastest, equal blocks stacked. Where it is run often, do this once, before.

        Args:
          variables: of this network; what was made of such comes back as it is.
          size: of the images, where it is not that of `image_shape`.
        """
        if FROZEN in variables:
            return variables
        if BLOCKS not in variables:
            variables = stack_blocks(cast(nn.Module, self.backbone.module), variables)
        mode = Mode(dtype=self._type, freezing=True)
        nothing = jnp.zeros((1, *(size or self.image_shape[:2]), self.image_shape[2]), mode.dtype)
        made = self._linen.apply(variables, nothing, mode, mutable=(FROZEN, BLOCKS))[1]
        return {**variables, FROZEN: {}, **made}

    def apply(
        self,
        variables: Variables,
        inputs: Any,
        *,
        train: bool = False,
        rngs: Array | None = None,
        axis_name: str | None = None,
    ) -> tuple[Outputs, Variables]:
        """Runs the network.

        Args:
          variables: {"params": ..., other collections}, or what `freeze` made of them.
          inputs: (B, H, W, channels), normalised.
          train: normalise by the batch and update the running statistics; else by these.
          rngs: the step's key, equal on all devices; the built-in networks draw nothing.
          axis_name: the devices' axis over which the batch's statistics are shared.

        Returns:
          Its outputs, and every collection but the parameters after it.
        """
        mode = Mode(train, axis_name, self._type)
        state = {name: tree for name, tree in variables.items() if name not in _NOT_STATE}
        if not train:
            frozen = self.freeze(variables, (inputs.shape[1], inputs.shape[2]))
            return cast(Outputs, self._linen.apply(frozen, inputs, mode)), state
        outputs, updated = self._linen.apply(variables, inputs, mode, mutable=list(state))
        return cast(Outputs, outputs), {**state, **updated}

    def head(self, variables: Variables, feature: Array) -> Array:
        """Classifies features: the layers that follow `Outputs.feature`, (B, F) -> (B, C).

        Raises:
          ValueError: the network shows no head, or features are not as wide as it takes them.
        """
        show = getattr(self.module, "head", None)
        if show is None:
            raise ValueError(f"{self.name} shows no head: its module has no method `head`")
        head = show()
        width = variables["params"][head.names[0]]["kernel"].shape[0]
        if feature.ndim != 2 or feature.shape[1] != width:
            raise ValueError(
                f"the head of {self.name} takes features of shape (B, {width}), got {feature.shape}"
            )
        mode = Mode(dtype=self._type)
        return head.apply({"params": variables["params"]}, feature, mode)

    @property
    def _type(self) -> Any:
        """Of the computation; ValueError where JAX would take another for it."""
        if self.dtype == "float64" and jnp.result_type(float) != jnp.float64:
            raise ValueError(
                f"{self.name} is to compute in float64 and JAX's 64-bit types are off: expected "
                "the call within jax.enable_x64(True)"
            )
        return DTYPES[self.dtype]

    @property
    def _linen(self) -> nn.Module:
        if self.module is None:
            raise ValueError(f"{self.name} has no module: its class has to say how it is run")
        return self.module


def deploy(network: Network, variables: Variables) -> Variables:
    """The variables of `network.backbone` alone, from those of one with branches.

    Its logits are those of the whole. Any other network's variables come back as they are.
    """
    if network.backbone is network:
        return variables
    return {
        collection: {name: variables[collection][name] for name in modules}
        for collection, modules in network.backbone.shapes.items()
    }


def count_parameters(network: Network) -> int:
    """The number of trainable parameters, without building any of them."""
    return sum(leaf.size for leaf in jax.tree.leaves(network.shapes["params"]))


@functools.lru_cache(maxsize=128)
def count_flops(network: Network) -> float:
    """The FLOPs of a forward pass of one example, by tracing it; nothing is compiled.

    Where JAX does not count, two for each parameter.
    """

    def forward(variables, inputs):
        # As it is trained: what runs it untrained may be loops, which are counted once.
        return network.apply(variables, inputs, train=True, rngs=jax.random.key(0))[0]

    try:
        with jax.default_device(jax.devices("cpu")[0]):  # other backends count what is compiled
            counted = jax.jit(forward).lower(network.shapes, network.inputs).cost_analysis() or {}
    except Exception:  # whatever is raised where there is none, or it does not count
        counted = {}
    return counted.get("flops") or 2.0 * count_parameters(network)


@functools.lru_cache(maxsize=128)
def _shapes(network: Network) -> Variables:
    key = jax.eval_shape(lambda: jax.random.key(0))  # a key itself would be compiled
    return traced.Program(network.init, ("shapes", network)).shapes(key)


@functools.lru_cache(maxsize=128)
def _output_shapes(network: Network) -> Outputs:
    applied = traced.Program(network.apply, ("output shapes", network))
    return applied.shapes(network.shapes, network.inputs)[0]


@functools.lru_cache(maxsize=128)
def _compiled_draw(network: Network, platform: str) -> traced.Program:
    key = ("draw", network, platform)
    return traced.Program(network._draw, key, compiler_options=run_once(platform))


def run_once(backend: str) -> dict[str, Any] | None:
    """Options to compile what runs once: unoptimised on a CPU, which takes less time."""
    return {"xla_backend_optimization_level": 0} if backend == "cpu" else None
