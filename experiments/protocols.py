"""What the protocols amount to: weights of the loss's terms, and learning rates by epoch.

  python -m experiments.protocols           # the tables, as Markdown
  python -m experiments.protocols --check   # exit code 1 where docs/protocols.md has others
  python -m experiments.protocols --write   # puts them there

Nothing is derived from a formula. The library's loss on random logits is taken apart into the
cross-entropy and the KL summed over classes; the rates come from the library's schedules.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.methods import KD, Context, CrossEntropy, Hyper, LossOptions, losses
from distill_jax.models import Outputs
from distill_jax.runs import config
from distill_jax.train import optim
from experiments import pages
from experiments.pages import heading, row

PAGE = pages.DOCS / "protocols.md"
PROTOCOLS = config.PROTOCOLS
EXAMPLES = 8  # two would do to find the weights; the others show that the loss is such a sum


class Setting(NamedTuple):
    """A row of the first table; `kept` of the `teachers` teach the mini-batch."""

    what: str
    kd_weight: float
    temperature: float
    classes: int
    teachers: int = 1
    kept: int = 1


class Weights(NamedTuple):
    """Of the cross-entropy, and of the KL of all kept teachers together where they agree."""

    ce: float
    kl: float


SETTINGS = (
    Setting("TAKD, CIFAR-10, λ the lowest searched", 0.05, 5.0, 10),
    Setting("TAKD, CIFAR-10, λ in the middle", 0.5, 5.0, 10),
    Setting("TAKD, CIFAR-10, λ the highest but one", 0.95, 5.0, 10),
    Setting("TAKD, CIFAR-10, λ the highest", 1.0, 5.0, 10),
    Setting("TAKD, CIFAR-100, λ the lowest searched", 0.05, 5.0, 100),
    Setting("TAKD, CIFAR-100, ResNet 110 → 20", 0.5, 5.0, 100),
    Setting("TAKD, CIFAR-100, ResNet 110 → 8", 0.2, 2.0, 100),
    Setting("TAKD, CIFAR-100, ResNet 110 → 20 → 8", 0.15, 5.0, 100),
    Setting("DGKD, CIFAR-10, the code's λ", 1.0, 5.0, 10, 4, 4),
    Setting("DGKD, CIFAR-100, the code's λ", 1.0, 5.0, 100, 4, 4),
    Setting("DGKD, CIFAR-10", 0.5, 5.0, 10, 4, 4),
    Setting("DGKD, CIFAR-100", 0.5, 5.0, 100, 4, 4),
    Setting("DGKD, CIFAR-100, one dropped", 0.5, 5.0, 100, 4, 3),
)
RESNET = {"learning_rate": 0.1, "schedule": "piecewise"}
RECIPES = (
    (
        "TAKD, ResNet, paper",
        {**RESNET, "epochs": 150, "milestones": (80 / 150, 120 / 150)},
    ),
    (
        "TAKD, ResNet, code",
        {"learning_rate": 0.1, "schedule": "takd_code", "epochs": 160},
    ),
    ("DGKD, ResNet, code", {**RESNET, "epochs": 160, "milestones": (0.5, 0.75)}),
    ("TAKD, plain CNN, paper", {"learning_rate": 0.1, "epochs": 150}),
    ("TAKD and DGKD, plain CNN, code", {"learning_rate": 0.01, "epochs": 160}),
)


# ------------------------------------------------------------------------------------- the weights
def effective_weights(setting: Setting) -> dict[str, Weights]:
    """By protocol, the weights a, b by which the loss is a CE + b KL on whatever logits.

    In float64. All teachers have the same logits, so that b is the weight of everything they say.

    Raises:
      ValueError: a loss is no such sum.
    """
    draw = np.random.RandomState(0)
    student = draw.standard_normal((EXAMPLES, setting.classes))
    teacher = 2 * draw.standard_normal((EXAMPLES, setting.classes))
    labels = draw.randint(0, setting.classes, EXAMPLES)
    teachers = np.stack([teacher] * setting.teachers)
    keep = np.arange(setting.teachers) >= setting.teachers - setting.kept
    with jax.enable_x64(True):
        numbers = np.float64(setting.temperature), np.float64(setting.kd_weight)
        totals, ce, kl = _terms(student, labels, teachers, keep, *numbers)
    columns = np.stack([ce, kl], -1)
    weights = {}
    for protocol, total in totals.items():
        found = np.linalg.lstsq(columns, np.asarray(total), rcond=None)[0]
        if not np.allclose(columns @ found, total, rtol=1e-9, atol=0):
            raise ValueError(f"the {protocol} loss is no weighted sum of CE and KL")
        weights[protocol] = Weights(*(float(weight) for weight in found))
    return weights


@jax.jit
def _terms(student, labels, teachers, keep, temperature, kd_weight):
    """The loss of each protocol, the cross-entropy, and the KL of one teacher, per example."""
    totals = {
        protocol: loss(
            config.resolve({"protocol": protocol}).loss,
            student,
            labels,
            teachers,
            keep,
            Hyper(temperature=temperature, kd_weight=kd_weight),
        )
        for protocol in PROTOCOLS
    }
    ce = losses.cross_entropy(student, labels)
    return totals, ce, losses.kl_divergence(teachers[0], student, temperature)


def loss(options: LossOptions, student, labels, teachers, keep, hyper: Hyper) -> jax.Array:
    """(B,) the library's loss of cross-entropy and KD, of logits (B, C) and (K, B, C)."""
    context = Context(
        student=Outputs(student, student, ()),
        teachers=tuple(Outputs(logits, logits, ()) for logits in teachers),
        teacher_mask=jnp.asarray(keep),
        labels=labels,
        hyper=hyper,
    )
    terms = {}
    for method in (CrossEntropy(options), KD(options)):
        terms |= method.terms({}, context)[0]
    return sum((term.weight * term.value for term in terms.values()), jnp.zeros(len(labels)))


