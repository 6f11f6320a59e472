"""The body of a training step: pure, told everything by its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array, lax

from distill_jax import rng
from distill_jax.methods import losses
from distill_jax.models import Network, Outputs, Variables
from distill_jax.train import metrics, optim
from distill_jax.train.dropping import Dropping, keep_mask
from distill_jax.train.teachers import Frozen

# (outputs, labels, teacher_logits (K, B, C), keep (K,), hyper, batch size over all devices)
# -> the loss (B,), and terms (B,) to report; those called weighted_* add up to the loss.
Objective = Callable[..., tuple[Array, dict[str, Array]]]
Prepare = Callable[[Array, Array], Array]  # (keys (B,), uint8 images) -> normalised float images
DrawKeep = Callable[[Array, Array, "Hyper"], Array]  # (key, step, hyper) -> (K,) booleans
NOT_FINITE = "not finite: "  # before the name of a cause, among the metrics of a train step


@struct.dataclass
class TrainState:
    """What a step changes; arrays only.

    Args:
      step: () int32, steps done.
      params: of the network.
      batch_stats: running statistics of the network.
      opt_state: of the optimizer.
      skipped: () int32, steps whose numbers were not finite and whose update was not made.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    skipped: Array

    @property
    def variables(self) -> Variables:
        """What `Network.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Resident(NamedTuple):
    """A split as the loops hold it on the device.

    Args:
      images: (N, H, W, channels) uint8.
      labels: (N,) int32.
      teacher_logits: (N, K, C) float32, the logit table: what each frozen teacher says of each
        image; None where the step is to compute it.
    """

    images: Any
    labels: Any
    teacher_logits: Any = None


class Batch(NamedTuple):
    """A mini-batch, or a device's share of it.

    Args:
      images: (B, H, W, channels) uint8.
      labels: (B,) int32.
      positions: (B,) int32, places in the whole batch: augmentation draws by them.
      teacher_logits: (B, K, C), where a logit table has them.
    """

    images: Array
    labels: Array
    positions: Array
    teacher_logits: Array | None = None


class Hyper(NamedTuple):
    """The numbers of a step, traced: changing them compiles nothing anew.

    Args:
      lr_scale: factor on the schedule's learning rate.
      weight_decay: decay added to the gradient of every parameter.
      temperature: T > 0 of the softened distributions.
      kd_weight: λ in [0, 1].
      survival: probability that a source survives "bernoulli" dropping.
    """

    lr_scale: Array | float = 1.0
    weight_decay: Array | float = 0.0
    temperature: Array | float = 1.0
    kd_weight: Array | float = 0.0
    survival: Array | float = 1.0


TrainStep = Callable[
    [TrainState, tuple[Variables, ...], Batch, Hyper, Array], tuple[TrainState, metrics.Metrics]
]


def multi_teacher_objective(options: losses.LossOptions) -> Objective:
    """Cross-entropy and KL to the kept teachers, on the logits; see `losses.multi_teacher`."""

    def objective(outputs: Outputs, labels, teacher_logits, keep, hyper: Hyper, batch_size):
        return losses.multi_teacher(
            outputs.logits,
            labels,
            teacher_logits,
            keep,
            temperature=hyper.temperature,
            kd_weight=hyper.kd_weight,
            options=options,
        )

    return objective


def evolving_objective(options: losses.EvolveOptions, taught: losses.LossOptions) -> Objective:
    """TESKD's loss and, where frozen teachers teach the backbone too, their λ T² KL added to it."""

    def objective(outputs: Outputs, labels, teacher_logits, keep, hyper: Hyper, batch_size):
        exits = (outputs, *outputs.branches)
        loss, terms = losses.self_distillation(
            jnp.stack([exit.logits for exit in exits]),
            jnp.stack([exit.feature for exit in exits]),
            labels,
            batch_size=batch_size,
            options=options,
        )
        if not teacher_logits.shape[0]:
            return loss, terms
        above = multi_teacher_objective(taught)
        _, found = above(outputs, labels, teacher_logits, keep, hyper, batch_size)
        terms |= {"frozen_kl": found["kl"], "weighted_frozen_kl": found["weighted_kl"]}
        return loss + found["weighted_kl"], terms

    return objective


def draw_from(dropping: Dropping, teachers: int) -> DrawKeep | None:
    """The draw of stochastic teaching, from stream "teacher_drop" at the step; None drops nobody.

    Raises:
      ValueError: more are to be dropped than there are.
    """
    if dropping.kind == "none" or not teachers:
        return None
    dropping.check(teachers)

    def draw(key, step, hyper):
        return keep_mask(dropping, rng.stream(key, "teacher_drop", step), teachers, hyper.survival)

    return draw


def init_state(network: Network, optimizer: optim.OptimOptions, key: Array) -> TrainState:
    """A fresh state; the parameters are drawn from the stream "init" of `key`."""
    variables = network.init(rng.stream(key, "init"))
    opt_state = jax.jit(optim.transform(optimizer, 0.0, 0.0).init)(variables["params"])
    # Two arrays, not one twice: a state is donated, and a buffer can be given up only once.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, variables["params"], variables["batch_stats"], opt_state, skipped)


