"""The file of results: a JSON object a line, each whole and on disk as soon as it is known."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Lines:
    """Appends lines to a file.

    Args:
      out: the file.
      begun: when the command began, on the clock of `time.monotonic`, which processes share.
      **common: what every line has.
    """

    def __init__(self, out: str, begun: float, **common: Any):
        self.out, self.begun, self.common = out, begun, common

    def adding(self, **common: Any) -> Lines:
        """The same, whose lines have more in common."""
        return Lines(self.out, self.begun, **{**self.common, **common})

    def add(self, **values: Any) -> None:
        """Appends a line; numbers that are not finite are null."""
        at = round(time.monotonic() - self.begun, 2)
        line = json.dumps(_finite({**self.common, "at": at, **values}), allow_nan=False)
        with open(self.out, "a") as file:  # closed at once: it survives whatever ends the process
            file.write(line + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def end_torn_line(out: str) -> None:
    """Ends the last line of a file where a kill has torn it, so that the next begins its own."""
    path = Path(out)
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read(files: Iterable[str]) -> tuple[list[Line], int]:
    """The lines of all files, and how many others there are: torn, or of another form.

    Raises:
      OSError: a file cannot be read.
    """
    found, others = [], 0
    for file in files:
        for text in Path(file).read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if isinstance(line, dict) and {"part", "variant", "name"} <= set(line):
                found.append(line)
            elif text.strip():
                others += 1
    return found, others
