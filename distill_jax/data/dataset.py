"""A data set with its splits and its normalisation."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.data import pictures
from distill_jax.data import task as task_lib
from distill_jax.data.checks import DataError, Split, check_labels, check_split, integer, take
from distill_jax.data.order import permutation
from distill_jax.data.streamed import Streamed
from distill_jax.data.task import Examples, Images, Metric, Task
from distill_jax.refusals import refuses

# Per-channel (mean, std) in units of pixel/255. "cifar": what the published TAKD and DGKD code
# uses for CIFAR-10 and CIFAR-100 alike. "cifar_teskd": the published TESKD code.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "cifar_teskd": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# One number a purpose, so that the same seed gives unrelated choices for different purposes.
_VALID_STREAM, _LIMIT_STREAM = 1, 2


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Train, validation and test examples, and what is needed to use them.

    Args:
      mean: per channel, in units of pixel/255; empty where there is a `task`.
      std: likewise.
      metrics: measured on every split besides accuracy and cross-entropy, see `Task`.
      value_range: (low, high) of float images, None of uint8 ones.
      task: of what are no images, what they are.
      places: {"train", "valid"}: where the examples stand in the training examples that were
        given, of which some were held out or left out; empty where these are all of them.
    """

    name: str
    classes: int
    train: Split
    valid: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    value_range: tuple[float, float] | None = None
    task: Task | None = None
    places: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        counts = (f"{len(getattr(self, x).labels)} {x}" for x in ("train", "valid", "test"))
        kind = task_lib.text_of(self.spec)
        return f"Dataset({self.name}: {kind}, {self.classes} classes; {', '.join(counts)})"

    @property
    def preprocessing(self) -> Examples | Images:
        """What is made of a batch before networks see it; hashable."""
        if self.task is not None:
            return Examples(self.task.preprocess)
        return Images(self.mean, self.std, self.value_range)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(mean, std) of images; None of another task's examples."""
        return None if self.task is not None else (self.mean, self.std)

    @property
    def select_by(self) -> str:
        """What chooses the weights, on the split that is watched."""
        return "accuracy" if self.task is None else self.task.select_by

    @property
    def spec(self) -> Any:
        """The shapes and types of one example's inputs, as they are held."""
        if self.task is not None:
            return self.task.spec
        return jax.ShapeDtypeStruct(self.image_shape, self.train.images.dtype)

    @functools.cached_property
    def inputs(self) -> Any:
        """The shapes and types of a batch of one, as networks see it."""
        seen = jax.eval_shape(self.preprocessing.evaluate, task_lib.batch_of(self.spec, 1))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), seen)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    def limited(self, per_class: int, seed: int) -> "Dataset":
        """The same set with exactly `per_class` training images of each class (0: all of them).

        The choice is a pure function of `seed` and the training labels; a smaller `per_class` is
        a subset of a larger one. Validation, test, mean and std stay: teachers that saw all of the
        data and students that see some of it must agree on the input's scale.
        DataError if a class has fewer images than asked.
        """
        if not integer("per_class", per_class, 0):
            return self
        sizes = np.bincount(self.train.labels, minlength=self.classes)
        if sizes.min() < per_class:
            raise DataError(
                f"per_class is {per_class} but class {sizes.argmin()} has {sizes.min()} training "
                f"images: expected at most {sizes.min()}"
            )
        wanted = np.full(self.classes, per_class)
        chosen = choose_per_class(self.train.labels, wanted, seed=seed, stream=_LIMIT_STREAM)
        places = {**self.places, "train": self.places.get("train", np.arange(sizes.sum()))[chosen]}
        return dataclasses.replace(self, train=_take(self.train, chosen), places=places)


