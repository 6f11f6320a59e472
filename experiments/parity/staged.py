"""Methods that prepare a network or an adapter in a phase before the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from distill_jax.interop import torch_weights
from distill_jax.methods import AB, FSP, FT, KD, CrossEntropy, Hyper, Method
from distill_jax.models import Variables
from distill_jax.train.metrics import StepMetrics
from distill_jax.train.optim import OptimOptions
from distill_jax.train.reach import as_phase
from distill_jax.train.stage import Recipe, Stage
from distill_jax.train.state import Batch, TrainState
from distill_jax.train.step import init_state, make_train_step
from distill_jax.train.terms import Methods, Student
from experiments import golden
from experiments.parity import factors
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.cases import Case, Found, batch, load
from experiments.parity.trajectories import column, final_logits, momentum, moved, norms

States = dict[str, Any]  # state dicts of adapters, by PyTorch's names and layouts


class Kind(NamedTuple):
    """A method of the cases.

    Args:
      name: of the method.
      method: the method.
      teaches: whether it has a part in the training that follows the phase.
      variables: (state dict of its adapters) -> its own variables and those that the phase trains.
      state: (its variables, names) -> the state dict of those of its adapters that are there.
    """

    name: str
    method: Method
    teaches: bool
    variables: Callable[[States], tuple[Variables, Variables]]
    state: Callable[[Variables, list[str]], States]


class Run(NamedTuple):
    """A stage over the batches of a case.

    Args:
      case: it.
      dtype: of the computation.
      stage: what is trained.
      teachers: their variables.
      hyper: its numbers, the learning rate among them.
    """

    case: Case
    dtype: str
    stage: Stage
    teachers: tuple[Variables, ...]
    hyper: Hyper

    def follow(
        self, variables: Variables, own: Variables, steps: int
    ) -> tuple[TrainState, list[StepMetrics]]:
        """Our train step from the network's and the method's variables on."""
        stage, name = self.stage, self.stage.network.name
        student = Student(
            network=stage.network,
            methods=stage.methods,
            optimizer=stage.recipe.optim,
            schedule=lambda step: jnp.ones((), self.dtype),
            frozen=tuple(range(len(stage.teachers))),
        )
        step = jax.jit(
            make_train_step(
                students=(student,),
                teachers=stage.teachers,
                preprocess=lambda keys, images: images,
            )
        )
        key, places, sums = jax.random.key(0), jnp.arange(stage.recipe.batch_size), []
        state = init_state(stage.network, stage.recipe.optim, key, own, variables)
        for t in range(steps):
            images, labels = batch(self.case, t, self.dtype)
            given = Batch(images, labels, places, places)
            state, found = step(state, self.teachers, given, {name: self.hyper}, key)
            sums.append(jax.device_get(found[name]))
        return state, sums

    def first_gradients(self, variables: Variables, own: Variables) -> dict[str, Any]:
        """What the optimizer holds, as its momentum has it after a step without weight decay."""
        bare = self._replace(hyper=self.hyper._replace(weight_decay=0.0))
        state, _ = bare.follow(variables, own, 1)
        held = traverse_util.flatten_dict(momentum(state.opt_state))
        moving = {k: x for k, x in held.items() if not isinstance(x, optax.MaskedNode)}
        return traverse_util.unflatten_dict(moving)


def check(case: Case, dtype: str) -> Iterator[Found]:
    """The phase, then the training: losses, first gradients, the networks and adapters after."""
    meta, kind = case.meta, KINDS[case.meta["method"]](case.meta)
    network, first = load(case, meta["student"], None, meta["seed"], dtype)
    pairs = zip(meta["teachers"], meta["teacher_seeds"], strict=True)
    teachers = [load(case, name, None, seed, dtype) for name, seed in pairs]
    filled = golden.state_dict(meta.get("adapters", []), meta.get("adapter_seed", 0))
    adapters = {name: jnp.asarray(x, dtype) for name, x in filled.items()}
    own, prepared = kind.variables(adapters)

    def given(methods: Methods, rate: float, hyper: Hyper) -> Run:
        optimizer = OptimOptions(momentum=meta["momentum"], nesterov=meta["nesterov"])
        recipe = Recipe(batch_size=meta["batch"], optim=optimizer)
        networks = tuple(teacher for teacher, _ in teachers)
        stage = Stage(network, networks, recipe, 0, methods, (1.0,) * len(methods))
        hyper = hyper._replace(lr_scale=rate, weight_decay=meta["weight_decay"])
        return Run(case, dtype, stage, tuple(variables for _, variables in teachers), hyper)

    preparation = kind.method.preparation() or kind.method
    phase = given(((kind.name, preparation),), meta["stage1"]["lr"], Hyper())
    phase = phase._replace(stage=as_phase(phase.stage, batch(case, 0, dtype)[1]))
    before, sums = phase.follow(
        first, {kind.name: prepared} if prepared else {}, meta["stage1"]["steps"]
    )
    start, left = before.variables(network.name), before.method_variables(network.name)
    left = left.get(kind.name, {})
    yield case.compare("stage1_loss", column(sums, "loss", meta["batch"]))
    yield from _network("stage1", case, first, start)
    keys = meta["stage1"]["grad_keys"]
    yield _gradients(case, "stage1_step1_grads", keys, phase, (first, prepared), kind)

    begun = kind.method.begin(own, left) if kind.teaches else {}
    main = given(*_main(meta, kind))
    state, sums = main.follow(start, {kind.name: begun} if begun else {}, meta["steps"])
    yield from _columns(case, dtype, kind, sums)
    yield case.compare("final_eval_logits", final_logits(case, network, state, dtype))
    yield from _network("final", case, first, state.variables(network.name))
    yield _gradients(case, "step1_grads", meta["grad_keys"], main, (start, begun), kind)
    if adapters:
        names = [name for name, _ in meta["adapters"]]
        trained = state.method_variables(network.name).get(kind.name, {})
        last = kind.state(left, names) | kind.state(trained, names)
        yield from moved(case, "adapter", adapters, last, names)


def _main(meta: dict[str, Any], kind: Kind) -> tuple[Methods, float, Hyper]:
    """The training after the phase: methods, learning rate and numbers."""
    weights = meta["weights"]
    methods: Methods = (("ce", CrossEntropy()), ("kd", KD()))
    numbers = {"ce": weights["gamma"], "kd": weights["alpha"]}
    if kind.teaches:
        methods = (*methods, (kind.name, kind.method))
        numbers |= {kind.name: weights["beta"]}
    return methods, meta["lr"], Hyper(temperature=meta["kd_T"], kd_weight=1.0, methods=numbers)


def _columns(case: Case, dtype: str, kind: Kind, sums: list[StepMetrics]) -> Iterator[Found]:
    meta = case.meta
    columns = {
        "total": column(sums, "loss", meta["batch"]),
        "cls": column(sums, "ce", meta["batch"]),
        "div": meta["kd_T"] ** 2 * np.asarray(column(sums, "kl", meta["batch"])),
        "kd": column(sums, kind.name, meta["batch"]) if kind.teaches else np.zeros(len(sums)),
    }
    reference = case.arrays["losses" if dtype == "float32" else "f64_losses"]
    for i, name in enumerate(meta["columns"]):
        bound = max(1e-5, 30 * meta["noise_columns"][i])
        yield case.compare(f"losses {name}", columns[name], reference[:, i], bound)


def _network(name: str, case: Case, first: Variables, last: Variables) -> Iterator[Found]:
    """Norms of a network's state, and of its way there."""
    first, last = (torch_weights.to_state_dict(variables) for variables in (first, last))
    yield from moved(case, name, first, last, case.meta["keys"])


