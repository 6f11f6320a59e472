"""The fields of a config, as docs/config.md lists them.

python -m experiments.fields           # the tables, as Markdown
python -m experiments.fields --check   # exit code 1 where docs/config.md has others
python -m experiments.fields --write   # puts them there
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from distill_jax.runs.config.defaults import SECTIONS
from distill_jax.runs.config.help import by_section, default_text
from experiments import pages

PAGE = pages.DOCS / "config.md"


def tables() -> str:
    """A table for each section, as Markdown."""
    return "\n".join(_lines())


def main(argv: list[str] | None = None) -> int:
    """Prints, checks or writes the tables; the exit code."""
    return pages.main(argv, "experiments.fields", __doc__, PAGE, tables)


def _lines() -> Iterator[str]:
    for section, fields in by_section():
        yield from (f"## {SECTIONS[section]}", "")
        yield from pages.heading("field", "default", "what it means")
        for field in fields:
            yield pages.row(f"`{field.path}`", f"`{default_text(field)}`", _escaped(field.about))
        yield ""


def _escaped(text: str) -> str:
    """The text without what Markdown would take for markup."""
    return re.sub(r"([\\*<\[|])", r"\\\1", text)


if __name__ == "__main__":
    sys.exit(main())
