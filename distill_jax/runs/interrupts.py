"""Ctrl-C, or a notebook's stop, in a run that was called from Python."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def first_interrupt() -> Iterator[Callable[[], bool]]:
    """Notes the first SIGINT in the place of KeyboardInterrupt; a second one raises it at once.

    Only in the main thread, as no other can, and where SIGINT is not ignored. What was done on it
    before is done again afterwards.

    Yields:
      Whether there was one.
    """
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before in (signal.SIG_IGN, None):  # None: whoever set it cannot be put back
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(caught)
    finally:
        signal.signal(signal.SIGINT, before)
