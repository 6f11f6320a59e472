"""Readers against small files of the published layouts, whole, damaged and untrusted."""

import gzip
import importlib
import io
import os
import pathlib
import pickle
import sys
import tarfile
import types

import numpy as np
import pytest

from distill_jax import data
from distill_jax.data import sources
from distill_jax.runs import ids

CIFAR10 = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


def cifar_records(count, label_bytes, classes, seed=0):
    """(images, labels, bytes): `count` records in the binary layout, put together in a loop."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.permutation(np.arange(count) % classes)
    raw = bytearray()
    for image, label in zip(images, labels, strict=True):
        raw += bytes([77] * (label_bytes - 1) + [label])
        for channel in range(3):
            raw += image[:, :, channel].tobytes()
    return images, labels, bytes(raw)


def cifar10_files():
    """(images, labels, {name: bytes}) of the five training batches and the test batch."""
    parts = [cifar_records(20, 1, 10, seed) for seed in range(6)]
    contents = {f"{name}.bin": part[2] for name, part in zip(CIFAR10, parts, strict=True)}
    return [part[0] for part in parts], [part[1] for part in parts], contents


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in contents.items():
        (folder / name).write_bytes(raw)


def write_tar(path, contents, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, raw in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


def same(got, images, labels):
    np.testing.assert_array_equal(got.train.images, np.concatenate(images[:-1]))
    np.testing.assert_array_equal(got.train.labels, np.concatenate(labels[:-1]))
    np.testing.assert_array_equal(got.test.images, images[-1])
    np.testing.assert_array_equal(got.test.labels, labels[-1])


def load(name, folder, **options):
    return data.load(name, data_dir=str(folder), valid_fraction=0, **options)


class TestDigits:
    def test_is_fixed_and_whole(self):
        datasets = importlib.import_module("sklearn.datasets")
        got = data.load("digits", valid_fraction=0)
        assert got.image_shape == (8, 8, 1) and got.classes == 10
        assert (len(got.train.labels), len(got.test.labels)) == (1297, 500)
        np.testing.assert_array_equal(np.bincount(got.test.labels), [50] * 10)
        pixels, labels = datasets.load_digits(return_X_y=True)
        want = sorted(
            (row.tobytes(), label)
            for row, label in zip(np.round(pixels * 255 / 16).astype(np.uint8), labels, strict=True)
        )
        both = [*zip(*got.train, strict=True), *zip(*got.test, strict=True)]
        assert sorted((image.tobytes(), label) for image, label in both) == want
        # Every published number on digits rests on this split.
        assert ids.digest_of(got).startswith("f9d07bf5")


class TestSynthetic:
    def test_sizes_and_repeatability(self):
        got = data.load("synthetic:8x6x1:4:100:50")
        assert got.image_shape == (8, 6, 1) and got.classes == 4
        assert len(got.train.labels) + len(got.valid.labels) == 100 and len(got.test.labels) == 50
        assert ids.digest_of(got) == ids.digest_of(data.load("synthetic:8x6x1:4:100:50"))
        got = data.load("synthetic", valid_fraction=0)
        assert got.train.images.shape == (256, 32, 32, 3) and len(got.test.labels) == 128
        assert np.bincount(got.train.labels).tolist() == [26] * 6 + [25] * 4

    @pytest.mark.parametrize("detail, least", [("8x8x1:10:200:100", 0.5), ("32x32x3:10", 0.95)])
    def test_can_be_learned(self, detail, least):
        """The nearest class mean is right far more often than one guess in ten."""
        got = data.load(f"synthetic:{detail}", valid_fraction=0)
        train, test = (
            split.images.reshape(len(split.images), -1) / 255 for split in (got.train, got.test)
        )
        means = np.stack([train[got.train.labels == label].mean(0) for label in range(10)])
        guess = ((test[:, None] - means) ** 2).sum(-1).argmin(1)
        assert (guess == got.test.labels).mean() > least

    @pytest.mark.parametrize(
        "detail", ["8x8", "8x8x1", "8x8x1:1", "8x8x0:10", "8x8x1:10:-5", "8x8x1:3:4:5:6", "axbxc:3"]
    )
    def test_refuses(self, detail):
        with pytest.raises(data.DataError, match="synthetic data is .*expected synthetic"):
            data.load(f"synthetic:{detail}")


class TestFashion:
    @staticmethod
    def contents(count=30, shape=(28, 28)):
        rng = np.random.default_rng(0)
        arrays, contents = [], {}
        for part, size in (("train", count), ("t10k", 10)):
            images = rng.integers(0, 256, (size, *shape), np.uint8)
            labels = (np.arange(size) % 10).astype(np.uint8)
            head = b"".join(number.to_bytes(4, "big") for number in (2051, size, *shape))
            contents[f"{part}-images-idx3-ubyte"] = head + images.tobytes()
            head = b"".join(number.to_bytes(4, "big") for number in (2049, size))
            contents[f"{part}-labels-idx1-ubyte"] = head + labels.tobytes()
            arrays.append((images, labels))
        return arrays, contents

    @pytest.mark.parametrize("subfolder", ["", "fashion-mnist", "FashionMNIST/raw"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_reads(self, tmp_path, packed, subfolder):
        arrays, contents = self.contents()
        if packed:
            contents = {f"{name}.gz": gzip.compress(raw) for name, raw in contents.items()}
        write(tmp_path / subfolder, contents)
        got = load("fashion_mnist", tmp_path)
        for split, (images, labels) in zip((got.train, got.test), arrays, strict=True):
            np.testing.assert_array_equal(split.images, images[..., None])
            np.testing.assert_array_equal(split.labels, labels)

    def test_reads_from_the_environment(self, tmp_path, monkeypatch):
        write(tmp_path, self.contents()[1])
        monkeypatch.setenv("DISTILL_JAX_DATA", str(tmp_path))
        assert len(data.load("fashion_mnist", valid_fraction=0).train.labels) == 30

    @pytest.mark.parametrize(
        "name, change, message",
        [
            ("train-images-idx3-ubyte", lambda raw: b"\0\0\x08\x01" + raw[4:], "magic '00000803'"),
            ("t10k-labels-idx1-ubyte", lambda raw: b"\0\0\x0d\x01" + raw[4:], "magic '00000801'"),
            ("train-labels-idx1-ubyte", lambda raw: raw[:-1], "37 bytes: expected 38"),
            ("train-images-idx3-ubyte", lambda raw: raw + b"\0", "expected 23536"),
            ("train-images-idx3-ubyte", lambda raw: raw[:9], "holds 9 bytes"),
            ("train-images-idx3-ubyte", lambda raw: b"", "magic '00000803'"),
            ("t10k-labels-idx1-ubyte", lambda raw: raw[:-1] + b"\x0a", "label 10 at index 9"),
        ],
    )
    def test_refuses_damage(self, tmp_path, name, change, message):
        _, contents = self.contents()
        write(tmp_path, contents | {name: change(contents[name])})
        with pytest.raises(data.DataError, match=message):
            load("fashion_mnist", tmp_path)

    def test_refuses_other_shapes_and_missing_parts(self, tmp_path):
        write(tmp_path / "a", self.contents(shape=(28, 27))[1])
        with pytest.raises(data.DataError, match=r"expected \(N, 28, 28\)"):
            load("fashion_mnist", tmp_path / "a")
        write(tmp_path / "b", self.contents()[1])
        (tmp_path / "b" / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(data.DataError, match="lacks t10k-labels"):
            load("fashion_mnist", tmp_path / "b")

    @pytest.mark.parametrize("spoil", [lambda raw: raw[:-20], lambda raw: b"not gzip"])
    def test_refuses_damaged_gzip(self, tmp_path, spoil):
        contents = {f"{name}.gz": gzip.compress(raw) for name, raw in self.contents()[1].items()}
        name = "train-images-idx3-ubyte.gz"
        write(tmp_path, contents | {name: spoil(contents[name])})
        with pytest.raises(data.DataError, match="damaged or cut short"):
            load("fashion_mnist", tmp_path)


class TestCifarBinary:
    @pytest.mark.parametrize("inside", [True, False])
    def test_reads_cifar10_folders(self, tmp_path, inside):
        images, labels, contents = cifar10_files()
        write(tmp_path / "cifar-10-batches-bin", contents)
        got = load("cifar10", tmp_path / "cifar-10-batches-bin" if inside else tmp_path)
        same(got, images, labels)
        assert got.classes == 10 and got.mean == data.NORMALISATION["cifar"][0]

    def test_reads_cifar100_fine_labels(self, tmp_path):
        train, test = cifar_records(300, 2, 100), cifar_records(100, 2, 100, seed=1)
        write(tmp_path / "cifar-100-binary", {"train.bin": train[2], "test.bin": test[2]})
        got = load("cifar100", tmp_path)
        same(got, (train[0], test[0]), (train[1], test[1]))
        assert got.classes == 100

    def test_reads_archive(self, tmp_path):
        images, labels, contents = cifar10_files()
        members = {f"cifar-10-batches-bin/{name}": raw for name, raw in contents.items()}
        write_tar(tmp_path / "cifar-10-binary.tar.gz", {"cifar-10-batches-bin/x": b"?"} | members)
        same(load("cifar10", tmp_path), images, labels)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-binary.tar.gz"]

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda raw: raw[:-1], "61459 bytes: expected whole records of 3073"),
            (lambda raw: b"", "0 bytes"),
            (lambda raw: b"\xc8" + raw[1:], "label 200 at index 40 .1 such labels.: expected 0 to"),
        ],
    )
    def test_refuses_damage(self, tmp_path, change, message):
        _, _, contents = cifar10_files()
        write(tmp_path, contents | {"data_batch_3.bin": change(contents["data_batch_3.bin"])})
        with pytest.raises(data.DataError, match=message):
            load("cifar10", tmp_path)

    def test_refuses_a_missing_batch(self, tmp_path):
        _, _, contents = cifar10_files()
        del contents["data_batch_4.bin"]
        write(tmp_path / "a", contents)
        with pytest.raises(data.DataError, match=r"lacks \['data_batch_4.bin'\]"):
            load("cifar10", tmp_path / "a")
        (tmp_path / "b").mkdir()
        write_tar(
            tmp_path / "b" / "cifar-10-binary.tar.gz",
            {f"cifar-10-batches-bin/{name}": raw for name, raw in contents.items()},
        )
        with pytest.raises(data.DataError, match="lacks .*data_batch_4.bin"):
            load("cifar10", tmp_path / "b")

    def test_refuses_damaged_archives(self, tmp_path):
        _, _, contents = cifar10_files()
        path = tmp_path / "cifar-10-binary.tar.gz"
        members = {f"cifar-10-batches-bin/{name}": raw for name, raw in contents.items()}
        write_tar(path, members)
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        checksum = bytearray(whole)
        checksum[-6] ^= 1
        for raw in (whole[: len(whole) // 2], whole[:-4], b"", b"no", flipped, checksum):
            path.write_bytes(raw)
            with pytest.raises(data.DataError, match="damaged or cut short|lacks"):
                load("cifar10", tmp_path)

    def test_untrusted_archive_writes_nothing_and_reads_no_link(self, tmp_path):
        home = tmp_path / "home"
        home.mkdir()
        images, labels, contents = cifar10_files()
        members = {f"cifar-10-batches-bin/{name}": raw for name, raw in contents.items()}
        untrusted = {"../x": b"x", str(tmp_path / "y"): b"y", "cifar-10-batches-bin/../../z": b"z"}
        path = home / "cifar-10-binary.tar.gz"
        write_tar(path, untrusted | members)
        same(load("cifar10", home), images, labels)
        assert list(tmp_path.rglob("*")) == [home, path]
        secret = tmp_path / "secret"
        secret.write_bytes(members.pop("cifar-10-batches-bin/test_batch.bin"))
        with tarfile.open(path, "w:gz") as archive:
            for name, raw in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                archive.addfile(member, io.BytesIO(raw))
            link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
            link.type, link.linkname = tarfile.SYMTYPE, str(secret)
            archive.addfile(link)
        with pytest.raises(data.DataError, match="lacks .*test_batch.bin"):
            load("cifar10", home)


class Touch:
    """Pickles as a call that makes a file: what an attacker would send."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


