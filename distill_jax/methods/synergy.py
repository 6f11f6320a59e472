"""All exits teach each other: DKS those of one network, DCM those of several."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods import ranges
from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.methods.exits import OwnExits, check_branches, exits_of, logits_of
from distill_jax.models import Outputs

EPSILON = 1e-8  # added to the probabilities of DKS and DCM, before they are scaled to sum to 1


def synergy(targets: Array, logits: Array) -> Array:
    """KL(p̃(targets_j) || p̃(z_i)) of all pairs, the targets detached.

    p̃ = (softmax + 1e-8) / (1 + 1e-8 C).

    Args:
      targets: (N, B, C) logits.
      logits: (M, B, C).

    Returns:
      (N, M, B) in nats.
    """

    def raised(x: Array) -> Array:
        return (jax.nn.softmax(x) + EPSILON) / (1 + x.shape[-1] * EPSILON)

    given, own = lax.stop_gradient(raised(targets))[:, None], raised(logits)[None]
    return jnp.sum(given * (jnp.log(given) - jnp.log(own)), -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DKS(OwnExits):
    """Σ_i CE_i + c Σ_{i≠j} KL(p̃(sg z_j) || p̃(z_i)), of all ordered pairs of a network's exits.

    p̃ = (softmax + 1e-8) / (1 + 1e-8 C), without a temperature.

    Args:
      kd_weight: c.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Sun et al., Deeply-supervised Knowledge Synergy, CVPR 2019, 1906.00675, and its authors' code.
    """

    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        ranges.not_negative("dks", kd_weight=self.kd_weight)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where there are no branches."""
        check_branches("dks", shapes)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"dks_ce", "dks_kl"}."""
        logits = logits_of(exits_of(context.student))
        others = ~jnp.eye(len(logits), dtype=bool)[..., None]
        kl = jnp.where(others, synergy(logits, logits), 0.0)
        return {
            "dks_ce": Term(jnp.sum(context.cross_entropy(logits), 0)),
            "dks_kl": Term(jnp.sum(kl, (0, 1)), self.kd_weight),
        }, variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCM(Method):
    """Σ_i CE_i + c Σ_k Σ_{i,j} KL(p̃(sg z_kj) || p̃(z_i)), of own exits i with those j of others k.

    The others are the networks with which the student is trained in a cycle; they have branches
    too. p̃ is that of `DKS`, whose place this takes: the exits of one network do not teach each
    other.

    Args:
      kd_weight: c.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Yao and Sun, Knowledge Transfer via Dense Cross-Layer Mutual-Distillation, ECCV 2020,
      2008.07816, and its authors' code.
    """

    kd_weight: float = 1.0

    edges: ClassVar[str] = "live"
    teaches_itself: ClassVar[bool] = False
    trains_branches: ClassVar[bool] = True
    replaces_ce: ClassVar[bool] = True
    mixes_labels: ClassVar[bool] = True
    takes_label_smoothing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ranges.not_negative("dcm", kd_weight=self.kd_weight)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where one of the networks has no branches."""
        check_branches("dcm", shapes)
        for k, teacher in enumerate(shapes.teachers):
            if not teacher.branches:
                raise ValueError(
                    f"dcm compares the exits of networks that learn together: expected branches of "
                    f"teacher {k + 1} too, such as those of dks:resnet20, got none"
                )

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"dcm_ce", "dcm_kl"}."""
        logits = logits_of(exits_of(context.student))

        def divergence(k: int, teacher: Outputs) -> Array:
            return jnp.sum(synergy(logits_of(exits_of(teacher)), logits), (0, 1))

        return {
            "dcm_ce": Term(jnp.sum(context.cross_entropy(logits), 0)),
            "dcm_kl": Term(context.over_teachers(divergence), self.kd_weight),
        }, variables
