"""Parity with the authors' code at a precision of matrix products and convolutions."""

from __future__ import annotations

import time

import jax

from experiments.benchmark.measure import ROOT
from experiments.gpu_row.job import Setting
from experiments.gpu_row.lines import Lines
from experiments.parity.__main__ import check_of, judge
from experiments.parity.cases import Found, files, read_case

GOLDEN = ROOT / "tests" / "golden"


def check(lines: Lines, setting: Setting, *, precision: str, share: int, shares: int) -> None:
    """Appends a line for each golden case of a share: its largest error, and whether it holds.

    At the highest precision a case that breaks a bound is computed in float64 too, as in
    `experiments.parity`; otherwise float32 alone decides.
    """
    cases = [case for case in map(read_case, files(GOLDEN)) if check_of(case) is not None]
    for case in cases[share :: shares * (5 if setting.smoke else 1)]:
        run, begun = check_of(case), time.monotonic()
        assert run is not None
        if precision == "highest":
            judged = judge(case)
            found, verdict = list(judged.found), judged.text
        else:
            with jax.default_matmul_precision(precision):
                found = list(run(case, "float32"))
            verdict = "holds" if all(one.within for one in found) else "BROKEN"
        worst = max(found, key=Found.excess)
        lines.add(
            name=case.name,
            precision=precision,
            arrays=len(found),
            broken=sum(not one.within for one in found),
            worst=worst.what,
            error=worst.error,
            bound=worst.bound,
            verdict=verdict,
            seconds=round(time.monotonic() - begun, 2),
        )