def make_train_step(
    *,
    network: Network,
    teachers: tuple[Network, ...],
    optimizer: optim.OptimOptions,
    schedule: optim.Schedule,
    objective: Objective,
    prepare: Prepare,
    draw_keep: DrawKeep | None = None,
    axis_name: str | None = None,
    sync_bn: bool = True,
    may_skip: int = 0,
) -> TrainStep:
    """The body of a training step, to be jitted or pmapped.

    Teachers' logits, the student's forward and backward pass and its update are one graph. A
    teacher that is dropped from a mini-batch is not run for it, and none is where the batch brings
    their logits from a table.

    A step at which a term of the loss, a teacher's logits, a gradient or a running statistic is not
    finite changes no weights. `may_skip` of them are passed over; after one more the state stays
    as it is, at that step, whatever else it is given (see `is_halted`).

    Args:
      network: the student.
      teachers: the frozen networks, largest first.
      optimizer: the update rule.
      schedule: learning rate of a step.
      objective: what the student minimises, and the terms to report.
      prepare: augments and normalises.
      draw_keep: which teachers teach this mini-batch, see `draw_from`; None keeps all.
      axis_name: the devices' axis under pmap; gradients are averaged and metrics added over it.
      sync_bn: BatchNorm sees the whole batch over that axis. Otherwise each device normalises its
        share by itself and the running statistics are averaged.
      may_skip: steps that are not finite and may be passed over.

    Returns:
      (state, teachers' variables, batch, hyper, key) -> (state, metrics). Metrics called
      `NOT_FINITE` and a cause count the steps that it spoilt.
    """
    frozen = Frozen(teachers)

    def train_step(state, variables, batch, hyper, key):
        devices = 1 if axis_name is None else lax.axis_size(axis_name)
        keys = rng.per_example(rng.stream(key, "augment", state.step), batch.positions)
        images = prepare(keys, batch.images)
        drawn = None if draw_keep is None else draw_keep(key, state.step, hyper)
        keep = jnp.ones(len(teachers), bool) if drawn is None else drawn
        if batch.teacher_logits is None:
            teacher_logits = frozen.logits(variables, images, drawn)
        else:
            found = batch.teacher_logits.swapaxes(0, 1)
            teacher_logits = jnp.where(keep[:, None, None], found, 0.0)

        def loss_of(params):
            student = {"params": params, "batch_stats": state.batch_stats}
            outputs, batch_stats = network.apply(
                student, images, train=True, axis_name=axis_name if sync_bn else None
            )
            loss, terms = objective(
                outputs, batch.labels, teacher_logits, keep, hyper, len(batch.labels) * devices
            )
            return jnp.mean(loss), (outputs, batch_stats, {"loss": loss, **terms})

        grads, (outputs, batch_stats, terms) = jax.grad(loss_of, has_aux=True)(state.params)
        sums = {name: metrics.mean_of(values) for name, values in terms.items()}
        sums |= _accuracies([exit.logits for exit in (outputs, *outputs.branches)], batch.labels)
        spoilt = jnp.sum(~jnp.isfinite(teacher_logits), (1, 2))
        if axis_name is not None:
            grads = lax.pmean(grads, axis_name)
            sums, spoilt = lax.psum((sums, spoilt), axis_name)
            if not sync_bn:
                batch_stats = lax.pmean(batch_stats, axis_name)
        if drawn is not None:  # the same on every device, so counted once
            sums["kept"] = metrics.mean_of(keep)
        rate = schedule(state.step) * hyper.lr_scale
        updates, opt_state = optim.transform(optimizer, rate, hyper.weight_decay).update(
            grads, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        causes = {
            **{f"teacher {k + 1} ({t.name})": spoilt[k] > 0 for k, t in enumerate(teachers)},
            **{f"term {name}": ~jnp.isfinite(sums[name][0]) for name in terms},
            "gradients": ~_all_finite(grads),
            "batch statistics": ~_all_finite(batch_stats),
        }
        updated = TrainState(state.step + 1, params, batch_stats, opt_state, state.skipped)
        return _guarded(state, updated, sums, causes, may_skip)

    return train_step


def is_halted(state: TrainState, may_skip: int) -> Array:
    """Whether more steps than `may_skip` were not finite; `state.step` is then the last of them."""
    return state.skipped > may_skip


def _guarded(state, updated, sums, causes, may_skip):
    """The state after a step, and what to count of it; nothing more where training has halted."""
    bad = functools.reduce(jnp.logical_or, causes.values())
    halted = is_halted(state, may_skip)
    halts = bad & (state.skipped >= may_skip)
    chosen = jax.tree.map(lambda old, new: jnp.where(halted | bad, old, new), state, updated)
    after = chosen.replace(
        step=jnp.where(halted | halts, state.step, updated.step),
        skipped=state.skipped + (bad & ~halted),
    )
    counted = {
        name: jax.tree.map(lambda x: jnp.where(halted | bad, jnp.zeros_like(x), x), pair)
        for name, pair in sums.items()
    }
    steps = (~halted).astype(jnp.int32)
    counted |= {
        f"{NOT_FINITE}{cause}": ((flag & ~halted).astype(jnp.int32), steps)
        for cause, flag in causes.items()
    }
    return after, counted


def _all_finite(tree: Any) -> Array:
    # As one vector: a test for each leaf would be joined anew in the update of every parameter.
    return jnp.all(jnp.isfinite(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])))


def _accuracies(exits: Sequence[Array], labels: Array) -> metrics.Metrics:
    return {
        name: metrics.mean_of(jnp.argmax(logits, -1) == labels)
        for name, logits in zip(accuracy_names(len(exits)), exits, strict=True)
    }


def accuracy_names(exits: int) -> list[str]:
    """What the accuracy of a network is called, then those of its branches, deepest first."""
    return ["accuracy", *(f"branch{i}_accuracy" for i in range(1, exits))]
