"""What is measured: variants of a training step, and the weights and images they all start from.

NumPy alone, so that a worker of one framework does not load the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from experiments import golden

CLASSES = 10
IMAGE_SHAPE = (32, 32, 3)
EXAMPLES = 8  # batches of resident images
# The published DGKD recipe, but for λ: at the code's λ = 1 the labels would not be used at all.
TEMPERATURE, KD_WEIGHT = 5.0, 0.5
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)

Row = tuple[tuple[str, ...], str]  # frozen teachers, largest first, and the student
CHAINS: dict[str, Row] = {
    "plain": (("plane10", "plane8", "plane6", "plane4"), "plane2"),
    "resnet": (("resnet110", "resnet56", "resnet32", "resnet20"), "resnet8"),
    "teskd": ((), "evolving:resnet20"),
}
SMOKE: dict[str, Row] = {
    "plain": (("plane6", "plane4"), "plane2"),
    "resnet": (("resnet14",), "resnet8"),
    "teskd": ((), "evolving:resnet8"),
}


class Unavailable(Exception):
    """A variant that cannot be measured here; its message says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A variant of a training step, as a worker is told of it.

    Args:
      framework: "jax", "torch", or "matmul" for the machine's matrix peak.
      variant: which way; see `jax_steps` and `torch_steps`.
      student: the network that is trained, or the size of the matrices.
      teachers: frozen networks, largest first.
      batch: examples of a step, over all devices.
      dtype: "float32" or "bfloat16", of the computation.
      devices: of JAX; on the CPU as many are forced.
      parallel: "jit" or "pmap", of several devices.
      examples: resident images, of which a step takes `batch`; 0 takes eight batches.
      members: students trained at once.
    """

    framework: str
    variant: str
    student: str
    teachers: tuple[str, ...] = ()
    batch: int = 128
    dtype: str = "float32"
    devices: int = 1
    examples: int = 0
    members: int = 1
    parallel: str = "jit"

    @property
    def resident(self) -> int:
        """How many images are resident."""
        return self.examples or EXAMPLES * self.batch

    @property
    def drops(self) -> bool:
        """Whether a teacher is dropped for each mini-batch."""
        return self.variant == "dropping"

    @property
    def problem(self) -> tuple[Any, ...]:
        """What decides the losses, whoever computes them."""
        return self.student, self.teachers, self.batch, self.members, self.drops

    @property
    def work(self) -> tuple[Any, ...]:
        """What decides how many operations a step needs, whoever computes it."""
        return self.problem, self.variant == "table"


def state_dict(entries: list[tuple[str, tuple[int, ...]]], seed: int) -> dict[str, np.ndarray]:
    """Weights of every entry (PyTorch's names and layouts), the same in every framework.

    The second BatchNorm of a residual block is scaled down: at full scale the outputs double in
    variance with every block, and those of 110 layers leave no softmax to compare.
    """
    drawn = golden.state_dict([[key, shape] for key, shape in entries], seed)
    return {k: v * np.float32(0.2) if k.endswith("bn2.weight") else v for k, v in drawn.items()}


def seeds(case: Case) -> tuple[int, ...]:
    """The seed of the student's weights, then of each teacher's."""
    return tuple(range(1 + len(case.teachers)))


def images(n: int) -> np.ndarray:
    """(n, 32, 32, 3) uint8, smooth noise; at most 2048 different ones, repeated."""
    float_images = golden.images(min(n, 2048), 0)
    drawn = np.clip(128 + 64 * float_images, 0, 255).astype(np.uint8)
    return drawn[np.arange(n) % len(drawn)]


def labels(n: int) -> np.ndarray:
    """(n,) int32 in [0, 10)."""
    return golden.labels(min(n, 2048), 0, CLASSES)[np.arange(n) % 2048]


def order(case: Case, steps: int) -> np.ndarray:
    """(steps, batch) int32: the examples of each step, in turn."""
    rows = np.arange(steps * case.batch, dtype=np.int32) % case.resident
    return rows.reshape(steps, case.batch)
