"""What an example is, what networks see of it, and how they are measured."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import numpy as np
from jax import Array

from distill_jax.data.augment import AUGMENT, normalise, standardise, to_unit
from distill_jax.data.checks import DataError, integer
from distill_jax.models import Indices
from distill_jax.models.indices import is_indices
from distill_jax.refusals import kind_and_line

Metric = Callable[..., tuple[Any, Any]]  # (logits, labels), or with inputs -> (sum, count)
Preprocess = Callable[[Any, Array, bool], Any]  # (one example's inputs, key, train)
TRIED = 1000  # examples, at most, on which a metric is tried
_TAKEN = re.compile(r"accuracy|loss|branch\d+_accuracy")  # what every network is measured by


def as_they_are(inputs: Any, key: Array, train: bool) -> Any:
    """The inputs as they are."""
    del key, train
    return inputs


@dataclasses.dataclass(frozen=True)
class Task:
    """What one example is, what networks see of it, and how they are measured.

    Preprocessing is of one example, not of a batch: it cannot look at the neighbours, so that any
    number of devices sees the same, and it needs no axis of examples.

    Args:
      spec: shape and type of one example's inputs, without labels: a `jax.ShapeDtypeStruct` or any
        pytree of them; arrays stand for their shapes. Integers that index something, such as tokens
        of a vocabulary, are `Indices`, which say of how many things.
      classes: C, the labels being 0 to C - 1.
      preprocess: (inputs of one example, key, train) -> what networks see of it, a pytree of
        arrays; pure, part of the compiled step. The key is one of (seed, step, place in the batch)
        where `train` is true, and always the same elsewhere.
      metrics: by name, (logits (N, C), labels (N,)) -> (sum, count) over these N examples, in NumPy
        or JAX; one that takes three arguments is given their inputs too, as the data set has them.
        Of a large split it is called for parts, which are added up. Accuracy and cross-entropy are
        always there.
      files: texts by the names of the files in which a working directory keeps them: what somebody
        needs to make inputs of new data, such as a vocabulary.
      select_by: of which metric the highest value on validation chooses the weights; "accuracy", or
        one of `metrics`.

    Raises:
      DataError: one of these is not as described here.
    """

    spec: Any
    classes: int
    preprocess: Preprocess = as_they_are
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    select_by: str = "accuracy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", integer("classes", self.classes, 2))
        object.__setattr__(self, "spec", _checked_spec(self.spec))
        check_metrics(self.metrics, self.classes, self.spec)
        if self.select_by not in ("accuracy", *self.metrics):
            known = ", ".join(("accuracy", *self.metrics))
            raise DataError(f"select_by is {self.select_by!r}: expected one of {known}")
        trained, evaluated = (self._seen(train) for train in (True, False))
        if trained != evaluated:
            raise DataError(
                f"preprocess gives {text_of(trained)} to train on and {text_of(evaluated)} to "
                "evaluate: expected the same shapes and types"
            )

    @functools.cached_property
    def is_fixed(self) -> bool:
        """Whether training sees of an example what evaluation does, at every epoch.

        False where preprocessing uses its key, depends on `train`, or calls what runs on the host.
        """
        if self.is_random:
            return False
        evaluated, trained = (
            jax.jit(self._preprocess(train)).lower(self.spec, _key_shape()).as_text()
            for train in (False, True)
        )
        return evaluated == trained and "callback" not in trained

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether training sees an example otherwise each time: preprocessing uses its key."""
        trained = jax.make_jaxpr(self._preprocess(train=True))(self.spec, _key_shape()).jaxpr
        used = [x for equation in trained.eqns for x in equation.invars]
        return any(x is trained.invars[-1] for x in (*used, *trained.outvars))

    def _preprocess(self, train: bool) -> Callable[[Any, Array], Any]:
        return lambda inputs, key: self.preprocess(inputs, key, train)

    def _seen(self, train: bool) -> Any:
        """The shapes and types of one preprocessed example."""
        try:
            seen = jax.eval_shape(self._preprocess(train), self.spec, _key_shape())
        except Exception as error:  # whatever somebody's code raises
            raise DataError(
                f"preprocess cannot be run on {text_of(self.spec)} with train={train}: "
                f"{kind_and_line(error)}"
            ) from error
        if not jax.tree.leaves(seen):
            raise DataError("preprocess gives no array: expected what networks are to see")
        return jax.tree.map(_bare, seen)


