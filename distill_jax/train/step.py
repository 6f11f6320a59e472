"""The body of a training step: pure, given everything by its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import Array, lax

from distill_jax import graph, rng
from distill_jax.changed import until_changed
from distill_jax.methods import Context, Hyper, Term, total
from distill_jax.models import Network, Outputs, Variables
from distill_jax.train import averaging, metrics, optim
from distill_jax.train.dropping import Dropping, keep_mask
from distill_jax.train.guard import all_finite, guarded, nonfinite_counts
from distill_jax.train.metrics import StepMetrics
from distill_jax.train.seen import Preprocess, Seen, look
from distill_jax.train.state import Batch, TrainState, join_variables, split_variables
from distill_jax.train.teachers import FrozenTeachers, TeacherOutputs
from distill_jax.train.terms import (
    DrawMask,
    Live,
    Student,
    Teaching,
    data_needs,
    frozen_shown,
    student_terms,
    teacher_needs,
)

Hypers = Mapping[str, Hyper]  # the numbers of each network in training
TrainStep = Callable[
    [TrainState, Teaching, Batch, Hypers, Array],
    tuple[TrainState, dict[str, StepMetrics]],
]


def draw_from(dropping: Dropping, teachers: int) -> DrawMask | None:
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


def kept_shares(draw: DrawMask, key: Array, steps: range, hyper: Hyper) -> Array:
    """(K,) how often each teacher was kept at these steps, by the draw that the steps made."""
    numbers = jnp.asarray(steps, jnp.int32)
    return jnp.mean(jax.vmap(lambda step: draw(key, step, hyper))(numbers).astype(jnp.float32), 0)


def init_state(
    network: Network,
    optimizer: optim.OptimOptions,
    key: Array,
    method_variables: dict[str, Variables] | None = None,
    start: Variables | None = None,
    averaged: bool = False,
    hyper: Hyper = Hyper(),
) -> TrainState:
    """A fresh state of one network; `TrainState.join` makes one of several.

    Args:
      network: the network.
      optimizer: the update rule.
      key: the parameters are drawn from its stream "init", those of `name#2` from "init 2".
      method_variables: those of the methods, by name.
      start: variables to begin with; those of the network that are not among them are drawn.
      averaged: keep a moving average of the network's variables, which starts at these.
      hyper: the numbers of the step, some of which a registered optimizer may keep in its state.
    """
    _, draw = graph.architecture(network.name)
    stream = "init" if draw == 1 else f"init {draw}"
    variables = _completed(start or {}, network, rng.stream(key, stream))
    collections = {kind: tree for kind, tree in variables.items() if kind != "params"}
    own_params, own_collections = split_variables(method_variables or {})
    params = {
        "networks": {network.name: variables["params"]},
        "methods": {network.name: own_params},
    }
    init = _optimizer_init(optimizer, optim.builder_of(optimizer.optimizer))
    opt_state = {network.name: init(_trained(params, network.name), hyper)}
    # Two arrays, not one twice: a state is donated, and a buffer can be given up only once.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    collections = {
        "networks": {network.name: collections},
        "methods": {network.name: own_collections},
    }
    if averaged:
        collections["averages"] = {network.name: averaging.begin(variables)}
    return TrainState(step, params, collections, opt_state, skipped)


@until_changed(maxsize=32)
def _optimizer_init(options: optim.OptimOptions, builder: optim.BuildOptimizer | None) -> Callable:
    """The first state of an optimizer, compiled once; its name may be registered anew."""

    def optimizer_init(held, hyper):
        return optim.transform(options, lambda step: jnp.zeros(()), hyper, 0).init(held)

    return jax.jit(optimizer_init)


def _completed(start: Variables, network: Network, key: Array) -> Variables:
    """The variables of a network: those of `start`, and what it lacks is drawn."""
    if not start:
        return network.init(key)
    if len(jax.tree.leaves(start)) == len(jax.tree.leaves(network.shapes)):
        return start
    drawn = traverse_util.flatten_dict(network.init(key))
    return traverse_util.unflatten_dict(drawn | traverse_util.flatten_dict(start))


def epoch_at(step: Array, steps_per_epoch: int) -> Array:
    """The epochs before a step, () float32: a whole number at the first step of an epoch.

    XLA multiplies by the reciprocal of a constant, so that the quotient may fall short of it.
    """
    return step // steps_per_epoch + (step % steps_per_epoch) / steps_per_epoch


def make_train_step(
    *,
    students: tuple[Student, ...],
    teachers: tuple[Network, ...] = (),
    preprocess: Preprocess,
    steps_per_epoch: int = 1,
    axis_name: str | None = None,
    sync_bn: bool = True,
    max_nonfinite_steps: int = 0,
    epochs: float = 1.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> TrainStep:
    """Builds the body of a training step, to be jitted or pmapped.

    Teachers' outputs, the students' forward and backward passes and their updates are one graph. A
    teacher that no student keeps for a mini-batch is not run for it, and none is where the batch
    brings their outputs from a cache. Several students see one batch and teach each other by their
    outputs on it; each has an optimizer of its own. A network of which nothing moves keeps its
    statistics too. Where a method needs a second view or partners, its network is run on these
    after the batch, in the order of `DATA_NEEDS`, each time from the statistics of the time before.

    A step at which a term of a loss, a teacher's output, a gradient or a collection is not finite
    changes nothing. `max_nonfinite_steps` of them are passed over; after one more the state stays
    as it is, at that step, whatever else it is given (see `guard.is_halted`).

    Args:
      students: the networks to train.
      teachers: the frozen networks.
      preprocess: makes of a batch what networks see, such as augmented and normalised images.
      steps_per_epoch: counts epochs for the methods.
      axis_name: the devices' axis; gradients are averaged and metrics added over it.
      sync_bn: BatchNorm sees the whole batch over that axis. Otherwise each device normalises its
        share by itself, with dropout of its own, and the running statistics are averaged.
      max_nonfinite_steps: steps that are not finite and may be passed over.
      epochs: of the whole training, for the methods.
      mixup: α of mixup, cutmix: of CutMix; 0 for none. Images of a batch are then mixed by twos.

    Returns:
      (state, teachers' variables, batch, hyper of each network, key) -> (state, metrics of each).
    """
    networks = {student.name: student.network for student in students}
    methods = tuple(pair for student in students for pair in student.methods)
    frozen = FrozenTeachers(teachers, teacher_needs(methods))
    heard = any(method.needs for _, method in methods)
    needs = {student.name: data_needs(student.methods) for student in students}
    statistics_axis = axis_name if sync_bn else None

    def train_step(state, variables, batch, hyper, key):
        devices = 1 if axis_name is None else lax.axis_size(axis_name)
        own_key = key
        if devices > 1 and not sync_bn:
            # Networks do not know of the other devices then, and would draw alike on all of them.
            own_key = jax.random.fold_in(key, lax.axis_index(axis_name))
        seen = look(
            preprocess,
            needs,
            batch,
            key,
            state.step,
            mixup=mixup,
            cutmix=cutmix,
            axis_name=axis_name,
        )
        drawn = {
            s.name: None if s.draw_mask is None else s.draw_mask(key, state.step, hyper[s.name])
            for s in students
        }
        run = _kept_by_any(students, drawn, len(teachers))
        taught = _teacher_outputs(frozen, variables, seen.inputs, batch.teachers, run)
        shown = frozen_shown(frozen, taught, variables, methods)
        context = Context(
            student=None,  # type: ignore[arg-type]  # `student_terms` fills it in, and its teachers
            teachers=(),
            teacher_mask=jnp.ones(0, bool),
            labels=batch.labels,
            hyper=Hyper(),
            index=batch.index,
            position=batch.position,
            batch_size=len(batch.labels) * devices,
            epoch=epoch_at(state.step, steps_per_epoch),
            axis_name=axis_name,
            epochs=epochs,
            mixed=seen.mixed,
        )

        def loss_of(params):
            runs = {
                name: _run(network, params["networks"][name], state, seen, own_key, statistics_axis)
                for name, network in networks.items()
            }
            live = {name: own for name, (own, _) in runs.items()}
            terms, kept = {}, {}
            for student in students:
                name = student.name
                terms[name], kept[name] = student_terms(
                    student,
                    join_variables(params["methods"][name], state.collections["methods"][name]),
                    dataclasses.replace(context, hyper=hyper[name], inputs=seen.own[name]),
                    shown,
                    live,
                    drawn[name],
                    lambda method: rng.stream(key, f"method {method}", state.step),
                )
            losses = [total(own) for own in terms.values()]
            outputs = {name: own.outputs for name, own in live.items()}
            collections = {name: after for name, (_, after) in runs.items()}
            return sum(losses[1:], losses[0]), (outputs, collections, terms, kept)

        grads, (outputs, collections, terms, kept) = jax.grad(loss_of, has_aux=True)(state.params)
        counted = {name: _count(outputs[name], context, terms[name]) for name in networks}
        spoilt = jnp.zeros(len(teachers), jnp.int32)
        if heard:  # else they would be computed for this alone
            spoilt = nonfinite_counts(taught, len(teachers))
        if axis_name is not None:
            grads = lax.pmean(grads, axis_name)
            counted, spoilt = lax.psum((counted, spoilt), axis_name)
            if not sync_bn:
                collections = _averaged(collections, axis_name)
        params, opt_state, causes = {"networks": {}, "methods": {}}, {}, {}
        for student in students:
            name = student.name
            if not _moves(student, state):
                collections[name] = state.collections["networks"][name]
            held, opt_state[name] = _update(student, hyper[name], state, grads)
            params["networks"][name], params["methods"][name] = held["network"], held["methods"]
            if drawn[name] is not None:  # the same on every device, so counted once
                counted[name] = counted[name]._replace(kept=metrics.mean_of(drawn[name]))
            causes[name] = {
                **_causes(student, teachers, spoilt, counted[name]),
                "gradients": ~all_finite(_trained(grads, name)),
                "batch statistics": ~all_finite((collections[name], kept[name])),
            }
        collections = {"networks": collections, "methods": kept}
        updated = TrainState(state.step + 1, params, collections, opt_state, state.skipped)
        updated = _with_averages(updated, state, hyper)
        return guarded(state, updated, counted, causes, max_nonfinite_steps)

    return train_step


def _run(
    network: Network, params: Any, state: TrainState, seen: Seen, key: Array, axis_name: str | None
) -> tuple[Live, Variables]:
    """A network in training mode on all that it sees, and what its layers keep of that."""

    def apply(params, inputs, before, stream="network"):
        return network.apply(
            {"params": params, **before},
            inputs,
            train=True,
            rngs=rng.stream(key, stream, state.step),
            axis_name=axis_name,
        )

    before = state.collections["networks"][network.name]
    outputs, after = apply(params, seen.own[network.name], before)
    others = {}
    for need, inputs in seen.others[network.name].items():
        others[need], after = apply(params, inputs, after, f"network {need}")
    live = Live(
        outputs,
        params,
        lambda params, feature: network.head({"params": params}, feature),
        lambda params, inputs: apply(params, inputs, before)[0],
        others,
    )
    return live, after


def _causes(
    student: Student, teachers: tuple[Network, ...], spoilt: Array, counted: StepMetrics
) -> dict[str, Array]:
    """Which of a student's teachers and terms are not finite."""
    return {
        **{
            f"teacher {k + 1} ({teachers[place].name})": spoilt[place] > 0
            for k, place in enumerate(student.frozen)
        },
        **{f"term {term}": ~jnp.isfinite(value) for term, (value, _) in counted.weighted.items()},
    }


def _with_averages(updated: TrainState, before: TrainState, hyper: Hypers) -> TrainState:
    """The state after a step with the averages of the networks that keep one."""
    if not before.averages:
        return updated
    averages = {
        name: averaging.moved(own, updated.variables(name), hyper[name].average_decay, before.step)
        for name, own in before.averages.items()
    }
    collections = {**updated.collections, "averages": averages}
    return dataclasses.replace(updated, collections=collections)


def _trained(params: Any, name: str) -> dict[str, Any]:
    """What one optimizer holds: a network's parameters and those of its methods."""
    return {"network": params["networks"][name], "methods": params["methods"][name]}


def _moves(student: Student, state: TrainState) -> bool:
    """Whether any parameter of a network is trained."""
    paths = optim.parameter_paths(state.params["networks"][student.name])
    return any(optim.moves(student.optimizer, path) for path in paths)


def _kept_by_any(
    students: tuple[Student, ...], drawn: Mapping[str, Array | None], teachers: int
) -> Array | None:
    """(K,) the frozen teachers of a step that some student keeps; None where none is ever dropped.

    Each student masks those that it dropped itself.
    """
    if all(mask is None for mask in drawn.values()):
        return None
    if len(students) == 1:
        return drawn[students[0].name]
    kept = jnp.zeros(teachers, bool)
    for student in students:
        mask = drawn[student.name]
        kept = kept.at[jnp.asarray(student.frozen, int)].max(True if mask is None else mask)
    return kept


def _teacher_outputs(
    frozen: FrozenTeachers,
    variables: Teaching,
    inputs: Any,
    cached: TeacherOutputs | None,
    drawn: Array | None,
) -> TeacherOutputs:
    """The teachers' outputs, from the cache where there is one; those of a dropped one are 0."""
    if cached is None:
        return frozen.outputs(variables, inputs, drawn)
    logits = cached.logits.swapaxes(0, 1)
    if drawn is None:
        return cached._replace(logits=logits)
    features = tuple(
        jax.tree.map(lambda x, k=k: jnp.where(drawn[k], x, jnp.zeros_like(x)), outputs)
        for k, outputs in enumerate(cached.features)
    )
    return TeacherOutputs(jnp.where(drawn[:, None, None], logits, 0.0), features)


def _update(student, hyper, state, grads):
    """(what the student's optimizer holds, its state) after the optimizer's step."""
    rule = optim.transform(student.optimizer, student.schedule, hyper, state.step)
    held = _trained(state.params, student.name)
    gradients, before = _trained(grads, student.name), state.opt_state[student.name]
    updates, after = rule.update(gradients, before, held)
    return optax.apply_updates(held, updates), after


def _count(outputs: Outputs, context: Context, terms: dict[str, Term]) -> StepMetrics:
    """What is counted of a step on this device."""
    size = jnp.asarray(len(context.labels), jnp.int32)

    def pair(term: Term):
        return jnp.sum(jnp.broadcast_to(term.value, context.labels.shape)), size

    def right(outputs: Outputs):
        best = jnp.argmax(outputs.logits, -1)
        return metrics.mean_of(context.over_labels(lambda labels: best == labels))

    pairs = {name: pair(term) for name, term in terms.items()}
    weighted = {name: (terms[name].weight * value, n) for name, (value, n) in pairs.items()}
    loss = sum((value for value, _ in weighted.values()), jnp.float32(0))
    exits = (outputs, *outputs.branches)
    return StepMetrics((loss, size), tuple(map(right, exits)), pairs, weighted, None, {})


def _averaged(collections: Any, axis_name: str) -> Any:
    """Statistics that each device keeps of its share, averaged over the devices."""
    return jax.tree.map(
        lambda x: lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
        collections,
    )
