"""Training steps through real networks, by our train step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.interop import torch_weights
from distill_jax.methods import (
    AT,
    CC,
    KD,
    KDSVD,
    NST,
    PKT,
    RKD,
    SP,
    VID,
    Context,
    CrossEntropy,
    FitNet,
    Hyper,
    LossOptions,
    Method,
    Term,
)
from distill_jax.methods.losses import kl_divergence
from distill_jax.models import Network, Outputs, Variables
from distill_jax.train import optim
from distill_jax.train.metrics import StepMetrics
from distill_jax.train.state import Batch, TrainState
from distill_jax.train.step import init_state, make_train_step
from distill_jax.train.terms import Methods, Student
from experiments import golden
from experiments.parity.adapters import to_torch, variables_of
from experiments.parity.cases import Case, Found, batch, load
from experiments.parity.losses import teskd

EVALUATED = 99  # the batch on which the final network is evaluated


def follow(
    case: Case,
    dtype: str,
    network: Network,
    variables: Variables,
    methods: Methods,
    hyper: Hyper,
    teachers: list[tuple[Network, Variables]] = [],  # noqa: B006  never changed
    masks: np.ndarray | None = None,
    method_variables: dict[str, Variables] | None = None,
    steps: int = 0,
) -> tuple[TrainState, list[StepMetrics]]:
    """Runs our train step over the batches of a trajectory.

    Args:
      case: gives batches, learning rate and momentum.
      dtype: of the computation.
      network: and variables: the student.
      methods: the terms of its loss, with `hyper`.
      teachers: frozen ones.
      masks: (steps, K), which of them teach; None lets all.
      method_variables: those of the methods.
      steps: how many; 0 takes all of the case.
    """
    meta = case.meta
    optimizer = optim.OptimOptions(momentum=meta["momentum"], nesterov=meta.get("nesterov", False))
    student = Student(
        network=network,
        methods=methods,
        optimizer=optimizer,
        schedule=lambda step: jnp.asarray(meta["lr"], dtype),
        frozen=tuple(range(len(teachers))),
        draw_mask=None if masks is None else lambda key, step, hyper: jnp.asarray(masks)[step],
    )
    step = make_train_step(
        students=(student,),
        teachers=tuple(teacher for teacher, _ in teachers),
        preprocess=lambda keys, images: images,
    )
    state = init_state(network, optimizer, jax.random.key(0), method_variables, variables)
    step, key, sums = jax.jit(step), jax.random.key(0), []
    frozen = tuple(variables for _, variables in teachers)
    places = jnp.arange(meta["batch"], dtype=jnp.int32)
    for t in range(steps or meta.get("steps") or len(next(iter(case.arrays.values())))):
        images, labels = batch(case, t, dtype)
        given = Batch(images, labels, places, places)
        state, found = step(state, frozen, given, {network.name: hyper}, key)
        sums.append(jax.device_get(found[network.name]))
    return state, sums


def column(sums: list[StepMetrics], name: str, size: int) -> list[float]:
    """The mean of a term at each step; "loss" is the total."""
    pairs = (s.loss if name == "loss" else s.terms[name] for s in sums)
    return [pair[0] / size for pair in pairs]


def final_logits(case: Case, network: Network, state: TrainState, dtype: str) -> jax.Array:
    """The final network's logits of a fresh batch, by running statistics."""
    images, _ = batch(case, EVALUATED, dtype, len(case.arrays["final_eval_logits"]))
    variables = state.variables(network.name)
    return jax.jit(lambda v: network.apply(v, images)[0].logits)(variables)


def norms(state: Mapping[str, Any], keys: list[str]) -> list[float]:
    """The norm of each entry of a state dict."""
    return [np.linalg.norm(state[key]) for key in keys]


def moved(
    case: Case,
    what: str,
    first: Mapping[str, Any],
    last: Mapping[str, Any],
    keys: list[str],
    suffix: str = "",
) -> Iterator[Found]:
    """Norms of a state dict, and of its way there."""
    yield case.compare(f"{what}_norms{suffix}", norms(last, keys))
    way = {key: np.asarray(last[key]) - np.asarray(first[key]) for key in keys}
    yield case.compare(f"{what}_delta_norms{suffix}", norms(way, keys))