RESAVED = {
    "columns": lambda x, y: (np.asfortranarray(planes(x)), y),
    "images": lambda x, y: (x, y.astype(np.uint8)),
    "images of columns": lambda x, y: (np.asfortranarray(x), y.astype(">i2")),
    "planes": lambda x, y: (x.transpose(0, 3, 1, 2), tuple(y.tolist())),
    "turned around": lambda x, y: (planes(x)[::-1][::-1], y[::-1][::-1]),
    "labels in a column": lambda x, y: (planes(x), y[:, None]),
    "labels of columns": lambda x, y: (planes(x), np.asfortranarray(y[:, None].astype("<i4"))),
    "labels as scalars": lambda x, y: (planes(x), list(y)),
    "labels in lists": lambda x, y: (planes(x), y[:, None].tolist()),
    "lists": lambda x, y: (planes(x).tolist(), y.tolist()),
    "lists of images": lambda x, y: (x.tolist(), y.tolist()),
    "a list of arrays": lambda x, y: (list(planes(x)), y),
}


class TestCifarPickle:
    @staticmethod
    def contents(protocol):
        images, labels, _ = cifar10_files()
        batches = [
            pickle.dumps({b"data": planes(image), b"labels": label.tolist()}, protocol=protocol)
            for image, label in zip(images, labels, strict=True)
        ]
        return images, labels, dict(zip(CIFAR10, batches, strict=True))

    @pytest.mark.parametrize("protocol", [2, 3, 4])
    def test_reads_cifar10(self, tmp_path, protocol):
        images, labels, contents = self.contents(protocol)
        write(tmp_path / "cifar-10-batches-py", contents)
        same(load("cifar10", tmp_path), images, labels)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("name", RESAVED)
    def test_reads_what_people_saved_again(self, tmp_path, name, protocol):
        images, labels, _ = cifar10_files()
        for batch, image, label in zip(CIFAR10, images, labels, strict=True):
            pixels, said = RESAVED[name](image, label)
            raw = pickle.dumps({"data": pixels, "labels": said}, protocol=protocol)
            write(tmp_path, {batch: raw})
        same(load("cifar10", tmp_path), images, labels)

    def test_refuses_what_cannot_be_an_array(self, tmp_path):
        images, labels, contents = self.contents(2)
        good, numbers = planes(images[0]), labels[0].tolist()
        for pixels, said, message in (
            (good.astype(np.uint16), numbers, r"data uint16 \(20, 3072\): expected uint8"),
            (good.astype(np.int64), numbers, "data int64"),
            (good / 255, numbers, "array of 'f8': expected one of u1"),
            (
                (good + 9).astype(int).tolist() + [[300] * 3072],
                numbers,
                "expected 0 to 255, 8 bits",
            ),
            (good, numbers[:-1], r"labels of shape \(19,\): expected \(20,\)"),
            (good, np.array(numbers).reshape(2, 10), r"labels of shape \(2, 10\)"),
            (good, 3, r"labels of shape \(\)"),
            (good, np.array(numbers) / 2, "array of 'f8'"),
            (good.reshape(20, 32, 96), numbers, r"data uint8 \(20, 32, 96\)"),
        ):
            raw = pickle.dumps({"data": pixels, "labels": said}, protocol=2)
            write(tmp_path, contents | {"data_batch_2": raw})
            with pytest.raises(data.DataError, match=f"data_batch_2 .*{message}|{message}"):
                load("cifar10", tmp_path)

    def test_reads_what_python_2_wrote(self, tmp_path):
        """Opcodes of the published files: byte strings, `numpy.core`, a text-mode dtype state."""
        images, labels, contents = self.contents(2)
        for name, image, label in zip(CIFAR10, images, labels, strict=True):
            pixels = planes(image)
            listed = b"(" + b"".join(b"K" + bytes([number]) for number in label) + b"l"
            contents[name] = (
                b"\x80\x02}q\x01(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
                b"K\x00\x85U\x01b\x87R(K\x01K" + bytes([len(pixels)]) + b"M\x00\x0c\x86"
                b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
                b"J\xff\xff\xff\xffK\x00tb\x89T" + len(pixels.tobytes()).to_bytes(4, "little")
                + pixels.tobytes() + b"tbU\x06labels" + listed + b"u."
            )  # fmt: skip
        write(tmp_path, contents)
        same(load("cifar10", tmp_path), images, labels)

    def test_reads_cifar100_fine_labels_from_an_archive(self, tmp_path):
        parts = [cifar_records(100, 2, 100, seed) for seed in range(2)]
        members = {}
        for name, (images, labels, _) in zip(("train", "test"), parts, strict=True):
            batch = {"data": planes(images), "fine_labels": labels.tolist(), "coarse_labels": [7]}
            members[f"cifar-100-python/{name}"] = pickle.dumps(batch, protocol=2)
        write_tar(tmp_path / "cifar-100-python.tar.gz", members)
        same(load("cifar100", tmp_path), [part[0] for part in parts], [part[1] for part in parts])

    def test_runs_nothing(self, tmp_path):
        witness = tmp_path / "witness"
        for protocol in (0, 2, 4):
            for untrusted in (Touch(witness), {b"data": Touch(witness), b"labels": [1]}):
                _, _, contents = self.contents(2)
                contents["data_batch_2"] = pickle.dumps(untrusted, protocol=protocol)
                write(tmp_path, contents)
                with pytest.raises(data.DataError, match="pickle names .*system.*was not run"):
                    load("cifar10", tmp_path)
                assert not witness.exists()

    @pytest.mark.parametrize(
        "raw",
        [
            b"cbuiltins\neval\n(U\x011tR.",
            b"cnumpy\nload\n(U\x01xtR.",
            b"cnumpy.core.multiarray\nfrombuffer\n.",
            b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.",
            b"c_codecs\nencode\n}b.",
            pickle.dumps({b"data": np.array([Touch("x")], object), b"labels": [1]}),
            pickle.dumps({b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]}, 2),
            pickle.dumps({b"data": np.zeros((1, 3072), np.int8), b"labels": [1]}, 2),
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1.5]}, 2),
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}, 2),
            pickle.dumps([1, 2]),
            b"",
            b"\x80\x02}q",
            b"garbage",
        ],
    )
    def test_refuses(self, tmp_path, raw):
        _, _, contents = self.contents(2)
        write(tmp_path, contents | {"data_batch_2": raw})
        with pytest.raises(data.DataError, match="expected"):
            load("cifar10", tmp_path)


