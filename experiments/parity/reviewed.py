"""Methods that compare each level with several others: ReviewKD and SemCKD."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp

from distill_jax.methods import ReviewKD, SemCKD, adapters
from distill_jax.methods.review import pyramid_gap
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.features import context_of, maps
from experiments.parity.given import Arrays, Compute, Computed
from experiments.parity.losses import outputs

Numbers = dict[str, Any]


def reviewkd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Fused levels against the teacher's, or the comparison of given ones alone."""
    student, teacher = maps(inputs)
    if not state:
        each = [jnp.mean(pyramid_gap(*pair)) for pair in zip(student, teacher, strict=True)]
        levels = {f"level{i}": value for i, value in enumerate(each)}
        return Computed({"hcl": sum(each[1:], each[0]), **levels})
    start = "reviewkd."
    places: Places = {"abfs": ("0",)}
    variables = variables_of({k.removeprefix(start): x for k, x in state.items()}, places)
    # The last level is the vector before the classifier.
    context = context_of(
        outputs(feature=student[-1][:, 0, 0], stages=student[:-1]),
        outputs(feature=teacher[-1][:, 0, 0], preacts=teacher[:-1]),
    )
    method = ReviewKD(warmup_epochs=0.0, max_channels=numbers["mid"])
    terms, after = method.terms(variables, context)
    own = adapters.of_module(variables, "0")
    fused, _ = adapters.applied(method.module(list(teacher)), own, list(student), context)
    buffers = to_torch({"batch_stats": after["batch_stats"]}, places)
    return Computed(
        {"hcl": jnp.mean(terms["reviewkd"].value)},
        {f"{start}{k}": x for k, x in buffers.items()},
        out={f"fused{i}": x for i, x in enumerate(fused)},
    )


def semckd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The stages of both weighed by how alike they are; its queries, keys and regressors."""
    own = {_short(key): x for key, x in state.items()}
    places: Places = {first: ("0", first) for first in {key.split(".")[0] for key in own}}
    variables = variables_of(own, places)
    student, teacher = maps(inputs)
    context = context_of(outputs(stages=student), outputs(stages=teacher))
    method = SemCKD(factor=numbers["factor"])
    terms, after = method.terms(variables, context)
    given = adapters.of_module(variables, "0")
    attention, _, _ = method.compared(given, context.teachers[0], context)
    buffers = to_torch({"batch_stats": after["batch_stats"]}, places)
    return Computed(
        {"semckd": jnp.mean(terms["semckd"].value)},
        {key: buffers[_short(key)] for key in state if _short(key) in buffers},
        out={"attention": attention},
    )


def _short(key: str) -> str:
    """ "attention.regressor01.regressor.0.weight" is "regressor0_1.0.weight" of ours."""
    key = key.removeprefix("attention.").replace(".regressor.", ".")
    return re.sub(r"^regressor(\d)(\d)\.", r"regressor\1_\2.", key)


REVIEWED: dict[str, Compute] = {"reviewkd": reviewkd, "semckd": semckd}
