"""Methods on features and logits that are given: losses, gradients, statistics afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distill_jax import models
from distill_jax.methods import DML, Context, CrossEntropy, Hyper
from distill_jax.methods.fitnet import FitNet
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.cases import Case, Found
from experiments.parity.features import FEATURES
from experiments.parity.given import Arrays, Compute, Computed
from experiments.parity.logits import LOGITS
from experiments.parity.losses import outputs, terms_of
from experiments.parity.reviewed import REVIEWED
from experiments.parity.several import SEVERAL


def fitnet(numbers: dict[str, Any], inputs: Arrays, state: Arrays) -> Computed:
    """The hint through a regressor."""
    places: Places = {"regressor": ("0",)}
    student, teacher = inputs["student_feature"], inputs["teacher_feature"]
    context = Context(
        student=outputs(stem=student),
        teachers=(outputs(stem=teacher),),
        teacher_mask=jnp.ones(1, bool),
        labels=jnp.zeros(len(student), jnp.int32),
        hyper=Hyper(),
    )
    terms, after = FitNet(hint_layer=0).terms(variables_of(state, places), context)
    loss = jnp.mean(terms["fitnet"].value)
    return Computed({"hint": loss}, to_torch({"batch_stats": after["batch_stats"]}, places))


def dml(numbers: dict[str, Any], inputs: Arrays, state: Arrays) -> Computed:
    """Two networks with a loss each, or several with one loss for all."""
    pair = "logits1" in inputs
    logits = (
        [inputs["logits1"], inputs["logits2"]] if pair else jnp.moveaxis(inputs["logits"], 2, 0)
    )
    each = numbers.get("pairwise", True)
    method = DML(
        temperature=numbers["T"],
        targets="each" if each else "mean_logits",
        detached=numbers["detach"],
        epsilon=numbers.get("eps", 0.0),
    )
    losses = {}
    for i, own in enumerate(logits):
        others = [x for j, x in enumerate(logits) if j != i]
        shown = lax.stop_gradient(others) if method.detached else others
        context = Context(
            student=outputs(own),
            teachers=tuple(map(outputs, shown)),
            teacher_mask=jnp.ones(len(others), bool),
            labels=inputs["labels"],
            hyper=Hyper(),
        )
        terms = terms_of([CrossEntropy(), method], context)
        ce, kl = (term.weight * jnp.mean(term.value) for term in terms.values())
        kl = numbers.get("lambda_kd", 1.0) * kl
        losses |= {f"ce{i + 1}": ce, f"kd{i + 1}": kl, f"total{i + 1}": ce + kl}
    totals = [losses[f"total{i + 1}"] for i in range(len(logits))]
    return Computed({**losses, "total": sum(totals[1:], totals[0])})


# A family's table names the method of each of its files; families are added up here.
METHODS: dict[str, Compute] = {
    **LOGITS,
    **SEVERAL,
    **FEATURES,
    **REVIEWED,
    "fitnet": fitnet,
    "dml": dml,
}


SOLVER = 1e-3  # what weights that a solver stopped at are held to, and all that they weigh


def check_method(case: Case, dtype: str) -> Iterator[Found]:
    """Losses, gradients by inputs and adapters, and buffers, of each case of a method's file."""
    for name, given in case.meta["cases"].items():
        inputs = _some(case, name, "in", dtype)
        state = _some(case, name, "param", dtype) | _some(case, name, "buf", dtype)
        losses = [key.split(":")[0] for kind in _BY for key in _named(case, name, kind)]
        numbers = {**given, "case": name}
        compute = functools.partial(METHODS[case.meta["method"]], numbers)
        run = functools.partial(_everything, compute, tuple(dict.fromkeys(losses)))
        options = models.run_once(jax.default_backend())
        computed, gradients = jax.jit(run, compiler_options=options)(inputs, state)
        for loss in _named(case, name, "loss"):
            yield _found(case, f"{name}:loss:{loss}", computed.losses[loss], dtype)
        for buffer in _named(case, name, "bufafter"):
            yield _found(case, f"{name}:bufafter:{buffer}", computed.after[buffer], dtype)
        for out in _named(case, name, "out"):
            if out in computed.outs:
                yield _found(case, f"{name}:out:{out}", computed.outs[out], dtype)
        for kind, which in _BY.items():
            for key in _named(case, name, kind):
                loss, by = key.split(":", 1)
                undefined = computed.undefined.get(by)
                gradient = gradients[loss][which][by]
                yield _found(case, f"{name}:{kind}:{key}", gradient, dtype, undefined)


_BY = {"grad": 0, "gparam": 1}  # by inputs, by adapters


def _everything(
    compute: Callable[[Arrays, Arrays], Computed],
    losses: tuple[str, ...],
    inputs: Arrays,
    state: Arrays,
) -> tuple[Computed, dict[str, tuple[Arrays, Arrays]]]:
    """What a method gives, and gradients of some of its losses by all inputs and adapters."""
    floats = {k: x for k, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def values(floats: Arrays, state: Arrays) -> tuple[Arrays, Computed]:
        computed = compute({**inputs, **floats}, state)
        return {name: computed.losses[name] for name in losses}, computed

    found, pull, computed = jax.vjp(values, floats, state, has_aux=True)
    zeros = jax.tree.map(jnp.zeros_like, found)
    return computed, {name: pull({**zeros, name: jnp.ones_like(found[name])}) for name in losses}


def _found(case: Case, key: str, ours: Any, dtype: str, undefined: Any = None) -> Found:
    """Float64 is held to 1e-6 of the noise of float32, at least 1e-9."""
    if case.meta["arrays"][key].get("zero"):  # zero but for rounding in the reference
        return Found(key, float(jnp.max(jnp.abs(ours))), case.bound(key))
    noise = case.meta["noise"].get(key, 0.0)
    bound = max(1e-9, 1e-6 * noise) if dtype == "float64" else 0.0
    if "tol" in case.meta["cases"][key.partition(":")[0]]:
        bound = SOLVER
    reference = case.arrays[key]
    if undefined is not None:
        ours, reference = ours[~undefined], reference[~undefined]
    return case.compare(key, ours, reference, bound)


def _named(case: Case, name: str, kind: str) -> list[str]:
    start = f"{name}:{kind}:"
    return [key.removeprefix(start) for key in case.arrays if key.startswith(start)]


def _some(case: Case, name: str, kind: str, dtype: str) -> Arrays:
    found = {}
    for key in _named(case, name, kind):
        array = case.arrays[f"{name}:{kind}:{key}"]
        found[key] = jnp.asarray(array, dtype if array.dtype.kind == "f" else None)
    return found
