"""Several processes that train together: how they find each other, and what they tell each other.

All of them run the same lines in the same order. What may differ between them, such as a clock, a
signal or a file, is asked of the first or of all, as each program over all devices waits for all.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from distill_jax.identity import differences

T = TypeVar("T")
AUTO = "auto"  # in place of an address: JAX asks the machine
HEARTBEAT_SECONDS = 20  # without a sign of life, then a process counts as lost
SHUTDOWN_SECONDS = 30
GRACE_SECONDS = 3  # that the first, whose end ends all, waits for the last words of the others
# What tells that a launcher has started several processes, whose number and places JAX then finds.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI, TPU_HOSTS = "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"
_SMALL, _LARGE = 2**12, 2**24  # bytes that are sent at once
_HEAD = 8  # of them, for the length
# In what JAX raises where another process has gone.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "coordination", "heartbeat")


# JAX ends a process that has lost the others as it stands, whatever Python code there is for that.
_SPEAKER = r"""
trap "" INT TERM HUP USR1
while IFS= read -r line; do words=$line; done
[ -z "$words" ] || printf "error: %s\n" "$words" >&2
"""
_speaker: subprocess.Popen | None = None


class ProcessError(RuntimeError):
    """Processes that cannot train together: not found, lost, or not alike."""


def join(address: str | None, number: str | None, index: str | None, seconds: str) -> None:
    """Makes this process one of several, before JAX starts; nothing where it is to be alone.

    Args:
      address: HOST:PORT of the first process, "auto" to have JAX ask the machine, or None.
      number: how many processes there are, or None.
      index: which of them this is, from 0, or None.
      seconds: how long to wait for all.

    Raises:
      ProcessError: arguments that cannot be, or not all processes came in time.
    """
    given = _arguments(address, number, index)
    wait = _whole("join_timeout", seconds, 1)
    if given is None or (not given and address != AUTO and not is_launched()):
        return
    place = given.get("coordinator_address", "the address that JAX found")
    lost = (
        f"the processes did not find each other at {place} within {wait} seconds: expected all of "
        "them to be started, and that address to be free on the first and reachable from the "
        "others; --coordinator_address, --num_processes and --process_id say it, --join_timeout "
        "how long to wait"
    )
    say_if_ended(lost)
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=wait,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        say_if_ended("")
        raise ProcessError(f"{lost} ({_first_line(error)})") from error


def _arguments(address: str | None, number: str | None, index: str | None) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is told, nothing where JAX is to find it; None: alone."""
    if index is None and (address, number) in ((None, None), (AUTO, None)):
        return {}
    if index is None and (address, number) == (None, "1"):
        return None
    if None in (address, number, index) or address == AUTO:
        raise ProcessError(
            "--coordinator_address=HOST:PORT, --num_processes and --process_id go together, got "
            f"{address}, {number} and {index}; --coordinator_address=auto stands alone"
        )
    assert address is not None and number is not None and index is not None
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()) or "://" in address:
        raise ProcessError(f"--coordinator_address is HOST:PORT, got {address!r}")
    count = _whole("num_processes", number, 1)
    place = _whole("process_id", index, 0)
    if place >= count:
        raise ProcessError(
            f"--process_id is below --num_processes, from 0 on: got {place} of {count}"
        )
    if count == 1:
        return None
    return {"coordinator_address": address, "num_processes": count, "process_id": place}


def _whole(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ProcessError(f"--{name} is a whole number of {least} or more, got {text!r}")
    return int(text)


def is_launched() -> bool:
    """Whether SLURM, Open MPI or the host of a TPU slice says that there are several processes."""
    environ = os.environ
    if all(name in environ for name in SLURM) and environ["SLURM_NTASKS"] != "1":
        return True
    return environ.get(OPEN_MPI, "1") != "1" or "," in environ.get(TPU_HOSTS, "")


def say_if_ended(words: str) -> None:
    """Has a line printed should this process end without `leave`; "" takes it back."""
    global _speaker
    if _speaker is None:
        command = ["/bin/sh", "-c", _SPEAKER]
        _speaker = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, start_new_session=True
        )
    with contextlib.suppress(OSError):  # somebody has ended it
        _speaker.stdin.write(words.replace("\n", " ") + "\n")  # type: ignore[union-attr]
        _speaker.stdin.flush()  # type: ignore[union-attr]


