"""Methods of several teachers: each case is a method of its own."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from distill_jax.methods import AEKD, AVER, CAMKD, EBKD, KD, CrossEntropy, Hyper, LossOptions
from distill_jax.methods.ca_mkd import confidence
from distill_jax.methods.losses import cross_entropy, kl_divergence
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.given import Arrays, Compute, Computed, on_logits, sums, weighted
from experiments.parity.losses import outputs

Numbers = dict[str, Any]


def average(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The mean of the teachers' KLs, and the KL to their mean."""
    context = on_logits(inputs, Hyper(temperature=numbers["T"], kd_weight=1.0))
    kl = sums([KD(LossOptions(teachers="mean"))], context)["kl"]
    mean = sums([AVER(temperature=numbers["T"])], context)["aver"]
    ce = sums([CrossEntropy()], context)["ce"]
    total = numbers.get("gamma", 1.0) * ce + numbers.get("alpha", 1.0) * kl
    return Computed({"mean_of_losses": kl, "mean_of_softmax": mean, "ce": ce, "total": total})


def on_labels(method: Any) -> Compute:
    """A method of logits beside the cross-entropy."""

    def compute(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
        context = on_logits(inputs)
        ce = sums([CrossEntropy()], context)["ce"]
        taught = sum(sums([method(numbers)], context).values())
        return Computed({"ce": ce, "total": numbers["gamma"] * ce + numbers["alpha"] * taught})

    return compute


def ae_kd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The weights of the teachers, and what they follow from."""
    temperature, size = numbers["T"], len(inputs["labels"])
    context = on_logits(inputs)
    method = AEKD(temperature=temperature, limit=numbers["C"], normalise=numbers["svm_norm"])
    gradients = method.gradients(context)
    kl = kl_divergence(context.teacher_logits, context.student.logits, temperature)
    results = {
        "weights": method.weights(gradients, context.teacher_mask),
        "mean_gradients": gradients * temperature / size,  # theirs is averaged over it twice
        "teacher_losses": temperature**2 * jnp.mean(kl, 1),
    }
    computed = on_labels(lambda _: method)(numbers, inputs, state)
    return computed._replace(out=results)


def ca_mkd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """With features: adapters of the student's map, each teacher's own classifier on them."""
    count = len(inputs["teacher_logits"])
    places: Places = {f"{x}{k}": (str(k), x) for x in _LAYERS for k in range(count)}
    renamed = {_short(key): x for key, x in state.items() if key.startswith("adapter.")}
    context = on_logits(inputs, epoch=1.0)
    heads = [(state[f"teacher{k}_fc.weight"], state[f"teacher{k}_fc.bias"]) for k in range(count)]
    context = dataclasses.replace(
        context,
        student=outputs(inputs["student_logits"], stages=(inputs["student_feature"],)),
        teachers=tuple(
            outputs(inputs["teacher_logits"][k], stages=(inputs[f"teacher_feature{k}"],))
            for k in range(count)
        ),
        teacher_heads=tuple(lambda x, w=w, b=b: x @ w.T + b[None] for w, b in heads),
    )
    method, variables = (
        CAMKD(temperature=numbers["T"], feature_weight=1.0),
        variables_of(renamed, places),
    )
    terms, after = method.terms(variables, context)
    found = {**weighted(terms), **sums([CrossEntropy()], context)}
    total = (
        numbers["gamma"] * found["ce"]
        + numbers["alpha"] * found["ca_mkd"]
        + numbers["beta"] * found["ca_mkd_feature"]
    )
    buffers = to_torch({"batch_stats": after["batch_stats"]}, places)
    return Computed(
        {"ce": found["ce"], "feature": found["ca_mkd_feature"], "total": total},
        {key: buffers[_short(key)] for key in state if _short(key) in buffers},
        out={
            "weights_logits": confidence(
                context, cross_entropy(context.teacher_logits, context.labels)
            ),
            "weights_feature": confidence(context, method.compared(variables, context)[0]),
        },
    )


_LAYERS = ("conv", "bn")


def _short(key: str) -> str:
    """ "adapter.embed0.transfer.1.weight", of the second layer, as "bn0.weight"."""
    named = re.fullmatch(r"adapter\.embed(\d+)\.transfer\.(\d)\.(\w+)", key)
    return f"{_LAYERS[int(named[2])]}{named[1]}.{named[3]}" if named else key


METHODS: dict[str, Compute] = {
    "average": average,
    "aver": average,
    "ebkd": on_labels(lambda n: EBKD(temperature=n["T"])),
    "aekd": ae_kd,
    "camkd_logits": on_labels(lambda n: CAMKD(temperature=n["T"], feature_weight=0.0)),
    "camkd": ca_mkd,
}


def multi_teacher(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The method that a case is named after, the longest that fits: aekd_large is aekd."""
    names = [name for name in METHODS if numbers["case"].startswith(name)]
    if not names:
        raise ValueError(f"case {numbers['case']!r} is named after none of {', '.join(METHODS)}")
    return METHODS[max(names, key=len)](numbers, inputs, state)


SEVERAL: dict[str, Compute] = {"multi_teacher": multi_teacher}
