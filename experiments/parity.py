"""Compares this library with outputs of the authors' PyTorch code.

  python -m experiments.parity --golden=tests/golden

An error is the largest absolute difference over the largest magnitude of the reference. A case
holds where every error in float32 is within its bound. A ReLU or a max pool whose input is a
rounding error away from a tie can fall the other way in ours than in theirs, and moves gradients by
more than that: a case that breaks a bound is computed again in float64, and holds where that is
within it. Exit code 1 where a bound is broken in both.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.table import Table

from distill_jax import models, report
from distill_jax.interop import torch_weights
from distill_jax.methods import losses
from distill_jax.train import optim
from distill_jax.train.step import (
    Batch,
    Hyper,
    TrainState,
    evolving_objective,
    make_train_step,
    multi_teacher_objective,
)
from experiments import golden

GOLDEN = flags.DEFINE_string("golden", "tests/golden", "Folder of the cases (*.npz).")
RUNNING_STATISTICS = 1e-4
EXACT = 1e-5


class Found(NamedTuple):
    """One compared array: its error and its bound."""

    what: str
    error: float
    bound: float


class Case(NamedTuple):
    """What a file of the folder holds: {"meta": dict, array name: array}."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def bound(self, what: str) -> float:
        """Thirty times the authors' own float32 noise, at least 1e-5."""
        return max(EXACT, 30 * self.meta.get("noise", {}).get(what, 0.0))

    def compare(self, what: str, ours: Any, reference: Any = None, bound: float = 0.0) -> Found:
        """Compares with the array `what` of the case, or with `reference`."""
        reference = np.asarray(self.arrays[what] if reference is None else reference, np.float64)
        ours = np.asarray(ours, np.float64)
        if ours.shape != reference.shape:
            raise ValueError(f"{what}: shape {ours.shape}, expected {reference.shape}")
        error = np.max(np.abs(ours - reference)) / np.max(np.abs(reference))
        return Found(what, float(error), bound or self.bound(what))


# ------------------------------------------------------------------------------- kinds of cases
def network_name(name: str) -> str:
    """This library's name for a network of the cases: "plane2", or file.function of TESKD's.

    The authors' files are resnet_our, resnext_our, senet_our and vgg_our; their functions have the
    depth, and say if they are for CIFAR: resnet_our.cifarresnet18 is evolving:cifar_resnet18.
    """
    if "." not in name:
        return name
    file, function = name.split(".")
    family, depth = file.removesuffix("_our"), re.search(r"[a-z](\d+)", function)
    if depth is None:
        raise ValueError(f"{name}: no depth in its name")
    kind = "cifar" if "cifar" in function or family == "vgg" else "imagenet"
    return f"evolving:{kind}_{family}{depth[1]}"


def load(case: Case, name: str, entries: list | None, seed: int, dtype: str):
    """The network `name` with the weights of `seed`, in `dtype`."""
    size = case.meta.get("size", 32)
    network = models.build(network_name(name), case.meta["classes"], (size, size, 3), dtype)
    entries = entries or torch_weights.entries(network)
    variables = torch_weights.from_state_dict(golden.state_dict(entries, seed), network)
    return network, jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)


def shown(outputs: models.Outputs) -> list[jax.Array]:
    """Logits of the backbone, logits of the branches, feature of the backbone, of the branches."""
    everything = (outputs, *outputs.branches)
    if not outputs.branches:
        return [outputs.logits]
    return [x.logits for x in everything] + [x.feature for x in everything]


def check_model(case: Case, dtype: str) -> Iterator[Found]:
    """Outputs in both modes, gradients of the cross-entropy, running statistics afterwards."""
    meta, n = case.meta, case.meta["n"]
    network, variables = load(case, meta["name"], meta["state"], meta["seed"], dtype)
    parameters = models.count_parameters(network)
    yield Found("params", abs(parameters - meta["params"]), 0.5)
    images = jnp.asarray(golden.images(n, meta["seed"]), dtype)
    labels = golden.labels(n, meta["seed"], meta["classes"])
    evaluated = jax.jit(lambda v: shown(network.apply(v, images)[0]))(variables)

    def loss_of(params):
        outputs, stats = network.apply({**variables, "params": params}, images, train=True)
        ce = jnp.mean(losses.cross_entropy(outputs.logits, labels))
        return ce, (shown(outputs), stats)

    trained = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(variables["params"])
    (ce, (outputs, stats)), grads = trained
    for mode, found in (("eval", evaluated), ("train", outputs)):
        for i, output in enumerate(found):
            yield case.compare(f"{mode}_{i}", output)
    yield case.compare("ce", ce)
    grads = torch_weights.to_state_dict({"params": grads})
    yield case.compare("grad_norms", [np.linalg.norm(grads[key]) for key in meta["grad_keys"]])
    stats = torch_weights.to_state_dict({"batch_stats": stats})
    for key, reference in meta["bn_after"].items():
        found = [np.mean(stats[key]), np.linalg.norm(stats[key])]
        yield case.compare(key, found, reference, RUNNING_STATISTICS)


