"""Pictures as people have them: folders of classes, tables, and more bits than eight."""

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import ExifTags, Image

import distill_jax
from distill_jax import data
from distill_jax.data.streamed import Streamed

RNG = np.random.default_rng(0)


def picture(shape=(8, 6, 3), value=None):
    pixels = RNG.integers(0, 256, shape, np.uint8) if value is None else np.full(shape, value, "u1")
    return Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return np.asarray(image)


def encoded(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def load(folder, **options):
    return data.load(f"folder:{folder}", **{"valid_fraction": 0, **options})


@pytest.fixture
def folder(tmp_path):
    """Two classes, two pictures each to train on and one to test; pixels by path."""
    pixels = {}
    for part, count in (("train", 2), ("test", 1)):
        for label in ("cat", "dog"):
            for index in range(count):
                path = tmp_path / part / label / f"{index}.png"
                pixels[f"{part}/{label}/{index}.png"] = save(path, picture())
    return tmp_path, pixels


# -------------------------------------------------------------------------------------- folders
def test_a_folder_of_classes_is_read(folder):
    folder, pixels = folder
    got = load(folder)
    assert got.classes == 2 and got.image_shape == (8, 6, 3)
    wanted = [pixels[f"train/{label}/{i}.png"] for label in ("cat", "dog") for i in range(2)]
    np.testing.assert_array_equal(got.train.images, wanted)
    assert got.train.labels.tolist() == [0, 0, 1, 1] and got.test.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(got.test.images[1], pixels["test/dog/0.png"])


def test_where_the_folder_is_said(folder, monkeypatch):
    folder, _ = folder
    monkeypatch.setenv("HOME", str(folder.parent))
    for name, data_dir in (
        (f"folder:~/{folder.name}", ""),
        ("folder", str(folder)),
        ("folder:", f"~/{folder.name}"),
        (f"folder:{folder.name}", "~"),
    ):
        assert len(data.load(name, data_dir=data_dir, valid_fraction=0).train.labels) == 4
    with pytest.raises(data.DataError, match="expected folder:DIR, or dataset.data_dir"):
        data.load("folder")
    with pytest.raises(data.DataError, match=r"/none is no folder: expected DIR/train/CLASS"):
        load(folder / "none")


def test_every_format_every_mode_and_deeper_folders(folder):
    folder, _ = folder
    image = picture()
    for place, (ending, mode) in enumerate(
        [("bmp", "RGB"), ("gif", "P"), ("png", "RGBA"), ("png", "1"), ("tiff", "CMYK")]
    ):
        save(folder / f"train/dog/deep/{place}.{ending}", image.convert(mode))
    save(folder / "train/dog/z.JPEG", image, format="JPEG")
    (folder / "train/dog/.DS_Store").write_bytes(b"x")
    (folder / "train/dog/Thumbs.db").write_bytes(b"x")
    (folder / "train/dog/boxes.txt").write_bytes(b"x")
    (folder / "train/classes.csv").write_bytes(b"x")
    got = load(folder)
    assert got.train.labels.tolist() == [0, 0] + [1] * 8
    np.testing.assert_array_equal(got.train.images[4], np.asarray(image))  # deep/0.bmp
    np.testing.assert_array_equal(got.train.images[6], np.asarray(image))  # deep/2.png


def test_links_to_folders_are_followed_but_not_in_circles(folder, tmp_path_factory):
    folder, _ = folder
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    linked = save(elsewhere / "deep" / "a.png", picture())
    (folder / "train" / "cat" / "more").symlink_to(elsewhere)
    (elsewhere / "deep" / "again").symlink_to(folder / "train" / "cat")
    got = load(folder)
    assert got.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert any(np.array_equal(image, linked) for image in got.train.images)


def test_gray_pictures_have_one_channel_unless_one_is_coloured(folder):
    folder, _ = folder
    for path in folder.rglob("*.png"):
        save(path, picture((8, 6, 1)))
    gray = load(folder)
    assert gray.image_shape == (8, 6, 1)
    save(folder / "test/cat/0.png", picture())
    coloured = load(folder)
    assert coloured.image_shape == (8, 6, 3)
    np.testing.assert_array_equal(coloured.train.images, np.repeat(gray.train.images, 3, -1))


def test_sizes_are_brought_to_the_most_frequent(folder):
    folder, pixels = folder
    tall = np.zeros((32, 12, 3), np.uint8)  # twice as wide, and its middle: rows 8 to 23
    tall[8:24, :6], tall[8:24, 6:] = 50, 250
    save(folder / "train/cat/9.png", Image.fromarray(tall))
    save(folder / "test/cat/0.png", picture((3, 3, 3), 77))
    got = load(folder)
    assert got.train.images.shape == (5, 8, 6, 3)
    np.testing.assert_array_equal(got.train.images[0], pixels["train/cat/0.png"])
    assert (got.train.images[2][1:-1, :2] == 50).all() and (
        got.train.images[2][1:-1, 4:] == 250
    ).all()
    assert (got.test.images[0] == 77).all()


def test_every_picture_is_brought_to_a_size_that_is_asked_for(folder):
    folder, _ = folder
    tall = np.zeros((32, 12, 3), np.uint8)  # covers 6x6 at half its size: rows 10 to 21, halved
    tall[10:22, :6], tall[10:22, 6:] = 50, 250
    save(folder / "train/cat/9.jpg", Image.fromarray(tall), quality=100, subsampling=0)
    got = load(folder, options={"size": 6})
    assert got.image_shape == (6, 6, 3) and got.test.images.shape == (2, 6, 6, 3)
    inner = np.int32(got.train.images[2][1:-1])
    assert np.abs(inner[:, :2] - 50).max() < 9 and np.abs(inner[:, 4:] - 250).max() < 9
    for size in (-1, 2.5, True):
        with pytest.raises(data.DataError, match="dataset.options size is .*expected an integer"):
            load(folder, options={"size": size})
    with pytest.raises(data.DataError, match="dataset.options are .*expected those of folder"):
        load(folder, options={"side": 6})


def test_folders_of_classes_alone_are_split_by_class(folder):
    folder, _ = folder
    place = folder / "train"  # its two classes, of 2 and of 7 pictures
    for index in range(2, 7):
        save(place / f"dog/{index}.png", picture())
    for fraction, held in ((0.1, [0, 1]), (0.4, [0, 1, 1, 1]), (0.99, [0, *[1] * 6])):
        got = load(place, options={"test_fraction": fraction})
        assert got.test.labels.tolist() == held
        both = np.concatenate([got.train.images, got.test.images])
        assert len(np.unique(both, axis=0)) == 9  # each picture is in one of them
    one, same, other = (
        load(place, options={"test_fraction": 0.4}, split_seed=seed).test.images
        for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    for fraction in (1.0, -0.1, "half"):
        with pytest.raises(data.DataError, match="test_fraction is .*expected 0 to below 1"):
            load(place, options={"test_fraction": fraction})
    with pytest.raises(data.DataError, match="says itself what is to be tested on: expected 0"):
        load(folder, options={"test_fraction": 0.2})
    (place / "cat/0.png").unlink()
    with pytest.raises(data.DataError, match="train/cat holds 1 pictures: expected two or more"):
        load(place, options={"test_fraction": 0.4})


def test_cub_200_as_it_is_published(tmp_path):
    names = ["001.Black_Albatross/a_1.jpg", "001.Black_Albatross/a_2.jpg", "002.Wren/w 3.jpg"]
    names.append("002.Wren/w_4.png")
    for place, name in enumerate(names):
        save(tmp_path / "images" / name, picture((8, 6, 3), 50 * place))
    save(tmp_path / "images/002.Wren/not_listed.png", picture())
    listed, split = tmp_path / "images.txt", tmp_path / "train_test_split.txt"
    listed.write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    split.write_text("1 1\n2 0\n3 1\n4 0\n")
    got = load(tmp_path)
    assert got.classes == 2
    assert got.train.images[:, 0, 0, 0].tolist() == [0, 100] == (100 * got.train.labels).tolist()
    assert got.test.images[:, 0, 0, 0].tolist() == [50, 150]
    assert got.test.labels.tolist() == [0, 1]
    for text, message in (
        ("1 1\n2 0\n3 1\n", "train_test_split.txt has None for image 4: expected 1, to train on"),
        ("1 1\n2 0\n3 1\n4 2\n", "has 2 for image 4"),
        ("1\n", r"train_test_split.txt line 1 is '1': expected two columns"),
        ("1 0\n2 0\n3 1\n4 0\n", "train/001.Black_Albatross holds no pictures"),
    ):
        split.write_text(text)
        with pytest.raises(data.DataError, match=message):
            load(tmp_path)
    split.write_text("1 1\n2 0\n3 1\n4 0\n")
    (tmp_path / "images" / names[3]).unlink()
    with pytest.raises(data.DataError, match=r"images/002.Wren/w_4.png cannot be read"):
        load(tmp_path)


def test_one_class_is_none(folder):
    folder, _ = folder
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "dog")
    with pytest.raises(data.DataError, match="holds the one class cat: expected two folders"):
        load(folder)
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "cat")
    with pytest.raises(data.DataError, match="holds no class: expected two folders"):
        load(folder)
    with pytest.raises(data.DataError, match="holds no class: expected two folders"):
        load(folder / "train", options={"test_fraction": 0.2})


