"""What networks of a run are given, as JSON values, so that they can be used without its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from distill_jax.data import Dataset, Indices


def describe_inputs(dataset: Dataset) -> dict[str, Any]:
    """Number of classes, shapes and types of a batch of one, and how images are preprocessed."""
    preprocessing = {
        "mean": dataset.mean,
        "std": dataset.std,
        "value_range": dataset.value_range,
    }
    return {
        "classes": dataset.classes,
        "inputs": spec_as_json(dataset.inputs),
        "preprocessing": preprocessing if dataset.task is None else {},
    }


def spec_as_json(spec: Any) -> Any:
    """Shapes and types in dicts, lists and tuples, for `spec_of`; None of other structures."""
    if isinstance(spec, jax.ShapeDtypeStruct):
        return {"shape": list(spec.shape), "dtype": str(spec.dtype)}
    if isinstance(spec, Indices):
        values = spec_as_json(spec.values)
        return {"indices": values, "size": spec.size, "source": spec.source}
    if type(spec) is dict and all(isinstance(name, str) for name in spec):
        parts: Any = {name: spec_as_json(own) for name, own in spec.items()}
        known = None not in parts.values()
    elif type(spec) in (list, tuple):
        parts = [spec_as_json(own) for own in spec]
        known = None not in parts
    else:
        return None
    return {type(spec).__name__: parts} if known else None


def spec_of(value: Mapping[str, Any]) -> Any:
    """The shapes and types that `spec_as_json` made a JSON value of."""
    if "dict" in value:
        return {name: spec_of(own) for name, own in value["dict"].items()}
    if "list" in value:
        return [spec_of(own) for own in value["list"]]
    if "tuple" in value:
        return tuple(spec_of(own) for own in value["tuple"])
    if "indices" in value:
        return Indices(spec_of(value["indices"]), value["size"], value["source"])
    return jax.ShapeDtypeStruct(tuple(value["shape"]), value["dtype"])
