"""The terms of a student's loss: what each of its methods is shown, and what it makes of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from distill_jax.data.task import text_of
from distill_jax.methods import Context, Hyper, Method, Term, heard
from distill_jax.methods.base import DATA_NEEDS
from distill_jax.models import Network, Outputs, Variables
from distill_jax.train import optim
from distill_jax.train.teachers import APPLY, HEAD, FrozenTeachers, FrozenVariables, TeacherOutputs

Methods = tuple[tuple[str, Method], ...]  # those of a network by name, in the order of their terms
DrawMask = Callable[[Array, Array, Hyper], Array]  # (key, step, hyper) -> (K,) booleans
Teaching = tuple[Variables, ...] | FrozenVariables  # the teachers' variables


class Student(NamedTuple):
    """A network that a step trains.

    Args:
      network: the network.
      methods: the terms of its loss.
      optimizer: the update rule.
      schedule: learning rate of a step.
      frozen: the places of its frozen teachers among those of the step, largest first.
      live: the names of those that teach it and are trained by the same step.
      draw_mask: which frozen teachers teach this mini-batch, see `step.draw_from`; None keeps all.
    """

    network: Network
    methods: Methods
    optimizer: optim.OptimOptions
    schedule: optim.Schedule
    frozen: tuple[int, ...] = ()
    live: tuple[str, ...] = ()
    draw_mask: DrawMask | None = None

    @property
    def name(self) -> str:
        """That of its network."""
        return self.network.name

    def heard(self, method: Method) -> tuple[int, ...]:
        """The places among its teachers, frozen ones first, of those that a method hears."""
        methods = [other for _, other in self.methods]
        return heard(method, methods, self.name, len(self.frozen), self.live)


class Frozen(NamedTuple):
    """What the frozen teachers of a step show of themselves.

    Args:
      outputs: of each.
      heads: feature -> logits by each one's classifier; empty where no method asks for it.
      apply: (k, inputs) -> outputs of teacher k; None likewise.
    """

    outputs: tuple[Outputs, ...] = ()
    heads: tuple[Callable[[Array], Array], ...] = ()
    apply: Callable[[int, Any], Outputs] | None = None


class Live(NamedTuple):
    """A network in training, as it and its peers see it.

    Args:
      outputs: on the batch, in training mode.
      params: its parameters.
      head: (params, feature) -> logits by its classifier.
      apply: (params, inputs) -> its outputs for other inputs, in training mode.
      others: by data need its outputs on what is seen besides, likewise.
    """

    outputs: Outputs
    params: Any
    head: Callable[[Any, Array], Array]
    apply: Callable[[Any, Any], Outputs]
    others: Mapping[str, Outputs] = {}


def teacher_needs(methods: Methods) -> tuple[str, ...]:
    """The outputs that methods need of teachers besides the logits, each once."""
    wanted = {name: None for _, method in methods for name in method.needs}
    return tuple(name for name in wanted if name not in ("logits", APPLY, HEAD))


def data_needs(methods: Methods) -> tuple[str, ...]:
    """What methods need of the data besides the batch, in the order of `DATA_NEEDS`."""
    wanted = {name for _, method in methods for name in method.data_needs}
    return tuple(name for name in DATA_NEEDS if name in wanted)


def needs_variables(methods: Methods) -> bool:
    """Whether a method asks teachers more than their outputs on the batch."""
    return any({APPLY, HEAD} & set(method.needs) for _, method in methods)


def frozen_shown(
    frozen: FrozenTeachers, outputs: TeacherOutputs, variables: Teaching, methods: Methods
) -> Frozen:
    """What methods are shown of frozen teachers: their outputs, and more where one asks for it."""
    if not needs_variables(methods):
        return Frozen(outputs.each())

    def own(k):
        return lax.stop_gradient(frozen.variables_of(k, variables))

    heads = tuple(
        lambda feature, k=k, network=network: network.head(own(k), feature)
        for k, network in enumerate(frozen.networks)
    )
    return Frozen(
        outputs.each(), heads, lambda k, inputs: frozen.networks[k].apply(own(k), inputs)[0]
    )


def student_terms(
    student: Student,
    variables: dict[str, Variables],
    context: Context,
    frozen: Frozen,
    live: Mapping[str, Live],
    drawn: Array | None,
    key_of: Callable[[str], Array],
) -> tuple[dict[str, Term], dict[str, Variables]]:
    """The terms of a student's methods, each times the method's weight, and their collections.

    Args:
      student: whose loss they are.
      variables: of its methods, by name.
      context: of the step, without what the student and its teachers show.
      frozen: the frozen teachers of the step.
      live: the networks that the step trains, by name.
      drawn: (K,) of its frozen teachers those of this mini-batch; None keeps all.
      key_of: a method's random key by its name.

    Raises:
      ValueError: two methods give a term of one name, or one a term of another shape.
    """
    own = live[student.name]
    mask = jnp.ones(len(student.frozen), bool) if drawn is None else drawn
    if student.live:
        mask = jnp.concatenate([mask, jnp.ones(len(student.live), bool)])
    terms: dict[str, Term] = {}
    collections = {}
    for name, method in student.methods:
        places = student.heard(method)
        shown = dataclasses.replace(
            context,
            student=own.outputs,
            head=functools.partial(own.head, own.params),
            student_apply=functools.partial(own.apply, own.params),
            view=own.others.get("view"),
            partner=own.others.get("partner"),
            teacher_mask=mask if len(places) == len(mask) else mask[np.asarray(places, int)],
            key=key_of(name),
            **_teachers_shown(student, method, frozen, live),
        )
        _check_labels(name, method, variables.get(name, {}), shown)
        given, after = _given(name, method, variables.get(name, {}), shown)
        if double := terms.keys() & given.keys():
            raise ValueError(f"{student.name}: two methods give a term {', '.join(double)}")
        for term, (value, _) in given.items():
            if jnp.shape(value) not in ((), context.labels.shape):
                raise ValueError(
                    f"method {name!r} gives {term} of shape {jnp.shape(value)}: expected a number "
                    f"an example, {context.labels.shape}, or one for the batch, ()"
                )
        factor = context.hyper.methods.get(name, 1.0)
        terms |= {k: Term(term.value, factor * term.weight) for k, term in given.items()}
        if name in variables:
            collections[name] = {kind: x for kind, x in after.items() if kind != "params"}
    return terms, collections


def _given(
    name: str, method: Method, variables: Any, context: Context
) -> tuple[dict[str, Term], dict[str, Any]]:
    """What a method gives; ValueError where that is not terms and the variables that it keeps."""
    given = method.terms(variables, context)
    pair = isinstance(given, tuple) and len(given) == 2
    if not pair or not all(isinstance(part, Mapping) for part in given):
        raise ValueError(
            f"terms of method {name!r} gives {_kinds(given)}: expected two dicts, {{name: Term}} "
            "and its variables"
        )
    terms, after = given
    for term, own in terms.items():
        if not isinstance(own, tuple) or len(own) != 2:
            raise ValueError(
                f"method {name!r} gives {term} as {type(own).__name__}: expected a Term"
            )
    before, kept = ({k: v for k, v in x.items() if k != "params"} for x in (variables, after))
    if variables and _shapes(before) != _shapes(kept):
        raise ValueError(
            f"method {name!r} keeps {text_of(kept)} of its variables: expected what it was given, "
            f"{text_of(before)}"
        )
    return terms, after


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [
        (jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)
    ]


def _kinds(given: Any) -> str:
    return (
        f"{[type(x).__name__ for x in given]}" if isinstance(given, tuple) else type(given).__name__
    )


def _check_labels(name: str, method: Method, variables: Any, context: Context) -> None:
    """Raises ValueError where a method takes the first label of mixed images for the only one."""
    if context.mixed is None or method.mixes_labels:
        return
    traced = jax.make_jaxpr(
        lambda labels: method.terms(variables, dataclasses.replace(context, labels=labels))
    )(context.labels).jaxpr
    used = [x for equation in traced.eqns for x in equation.invars]
    if any(x is traced.invars[0] for x in (*used, *traced.outvars)):
        raise ValueError(
            f"method {name!r} reads the label of an example, and mixup and cutmix give it two: "
            "expected methods that read none, as kd, or that count both, as ce; or recipe.mixup "
            "and recipe.cutmix 0"
        )


def _teachers_shown(
    student: Student, method: Method, frozen: Frozen, live: Mapping[str, Live]
) -> dict[str, Any]:
    """The fields of `Context` by which a method sees the teachers that it hears."""
    outputs, heads, applies = [], [], []
    for place in student.heard(method):
        if place < len(student.frozen):
            k = student.frozen[place]
            outputs.append(frozen.outputs[k])
            if frozen.apply is not None:
                heads.append(frozen.heads[k])
                applies.append(functools.partial(frozen.apply, k))
        else:
            peer = live[student.live[place - len(student.frozen)]]
            if method.detached:
                stopped = lax.stop_gradient((peer.outputs, peer.params))
                peer = Live(*stopped, peer.head, peer.apply)
            outputs.append(peer.outputs)
            heads.append(functools.partial(peer.head, peer.params))
            applies.append(functools.partial(peer.apply, peer.params))
    shown: dict[str, Any] = {"teachers": tuple(outputs)}
    if needs_variables((("", method),)):
        shown["teacher_heads"] = tuple(heads)
        shown["teacher_apply"] = lambda k, inputs: applies[k](inputs)
    return shown
