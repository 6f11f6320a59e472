"""Runs the notebooks from their scripts, and keeps what they show.

python -m experiments.notebooks              # all of them
python -m experiments.notebooks teskd        # one

Each NAME.py is run from a fresh kernel, top to bottom, and written as NAME.ipynb.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parent
NAMES = ("the_idea", "methods_along_edges", "bring_your_own", "teskd", "search")
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}  # else XLA says in a cell that a busy machine is slow
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def source(name: str) -> Any:
    """The cells of a notebook's script, with nothing run."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    return notebook


def executed(name: str, seconds: int = 1800) -> Any:
    """A notebook run from a fresh kernel.

    Args:
      name: of the notebook.
      seconds: that a cell may take.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = source(name)
    options = {"timeout": seconds, "record_timing": False, "coalesce_streams": True}
    client = nbclient.NotebookClient(notebook, **options)
    client.execute(env={**os.environ, **QUIET})
    notebook.metadata = nbformat.from_dict(METADATA)  # without the kernel's version
    return notebook


def main(argv: Sequence[str]) -> int:
    """Runs notebooks and writes them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.notebooks", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    names = parser.parse_args(argv).names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no notebook {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    for name in names:
        begun = time.monotonic()
        notebook = executed(name)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
