"""Methods that compare each level with several others: ReviewKD, SemCKD and FRSKD."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from distill_jax.methods import FRSKD, ReviewKD, SemCKD, adapters
from distill_jax.methods.losses import cross_entropy
from distill_jax.methods.review import pyramid_gap
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.features import context_of, maps
from experiments.parity.given import Arrays, Compute, Computed, on_logits, weighted
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


def frskd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The network's own stages through a pyramid, whose classifier is its teacher."""
    ours = {key: _of_pyramid(key, x) for key, x in state.items()}
    places: Places = {first: (first,) for first in {name.split(".")[0] for name in ours.values()}}
    variables = variables_of({ours[key]: x for key, x in state.items()}, places)
    count = sum(name.startswith("features") for name in inputs)
    stages = tuple(inputs[f"features{i}"] for i in range(count))
    context = dataclasses.replace(
        on_logits({"student_logits": inputs["logits"], "labels": inputs["labels"]}),
        student=outputs(inputs["logits"], stages=stages),
    )
    method = FRSKD(
        temperature=numbers["T"],
        kd_weight=numbers["alpha"],
        feature_weight=numbers["beta"],
        width=numbers["width"],
        depth=numbers["depth"],
    )
    terms, after = method.terms(variables, context)
    ce = jnp.mean(cross_entropy(inputs["logits"], inputs["labels"]))
    bare = {name: jnp.mean(term.value) for name, term in terms.items()}
    module = method.module(inputs["logits"].shape[-1])
    (refined, logits), _ = adapters.applied(module, variables, list(stages), context)
    buffers = to_torch({"batch_stats": after["batch_stats"]}, places)
    return Computed(
        {
            "ce": ce,
            "ce_bifpn": bare["frskd_ce"],
            "kd": bare["frskd_kl"] * method.temperature**2,
            "at": bare["frskd_at"],
            "total": ce + sum(weighted(terms).values()),
        },
        {key: buffers[name] for key, name in ours.items() if name in buffers},
        out={"bifpn_logits": logits, **{f"bifpn_feature{i}": x for i, x in enumerate(refined)}},
    )


# Lists of theirs by ours, and which stage their first is of.
_PYRAMID = {
    "lat_conv": ("lateral", 0),
    "lat_conv2": ("second_lateral", 1),
    **{f"up_{part}": (f"up_{part}", 0) for part in ("conv", "weight", "sample")},
    **{f"down_{part}": (f"down_{part}", 1) for part in ("conv", "weight", "sample")},
}


def _of_pyramid(key: str, array: Any) -> str:
    """ "bifpn.layers.0.down_conv.0.conv.1.2.weight", 1×1, is "down_conv1.1_pointwise.weight"."""
    if key.startswith("bifpn.fc."):
        return key.removeprefix("bifpn.")
    form = r"bifpn\.layers\.0\.(\w+)\.(\d+)(?:(?:\.1)?\.conv\.(\d+)\.\d+\.(\w+))?"
    named = re.fullmatch(form, key)
    if named is None or named[1] not in _PYRAMID:
        raise ValueError(f"{key} is no part of a pyramid of one layer")
    part, first = _PYRAMID[named[1]]
    module = f"{part}{int(named[2]) + first}"
    if named[3] is None:  # what weighs the maps of a sum
        return f"{module}.weight"
    size = array.shape[-1] if array.ndim == 4 else 0
    layer = {0: "norm", 1: "pointwise"}.get(size, "depthwise")
    return f"{module}.{named[3]}_{layer}.{named[4]}"


REVIEWED: dict[str, Compute] = {"reviewkd": reviewkd, "semckd": semckd, "frskd": frskd}