LOSSES = {
    "element_mean": losses.LossOptions(kl_reduction="element_mean"),
    "batch_mean": losses.LossOptions(),
    "batch_mean_ce_per_teacher": losses.LossOptions(cross_entropy="per_teacher"),
}


def check_multi_teacher(case: Case, dtype: str) -> Iterator[Found]:
    """Totals of the multi-teacher loss and their gradients, for each option, T, λ and mask."""
    student, teachers = (jnp.asarray(case.arrays[k], dtype) for k in ("student", "teachers"))

    def total(logits, options, keep, temperature, kd_weight):
        return losses.multi_teacher(
            logits,
            case.arrays["labels"],
            teachers,
            keep,
            temperature=temperature,
            kd_weight=kd_weight,
            options=options,
        )[0].mean()

    both = jax.jit(jax.value_and_grad(total), static_argnums=1)
    for i, one in enumerate(case.meta["cases"]):
        keep, gradients = jnp.asarray(one["mask"], bool), []
        for name, options in LOSSES.items():
            value, gradient = both(student, options, keep, one["T"], one["lam"])
            gradients.append(gradient)
            yield case.compare(f"{name} {i}", value, one[name])
        yield case.compare(f"grads_{i}", jnp.stack(gradients))


def check_trajectory(case: Case, dtype: str) -> Iterator[Found]:
    """SGD steps under explicit masks: losses, the final network's logits, norms of its state."""
    meta, masks = case.meta, np.asarray(case.meta["masks"], bool)
    network, variables = load(case, meta["student"], meta["state"], meta["seed"], dtype)
    teachers = [
        load(case, name, None, seed, dtype)
        for name, seed in zip(meta["teachers"], meta["teacher_seeds"], strict=True)
    ]
    options = losses.LossOptions(kl_reduction=meta["kl"].replace(" ", "_"))
    step = make_train_step(
        network=network,
        teachers=tuple(network for network, _ in teachers),
        optimizer=optim.OptimOptions(momentum=meta["momentum"]),
        schedule=lambda step: meta["lr"],
        objective=multi_teacher_objective(options),
        prepare=lambda keys, images: images,
        draw_keep=(lambda key, step, hyper: jnp.asarray(masks)[step]) if teachers else None,
    )
    hyper = Hyper(1.0, meta["weight_decay"], meta["T"], meta["lam"])
    state, sums = follow(case, step, variables, tuple(v for _, v in teachers), hyper, dtype)
    yield case.compare("loss", [s["loss"][0] / meta["batch"] for s in sums])
    yield case.compare("ce", [s["ce"][0] / meta["batch"] for s in sums], bound=case.bound("loss"))
    n = len(case.arrays["final_eval_logits"])
    images = jnp.asarray(golden.images(n, meta["seed"] * 100 + 99), dtype)
    yield case.compare("final_eval_logits", network.apply(state.variables, images)[0].logits)
    final = torch_weights.to_state_dict(state.variables)
    yield case.compare("final_norms", [np.linalg.norm(final[key]) for key in meta["keys"]])


def evolve_options(meta: dict[str, Any], **changes: Any) -> losses.EvolveOptions:
    """The weights of a TESKD case."""
    names = ("temperature", "ce_weight", "kd_weight", "fea_weight")
    return losses.EvolveOptions(*(changes.get(name, meta.get(name)) for name in names))


def check_self_distillation(case: Case, dtype: str) -> Iterator[Found]:
    """The terms of TESKD's loss, its total, and gradients of all logits and features."""
    logits, features = (jnp.asarray(case.arrays[k], dtype) for k in ("logits", "features"))
    labels = case.arrays["labels"]
    for i, one in enumerate(case.meta["cases"]):
        options = evolve_options(case.meta, fea_weight=one["fea_weight"])

        def total(logits, features, options=options):
            loss, terms = losses.self_distillation(
                logits, features, labels, batch_size=len(labels), options=options
            )
            return loss.mean(), {name: values.mean() for name, values in terms.items()}

        both = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (value, terms), gradients = both(logits, features)
        yield case.compare(f"total {i}", value, one["total"])
        for ours, theirs in (("ce", "ce"), ("kl", "kd"), ("feature", "fea")):
            yield case.compare(f"{theirs} {i}", terms[ours], one[theirs])
        yield case.compare(f"grad_logits_{i}", gradients[0])
        yield case.compare(f"grad_features_{i}", gradients[1])


