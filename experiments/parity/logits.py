"""Methods on logits that are given: what each file's cases ask of which method."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from distill_jax.methods import (
    CTKD,
    DIST,
    DKD,
    KD,
    CrossEntropy,
    Hyper,
    LabelSmoothing,
    LossOptions,
    MSELogits,
    NormKD,
    TfKDReg,
    TfKDSelf,
)
from distill_jax.methods.scaling import standardise
from experiments.parity.given import Arrays, Compute, Computed, on_logits, sums, weighted

Numbers = dict[str, Any]


def _kd(temperature: float, inputs: Arrays, **options: Any) -> Arrays:
    """{"ce", "kl"}, each of weight 1."""
    context = on_logits(inputs, Hyper(temperature=temperature, kd_weight=1.0))
    return sums([CrossEntropy(), KD(LossOptions(**options))], context)


def kd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """KD and the cross-entropy, and their weighted sum."""
    found = _kd(numbers["T"], inputs)
    total = numbers["r"] * found["ce"] + numbers["a"] * found["kl"]
    return Computed({"ce": found["ce"], "kd": found["kl"], "total": total})


def _dkd(numbers: Numbers, inputs: Arrays, temperature: str = "T", **options: Any) -> Arrays:
    """The parts of DKD without its weights, and the sum with them; no warm-up."""

    def parts(alpha: float, beta: float) -> Arrays:
        given = {"alpha": alpha, "beta": beta, "warmup_epochs": 0.0, **options}
        return sums([DKD(temperature=numbers[temperature], **given)], on_logits(inputs))

    both = parts(numbers["alpha"], numbers["beta"])
    return {**parts(1.0, 1.0), "dkd": both["tckd"] + both["nckd"]}


def dkd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Both parts and their weighted sum."""
    return Computed(_dkd(numbers, inputs))


def logit_standardisation(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """KD or DKD of standardised logits."""
    if "alpha" in numbers:
        return Computed(_dkd(numbers, inputs, scaling="standardise"))
    found = _kd(numbers["T"], inputs, standardise=True)
    total = numbers["ce_weight"] * found["ce"] + numbers["kd_weight"] * found["kl"]
    results = {"student_standardised": standardise(inputs["student_logits"])}
    return Computed({"kd": found["kl"], "total": total}, out=results)


def normkd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """NormKD, or DKD by its scale."""
    if "alpha" in numbers:
        return Computed(_dkd(numbers, inputs, "T_norm", scaling="norm"))
    method = NormKD(temperature=numbers["T_norm"])
    return Computed({"kd": sums([method], on_logits(inputs))["normkd"]})


def dist(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Both parts without their weights, and the sum with them."""

    def parts(beta: float, gamma: float) -> Arrays:
        method = DIST(temperature=numbers["tau"], beta=beta, gamma=gamma)
        return sums([method], on_logits(inputs))

    both, bare = parts(numbers["beta"], numbers["gamma"]), parts(1.0, 1.0)
    return Computed(
        {
            "dist": both["dist_inter"] + both["dist_intra"],
            "inter": bare["dist_inter"],
            "intra": bare["dist_intra"],
        }
    )


def ctkd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """KD at a temperature that is a parameter, in an epoch counted from 1."""
    method = CTKD(start=numbers["t_start"], span=numbers["t_end"])
    context = on_logits(inputs, epoch=numbers["epoch"] - 1.0)
    terms, _ = method.terms({"params": {"temperature": inputs["T_param"]}}, context)
    p, (epochs,) = inputs["T_param"], numbers["shapes"]["schedule"]
    results = {
        "temp": method.temperature(p, context.epoch),
        "schedule": method.factor(jnp.arange(epochs, dtype=p.dtype)),
    }
    return Computed({"kd": weighted(terms)["ctkd"]}, out=results)


def mse_logits(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The squared distance, or the KL that it is compared with."""
    if "T" not in numbers:
        return Computed({"mse": sums([MSELogits()], on_logits(inputs))["mse_logits"]})
    found, alpha = _kd(numbers["T"], inputs), numbers["alpha"]
    return Computed({"total": (1 - alpha) * found["ce"] + alpha * found["kl"]})


def tfkd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Self-training, the virtual teacher, or label smoothing, by the numbers that there are."""
    if "smoothing" in numbers:
        over = "all" if "torch" in numbers["case"] else "others"
        method: Any = LabelSmoothing(smoothing=numbers["smoothing"], over=over)
    else:
        given = {name: numbers[name] for name in ("alpha", "multiplier")}
        given["temperature"] = numbers["T"]
        virtual = "correct_prob" in numbers
        method = TfKDReg(correct=numbers["correct_prob"], **given) if virtual else TfKDSelf(**given)
    context = on_logits(inputs)
    ce = sums([CrossEntropy()], context)["ce"]
    return Computed({"ce": ce, "total": sum(sums([method], context).values())})


LOGITS: dict[str, Compute] = {
    "kd": kd,
    "dkd": dkd,
    "logit_standardisation": logit_standardisation,
    "normkd": normkd,
    "dist": dist,
    "ctkd": ctkd,
    "mse_logits": mse_logits,
    "tfkd": tfkd,
}
