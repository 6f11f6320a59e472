"""Sentences with a label each: SST-2, files of one's own, and made-up ones."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax.data import files
from distill_jax.data.checks import DataError, check_labels, integer
from distill_jax.data.dataset import Dataset, from_arrays, hold_out
from distill_jax.data.task import Task
from distill_jax.data.vocabulary import learn_vocabulary
from distill_jax.models import Indices

_PARTS = {
    "train": ("train",),
    "valid": ("dev", "valid", "validation", "val"),
    "test": ("test",),
}
_ENDINGS = (".jsonl", ".tsv", ".jsonl.gz", ".tsv.gz")
VOCABULARY, LENGTH = 8000, 64  # by default: word pieces, and tokens of a sentence


class _Row(NamedTuple):
    sentence: str
    label: int | str
    split: str


def read_text(
    detail: str,
    data_dir: str = "",
    valid_fraction: float = 0.1,
    split_seed: int = 0,
    vocabulary: int = VOCABULARY,
    length: int = LENGTH,
) -> Dataset:
    """Sentences and labels of JSONL or TSV files, as tokens of a vocabulary learnt from "train".

    `detail`, within `data_dir`, is a file whose rows have a field "split" (train, test and perhaps
    dev), or a folder with such files (`train.tsv`, `test.tsv` and perhaps `dev.tsv`, or .jsonl,
    each perhaps .gz). Rows are JSON objects with "sentence" and "label", or lines of columns that
    the first line names so. Labels are integers from 0, or words, numbered in their order.

    Args:
      detail: what follows "text:".
      data_dir: where it is.
      valid_fraction: of each class, held out for validation where there is no dev.
      split_seed: by which they are chosen.
      vocabulary: word pieces, at most.
      length: tokens of a sentence; of a longer one the first ones are taken.

    Raises:
      DataError: names the file and the line that are not so.
    """
    path = files.within(data_dir, "text", detail, "text:FILE or text:FOLDER")
    rows = _folder(path) if path.is_dir() else _parts(path)
    return _dataset(str(path), rows, valid_fraction, split_seed, vocabulary, length)


def read_sst2(
    detail: str,
    data_dir: str = "",
    vocabulary: int = VOCABULARY,
    length: int = LENGTH,
) -> Dataset:
    """SST-2's whole sentences, positive (1) or negative (0), from `sst2.jsonl`, packed or not.

    Raises:
      DataError: the file is missing or damaged.

    References:
      Socher et al., Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank,
      EMNLP 2013.
    """
    places = files.folders(data_dir)
    for place in places:
        for path in (place / "sst2.jsonl", place / "sst2.jsonl.gz"):
            if path.is_file():
                return _dataset("sst2", _parts(path), 0.0, 0, vocabulary, length)
    raise DataError(
        f"sst2 was not found in {', '.join(map(str, places))}. Nothing was downloaded. Expected "
        "sst2.jsonl or sst2.jsonl.gz, rows of split (train, dev or test), sentence and label; or "
        "text:FOLDER with train.tsv, dev.tsv and test.tsv of sentence and label"
    )


def read_synthetic_text(
    detail: str,
    data_dir: str = "",
    valid_fraction: float = 0.1,
    split_seed: int = 0,
    vocabulary: int = 300,
    length: int = 16,
) -> Dataset:
    """Made-up sentences for "CLASSES[:TRAIN[:TEST]]"; "" is 2:256:128.

    Each class has words of its own, of which each sentence has two, among words that all have.
    """
    numbers = (detail or "2:256:128").split(":")
    if len(numbers) > 3 or not all(
        x.isascii() and x.isdigit() and 0 < int(x) < 10**6 for x in numbers
    ):
        raise DataError(
            f"synthetic_text is {detail!r}: expected synthetic_text:CLASSES[:TRAIN[:TEST]], all "
            "whole numbers below a million"
        )
    classes, *counts = map(int, numbers)
    train, test = (*counts, *(256, 128)[len(counts) :])
    rng = np.random.default_rng((classes, train, test))
    rows = {
        name: list(_made_up(rng, classes, count))
        for name, count in (("train", train), ("test", test))
    }
    what = f"synthetic_text:{detail}"
    return _dataset(what, rows, valid_fraction, split_seed, vocabulary, length)


def _made_up(rng: np.random.Generator, classes: int, count: int) -> Iterator[_Row]:
    for label in rng.permutation(np.arange(count) % classes):
        common = [f"common{i}" for i in rng.integers(0, 40, rng.integers(3, 9))]
        own = [f"class{label}word{i}" for i in rng.integers(0, 4, 2)]
        yield _Row(" ".join(rng.permutation([*common, *own])), int(label), "")


def _dataset(
    name: str,
    rows: dict[str, list[_Row]],
    valid_fraction: float,
    split_seed: int,
    vocabulary: int,
    length: int,
) -> Dataset:
    """Sentences of each part as tokens; what is held out for validation teaches no word pieces."""
    labels, classes = _labels(name, rows)
    sentences = {
        part: np.array([row.sentence for row in own], object) for part, own in rows.items()
    }
    places = {}
    if "valid" not in rows:
        kept, held = hold_out(labels["train"], classes, valid_fraction, split_seed)
        places = {"train": kept, "valid": held}
        for of_part in (sentences, labels):
            whole = of_part["train"]
            of_part.update({part: whole[own] for part, own in places.items()})
    pieces = learn_vocabulary(list(sentences["train"]), vocabulary)
    length = integer("length", length, 1)
    splits = {
        part: (pieces.encode(list(own), length, f"{name} {part}"), labels[part])
        for part, own in sentences.items()
    }
    spec = Indices(jax.ShapeDtypeStruct((length,), np.int32), pieces.size, pieces.digest)
    task = Task(spec, classes, files={pieces.file: pieces.text})
    valid = splits["valid"] if len(labels["valid"]) else None
    dataset = from_arrays(
        splits["train"], splits["test"], valid=valid, valid_fraction=0.0, name=name, task=task
    )
    return dataclasses.replace(dataset, places=places)


def _labels(name: str, rows: dict[str, list[_Row]]) -> tuple[dict[str, np.ndarray], int]:
    """The labels of each part as integers, and how many classes there are."""
    given = {part: [row.label for row in own] for part, own in rows.items()}
    known = sorted(set(given["train"]), key=str)
    words = [label for label in known if not isinstance(label, int)]
    if not words:
        classes = max(2, int(max(known)) + 1)
        arrays = {part: np.array(own) for part, own in given.items()}
    elif len(words) < len(known):
        raise DataError(f"{name} has the labels {known[:8]}: expected integers, or words, not both")
    else:
        classes, numbers = len(known), {label: i for i, label in enumerate(known)}
        arrays = {
            part: np.array([numbers.get(label, -1) for label in own]) for part, own in given.items()
        }
        for part, own in given.items():
            if unknown := [label for label in own if label not in numbers]:
                raise DataError(
                    f"{name} {part} has the label {unknown[0]!r}: expected one of train's, "
                    f"{known[:8]}"
                )
    checked = {
        part: check_labels(f"{name} {part}", own, len(own), classes, "sentences")
        for part, own in arrays.items()
    }
    return checked, classes


def _folder(path: pathlib.Path) -> dict[str, list[_Row]]:
    """The rows of each part of a folder."""
    rows = {}
    for part, names in _PARTS.items():
        there = [path / (name + end) for name in names for end in _ENDINGS]
        there = [file for file in there if file.is_file()]
        if len(there) > 1:
            raise DataError(f"{path} has {there[0].name} and {there[1].name}: expected one of them")
        if there:
            rows[part] = _rows(there[0])
    return _whole(path, rows)


def _parts(path: pathlib.Path) -> dict[str, list[_Row]]:
    """The rows of each part of one file."""
    part_of = {name: part for part, names in _PARTS.items() for name in names}
    rows: dict[str, list[_Row]] = {}
    for row in _rows(path):
        if row.split not in part_of:
            raise DataError(
                f"{path} has a row of split {row.split!r}: expected one of {', '.join(part_of)}"
            )
        rows.setdefault(part_of[row.split], []).append(row)
    return _whole(path, rows)


def _whole(path: pathlib.Path, rows: dict[str, list[_Row]]) -> dict[str, list[_Row]]:
    for part in ("train", "test"):
        if not rows.get(part):
            raise DataError(f"{path} has no {part} sentences: expected train and test, perhaps dev")
    return rows


def _rows(path: pathlib.Path) -> list[_Row]:
    """The rows of a file; DataError names the line that is none."""
    lines = [line.rstrip("\r") for line in files.read_text(path).split("\n")]
    fields = _of_json if ".jsonl" in path.suffixes else _of_columns
    return [_row(f"{path} line {number}", own) for number, own in fields(path, lines)]


def _of_json(path: pathlib.Path, lines: Sequence[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path} line {number} is no JSON ({error}): expected an object a line"
                ) from error


def _of_columns(path: pathlib.Path, lines: Sequence[str]) -> Iterator[tuple[int, Any]]:
    # A carriage return within a line would end a row.
    if bad := [n for n, line in enumerate(lines, 1) if "\r" in line]:
        raise DataError(f"{path} line {bad[0]} has a carriage return in it: expected none")
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    names = next(reader, [])
    if not {"sentence", "label"} <= set(names):
        raise DataError(f"{path} names the columns {names}: expected sentence and label among them")
    for number, cells in enumerate(reader, 2):
        if not cells:
            continue
        if len(cells) != len(names):
            raise DataError(
                f"{path} line {number} has {len(cells)} columns: expected {len(names)}, "
                f"{', '.join(names)}"
            )
        own = dict(zip(names, cells, strict=True))
        label = own["label"]
        number_like = label.isascii() and label.isdigit()
        yield number, {**own, "label": int(label) if number_like else label}


def _row(where: str, own: Any) -> _Row:
    if not isinstance(own, dict) or not {"sentence", "label"} <= own.keys():
        raise DataError(f"{where} is {str(own)[:80]!r}: expected sentence and label")
    sentence, label = own["sentence"], own["label"]
    if not isinstance(sentence, str) or not sentence.strip():
        raise DataError(f"{where} has the sentence {sentence!r}: expected one that is not empty")
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise DataError(f"{where} has the label {label!r}: expected an integer or a word")
    return _Row(sentence, label, str(own.get("split", "")))
