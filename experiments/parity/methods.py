"""Methods on features and logits that are given: losses, gradients, statistics afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distill_jax import models
from distill_jax.methods import DML, Context, CrossEntropy, Hyper, adapters
from distill_jax.methods.fitnet import FitNet, Regressor
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.branched import BRANCHED
from experiments.parity.cases import Case, Found
from experiments.parity.contrasted import crd
from experiments.parity.factors import FACTORS
from experiments.parity.features import FEATURES
from experiments.parity.given import Arrays, Compute, Computed
from experiments.parity.logits import LOGITS
from experiments.parity.losses import outputs, terms_of
from experiments.parity.reviewed import REVIEWED
from experiments.parity.several import SEVERAL
from experiments.parity.views import VIEWS


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
    variables = variables_of(state, places)
    terms, after = FitNet(hint_layer=0).terms(variables, context)
    height, width, channels = teacher.shape[1:]
    regressor = Regressor((height, width, channels))
    own = adapters.of_module(variables, "0")
    regressed, _ = adapters.applied(regressor, own, student, context)
    return Computed(
        {"hint": jnp.mean(terms["fitnet"].value)},
        to_torch({"batch_stats": after["batch_stats"]}, places),
        out={"regressed": regressed},
    )


def dml(numbers: dict[str, Any], inputs: Arrays, state: Arrays) -> Computed:
    """Two networks with a loss each, or several with one loss for all."""
    together = "logits" in inputs
    count = sum(name.startswith("logits") for name in inputs)
    logits = (
        [*jnp.moveaxis(inputs["logits"], 2, 0)]
        if together
        else [inputs[f"logits{i + 1}"] for i in range(count)]
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
    **FACTORS,
    **BRANCHED,
    **VIEWS,
    "fitnet": fitnet,
    "dml": dml,
    "crd": crd,
}


SOLVER = 1e-3  # what weights that a solver stopped at are held to, and all that they weigh


def check_method(case: Case, dtype: str) -> Iterator[Found]:
    """Of each case of a method's file, all that the method gives of what is stored."""
    for name, given in case.meta["cases"].items():
        inputs = _some(case, name, "in", dtype)
        state = _some(case, name, "param", dtype) | _some(case, name, "buf", dtype)
        losses = [key.split(":")[0] for kind in _BY for key in _named(case, name, kind)]
        shapes = {key: case.arrays[f"{name}:out:{key}"].shape for key in _named(case, name, "out")}
        numbers = {**given, "case": name, "shapes": shapes}
        compute = functools.partial(METHODS[case.meta["method"]], numbers)
        run = functools.partial(_everything, compute, tuple(dict.fromkeys(losses)))
        options = models.run_once(jax.default_backend())
        computed, gradients = jax.jit(run, compiler_options=options)(inputs, state)
        for kind, ours in (
            ("loss", computed.losses),
            ("bufafter", computed.after),
            ("out", computed.out),
        ):
            for key in _named(case, name, kind):
                if key in ours:
                    yield _found(case, f"{name}:{kind}:{key}", ours[key], dtype)
        for kind, which in _BY.items():
            for key in _named(case, name, kind):
                loss, by = key.split(":", 1)
                if loss in gradients and by in gradients[loss][which]:
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
        return {name: computed.losses[name] for name in losses if name in computed.losses}, computed

    found, pull, computed = jax.vjp(values, floats, state, has_aux=True)
    zeros = jax.tree.map(jnp.zeros_like, found)
    return computed, {name: pull({**zeros, name: jnp.ones_like(x)}) for name, x in found.items()}


def _found(case: Case, key: str, ours: Any, dtype: str, undefined: Any = None) -> Found:
    """Float64 is held to 1e-6 of the noise of float32, at least 1e-9."""
    if case.meta["arrays"].get(key, {}).get("zero"):  # zero but for rounding in the reference
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