def joined(kept: str) -> None:
    """Has said from now on, should another process be lost, where what was saved is."""
    if jax.distributed.is_initialized():
        say_if_ended(
            "a process was lost, or this one was ended; what was saved in "
            f"{kept} stays, and the same commands go on from there"
        )


def leave(code: int) -> None:
    """Ends the part of this process, with the exit code that it is about to end with.

    After an error the others are not waited for: they may be waiting for this one.
    """
    if not jax.distributed.is_initialized():
        return
    if code == 0 or code > 128:  # all of them end
        jax.distributed.shutdown()
        say_if_ended("")
        return
    say_if_ended("")
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(GRACE_SECONDS)
    os._exit(code)  # an orderly end waits for all


def count() -> int:
    """How many processes train together."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the one that prints and writes."""
    return count() == 1 or jax.process_index() == 0


def largest(value: float) -> float:
    """The largest of all processes' values."""
    if count() == 1:
        return value
    return float(np.max(_utils().process_allgather(np.float32(value))))


def agreed(asked: Callable[[], bool]) -> Callable[[], bool]:
    """A function that is true on all processes where `asked` is on any; all call it together."""
    return asked if count() == 1 else lambda: largest(asked()) > 0


def of_first(make: Callable[[], T]) -> T:
    """What `make` gives on the first process, which alone calls it; the others get a copy.

    Raises:
      ProcessError: on the others, where it raises an error on the first.
    """
    if count() == 1:
        return make()
    failure: Exception | None = None
    outcome: Any = None
    if is_first():
        try:
            outcome = (make(), None)
        except Exception as error:
            failure, outcome = error, (None, str(error))
    made, words = pickle.loads(_sent(pickle.dumps(outcome), 0))
    if failure is not None:
        raise failure
    if words is not None:
        raise ProcessError(f"process 0: {words}")
    return outcome[0] if is_first() else made


def each(make: Callable[[], T]) -> T:
    """What `make` gives on this process; where it fails on one, it fails on all.

    Raises:
      ProcessError: it raised an error on another process, and none on this.
    """
    if count() == 1:
        return make()
    failure: Exception | None = None
    try:
        made = make()
    except Exception as error:
        failure = error
    failed = np.flatnonzero(_utils().process_allgather(np.int32(failure is not None)))
    if not failed.size:
        return made
    words = _sent(str(failure).encode(), int(failed[0])).decode()
    if failure is not None:
        raise failure
    raise ProcessError(f"process {failed[0]}: {words}")


def check_same(describe: Callable[[], Mapping[str, Any]]) -> None:
    """Raises ProcessError on all where processes describe other JSON values, with every one."""

    def compare():
        if lines := differences(first, describe()):
            raise ProcessError(
                f"{'; '.join(lines)}, where 'there' is process 0: expected the same on all"
            )

    if count() > 1:
        first = of_first(describe)
        each(compare)


@contextlib.contextmanager
def lost_told(kept: str = "") -> Iterator[None]:
    """Raises ProcessError in the place of what JAX raises where another process has gone.

    Args:
      kept: where what was saved is, if anywhere.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if count() == 1 or not any(sign in str(error).lower() for sign in _LOST):
            raise
        saved = f"; what was saved in {kept} stays, and the same commands go on" if kept else ""
        raise ProcessError(
            f"process {jax.process_index()} of {count()} has lost another one "
            f"({_first_line(error)}){saved}"
        ) from error


def _sent(content: bytes, source: int) -> bytes:
    """The bytes of process `source`, on all of them; in parts of two sizes, each compiled once."""
    mine = jax.process_index() == source
    head = len(content).to_bytes(_HEAD, "little") + content[: _SMALL - _HEAD]
    head = _part(head if mine else b"", _SMALL, mine)
    length = int.from_bytes(head[:_HEAD], "little")
    parts = [head[_HEAD:]]
    for start in range(_SMALL - _HEAD, length, _LARGE):
        parts.append(_part(content[start : start + _LARGE] if mine else b"", _LARGE, mine))
    return b"".join(parts)[:length]


def _part(content: bytes, size: int, mine: bool) -> bytes:
    padded = np.frombuffer(content.ljust(size, b"\0"), np.uint8)
    return _utils().broadcast_one_to_all(padded, is_source=mine).tobytes()


def _utils() -> Any:
    from jax.experimental import multihost_utils  # not needed by a process that is alone

    return multihost_utils


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
