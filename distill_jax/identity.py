"""What a thing is, in one line: digests of arrays and of JSON, and what differs between two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_ABSENT = "absent"


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of everything in a tree."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in found]


def digests(tree: Any) -> dict[str, str]:
    """The sha256 of every array (type, shape and bytes), by its path."""
    return {path: _digest(np.asarray(leaf)) for path, leaf in leaves(jax.device_get(tree))}


def digest(tree: Any) -> str:
    """One sha256 of a whole tree; equal for equal names, types, shapes and bytes."""
    return digest_json(digests(tree))


def digest_json(value: Any) -> str:
    """The sha256 of a JSON value, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value as it comes back from a JSON file: tuples are lists, all names are text."""
    return json.loads(json.dumps(value))


def differences(saved: Any, wanted: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, a line each, by the path of its fields."""
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        lines = []
        for name in sorted(saved.keys() | wanted.keys()):
            pair = saved.get(name, _ABSENT), wanted.get(name, _ABSENT)
            lines += differences(*pair, f"{where}.{name}" if where else name)
        return lines
    return [] if saved == wanted else [f"{where} is {saved!r} there and {wanted!r} here"]


def _digest(array: np.ndarray) -> str:
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