@refuses(DataError)
def from_arrays(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    classes: int | None = None,
    name: str = "arrays",
    valid: tuple[Any, Any] | None = None,
    valid_fraction: float = 0.1,
    split_seed: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    value_range: tuple[float, float] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    task: Task | None = None,
) -> Dataset:
    """A `Dataset` from (images, labels): uint8 (N, H, W, C), integers (N,) in [0, classes).

    In place of a pair there may be a dict of columns, a list of dicts (rows), or a set of the
    datasets library: images in the one column called image, images, img or data (an array, arrays,
    lists of 0 to 255, or pictures of one size), labels in the one called label, labels, fine_label,
    fine_labels, target or targets.

    With a `task`, from (inputs, labels): any pytree of arrays as the task's spec has them, with a
    leading axis of examples. It says `classes` and `metrics` too, and takes no mean and std.

    `valid`, where given, is the validation split and `valid_fraction` is not used. Otherwise
    round(valid_fraction * n) of the n training images of each class (never all of them) move
    there; 0 leaves the validation split empty. Images may be floats where their `value_range`,
    (low, high), is told: it becomes [0, 1]. `mean` and `std` are of values in [0, 1]; they default
    to `NORMALISATION["cifar"]` for CIFAR, to `NORMALISATION["imagenet"]` for streamed images of 3
    channels, and to the training split's own, to 4 decimals, for anything else. `metrics` are
    those of `Task`.
    DataError names whatever is not as described here.
    """
    if task is not None:
        _refuse_beside(
            task, classes=classes, metrics=metrics, mean=mean, std=std, range=value_range
        )
        classes, metrics = task.classes, task.metrics
    classes = integer("classes", classes, 2)
    value_range = _checked_range(value_range)
    _check_fraction(valid_fraction)
    parts = {"train": train, "test": test} | ({} if valid is None else {"valid": valid})
    splits = {
        part: _split(f"{name} {part}", pair, classes, value_range, task)
        for part, pair in parts.items()
    }
    if task is None:
        shapes = {part: split.images.shape[1:] for part, split in splits.items()}
        if len(set(shapes.values())) > 1:
            raise DataError(f"{name} has image shapes {shapes}: expected one shape for all splits")
        train_images = splits["train"].images
        spec = jax.ShapeDtypeStruct(train_images.shape[1:], train_images.dtype)
        task_lib.check_metrics(metrics or {}, classes, spec)
    places: dict[str, np.ndarray] = {}
    if valid is None:
        seed = integer("split_seed", split_seed, 0)
        pool = splits["train"]
        kept, held = hold_out(pool.labels, classes, valid_fraction, seed)
        splits["valid"] = _take(pool, held)
        if len(held):
            splits["train"], places = _take(pool, kept), {"train": kept, "valid": held}
    average: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    if task is None:
        images = splits["train"].images
        average, deviation = _normalisation(name, images, mean, std, value_range)
    return Dataset(
        name=name,
        classes=classes,
        mean=average,
        std=deviation,
        metrics=metrics or {},
        value_range=value_range,
        task=task,
        places=places,
        **splits,
    )


def check(dataset: Any) -> None:
    """Raises DataError where a data set is not as `from_arrays` makes them, however it was made."""
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"dataset is a {type(dataset).__name__}: expected one of distill_jax.data.from_arrays "
            "or distill_jax.data.load"
        )
    classes, task = integer("classes", dataset.classes, 2), dataset.task
    _checked_range(dataset.value_range)
    for part in ("train", "valid", "test"):
        split = getattr(dataset, part)
        if part != "valid" or len(split[1]):  # there may be no validation split
            what = f"{dataset.name} {part}"
            _split(what, tuple(split), classes, dataset.value_range, task)
            if task is None:
                _check_shape(dataset, part)
    task_lib.check_metrics(dataset.metrics, classes, dataset.spec)
    if task is None:
        _given(dataset.train.images.shape[3], dataset.mean, dataset.std)
    elif task.classes != classes:
        raise DataError(f"{dataset.name} has {classes} classes, its task {task.classes}")


def _refuse_beside(task: Any, **others: Any) -> None:
    if not isinstance(task, Task):
        raise DataError(f"task is a {type(task).__name__}: expected a distill_jax.data.Task")
    given = [name for name, value in others.items() if value not in (None, ())]
    if given:
        raise DataError(
            f"{', '.join(given)} given beside a task: expected the task's classes and metrics, and "
            "its preprocessing in place of mean, std and range"
        )


def _checked_range(value_range: Any) -> tuple[float, float] | None:
    if value_range is None:
        return None
    pair = isinstance(value_range, tuple | list) and len(value_range) == 2
    if not pair or not all(isinstance(x, numbers.Real) for x in value_range):
        raise DataError(f"value_range is {value_range!r}: expected two numbers, (low, high)")
    low, high = map(float, value_range)
    if not -math.inf < low < high < math.inf:
        raise DataError(f"value_range is {value_range!r}: expected low < high, both finite")
    return low, high


def _check_shape(dataset: Dataset, part: str) -> None:
    shape = getattr(dataset, part).images.shape[1:]
    if shape != dataset.image_shape:
        raise DataError(
            f"{dataset.name} {part} has images of shape {shape}: expected {dataset.image_shape}, "
            "as train has"
        )


def choose_per_class(
    labels: np.ndarray, wanted: np.ndarray, *, seed: int, stream: int
) -> np.ndarray:
    """Ascending indices of `wanted[c]` random examples of each class c (all, if it has fewer)."""
    shuffled = permutation(len(labels), integer("seed", seed, 0), stream)
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels, minlength=len(wanted))
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(grouped[rank_in_class < np.repeat(wanted, sizes)])