@dataclasses.dataclass(frozen=True)
class Examples:
    """The preprocessing of a task's examples, on batches; hashable."""

    one: Preprocess

    def train(self, augment: str, keys: Array, inputs: Any) -> Any:
        """What networks are trained on: keys (B,), inputs (B, ...)."""
        assert augment == "none", augment  # `checks.check` refuses others
        return jax.vmap(lambda x, key: self.one(x, key, True))(inputs, keys)

    def evaluate(self, inputs: Any) -> Any:
        """What networks are evaluated on, and frozen ones asked about."""
        key = jax.random.key(0)
        return jax.vmap(lambda x: self.one(x, key, False))(inputs)


@dataclasses.dataclass(frozen=True)
class Images:
    """The preprocessing of images, on batches: the recipe's augmentation, then mean and std.

    Args:
      mean: per channel, of values in [0, 1].
      std: likewise.
      value_range: (low, high) of float images, which becomes [0, 1]; None of uint8 images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: tuple[float, float] | None = None

    def train(self, augment: str, keys: Array, images: Array) -> Array:
        """What networks are trained on: keys (B,), images (B, H, W, channels)."""
        if self.value_range is None:
            return normalise(AUGMENT[augment](keys, images), self.mean, self.std)
        unit = AUGMENT[augment](keys, to_unit(images, self.value_range))
        return standardise(unit, self.mean, self.std)

    def evaluate(self, images: Array) -> Array:
        """What networks are evaluated on, and frozen ones asked about."""
        if self.value_range is None:
            return normalise(images, self.mean, self.std)
        return standardise(to_unit(images, self.value_range), self.mean, self.std)


def check_metrics(metrics: Any, classes: int, spec: Any) -> None:
    """Raises DataError where a metric cannot be recorded, after trying it on an example a class.

    Args:
      metrics: by name.
      classes: C; of many, the first ones are tried.
      spec: shapes and types of one example's inputs.
    """
    if not isinstance(metrics, Mapping):
        raise DataError(f"metrics are {metrics!r}: expected a dict, name -> (logits, labels)")
    size = min(max(classes, 8), TRIED) if classes <= TRIED else 8
    labels = np.arange(size, dtype=np.int32) % classes
    logits = np.sin(np.arange(labels.size * classes, dtype=np.float32) ** 2)
    inputs = jax.tree.map(lambda x: np.zeros((size, *x.shape), x.dtype), spec) if metrics else None
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name.isidentifier() or _TAKEN.fullmatch(name):
            raise DataError(
                f"metric {name!r}: expected a name such as 'top5', and none that every network is "
                "measured by"
            )
        if not callable(metric):
            raise DataError(f"metric {name!r} is {metric!r}: expected a function (logits, labels)")
        try:
            count = sum_and_count(name, metric, logits.reshape(-1, classes), labels, inputs)[1]
        except DataError:
            raise
        except Exception as error:  # whatever somebody's code raises
            raise DataError(
                f"metric {name!r} cannot be computed of logits ({labels.size}, {classes}) and "
                f"labels ({labels.size},): {type(error).__name__}: {error}"
            ) from error
        if not count > 0 and (size >= classes or math.isnan(count)):
            raise DataError(
                f"metric {name!r} gives a count of {count} for {labels.size} examples of all "
                "classes: expected above 0"
            )


def sum_and_count(
    name: str, metric: Metric, logits: np.ndarray, labels: np.ndarray, inputs: Any
) -> tuple[float, float]:
    """What a metric gives; DataError where that is no pair of numbers (sum, count)."""
    given = metric(logits, labels, inputs) if _takes_inputs(metric) else metric(logits, labels)
    if not isinstance(given, tuple | list) or any(np.shape(x) for x in given) or len(given) != 2:
        raise DataError(
            f"metric {name!r} gives {text_of(given)}: expected (sum, count), two numbers"
        )
    return float(given[0]), float(given[1])


def _takes_inputs(metric: Metric) -> bool:
    """Whether a metric needs a third argument."""
    try:
        parameters = inspect.signature(metric).parameters.values()
    except (TypeError, ValueError):  # of what is written in C
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(needed) == 3


def check_inputs(what: str, inputs: Any, spec: Any) -> tuple[Any, int]:
    """A split's inputs as NumPy arrays, and how many examples they are; DataError where not."""
    structure: Any = jax.tree.structure(spec)
    if jax.tree.structure(inputs) != structure:
        raise DataError(
            f"{what} inputs are {text_of(inputs)}: expected {text_of(spec)}, each with a leading "
            "axis of examples, as the task's spec has them"
        )
    sizes = {}
    for (path, array), wanted in zip(
        jax.tree_util.tree_leaves_with_path(inputs), jax.tree.leaves(spec), strict=True
    ):
        name = f"{what} inputs{jax.tree_util.keystr(path)}"
        array = np.asarray(array)
        if array.ndim == 0 or array.shape[1:] != wanted.shape or array.dtype != wanted.dtype:
            expected = ", ".join(map(str, ("N", *wanted.shape)))
            raise DataError(
                f"{name} are {array.dtype} {array.shape}: expected {wanted.dtype} ({expected})"
            )
        sizes[name] = len(array)
    if len(set(sizes.values())) > 1:
        raise DataError(f"{what} has examples {sizes}: expected as many of each")
    count = next(iter(sizes.values()))
    if not count:
        raise DataError(f"{what} has 0 examples: expected at least one")
    _check_indices(what, inputs)
    return jax.tree.map(lambda x: np.ascontiguousarray(x), inputs), count


