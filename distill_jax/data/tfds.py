"""Image sets prepared by TensorFlow Datasets, read by random access and without TensorFlow."""

import importlib
import re
from typing import Any

import numpy as np

from distill_jax.data.checks import DataError, Split

# name, name/config, name:1.2.3. No namespaces ("huggingface:..."): those reach for the network.
_NAME = re.compile(r"[A-Za-z]\w*(/[\w.-]+)?(:\d+\.\d+\.\d+)?")


def read_tfds(name: str, data_dir: str) -> tuple[Split, Split, int]:
    """(train, test, classes) of a set that TFDS has already prepared as array_record.

    Test is the "test" split, else "validation". DataError, at once and without any download, when
    TFDS is not installed, does not know `name` or has not prepared it, or when the set is not
    images of one size with one class label.
    """
    if not _NAME.fullmatch(name):
        raise DataError(
            f"TFDS name is {name!r}: expected name, name/config or name:1.2.3, such as tfds:mnist"
        )
    try:
        tfds = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise DataError(f"TFDS cannot be imported ({error}): expected the tfds extra") from error
    builder = _builder(tfds, name, data_dir)
    features = builder.info.features
    image_key, label_key = builder.info.supervised_keys or ("image", "label")
    image, label = (_feature(features, key) for key in (image_key, label_key))
    classes = getattr(label, "num_classes", None)
    shape = getattr(image, "shape", None)
    if shape is None or len(shape) != 3 or None in shape or not classes:
        raise DataError(
            f"TFDS {name} has features {features}: expected images of one fixed (H, W, C) and a "
            "class label"
        )
    splits = builder.info.splits
    test = "validation" if "validation" in splits and "test" not in splits else "test"
    train_split, test_split = (
        _read_split(builder, split, image_key, label_key) for split in ("train", test)
    )
    return train_split, test_split, classes


def _builder(tfds: Any, name: str, data_dir: str) -> Any:
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
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
    try:
        source = builder.as_data_source(split=split)
        examples = [source[index] for index in range(len(source))]
        images = np.stack([example[image_key] for example in examples])
        labels = np.array([example[label_key] for example in examples])
    except Exception as error:  # Readers, decoders and TFDS each raise types of their own.
        raise DataError(
            f"TFDS cannot read split {split!r} of {builder.name} ({type(error).__name__}: {error}):"
            " expected it prepared with file_format=array_record, undamaged"
        ) from error
    return Split(images, labels)
