"""Image sets prepared by TensorFlow Datasets, read by random access and without TensorFlow."""

import contextlib
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distill_jax.data.checks import DataError, Split
from distill_jax.data.streamed import Streamed, read_labels

# name, name/config, name:1.2.3. No namespaces ("huggingface:..."): those reach for the network.
_NAME = re.compile(r"[A-Za-z]\w*(/[\w.-]+)?(:\d+\.\d+\.\d+)?")


def read_tfds(name: str, data_dir: str) -> tuple[Any, Any, int]:
    """(train, test, classes) of a set that TFDS has already prepared as array_record.

    Test is the "test" split, or "validation" where that is missing or, as ImageNet's, unlabelled.
    Images of different sizes are `Streamed`, and only their labels are read. DataError, at once and
    without any download, when TFDS is not installed, does not know `name` or has not prepared it,
    or when the set is not images with one class label.
    """
    if not _NAME.fullmatch(name):
        raise DataError(
            f"TFDS name is {name!r}: expected name, name/config or name:1.2.3, such as tfds:mnist"
        )
    try:
        tfds = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise DataError(
            f"TFDS cannot be imported ({error}): expected the package tensorflow-datasets"
        ) from error
    builder = _builder(tfds, name, data_dir)
    features = builder.info.features
    image_key, label_key = builder.info.supervised_keys or ("image", "label")
    image, label = (_feature(features, key) for key in (image_key, label_key))
    classes = getattr(label, "num_classes", None)
    shape = getattr(image, "shape", None)
    streamed = shape is not None and None in shape and shape[2:] in ((1,), (3,))
    if shape is None or len(shape) != 3 or (None in shape and not streamed) or not classes:
        raise DataError(
            f"TFDS {name} has features {features}: expected images, of one fixed (H, W, C) or of "
            "1 or 3 channels, and a class label"
        )
    if (dtype := np.dtype(getattr(image, "np_dtype", np.uint8))) != np.uint8:
        raise DataError(f"TFDS {name} has images of {dtype}: expected uint8, 8 bits a channel")
    if not streamed:
        splits = builder.info.splits
        test = "validation" if "validation" in splits and "test" not in splits else "test"
        pair = (_read_split(builder, split, image_key, label_key) for split in ("train", test))
        return (*pair, classes)
    undecoded = {image_key: tfds.decode.SkipDecoding()}
    return (*_open_splits(builder, image_key, label_key, undecoded), classes)


def _builder(tfds: Any, name: str, data_dir: str) -> Any:
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
    except Exception as error:  # TFDS raises many types here, its own and others.
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"TFDS cannot describe {name!r} ({reason}): expected a known name, or a data_dir "
            "that holds it prepared"
        ) from error
    if not builder.is_prepared():
        raise DataError(
            f"TFDS has not prepared {name}: expected it in {builder.data_path}; where TensorFlow "
            f"and a network are at hand: tfds build {name} --file_format=array_record"
            + (f" --data_dir={data_dir}" if data_dir else "")
        )
    return builder


def _feature(features: Any, key: str) -> Any:
    try:
        return features[key]
    except (KeyError, TypeError):
        return None


def _read_split(builder: Any, split: str, image_key: str, label_key: str) -> Split:
    with _reading(builder, split):
        source = builder.as_data_source(split=split)
        examples = [source[index] for index in range(len(source))]
        images = np.stack([example[image_key] for example in examples])
        labels = np.array([example[label_key] for example in examples])
    return Split(images, labels)


class _Field(Sequence):
    """One field of the examples of a data source."""

    def __init__(self, source: Any, key: str) -> None:
        self.source, self.key = source, key

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        return self.source[index][self.key]


def _open_splits(
    builder: Any, image_key: str, label_key: str, undecoded: dict[str, Any]
) -> Iterator[tuple[Streamed, np.ndarray]]:
    """Train and test, their labels read and their images not; `undecoded` leaves these bytes."""
    channels = builder.info.features[image_key].shape[2]
    splits = builder.info.splits
    test = "validation" if "validation" in splits and "test" not in splits else "test"
    if test == "test" and "validation" in splits:
        with _reading(builder, test):
            first = builder.as_data_source(split=test, decoders=undecoded)[0]
        test = "validation" if first[label_key] < 0 else test
    for split in ("train", test):
        with _reading(builder, split):
            source = builder.as_data_source(split=split, decoders=undecoded)
            labels = read_labels(_Field(source, label_key))
        name = f"tfds:{builder.info.full_name}[{split}]"
        yield Streamed(_Field(source, image_key), name, np.arange(len(labels)), channels), labels


@contextlib.contextmanager
def _reading(builder: Any, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Readers, decoders and TFDS each raise types of their own.
        raise DataError(
            f"TFDS cannot read split {split!r} of {builder.name} ({type(error).__name__}: {error}):"
            " expected it prepared with file_format=array_record, undamaged"
        ) from error
