"""Splits, orders and augmentation, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import data
from distill_jax.data.order import permutation


def numbered(count, classes=5, size=4):
    """Images whose first two pixels spell their own index, so that pairs cannot come apart."""
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(count) // 256, np.arange(count) % 256
    return images, np.random.default_rng(1).permutation(np.arange(count) % classes)


def index_of(split):
    return split.images[:, 0, 0, 0].astype(int) * 256 + split.images[:, 0, 1, 0]


def build(count=500, classes=5, **options):
    return data.from_arrays(
        numbered(count, classes), numbered(40, classes), classes=classes, **options
    )


class TestSplit:
    def test_is_stratified_disjoint_complete_and_keeps_pairs(self):
        images, labels = numbered(503)
        labels[labels == 4] = np.where(np.arange((labels == 4).sum()) < 10, 4, 0)
        got = data.from_arrays((images, labels), numbered(40), classes=5, valid_fraction=0.25)
        train, valid = index_of(got.train), index_of(got.valid)
        np.testing.assert_array_equal(np.sort(np.concatenate([train, valid])), np.arange(503))
        np.testing.assert_array_equal(got.train.labels, labels[train])
        np.testing.assert_array_equal(got.valid.labels, labels[valid])
        want = np.floor(0.25 * np.bincount(labels) + 0.5)
        np.testing.assert_array_equal(np.bincount(got.valid.labels), want)
        assert got.train.images.dtype == np.uint8 and got.train.labels.dtype == np.int32
        assert got.image_shape == (4, 4, 1)

    def test_depends_on_the_seed_alone(self):
        first, again, other = (build(split_seed=seed) for seed in (3, 3, 4))
        np.testing.assert_array_equal(first.valid.images, again.valid.images)
        assert set(index_of(first.valid)) != set(index_of(other.valid))
        assert not np.array_equal(index_of(first.valid)[:5], np.arange(5))

    def test_fraction_zero_and_given_validation(self):
        got = build(valid_fraction=0)
        assert got.valid.images.shape == (0, 4, 4, 1) and len(got.train.labels) == 500
        got = build(valid=numbered(30))
        assert len(got.valid.labels) == 30 and len(got.train.labels) == 500

    def test_never_takes_the_last_image_of_a_class(self):
        got = build(count=10, classes=5, valid_fraction=0.99)
        np.testing.assert_array_equal(np.bincount(got.train.labels), [1] * 5)

    def test_limited_is_exact_and_nested(self):
        full = build()
        few, more = full.limited(7, seed=1), full.limited(20, seed=1)
        np.testing.assert_array_equal(np.bincount(few.train.labels), [7] * 5)
        assert set(index_of(few.train)) < set(index_of(more.train)) < set(index_of(full.train))
        assert set(index_of(few.train)) != set(index_of(full.limited(7, seed=2).train))
        assert few.valid is full.valid and few.mean == full.mean
        assert full.limited(0, seed=1) is full
        with pytest.raises(data.DataError, match="per_class is 91 .* has 90"):
            full.limited(91, seed=1)
        with pytest.raises(data.DataError, match="per_class is -1"):
            full.limited(-1, seed=1)


class TestNormalisation:
    def test_is_measured_on_the_training_split(self):
        images = np.random.default_rng(0).integers(0, 200, (300, 5, 4, 3), np.uint8)
        images[..., 2] = 51
        labels = np.arange(300) % 3
        got = data.from_arrays((images, labels), (images, labels), classes=3)
        pixels = got.train.images / 255
        np.testing.assert_allclose(got.mean, pixels.mean((0, 1, 2)), atol=5.1e-5)
        np.testing.assert_allclose(got.std[:2], pixels.std((0, 1, 2))[:2], atol=5.1e-5)
        assert got.std[2] == 1 / 255 and got.mean[2] == 0.2

    def test_cifar_has_the_published_constants_and_a_choice_wins(self):
        pair = np.zeros((20, 4, 4, 3), np.uint8), np.arange(20) % 2
        got = data.from_arrays(pair, pair, classes=2, name="cifar100")
        assert (got.mean, got.std) == ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
        mean, std = data.NORMALISATION["cifar_teskd"]
        got = data.from_arrays(pair, pair, classes=2, name="cifar100", mean=mean, std=std)
        assert (got.mean, got.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
        assert set(data.NORMALISATION) == {"cifar", "cifar_teskd", "imagenet"}

    @pytest.mark.parametrize(
        "options",
        [{"mean": (0.5,)}, {"mean": (0.5,) * 3, "std": (1,) * 3}, {"mean": (0,), "std": (0,)}],
    )
    def test_refuses(self, options):
        with pytest.raises(data.DataError, match="(mean|std) is .*expected 1 finite values"):
            build(**options)


GOOD, LABELS = np.zeros((20, 4, 4, 3), np.uint8), np.arange(20) % 2


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (GOOD.astype(np.float32), LABELS, r"float32 .*expected uint8.*astype\(np.uint8\)"),
        (np.full(GOOD.shape, np.nan), LABELS, "with NaN"),
        (GOOD.astype(np.int64), LABELS, "images are int64: expected uint8"),
        (GOOD[..., 0], LABELS, r"\(20, 4, 4\): expected \(N, H, W, C\).*\[..., None\]"),
        (np.zeros((20, 3, 32, 32), np.uint8), LABELS, "32 channels: expected .*1 to 4"),
        (GOOD[:, :0], LABELS, "shape .20, 0, 4, 3"),
        (GOOD[:0], LABELS[:0], "has 0 images: expected at least one"),
        (GOOD, LABELS[:-1], "20 images and 19 labels"),
        (GOOD, LABELS - 1, "label -1 at index 0 .*expected 0 to 1"),
        (GOOD, LABELS * 200, "label 200 at index 1 .10 such"),
        (GOOD, LABELS.astype(np.float64), "labels are float64"),
        (GOOD, np.eye(2, dtype=int)[LABELS], r"labels are int64 \(20, 2\)"),
    ],
)
@pytest.mark.parametrize("part", ["train", "test", "valid"])
def test_bad_arrays_are_named(images, labels, message, part):
    pairs = {"train": (GOOD, LABELS), "test": (GOOD, LABELS)} | {part: (images, labels)}
    with pytest.raises(data.DataError, match=f"arrays {part}.*{message}"):
        data.from_arrays(**pairs, classes=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"classes": 1}, "classes is 1: expected an integer of at least 2"),
        ({"classes": 2.0}, "classes is 2.0"),
        ({"valid_fraction": 1}, "valid_fraction is 1: expected 0 <="),
        ({"valid_fraction": -0.1}, "valid_fraction is -0.1"),
        ({"valid_fraction": float("nan")}, "valid_fraction is nan"),
        ({"valid_fraction": "0.1"}, "valid_fraction is '0.1'"),
        ({"valid_fraction": 0.01}, "leaves validation empty"),
        ({"split_seed": -1}, "split_seed is -1"),
        ({"split_seed": 0.5}, "split_seed is 0.5"),
        ({"train": GOOD}, "train is a ndarray: expected .images, labels"),
        ({"test": (GOOD[:, :2], LABELS)}, r"image shapes .*expected one shape"),
    ],
)
def test_bad_options_are_named(options, message):
    options = {"train": (GOOD, LABELS), "test": (GOOD, LABELS), "classes": 2} | options
    with pytest.raises(data.DataError, match=message):
        data.from_arrays(**options)


class TestOrder:
    def test_permutation_outlives_versions(self):
        """Published splits and resumed runs rest on these numbers."""
        assert permutation(8, 0, 1, 2).tolist() == [6, 7, 2, 3, 0, 5, 1, 4]
        assert permutation(8, 20, 1, 2).tolist() == [4, 7, 3, 6, 5, 1, 0, 2]

    @pytest.mark.parametrize("n, batch_size", [(10, 3), (12, 3), (5, 5), (7, 1)])
    def test_epoch_sees_each_example_once(self, n, batch_size):
        batches, rest = data.epoch_order(n, batch_size, seed=1, epoch=2, last_batch="keep")
        assert batches.shape == (n // batch_size, batch_size) and rest.shape == (n % batch_size,)
        assert batches.dtype == rest.dtype == np.int32
        seen = np.concatenate([batches.ravel(), rest])
        np.testing.assert_array_equal(np.sort(seen), np.arange(n))
        dropped, none = data.epoch_order(n, batch_size, seed=1, epoch=2)
        np.testing.assert_array_equal(dropped, batches)
        assert none.shape == (0,)

    def test_epoch_and_seed_each_change_it(self):
        orders = {
            data.epoch_order(100, 10, seed=seed, epoch=epoch)[0].tobytes()
            for seed in range(3)
            for epoch in range(3)
            for _ in range(2)
        }
        assert len(orders) == 9

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"batch_size": 11}, "batch_size is 11 but there are 10 .*at most 10"),
            ({"batch_size": 0}, "batch_size is 0: expected"),
            ({"n": 0}, "n is 0"),
            ({"epoch": -1}, "epoch is -1"),
            ({"seed": 1.5}, "seed is 1.5"),
            ({"seed": True}, "seed is True"),
            ({"last_batch": "pad"}, "last_batch is 'pad': expected 'drop' or 'keep'"),
        ],
    )
    def test_refuses(self, change, message):
        with pytest.raises(data.DataError, match=message):
            data.epoch_order(**({"n": 10, "batch_size": 2, "seed": 0, "epoch": 0} | change))


def crops(image, padding):
    """Every result a crop and flip may have: (top, left, flipped) -> image, by a NumPy loop."""
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, image.shape[2]), np.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + height, left : left + width]
            found[crop.tobytes()] = (top, left, False)
            found[crop[:, ::-1].tobytes()] = (top, left, True)
    return found


class TestAugment:
    images = np.random.default_rng(0).integers(1, 256, (256, 6, 5, 3), np.uint8)

    @property
    def keys(self):
        """The same keys, made anew: a key object is for one use."""
        return jax.random.split(jax.random.key(0), 256)

    def test_normalise_matches_numpy(self):
        mean, std = (0.5, 0.25, 0.1), (0.2, 0.3, 1.0)
        with jax.numpy_rank_promotion("raise"):
            got = jax.jit(lambda images: data.normalise(images, mean, std))(self.images)
        assert got.dtype == jnp.float32
        want = (self.images.astype(np.float64) / 255 - mean) / std
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        with pytest.raises(data.DataError, match=r"mean has shape \(1,\): expected \(3,\)"):
            data.normalise(jnp.asarray(self.images), (0.5,), std)

    def test_crop_flip_is_a_crop_or_its_mirror(self):
        got = np.asarray(jax.jit(lambda k, x: data.crop_flip(k, x, padding=2))(*self.both()))
        assert got.dtype == np.uint8
        where = [
            crops(image, 2)[result.tobytes()]
            for image, result in zip(self.images, got, strict=True)
        ]
        tops, lefts, flips = np.array(where).T
        for places in (tops, lefts):
            # 256 uniform draws over 5 places: 51 each, standard deviation 6.
            assert np.bincount(places, minlength=5).min() > 25
        assert 90 < flips.sum() < 166
        assert len({(top, left) for top, left, _ in where}) == 25

    def test_no_flip_and_no_padding(self):
        got = np.asarray(data.crop_flip(*self.both(), padding=1, flip=False))
        places = [
            crops(image, 1)[result.tobytes()]
            for image, result in zip(self.images, got, strict=True)
        ]
        assert not any(flipped for _, _, flipped in places)
        got = np.asarray(data.crop_flip(*self.both(), padding=0))
        mirrored = (got != self.images).any((1, 2, 3))
        np.testing.assert_array_equal(got[mirrored], self.images[mirrored][:, :, ::-1])
        assert 90 < mirrored.sum() < 166

    def test_an_example_depends_on_its_own_key_alone(self):
        whole = data.crop_flip(*self.both())
        for part in (slice(0, 3), slice(100, 228), slice(255, 256)):
            alone = data.crop_flip(self.keys[part], jnp.asarray(self.images[part]))
            np.testing.assert_array_equal(alone, whole[part])
        other = jax.random.split(jax.random.key(1), 256)
        assert (np.asarray(data.crop_flip(other, self.both()[1])) != whole).any()

    def test_uses_a_key_once(self):
        with jax.debug_key_reuse(True):
            key = jax.random.key(5)
            keys = jax.random.split(key, 256)
            jax.block_until_ready(jax.jit(data.crop_flip)(keys, self.both()[1]))

    def test_table(self):
        assert set(data.AUGMENT) == {"none", "crop_flip", "flip", "inception_crop"}
        np.testing.assert_array_equal(data.AUGMENT["none"](*self.both()), self.images)
        same = data.AUGMENT["crop_flip"](*self.both()) == data.crop_flip(*self.both(), padding=4)
        assert same.all()

    def test_refuses(self):
        with pytest.raises(data.DataError, match="padding is -1"):
            data.crop_flip(*self.both(), padding=-1)
        with pytest.raises(data.DataError, match=r"keys have shape \(3,\): expected \(256,\)"):
            data.crop_flip(self.keys[:3], self.both()[1])

    def both(self):
        return self.keys, jnp.asarray(self.images)


class TestPartners:
    LABELS = np.random.default_rng(0).integers(0, 3, 40)

    def test_partners_outlive_versions(self):
        """Resumed runs rest on these numbers."""
        assert data.partners(np.arange(8) % 2, seed=0, epoch=1).tolist() == [4, 5, 0, 7, 2, 3, 4, 1]

    def test_each_is_of_the_same_class_and_each_of_that_as_often(self):
        tables = np.stack(
            [data.partners(self.LABELS, seed=1, epoch=epoch) for epoch in range(3000)]
        )
        assert tables.dtype == np.int32 and tables.shape == (3000, 40)
        assert (self.LABELS[tables] == self.LABELS).all()
        for example, label in enumerate(self.LABELS[:4]):
            counts = np.bincount(tables[:, example], minlength=40)[label == self.LABELS]
            expected = 3000 / len(counts)  # itself among them
            assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)

    def test_examples_seeds_and_epochs_have_partners_of_their_own(self):
        tables = [data.partners(self.LABELS, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
        assert len({table.tobytes() for table in tables}) == 4
        again = data.partners(self.LABELS, seed=0, epoch=0)
        np.testing.assert_array_equal(again, tables[0])
        # What is behind an example changes nothing for it but who there is of its class.
        more = data.partners(np.append(self.LABELS, 3), seed=0, epoch=0)
        np.testing.assert_array_equal(more[:-1], again)
        assert more[-1] == len(self.LABELS)

    @pytest.mark.parametrize("change", [{"seed": -1}, {"epoch": 0.5}])
    def test_refuses(self, change):
        with pytest.raises(data.DataError, match="seed is -1|epoch is 0.5"):
            data.partners(self.LABELS, **({"seed": 0, "epoch": 0} | change))


def bilinear(image, top, left, height, width):
    """A part of an image resized to its size: a triangle of weights around each place, in NumPy."""

    def weights(length, start, part):
        scale = part / length
        centres = start + (np.arange(length) + 0.5) * scale - 0.5
        reach = max(scale, 1.0)  # antialiased where it shrinks
        given = np.maximum(0, 1 - np.abs(np.arange(length)[None] - centres[:, None]) / reach)
        return given / given.sum(1, keepdims=True)

    rows, columns = weights(image.shape[0], top, height), weights(image.shape[1], left, width)
    return np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float64), columns)


class TestInceptionCrop:
    IMAGES = np.random.default_rng(0).integers(0, 256, (12, 9, 7, 3), np.uint8)
    KEYS = jax.random.split(jax.random.key(3), 12)

    def test_it_is_a_part_resized_and_mirrored_half_of_the_time(self):
        ours, flipped = np.asarray(data.inception_crop(self.KEYS, self.IMAGES)), []
        assert ours.shape == self.IMAGES.shape and ours.dtype == np.float32
        for key, image, crop in zip(self.KEYS, self.IMAGES, ours, strict=True):
            size, ratio, place, flip = jax.random.split(key, 4)
            area = 63 * np.asarray(jax.random.uniform(size, (10,), minval=0.08, maxval=1.0))
            log = np.asarray(jax.random.uniform(ratio, (10,), minval=-1.0, maxval=1.0))
            aspect = np.exp(log * np.log(4 / 3))
            heights, widths = np.sqrt(area / aspect), np.sqrt(area * aspect)
            fits = [i for i in range(10) if heights[i] <= 9 and widths[i] <= 7]
            height, width = min(heights[fits[0]], 9), min(widths[fits[0]], 7)
            top, left = np.asarray(jax.random.uniform(place, (2,))) * (9 - height, 7 - width)
            expected = bilinear(image, top, left, height, width)
            flipped.append(bool(jax.random.bernoulli(flip)))
            expected = expected[:, ::-1] if flipped[-1] else expected
            np.testing.assert_allclose(crop, expected, atol=0.02)
        assert len(set(flipped)) == 2

    def test_an_example_depends_on_its_own_key_alone(self):
        whole, rows = np.asarray(data.inception_crop(self.KEYS, self.IMAGES)), np.array([7, 2])
        some = np.asarray(data.inception_crop(self.KEYS[rows], self.IMAGES[rows]))
        np.testing.assert_allclose(some, whole[rows], atol=1e-3)
