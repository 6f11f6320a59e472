"""The classifier: the linear layers between a network's feature and its logits."""

from __future__ import annotations

from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode
from distill_jax.models.zoo.layers import Linear, torch_uniform


class Head(nn.Module):
    """Linear layers in a row, a ReLU between two of them.

    A network calls `run` inside its own `__call__`, so the layers are the network's and bear their
    state-dict names at its top level. Applied by itself to the network's variables, a head gives
    the logits of any feature.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    kernel_init: nn.initializers.Initializer = torch_uniform
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, feature: Array, mode: Mode) -> Array:
        """(B, F) -> (B, C)."""
        return self.run(feature, mode)

    @nn.nowrap
    def run(self, feature: Array, mode: Mode) -> Array:
        """Calls the layers as submodules of whichever module is being called."""
        y: Array = feature
        for index, (name, width) in enumerate(zip(self.names, self.widths, strict=True)):
            y = nn.relu(y) if index else y
            linear = Linear(
                width, kernel_init=self.kernel_init, bias_init=self.bias_init, name=name
            )
            y = linear(y, mode)
        return y


def one_layer(
    name: str, classes: int, bias_init: nn.initializers.Initializer | None = None
) -> Head:
    """The head of most networks, a single linear layer."""
    return Head((name,), (classes,), bias_init=bias_init, parent=None)
