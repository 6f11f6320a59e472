"""The variants of a step in this library, through its public functions, and the matrix peak.

  recomputing  all teachers in the student's graph
  dropping     the same, one of the teachers dropped for each mini-batch
  table        the teachers' logits read from a cache, as they are where nothing is augmented
  alone        no teachers: the student's own training step, or an evolving network's

On several devices the step runs as `Case.parallel` says: one program by shard_map, or under pmap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data, models, traced
from distill_jax.interop import torch_weights
from distill_jax.methods import KD, TESKD, CrossEntropy, LossOptions
from distill_jax.train import inference, programs, sharding, startup
from distill_jax.train.dropping import Dropping
from distill_jax.train.optim import OptimOptions
from distill_jax.train.stage import Recipe, Stage
from distill_jax.train.state import DeviceDataset
from distill_jax.train.step import init_state
from experiments.benchmark import cases, flops
from experiments.benchmark.cases import Case

ROWS = 256  # of the order: the most steps of one dispatch
# Without tracing, whose events contain one another.
COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_compiling: list[float] = []


def set_up(cache: str) -> None:
    """Counts the seconds of compilation; keeps what is compiled in `cache` where that is given.

    JAX is asked for the same as by a run.
    """
    startup.ask_for_graphs()
    startup.ask_for_fast_convolutions()
    startup.start_cudnn()
    jax.monitoring.register_event_duration_secs_listener(_listen)
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        traced.keep_in(Path(cache) / "traced")


def _listen(event: str, seconds: float, **details: Any) -> None:
    if event in COMPILE_EVENTS:
        _compiling.append(seconds)


def compiled_seconds() -> float:
    """Seconds of lowering and compiling so far."""
    return sum(_compiling)


class Ready(NamedTuple):
    """A loop with all that it is called with."""

    loop: Any  # (state, sums, frozen, dataset, order, start, stop, hyper, key) -> state, sums
    state: Any
    sums: Any
    frozen: Any
    dataset: Any
    order: Any
    hyper: Any
    key: Any


def stage_of(case: Case, network, teachers) -> Stage:
    """The stage whose step is measured."""
    recipe = Recipe(
        batch_size=case.batch,
        temperature=cases.TEMPERATURE,
        kd_weight=cases.KD_WEIGHT,
        dropping=Dropping("fixed") if case.drops else Dropping(),
        optim=OptimOptions(
            learning_rate=cases.LEARNING_RATE,
            momentum=cases.MOMENTUM,
            weight_decay=cases.WEIGHT_DECAY,
        ),
    )
    methods: tuple[tuple[str, Any], ...]
    if network.branches:
        methods = (("teskd", TESKD()),)
    elif teachers:
        methods = (("ce", CrossEntropy(LossOptions())), ("kd", KD()))
    else:
        methods = (("ce", CrossEntropy()),)
    weights = (1.0,) * len(methods)
    return Stage(network, teachers, recipe, seed=0, methods=methods, weights=weights)


def library(case: Case, network, teachers, student, frozen) -> Ready:
    """The library's own train loop on resident data: all that knows its signatures is here."""
    stage = stage_of(case, network, teachers)
    several = case.members > 1
    topology = sharding.Topology(case.parallel if case.devices > 1 else "jit", case.devices)
    images, labels = cases.images(case.resident), cases.labels(case.resident)
    about = data.from_arrays(
        (images, labels),
        (images, labels),
        classes=cases.CLASSES,
        mean=cases.MEAN,
        std=cases.STD,
        valid_fraction=0.0,
    )
    shared = True if several else None
    program = programs.train_program((stage,), ROWS, about, topology, shared_data=shared)
    order, key = cases.order(case, ROWS), jax.random.key(0)
    state = init_state(network, stage.recipe.optim, key, start=student)
    cached = None
    if case.variant == "table":
        pairs = list(zip(teachers, frozen, strict=True))
        cached = inference.teacher_outputs(pairs, about.train, about, topology)
        frozen = ()
    else:
        frozen = programs.freeze_teachers(teachers, frozen, topology)
    dataset = topology.device_put(topology.hold(DeviceDataset(images, labels, cached)))
    state, key, hyper = topology.device_put((state, key, {network.name: stage.hyper}))
    sums = programs.zero_sums(
        program.body,
        *(state, frozen, hyper, key),
        batch_size=case.batch,
        spec=about.spec,
        cached=cached,
        where=topology.replicated,
    )
    if several:
        alike = (state, sums, frozen, np.asarray(order), hyper, key)
        state, sums, frozen, order, hyper, key = (
            topology.stack([one] * case.members) for one in alike
        )
        if cached is not None:  # which is a member's own
            dataset = dataset._replace(teachers=topology.stack([cached] * case.members))
    else:
        state, sums, key = topology.replicate((state, sums, key))
    return Ready(program.loop, state, sums, frozen, dataset, order, hyper, key)


