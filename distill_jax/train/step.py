"""The body of a training step: pure, given everything by its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from distill_jax import graph, rng
from distill_jax.methods import Context, Hyper, Method, Term, total
from distill_jax.models import Network, Outputs, Variables
from distill_jax.train import metrics, optim
from distill_jax.train.dropping import Dropping, keep_mask
from distill_jax.train.guard import all_finite, guarded, nonfinite_counts
from distill_jax.train.metrics import StepMetrics
from distill_jax.train.state import Batch, TrainState, join_variables, split_variables
from distill_jax.train.teachers import (
    APPLY,
    HEAD,
    FrozenTeachers,
    FrozenVariables,
    TeacherOutputs,
)

Methods = tuple[tuple[str, Method], ...]  # those of a stage by name, in the order of their terms
Preprocess = Callable[[Array, Any], Any]  # (keys (B,), inputs) -> what networks see of them
DrawMask = Callable[[Array, Array, Hyper], Array]  # (key, step, hyper) -> (K,) booleans
Teaching = tuple[Variables, ...] | FrozenVariables  # the teachers' variables
TrainStep = Callable[
    [TrainState, Teaching, Batch, Hyper, Array],
    tuple[TrainState, StepMetrics],
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


def teacher_needs(methods: Methods) -> tuple[str, ...]:
    """The outputs that methods need of teachers besides the logits, each once."""
    wanted = {name: None for _, method in methods for name in method.needs}
    return tuple(name for name in wanted if name not in ("logits", APPLY, HEAD))


def needs_variables(methods: Methods) -> bool:
    """Whether a method asks teachers more than their outputs on the batch."""
    return any({APPLY, HEAD} & set(method.needs) for _, method in methods)


def init_state(
    network: Network,
    optimizer: optim.OptimOptions,
    key: Array,
    method_variables: dict[str, Variables] | None = None,
    start: Variables | None = None,
) -> TrainState:
    """A fresh state.

    Args:
      network: the student.
      optimizer: the update rule.
      key: the parameters are drawn from its stream "init", those of `name#2` from "init 2".
      method_variables: those of the methods, by name.
      start: the network's variables to begin with instead of drawing them.
    """
    _, draw = graph.architecture(network.name)
    stream = "init" if draw == 1 else f"init {draw}"
    variables = network.init(rng.stream(key, stream)) if start is None else start
    collections = {kind: tree for kind, tree in variables.items() if kind != "params"}
    own_params, own_collections = split_variables(method_variables or {})
    params = {
        "networks": {network.name: variables["params"]},
        "methods": {network.name: own_params},
    }
    rule = optim.transform(optimizer, lambda step: jnp.zeros(()), Hyper(), 0)
    opt_state = {network.name: jax.jit(rule.init)(_trained(params, network.name))}
    # Two arrays, not one twice: a state is donated, and a buffer can be given up only once.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    collections = {
        "networks": {network.name: collections},
        "methods": {network.name: own_collections},
    }
    return TrainState(step, params, collections, opt_state, skipped)


def make_train_step(
    *,
    network: Network,
    methods: Methods,
    teachers: tuple[Network, ...],
    optimizer: optim.OptimOptions,
    schedule: optim.Schedule,
    preprocess: Preprocess,
    draw_mask: DrawMask | None = None,
    steps_per_epoch: int = 1,
    axis_name: str | None = None,
    sync_bn: bool = True,
    max_nonfinite_steps: int = 0,
) -> TrainStep:
    """Builds the body of a training step, to be jitted or pmapped.

    Teachers' outputs, the student's forward and backward pass and its update are one graph. A
    teacher that is dropped from a mini-batch is not run for it, and none is where the batch brings
    their outputs from a cache.

    A step at which a term of the loss, a teacher's output, a gradient or a collection is not finite
    changes nothing. `max_nonfinite_steps` of them are passed over; after one more the state stays
    as it is, at that step, whatever else it is given (see `guard.is_halted`).

    Args:
      network: the student.
      methods: the terms of its loss.
      teachers: the frozen networks, largest first.
      optimizer: the update rule.
      schedule: learning rate of a step.
      preprocess: makes of a batch what networks see, such as augmented and normalised images.
      draw_mask: which teachers teach this mini-batch, see `draw_from`; None keeps all.
      steps_per_epoch: counts epochs for the methods.
      axis_name: the devices' axis; gradients are averaged and metrics added over it.
      sync_bn: BatchNorm sees the whole batch over that axis. Otherwise each device normalises its
        share by itself and the running statistics are averaged.
      max_nonfinite_steps: steps that are not finite and may be passed over.

    Returns:
      (state, teachers' variables, batch, hyper, key) -> (state, metrics).
    """
    frozen, name = FrozenTeachers(teachers, teacher_needs(methods)), network.name

    def train_step(state, variables, batch, hyper, key):
        devices = 1 if axis_name is None else lax.axis_size(axis_name)
        keys = rng.per_example(rng.stream(key, "augment", state.step), batch.position)
        inputs = preprocess(keys, batch.inputs)
        drawn = None if draw_mask is None else draw_mask(key, state.step, hyper)
        mask = jnp.ones(len(teachers), bool) if drawn is None else drawn
        taught = _teacher_outputs(frozen, variables, inputs, batch.teachers, drawn)
        context = Context(
            student=None,  # type: ignore[arg-type]  # filled in below, inside the gradient
            teachers=taught.each(),
            teacher_mask=mask,
            labels=batch.labels,
            hyper=hyper,
            inputs=inputs,
            index=batch.index,
            position=batch.position,
            batch_size=len(batch.labels) * devices,
            epoch=state.step / steps_per_epoch,
            axis_name=axis_name,
            **teacher_doors(frozen, variables, methods),
        )

        def loss_of(params):
            outputs, collections = network.apply(
                {"params": params["networks"][name], **state.collections["networks"][name]},
                inputs,
                train=True,
                rngs=rng.stream(key, "network", state.step),
                axis_name=axis_name if sync_bn else None,
            )
            terms, kept = method_terms(
                network,
                methods,
                join_variables(params["methods"][name], state.collections["methods"][name]),
                dataclasses.replace(context, student=outputs),
                lambda feature: network.head({"params": params["networks"][name]}, feature),
                lambda method: rng.stream(key, f"method {method}", state.step),
            )
            return total(terms), (outputs, collections, kept, terms)

        grads, (outputs, collections, kept, terms) = jax.grad(loss_of, has_aux=True)(state.params)
        counted = _count(outputs, batch.labels, terms)
        spoilt = nonfinite_counts(taught, len(teachers))
        if axis_name is not None:
            grads = lax.pmean(grads, axis_name)
            counted, spoilt = lax.psum((counted, spoilt), axis_name)
            if not sync_bn:
                collections = _averaged(collections, axis_name)
        if drawn is not None:  # the same on every device, so counted once
            counted = counted._replace(kept=metrics.mean_of(mask))
        collections = {"networks": {name: collections}, "methods": {name: kept}}
        params, opt_state = _update(name, optimizer, schedule, hyper, state, grads)
        causes = {
            **{f"teacher {k + 1} ({t.name})": spoilt[k] > 0 for k, t in enumerate(teachers)},
            **{f"term {term}": ~jnp.isfinite(pair[0]) for term, pair in counted.weighted.items()},
            "gradients": ~all_finite(grads),
            "batch statistics": ~all_finite(collections),
        }
        updated = TrainState(state.step + 1, params, collections, opt_state, state.skipped)
        return guarded(state, updated, counted, causes, max_nonfinite_steps)

    return train_step


def method_terms(
    network: Network,
    methods: Methods,
    variables: dict[str, Variables],
    context: Context,
    head: Callable[[Array], Array] | None,
    key_of: Callable[[str], Array],
) -> tuple[dict[str, Term], dict[str, Variables]]:
    """The terms of all methods, each times the method's weight, and their collections afterwards.

    Raises:
      ValueError: two methods give a term of one name.
    """
    terms: dict[str, Term] = {}
    collections = {}
    for name, method in methods:
        given = dataclasses.replace(context, head=head, key=key_of(name))
        given_terms, after = method.terms(variables.get(name, {}), given)
        if double := terms.keys() & given_terms.keys():
            raise ValueError(f"{network.name}: two methods give a term {', '.join(double)}")
        for term, (value, _) in given_terms.items():
            if jnp.shape(value) not in ((), context.labels.shape):
                raise ValueError(
                    f"method {name!r} gives {term} of shape {jnp.shape(value)}: expected a number "
                    f"an example, {context.labels.shape}, or one for the batch, ()"
                )
        factor = context.hyper.methods.get(name, 1.0)
        terms |= {k: Term(term.value, factor * term.weight) for k, term in given_terms.items()}
        if name in variables:
            collections[name] = {kind: x for kind, x in after.items() if kind != "params"}
    return terms, collections


def _trained(params: Any, name: str) -> dict[str, Any]:
    """What one optimizer holds: a network's parameters and those of its methods."""
    return {"network": params["networks"][name], "methods": params["methods"][name]}


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


def teacher_doors(frozen: FrozenTeachers, variables: Teaching, methods: Methods) -> dict[str, Any]:
    """What lets methods ask teachers more than their outputs on the batch."""
    if not needs_variables(methods):
        return {}

    def own(k):
        return lax.stop_gradient(frozen.variables_of(k, variables))

    def apply(k, inputs):
        return frozen.networks[k].apply(own(k), inputs)[0]

    heads = tuple(
        lambda feature, k=k, network=network: network.head(own(k), feature)
        for k, network in enumerate(frozen.networks)
    )
    return {"teacher_heads": heads, "teacher_apply": apply}


def _update(name, optimizer, schedule, hyper, state, grads):
    """(params, opt_state) after the optimizer's step."""
    rule = optim.transform(optimizer, schedule, hyper, state.step)
    held = _trained(state.params, name)
    updates, opt_state = rule.update(_trained(grads, name), state.opt_state[name], held)
    updated = optax.apply_updates(held, updates)
    params = {
        "networks": {name: updated["network"]},
        "methods": {name: updated["methods"]},
    }
    return params, {name: opt_state}


def _count(outputs: Outputs, labels: Array, terms: dict[str, Term]) -> StepMetrics:
    """What is counted of a step on this device."""
    size = jnp.asarray(len(labels), jnp.int32)

    def pair(term: Term):
        return jnp.sum(jnp.broadcast_to(term.value, labels.shape)), size

    pairs = {name: pair(term) for name, term in terms.items()}
    weighted = {name: (terms[name].weight * value, n) for name, (value, n) in pairs.items()}
    loss = sum((value for value, _ in weighted.values()), jnp.float32(0))
    exits = (outputs, *outputs.branches)
    accuracy = tuple(metrics.mean_of(jnp.argmax(x.logits, -1) == labels) for x in exits)
    return StepMetrics((loss, size), accuracy, pairs, weighted, None, {})


def _averaged(collections: Any, axis_name: str) -> Any:
    """Statistics that each device keeps of its share, averaged over the devices."""
    return jax.tree.map(
        lambda x: lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
        collections,
    )
