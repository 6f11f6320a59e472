"""Methods on features that are given: vectors before the classifier, and feature maps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distill_jax.methods import Context, Hyper, Method, adapters
from distill_jax.methods.attention import AT, NST
from distill_jax.methods.boundary import BSS
from distill_jax.methods.connectors import AB, SRRL, Connector
from distill_jax.methods.correlation import CC, Embedding
from distill_jax.methods.features import pool
from distill_jax.methods.flow import FSP, KDSVD
from distill_jax.methods.relations import PKT, RKD, SP
from distill_jax.methods.variational import VID
from distill_jax.models import Outputs, Variables
from distill_jax.models.basics import per_channel
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.given import Arrays, Compute, Computed
from experiments.parity.losses import outputs

Numbers = dict[str, Any]


def loss_of(
    method: Method, student: Outputs, teacher: Outputs, variables: Variables | None = None
) -> jax.Array:
    """The weighted mean of a method's one term, with one teacher."""
    (term,) = method.terms(variables or {}, context_of(student, teacher))[0].values()
    return term.weight * jnp.mean(term.value)


def context_of(student: Outputs, teacher: Outputs) -> Context:
    """What a method is given of a student and one teacher."""
    examples = len(jax.tree.leaves(student)[0])
    return Context(
        student=student,
        teachers=(teacher,),
        teacher_mask=jnp.ones(1, bool),
        labels=jnp.zeros(examples, jnp.int32),
        hyper=Hyper(),
        batch_size=examples,
    )


def vectors(method: Method, inputs: Arrays, variables: Variables | None = None) -> jax.Array:
    """The loss by the vectors before the classifier."""
    student, teacher = (outputs(feature=inputs[f"{who}_feature"]) for who in ("student", "teacher"))
    return loss_of(method, student, teacher, variables)


def maps(inputs: Arrays) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The numbered maps of student and teacher, shallow to deep."""
    count = sum(name.startswith("student_feature") for name in inputs)
    student, teacher = (
        tuple(inputs[f"{who}_feature{i}"] for i in range(count)) for who in ("student", "teacher")
    )
    return student, teacher


def by_stages(name: str, method: Method, inputs: Arrays, together: int = 1) -> Computed:
    """The loss of all maps, and of each or of each pair."""
    student, teacher = maps(inputs)

    def loss(some: slice) -> jax.Array:
        return loss_of(method, outputs(stages=student[some]), outputs(stages=teacher[some]))

    part = "stage" if together == 1 else "pair"
    parts = range(len(student) - together + 1)
    each = {f"{part}{i}": loss(slice(i, i + together)) for i in parts}
    return Computed({name: loss(slice(None)), **each})


def pkt(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Probabilities of neighbours."""
    return Computed({"pkt": vectors(PKT(epsilon=numbers["eps"]), inputs)})


