"""The command: `python -m distill_jax train --config=quickstart`, and its kin.

`python -m distill_jax --help` lists them. Exit codes: 0 done; 1 an error, in words; 128 + N stopped
by signal N with everything saved, so that the same command goes on.
"""

from __future__ import annotations

import difflib
import logging
import sys
import traceback
from collections.abc import Sequence

from distill_jax import processes
from distill_jax.commands.arguments import HELP, ArgumentsError, Command, columns, parse, usage
from distill_jax.commands.evaluate import EVALUATE
from distill_jax.commands.export import EXPORT
from distill_jax.commands.measure import MEASURE
from distill_jax.commands.plan import PLAN
from distill_jax.commands.report import REPORT
from distill_jax.commands.show import SHOW
from distill_jax.commands.train import TRAIN
from distill_jax.data import DataError
from distill_jax.interop.torch_weights import WeightsError
from distill_jax.runs.checkpoint import CheckpointError
from distill_jax.runs.config import ConfigError, fields_help
from distill_jax.runs.provenance import version
from distill_jax.runs.workdir import WorkdirError
from distill_jax.train.memory import OutOfMemoryError

COMMANDS: dict[str, Command] = {
    "train": TRAIN,
    "plan": PLAN,
    "show": SHOW,
    "report": REPORT,
    "evaluate": EVALUATE,
    "export": EXPORT,
    "measure": MEASURE,
}
REFUSED = (
    ArgumentsError,
    ConfigError,
    WorkdirError,
    CheckpointError,
    DataError,
    WeightsError,
    OutOfMemoryError,
    processes.ProcessError,
    FloatingPointError,  # a step that is not finite, or no epoch to select by
    OSError,  # a full disk, or a folder that went away
)


def main(argv: Sequence[str]) -> int:
    """Runs the command that the arguments name, `train` where they name none; the exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells of every file
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is no reason to end
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    name, rest = (argv[0], argv[1:]) if argv and argv[0][:1] != "-" else ("train", argv)
    if not argv or argv[0] in (*HELP, "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"distill_jax {version()}")
        return 0
    try:
        if name not in COMMANDS:
            raise ArgumentsError(_unknown(name))
        command = COMMANDS[name]
        if any(argument in HELP for argument in rest):
            print(_help_of(name, command))
            return 0
        return command.run(parse(name, command, rest))
    except REFUSED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _help() -> str:
    commands = columns([(name, command.about) for name, command in COMMANDS.items()])
    return (
        "usage: distill_jax COMMAND [ARGUMENTS]\n\n"
        f"{commands}\n\n"
        "distill_jax COMMAND --help says more of one; --version prints the version.\n"
        "Without a command the arguments are those of train."
    )


def _help_of(name: str, command: Command) -> str:
    if command.config == "no":
        return usage(name, command)
    return f"{usage(name, command)}\n\n{fields_help()}"


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"there is no command {name!r}{hint} There are {', '.join(COMMANDS)}"


def run() -> None:
    """The console script."""
    code = 1
    try:
        code = main(sys.argv[1:])
    except Exception:
        if processes.count() == 1:
            raise
        traceback.print_exc()
    processes.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
