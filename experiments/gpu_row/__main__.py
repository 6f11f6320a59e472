"""Measures on one GPU what there is to measure, most valuable first, and loses nothing of it.

  python -m experiments.gpu_row --out=gpu.jsonl --only=versions,steps
  python -m experiments.gpu_row --out=gpu.jsonl --only=row --data_dir=DIR --workdir=row
  python -m experiments.gpu_row --show=gpu.jsonl

Every result is a line of --out as soon as it is known. Each part runs in processes of its own and
is ended at its limit; the rest goes on. The parts, in the order in which they run:

  versions     versions, card, driver, and one step
  steps        steps in turns with torch.compile's, where PyTorch is installed
  populations  several students at once
  digests      whether two runs, and one that was killed, end with the same bytes
  row4         four epochs of the row on made-up images, cold and warm
  parity       errors to the authors' outputs, at the default precision and the highest
  row, row5    the whole CIFAR-10 row by the published recipe, for one seed and for five

A row that was stopped goes on where the same --workdir and --variant are given. A change is
measured before and after it: --variant names what is measured, --env=NAME=VALUE sets a variable of
every process, and --set=FIELD=VALUE a field of the config of the rows and digests. --smoke does all
in miniature, on any machine.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from experiments.benchmark import options
from experiments.gpu_row import lines, parts, summary
from experiments.gpu_row.job import Setting

OUT = flags.DEFINE_string("out", "", "File to which every result is appended.")
SHOW = flags.DEFINE_list("show", [], "Prints the tables of these files, and measures nothing.")
LIMIT = flags.DEFINE_float("limit", 0.0, "Seconds of each part, instead of its own limit.")
VARIANT = flags.DEFINE_string("variant", "", "A label for every line.")
ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE, a variable of every process.")
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE, of the config of rows and digests.")
DATASET = flags.DEFINE_string("dataset", "cifar10", "Name of the whole row's data set.")
DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of its archive.")
WORKDIR = flags.DEFINE_string("workdir", "", "Keeps the whole rows, which go on from there.")
OTHERS = ("chain", "peer", "rounds", "seconds", "cores", "json")  # of the benchmark's flags
TRAINED = ("row", "row5")  # for which data have to be there


class Refused(Exception):
    """A command that cannot be run; its message says why."""


def pairs(flag: str, texts: list[str]) -> dict[str, str]:
    """NAME=VALUE texts as a dict.

    Raises:
      Refused: one is not of that form.
    """
    for text in texts:
        if not text.partition("=")[0] or "=" not in text:
            raise Refused(f"--{flag}={text}: expected --{flag}=NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


def absolute(path: str) -> str:
    """The path from wherever a process is; "" stays."""
    return path and str(Path(path).expanduser().absolute())


def chosen(argv: list[str]) -> list[str]:
    """The parts of the flags, in their order.

    Raises:
      Refused: the flags are not in order.
    """
    if len(argv) > 1:
        raise Refused(f"unexpected argument {argv[1]!r}")
    if given := [name for name in OTHERS if flags.FLAGS[name].present]:
        raise Refused(f"--{given[0]} is a flag of experiments.benchmark, not of this command")
    if unknown := [name for name in options.ONLY.value if name not in parts.PARTS]:
        raise Refused(f"--only: no {', '.join(unknown)}; there are {', '.join(parts.PARTS)}")
    if LIMIT.value < 0:
        raise Refused(f"--limit={LIMIT.value:g}: expected seconds above 0, or 0 for their own")
    if not OUT.value:
        raise Refused("--out is missing: expected the file for the results")
    if not Path(OUT.value).parent.is_dir():
        raise Refused(f"--out={OUT.value}: there is no folder {Path(OUT.value).parent}")
    return [name for name in parts.PARTS if not options.ONLY.value or name in options.ONLY.value]


def measure(names: list[str], scratch: str) -> None:
    """Runs the parts.

    Raises:
      Refused: the config or the data of a row is not in order.
    """
    setting = Setting(
        out=str(Path(OUT.value).absolute()),
        begun=time.monotonic(),
        scratch=scratch,
        workdir=absolute(WORKDIR.value),
        variant=VARIANT.value,
        env=pairs("env", ENV.value),
        changes=pairs("set", SET.value),
        dataset=DATASET.value,
        data_dir=absolute(DATA_DIR.value),
        smoke=options.SMOKE.value,
    )
    lines.end_torn_line(setting.out)
    trained = setting.changes or set(TRAINED) & set(names)
    if trained and (why := parts.refusal(setting)):
        raise Refused(why)
    for name in names:
        begun = time.monotonic()
        options.say(f"{name}, at {begun - setting.begun:.0f} s")
        parts.run(name, parts.PARTS[name], setting, LIMIT.value)


def main(argv: list[str]) -> int:
    """Runs the command; one line where it cannot be run."""
    try:
        if not SHOW.value:
            names = chosen(argv)
            with tempfile.TemporaryDirectory() as scratch:
                measure(names, scratch)
        found, others = lines.read(SHOW.value or [OUT.value])
    except (Refused, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = options.console()
    for table in summary.tables(found):
        console.print(table)
    if others:
        console.print(f"{others} lines are left out: torn, or of another form")
    return 0


if __name__ == "__main__":
    # As an exception, so that what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app.run(main)