class TrainingStep:
    """Training steps of the library, as many as asked in one dispatch."""

    def __init__(self, case: Case):
        names = (case.student, *case.teachers)
        networks = [
            models.build(name, cases.CLASSES, cases.IMAGE_SHAPE, case.dtype) for name in names
        ]
        student, *frozen = (
            torch_weights.from_state_dict(
                cases.state_dict(torch_weights.entries(network), seed), network
            )
            for network, seed in zip(networks, cases.seeds(case), strict=True)
        )
        network, *teachers = networks
        self.ready = library(case, network, tuple(teachers), student, tuple(frozen))
        self.case, self.networks = case, networks
        self.device = described(jax.devices()[0])

    def run(self, steps: int) -> float:
        """The mean loss of `steps` steps."""
        ready, before = self.ready, jax.device_get(self.ready.sums[self.networks[0].name].loss)
        state, sums = ready.loop(
            ready.state,
            ready.sums,
            ready.frozen,
            ready.dataset,
            ready.order,
            np.int32(0),
            np.int32(steps),
            ready.hyper,
            ready.key,
        )
        after = jax.device_get(jax.block_until_ready(sums)[self.networks[0].name].loss)
        self.ready = ready._replace(state=state, sums=sums)
        total, count = (np.sum(new) - np.sum(old) for new, old in zip(after, before, strict=True))
        return float(total / count)

    @property
    def flops(self) -> float:
        """Operations of a step; asked for when the first is done, so that no start pays for it."""
        case, (network, *teachers) = self.case, self.networks
        kept = 1 - 1 / len(teachers) if case.drops else 1.0
        computed = () if case.variant == "table" else tuple(teachers)
        return flops.step(network, computed, case.batch, kept) * case.members

    @property
    def compile_seconds(self) -> float:
        """Of this process, so far."""
        return compiled_seconds()

    def peak_bytes(self) -> int:
        """The device's own count; 0 on the CPU, where the process's is meant."""
        stats = jax.devices()[0].memory_stats() or {}
        return int(stats.get("peak_bytes_in_use", 0))


class MatrixPeak:
    """Products of two square matrices, as large as `case.student` says: the machine's peak."""

    compile_seconds = 0.0

    def __init__(self, case: Case):
        n, dtype = int(case.student), jnp.dtype(case.dtype)
        self.a, self.b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in (0, 1))
        self.product = jax.jit(lambda a, b: a @ b)
        self.flops = 2.0 * n**3
        self.device = described(jax.devices()[0])

    def run(self, steps: int) -> float:
        """Zero; there is no loss."""
        for _ in range(steps):
            out = self.product(self.a, self.b)
        jax.block_until_ready(out)
        return 0.0

    def peak_bytes(self) -> int:
        """Not of interest."""
        return 0


def described(device: jax.Device) -> str:
    """Platform and kind of a device."""
    return f"{device.platform} {device.device_kind}"


def build(case: Case) -> TrainingStep | MatrixPeak:
    """The step of a case."""
    return MatrixPeak(case) if case.framework == "matmul" else TrainingStep(case)