def _check_indices(what: str, inputs: Any) -> None:
    """Raises DataError where an index is of nothing that there is."""
    for path, own in jax.tree_util.tree_leaves_with_path(inputs, is_leaf=is_indices):
        if not isinstance(own, Indices):
            continue
        values = np.asarray(own.values)
        wrong = np.argwhere((values < 0) | (values >= own.size))
        if len(wrong):
            place = tuple(wrong[0].tolist())
            raise DataError(
                f"{what} inputs{jax.tree_util.keystr(path)} hold {values[place]} at example "
                f"{place[0]} ({len(wrong)} such values): expected 0 to {own.size - 1}"
            )


def batch_of(spec: Any, size: int) -> Any:
    """The shapes and types of `size` examples."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), spec)


def text_of(tree: Any) -> str:
    """The structure, types and shapes of a tree, as a text."""

    def leaf(x: Any) -> Any:
        return _Text(f"{x.dtype} {x.shape}" if hasattr(x, "dtype") else type(x).__name__)

    text = str(jax.tree.map(leaf, tree))
    return text if len(text) < 300 else f"{text[:300]} ..."


class _Text(str):
    """A text that is shown without quotes."""

    __repr__ = str.__str__


def _checked_spec(spec: Any) -> Any:
    leaves = jax.tree.leaves(spec)
    if not leaves or not all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves):
        raise DataError(
            f"spec is {text_of(spec)}: expected jax.ShapeDtypeStruct(shape, dtype) of one example, "
            "or a pytree of them"
        )
    for leaf in leaves:
        kept = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if kept != leaf.dtype:
            raise DataError(f"spec has {leaf.dtype} {leaf.shape}: expected {kept}, as JAX keeps it")
    return jax.tree.map(_bare, spec)


def _bare(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _key_shape() -> Any:
    return cast(Any, jax.eval_shape(lambda: jax.random.key(0)))


__all__ = ["Examples", "Images", "Metric", "Task", "text_of"]
