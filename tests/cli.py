"""The command line in a process of its own, started quickly: forked where the imports are done."""

import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import types

_CONTEXT = multiprocessing.get_context("forkserver")
# The libraries alone: none of them starts JAX's threads, which would not survive a fork.
_CONTEXT.set_forkserver_preload(
    ["flax.linen", "optax", "orbax.checkpoint", "ml_collections.config_flags", "rich.progress"]
)

# Most of the suite's time would be the compiler's. What is compiled with these takes a third of the
# time and sums in another order, the same in every program.
QUICKLY_COMPILED = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # from 0.11 on an unknown flag
    QUICKLY_COMPILED.append("--xla_cpu_use_fusion_emitters=false")
MEASURED = ("images_per_second", "process_peak_bytes", "device_peak_bytes")  # of an epoch's line
DEVICES = "--xla_force_host_platform_device_count=4"  # of the tests themselves


def flags():
    """XLA's flags for a command: those of the tests (tests/conftest.py), with one device."""
    return os.environ["XLA_FLAGS"].replace(DEVICES, "").strip()


def start(arguments, log, limit=None, errors=None, shared=False, quickly=False, devices=1):
    """Starts the command.

    Its output goes to the file `log`, that of errors too unless they have a file, and its files end
    at `limit` bytes. What is compiled is kept in its working directory, or `shared` with the tests,
    and is compiled as it is for the tests or `quickly`. The CPU
    counts as so many `devices`.
    """
    files = str(log), str(errors or log)
    given = " ".join(QUICKLY_COMPILED) if quickly else flags()
    if devices > 1:
        given += f" --xla_force_host_platform_device_count={devices}"
    process = _CONTEXT.Process(target=_command, args=(arguments, *files, limit, shared, given))
    process.start()
    return process


def run(*arguments, **options):
    """Runs the command: .returncode, .stdout and .stderr."""
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        code = ended(start(arguments, files[0], errors=files[1], shared=True, **options))
        texts = []
        for file in files:
            with open(file) as opened:
                texts.append(opened.read())
    return types.SimpleNamespace(returncode=code, stdout=texts[0], stderr=texts[1])


def ended(process):
    """The exit code; minus the number of the signal that ended it."""
    process.join(timeout=600)
    code = process.exitcode
    if code is None:
        process.kill()
    return code


def _command(arguments, log, errors, limit, shared, given):
    for stream, file in ((1, log), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ["XLA_FLAGS"] = given
    if not shared:
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    sys.argv = ["distill_jax", *arguments]
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    from distill_jax import main

    main.run()


def outcome(workdir):
    """All that a run gives but time and memory: rows, and the epochs of each stage."""
    rows = json.loads((workdir / "results.json").read_text())
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return timeless, [{k: v for k, v in x.items() if k not in MEASURED} for x in lines]
