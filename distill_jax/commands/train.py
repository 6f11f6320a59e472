"""`distill_jax train`: trains what a config asks for and has not been trained yet."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from distill_jax import processes, report, traced
from distill_jax.commands.arguments import Command, Flag
from distill_jax.runs import runner
from distill_jax.runs.workdir import folder_of
from distill_jax.train.fit import Interrupted

WORKDIR = Flag("workdir", "Where stages and results are kept; runs/NAME where not given.")
STORE = Flag("store", "Where working directories find stages that another has trained.")
LOG = Flag("log", "auto, for people, or json: one JSON object a line.", "auto", ("auto", "json"))
PROCESSES = (
    Flag(
        "coordinator_address",
        "Of several processes: HOST:PORT of the first; auto has JAX ask a TPU slice, SLURM or "
        "Open MPI. Under the last two not needed.",
    ),
    Flag("num_processes", "Of several processes: how many."),
    Flag("process_id", "Of several processes: which this is, from 0."),
    Flag("join_timeout", "Of several processes: seconds to wait for all.", "300"),
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def train(given: SimpleNamespace) -> int:
    """Trains, and prints the table."""
    processes.join(
        given.coordinator_address, given.num_processes, given.process_id, given.join_timeout
    )
    workdir = folder_of(given.workdir or f"runs/{given.config.name}")
    processes.joined(str(workdir))
    use_compilation_cache(workdir)
    signals, console = Signals(), report.console()
    if given.log == "json":
        reporter = report.json_reporter(sys.stdout)
    else:
        reporter = report.console_reporter(console)

    def say(*lines: Any) -> None:
        reporter.close()  # the live line, which would be in the way
        if given.log != "json" and processes.is_first():
            for line in lines:
                console.print(line)

    try:
        results = runner.run(
            given.config,
            workdir=workdir,
            reporter=reporter,
            stop=lambda: bool(signals.caught),
            store=given.store,
            config_file=given.config_file,
        )
    except runner.StagesFailed as error:
        say(error.results.table(report.title(error.results.rows)))
        raise
    except Interrupted:
        stopped = f"stopped and saved in {workdir}; the same command goes on from there"
        if given.log == "json" and processes.is_first():
            reporter.notice([stopped])
        say(stopped)
        return 128 + int(processes.largest(signals.caught))
    finally:
        reporter.close()
        traced.keep_in(None)
    say(
        results.table(report.title(results.rows)),
        f"results.json, metrics.jsonl and config.json are in {workdir}",
    )
    return 0


class Signals:
    """Notes the first of SIGINT, SIGTERM and their kin; the same again ends the process at once."""

    def __init__(self) -> None:
        self.caught = 0
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._catch)

    def _catch(self, number: int, frame: Any) -> None:
        self.caught = number
        signal.signal(number, signal.SIG_DFL)


def use_compilation_cache(workdir: Path) -> None:
    """Keeps what is compiled in the working directory, unless the user keeps it elsewhere.

    What is traced is kept beside it, but for a bucket, to which JAX alone can write.
    """
    own = workdir.absolute() / "compiled"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(own))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    folder = jax.config.values["jax_compilation_cache_dir"]
    if jax.config.values["jax_enable_compilation_cache"] and folder:  # empty: nothing is kept
        traced.keep_in((own if "://" in folder else Path(folder)) / "traced")


TRAIN = Command(
    about="Trains what a config asks for and has not been trained yet, and prints the table.",
    run=train,
    flags=(WORKDIR, STORE, LOG, *PROCESSES),
    config="required",
)
