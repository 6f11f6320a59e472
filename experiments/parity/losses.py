"""The loss of TAKD and DGKD, and that of TESKD, on logits and features that are given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.methods import (
    KD,
    TESKD,
    Context,
    CrossEntropy,
    Hyper,
    LossOptions,
    Term,
    total,
)
from distill_jax.methods.losses import cross_entropy
from distill_jax.models import Outputs
from experiments.parity.cases import Case, Found

# The cases' third column counts the cross-entropy by the teachers that are kept.
LOSSES = {
    "element_mean": LossOptions(kl_reduction="element_mean"),
    "batch_mean": LossOptions(),
    "batch_mean_ce_per_teacher": LossOptions(cross_entropy="per_kept_teacher"),
}


def outputs(logits: Any = None, feature: Any = None, **others: Any) -> Outputs:
    """Outputs of which only some matter."""
    return Outputs(logits, feature, others.pop("stages", ()), **others)


def terms_of(methods: list[Any], context: Context) -> dict[str, Term]:
    """The terms of methods without variables."""
    return {k: term for method in methods for k, term in method.terms({}, context)[0].items()}


def check_multi_teacher(case: Case, dtype: str) -> Iterator[Found]:
    """Totals of the multi-teacher loss and their gradients, for each option, T, λ and mask."""
    student, teachers = (jnp.asarray(case.arrays[k], dtype) for k in ("student", "teachers"))

    def loss(logits, options, mask, temperature, kd_weight):
        context = Context(
            student=outputs(logits),
            teachers=tuple(outputs(x) for x in teachers),
            teacher_mask=mask,
            labels=case.arrays["labels"],
            hyper=Hyper(temperature=temperature, kd_weight=kd_weight),
        )
        return total(terms_of([CrossEntropy(options), KD(options)], context))

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    ce = jnp.mean(cross_entropy(student, case.arrays["labels"]))
    for i, one in enumerate(case.meta["cases"]):
        yield case.compare(f"ce {i}", ce, one["ce"])
        mask, gradients = jnp.asarray(one["mask"], bool), []
        for name, options in LOSSES.items():
            value, gradient = both(student, options, mask, one["T"], one["lam"])
            gradients.append(gradient)
            yield case.compare(f"{name} {i}", value, one[name])
        yield case.compare(f"grads_{i}", jnp.stack(gradients))


def teskd(meta: dict[str, Any], **changes: Any) -> TESKD:
    """The method with the weights of a case."""
    names = ("temperature", "ce_weight", "kd_weight", "fea_weight")
    return TESKD(*(changes.get(name, meta.get(name)) for name in names))


def check_self_distillation(case: Case, dtype: str) -> Iterator[Found]:
    """The terms of TESKD's loss, its total, and gradients of all logits and features."""
    logits, features = (jnp.asarray(case.arrays[k], dtype) for k in ("logits", "features"))
    labels = case.arrays["labels"]
    for i, one in enumerate(case.meta["cases"]):
        method = teskd(case.meta, fea_weight=one["fea_weight"])

        def loss(logits, features, method=method):
            exits = [outputs(*pair) for pair in zip(logits, features, strict=True)]
            context = Context(
                student=exits[0]._replace(branches=tuple(exits[1:])),
                teachers=(),
                teacher_mask=jnp.ones(0, bool),
                labels=labels,
                hyper=Hyper(),
                batch_size=len(labels),
            )
            terms = terms_of([method], context)
            return total(terms), {name: term.value.mean() for name, term in terms.items()}

        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (value, terms), gradients = both(logits, features)
        yield case.compare(f"total {i}", value, one["total"])
        for ours, theirs in (("ce", "ce"), ("kl", "kd"), ("feature", "fea")):
            yield case.compare(f"{theirs} {i}", terms[f"teskd_{ours}"], one[theirs])
        yield case.compare(f"grad_logits_{i}", gradients[0])
        yield case.compare(f"grad_features_{i}", gradients[1])
