"""What is to be known of a network in a file: the card that stands beside it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.report.summary import half_width, trainings
from distill_jax.runs.checkpoint import write_json, write_text
from distill_jax.runs.workdir import WorkdirError

_NEEDED = {"network": str, "classes": int, "inputs": dict, "sees": dict, "dtype": str}


def card_paths(file: Path) -> tuple[Path, Path]:
    """Where the card of a file stands: for programs, and for people."""
    return file.with_name(f"{file.name}.json"), file.with_name(f"{file.name}.md")


def write_card(file: Path, facts: Mapping[str, Any]) -> None:
    """Writes both forms of a card; errors are those of `write_json`."""
    for_programs, for_people = card_paths(file)
    write_json(for_programs, facts)
    write_text(for_people, _text(facts))


def remove_card(file: Path) -> None:
    """Removes the card of a file that is about to be written anew."""
    for card in card_paths(file):
        card.unlink(missing_ok=True)


def read_card(file: Path) -> dict[str, Any] | None:
    """The facts beside a file; None where there is no card.

    Raises:
      WorkdirError: the card is damaged.
    """
    path, _ = card_paths(file)
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text("utf-8"))
        wrong = [name for name, kind in _NEEDED.items() if not isinstance(facts[name], kind)]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise WorkdirError(f"{path} is damaged: {type(error).__name__} {error}") from None
    if wrong:
        raise WorkdirError(f"{path} is damaged: {wrong[0]} is {facts[wrong[0]]!r}")
    return facts


def accuracy_over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean test accuracy of rows that differ in their seeds, and half of its 95 % interval."""
    accuracies = [row["test_accuracy"] for row in trainings(rows)]
    return {
        "mean": statistics.fmean(accuracies),
        "half_interval": half_width(accuracies),
        "seeds": len(accuracies),
    }


def _text(facts: Mapping[str, Any]) -> str:
    """The card in Markdown."""
    over, difference = facts["accuracy"], facts["difference"]
    mean, seeds = f"{100 * over['mean']:.2f} %", "one seed"
    if over["half_interval"] is not None:
        mean = f"{100 * over['mean']:.2f} ± {100 * over['half_interval']:.2f} %"
        seeds = f"mean and half of its 95 % interval, n = {over['seeds']}"
    taught = " and ".join(facts["teachers"]) or "nobody"
    given = "as the data set has them" if facts["normalised_inside"] else "normalised"
    lines = {
        "network": facts["network"],
        "taught by": f"{taught} ({facts['guidance']})",
        "data": facts["dataset"],
        "test accuracy": f"{100 * facts['test_accuracy']:.2f} %, seed {facts['seed']}",
        "over seeds": f"{mean}, {seeds}",
        **_began(facts["initial"]),
        "epoch chosen by": facts["selection"],
        "parameters": f"{facts['parameters']:,}",
        "FLOPs of an example": f"{facts['flops']:,.0f}",
        "bytes of the file": f"{facts['bytes']:,}",
        "inputs": f"`{json.dumps(facts['inputs'])}`, {given}",
        "preprocessing": f"`{json.dumps(facts['preprocessing'])}`",
        "recipe": f"`{json.dumps(facts['recipe'])}`",
        "methods": f"`{json.dumps(facts['methods'])}`",
        "read back": f"logits differ by {difference['largest']:.2g} of {difference['of']:.3g}",
        "made by": f"distill_jax {facts['distill_jax']}, JAX {facts['jax']}",
        "stage": facts["stage"],
    }
    rows = "".join(f"| {name} | {_cell(value)} |\n" for name, value in lines.items())
    return f"# {facts['file']}\n\n| | |\n|---|---|\n{rows}"


def _began(initial: Mapping[str, Any]) -> dict[str, str]:
    """The line of a network that was fine-tuned."""
    if not initial:
        return {}
    drawn = f", {initial['anew']} drawn anew" if "anew" in initial else ""
    return {"fine-tuned from": f"`{initial['weights']}`, digest {initial['digest']}{drawn}"}


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;")
