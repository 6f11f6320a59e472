"""Golden cases: what a file holds, and how ours is compared with it."""

from __future__ import annotations

import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import models
from distill_jax.interop import choosing, torch_weights
from experiments import golden

RUNNING_STATISTICS = 1e-4
EXACT = 1e-5
_GIVEN = ("in", "param", "buf")  # kinds of a method's arrays: all others are results
_LOGITS = ("student", "teachers", "logits", "features")  # what a file of losses begins with
_NUMBERS = ("T", "lam", "mask", "fea_weight")  # of a case of such a file


class Found(NamedTuple):
    """One compared array: its error and its bound."""

    what: str
    error: float
    bound: float

    @property
    def within(self) -> bool:
        """Whether the error is within its bound; NaN is within none."""
        return self.error <= self.bound

    def excess(self) -> float:
        """The error over its bound, by which errors are ordered."""
        return math.inf if math.isnan(self.error) else self.error / self.bound


class Case(NamedTuple):
    """What a file of the folder holds: {"meta": dict, array name: array}."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def bound(self, what: str) -> float:
        """Thirty times the authors' own float32 noise, at least 1e-5."""
        noise = self.meta.get("noise", {}).get(what, 0.0)
        if (column := self._column(what)) is not None:
            columns = self.meta.get("noise_columns")
            noise = columns[column] if columns else self.meta["noise"]["losses"]
        return max(EXACT, 30 * noise)

    def compare(self, what: str, ours: Any, reference: Any = None, bound: float = 0.0) -> Found:
        """Compares with the array `what` of the case, or with `reference`.

        "losses kd" is the column kd of the array losses. What is computed in float64 is compared
        with "f64_" of the array, where there is one.
        """
        ours = np.asarray(ours)
        if reference is None:
            column = self._column(what)
            name = what if column is None else "losses"
            double = self.arrays.get(f"f64_{name}") if ours.dtype == np.float64 else None
            reference = self.arrays[name] if double is None else double
            reference = reference if column is None else reference[:, column]
        ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
        if ours.shape != reference.shape:
            raise ValueError(f"{what}: shape {ours.shape}, expected {reference.shape}")
        size = np.max(np.abs(reference))
        gap = np.max(np.abs(ours - reference))
        return Found(what, float(gap / size if size else gap), bound or self.bound(what))

    def results(self) -> list[str]:
        """The names of all that a file holds to compare with, as `Found.what` has them."""
        meta = self.meta
        if isinstance(meta.get("cases"), dict):  # a method's arrays are case:kind:name
            return [key for key in self.arrays if key.split(":")[1] not in _GIVEN]
        inputs = _LOGITS if "cases" in meta else ()
        names = []
        for name, array in self.arrays.items():
            if name == "losses" and "columns" in meta:
                names += [f"losses {column}" for column in meta["columns"]]
            elif not name.startswith("f64_") and name not in inputs and array.dtype.kind == "f":
                names.append(name)
        for i, numbers in enumerate(meta.get("cases", [])):
            names += [f"{name} {i}" for name in numbers if name not in _NUMBERS]
        return [*names, *meta.get("bn_after", {}), *(["params"] if "params" in meta else [])]

    def _column(self, what: str) -> int | None:
        array, _, column = what.partition(" ")
        columns = self.meta.get("columns", [])
        return columns.index(column) if array == "losses" and column in columns else None


def files(folder: Path) -> list[Path]:
    """The files of cases of a folder and of those in it, by name.

    Raises:
      ValueError: no folder, or no case in it.
    """
    found = sorted(folder.rglob("*.npz"))
    if not found:
        raise ValueError(f"no golden case (*.npz) in {folder}")
    return found


def read_case(file: Path) -> Case:
    """The case of a file.

    Raises:
      ValueError: not the file of a case.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        return Case(file.stem, json.loads(str(arrays.pop("meta"))), arrays)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file.name} is not the file of a case: {error}") from None


REPDISTILLER = {
    "MobileNetV2": "mobilenetv2",
    "ShuffleV1": "shufflenetv1",
    "ShuffleV2": "shufflenetv2",
    "ResNet50": "resnet50_cifar",
}


def network_name(name: str, classes: int = 100) -> str:
    """This library's name for a network of the cases: "plane2", RepDistiller's, or file.function.

    TESKD's files are resnet_our, resnext_our, senet_our and vgg_our; functions have the
    depth: resnet_our.cifarresnet18 is evolving:cifar_resnet18, and 1000 classes are ImageNet's.
    """
    if "." not in name:
        return REPDISTILLER.get(name, name)
    file, function = name.split(".")
    family, depth = file.removesuffix("_our"), re.search(r"[a-z](\d+)", function)
    if depth is None:
        raise ValueError(f"{name}: no depth in its name")
    kind = "imagenet" if classes == 1000 else "cifar"
    return f"evolving:{kind}_{family}{depth[1]}"


def load(case: Case, name: str, entries: list | None, seed: int, dtype: str):
    """The network `name` with the weights of `seed`, in `dtype`."""
    size, classes = case.meta.get("size", 32), case.meta["classes"]
    network = models.build(network_name(name, classes), classes, (size, size, 3), dtype)
    state = golden.state_dict(entries or torch_weights.entries(network), seed)
    names = choosing.names_in(state, network)
    variables = torch_weights.from_state_dict(
        {names.get(key, key): array for key, array in state.items()}, network
    )
    return network, jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)


def batch(case: Case, t: int, dtype: str, size: int = 0) -> tuple[jax.Array, np.ndarray]:
    """Images and labels of step `t`; `size` of them, or those of a step."""
    meta = case.meta
    n, seed = size or meta["batch"], meta["seed"] * 100 + t
    images = jnp.asarray(golden.images(n, seed), dtype)
    return images, golden.labels(n, seed, meta["classes"])