def momentum(opt_state: Any) -> Any:
    """SGD's momentum: after the first step, without weight decay, the gradients."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "trace"))
    (trace,) = (node.trace for node in nodes if hasattr(node, "trace"))
    return trace


def check_trajectory(case: Case, dtype: str) -> Iterator[Found]:
    """SGD steps under explicit masks: losses, the final network's logits, norms of its state."""
    meta, masks = case.meta, np.asarray(case.meta["masks"], bool)
    network, variables = load(case, meta["student"], meta["state"], meta["seed"], dtype)
    pairs = zip(meta["teachers"], meta["teacher_seeds"], strict=True)
    teachers = [load(case, name, None, seed, dtype) for name, seed in pairs]
    options = LossOptions(kl_reduction=meta["kl"].replace(" ", "_"))
    state, sums = follow(
        case,
        dtype,
        network,
        variables,
        (("ce", CrossEntropy(options)), *([("kd", KD(options))] if teachers else [])),
        Hyper(1.0, meta["weight_decay"], meta["T"], meta["lam"]),
        teachers,
        masks if teachers else None,
        steps=len(case.arrays["loss"]),
    )
    yield case.compare("loss", column(sums, "loss", meta["batch"]))
    yield case.compare("ce", column(sums, "ce", meta["batch"]), bound=case.bound("loss"))
    yield case.compare("final_eval_logits", final_logits(case, network, state, dtype))
    final = torch_weights.to_state_dict(state.variables(network.name))
    yield case.compare("final_norms", norms(final, meta["keys"]))


def check_evolution(case: Case, dtype: str) -> Iterator[Found]:
    """SGD steps of an evolving network: each step's terms, the final backbone's logits."""
    meta = case.meta
    network, variables = load(case, meta["name"], meta.get("state"), meta["seed"], dtype)
    methods = (("teskd", teskd(meta)),)
    hyper = Hyper(1.0, meta["weight_decay"])
    steps = len(case.arrays["losses"])
    state, sums = follow(case, dtype, network, variables, methods, hyper, steps=steps)
    names = {
        "total": "loss",
        "ce_sum": "teskd_ce",
        "kd_sum": "teskd_kl",
        "fea_sum": "teskd_feature",
    }
    for name in meta["columns"]:
        yield case.compare(f"losses {name}", column(sums, names[name], meta["batch"]))
    yield case.compare("final_eval_logits", final_logits(case, network, state, dtype))


def check_method_trajectory(case: Case, dtype: str) -> Iterator[Found]:
    """SGD steps of RepDistiller's loop: columns, student, adapters, gradients of the first step."""
    meta, weights = case.meta, case.meta["weights"]
    network, variables = load(case, meta["student"], None, meta["seed"], dtype)
    pairs = zip(meta["teachers"], meta["teacher_seeds"], strict=True)
    teachers = [load(case, name, None, seed, dtype) for name, seed in pairs]
    methods: Methods = (("ce", CrossEntropy()), ("kd", KD()))
    method, adapters = METHODS[meta["method"]](meta)
    own = {}
    if method is not None:
        parts = tuple(name for name in meta["columns"] if re.fullmatch(r"kd_\d+", name))
        methods = (*methods, (method[0], StageByStage(method[1], parts) if parts else method[1]))
        state = {k: jnp.asarray(x, dtype) for k, x in _adapter_state(meta).items()}
        own = {method[0]: variables_of(state, adapters)} if adapters else {}
    numbers = {"ce": weights["gamma"], "kd": weights["alpha"]}
    hyper = Hyper(
        weight_decay=meta["weight_decay"],
        temperature=meta["kd_T"],
        kd_weight=1.0,
        methods=numbers | ({method[0]: weights["beta"]} if method else {}),
    )
    given = (case, dtype, network, variables, methods)
    state, sums = follow(*given, hyper, teachers, None, own)
    divergence = meta["kd_T"] ** 2 * np.asarray(column(sums, "kl", meta["batch"]))
    columns = {
        "total": column(sums, "loss", meta["batch"]),
        "cls": column(sums, "ce", meta["batch"]),
        "div": divergence,
        "kd": column(sums, method[0], meta["batch"]) if method else np.zeros(len(sums)),
    }
    for name in meta["columns"]:
        ours = columns[name] if name in columns else column(sums, name, meta["batch"])
        yield case.compare(f"losses {name}", ours)
    yield case.compare("final_eval_logits", final_logits(case, network, state, dtype))
    yield from _final_state(case, network, variables, state)
    if own:
        first = to_torch(own[method[0]], adapters)
        last = to_torch(state.method_variables(network.name)[method[0]], adapters)
        keys = [name for name, _ in meta["adapters"]]
        yield from moved(case, "adapter", first, last, keys)
    yield _first_gradients(case, given, hyper, teachers, own, method, adapters)