def turned(kind, orientation=6):
    """The content of a file that lies on its side and says so, and how it is meant."""
    meant = Image.fromarray(np.repeat(np.repeat(CORNERS, 8, 0), 4, 1))  # 16 high, 8 wide
    stream, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    meant.transpose(Image.Transpose.ROTATE_90).save(stream, kind, exif=exif, **LOSSLESS[kind])
    return stream.getvalue(), np.asarray(meant)


CORNERS = np.array([[[250] * 3, [170] * 3], [[90] * 3, [10] * 3]], np.uint8)
LOSSLESS = {"JPEG": {"quality": 100}, "PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_picture_that_lies_on_its_side_is_turned_upright(folder, kind):
    folder, _ = folder
    content, meant = turned(kind)
    for path in folder.rglob("*.png"):
        path.unlink()
        path.with_suffix(f".{kind.lower()}").write_bytes(content)
    opened = Image.open(io.BytesIO(content))
    for got in (
        load(folder),
        data.from_arrays(*2 * [([content, opened], [0, 1])], classes=2, valid_fraction=0),
    ):
        assert got.image_shape == (16, 8, 3)
        assert np.abs(np.int32(got.train.images) - meant).max() < 4
    assert opened.size == ((8, 16) if kind == "TIFF" else (16, 8))  # the user's own stays


def test_damaged_exif_says_nothing(folder):
    folder, pixels = folder
    image = Image.fromarray(pixels["train/cat/0.png"])
    image.save(folder / "train/cat/0.png", exif=b"Exif\0\0damaged!")
    np.testing.assert_array_equal(load(folder).train.images[0], pixels["train/cat/0.png"])


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder(folder, name):
    folder, _ = folder
    for label in ("cat", "dog"):
        save(folder / name / label / "a.png", picture((8, 6, 3), 9))
    got = load(folder, valid_fraction=0.5)
    assert (len(got.train.labels), got.valid.labels.tolist()) == (4, [0, 1])
    assert (got.valid.images == 9).all()
    for path in (folder / "test").rglob("*.png"):
        path.unlink()
    for path in (*(folder / "test").iterdir(), folder / "test"):
        path.rmdir()
    got = load(folder)
    assert (got.test.images == 9).all() and not len(got.valid.labels)


def test_what_is_wrong_with_a_folder_is_named(folder):
    folder, _ = folder
    bad = folder / "train/dog/bad.jpg"
    whole = encoded(picture((64, 64, 3)), "JPEG")
    for content in (b"", b"no picture", whole[: len(whole) // 2]):
        bad.write_bytes(content)
        with pytest.raises(data.DataError, match=rf"{bad} cannot be read .*expected an undamaged"):
            load(folder)
    bad.unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("nowhere")):
        make(bad)
        with pytest.raises(data.DataError, match=r"bad.jpg cannot be read .*no regular file"):
            load(folder)
        bad.unlink()
    bad.with_name("no_ending").write_bytes(b"x")
    with pytest.raises(data.DataError, match="no_ending cannot be read"):
        load(folder)
    bad.with_name("no_ending").unlink()
    (folder / "test/cow").mkdir()
    with pytest.raises(data.DataError, match=r"test has not the classes of train \(\['cow'\]"):
        load(folder)
    (folder / "train/cow").mkdir()
    with pytest.raises(data.DataError, match="train/cow holds no pictures"):
        load(folder)
    with pytest.raises(data.DataError, match=r"folders \['cat', 'cow', 'dog'\]: expected train"):
        load(folder / "train")


def test_every_picture_is_decoded_once(folder, monkeypatch):
    from PIL import PngImagePlugin

    folder, _ = folder
    decoded = []
    plain = PngImagePlugin.PngImageFile.load

    def counted(self):
        if self.tile:
            decoded.append(self.filename)
        return plain(self)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", counted)
    load(folder)
    assert len(decoded) == len(set(decoded)) == 6


def test_a_run_on_a_folder(folder):
    folder, _ = folder
    for path in folder.rglob("*.png"):
        save(path, picture((8, 8, 3)))
    config = {
        "dataset": {"name": f"folder:{folder}", "valid_fraction": 0.5},
        "networks": ("plane2",),
        "guidance": ("none",),
        "recipe": {"epochs": 1, "batch_size": 2},
    }
    row = distill_jax.run(config).rows[0]
    assert 0 <= row["test_accuracy"] <= 1
    json.dumps(row)


# -------------------------------------------------------------------------- more than eight bits
WIDE = {
    "png": Image.fromarray(RNG.integers(0, 2**16, (8, 6), np.uint16)),
    "tiff": Image.fromarray(RNG.random((8, 6)).astype(np.float32)),
    "tif": Image.fromarray(RNG.integers(0, 2**20, (8, 6)).astype(np.int32)),
}


@pytest.mark.parametrize("ending", WIDE)
def test_pictures_of_more_than_eight_bits_are_refused_wherever_they_are(folder, ending):
    folder, _ = folder
    image = WIDE[ending]
    save(folder / f"train/dog/wide.{ending}", image)
    with pytest.raises(data.DataError, match=rf"wide.{ending} cannot be read .*more than 8 bits"):
        load(folder)
    stream = encoded(image, "PNG" if ending == "png" else "TIFF")
    for stored in (stream, np.asarray(image)[..., None]):
        with pytest.raises(data.DataError, match="image 0 of set cannot be read .*more than 8"):
            np.asarray(Streamed([stored], "set", np.arange(1), 1))
    for value in (image, stream, {"bytes": stream, "path": None}):
        table = {"image": [value] * 4, "label": [0, 1, 0, 1]}
        with pytest.raises(data.DataError, match="train image 0 cannot be read .*more than 8 bits"):
            data.from_arrays(table, table, classes=2)


def test_sixteen_bits_of_colour_are_refused(folder):
    import struct
    import zlib

    folder, _ = folder

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    rows = b"".join(b"\0" + bytes(2 * 3 * 6) for _ in range(8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 8, 16, 2, 0, 0, 0))
    raw = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (folder / "train/dog/wide.png").write_bytes(raw)
    with pytest.raises(data.DataError, match="wide.png cannot be read .*more than 8 bits"):
        load(folder)


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int16", "int64", "float32", "float64", "bool"])
def test_arrays_of_other_types_are_refused(dtype):
    images = np.zeros((4, 8, 6, 3), dtype)
    pair, table = (images, [0, 1, 0, 1]), {"image": images, "label": [0, 1, 0, 1]}
    for given in (pair, table, {**table, "image": list(images)}):
        with pytest.raises(data.DataError, match="images are .*expected uint8"):
            data.from_arrays(given, given, classes=2)


# --------------------------------------------------------------------------------------- tables
IMAGES = RNG.integers(0, 256, (4, 8, 6, 3), np.uint8)
LABELS = [0, 1, 0, 1]


class Columns:
    """As a set of the datasets library."""

    column_names = ("img", "fine_label", "coarse_label")

    def __getitem__(self, name):
        pictures = [Image.fromarray(image) for image in IMAGES]
        return {"img": pictures, "fine_label": LABELS, "coarse_label": [0] * 4}[name]


TABLES = {
    "columns": {"image": IMAGES, "label": np.array(LABELS)},
    "lists": {"img": IMAGES.tolist(), "labels": LABELS},
    "pictures": {"images": [Image.fromarray(x) for x in IMAGES], "fine_label": LABELS},
    "bytes": {"data": [encoded(Image.fromarray(x)) for x in IMAGES], "targets": LABELS},
    "undecoded": {
        "image": [{"bytes": encoded(Image.fromarray(x)), "path": "a.png"} for x in IMAGES],
        "target": LABELS,
    },
    "objects": {"image": np.array([*IMAGES, None], object)[:4], "label": LABELS},
    "rows": [{"image": x, "label": label} for x, label in zip(IMAGES, LABELS, strict=True)],
    "rows of lists": [
        {"img": x.tolist(), "label": np.int64(label)}
        for x, label in zip(IMAGES, LABELS, strict=True)
    ],
    "the datasets library": Columns(),
    "labels in a column": {"image": IMAGES, "label": np.array(LABELS)[:, None]},
    "big-endian labels": (IMAGES, np.array(LABELS, ">i8")),
    "a pair of pictures": ([Image.fromarray(x) for x in IMAGES], LABELS),
    "turned around twice": (np.asfortranarray(IMAGES[::-1])[::-1], LABELS),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_images_and_labels(name):
    table = TABLES[name]
    got = data.from_arrays(table, table, classes=2, valid_fraction=0)
    for split in (got.train, got.test):
        np.testing.assert_array_equal(split.images, IMAGES)
        np.testing.assert_array_equal(split.labels, LABELS)
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32


def test_colours_of_a_palette_are_no_gray_levels():
    palette = [Image.fromarray(np.repeat(x[..., :1], 3, -1)).convert("P") for x in IMAGES]
    got = data.from_arrays((palette, LABELS), (palette, LABELS), classes=2, valid_fraction=0)
    np.testing.assert_array_equal(got.train.images, [x.convert("RGB") for x in palette])


def test_two_rows_are_no_pair_and_gray_images_need_no_axis():
    rows = [{"image": Image.fromarray(x[..., 0]), "label": i} for i, x in enumerate(IMAGES[:2])]
    got = data.from_arrays(rows, rows, classes=2, valid_fraction=0)
    np.testing.assert_array_equal(got.train.images, IMAGES[:2, ..., :1])
    got = data.from_arrays(
        *[{"image": list(IMAGES[..., 0]), "label": LABELS}] * 2, classes=2, valid_fraction=0
    )
    np.testing.assert_array_equal(got.train.images, IMAGES[..., :1])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": IMAGES}, r"columns \['image'\]: expected exactly one of label, labels"),
        ({"image": IMAGES, "img": IMAGES, "label": LABELS}, "expected exactly one of image,"),
        ({"picture": IMAGES, "label": LABELS}, r"\['picture', 'label'\]: expected exactly one of"),
        ([{"image": IMAGES[0], "label": 0}, {"image": IMAGES[0]}], r"row 1 has \['image'\]"),
        ({"image": [IMAGES[0], IMAGES[0, :4]], "label": [0, 1]}, "cannot be stacked"),
        ({"image": [IMAGES[0].tolist(), [[0]]], "label": [0, 1]}, "cannot be stacked"),
        (
            {"image": [picture(), picture((5, 5, 3))], "label": [0, 1]},
            "sizes 6x8, 5x5: expected one",
        ),
        ({"image": (IMAGES * 2.0).tolist(), "label": LABELS}, "is float64 .*expected integers"),
        (
            {"image": (IMAGES.astype(int) + 9).tolist(), "label": LABELS},
            "values from .* expected 0 to 255, 8 bits",
        ),
        ({"image": [], "label": []}, "expected"),
        ({"image": [b"x"], "label": [0]}, "train image 0 cannot be read"),
        ({"image": [{"bytes": None, "path": "/none.png"}], "label": [0]}, "image 0 cannot be read"),
    ],
)
def test_tables_that_are_none_are_refused(table, message):
    with pytest.raises(data.DataError, match=message):
        data.from_arrays(table, table, classes=2)


# --------------------------------------------------------------------------------------- scales
@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), r"mean is .*pixel/255.*give \(0.4914, 0.4824"),
        ((0.5, 0.5, 0.5), (63.0, 62.1, 66.7), r"std is .*0 to 255 give \(0.2471"),
        ((0.5, 0.5, 2), (0.25,) * 3, "mean is"),
    ],
)
def test_mean_and_std_of_0_to_255_are_refused(mean, std, message):
    pair = (IMAGES, LABELS)
    with pytest.raises(data.DataError, match=message):
        data.from_arrays(pair, pair, classes=2, valid_fraction=0, mean=mean, std=std)
    with pytest.raises(data.DataError, match=message):
        data.load("synthetic:8x8x3:4:40:20", mean=mean, std=std)
