"""Pages of docs/ whose tables are computed: they are printed, checked or written by one command."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- table -->", "<!-- end -->"


def main(
    argv: list[str] | None,
    module: str,
    description: str | None,
    page: Path,
    compute: Callable[[], str],
) -> int:
    """Prints, checks or writes what belongs between the markers of a page.

    Args:
      argv: the arguments; those of the process where None.
      module: what `python -m` is given.
      description: for --help.
      page: the page, unless --page names another.
      compute: gives the text.

    Returns:
      The exit code: 1 where a page differs or cannot be read.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with the page")
    what.add_argument("--write", action="store_true", help="rewrite the page's tables")
    parser.add_argument("--page", type=Path, default=page, help="the page (%(default)s)")
    args = parser.parse_args(argv)
    computed = compute()
    if not (args.check or args.write):
        print(computed)
        return 0
    try:
        text = args.page.read_text("utf-8")
        if args.write:
            args.page.write_text(rewritten(text, computed), "utf-8")
            return 0
        differ = differences(text, computed)
    except (OSError, ValueError) as error:
        print(f"error: {args.page}: {error}", file=sys.stderr)
        return 1
    if differ:
        lines = "\n".join(differ)
        print(
            f"error: {args.page} differs from what is computed; --write mends it\n{lines}",
            file=sys.stderr,
        )
        return 1
    print(f"{args.page} agrees with what is computed")
    return 0


def published(text: str) -> str:
    """What stands between the markers of a page.

    Raises:
      ValueError: not exactly one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"the page needs one {BEGIN} and, after it, one {END}")
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def differences(text: str, computed: str) -> list[str]:
    """The lines in which a page and the computed tables differ; none where they agree."""
    pair = (published(text).splitlines(), computed.splitlines())
    return list(difflib.unified_diff(*pair, "page", "computed", lineterm="", n=0))


def rewritten(text: str, computed: str) -> str:
    """The page with the computed tables between its markers."""
    published(text)  # both markers are there
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{computed}\n{END}{rest.partition(END)[2]}"


def heading(*names: str) -> Iterator[str]:
    """The two lines that head a table."""
    yield row(*names)
    yield "|" + "---|" * len(names)


def row(*cells: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"
