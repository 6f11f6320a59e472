"""What networks in files cost: size, FLOPs, time for one example and for many, in turns."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from distill_jax import models
from distill_jax.interop.files import load_variables, read_bytes
from distill_jax.interop.torch_weights import WeightsError
from distill_jax.runs.ambient import pinned
from distill_jax.runs.card import card_paths, read_card
from distill_jax.runs.export import FORMATS, PROGRAMS, examples
from distill_jax.runs.inputs import spec_of

MANY = 64  # examples of a batch by which throughput is measured
ROUNDS = 15  # in each of which every file has its turn
TURN_SECONDS = 0.05


class Measured(NamedTuple):
    """What a network in a file costs.

    Args:
      file: its path.
      bytes: of the file.
      parameters: of the network; None where no card tells.
      flops: of an example; likewise.
      test_accuracy: as it was when the file was written; likewise.
      seconds_for_one: median time of a call with one example.
      examples_per_second: with `MANY` at once.
    """

    file: str
    bytes: int
    parameters: int | None
    flops: float | None
    test_accuracy: float | None
    seconds_for_one: float
    examples_per_second: float


class _Loaded(NamedTuple):
    """A network in a file: a function of a batch, shapes and types of one example, the card."""

    forward: Callable[[Any], Any]
    spec: Any
    card: dict[str, Any]


def measure(files: Sequence[str | Path], turn_seconds: float = TURN_SECONDS) -> list[Measured]:
    """Measures files that `export` wrote on this machine; ONNX runs on its CPU.

    Args:
      files: weights with their card, or programs.
      turn_seconds: how long a file is called in each of its turns, about.

    Raises:
      WeightsError: a file is not what `export` writes, or is damaged; names it.
      WorkdirError: a card is damaged.
    """
    paths = [Path(file) for file in files]
    loaded = [_load(path) for path in paths]
    one, many = (_medians(loaded, n, turn_seconds) for n in (1, MANY))
    return [
        Measured(
            str(path),
            path.stat().st_size,
            own.card.get("parameters"),
            own.card.get("flops"),
            own.card.get("test_accuracy"),
            seconds,
            MANY / seconds_of_many,
        )
        for path, own, seconds, seconds_of_many in zip(paths, loaded, one, many, strict=True)
    ]


def _load(path: Path) -> _Loaded:
    form = path.suffix[1:].lower()
    if form not in FORMATS:
        raise WeightsError(f"{path}: expected a file that export wrote: {', '.join(FORMATS)}")
    raw, card = read_bytes(path), read_card(path)
    try:
        if form in PROGRAMS:
            return _Loaded(*PROGRAMS[form][1](raw), card or {})
        if card is None:
            raise WeightsError(
                f"no {card_paths(path)[0].name} beside it says what network it is of: expected a "
                "file that export wrote"
            )
        return _Loaded(*_network(path, card), card)
    except ValueError as error:
        raise WeightsError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _network(path: Path, card: dict[str, Any]) -> tuple[Callable[[Any], Any], Any]:
    spec = spec_of(card["sees"])
    network = models.build(card["network"], card["classes"], spec, card["dtype"]).backbone
    with pinned(network.dtype, card.get("precision", "default")):
        variables = network.freeze(load_variables(path, network))

    @jax.jit
    def forward(variables, inputs):
        return network.apply(variables, inputs)[0].logits

    # As arguments: constants that a function closes over are slower to hand over.
    return functools.partial(forward, jax.device_put(variables)), spec


def _medians(loaded: Sequence[_Loaded], n: int, turn_seconds: float) -> list[float]:
    """Seconds of a call with `n` examples: the median of rounds in which all have a turn."""
    calls = [_caller(own, n) for own in loaded]
    for call in calls:
        call()  # compiles
    counts = [max(1, round(turn_seconds / max(_seconds(call, 1), 1e-9))) for call in calls]
    rounds = [
        [_seconds(call, count) for call, count in zip(calls, counts, strict=True)]
        for _ in range(ROUNDS)
    ]
    return [statistics.median(own) for own in zip(*rounds, strict=True)]


def _caller(loaded: _Loaded, n: int) -> Callable[[], None]:
    """Calls the network with `n` made-up examples, and waits for what it gives."""
    dtype, precision = (loaded.card.get(x, y) for x, y in _COMPUTED)
    with pinned(dtype, precision):
        inputs = jax.device_put(examples(loaded.spec, n))

    def call():
        with pinned(dtype, precision):
            jax.block_until_ready(loaded.forward(inputs))

    return call


_COMPUTED = (("dtype", "float32"), ("precision", "default"))


def _seconds(call: Callable[[], None], count: int) -> float:
    """Of one of `count` calls, on average."""
    begun = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begun) / count
