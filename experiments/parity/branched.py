"""Methods of the exits of networks with branches: ONE, OKDDip, BYOT, DKS and DCM."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from distill_jax.methods import BYOT, DCM, DKS, ONE, Context, Hyper, OKDDip, Term, total
from distill_jax.models import Outputs
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.given import Arrays, Compute, Computed, weighted
from experiments.parity.losses import outputs

Numbers = dict[str, Any]


def numbered(inputs: Arrays, name: str) -> list[Any]:
    """What the case has of a name, by its number: logits0, logits1, ..."""
    count = sum(key.removeprefix(name).isdecimal() for key in inputs if key.startswith(name))
    return [inputs[f"{name}{i}"] for i in range(count)]


def of_exits(
    exits: list[Outputs], inputs: Arrays, epoch: float = 0.0, teachers: tuple[Outputs, ...] = ()
) -> Context:
    """The context of a network with these exits, itself the first."""
    labels = inputs["labels"]
    return Context(
        student=exits[0]._replace(branches=tuple(exits[1:])),
        teachers=teachers,
        teacher_mask=jnp.ones(len(teachers), bool),
        labels=labels,
        hyper=Hyper(),
        batch_size=len(labels),
        epoch=epoch,
    )


def one(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """A gate, and the classifiers of all branches, which are the network's in ours."""
    own = {key.removeprefix("net."): x for key, x in state.items()}
    places: Places = {"control_v1": ("control",), "bn_v1": ("bn",)}
    gate = {key: x for key, x in own.items() if key.partition(".")[0] in places}
    features = [jnp.mean(x, (1, 2)) for x in numbered(inputs, "branch_feature")]
    logits = [
        x @ own[f"classfier3_{i}.weight"].T + own[f"classfier3_{i}.bias"][None]
        for i, x in enumerate(features, 1)
    ]
    exits = [outputs(z, x) for z, x in zip(logits, features, strict=True)]
    exits[0] = exits[0]._replace(stages=(inputs["trunk_feature"], inputs["branch_feature0"]))
    context = of_exits(exits, inputs, numbers["epoch"])
    method = ONE(temperature=numbers["T"], rampup_epochs=numbers["rampup"])
    variables = variables_of(gate, places)
    terms, after = method.terms(variables, context)
    found = weighted(terms)
    return Computed(
        {"kl": found["one_kl"], "total": total(terms)},
        {f"net.{k}": x for k, x in to_torch({"batch_stats": after["batch_stats"]}, places).items()},
        out={
            "branch_logits": jnp.stack(logits),
            "ensemble_logits": method.ensemble(variables, context)[0],
        },
    )


def okddip(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Peers, and the leader as the last of all; its feature is not used."""
    own = {key.removeprefix("net."): x for key, x in state.items()}
    places: Places = {name: (name,) for name in ("query_weight", "key_weight")}
    *peers, leader = (
        outputs(z, x)
        for z, x in zip(numbered(inputs, "logits"), numbered(inputs, "features"), strict=True)
    )
    context = of_exits([leader, *peers], inputs)
    weight = numbers["alpha"] * numbers["consistency_weight"]
    method = OKDDip(
        temperature=numbers["T"], kd_weight=weight, rampup_epochs=0, factor=numbers["factor"]
    )
    variables = variables_of(own, places)
    terms, _ = method.terms(variables, context)
    found = weighted(terms)
    return Computed(
        {
            "ce_peers": found["okddip_ce"],
            "kl_peers": found["okddip_kl"] / weight,
            "total": total(terms),
        },
        out={"targets": method.targets(variables, context)},
    )


def byot(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The journal's form, of which the coefficients have those names, or the conference's."""
    deepest, *branches = (
        outputs(z, x)
        for z, x in zip(numbered(inputs, "logits"), numbered(inputs, "features"), strict=True)
    )
    if "loss_coefficient" not in numbers:
        return _conference(numbers, inputs, deepest, branches)
    start = "net.adaptation_layers."
    layers = {key.removeprefix(start): x for key, x in state.items()}
    # Theirs counts the branches from 0 and has a layer for the deepest one, which it does not use.
    places: Places = {str(i): (str(i + 1),) for i in range(1, len(branches))}
    used = {key: x for key, x in layers.items() if key.partition(".")[0] in places}
    method = BYOT(
        form="journal",
        temperature=numbers["T"],
        kd_weight=numbers["loss_coefficient"],
        feature_weight=numbers["feature_loss_coefficient"],
    )
    context = of_exits([deepest, *branches], inputs)
    return Computed({"total": total(method.terms(variables_of(used, places), context)[0])})


def _conference(
    numbers: Numbers, inputs: Arrays, deepest: Outputs, branches: list[Outputs]
) -> Computed:
    """The branches from the shallowest on, and each term of each of them."""
    weights = numbers["alpha"], numbers["beta"]
    method = BYOT(
        form="conference",
        temperature=numbers["T"],
        kd_weight=weights[0],
        feature_weight=weights[1],
    )

    def terms(*exits: Outputs) -> dict[str, Term]:
        return method.terms({}, of_exits([deepest, *exits], inputs))[0]

    losses = {"total": total(terms(*reversed(branches)))}
    for i, branch in enumerate(branches, 1):
        found = weighted(terms(branch))
        losses[f"kd{i}"] = found["byot_kd"] / weights[0]
        losses[f"feature{i}"] = found["byot_feature"] / weights[1]
    return Computed(losses)


def dks_dcm(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The exits of a network, or of two networks one after the other, the deepest last."""
    exits = [outputs(z) for z in numbered(inputs, "logits")][::-1]
    if not numbers["case"].startswith("dcm"):
        return Computed({"total": total(DKS().terms({}, of_exits(exits, inputs))[0])})
    half, totals = len(exits) // 2, []
    for own, others in ((exits[:half], exits[half:]), (exits[half:], exits[:half])):
        peer = others[0]._replace(branches=tuple(others[1:]))
        context = of_exits(own, inputs, teachers=(peer,))
        totals.append(total(DCM().terms({}, context)[0]))
    return Computed({"total": totals[0] + totals[1]})


BRANCHED: dict[str, Compute] = {"one": one, "okddip": okddip, "byot": byot, "dks_dcm": dks_dcm}
