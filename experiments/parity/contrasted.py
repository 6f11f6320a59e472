"""CRD on features that are given, and through real networks, with the examples that are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.interop import torch_weights
from distill_jax.methods import CRD, KD, Context, CrossEntropy, Hyper, Term
from distill_jax.train.metrics import StepMetrics
from distill_jax.train.state import TrainState
from experiments import golden
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.cases import Case, Found, load
from experiments.parity.features import context_of
from experiments.parity.given import Arrays, Computed
from experiments.parity.losses import outputs
from experiments.parity.trajectories import column, final_logits, follow, momentum, moved, norms

_PLACES: Places = {"embed_s": ("0", "student"), "embed_t": ("0", "teacher")}
# In a trajectory the names start with the loop's variable.
_START = "criterion_kd."
_BANKS = {f"{_START}contrast.memory_v1": "student", f"{_START}contrast.memory_v2": "teacher"}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Given(CRD):
    """CRD of given examples and negatives, instead of those of the batch and drawn ones.

    Args:
      index: (steps, B) places of the examples.
      contrast_idx: (steps, B, 1 + K) likewise, of which the first is the example itself.
    """

    index: Any
    contrast_idx: Any

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """Those of the step's examples."""
        index = jnp.asarray(self.index)[self._step(context)]
        return super().terms(variables, dataclasses.replace(context, index=index))

    def draw(self, split: dict[str, Any], context: Context) -> jax.Array:
        """Counts the negatives of the step."""
        negatives = jnp.asarray(self.contrast_idx)[self._step(context)][:, 1:]
        rows = jnp.arange(len(negatives))[:, None]
        counts = jnp.zeros((len(negatives), len(split["labels"])), jnp.int32)
        return counts.at[rows, negatives].add(1)

    def _step(self, context: Context) -> jax.Array:
        return jnp.asarray(context.epoch, jnp.int32)  # an epoch has one step


def _variables(params: Mapping[str, Any], banks: tuple[Any, ...], z: Any = None) -> dict[str, Any]:
    """The method's variables of one teacher; the constants are not known where there are none."""
    log_z = jnp.zeros(2, banks[0].dtype) if z is None else jnp.log(z)
    memory = dict(zip(("student", "teacher"), banks, strict=True))
    memory |= {"log_z": log_z, "fixed": jnp.asarray(z is not None)}
    split = {"labels": jnp.zeros(len(banks[0]), jnp.int32), "most": jnp.int32(0)}
    return {**variables_of(params, _PLACES), "memory": {"0": memory}, "split": split}


def crd(numbers: dict[str, Any], inputs: Arrays, state: Arrays) -> Computed:
    """A step: the loss, both embeddings, the memory after it and the constants."""
    method = Given(
        embedding_size=numbers["feat_dim"],
        temperature=numbers["nce_t"],
        momentum=numbers["nce_m"],
        index=inputs["idx"][None],
        contrast_idx=inputs["contrast_idx"][None],
    )
    banks = inputs["memory_student"], inputs["memory_teacher"]
    variables = _variables(state, banks, inputs.get("Z"))
    student, teacher = (outputs(feature=inputs[f"{who}_feature"]) for who in ("student", "teacher"))
    terms, after = method.terms(variables, context_of(student, teacher))
    own, theirs = method.embed(variables["params"]["0"], student, teacher)
    memory = after["memory"]["0"]
    return Computed(
        {"crd": jnp.mean(terms["crd"].value)},
        out={
            "embedded_student": own,
            "embedded_teacher": theirs,
            "memory_student_after": memory["student"],
            "memory_teacher_after": memory["teacher"],
            "Z": jnp.exp(memory["log_z"]),
        },
    )


def check(case: Case, dtype: str) -> Iterator[Found]:
    """SGD steps with given negatives: columns, student, embeddings, memory, first gradients."""
    meta, weights = case.meta, case.meta["weights"]
    network, variables = load(case, meta["student"], None, meta["seed"], dtype)
    pairs = zip(meta["teachers"], meta["teacher_seeds"], strict=True)
    teachers = [load(case, name, None, seed, dtype) for name, seed in pairs]
    method = Given(
        embedding_size=meta["feat_dim"],
        temperature=meta["nce_t"],
        momentum=meta["nce_m"],
        index=case.arrays["index"],
        contrast_idx=case.arrays["contrast_idx"],
    )
    entries = golden.state_dict(meta["adapters"], meta["adapter_seed"])
    first = {key: jnp.asarray(x, dtype) for key, x in entries.items()}
    params = {key.removeprefix(_START): x for key, x in first.items() if key not in _BANKS}
    own = {"crd": _variables(params, tuple(first[key] for key in _BANKS))}
    hyper = Hyper(
        weight_decay=meta["weight_decay"],
        temperature=meta["kd_T"],
        kd_weight=1.0,
        methods={"ce": weights["gamma"], "kd": weights["alpha"], "crd": weights["beta"]},
    )
    methods = (("ce", CrossEntropy()), ("kd", KD()), ("crd", method))
    given = (case, dtype, network, variables, methods)
    state, sums = follow(*given, hyper, teachers, None, own)
    yield from _columns(case, sums, dtype)
    yield case.compare("final_eval_logits", final_logits(case, network, state, dtype))
    start = torch_weights.to_state_dict(variables)
    last = torch_weights.to_state_dict(state.variables(network.name))
    yield from moved(case, "final", start, last, meta["keys"])
    after = state.method_variables(network.name)["crd"]
    ends = _named(after["params"]) | {k: after["memory"]["0"][own] for k, own in _BANKS.items()}
    yield from moved(case, "adapter", first, ends, [name for name, _ in meta["adapters"]])
    yield case.compare("final_Z", np.exp(after["memory"]["0"]["log_z"]))
    undecayed = hyper._replace(weight_decay=0.0)
    state, _ = follow(*given, undecayed, teachers, None, own, steps=1)
    yield case.compare("step1_grads", norms(_gradients(state, network.name), meta["grad_keys"]))


def _columns(case: Case, sums: list[StepMetrics], dtype: str) -> Iterator[Found]:
    """The terms of each step; the KL is given where its weight is 0 too."""
    meta = case.meta
    of = {"total": "loss", "cls": "ce", "div": "kl", "kd": "crd"}
    reference = case.arrays["losses" if dtype == "float32" else "f64_losses"]
    for i, name in enumerate(meta["columns"]):
        ours = np.asarray(column(sums, of[name], meta["batch"]))
        ours = meta["kd_T"] ** 2 * ours if name == "div" else ours
        bound = max(1e-5, 30 * meta["noise_columns"][i])
        yield case.compare(f"losses {name}", ours, reference[:, i], bound)


def _named(params: Any) -> dict[str, Any]:
    """The state dict of the embeddings."""
    return {f"{_START}{key}": x for key, x in to_torch({"params": params}, _PLACES).items()}


def _gradients(state: TrainState, network: str) -> dict[str, Any]:
    """Those of the first step, by SGD's momentum after it, without weight decay."""
    trace = momentum(state.opt_state[network])
    own = torch_weights.to_state_dict({"params": trace["network"]})
    return own | _named(trace["methods"]["crd"])
