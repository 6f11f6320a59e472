"""The command: `python -m distill_jax.main --config=configs/quickstart.py`.

The config file is Python and is run. Exit codes: 0 done; 1 bad config, data or working directory;
130 and 143 stopped by SIGINT or SIGTERM, with everything saved: the same command goes on.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from distill_jax import report
from distill_jax.data import DataError
from distill_jax.runs import runner
from distill_jax.runs.checkpoint import CheckpointError
from distill_jax.runs.workdir import WorkdirError, folder_of
from distill_jax.train.fit import Interrupted

REFUSED = (
    runner.ConfigError,
    WorkdirError,
    CheckpointError,
    DataError,
    FloatingPointError,  # a step that is not finite, or no epoch to select by
    OSError,  # a full disk, or a folder that went away
)
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment; `FILE.py:smoke` cuts it down to seconds.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where stages and results are kept; runs/NAME where not given."
)
STORE = flags.DEFINE_string(
    "store", None, "Where working directories find stages that another has trained."
)


def main(argv: list[str]) -> int:
    """Runs the experiment of --config and prints its table."""
    if len(argv) > 1:
        return _fail(f"unexpected argument {argv[1]!r}; values are given as --config.FIELD=VALUE")
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)
        # Orbax tells of every file, and prints in its threads what it raises as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        name = getattr(CONFIG.value, "name", "experiment")  # raises where the file was not read
    except OSError as error:
        return _fail(" ".join(str(error).split()))
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is no reason to end
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        workdir = folder_of(WORKDIR.value or f"runs/{name}")
    except WorkdirError as error:
        return _fail(str(error))
    _use_compilation_cache(workdir)
    console = report.console()
    reporter = report.console_reporter(console)
    signals = _Signals()
    try:
        results = runner.run(
            CONFIG.value,
            workdir=workdir,
            reporter=reporter,
            stop=lambda: bool(signals.caught),
            store=STORE.value,
        )
    except runner.StagesFailed as error:
        reporter.close()
        console.print(error.results.table(report.title(error.results.rows)))
        return _fail(str(error))
    except REFUSED as error:
        reporter.close()
        return _fail(str(error))
    except Interrupted:
        reporter.close()
        console.print(f"stopped and saved in {workdir}; the same command goes on from there")
        return 128 + signals.caught
    finally:
        reporter.close()
    console.print(results.table(report.title(results.rows)))
    console.print(f"results.json, metrics.jsonl and config.json are in {workdir}")
    return 0


class _Signals:
    """Notes the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self) -> None:
        self.caught = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame: Any) -> None:
        self.caught = number
        signal.signal(number, signal.SIG_DFL)


def _use_compilation_cache(workdir: Path) -> None:
    """Keeps what is compiled in the working directory, unless the user keeps it elsewhere."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; a mistake in one ends the process with one line."""
    try:
        return flags.FLAGS([_quoted(argument) for argument in argv])
    except (AttributeError, KeyError) as error:
        # ml_collections' answer to an unknown field; its text may suggest another.
        message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").strip("\"'").split())
        sys.exit(_fail(f"--config has no such field: {message}"))
    except (flags.Error, OSError) as error:
        sys.exit(_fail(str(_cause(error))))


def _cause(error: BaseException) -> BaseException:
    """The refusal of a config file, which comes wrapped in its traceback; any other error as is."""
    cause = error
    while cause.__context__ is not None:
        cause = cause.__context__
    return cause if isinstance(cause, runner.ConfigError) else error


def _quoted(argument: str) -> str:
    """The argument; names as a tuple of one text where they are not one already.

    ml_collections reads a tuple as Python, and a>b, a<b+c;d<a or evolving:a are none. The config
    takes the text apart. A shell leaves the ~ of --config=~/FILE as it is.
    """
    option, equals, value = argument.partition("=")
    if option in ("--config", "-config") and value.startswith("~"):
        return f"{option}{equals}{os.path.expanduser(value)}"
    found = re.fullmatch(r"(--?config\.(?:networks|guidance|students)=)([^(\[].*)", argument)
    return f"{found[1]}({found[2]!r},)" if found else argument


def run() -> None:
    """The console script."""
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