def _gradients(
    case: Case, what: str, keys: list[str], run: Run, given: tuple[Variables, Variables], kind: Kind
) -> Found:
    """Norms of the gradients at the first step, of all that the optimizer holds."""
    variables, own = given
    held = run.first_gradients(variables, {kind.name: own} if own else {})
    found = torch_weights.to_state_dict({"params": held.get("network", {})})
    found |= kind.state({"params": held.get("methods", {}).get(kind.name, {})}, keys)
    return case.compare(what, norms(found, keys))


def _fsp(meta: dict[str, Any]) -> Kind:
    return Kind("fsp", FSP(), False, lambda filled: ({}, {}), lambda variables, names: {})


def _abound(meta: dict[str, Any]) -> Kind:
    """A connector where a stage's channels are others; theirs are numbered by the stage."""
    start = "connector.connectors."
    numbers = {name.removeprefix(start).split(".")[0] for name, _ in meta["adapters"]}
    places: Places = {number: (f"{number} of 0",) for number in numbers}

    def variables(filled: States) -> tuple[Variables, Variables]:
        own = variables_of({k.removeprefix(start): x for k, x in filled.items()}, places)
        return own, own

    def state(variables: Variables, names: list[str]) -> States:
        return {f"{start}{k}": x for k, x in to_torch(variables, places).items()}

    return Kind("ab", AB(), False, variables, state)


def _factor(meta: dict[str, Any]) -> Kind:
    shapes = dict(map(tuple, meta["adapters"]))
    factor, channels, *_ = shapes["paraphraser.encoder.3.weight"]

    def variables(filled: States) -> tuple[Variables, Variables]:
        translator = factors.variables_from(filled, "translator", factors.TRANSLATOR)
        paraphraser = factors.variables_from(filled, "paraphraser", factors.PARAPHRASER)
        return {**translator, "paraphraser": factors.encoders(paraphraser)}, paraphraser

    def state(variables: Variables, names: list[str]) -> States:
        """Those of the paraphraser from the phase, those of the translator from the training."""
        own = {kind: tree for kind, tree in variables.items() if kind != "paraphraser"}
        whole = "deconv0" in own.get("params", {}).get("0", {})
        which = (
            ("paraphraser", factors.PARAPHRASER) if whole else ("translator", factors.TRANSLATOR)
        )
        return factors.state_of(own, names, *which)

    return Kind("ft", FT(rate=factor / channels), True, variables, state)


# By the method of a case, with what its meta says.
KINDS = {"fsp": _fsp, "abound": _abound, "factor": _factor}