def check_stochastic(case: Case, dtype: str) -> Iterator[Found]:
    """DGKD's equation for stochastic teaching: K(1-λ) CE + λT² (KL of the largest + kept ones)."""
    meta, masks = case.meta, np.asarray(case.meta["keep"], bool)
    network, variables = load(case, meta["student"], None, meta["seed"], dtype)
    pairs = zip(meta["teachers"], meta["teacher_seeds"], strict=True)
    teachers = [load(case, name, None, seed, dtype) for name, seed in pairs]
    options = LossOptions(cross_entropy="per_teacher")
    methods = (("ce", CrossEntropy(options)), ("kd", KD(options)), ("each", EachTeacher()))
    hyper = Hyper(1.0, meta["weight_decay"], meta["T"], meta["lam"])
    given = (case, dtype, network, variables, methods)
    state, sums = follow(*given, hyper, teachers, masks)
    for name in meta["columns"]:
        ours = column(sums, "loss" if name == "total" else name, meta["batch"])
        yield case.compare(f"losses {name}", ours)
    yield case.compare("final_eval_logits", final_logits(case, network, state, dtype))
    yield from _final_state(case, network, variables, state)
    yield _first_gradients(case, given, hyper, teachers, {}, None, {}, masks)


@dataclasses.dataclass(frozen=True)
class StageByStage(Method):
    """A method of one term, which is shown of single stages too and counted as a whole.

    Args:
      method: of which a part is a stage, or of KDSVD a pair of them.
      parts: the names of their terms, the last for the last stage.
    """

    method: Method
    parts: tuple[str, ...]

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the method."""
        return self.method.needs

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """That of the method, and {part: its own}."""
        terms, after = self.method.terms(variables, context)
        together = 2 if isinstance(self.method, KDSVD) else 1
        first = len(context.student.stages) - len(self.parts) + 1 - together
        for i, name in enumerate(self.parts, first):

            def some(outputs: Outputs, part: slice = slice(i, i + together)) -> Outputs:
                return outputs._replace(stages=outputs.stages[part])

            teachers = tuple(map(some, context.teachers))
            shown = dataclasses.replace(context, student=some(context.student), teachers=teachers)
            (term,) = self.method.terms(_of_stage(variables, i), shown)[0].values()
            terms[name] = Term(term.value, 0.0)
        return terms, after


def _of_stage(variables: dict[str, Any], i: int) -> dict[str, Any]:
    """The variables of stage `i`, as those of the only one."""
    return {
        kind: {teacher: {"0": stages[str(i)]} for teacher, stages in teachers.items()}
        for kind, teachers in variables.items()
    }


@dataclasses.dataclass(frozen=True)
class EachTeacher(Method):
    """The KL to each teacher, also to dropped ones, shown and not counted."""

    needs: ClassVar[tuple[str, ...]] = ("apply",)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"kl_0": of the first, ...}."""
        own, temperature = context.student.logits, context.hyper.temperature
        terms = {}
        for k in range(len(context.teachers)):
            assert context.teacher_apply is not None
            theirs = context.teacher_apply(k, context.inputs).logits
            terms[f"kl_{k}"] = Term(kl_divergence(theirs, own, temperature), 0.0)
        return terms, variables


def _adapter_state(meta: dict[str, Any]) -> dict[str, np.ndarray]:
    return golden.state_dict(meta["adapters"], meta["adapter_seed"])


def _final_state(case: Case, network, variables, state: TrainState) -> Iterator[Found]:
    """Norms of the student's final state and of its way there."""
    last = torch_weights.to_state_dict(state.variables(network.name))
    first = torch_weights.to_state_dict(variables)
    yield from moved(case, "final", first, last, case.meta["keys"])


def _first_gradients(
    case: Case, given, hyper, teachers, own, method, adapters, masks=None
) -> Found:
    """Norms of the gradients at the first step: SGD's momentum after it, without weight decay."""
    network = given[2]
    state, _ = follow(*given, hyper._replace(weight_decay=0.0), teachers, masks, own, steps=1)
    trace = momentum(state.opt_state[network.name])
    grads = torch_weights.to_state_dict({"params": trace["network"]})
    if own:
        grads |= to_torch({"params": trace["methods"][method[0]]}, adapters)
    return case.compare("step1_grads", norms(grads, case.meta["grad_keys"]))


# Method of a case -> ((name, method), where its adapters' variables stand by their first names).
METHODS = {
    "kd": lambda meta: (None, {}),
    "hint": lambda meta: (
        ("fitnet", FitNet(hint_layer=meta["hint_layer"])),
        {"regress_s": ("0",)},
    ),
    "attention": lambda meta: (("at", AT()), {}),
    "nst": lambda meta: (("nst", NST()), {}),
    "similarity": lambda meta: (("sp", SP()), {}),
    "pkt": lambda meta: (("pkt", PKT()), {}),
    "rkd": lambda meta: (("rkd", RKD()), {}),
    "kdsvd": lambda meta: (("kdsvd", KDSVD()), {}),
    "correlation": lambda meta: (
        ("cc", CC(embedding_size=dict(meta["adapters"])["embed_s.linear.bias"][0])),
        {"embed_s": ("0", "student"), "embed_t": ("0", "teacher")},
    ),
    "vid": lambda meta: (("vid", VID()), {"criterion_kd": ("0",)}),
}
