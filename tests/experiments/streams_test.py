"""The made-up set of ImageNet's shape, and what is measured on it."""

import io

import numpy as np
import pytest
from PIL import Image

from distill_jax import data
from experiments import streams


def test_pictures_are_the_same_each_time_and_of_many_sizes():
    files = [streams.jpeg(i) for i in range(6)]
    assert files[3] == streams.jpeg(3)
    opened = [Image.open(io.BytesIO(file)) for file in files]
    assert len({image.size for image in opened}) > 2 and {image.mode for image in opened} == {"RGB"}


def test_the_set_is_read_as_imagenet_is(tmp_path):
    streams.make(str(tmp_path), 5, 2)
    dataset = data.load("tfds:imagenet2012", data_dir=str(tmp_path), valid_fraction=0.0)
    assert dataset.classes == 1000 and len(dataset.test.labels) == 2
    assert dataset.train.images.name == "tfds:imagenet2012/5.1.0[train]"
    numbers = {streams.jpeg(i): i for i in range(5)}
    found = {numbers[dataset.train.images.source[i]]: dataset.train.labels[i] for i in range(5)}
    assert found == {i: i for i in range(5)}
    assert np.asarray(dataset.test.images).shape == (2, 224, 224, 3)


def test_rates_count_what_is_read():
    small = np.zeros((20, 20, 3), np.uint8)
    images = data.Streamed([small] * 320, "small", np.arange(320), side=8, margin=2)
    found = streams.rate(images, 0, 2 * streams.BATCH)
    assert found["images_per_second"] > 0 and found["cores"] == pytest.approx(
        found["images_per_second"] / found["images_per_core_second"]
    )
