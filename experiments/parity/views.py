"""Methods of views, partners and past predictions: all of them are given as logits."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import lax

from distill_jax.methods import CSKD, DDGSD, KDCL, PSKD, CrossEntropy
from experiments.parity.given import Arrays, Compute, Computed, on_logits, sums, weighted
from experiments.parity.losses import outputs, terms_of

Numbers = dict[str, Any]


def cs_kd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The first half of the batch taught by the second, its partners in the same order."""
    half = len(inputs["labels"]) // 2
    own, partners = inputs["logits"][:half], inputs["logits"][half:]
    context = on_logits(
        {"student_logits": own, "labels": inputs["labels"][:half]}, partner=outputs(partners)
    )
    found = sums([CrossEntropy(), CSKD(temperature=numbers["T"])], context)
    total = found["ce"] + numbers["lamda"] * found["cs_kd"]
    return Computed({"ce": found["ce"], "cls": found["cs_kd"], "total": total})


def ps_kd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The loss, and the memory after it."""
    context = on_logits(
        inputs,
        index=inputs["indices"],
        epoch=float(numbers["epoch"]),
        epochs=float(numbers["end_epoch"]),
    )
    variables = {"memory": {"probabilities": inputs["past_probabilities"]}}
    terms, after = PSKD(alpha=numbers["alpha_T"]).terms(variables, context)
    stored = after["memory"]["probabilities"]
    return Computed({"total": weighted(terms)["ps_kd"]}, out={"stored_after": stored})


def ddgsd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The cross-entropies of both views, and what compares them."""
    given = {"student_logits": inputs["logits_a"], "labels": inputs["labels"]}
    context = on_logits(given, view=outputs(inputs["logits_b"]))
    method = DDGSD(
        temperature=numbers["T"],
        divergence_weight=numbers["lmbda"],
        distance_weight=numbers["mu"],
    )
    return Computed({"total": sum(sums([CrossEntropy(), method], context).values())})


def kdcl_mean(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The loss of each network, taught by the mean of all."""
    method, losses = KDCL(temperature=numbers["T"], alpha=numbers["alpha"]), {}
    logits = [inputs[f"logits{i}"] for i in range(numbers["nets"])]
    for i, own in enumerate(logits):
        others = [outputs(lax.stop_gradient(x)) for j, x in enumerate(logits) if j != i]
        context = on_logits({"student_logits": own, "labels": inputs["labels"]})
        context = dataclasses.replace(context, teachers=tuple(others))
        losses[f"total{i}"] = sum(weighted(terms_of([method], context)).values())
    return Computed(losses)


VIEWS: dict[str, Compute] = {
    "cskd": cs_kd,
    "pskd": ps_kd,
    "ddgsd": ddgsd,
    "kdcl_mean": kdcl_mean,
}
