"""Compares this library with outputs of the authors' PyTorch code.

  python -m experiments.parity --golden=tests/golden

An error is the largest absolute difference over the largest magnitude of the reference. A case
holds where every error in float32 is within its bound; matrix products and convolutions have the
highest precision, as "float32" is TF32 or bfloat16 on many devices. A ReLU or a max pool whose
input is a rounding error away from a tie can fall the other way in ours than in theirs, and moves
gradients by more than that: a case that breaks a bound is computed again in float64, and holds
where that is within it. Exit code 1 where a bound is broken in both.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import app, flags
from rich.table import Table

from distill_jax import models, report
from experiments.parity import losses, methods, networks, trajectories, weighed
from experiments.parity.cases import Case, Found, network_name, read_cases

GOLDEN = flags.DEFINE_string("golden", "tests/golden", "Folder of the cases (*.npz).")
Check = Callable[[Case, str], Iterator[Found]]


def check_of(case: Case) -> Check | None:
    """The check for a case, by what it holds; None for what this library does not have."""
    meta, kind = case.meta, case.meta.get("kind")
    if check := weighed.check_of(meta):
        return check
    if kind == "method_trajectory":
        known = meta["method"] in trajectories.METHODS
        return trajectories.check_method_trajectory if known else None
    if kind == "stochastic_dgkd_trajectory":
        return trajectories.check_stochastic
    if "cases" in meta and "method" in meta:
        return methods.check_method if meta["method"] in methods.METHODS else None
    if "state" in meta and "grad_keys" in meta:
        return networks.check_model if _is_known(meta) else None
    if "teachers" in case.arrays and "cases" in meta:
        return losses.check_multi_teacher
    if "features" in case.arrays and "cases" in meta:
        return losses.check_self_distillation
    if "masks" in meta and "student" in meta:
        return trajectories.check_trajectory
    if "columns" in meta and "fea_weight" in meta:
        return trajectories.check_evolution
    return None


def _is_known(meta: dict) -> bool:
    try:
        models.check_name(network_name(meta["name"], meta["classes"]))
    except ValueError:
        return False
    return True


@jax.default_matmul_precision("highest")
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
            table.add_row(case.name, "-", "-", "-", "-", "-", "not known here", "")
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
