"""Peers that share the lower stages of one network: ONE and OKDDip."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from distill_jax.methods import adapters
from distill_jax.methods.base import Context, Shapes, Term
from distill_jax.methods.exits import (
    OwnExits,
    check_branches,
    check_equal_vectors,
    exits_of,
    logits_of,
)
from distill_jax.methods.features import check_normalised
from distill_jax.methods.losses import kl_of_raised
from distill_jax.methods.ranges import above_zero, counts, not_negative
from distill_jax.models.basics import Mode, at_least_float32
from distill_jax.models.kernels.batch_norm import BatchNorm
from distill_jax.models.zoo.layers import Linear, torch_uniform

HIGHEST = lax.Precision.HIGHEST


def rampup(epoch: Array | float, epochs: float) -> Array:
    """exp(-5 (1 - min(e, E)/E)²) at epoch e, counted from 0 and constant within one; 1 at E = 0."""
    if not epochs:
        return jnp.ones(())
    return jnp.exp(-5 * jnp.square(1 - jnp.minimum(jnp.floor(epoch), epochs) / epochs))


class Gate(nn.Module):
    """How much each of several exits counts: of a map's mean, through a layer and BatchNorm."""

    exits: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, H, W, C) -> (B, exits), positive numbers that sum to 1."""
        mean = jnp.mean(x, tuple(range(1, x.ndim - 1)))
        y = Linear(self.exits, name="control")(mean, mode)
        return nn.softmax(nn.relu(BatchNorm(self.exits, name="bn")(y, mode)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ONE(OwnExits):
    """Σ_i CE(z_i) + CE(e) + w T² Σ_i KL(softmax(sg e/T) + 1e-7 || softmax(z_i/T)), e = Σ_i g_i z_i.

    The z_i are those of a network and of its branches. The gate g = softmax(ReLU(BN(W m + b))), of
    the mean m of the map at the end of the last stage but one, is trained with them, by CE(e)
    alone. w = c exp(-5 (1 - min(e, E)/E)²) at epoch e, counted from 0.

    Args:
      temperature: T > 0.
      kd_weight: c.
      rampup_epochs: E; 0 for w = c at once.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Lan et al., Knowledge Distillation by On-the-Fly Native Ensemble, NeurIPS 2018, 1806.04606,
      and its authors' code.
    """

    temperature: float = 3.0
    kd_weight: float = 1.0
    rampup_epochs: float = 80.0

    def __post_init__(self) -> None:
        above_zero("one", temperature=self.temperature)
        not_negative("one", kd_weight=self.kd_weight, rampup_epochs=self.rampup_epochs)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where there are no branches, no stage before the last, or one image."""
        check_branches("one", shapes)
        check_normalised("one", shapes)
        if len(shapes.student.stages) < 2:
            raise ValueError(
                "one's gate sees the stage before the last: expected two stages or more of the "
                f"student, got {len(shapes.student.stages)}"
            )

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params", "batch_stats"} of the gate."""
        student = shapes.student
        gate = Gate(len(exits_of(student)))
        return dict(adapters.drawn(key, gate, student.stages[-2].shape[1:]))

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"one_ce", "one_ensemble", "one_kl"}: of all exits, of their ensemble, and between."""
        logits = logits_of(exits_of(context.student))
        ensemble, stats = self.ensemble(variables, context)
        ce = jnp.sum(context.cross_entropy(logits), 0)
        kl = kl_of_raised(lax.stop_gradient(ensemble), logits, self.temperature)
        ramp = self.kd_weight * rampup(context.epoch, self.rampup_epochs)
        return {
            "one_ce": Term(ce),
            "one_ensemble": Term(context.cross_entropy(ensemble)),
            "one_kl": Term(jnp.sum(kl, 0), self.temperature**2 * ramp),
        }, {**variables, "batch_stats": stats}

    def ensemble(self, variables: dict[str, Any], context: Context) -> tuple[Array, Any]:
        """(B, C) the logits e, and the statistics after them."""
        logits = logits_of(exits_of(context.student))
        gate, stats = adapters.applied(
            Gate(len(logits)), variables, context.student.stages[-2], context
        )
        return jnp.sum(jnp.moveaxis(gate, 1, 0)[..., None] * logits, 0), stats


@dataclasses.dataclass(frozen=True, kw_only=True)
class OKDDip(OwnExits):
    """CE of leader and peers + w T² (Σ_i KL(p(t_i) || p(z_i)) + KL(p(mean_j z_j) || p(leader))).

    The network is the leader, its branches are the peers. t_i = Σ_j A_ij z_j over all peers, the
    own one included, with A_ij = softmax_j((W_q f_i) · (W_k f_j)) of the vectors f before the
    classifiers; W_q and W_k are trained with them. p(z) = softmax(z/T), to which 1e-7 is added
    where it is a target. w = c exp(-5 (1 - min(e, E)/E)²) at epoch e, counted from 0.

    The targets are not detached, as in the authors' code: they learn from those whom they teach.

    Args:
      temperature: T > 0.
      kd_weight: c.
      rampup_epochs: E; 0 for w = c at once.
      factor: the vectors' length over that of W f, which is rounded down and at least 1.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Chen et al., Online Knowledge Distillation with Diverse Peers, AAAI 2020, 1912.00350, and its
      authors' code.
    """

    temperature: float = 3.0
    kd_weight: float = 1.0
    rampup_epochs: float = 80.0
    factor: int = 8

    def __post_init__(self) -> None:
        above_zero("okddip", temperature=self.temperature)
        not_negative("okddip", kd_weight=self.kd_weight, rampup_epochs=self.rampup_epochs)
        counts("okddip", factor=self.factor)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where there are no branches, or their vectors differ in length."""
        check_branches("okddip", shapes)
        check_equal_vectors("okddip", shapes.student.branches)

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params"} of W_q and W_k."""
        width = shapes.student.branches[0].feature.shape[-1]
        shape = (width, max(1, width // self.factor))
        keys = zip(("query_weight", "key_weight"), jax.random.split(key), strict=True)
        return {"params": {name: {"kernel": torch_uniform(own, shape)} for name, own in keys}}

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"okddip_ce", "okddip_kl"} of the peers, and of the leader, "okddip_leader_..."."""
        peers, leader = logits_of(context.student.branches), context.student.logits
        targets = self.targets(variables, context)
        kl = jnp.sum(kl_of_raised(targets, peers, self.temperature), 0)
        leader_kl = kl_of_raised(jnp.mean(peers, 0), leader, self.temperature)
        ramp = self.kd_weight * rampup(context.epoch, self.rampup_epochs)
        return {
            "okddip_ce": Term(jnp.sum(context.cross_entropy(peers), 0)),
            "okddip_leader_ce": Term(context.cross_entropy(leader)),
            "okddip_kl": Term(kl, self.temperature**2 * ramp),
            "okddip_leader_kl": Term(leader_kl, self.temperature**2 * ramp),
        }, variables

    def targets(self, variables: dict[str, Any], context: Context) -> Array:
        """(P, B, C) what each of the peers is taught."""
        peers = context.student.branches
        features = at_least_float32(jnp.stack([peer.feature for peer in peers]))
        queries, keys = (
            jnp.matmul(features, variables["params"][name]["kernel"], precision=HIGHEST)
            for name in ("query_weight", "key_weight")
        )
        energy = jnp.einsum("ibd,jbd->bij", queries, keys, precision=HIGHEST)
        weights = jax.nn.softmax(energy)
        return jnp.einsum("bij,jbc->ibc", weights, logits_of(peers), precision=HIGHEST)
