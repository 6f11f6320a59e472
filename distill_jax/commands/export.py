"""`distill_jax export`: a trained network as a file for use elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

from distill_jax import report
from distill_jax.commands.arguments import ArgumentsError, Command, Flag
from distill_jax.runs.card import card_paths
from distill_jax.runs.export import FORMATS, export

FLAGS = (
    Flag("network", "Of the guidance's networks; the last one where it is not given."),
    Flag("seed", "The first one where it is not given."),
    Flag(
        "format",
        "safetensors, pth and npz hold weights, as PyTorch names them; stablehlo and onnx are "
        "programs with their weights.",
        "safetensors",
        FORMATS,
    ),
    Flag("out", "The file; in the folder of the run where it is not given."),
    Flag(
        "normalise",
        "Whether a program normalises by itself, and is given what the data set has, such as "
        "uint8 images.",
        "no",
        ("yes", "no"),
    ),
)


def run_export(given: SimpleNamespace) -> int:
    """Writes the file, and says where it is and how far it differs."""
    if given.seed is not None and not given.seed.isdecimal():
        raise ArgumentsError(f"--seed={given.seed}: expected an integer")
    done = export(
        given.workdir,
        given.guidance,
        given.network,
        None if given.seed is None else int(given.seed),
        form=given.format,
        out=given.out or "",
        normalise=given.normalise == "yes",
    )
    largest, of = done.difference
    console = report.console()
    console.print(f"{done.path}", soft_wrap=True, markup=False, highlight=False)
    _, card = card_paths(done.path)
    console.print(f"{card.name} beside it says what it is", soft_wrap=True, markup=False)
    console.print(f"read back, logits differ by at most {largest:.2g}, the largest being {of:.3g}")
    return 0


EXPORT = Command(
    about="Writes a trained network as a file for use elsewhere, reads it back and compares it.",
    run=run_export,
    words=("workdir", "guidance"),
    flags=FLAGS,
)
