"""The command line in a process of its own, started quickly: forked where the imports are done."""

import json
import multiprocessing
import os
import sys

_CONTEXT = multiprocessing.get_context("forkserver")
# The libraries alone: none of them starts JAX's threads, which would not survive a fork.
_CONTEXT.set_forkserver_preload(
    ["flax.linen", "optax", "orbax.checkpoint", "ml_collections.config_flags", "rich.progress"]
)

DEVICES = "--xla_force_host_platform_device_count=4"  # of the tests themselves


def flags():
    """XLA's flags for a command: those of the tests (tests/conftest.py), with one device."""
    return os.environ["XLA_FLAGS"].replace(DEVICES, "").strip()


def start(arguments, log, limit=None):
    """Starts the command; its output goes to the file `log`, and its files end at `limit` bytes."""
    process = _CONTEXT.Process(target=_command, args=(arguments, str(log), limit))
    process.start()
    return process


def ended(process):
    """The exit code; minus the number of the signal that ended it."""
    process.join(timeout=300)
    code = process.exitcode
    if code is None:
        process.kill()
    return code


def _command(arguments, log, limit):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["XLA_FLAGS"] = flags()
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # the working directory's own is meant
    sys.argv = ["distill_jax", *arguments]
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    from distill_jax import main

    main.run()


def outcome(workdir):
    """All that a run gives and that does not tell the time: rows, and the epochs of each stage."""
    rows = json.loads((workdir / "results.json").read_text())
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return timeless, [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
