"""Methods on features and logits that are given: losses, gradients, statistics afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distill_jax.methods import DML, KD, Context, CrossEntropy, Hyper
from distill_jax.methods.fitnet import FitNet
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.cases import Case, Found
from experiments.parity.features import FEATURES
from experiments.parity.given import Arrays, Compute, Computed
from experiments.parity.losses import outputs, terms_of


def kd(numbers: dict[str, Any], inputs: Arrays, state: Arrays) -> Computed:
    """KD and the cross-entropy, and their weighted sum."""
    context = Context(
        student=outputs(inputs["student_logits"]),
        teachers=(outputs(inputs["teacher_logits"]),),
        teacher_mask=jnp.ones(1, bool),
        labels=inputs["labels"],
        hyper=Hyper(temperature=numbers["T"], kd_weight=1.0),
    )
    terms = terms_of([CrossEntropy(), KD()], context)
    found = {"ce": jnp.mean(terms["ce"].value)}
    found["kd"] = terms["kl"].weight * jnp.mean(terms["kl"].value)
    return Computed(found | {"total": numbers["r"] * found["ce"] + numbers["a"] * found["kd"]})


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


METHODS: dict[str, Compute] = {"kd": kd, "fitnet": fitnet, "dml": dml, **FEATURES}


def check_method(case: Case, dtype: str) -> Iterator[Found]:
    """Losses, gradients by inputs and adapters, and buffers, of each case of a method's file."""
    compute = METHODS[case.meta["method"]]
    for name, numbers in case.meta["cases"].items():
        inputs = _some(case, name, "in", dtype)
        state = _some(case, name, "param", dtype) | _some(case, name, "buf", dtype)
        wanted = _named(case, name, "loss")
        run = jax.jit(lambda i, s, numbers=numbers: compute(numbers, i, s))
        computed = run(inputs, state)
        for loss in wanted:
            yield _found(case, f"{name}:loss:{loss}", computed.losses[loss], dtype)
        for buffer in _named(case, name, "bufafter"):
            yield _found(case, f"{name}:bufafter:{buffer}", computed.after[buffer], dtype)
        yield from _gradients(case, name, run, inputs, state, dtype, computed.undefined)


def _gradients(
    case: Case, name: str, run, inputs, state, dtype: str, undefined: Arrays
) -> Iterator[Found]:
    floats = {k: x for k, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    keys = [
        (kind, *x.split(":", 1)) for kind in ("grad", "gparam") for x in _named(case, name, kind)
    ]
    gradients = {}
    for loss in dict.fromkeys(loss for _, loss, _ in keys):

        def value(floats, state, loss=loss):
            return run({**inputs, **floats}, state).losses[loss]

        by_inputs, by_state = jax.jit(jax.grad(value, (0, 1)))(floats, state)
        gradients["grad", loss], gradients["gparam", loss] = by_inputs, by_state
    for kind, loss, by in keys:
        gradient = gradients[kind, loss][by]
        yield _found(case, f"{name}:{kind}:{loss}:{by}", gradient, dtype, undefined.get(by))


def _found(case: Case, key: str, ours: Any, dtype: str, undefined: Any = None) -> Found:
    """Float64 is held to 1e-6 of the noise of float32, at least 1e-9."""
    if case.meta["arrays"][key].get("zero"):  # zero but for rounding in the reference
        return Found(key, float(jnp.max(jnp.abs(ours))), case.bound(key))
    noise = case.meta["noise"].get(key, 0.0)
    bound = max(1e-9, 1e-6 * noise) if dtype == "float64" else 0.0
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
