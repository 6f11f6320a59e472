"""Optimizers and learning-rate schedules from plain values, on optax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax import Array

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "piecewise", "cosine", "takd_code")
Schedule = Callable[[Array | int], Array]


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """How parameters are updated.

    Args:
      optimizer: "sgd" (PyTorch's: decay added to the gradient, then momentum) or "adamw".
      learning_rate: the schedule's largest value.
      momentum: SGD's momentum.
      nesterov: SGD looks ahead by its momentum.
      weight_decay: on every parameter, BatchNorm's included, as the papers' codes have it.
      schedule: "constant"; "piecewise": times `decay` at each of `milestones`; "cosine" to zero;
        "takd_code": what TAKD's code does to ResNets, a tenth for three quarters of the run and a
        hundredth after (its test compares the epoch with half of itself, so that the full rate
        never occurs).
      milestones: for "piecewise", increasing fractions of the run, in (0, 1).
      decay: for "piecewise", the factor at each milestone.
      warmup_epochs: linear warm-up from zero, before the schedule takes over where it then is.

    Raises:
      ValueError: a value that is none of these, naming it.
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: str = "constant"
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is one of {OPTIMIZERS}, got {self.optimizer!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is one of {SCHEDULES}, got {self.schedule!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is a number above 0, got {self.learning_rate}")
        for name, value, below in (
            ("momentum", self.momentum, 1.0),
            ("weight_decay", self.weight_decay, math.inf),
            ("warmup_epochs", self.warmup_epochs, math.inf),
        ):
            if not 0 <= value < below:
                raise ValueError(f"{name} is at least 0 and below {below}, got {value}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is above 0 and at most 1, got {self.decay}")
        bounds = (0.0, *self.milestones, 1.0)
        numbers = all(isinstance(bound, (int, float)) for bound in bounds)
        if not (numbers and all(a < b for a, b in zip(bounds, bounds[1:], strict=False))):
            raise ValueError(
                f"milestones are increasing fractions of the run in (0, 1), got {self.milestones}"
            )


def schedule(options: OptimOptions, epochs: int, steps_per_epoch: int) -> Schedule:
    """The learning rate as a function of the step, counted from 0."""
    rate, steps = options.learning_rate, epochs * steps_per_epoch

    def boundary(fraction: float) -> int:
        # The first whole epoch at or after the fraction. Rounded first: 0.1 * 30 is above 3.
        return math.ceil(round(fraction * epochs, 9)) * steps_per_epoch

    if options.schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, steps)
    elif options.schedule == "piecewise":
        scales: dict[int, float] = {}
        for at in map(boundary, options.milestones):  # two may fall on one epoch
            scales[at] = scales.get(at, 1.0) * options.decay
        main = optax.piecewise_constant_schedule(rate, scales)
    elif options.schedule == "takd_code":
        main = optax.piecewise_constant_schedule(0.1 * rate, {boundary(0.75): 0.1})
    else:
        main = optax.constant_schedule(rate)
    warmup = options.warmup_epochs * steps_per_epoch
    if not warmup:
        return main
    return lambda step: main(step) * jnp.minimum(1.0, (step + 1) / warmup)


def transform(
    options: OptimOptions, learning_rate: Array | float, weight_decay: Array | float
) -> optax.GradientTransformation:
    """The update rule; both numbers may be traced, so that changing them compiles nothing anew."""
    if options.optimizer == "adamw":
        return optax.chain(
            optax.scale_by_adam(),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(options.momentum, options.nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )
