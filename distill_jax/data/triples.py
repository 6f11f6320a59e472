"""Knowledge graphs: triples (head, relation, tail), asked for the tail in both directions."""

from __future__ import annotations

import hashlib
import pathlib
import zipfile
from typing import Any

import jax
import numpy as np

from distill_jax.data import files
from distill_jax.data.checks import DataError
from distill_jax.data.dataset import Dataset, from_arrays
from distill_jax.data.ranking import known_answers, rank_metrics
from distill_jax.data.task import Task
from distill_jax.models import Indices

PARTS = ("train", "valid", "test")


def read_triples(detail: str, data_dir: str = "") -> Dataset:
    """Triples of `train.txt`, `valid.txt` and `test.txt` in a folder, or of an .npz file.

    Lines are head, relation and tail, with tabs between; entities and relations are numbered in the
    order of their names. An .npz file has int (N, 3) "train", "valid" and "test" and the numbers
    "entities" and "relations".

    Raises:
      DataError: names the file and the line that are not so.
    """
    path = files.within(data_dir, "triples", detail, "a folder or .npz")
    return _folder(path) if path.is_dir() else _archive(path, path.name)


def read_named(name: str, data_dir: str = "") -> Dataset:
    """FB15k-237 or WN18RR from `fb15k237.npz` or `wn18rr.npz`, as `read_triples` takes them.

    References:
      Toutanova and Chen, Observed versus Latent Features for Knowledge Base and Text Inference,
      CVSC 2015; Dettmers et al., Convolutional 2D Knowledge Graph Embeddings, AAAI 2018,
      1707.01476.
    """
    places = files.folders(data_dir)
    for place in places:
        if (place / f"{name}.npz").is_file():
            return _archive(place / f"{name}.npz", name)
    raise DataError(
        f"{name} was not found in {', '.join(map(str, places))}. Nothing was downloaded. Expected "
        f"{name}.npz of int (N, 3) train, valid and test; or triples:FOLDER with train.txt, "
        "valid.txt and test.txt"
    )


def read_synthetic_triples(detail: str, data_dir: str = "") -> Dataset:
    """Made-up triples for "ENTITIES[:RELATIONS[:TRIPLES]]"; "" is 40:4:400.

    Entities lie on a circle, along which each relation goes so many steps, or one more.
    """
    numbers = (detail or "40:4:400").split(":")
    if len(numbers) > 3 or not all(
        x.isascii() and x.isdigit() and 0 < int(x) < 10**6 for x in numbers
    ):
        raise DataError(
            f"synthetic_triples is {detail!r}: expected synthetic_triples:ENTITIES[:RELATIONS"
            "[:TRIPLES]], all whole numbers below a million"
        )
    entities, relations, count = (*map(int, numbers), *(40, 4, 400)[len(numbers) :])
    rng = np.random.default_rng((entities, relations, count))
    heads, kinds = rng.integers(0, entities, count), rng.integers(0, relations, count)
    tails = (heads + 2 * kinds + 1 + rng.integers(0, 2, count)) % entities
    triples = np.stack([heads, kinds, tails], 1).astype(np.int32)
    held = max(2, count // 8)
    parts = {
        "train": triples[2 * held :],
        "valid": triples[:held],
        "test": triples[held : 2 * held],
    }
    return _dataset("synthetic_triples", parts, entities, relations, "", {})


def _dataset(
    name: str,
    parts: dict[str, np.ndarray],
    entities: int,
    relations: int,
    source: str,
    kept: dict[str, str],
) -> Dataset:
    """Questions of both directions: (tail, relation + R) asks for the head."""
    splits = {}
    for part, triples in parts.items():
        _check(f"{name} {part}", triples, entities, relations)
        heads, kinds, tails = triples.astype(np.int32).T
        asked = {
            "head": Indices(np.concatenate([heads, tails]), entities, source),
            "relation": Indices(np.concatenate([kinds, kinds + relations]), 2 * relations, source),
        }
        splits[part] = asked, np.concatenate([tails, heads])
    heads, kinds = (
        np.concatenate([asked[name].values for asked, _ in splits.values()])
        for name in ("head", "relation")
    )
    tails = np.concatenate([own for _, own in splits.values()])
    known = known_answers(heads, kinds, tails, 2 * relations)
    one = jax.ShapeDtypeStruct((), np.int32)
    spec = {
        "head": Indices(one, entities, source),
        "relation": Indices(one, 2 * relations, source),
    }
    task = Task(spec, entities, metrics=rank_metrics(known), files=kept, select_by="mrr")
    return from_arrays(splits["train"], splits["test"], valid=splits["valid"], name=name, task=task)


def _check(what: str, triples: Any, entities: int, relations: int) -> None:
    """Raises DataError where an array is no triples of so many entities and relations."""
    if triples.ndim != 2 or triples.shape[1] != 3 or not np.issubdtype(triples.dtype, np.integer):
        raise DataError(
            f"{what} is {triples.dtype} {triples.shape}: expected integers (N, 3), of head, "
            "relation and tail"
        )
    if not len(triples):
        raise DataError(f"{what} has no triples: expected at least one")
    for column, kind, size in (
        (0, "head", entities),
        (1, "relation", relations),
        (2, "tail", entities),
    ):
        wrong = np.flatnonzero((triples[:, column] < 0) | (triples[:, column] >= size))
        if len(wrong):
            raise DataError(
                f"{what} has the {kind} {triples[wrong[0], column]} in triple {wrong[0]} "
                f"({len(wrong)} such): expected 0 to {size - 1}"
            )


def _archive(path: pathlib.Path, name: str) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}): expected an .npz file") from error
    if missing := [key for key in (*PARTS, "entities", "relations") if key not in arrays]:
        raise DataError(
            f"{path} has no {', '.join(missing)}: expected train, valid, test and sizes"
        )
    entities, relations = (int(arrays[key]) for key in ("entities", "relations"))
    return _dataset(name, {part: arrays[part] for part in PARTS}, entities, relations, name, {})


def _folder(path: pathlib.Path) -> Dataset:
    named = {}
    for part in PARTS:
        file = path / f"{part}.txt"
        if not file.is_file():
            raise DataError(f"{path} has no {part}.txt: expected train.txt, valid.txt and test.txt")
        lines = files.read_text(file).split("\n")
        rows = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                columns = line.rstrip("\r").split("\t")
                if len(columns) != 3:
                    raise DataError(
                        f"{file} line {number} has {len(columns)} columns: expected head, relation "
                        "and tail, with tabs between"
                    )
                rows.append(columns)
        if not rows:
            raise DataError(f"{file} has no triples: expected at least one")
        named[part] = np.array(rows)
    whole = np.concatenate(list(named.values()))
    entities, relations = np.unique(whole[:, [0, 2]]), np.unique(whole[:, 1])
    parts = {
        part: np.stack(
            [
                np.searchsorted(names, rows[:, column])
                for column, names in enumerate((entities, relations, entities))
            ],
            1,
        )
        for part, rows in named.items()
    }
    kept = {
        f"{kind}.txt": "\n".join([*names, ""])
        for kind, names in (("entities", entities), ("relations", relations))
    }
    source = hashlib.sha256("".join(kept.values()).encode()).hexdigest()[:16]
    return _dataset(str(path), parts, len(entities), len(relations), source, kept)
