"""Training steps whose losses come weighted, and those of networks that learn together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import models
from distill_jax.interop import torch_weights
from distill_jax.methods import DIST, DKD, DML, KD, CrossEntropy, Hyper, LossOptions, ReviewKD
from distill_jax.models import Network, Variables
from distill_jax.train import optim
from distill_jax.train.metrics import StepMetrics
from distill_jax.train.state import Batch, TrainState
from distill_jax.train.step import init_state, make_train_step
from distill_jax.train.terms import Methods, Student
from experiments import golden
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.cases import EXACT, Case, Found, batch, load
from experiments.parity.trajectories import EVALUATED, momentum, moved, norms

Meta = dict[str, Any]


class Taught(NamedTuple):
    """What teaches a student.

    Args:
      methods: with the cross-entropy.
      weights: of the methods, by name.
      counted: by what the case's columns of the cross-entropy and of the rest leave to the total.
      temperature: of `kd`.
      places: of the adapters of the last method.
    """

    methods: Methods
    weights: dict[str, float]
    counted: tuple[float, float] = (1.0, 1.0)
    temperature: float = 1.0
    places: Places = {}


class Learner(NamedTuple):
    """A network in training: what it begins with, what teaches it, and who along with it."""

    network: Network
    start: Variables
    methods: Methods
    hyper: Hyper
    own: dict[str, Variables] = {}
    live: tuple[str, ...] = ()


class Walked(NamedTuple):
    """What steps lead to.

    Args:
      state: after all of them.
      metrics: of each step, by network.
      gradients: of each network what its optimizer was given at the first step.
    """

    state: TrainState
    metrics: list[dict[str, StepMetrics]]
    gradients: list[Any]


def walk(
    case: Case,
    dtype: str,
    learners: Sequence[Learner],
    teachers: Sequence[tuple[Network, Variables]] = (),
) -> Walked:
    """Runs our train step over the batches of a trajectory, which are of one epoch."""
    meta, key = case.meta, jax.random.key(0)
    optimizer = optim.OptimOptions(momentum=meta["momentum"], nesterov=meta["nesterov"])
    frozen = tuple(variables for _, variables in teachers)

    def student(one: Learner) -> Student:
        rate, places = jnp.asarray(meta["lr"], dtype), tuple(range(len(teachers)))
        return Student(one.network, one.methods, optimizer, lambda step: rate, places, one.live)

    body = make_train_step(
        students=tuple(map(student, learners)),
        teachers=tuple(network for network, _ in teachers),
        preprocess=lambda keys, images: images,
        steps_per_epoch=meta["steps"],
    )
    step = jax.jit(body, compiler_options=models.run_once(jax.default_backend()))

    def at(t: int, state: TrainState, decayed: bool = True) -> Any:
        hypers = {
            one.network.name: one.hyper if decayed else one.hyper._replace(weight_decay=0.0)
            for one in learners
        }
        places = jnp.arange(meta["batch"], dtype=jnp.int32)
        return step(state, frozen, Batch(*batch(case, t, dtype), places, places), hypers, key)

    states = [init_state(one.network, optimizer, key, one.own, one.start) for one in learners]
    state, metrics = TrainState.join(states), []
    # Without weight decay the momentum after the first step is the gradient.
    bare = at(0, state, decayed=False)[0]
    for t in range(meta["steps"]):
        state, found = at(t, state)
        metrics.append(jax.device_get(found))
    return Walked(state, metrics, [momentum(bare.opt_state[o.network.name]) for o in learners])


def check_weighed(case: Case, dtype: str) -> Iterator[Found]:
    """A student's steps: columns, its state, its method's adapters, the first gradients."""
    meta, taught = case.meta, METHODS[case.meta["method"]](case.meta)
    network, variables = load(case, meta["student"], None, meta["seed"], dtype)
    pairs = zip(meta["teachers"], meta["teacher_seeds"], strict=True)
    teachers = [load(case, name, None, seed, dtype) for name, seed in pairs]
    hyper = Hyper(1.0, meta["weight_decay"], taught.temperature, 1.0, methods=taught.weights)
    own, (name, _) = {}, taught.methods[-1]
    if taught.places:
        adapters = golden.state_dict(meta["adapters"], meta["adapter_seed"])
        adapters = {key: jnp.asarray(x, dtype) for key, x in adapters.items()}
        own = {name: variables_of(adapters, taught.places)}
    learner = Learner(network, variables, taught.methods, hyper, own)
    state, metrics, (gradients,) = walk(case, dtype, [learner], teachers)
    yield from _losses(case, metrics, [network.name], taught.counted, dtype)
    yield from _after(case, learner, state, dtype, "", meta["keys"])
    if own:
        first = to_torch(own[name], taught.places)
        last = to_torch(state.method_variables(network.name)[name], taught.places)
        keys = [key for key, _ in meta["adapters"]]
        yield from moved(case, "adapter", first, last, keys)
    grads = torch_weights.to_state_dict({"params": gradients["network"]})
    if own:
        grads |= to_torch({"params": gradients["methods"][name]}, taught.places)
    yield case.compare("step1_grads", norms(grads, meta["grad_keys"]))


def check_peers(case: Case, dtype: str) -> Iterator[Found]:
    """The steps of networks that teach each other: columns, states, first gradients of each."""
    meta = case.meta
    names = [f"{name}#{i}" if i > 1 else name for i, name in enumerate(meta["peers"], 1)]
    hyper = Hyper(weight_decay=meta["weight_decay"], methods={"dml": meta["lambda_kd"]})
    methods: Methods = (("ce", CrossEntropy()), ("dml", DML(temperature=meta["T"])))
    learners = []
    for name, kind, seed in zip(names, meta["peers"], meta["peer_seeds"], strict=True):
        network, variables = load(case, kind, None, seed, dtype)
        others = tuple(other for other in names if other != name)
        network = dataclasses.replace(network, name=name)
        learners.append(Learner(network, variables, methods, hyper, live=others))
    state, metrics, gradients = walk(case, dtype, learners)
    yield from _losses(case, metrics, names, (1.0, 1.0), dtype)
    for i, (learner, own) in enumerate(zip(learners, gradients, strict=True)):
        suffix = f"_{i + 1}"
        yield from _after(case, learner, state, dtype, suffix, meta["keys"][i])
        grads = torch_weights.to_state_dict({"params": own["network"]})
        yield case.compare(f"step1_grads{suffix}", norms(grads, meta["grad_keys"][i]))


def _losses(
    case: Case,
    metrics: list[dict[str, StepMetrics]],
    names: Sequence[str],
    counted: tuple[float, float],
    dtype: str,
) -> Iterator[Found]:
    """Of each network the loss, the cross-entropy and the sum of its other terms."""
    columns = []
    for name in names:
        steps = [step[name] for step in metrics]
        loss, ce = (
            np.array([total / size for total, size in pairs])
            for pairs in ([s.loss for s in steps], [s.weighted["ce"] for s in steps])
        )
        columns += [loss, ce / counted[0], (loss - ce) / counted[1]]
    reference = case.arrays["losses" if dtype == "float32" else "f64_losses"]
    for i, ours in enumerate(columns):
        bound = max(EXACT, 30 * case.meta["noise_columns"][i])
        name = case.meta["columns"][i]
        yield case.compare(f"losses {name}", ours, reference[:, i], bound)


def _after(
    case: Case, learner: Learner, state: TrainState, dtype: str, suffix: str, keys: list[str]
) -> Iterator[Found]:
    """The final network's logits of a fresh batch, norms of its state and of its way there."""
    network, what = learner.network, f"final_eval_logits{suffix}"
    images, _ = batch(case, EVALUATED, dtype, len(case.arrays[what]))
    variables = state.variables(network.name)
    yield case.compare(what, jax.jit(lambda v: network.apply(v, images)[0].logits)(variables))
    last, first = (torch_weights.to_state_dict(x) for x in (variables, learner.start))
    yield from moved(case, "final", first, last, keys, suffix)