class TestTfds:
    @pytest.fixture
    def tfds(self):
        return importlib.import_module("tensorflow_datasets")

    @pytest.mark.parametrize("name, classes", [("tfds:cifar10", 10), ("tfds:mnist", 10)])
    def test_reads_mocked_data(self, tfds, tmp_path, monkeypatch, name, classes):
        builder = tfds.core.DatasetBuilder
        monkeypatch.setattr(builder, "is_prepared", lambda self: True)
        with tfds.testing.mock_data(num_examples=30):
            got = load(name, tmp_path)
            source = tfds.data_source(name[5:], split="train", data_dir=tmp_path)
            np.testing.assert_array_equal(got.train.images, np.stack([e["image"] for e in source]))
            np.testing.assert_array_equal(got.train.labels, [e["label"] for e in source])
        assert got.classes == classes and len(got.test.labels) == 30
        assert (got.mean == data.NORMALISATION["cifar"][0]) == (name == "tfds:cifar10")

    def test_cifar_falls_back_to_it(self, tfds, tmp_path, monkeypatch):
        monkeypatch.setattr(tfds.core.DatasetBuilder, "is_prepared", lambda self: True)
        with tfds.testing.mock_data(num_examples=200):
            assert load("cifar100", tmp_path).classes == 100

    def test_reads_prepared_data(self, tfds, tmp_path, monkeypatch):
        images = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), np.uint8)

        class TinyForTest(tfds.core.GeneratorBasedBuilder):
            """Twelve images."""

            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = tfds.features.FeaturesDict(
                    {
                        "picture": tfds.features.Tensor(shape=(6, 5, 3), dtype=np.uint8),
                        "kind": tfds.features.ClassLabel(num_classes=3),
                    }
                )
                keys = ("picture", "kind")
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=keys)

            def _split_generators(self, dl_manager):
                return {
                    "train": self._generate_examples(0),
                    "validation": self._generate_examples(1),
                }

            def _generate_examples(self, start):
                for index in range(start, 12, 2):
                    yield index, {"picture": images[index], "kind": index % 3}

        TinyForTest(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        monkeypatch.setenv("HOME", str(tmp_path))
        got = load("tfds:tiny_for_test", "~")
        for split, start in ((got.train, 0), (got.test, 1)):
            pairs = {(image.tobytes(), label) for image, label in zip(*split, strict=True)}
            assert pairs == {(images[i].tobytes(), i % 3) for i in range(start, 12, 2)}

    def test_refuses_more_than_eight_bits(self, tfds, monkeypatch):
        features = {
            "image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        info = types.SimpleNamespace(features=features, supervised_keys=None)
        builder = types.SimpleNamespace(info=info, is_prepared=lambda: True)
        monkeypatch.setattr(tfds, "builder", lambda name, data_dir: builder)
        with pytest.raises(data.DataError, match="images of uint16: expected uint8, 8 bits"):
            data.load("tfds:wide")

    @pytest.mark.parametrize(
        "name, message",
        [
            ("mnist", r"not prepared mnist.*tfds build mnist --file_format=array_record"),
            ("no_such_set", "cannot describe 'no_such_set'"),
            ("huggingface:mnist", "TFDS name is 'huggingface:mnist'"),
            ("", "TFDS name is ''"),
        ],
    )
    def test_refuses_at_once(self, tfds, tmp_path, name, message):
        with pytest.raises(data.DataError, match=message):
            load(f"tfds:{name}", tmp_path)

    def test_refuses_what_lacks_a_split(self, tfds, tmp_path, monkeypatch):
        monkeypatch.setattr(tfds.core.DatasetBuilder, "is_prepared", lambda self: True)
        with pytest.raises(data.DataError, match="cannot read split 'train' of imagenet2012"):
            load("tfds:imagenet2012", tmp_path)

    def test_is_not_needed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
        with pytest.raises(data.DataError, match="TFDS cannot be imported"):
            load("tfds:mnist", tmp_path)
        with pytest.raises(data.DataError, match="cifar10 was not found.*cannot be imported"):
            load("cifar10", tmp_path)


class TestMissing:
    @pytest.mark.parametrize(
        "name, ways",
        [
            ("cifar10", ["cifar-10-binary.tar.gz", "cifar-10-batches-py", "tfds build cifar10"]),
            ("cifar100", ["cifar-100-python.tar.gz", "cifar-100-binary", "tfds build cifar100"]),
            ("fashion_mnist", ["train-images-idx3-ubyte.gz", "dataset-fashion-mnist", "tfds:"]),
        ],
    )
    def test_says_where_it_looked_and_what_would_help(self, tmp_path, name, ways):
        with pytest.raises(data.DataError) as caught:
            load(name, tmp_path)
        for part in (name, str(tmp_path), "Nothing was downloaded", "from_arrays", *ways):
            assert part in str(caught.value)

    def test_data_dir_must_be_a_folder(self, tmp_path):
        for name in ("cifar10", "fashion_mnist"):
            with pytest.raises(data.DataError, match="data_dir is .*expected an existing folder"):
                load(name, tmp_path / "absent")

    @pytest.mark.parametrize(
        "name, hint",
        [("cifar-10", "'cifar10'"), ("fashionmnist", "'fashion_mnist'"), ("Digits", "'digits'")],
    )
    def test_unknown_names(self, name, hint):
        with pytest.raises(data.DataError, match=f"data set is '{name}'.*did you mean {hint}") as e:
            data.load(name)
        assert all(known in str(e.value) for known in data.NAMES)
        with pytest.raises(data.DataError, match="data set is 'digits:3'"):
            data.load("digits:3")
        assert {*sources.SOURCES, *sources.WITH_OPTIONS} == set(data.NAMES)


def test_readers_never_extract():
    """The archive readers hold no call that writes to disk."""
    folder = pathlib.Path(sources.__file__).parent
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    assert "extractall" not in text and ".extract(" not in text
