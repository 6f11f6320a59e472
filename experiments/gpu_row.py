"""The plain CIFAR-10 row on one GPU: 10, 8, 6, 4, 2, each taught by all larger ones, in bfloat16.

  python -m experiments.gpu_row --data_dir=DIR --peer=torch --json=gpu_row.json

One command measures, on the device that JAX finds: the step of every stage and PyTorch's best way
of the last (torch.compile with CUDA graphs, bfloat16), in turns; the matrix peak; then the whole
row by the published recipe from a cold start, with its accuracy, once for one seed and once for
five; and where the time went that was not spent in steps. `--smoke` does the same in miniature, on
any machine. `--dataset=synthetic:32x32x3:10:50000:10000` has CIFAR-10's size where the images are
not at hand; the accuracy then means nothing.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.benchmark import compared, machine, measure, options, tables
from experiments.benchmark.cases import Case
from experiments.benchmark.measure import Measured

DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of CIFAR-10's archive.")
DATASET = flags.DEFINE_string("dataset", "cifar10", "Name of the data set.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds against one; 1 leaves them out.", lower_bound=1)
EPOCHS = flags.DEFINE_integer("epochs", 0, "Instead of the recipe's 160, where above 0.")
STAGE = "jax, {}"
PUBLISHED = ["plane10", "plane8", "plane6", "plane4", "plane2"]
MINIATURE = ["plane4", "plane2"]


class Failed(Exception):
    """What cannot be done here; its message says why."""


def steps(networks: list[str], batch: int, matrix: int, peer: str) -> dict[str, Case]:
    """The step of every stage, the peer's of the last, and the matrix product."""
    found = {}
    for i in reversed(range(len(networks))):  # the last stage is what the others are compared with
        variant, teachers = "recomputing" if i else "alone", tuple(networks[:i])
        case = Case("jax", variant, networks[i], teachers, batch, "bfloat16")
        found[STAGE.format(networks[i])] = case
    if peer == "torch":
        last = found[STAGE.format(networks[-1])]
        for name, variant in ((compared.EAGER, "eager"), (compared.COMPILED, "compiled")):
            found[name] = dataclasses.replace(last, framework="torch", variant=variant)
    found[compared.PEAK] = Case("matmul", "square", str(matrix), dtype="bfloat16")
    return found


def ask(seeds: int) -> dict[str, Any]:
    """What a process says that loads the data and trains the row by each seed.

    Another process even for the data alone: one that only touches JAX takes most of a GPU's memory.
    """
    request = {
        "smoke": options.SMOKE.value,
        "dataset": DATASET.value,
        "data_dir": DATA_DIR.value,
        "seeds": list(range(seeds)),
        "epochs": EPOCHS.value,
        "networks": MINIATURE if options.SMOKE.value else PUBLISHED,
    }
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark.row", json.dumps(request)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=measure.ROOT,
    )
    answer = json.loads(done.stdout) if done.stdout else {"missing": "the row's process failed"}
    if "missing" in answer:
        raise Failed(answer["missing"])
    return answer


def train(seeds: int) -> dict[str, Any]:
    """The whole row from a cold start: wall-clock seconds, and what it says of them."""
    begun = time.monotonic()
    answer = ask(seeds)
    wall = time.monotonic() - begun
    spent = sum(answer["parts"].values())
    return {"wall": wall, **answer, "parts": {"start": wall - spent, **answer["parts"]}}


def split(trained: Mapping[str, Any], found: Mapping[str, Measured]) -> dict[str, float]:
    """The parts of a run, its training told apart into steps and what lies between them.

    Steps are counted with the seconds that they were measured to take in one long dispatch.
    """
    inside = 0.0
    for stage in trained["stages"]:
        measured = found[STAGE.format(stage["network"])]
        if measured.missing:
            return dict(trained["parts"])
        inside += stage["steps"] * statistics.median(measured.seconds)
    parts = dict(trained["parts"])
    between = parts.pop("training") - inside
    return {"steps": inside, "between dispatches": between, **parts}


def operations(trained: Mapping[str, Any], found: Mapping[str, Measured]) -> float:
    """Floating-point operations of all steps of a run."""
    return sum(
        stage["steps"] * found[STAGE.format(stage["network"])].flops for stage in trained["stages"]
    )


def row_table(parts: Mapping[str, float], wall: float) -> Table:
    """Where the time of a run went."""
    table = Table(title="Where the time of one seed went", title_justify="left")
    table.add_column("part")
    table.add_column("s", justify="right")
    table.add_column("of all", justify="right")
    for name, seconds in parts.items():
        table.add_row(name, f"{seconds:.1f}", f"{seconds / wall:.2f}")
    table.add_section()
    table.add_row("all", f"{wall:.1f}", "1.00")
    return table


def lines(one: Mapping[str, Any], several: Mapping[str, Any] | None, flops: float, peak: float):
    """What is said of the whole row."""
    networks = {stage["network"]: stage["test_accuracy"] for stage in one["stages"]}
    accuracies = ", ".join(f"{name} {100 * value:.2f}" for name, value in networks.items())
    rate = flops / one["wall"]
    yield f"row of one seed from a cold start: {one['wall']:.1f} s on {one['device']}"
    images = "made-up images" if options.SMOKE.value else DATASET.value
    yield f"test accuracy %, on {images}: {accuracies}"
    yield (
        f"{flops / 1e15:.3g} PFLOP, {rate / 1e12:.3g} TFLOP/s over all of it, "
        f"{rate / peak:.3f} of the matrix peak of {peak / 1e12:.3g} TFLOP/s"
    )
    if several:
        ratio = several["wall"] / one["wall"]
        spread = ", ".join(f"{100 * value:.2f}" for value in several["test_accuracy"])
        yield (
            f"row of {len(several['test_accuracy'])} seeds: {several['wall']:.1f} s, {ratio:.2f} "
            f"times that of one; the student's test accuracy %: {spread}"
        )


def report(console: Console) -> dict[str, Any]:
    """Measures, trains, prints, and returns all numbers."""
    networks, batch = (MINIATURE, 32) if options.SMOKE.value else (PUBLISHED, 128)
    chosen = steps(networks, batch, 64 if options.SMOKE.value else 8192, options.PEER.value)
    ours = STAGE.format(networks[-1])
    found = measure.measure(chosen, **{**options.turns(), "cores": []})
    for name in (ours, compared.PEAK):
        if found[name].missing:
            raise Failed(f"{name}: {found[name].missing}")
    about, rows = machine.describe([]), tables.numbers(found)
    console.print(machine.one_line(about))
    console.print(f"device: {found[ours].device}")
    if not found[ours].device.startswith("gpu"):
        console.print("no GPU: these figures say that the command works, and nothing else")
    console.print(tables.steps_table(rows, "Steps of the row, bfloat16"))
    for line in tables.fidelity_lines(compared.fidelity(found), 3e-2):
        console.print(line)
    one = train(1)
    several = train(SEEDS.value) if SEEDS.value > 1 else None
    parts, flops = split(one, found), operations(one, found)
    peak = next(row["flops_per_second"] for row in rows if row["name"] == compared.PEAK)
    for line in lines(one, several, flops, peak):
        console.print(line)
    console.print(row_table(parts, one["wall"]))
    runs = {"one": one, "several": several, "parts": parts, "flops": flops}
    return {"machine": about, "steps": rows, **runs}


def main(argv: list[str]) -> int:
    """Runs the command; one line where it cannot be run."""
    try:
        if refused := options.refusal(argv):
            raise Failed(refused)
        ask(0)  # packages and data are there
        options.save(report(options.console()))
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    app.run(main)
