"""Optimizers and learning-rate schedules from plain values, on optax."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from distill_jax.identity import check_new_name, describe
from distill_jax.methods import Hyper
from distill_jax.refusals import kind_and_line

OPTIMIZERS = ("sgd", "adamw")
DECAYED = ("all", "kernels")
SCHEDULES = ("constant", "piecewise", "cosine", "takd_code")
Schedule = Callable[[Array | int], Array]
# (schedule, hyper) -> the update rule; `schedule` gives the learning rate of a step.
BuildOptimizer = Callable[[Schedule, Hyper], optax.GradientTransformation]
_registered: dict[str, tuple[BuildOptimizer, str]] = {}


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """How parameters are updated.

    Args:
      optimizer: "sgd" (PyTorch's: decay added to the gradient, then momentum), "adamw", or one that
        `register_optimizer` made known; of the following it takes what its builder takes.
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
      clip_norm: gradients are scaled down to this global norm; 0 leaves them as they are.
      accumulate_steps: steps whose gradients are averaged for one update.
      decayed: "all", or "kernels": weight decay spares vectors, that is biases and BatchNorms.
      trainable: regular expressions of the parameters that move, such as "layer3.*"; all where
        empty. They are matched against the whole path joined by dots.
      frozen: regular expressions of parameters that do not move.

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
    clip_norm: float = 0.0
    accumulate_steps: int = 1
    decayed: str = "all"
    trainable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = (*OPTIMIZERS, *_registered)
        if self.optimizer not in known:
            raise ValueError(f"optimizer is one of {known}, got {self.optimizer!r}")
        if self.decayed not in DECAYED:
            raise ValueError(f"decayed is one of {DECAYED}, got {self.decayed!r}")
        if self.accumulate_steps < 1:
            raise ValueError(f"accumulate_steps is 1 or more, got {self.accumulate_steps}")
        for pattern in (*self.trainable, *self.frozen):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"trainable and frozen are regular expressions, got {pattern!r}: {error}"
                ) from None
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is one of {SCHEDULES}, got {self.schedule!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is a number above 0, got {self.learning_rate}")
        for name, value, below in (
            ("momentum", self.momentum, 1.0),
            ("weight_decay", self.weight_decay, math.inf),
            ("warmup_epochs", self.warmup_epochs, math.inf),
            ("clip_norm", self.clip_norm, math.inf),
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


def register_optimizer(name: str, build: BuildOptimizer, version: str = "1") -> None:
    """Makes an optimizer known under a name, for `recipe.optimizer`.

    The name, the version and the builder's source are part of the id of every stage that uses it.

    Args:
      name: for the config.
      build: (schedule, hyper) -> optax.GradientTransformation; `schedule(step)` is the learning
        rate, `hyper.weight_decay` the recipe's decay. Both may be traced.
      version: to be raised when the builder comes to build something else.

    Raises:
      ValueError: a name that is taken or cannot be written in a config, or nothing to call.
    """
    check_new_name("an optimizer", name, "my_sgd", OPTIMIZERS)
    if not callable(build):
        raise ValueError(f"optimizer {name!r} is {build!r}: expected a function (schedule, hyper)")
    _registered[name] = (build, str(version))


def registered() -> list[Any]:
    """What users registered."""
    return [build for build, _ in _registered.values()]


def is_registered(name: str) -> bool:
    """Whether a user registered a optimizer under a name."""
    return name in _registered


def builder_of(optimizer: str) -> BuildOptimizer | None:
    """The builder of a registered optimizer; None of the library's."""
    return _registered[optimizer][0] if optimizer in _registered else None


def identity_of(optimizer: str) -> Any:
    """What of a registered optimizer belongs to a stage's id; None of the library's."""
    if optimizer not in _registered:
        return None
    build, version = _registered[optimizer]
    return {"name": optimizer, "version": version, "repr": describe(build)}


def check(options: OptimOptions, hyper: Hyper, held: Any) -> None:
    """Tries a registered optimizer on shapes alone.

    Args:
      options: the rule.
      hyper: the numbers of a step.
      held: the shapes of what it trains.

    Raises:
      ValueError: its builder does not give an optimizer, or one that cannot be run.
    """
    if options.optimizer not in _registered:
        return

    def run(hyper, step, held):
        rule = transform(options, lambda step: 1.0 / (step + 1), hyper, step)
        return optax.apply_updates(held, rule.update(held, rule.init(held), held)[0])

    name = options.optimizer
    try:
        jax.eval_shape(run, hyper, jax.ShapeDtypeStruct((), jnp.int32), held)
    except ValueError as error:
        raise ValueError(f"optimizer {name!r}: {error}") from error
    except Exception as error:  # whatever somebody's code raises
        raise ValueError(
            f"optimizer {name!r} cannot be run: {kind_and_line(error)}; its "
            "update is given gradients, state and parameters, and its numbers are traced"
        ) from error


def transform(
    options: OptimOptions, schedule: Schedule, hyper: Hyper, step: Array | int
) -> optax.GradientTransformation:
    """The update rule of a step; all but `options` may be traced: other numbers compile nothing.

    Args:
      options: the rule.
      schedule: the learning rate of a step, to be multiplied by `hyper.lr_scale`.
      hyper: the numbers of the step.
      step: the step; a registered optimizer counts its updates.
    """
    parts: list[optax.GradientTransformation] = []
    if options.clip_norm:
        parts.append(optax.clip_by_global_norm(options.clip_norm))
    if options.optimizer in _registered:
        rate = _scaled(schedule, hyper, options.accumulate_steps)
        parts.append(_built(options.optimizer, rate, hyper))
    else:
        parts.extend(_library_rule(options, schedule(step) * hyper.lr_scale, hyper.weight_decay))
    rule = optax.chain(*parts)
    if options.trainable or options.frozen:
        rule = optax.partition(
            {True: rule, False: optax.set_to_zero()}, lambda held: _moving(options, held)
        )
    if options.accumulate_steps > 1:
        multi = optax.MultiSteps(rule, options.accumulate_steps)
        rule = optax.GradientTransformation(multi.init, multi.update)
    return rule


def _built(optimizer: str, rate: Schedule, hyper: Hyper) -> optax.GradientTransformation:
    rule = _registered[optimizer][0](rate, hyper)
    if not (hasattr(rule, "init") and hasattr(rule, "update")):
        raise ValueError(f"its builder gives {rule!r}: expected an optax.GradientTransformation")
    return rule


def _library_rule(options, rate, weight_decay) -> list[optax.GradientTransformation]:
    mask = None if options.decayed == "all" else _is_kernel
    decay = optax.add_decayed_weights(weight_decay, mask)
    scale = optax.scale_by_learning_rate(rate)
    if options.optimizer == "adamw":
        return [optax.scale_by_adam(), decay, scale]
    return [decay, optax.trace(options.momentum, options.nesterov), scale]


def _scaled(schedule: Schedule, hyper: Hyper, every: int) -> Schedule:
    """The learning rate of an update: that of the last of the `every` steps that make it."""
    return lambda update: schedule((update + 1) * every - 1) * hyper.lr_scale


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def parameter_paths(params: Any) -> list[str]:
    """The paths of parameters joined by dots, as `trainable` and `frozen` name them."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [_dotted(path) for path, _ in leaves]


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def moves(options: OptimOptions, path: str) -> bool:
    """Whether the parameter of a network or of a method at `path` is trained."""
    chosen = not options.trainable or any(matches(p, path) for p in options.trainable)
    return chosen and not any(matches(p, path) for p in options.frozen)


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches a parameter's whole path."""
    return re.fullmatch(pattern, path) is not None


def _moving(options: OptimOptions, held: Any) -> Any:
    """True where a parameter is trained; what methods bring always is."""

    def label(path, leaf):
        whose, *rest = path
        return whose.key != "network" or moves(options, _dotted(tuple(rest)))

    return jax.tree_util.tree_map_with_path(label, held)