def check_evolution(case: Case, dtype: str) -> Iterator[Found]:
    """SGD steps of an evolving network: each step's terms, the final backbone's logits."""
    meta = case.meta
    network, variables = load(case, meta["name"], meta.get("state"), meta["seed"], dtype)
    step = make_train_step(
        network=network,
        teachers=(),
        optimizer=optim.OptimOptions(momentum=meta["momentum"], nesterov=meta["nesterov"]),
        schedule=lambda step: meta["lr"],
        objective=evolving_objective(evolve_options(meta), losses.LossOptions()),
        prepare=lambda keys, images: images,
    )
    hyper = Hyper(1.0, meta["weight_decay"])
    state, sums = follow(case, step, variables, (), hyper, dtype)
    names = {"total": "loss", "ce_sum": "ce", "kd_sum": "kl", "fea_sum": "feature"}
    columns = [[s[names[column]][0] / meta["batch"] for column in meta["columns"]] for s in sums]
    yield case.compare("losses", columns)
    n = len(case.arrays["final_eval_logits"])
    images = jnp.asarray(golden.images(n, meta["seed"] * 100 + 99), dtype)
    logits = jax.jit(lambda v: network.apply(v, images)[0].logits)(state.variables)
    yield case.compare("final_eval_logits", logits)


def follow(case: Case, step, variables, frozen, hyper, dtype) -> tuple[TrainState, list]:
    """Runs a train step over the batches of a trajectory."""
    meta, steps = case.meta, len(next(iter(case.arrays.values())))
    optimizer = optim.OptimOptions(momentum=meta["momentum"], nesterov=meta.get("nesterov", False))
    opt_state = optim.transform(optimizer, 0.0, 0.0).init(variables["params"])
    state = TrainState(
        jnp.int32(0), variables["params"], variables["batch_stats"], opt_state, jnp.int32(0)
    )
    step, key, sums = jax.jit(step), jax.random.key(0), []
    positions = jnp.arange(meta["batch"], dtype=jnp.int32)
    for t in range(steps):
        seed = meta["seed"] * 100 + t
        images = jnp.asarray(golden.images(meta["batch"], seed), dtype)
        labels = golden.labels(meta["batch"], seed, meta["classes"])
        batch = Batch(images, labels, positions)
        state, found = step(state, frozen, batch, hyper, key)
        sums.append(jax.device_get(found))
    return state, sums


Check = Callable[[Case, str], Iterator[Found]]


def check_of(case: Case) -> Check | None:
    """The check for a case, by what it holds; None for a kind that is not known."""
    if "state" in case.meta and "grad_keys" in case.meta:
        return check_model
    if "teachers" in case.arrays and "cases" in case.meta:
        return check_multi_teacher
    if "features" in case.arrays and "cases" in case.meta:
        return check_self_distillation
    if "masks" in case.meta and "student" in case.meta:
        return check_trajectory
    if "columns" in case.meta and "fea_weight" in case.meta:
        return check_evolution
    return None


# -------------------------------------------------------------------------------------- the report
def read_cases(folder: Path) -> list[Case]:
    """The cases of a folder, by name.

    Raises:
      ValueError: no folder, or no case in it.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise ValueError(f"no golden case (*.npz) in {folder}")
    cases = []
    for file in files:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        cases.append(Case(file.stem, json.loads(str(arrays.pop("meta"))), arrays))
    return cases


def check_case(case: Case, check: Check) -> tuple[list[Found], list[Found], str]:
    """What float32 gives; what float64 gives, where float32 breaks a bound; the verdict."""
    single = list(check(case, "float32"))
    if all(found.error <= found.bound for found in single):  # NaN is within no bound
        return single, [], "holds"
    with jax.enable_x64(True):
        double = list(check(case, "float64"))
    decided = all(min(s.error, d.error) <= s.bound for s, d in zip(single, double, strict=True))
    return single, double, "holds in float64" if decided else "BROKEN"


def run(folder: Path) -> tuple[Table, bool]:
    """Checks every case of the folder; the table, and whether none is broken."""
    table = Table("case", "compared", "worst array", "float32", "float64", "bound", "verdict", "s")
    fine = True
    for case in read_cases(folder):
        check, begun = check_of(case), time.perf_counter()
        if check is None:
            table.add_row(case.name, "-", "-", "-", "-", "-", "unknown kind", "")
            continue
        single, double, said = check_case(case, check)
        worst = max(range(len(single)), key=lambda i: single[i].error / single[i].bound)
        fine &= said != "BROKEN"
        table.add_row(
            case.name,
            str(len(single)),
            single[worst].what,
            f"{single[worst].error:.1e}",
            f"{double[worst].error:.1e}" if double else "",
            f"{single[worst].bound:.1e}",
            said,
            f"{time.perf_counter() - begun:.1f}",
        )
    return table, fine


def main(argv: list[str]) -> int:
    """Prints the table."""
    try:
        table, fine = run(Path(GOLDEN.value))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report.console().print(table)
    return 0 if fine else 1


if __name__ == "__main__":
    app.run(main)
