"""Networks with branches on their stages, which are thrown away after training.

Variables hold the backbone's names at top level and the branches' beside them.
"""

from __future__ import annotations

from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs
from distill_jax.models.kernels.pools import global_average_pool
from distill_jax.models.zoo.heads import Head, one_layer
from distill_jax.models.zoo.layers import Conv, conv_norm, he_fan_out


class Branched(nn.Module):
    """A backbone with branches: its outputs are the backbone's and `Outputs.branches`."""

    backbone: nn.Module
    classes: int

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)  # the backbone's names at top level

    @nn.nowrap
    def head(self) -> Head:
        """The backbone's: it takes this network's feature only where that is the backbone's."""
        return self.backbone.head()


def with_feature_of_last_stage(outputs: Outputs) -> Outputs:
    """The outputs with a feature as wide as the last stage, where needed that stage's average."""
    if outputs.feature.shape[-1] == outputs.stages[-1].shape[-1]:
        return outputs
    return outputs._replace(feature=global_average_pool(outputs.stages[-1]))


class Upper(nn.Module):
    """The last stage of a network and what follows it, with weights of its own."""

    network: nn.Module

    def setup(self) -> None:
        nn.share_scope(self, self.network)

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Outputs:
        """The map at the end of the last stage but one -> what the network shows above it."""
        return self.network.upper(x, mode)


class Peers(Branched):
    """A backbone whose last stage and classifier are there several times, over shared stages.

    Each branch is an `Upper` of its own: peer1, peer2, ... The backbone needs a method `upper`.
    """

    peers: int = 2  # beside the backbone's own

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        outputs = self.backbone(images, mode)
        shared, branches = outputs.stages[-2], []
        for i in range(1, self.peers + 1):
            network = self.backbone.clone(parent=None, name=None)
            branches.append(Upper(network, name=f"peer{i}")(shared, mode))
        return outputs._replace(branches=tuple(branches))


class Exit(nn.Module):
    """A classifier on a stage: a 3×3 convolution with BatchNorm and ReLU for each stage above it.

    These have the widths of the stages, and strides that bring the map to their sizes.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Outputs:
        for i, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True), 1):
            conv = Conv(width, 3, stride, use_bias=False, kernel_init=he_fan_out, name=f"conv{i}")
            x = nn.relu(conv_norm(x, mode, conv, f"bn{i}"))
        feature = global_average_pool(x)
        return Outputs(one_layer("fc", self.classes).run(feature, mode), feature, (x,))


class Exits(Branched):
    """A backbone with a classifier on each stage but the last: exit1 on the first, exit2, ...

    The backbone's feature is its own where that is as wide as the last stage, which the exits'
    are, else the average of that stage.
    """

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        outputs = self.backbone(images, mode)
        stages, branches = outputs.stages, []
        pairs = zip(stages, stages[1:], strict=False)
        strides = tuple(max(1, round(x.shape[1] / above.shape[1])) for x, above in pairs)
        widths = tuple(x.shape[-1] for x in stages[1:])
        for b in range(len(stages) - 1, 0, -1):  # deepest first
            branch = Exit(widths[b - 1 :], strides[b - 1 :], self.classes, name=f"exit{b}")
            branches.append(branch(stages[b - 1], mode))
        return with_feature_of_last_stage(outputs)._replace(branches=tuple(branches))