def _dkd(meta: Meta) -> Taught:
    given, standardise = meta["config"]["DKD"], meta["config"].get("EXPERIMENT", {})
    method = DKD(
        temperature=given["T"],
        alpha=given["ALPHA"],
        beta=given["BETA"],
        warmup_epochs=given["WARMUP"] / meta["epoch"],
        scaling="standardise" if standardise.get("LOGIT_STAND") else "none",
    )
    methods: Methods = (("ce", CrossEntropy()), ("dkd", method))
    return Taught(methods, {"ce": given["CE_WEIGHT"]})


def _kd(meta: Meta) -> Taught:
    given = meta["config"]["KD"]
    options = LossOptions(standardise=meta["config"]["EXPERIMENT"]["LOGIT_STAND"])
    weights = {"ce": given["LOSS"]["CE_WEIGHT"], "kd": given["LOSS"]["KD_WEIGHT"]}
    methods: Methods = (("ce", CrossEntropy()), ("kd", KD(options)))
    return Taught(methods, weights, temperature=given["TEMPERATURE"])


def _reviewkd(meta: Meta) -> Taught:
    given = meta["config"]["REVIEWKD"]
    method = ReviewKD(
        warmup_epochs=given["WARMUP_EPOCHS"] / meta["epoch"],
        max_channels=given["MAX_MID_CHANNEL"],
        student_preact=given["STU_PREACT"],
    )
    methods: Methods = (("ce", CrossEntropy()), ("reviewkd", method))
    weights = {"ce": given["CE_WEIGHT"], "reviewkd": given["REVIEWKD_WEIGHT"]}
    return Taught(methods, weights, places={"abfs": ("0",)})


def _dist(meta: Meta) -> Taught:
    given = meta["weights"]
    method = DIST(temperature=given["tau"], beta=given["beta"], gamma=given["gamma"])
    weights = {"ce": given["ori_loss_weight"], "dist": given["kd_loss_weight"]}
    methods: Methods = (("ce", CrossEntropy()), ("dist", method))
    return Taught(methods, weights, (weights["ce"], weights["dist"]))


# A warm-up is in its epoch all along: the steps of ours are of the first one.
METHODS: dict[str, Callable[[Meta], Taught]] = {
    "dkd": _dkd,
    "dkd_ls": _dkd,
    "kd_ls": _kd,
    "reviewkd": _reviewkd,
    "dist": _dist,
}


def check_of(meta: Meta) -> Callable[[Case, str], Iterator[Found]] | None:
    """The check for a case; None for what is not of these."""
    if meta.get("kind") == "peer_trajectory":
        return check_peers
    return check_weighed if meta.get("method") in METHODS and "student" in meta else None