def attention(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Attention maps."""
    return by_stages("at", AT(power=numbers["p"]), inputs)


def sp(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Similarities; a student's example of zeros has no direction, hence no gradient."""
    student, teacher = inputs["student_feature"], inputs["teacher_feature"]
    loss = loss_of(SP(), outputs(stages=(student,)), outputs(stages=(teacher,)))
    return Computed({"sp": loss}, {}, {"student_feature": jnp.all(student == 0, (1, 2, 3))})


def rkd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Distances and angles."""
    weights = {"rkd": (numbers["w_d"], numbers["w_a"]), "distance": (1.0, 0.0), "angle": (0.0, 1.0)}
    return Computed({name: vectors(RKD(*pair), inputs) for name, pair in weights.items()})


def cc(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Correlations of embedded neighbours, or by kernels; or an embedding of unit length."""
    if "gamma" in numbers:
        method = CC(kernel="gaussian", gamma=numbers["gamma"], order=numbers["P_order"])
        return Computed({"cc": vectors(method, inputs)})
    if "teacher_feature" in inputs:
        places: Places = {"embed_s": ("0", "student"), "embed_t": ("0", "teacher")}
        method = CC(embedding_size=numbers["feat_dim"])
        return Computed({"cc": vectors(method, inputs, variables_of(state, places))})
    module = Embedding(len(state["embed.linear.bias"]), normalised=True)
    embedded = module.apply(variables_of(state, {"embed": ()}), inputs["student_feature"])
    loss = jnp.sum(jnp.square(embedded[:, 0]))
    return Computed({"first_column": loss}, out={"embedded": embedded})


def nst(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Channels as distributions over the positions."""
    return by_stages("nst", NST(), inputs)


def kdsvd(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Singular vectors over the channels where there are as many of both, else over the width."""
    pairs = zip(*maps(inputs), strict=True)
    equal = all(s.shape[-1] == t.shape[-1] for s, t in pairs)
    along = "channels" if equal and "width" not in numbers.get("note", "") else "width"
    return by_stages("kdsvd", KDSVD(rank=numbers["k"], along=along), inputs, together=2)


def fsp(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Products of the channels of two maps."""
    return by_stages("fsp", FSP(), inputs, together=2)


def vid(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """A Gaussian around a regressed map."""
    method = VID(variance=numbers["init_pred_var"], epsilon=numbers["eps"])
    student, teacher = (
        outputs(stages=(inputs[f"{who}_feature"],)) for who in ("student", "teacher")
    )
    variables = variables_of(state, {"vid": ("0", "0")})
    return Computed({"vid": loss_of(method, student, teacher, variables)})


def bss(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """The outputs on attacked images, of networks of a convolution, a pool and a linear layer."""

    def network(who: str) -> Callable[[jax.Array], jax.Array]:
        def logits(images: jax.Array) -> jax.Array:
            kernel = state[f"{who}.0.weight"].transpose(2, 3, 1, 0)
            convolved = lax.conv_general_dilated(
                images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = jax.nn.relu(convolved + per_channel(state[f"{who}.0.bias"], convolved))
            weight, bias = state[f"{who}.4.weight"], state[f"{who}.4.bias"]
            side = math.isqrt(weight.shape[1] // y.shape[-1])
            y = pool(y, side, side).transpose(0, 3, 1, 2).reshape(len(y), -1) @ weight.T
            return y + per_channel(bias, y)

        return logits

    method = BSS(
        temperature=numbers["T"],
        steps=numbers["num_steps"],
        step_size=numbers["step_alpha"],
        limit=numbers["clip"],
    )
    teacher, student = network("teacher"), network("student")
    moved = method.attack(teacher, inputs["images"], inputs["attack_class"])
    loss = jnp.mean(method.divergence(teacher(moved), student(moved)))
    return Computed({"bss": loss}, out={"adversarial": moved})


def ab(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Activity before the ReLU, of all stages and of each with its own weight."""
    student, teacher = maps(inputs)
    start = "connector.connectors."
    places: Places = {str(i): (f"{i} of 0",) for i in range(len(student))}
    variables = variables_of({k.removeprefix(start): x for k, x in state.items()}, places)
    shown = outputs(preacts=student), outputs(preacts=teacher)
    weights = numbers["weights"]
    alone = [tuple(w * (i == j) for j, w in enumerate(weights)) for i in range(len(weights))]
    losses = {
        name: loss_of(AB(margin=numbers["margin"], stage_weights=some), *shown, variables)
        for name, some in {
            "ab": tuple(weights),
            **{f"stage{i}": one for i, one in enumerate(alone)},
        }.items()
    }
    _, after = AB(margin=numbers["margin"]).terms(variables, context_of(*shown))
    torch = to_torch({"batch_stats": after["batch_stats"]}, places) if after else {}
    return Computed(losses, {f"{start}{k}": x for k, x in torch.items()})


def srrl(numbers: Numbers, inputs: Arrays, state: Arrays) -> Computed:
    """Vectors and logits through the teacher's classifier, of vectors or of maps."""
    by_map = inputs["student_feature"].ndim == 4
    start = next(iter(k for k in state if k.startswith("connector."))).rsplit(".", 2)[0] + "."
    names = {"0": "conv", "1": "bn"}
    places: Places = {number: ("0", name) for number, name in names.items()}
    own = {k.removeprefix(start): x for k, x in state.items() if k.startswith(start)}
    variables = variables_of(own, places)
    weight, bias = state["teacher_fc.weight"], state["teacher_fc.bias"]

    def head(feature: jax.Array) -> jax.Array:
        logits = feature @ weight.T
        return logits + per_channel(bias, logits)

    def shown(feature: jax.Array, logits: jax.Array) -> Outputs:
        vector = jnp.mean(feature, (1, 2)) if by_map else feature
        return outputs(logits, vector, stages=(feature,) if by_map else ())

    logits = inputs["teacher_logits"]
    pair = shown(inputs["student_feature"], logits), shown(inputs["teacher_feature"], logits)
    context = dataclasses.replace(context_of(*pair), teacher_heads=(head,))
    form = "map" if by_map else "vector"

    def loss(logit_weight: float) -> tuple[jax.Array, Variables]:
        terms, after = SRRL(form, logit_weight).terms(variables, context)
        return jnp.mean(terms["srrl"].value), after

    (total, after), (alone, _) = loss(numbers.get("weight", 1.0)), loss(0.0)
    logits_only = (total - alone) / numbers.get("weight", 1.0)
    torch = to_torch({"batch_stats": after["batch_stats"]}, places)
    given = inputs["student_feature"] if by_map else inputs["student_feature"][:, None, None]
    own = adapters.of_module(variables, "0")
    y, _ = adapters.applied(Connector(weight.shape[1]), own, given, context)
    return Computed(
        {"srrl": total, "feature": alone, "stat": alone, "logits": logits_only},
        {f"{start}{k}": x for k, x in torch.items()},
        out={"pred": head(jnp.mean(y, (1, 2)))},
    )


FEATURES: dict[str, Compute] = {
    "pkt": pkt,
    "at": attention,
    "sp": sp,
    "rkd": rkd,
    "cc": cc,
    "nst": nst,
    "kdsvd": kdsvd,
    "fsp": fsp,
    "vid": vid,
    "bss": bss,
    "ab": ab,
    "srrl": srrl,
}
