"""Compares this library with outputs of the authors' PyTorch code.

  python -m experiments.parity --golden=tests/golden

An error is the largest absolute difference over the largest magnitude of the reference. A file
holds where all that it stores is compared and every error in float32 is within its bound; matrix
products and convolutions have the highest precision, as "float32" is TF32 or bfloat16 on many
devices. A ReLU or a max pool whose input is a rounding error away from a tie can fall the other way
in ours than in theirs, and moves gradients by more than that: a file that breaks a bound is
computed again in float64, and what broke it has to be within the bound of that.

Intermediate results need not be compared: how many are is printed, and which are not. The last line
says how many files there are and how many hold. Exit code 1 where one does not: where a bound is
broken in both, a loss or a gradient is left uncompared, or there is no method for the file.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from absl import app, flags

from distill_jax import models
from experiments.parity import (
    contrasted,
    losses,
    methods,
    networks,
    staged,
    trajectories,
    weighed,
)
from experiments.parity.cases import Case, Found, files, network_name, read_case

GOLDEN = flags.DEFINE_string("golden", "tests/golden", "Folder of the cases (*.npz).")
Check = Callable[[Case, str], Iterator[Found]]
_WIDTH = 80


def check_of(case: Case) -> Check | None:
    """The check for a case, by what it holds; None for what this library does not have."""
    meta, kind = case.meta, case.meta.get("kind")
    if kind == "method_trajectory" and meta["method"] in staged.KINDS:
        return staged.check
    if kind == "method_trajectory" and meta["method"] == "crd":
        return contrasted.check
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


class Verdict(NamedTuple):
    """What comes of a file.

    Args:
      text: in a word or three.
      holds: whether all that has to be compared is, and within its bound.
      found: every comparison: that of float32, or where it breaks its bound that of float64.
      stored: how many results the file has.
      missing: those of them that nothing was compared with.
      notes: what there is to say beside that.
    """

    text: str
    holds: bool = False
    found: tuple[Found, ...] = ()
    stored: int = 0
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """What there is to say of the file beside its row of the table."""
        for found in self.found:
            if not found.within:
                yield f"{found.what}: error {found.error:.1e}, bound {found.bound:.1e}"
        needed = [name for name in self.missing if not _is_intermediate(name)]
        if needed:
            yield f"left uncompared: {', '.join(needed)}"
        if others := [name for name in self.missing if _is_intermediate(name)]:
            yield f"intermediate results not compared: {', '.join(others)}"
        yield from self.notes


def _is_intermediate(name: str) -> bool:
    return name.split(":")[1:2] == ["out"]


@jax.default_matmul_precision("highest")
def judge(case: Case) -> Verdict:
    """Compares all of a case, in float64 too where float32 breaks a bound."""
    check, stored = check_of(case), case.results()
    if check is None:
        method = case.meta.get("method", case.meta.get("name", "a file of its kind"))
        return Verdict(f"{method} is not known here", stored=len(stored))
    found, text = list(check(case, "float32")), "holds"
    if not all(one.within for one in found):
        with jax.enable_x64(True):
            double = list(check(case, "float64"))
        pairs = zip(found, double, strict=True)
        found, text = [s if s.within else d for s, d in pairs], "holds in float64"
    compared = {one.what for one in found}
    missing = tuple(name for name in stored if name not in compared)
    if not all(one.within for one in found):
        text = "BROKEN"
    elif not found or not all(map(_is_intermediate, missing)):
        text = "INCOMPLETE"
    return Verdict(text, text.startswith("holds"), tuple(found), len(stored), missing)


def judge_file(file: Path) -> Verdict:
    """The same of a file, whatever it holds."""
    try:
        return judge(read_case(file))
    except Exception as error:  # the other files are to be compared all the same
        return Verdict("FAILED", notes=(f"{type(error).__name__}: {error}",))


def row(name: str, verdict: Verdict) -> str:
    """A file's row: results compared, the largest error over its bound, the verdict."""
    worst = max(verdict.found, key=Found.excess, default=None)
    if worst is None:
        return f"{name:<42} {verdict.text}"
    compared = f"{verdict.stored - len(verdict.missing)} of {verdict.stored}"
    return _columns(name, compared, *(f"{x:.1e}" for x in worst[1:]), verdict.text)


def _columns(name: str, compared: str, error: str, bound: str, verdict: str) -> str:
    return f"{name:<42} {compared:>10} {error:>7} {bound:>7} {verdict}"


def run(folder: Path) -> Iterator[tuple[Path, Verdict]]:
    """Compares every file of a folder, by name.

    Raises:
      ValueError: no folder, or no case in it.
    """
    for file in files(folder):
        yield file, judge_file(file)


def main(argv: list[str]) -> int:
    """Prints a row a file as it is compared."""
    verdicts = []
    try:
        for file, verdict in run(Path(GOLDEN.value)):
            if not verdicts:
                print(_columns("file", "compared", "error", "bound", "verdict"))
            print(row(file.stem, verdict))
            for line in verdict.lines():
                print(textwrap.fill(line, _WIDTH, initial_indent="  ", subsequent_indent="    "))
            sys.stdout.flush()
            verdicts.append(verdict)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    held = sum(verdict.holds for verdict in verdicts)
    print(f"{len(verdicts)} files, {held} hold")
    return 0 if held == len(verdicts) else 1


if __name__ == "__main__":
    app.run(main)