def _split(
    what: str,
    pair: Any,
    classes: int,
    value_range: tuple[float, float] | None,
    task: Task | None,
) -> Split:
    if task is None and pictures.is_table(pair):
        pair = pictures.pair_of(what, pair)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        kind = "images" if task is None else "inputs"
        raise DataError(f"{what} is a {type(pair).__name__}: expected ({kind}, labels)")
    images, labels = pair
    if task is not None:
        inputs, count = task_lib.check_inputs(what, images, task.spec)
        return Split(inputs, check_labels(what, labels, count, classes, "examples"))
    if pictures.are_pictures(images):
        images = pictures.images_of(what, images)
    if not isinstance(images, Streamed):
        return check_split(what, images, labels, classes, value_range)
    undecoded = np.zeros((len(images), 1, 1, images.channels), np.uint8)
    return Split(images, check_split(what, undecoded, labels, classes).labels)


def _take(split: Split, index: Any) -> Split:
    return Split(take(split.images, index), split.labels[index])


def _check_fraction(valid_fraction: Any) -> None:
    if not isinstance(valid_fraction, numbers.Real) or not 0 <= float(valid_fraction) < 1:
        raise DataError(f"valid_fraction is {valid_fraction!r}: expected 0 <= valid_fraction < 1")


def hold_out(
    labels: np.ndarray, classes: int, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The places of (train, valid): a stratified, disjoint and complete split of the pool."""
    _check_fraction(fraction)
    everything = np.arange(len(labels))
    if not fraction:
        return everything, everything[:0]
    sizes = np.bincount(labels, minlength=classes)
    wanted = np.minimum(np.floor(fraction * sizes + 0.5), np.maximum(sizes - 1, 0)).astype(int)
    if not wanted.sum():
        raise DataError(
            f"valid_fraction is {fraction!r} of at most {sizes.max()} images a class, which leaves "
            "validation empty: expected a larger fraction, or 0 for no validation split"
        )
    held_out = choose_per_class(labels, wanted, seed=seed, stream=_VALID_STREAM)
    return np.setdiff1d(everything, held_out, assume_unique=True), held_out


def _normalisation(
    name: str,
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    value_range: tuple[float, float] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = images.shape[3]
    if not len(mean) and not len(std):
        published = name.removeprefix("tfds:").split("/")[0].split(":")[0]
        if published in ("cifar10", "cifar100") and channels == 3:
            return NORMALISATION["cifar"]
        if isinstance(images, Streamed):
            # One channel: the mean over the three.
            average, deviation = NORMALISATION["imagenet"]
            return (average, deviation) if channels == 3 else ((0.449,), (0.226,))
        return _measured(images) if value_range is None else _measured_floats(images, value_range)
    return _given(channels, mean, std)


def _given(
    channels: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    for what, values, low in (("mean", mean, -math.inf), ("std", std, 0.0)):
        numeric = all(isinstance(value, numbers.Real) for value in values)
        if len(values) != channels or not (numeric and all(low < v < math.inf for v in values)):
            raise DataError(
                f"{what} is {tuple(values)}: expected {channels} finite values"
                f"{' above 0' if what == 'std' else ''}, one a channel, in units of pixel/255 "
                "(give both mean and std, or neither)"
            )
        if max(values) > 1:
            raise DataError(
                f"{what} is {tuple(values)}: expected at most 1, in units of pixel/255; for values "
                f"of 0 to 255 give {tuple(round(float(value) / 255, 4) for value in values)}"
            )
    return tuple(map(float, mean)), tuple(map(float, std))


def _measured(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and std of pixel/255 to 4 decimals; std at least 1/255."""
    levels = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[3]):
        # Counting the 256 levels, a chunk at a time, is exact and needs no float copy of the set.
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), 4096):
            chunk = images[start : start + 4096, ..., channel]
            counts += np.bincount(chunk.ravel(), minlength=256)
        share = counts / counts.sum()
        average = float(share @ levels)
        means.append(round(average, 4))
        stds.append(max(round(math.sqrt(share @ (levels - average) ** 2), 4), 1 / 255))
    return tuple(means), tuple(stds)


def _measured_floats(
    images: np.ndarray, value_range: tuple[float, float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """As `_measured`, of float images scaled from their range to [0, 1]."""
    low, high = value_range
    channels = [images[..., c] for c in range(images.shape[3])]
    means = [(float(np.mean(x, dtype=np.float64)) - low) / (high - low) for x in channels]
    stds = [float(np.std(x, dtype=np.float64)) / (high - low) for x in channels]
    return tuple(round(x, 4) for x in means), tuple(max(round(x, 4), 1 / 255) for x in stds)
