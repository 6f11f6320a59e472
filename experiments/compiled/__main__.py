"""What a training step is on a GPU or TPU, by the program alone: no such device is needed.

  python -m experiments.compiled --platform=h200 --json=compiled.json   # pip install '.[aot-gpu]'
  python -m experiments.compiled --platform=tpu --networks=published    # pip install '.[aot-tpu]'

Compiles the library's train loops for an H200 or for a TPU v5e of four chips and counts what one
step consists of. These are estimates: no time is measured, XLA's tuning of kernels is off, and what
the host submits is counted by the rule by which XLA captures kernels. For a TPU milliseconds are
its compiler's estimated cycles at 1.5 GHz, which leave out gathers, and use is the part of the peak
of 197 TFLOP/s. Published networks, and those of ImageNet, take minutes on a GPU and an hour on a
TPU.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from absl import app, flags
from rich.table import Table

from experiments.benchmark import cases, options
from experiments.benchmark.cases import Case
from experiments.compiled import steps, targets

PLATFORM = flags.DEFINE_enum("platform", None, list(targets.EXTRAS), "What to compile for.")
NETWORKS = flags.DEFINE_enum("networks", "small", ["small", "published"], "Which chains.")
IMAGENET: cases.Row = (("imagenet_resnet50", "imagenet_resnet34"), "imagenet_resnet18")
STEPS = flags.DEFINE_list("steps", [], "Names of steps; all where none is given.")


def every_case(rows: dict[str, cases.Row], batch: int = 128) -> dict[str, Case]:
    """The steps that are compiled, by name; teachers are computed but where a table is named."""

    def case(chain, variant, **more):
        teachers, student = rows[chain]
        return Case("jax", variant, student, teachers, batch, "bfloat16", **more)

    found = {
        "plain": case("plain", "recomputing"),
        "plain on 4 devices": case("plain", "recomputing", devices=targets.DEVICES),
        "table": case("plain", "table"),
        "table of 8 members": case("plain", "table", members=8),
        "resnet": case("resnet", "recomputing"),
        "evolving": case("teskd", "alone"),
        "evolving on 4 devices": case("teskd", "alone", devices=targets.DEVICES),
    }
    if "imagenet" in rows:
        found["imagenet on 4 devices"] = case("imagenet", "recomputing", devices=targets.DEVICES)
    return found


def examined(case: Case, devices: tuple[Any, ...]) -> dict[str, Any]:
    """The numbers of a case."""
    begun = time.perf_counter()
    compiled = steps.lowered(case, devices).compile()
    seconds = time.perf_counter() - begun
    program, memory = steps.program(compiled), compiled.memory_analysis()
    counted = program.step
    return {
        "case": {"student": case.student, "teachers": case.teachers, "batch": case.batch},
        "flops": steps.flops_of(case),
        "written_bytes": counted.written,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": counted.kernels,
        "submitted": counted.submitted,
        "convolutions": counted.convolutions,
        "collectives": counted.collectives,
        "cycles": counted.cycles,
        "dispatch_cycles": program.dispatch_cycles,
        "compile_seconds": round(seconds, 1),
    }


def table(platform: str, found: dict[str, dict[str, Any]]) -> Table:
    """The numbers of all cases."""
    made = Table(title=f"Estimates of a step on {platform}, by its program", title_justify="left")
    headings = (
        "step",
        "GFLOP",
        "MB\nwritten",
        "MB of\nmemory",
        "kernels",
        "by\nhost",
        "collec-\ntives",
        "ms",
        "use",
        "ms a\ndispatch",
    )
    for heading in headings:
        made.add_column(heading, justify="left" if heading == "step" else "right")
    for name, one in found.items():
        memory = one["argument_bytes"] + one["temporary_bytes"]
        made.add_row(
            name,
            f"{one['flops'] / 1e9:.1f}",
            *(f"{size / 1e6:.0f}" for size in (one["written_bytes"], memory)),
            *(str(one[what]) for what in ("kernels", "submitted", "collectives")),
            *_times(one),
        )
    return made


def _times(one: dict[str, Any]) -> tuple[str, ...]:
    """Milliseconds of a step, the part of the peak that it uses, milliseconds of a dispatch."""
    if not one["cycles"]:  # estimated for a TPU alone
        return ("-",) * 3
    seconds = one["cycles"] / targets.TPU_CLOCK
    use = one["flops"] / seconds / targets.TPU_PEAK
    dispatch = one["dispatch_cycles"] / targets.TPU_CLOCK
    return f"{1e3 * seconds:.2f}", f"{use:.2f}", f"{1e3 * dispatch:.2f}"


def refusal(argv: list[str], every: dict[str, Case]) -> str:
    """What is wrong with the command; empty where nothing is."""
    if refused := options.refusal(argv):
        return refused
    if PLATFORM.value is None:
        return f"--platform is missing: expected one of {', '.join(targets.EXTRAS)}"
    for name in STEPS.value:
        if name not in every:
            return f"--steps={name!r}: expected of {', '.join(map(repr, every))}"
    return targets.missing(PLATFORM.value)


def main(argv: list[str]) -> int:
    """Compiles every step and prints the table."""
    every = every_case(
        cases.SMOKE if NETWORKS.value == "small" else {**cases.CHAINS, "imagenet": IMAGENET}
    )
    if refused := refusal(argv, every):
        print(f"error: {refused}", file=sys.stderr)
        return 1
    devices, found = targets.devices(PLATFORM.value), {}
    for name, case in every.items():
        if not STEPS.value or name in STEPS.value:
            options.say(f"compiling {name}")
            found[name] = examined(case, devices)
    options.console().print(table(devices[0].device_kind, found))
    options.save({"platform": PLATFORM.value, "networks": NETWORKS.value, "steps": found})
    return 0


if __name__ == "__main__":
    app.run(main)
