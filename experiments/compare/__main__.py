"""Trains one student by many methods, with the same teacher, seeds and recipe, and compares them.

  python -m experiments.compare --pair=resnet56:resnet20 --methods=kd,dkd,dist,at,crd --seeds=5 \\
      --data_dir=DIR --workdir=runs/compare

The teacher is trained once. Each method has its published setting (`settings`), and the recipe is
that of configs/compare_cifar100.py. What has been trained is not trained again: the same command
goes on where it was stopped, and one with more methods or seeds adds them. Plain training and KD
are always among them. Differences are paired: of the same seed, so from the same first weights and
batches; the interval is 95 %, by Student's t. At the end the steps of all methods are timed side by
side: leave the machine alone then. Prints the table, and writes it with all numbers to compare.json
and compare.md in the working directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distill_jax
from distill_jax import report
from distill_jax.main import REFUSED
from experiments import paired
from experiments.compare import lines, trained
from experiments.compare.settings import KD, PLAIN, SETTINGS


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command's own, checked as far as it can be without a config.

    Raises:
      SystemExit: with 2; what is wrong has been printed.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", allow_abbrev=False)
    parser.add_argument("--pair", default="resnet56:resnet20", help="TEACHER:STUDENT")
    parser.add_argument("--methods", default="kd,dkd,dist,at,sp,crd", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on")
    parser.add_argument("--dataset", default="cifar100", help="any that config.dataset.name takes")
    parser.add_argument("--data_dir", default="", help="where its files are")
    parser.add_argument("--epochs", type=int, default=240, help="of every network")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--train_limit", type=int, default=0, help="images a class; 0 takes all")
    parser.add_argument("--augment", default="crop_flip", help="as config.recipe.augment")
    parser.add_argument("--devices", default="", help="as config.devices")
    parser.add_argument(
        "--rounds", type=int, default=3, help="in which the steps are timed, in turns; 0 times none"
    )
    parser.add_argument("--workdir", default="runs/compare", help="where all is kept")
    given = parser.parse_args(argv)
    given.methods = list(dict.fromkeys([PLAIN, KD, *filter(None, given.methods.split(","))]))
    for name in given.methods:
        if name not in SETTINGS:
            parser.error(f"--methods: {name!r} is none of {', '.join(SETTINGS)}")
    for name in ("seeds", "epochs", "batch_size"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is at least 1, got {getattr(given, name)}")
    return given


def main(argv: Sequence[str]) -> int:
    """Trains what is missing, prints the table and writes it."""
    given, found = arguments(argv), []
    workdir = Path(given.workdir)
    try:
        configs = {name: trained.config_of(name, given) for name in given.methods}
        adapters = {name: trained.adapter_parameters(config) for name, config in configs.items()}
        for name, config in configs.items():
            print(f"== {name}", file=sys.stderr)
            results = distill_jax.run(config, workdir=workdir / name, store=workdir / "store")
            found.append(trained.Trained.of(name, given.pair, results, adapters[name]))
        seconds = trained.step_seconds(configs, given.rounds) if given.rounds else {}
    except KeyboardInterrupt:
        print(f"stopped and saved in {workdir}; the same command goes on", file=sys.stderr)
        return 130
    except (*REFUSED, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = lines.lines_of(found, seconds, given.dataset)
    console = report.console()
    console.print(lines.rich_table(table, given.pair, given.dataset, found[0].teacher_accuracy))
    numbers = json.dumps(_numbers(given, found, seconds, table), indent=1)
    paired.write_whole(workdir / "compare.json", numbers + "\n")
    paired.write_whole(workdir / "compare.md", lines.markdown(table))
    return 0


def _numbers(
    given: argparse.Namespace,
    found: list[trained.Trained],
    seconds: dict[str, float],
    table: list[lines.Line],
) -> dict[str, Any]:
    return {
        "arguments": vars(given),
        "teacher_accuracy": found[0].teacher_accuracy,
        "accuracies": {one.method: one.accuracies for one in found},
        "step_seconds": seconds,
        "lines": [line._asdict() for line in table],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
