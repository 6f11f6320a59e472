"""The same networks in PyTorch, for the peer; entries of their state dicts are named as ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Widths of the 3×3 convolutions, 0 for a 2×2 max pool; then hidden widths. CIFAR-10's.
PLAIN: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    2: ((16, 0, 16, 0), ()),
    4: ((16, 16, 0, 32, 32, 0), ()),
    6: ((16, 16, 0, 32, 32, 0, 64, 64, 0), ()),
    8: ((16, 16, 0, 32, 32, 0, 64, 64, 0, 128, 128, 0), (64,)),
    10: ((32, 32, 0, 64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0), (128,)),
}


class Plain(nn.Module):
    """A plain CNN on 32×32 images."""

    def __init__(self, depth: int, classes: int):
        super().__init__()
        widths, hidden = PLAIN[depth]
        layers: list[nn.Module] = []
        channels, size = 3, 32
        for width in widths:
            if not width:
                layers.append(nn.MaxPool2d(2))
                size //= 2
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.conv_layers = nn.Sequential(*layers)
        features, linear = channels * size * size, []
        for width in hidden:
            linear += [nn.Linear(features, width), nn.ReLU()]
            features = width
        self.fc_layers = nn.Sequential(*linear, nn.Linear(features, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_layers(self.conv_layers(x).flatten(1))


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """A ResNet on 32×32 images: `blocks` basic blocks in each stage."""

    def __init__(self, widths: tuple[int, ...], blocks: int, classes: int):
        super().__init__()
        self.widths = widths
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for i, width in enumerate(widths):
            rest = [Block(width, width, 1) for _ in range(blocks - 1)]
            first = Block(inputs, width, 2 if i else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
            inputs = width
        self.fc = nn.Linear(inputs, classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The feature map at the end of each stage."""
        x, ends = torch.relu(self.bn1(self.conv1(x))), []
        for i in range(len(self.widths)):
            x = getattr(self, f"layer{i + 1}")(x)
            ends.append(x)
        return ends

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(x)[-1].mean((2, 3)))


def _block(inputs: int, width: int, *before: nn.Module) -> nn.Sequential:
    conv = nn.Conv2d(inputs, width, 1, bias=False)
    return nn.Sequential(*before, conv, nn.BatchNorm2d(width), nn.ReLU())


def _branch(width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, stride, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class Evolving(ResNet):
    """TESKD's branches on a ResNet; resized before the 1×1 convolution, as its authors do."""

    def __init__(self, widths: tuple[int, ...], blocks: int, classes: int):
        super().__init__(widths, blocks, classes)
        width, last = widths[-1], len(widths)
        self.laterals = nn.ModuleList(_block(inputs, width) for inputs in self.widths)
        self.upsample = nn.ModuleList(
            _block(width, width, nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
            for _ in range(last - 1)
        )
        for b in range(1, last):
            setattr(self, f"fuse_{b}", _block(2 * width, width))
            setattr(self, f"downsample{b}", _branch(width, 2 ** (last - b)))
            setattr(self, f"fc_b{b}", nn.Linear(width, classes))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and features, the backbone's first, then of each branch, deepest first."""
        stages = self.stages(x)
        features = [stages[-1].mean((2, 3))]
        logits = [self.fc(features[0])]
        down = self.laterals[-1](stages[-1])
        for b in range(len(stages) - 1, 0, -1):
            up = self.upsample[b - 1](down)
            down = getattr(self, f"fuse_{b}")(
                torch.cat([up + self.laterals[b - 1](stages[b - 1]), up], 1)
            )
            features.append(getattr(self, f"downsample{b}")(down).mean((2, 3)))
            logits.append(getattr(self, f"fc_b{b}")(features[-1]))
        return logits, features


def build(name: str, classes: int) -> nn.Module:
    """The network called `name`: planeD, resnetD, cifar_resnet18, or evolving: with one of these.

    Raises:
      ValueError: there is none of that name.
    """
    evolving, backbone = name.startswith("evolving:"), name.removeprefix("evolving:")
    if backbone.startswith("plane") and not evolving:
        return Plain(int(backbone.removeprefix("plane")), classes)
    family = Evolving if evolving else ResNet
    if backbone == "cifar_resnet18":
        return family((64, 128, 256, 512), 2, classes)
    if backbone.startswith("resnet"):
        return family((16, 32, 64), (int(backbone.removeprefix("resnet")) - 2) // 6, classes)
    raise ValueError(f"the peer has no {name}")
