"""Searches fields of a config for the best accuracy on the validation split.

  python -m experiments.search --config=quickstart --config.guidance=direct --trials=15 \\
      --space='{"kd_weight": [0.05, 1.0], "temperature": [1, 2, 5, 10, 20]}' --workdir=runs/search

The test set is never looked at: what counts is the validation accuracy of the config's last
network, the mean over its seeds. Fields are named as in `config.sweep` (then what is taught has
them, and teachers are trained once), or by their path (then every network has them). The same
command goes on where it was stopped; more trials are added to those there are. Prints a line for
each trial and a table, and leaves search.json, and the winner as the config best.py.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from types import SimpleNamespace

from distill_jax import report, traced
from distill_jax.commands.arguments import HELP, ArgumentsError, Command, Flag, parse, usage
from distill_jax.commands.train import Signals, use_compilation_cache
from distill_jax.main import REFUSED
from distill_jax.runs.workdir import folder_of
from distill_jax.train.fit import Interrupted
from experiments.search import setup, space

MISSING = "the search needs optuna: pip install -e '.[search]'"
FLAGS = (
    Flag("space", 'What is searched: {"kd_weight": [0.05, 1.0], "temperature": [1, 2, 5]}.'),
    Flag("trials", "How many there are to be, those of earlier calls among them.", "20"),
    Flag("workdir", "Where the search is kept; runs/NAME_search where not given."),
    Flag("sampler", "How points are chosen.", "tpe", ("tpe", "grid", "random")),
    Flag("pruner", "median ends what is worse than half of all; none.", "none", ("none", "median")),
    Flag("at_once", "How many trials are asked for, and trained, at once.", "1"),
    Flag("seed", "That of the sampler.", "0"),
    Flag("progress", "yes: show each training, as `train` does; no.", "no", ("yes", "no")),
)


def search(given: SimpleNamespace) -> int:
    """Searches, prints the trials and writes what was found."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ArgumentsError(MISSING) from None
    from experiments.search import loop

    options = setup.Options(
        trials=_number(given, "trials", 1),
        at_once=_number(given, "at_once", 1),
        seed=_number(given, "seed", 0),
        sampler=given.sampler,
        pruner=given.pruner,
        config_file=given.config_file,
    )
    workdir = folder_of(given.workdir or f"runs/{given.config.name}_search")
    found = setup.prepared(given.config, given.space or "", options)
    signals, console = Signals(), report.console()
    shown = report.console_reporter(console) if given.progress == "yes" else None
    try:
        with loop.opened(workdir, found) as study:
            use_compilation_cache(workdir)
            loop.run(found, study, workdir, lambda: bool(signals.caught), console, shown)
    except Interrupted:
        line = f"stopped and saved in {workdir}; the same command goes on from there"
        console.print(line, soft_wrap=True)
        return 128 + signals.caught
    finally:
        if shown is not None:
            shown.close()
        traced.keep_in(None)
    return 0


def _number(given: SimpleNamespace, name: str, least: int) -> int:
    text = getattr(given, name)
    if not text.isdecimal() or int(text) < least:
        raise ArgumentsError(f"--{name} is a whole number from {least} on, got {text!r}")
    return int(text)


SEARCH = Command(
    about="Searches fields of a config for the best accuracy on the validation split.",
    run=search,
    flags=FLAGS,
    config="required",
)


def main(argv: Sequence[str]) -> int:
    """Runs the search; the exit code is that of the other commands."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells of every file
    if not argv or any(argument in HELP for argument in argv):
        print(usage("search", SEARCH).replace("distill_jax search", "python -m experiments.search"))
        return 0
    try:
        return search(parse("search", SEARCH, argv))
    except (*REFUSED, space.SpaceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
