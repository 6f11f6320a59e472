"""A job: a process that measures something and appends what it finds.

python -m experiments.gpu_row.job '{"function": "MODULE:NAME", "options": {}, ...}'
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import sys
import threading
from typing import Any

from experiments.gpu_row.lines import Lines


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all jobs of a command share.

    Args:
      out: the file of the lines.
      begun: when the command began, on the clock of `time.monotonic`.
      started: when the process of the job was, on the same clock.
      scratch: a folder for what jobs keep, which goes with the command.
      workdir: a folder for the whole rows, which a later command goes on with; "" takes scratch.
      variant: a label for every line.
      env: variables that were set for every job, recorded in every line.
      changes: fields of the config of what is trained that differ.
      dataset: of the whole row; data_dir: its folder.
      smoke: whether all is in miniature.
    """

    out: str
    begun: float
    scratch: str
    started: float = 0.0
    workdir: str = ""
    variant: str = ""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    dataset: str = "cifar10"
    data_dir: str = ""
    smoke: bool = False

    def lines(self, part: str) -> Lines:
        """Where a part appends its lines."""
        said = {"env": self.env, "set": self.changes, "smoke": self.smoke}
        common = {"part": part, "variant": self.variant, **{k: v for k, v in said.items() if v}}
        return Lines(self.out, self.begun, **common)


def end_with_parent() -> None:
    """Ends this process and those it started when the one that started it is gone."""
    os.read(0, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(argument: str) -> None:
    """Runs the function that the argument names."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    request = json.loads(argument)
    setting = Setting(**request["setting"])
    module, name = request["function"].split(":")
    function = getattr(importlib.import_module(module), name)
    function(setting.lines(request["part"]), setting, **request["options"])


if __name__ == "__main__":
    main(sys.argv[1])
