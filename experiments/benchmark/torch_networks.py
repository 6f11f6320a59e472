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
    """A CIFAR ResNet of 6n+2 layers."""

    widths = (16, 32, 64)

    def __init__(self, depth: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.fc = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, width: int, stride: int, blocks: int) -> nn.Sequential:
        rest = [Block(width, width, 1) for _ in range(blocks - 1)]
        return nn.Sequential(Block(inputs, width, stride), *rest)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The feature map at the end of each stage."""
        first = self.layer1(torch.relu(self.bn1(self.conv1(x))))
        second = self.layer2(first)
        return [first, second, self.layer3(second)]

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
    """TESKD's branches on a CIFAR ResNet; resized before the 1×1 convolution, as its authors do."""

    def __init__(self, depth: int, classes: int):
        super().__init__(depth, classes)
        width, last = self.widths[-1], len(self.widths)
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
    """The network called `name`: planeD, resnetD or evolving:resnetD."""
    for prefix, family in (("plane", Plain), ("evolving:resnet", Evolving), ("resnet", ResNet)):
        if name.startswith(prefix):
            return family(int(name.removeprefix(prefix)), classes)
    raise ValueError(f"the peer has no {name}")