def weights_table() -> Iterator[str]:
    """The lines of the first table."""
    yield from heading("setting", "λ", "T", "C", "K", *PROTOCOLS)
    for setting in SETTINGS:
        weights = effective_weights(setting)
        number = f"{setting.kept} of {setting.teachers}"
        yield row(
            setting.what,
            _number(setting.kd_weight),
            _number(setting.temperature),
            str(setting.classes),
            str(setting.teachers) if setting.kept == setting.teachers else number,
            *(_balance(weights[protocol]) for protocol in PROTOCOLS),
        )


def _balance(weights: Weights) -> str:
    # Rounding leaves a weight of 1 - 1 a little off zero.
    if abs(weights.ce) < 1e-9:
        return f"{_number(weights.kl)} : 0"
    ratio = _number(weights.kl / weights.ce)
    return f"{_number(weights.kl)} : {_number(weights.ce)} = {ratio}"


# --------------------------------------------------------------------------------------- the rates
def learning_rates(recipe: dict[str, Any], steps_per_epoch: int = 390) -> np.ndarray:
    """(epochs,) the learning rate at the first step of each epoch of a config's recipe."""
    resolved = config.resolve({"recipe": recipe})
    whole = resolved.recipe_of(resolved.networks[-1])
    schedule = optim.schedule(whole.optim, whole.epochs, steps_per_epoch)
    steps = jnp.arange(whole.epochs) * steps_per_epoch
    return np.broadcast_to(np.asarray(schedule(steps)), steps.shape)


def rates_table() -> Iterator[str]:
    """The lines of the second table: a column for each run of epochs in which nothing changes."""
    rates = {what: learning_rates(recipe) for what, recipe in RECIPES}
    longest = max(map(len, rates.values()))
    changes = {0, longest}
    for values in rates.values():
        changes |= {len(values), *(np.flatnonzero(np.diff(values)) + 1).tolist()}
    starts = sorted(changes)
    spans = [f"{a}–{b - 1}" for a, b in zip(starts, starts[1:], strict=False)]
    yield from heading("epochs, from 0", *spans)
    for what, values in rates.items():
        yield row(what, *(_number(values[a]) if a < len(values) else "" for a in starts[:-1]))


# ---------------------------------------------------------------------------------------- the page
def tables() -> str:
    """Both tables as Markdown."""
    return "\n".join((*weights_table(), "", *rates_table()))


def main(argv: list[str] | None = None) -> int:
    """Prints, checks or writes the tables; the exit code."""
    return pages.main(argv, "experiments.protocols", __doc__, PAGE, tables)


def _number(value: Any) -> str:
    return f"{float(value):.4g}"


if __name__ == "__main__":
    sys.exit(main())
