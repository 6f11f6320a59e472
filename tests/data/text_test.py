"""Sentences: vocabularies, files, and what is refused; trained through the public API."""

import json
import sys

import numpy as np
import pytest

import distill_jax
from distill_jax import data
from distill_jax.runs.ids import digest_of

pytest.importorskip("tokenizers")

SENTENCES = ["a fine film", "the film is dull", "fine , fine", "nothing to see", "a dull affair"]
CONFIG = {
    "dataset": {"name": "synthetic_text:2:64:32", "valid_fraction": 0.25},
    "networks": ("bilstm_8", "bilstm_4"),
    "guidance": ("direct",),
    "recipe": {"epochs": 2, "batch_size": 16, "optimizer": "adamw", "learning_rate": 0.03},
}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(split, count=4, label=lambda i: i % 2):
    return [{"split": split, "sentence": SENTENCES[i % 5], "label": label(i)} for i in range(count)]


# ------------------------------------------------------------------------------------- vocabularies
def test_a_vocabulary_is_its_sentences_and_known_by_its_digest():
    one, again = (data.learn_vocabulary(SENTENCES, 100) for _ in range(2))
    other = data.learn_vocabulary(SENTENCES[:3], 100)
    assert one.digest == again.digest != other.digest
    tokens = one.encode(["a fine film", "fine \u2603"], 4)
    assert tokens.source == one.digest and tokens.size == one.size
    assert tokens.values.dtype == np.int32 and tokens.values.shape == (2, 4)
    assert tokens.values.min() == 0 and (tokens.values[0, :3] > 1).all()
    assert tokens.values[1, 1] == 1  # of what no piece is known
    np.testing.assert_array_equal(one.encode(["A  Fine film"], 2).values, tokens.values[:1, :2])


def test_a_vocabulary_is_read_from_where_it_was_kept(tmp_path):
    kept = data.learn_vocabulary(SENTENCES, 100)
    (tmp_path / kept.file).write_text(kept.text)
    assert data.read_vocabulary(tmp_path / kept.file) == kept
    unpadded = json.loads(kept.text)
    unpadded["added_tokens"] = []
    del unpadded["model"]["vocab"]["[PAD]"]
    (tmp_path / "other.json").write_text(json.dumps(unpadded))
    for file, message in (
        ("other.json", r"has \[PAD\] as token None: expected token 0"),
        ("missing.json", "missing.json cannot be read"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.read_vocabulary(tmp_path / file)
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(data.DataError, match="vocabulary cannot be read .*expected the JSON"):
        data.read_vocabulary(tmp_path / "no.json")


def test_a_tokenizer_that_cuts_or_pads_is_read_without_that(tmp_path):
    kept = data.learn_vocabulary(SENTENCES, 100)
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    left = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None}
    left |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    for changed in ({"truncation": cut}, {"padding": left}):
        (tmp_path / "other.json").write_text(json.dumps(json.loads(kept.text) | changed))
        other = data.read_vocabulary(tmp_path / "other.json")
        np.testing.assert_array_equal(
            other.encode(SENTENCES, 6).values, kept.encode(SENTENCES, 6).values
        )


def test_no_text_of_a_sentence_is_padding():
    values = data.learn_vocabulary(SENTENCES, 100).encode(["a [PAD] film", "[PAD]"], 8).values
    for row in values:
        length = np.count_nonzero(row)
        assert length > 0 and (row[:length] > 0).all()


def test_validation_teaches_no_word_pieces(tmp_path):
    train = [{"sentence": f"word{chr(97 + i)}", "label": i % 2} for i in range(20)]
    jsonl(tmp_path / "train.jsonl", train)
    jsonl(tmp_path / "test.jsonl", train[:2])

    def known(fraction):
        whole = data.load("text:.", data_dir=str(tmp_path), valid_fraction=fraction)
        (text,) = whole.task.files.values()
        return whole, set("".join(json.loads(text)["model"]["vocab"]))

    whole, letters = known(0.2)
    assert [len(x.labels) for x in (whole.train, whole.valid, whole.test)] == [16, 4, 2]
    assert len(known(0.0)[1] - letters) > 0
    assert (whole.valid.images.values == 1).any()  # unknown there


# -------------------------------------------------------------------------------------------- files
def test_one_file_and_a_folder_are_the_same_data(tmp_path):
    parts = {"train": rows("train"), "dev": rows("dev", 3), "test": rows("test", 2)}
    jsonl(tmp_path / "all.jsonl", [row for own in parts.values() for row in own])
    (tmp_path / "folder").mkdir()
    for name, own in parts.items():
        lines = [f"{row['label']}\t{row['sentence']}" for row in own]
        (tmp_path / "folder" / f"{name}.tsv").write_text("\n".join(["label\tsentence", *lines, ""]))
    one, two = (data.load(f"text:{x}", data_dir=str(tmp_path)) for x in ("all.jsonl", "folder"))
    assert digest_of(one) == digest_of(two)
    assert (one.classes, len(one.train.labels), len(one.valid.labels)) == (2, 4, 3)
    shorter = data.load("text:folder", data_dir=str(tmp_path), options={"length": 2})
    assert shorter.train.images.values.shape == (4, 2)
    np.testing.assert_array_equal(shorter.train.images.values, one.train.images.values[:, :2])


@pytest.mark.parametrize("ending", ["tsv", "jsonl"])
def test_a_byte_order_mark_is_passed_over(tmp_path, ending):
    own = rows("train")
    lines = ["label\tsentence", *(f"{row['label']}\t{row['sentence']}" for row in own)]
    lines = list(map(json.dumps, own)) if ending == "jsonl" else lines
    for part in ("train", "test"):
        (tmp_path / f"{part}.{ending}").write_text("\n".join(lines), encoding="utf-8-sig")
    assert len(data.load(f"text:{tmp_path}", valid_fraction=0).train.labels) == 4


def test_sst2_is_read_by_its_name(tmp_path):
    jsonl(tmp_path / "sst2.jsonl", [*rows("train"), *rows("dev", 2), *rows("test", 2)])
    whole = data.load("sst2", data_dir=str(tmp_path), options={"length": 8})
    assert whole.name == "sst2" and whole.train.images.values.shape == (4, 8)
    with pytest.raises(data.DataError, match="dataset.valid_fraction is 0.2: expected 0.1"):
        data.load("sst2", data_dir=str(tmp_path), valid_fraction=0.2)


def test_words_as_labels_are_numbered_in_their_order(tmp_path):
    words = ("sport", "art", "war")
    train = rows("train", 6, lambda i: words[i % 3])
    path = jsonl(tmp_path / "a.jsonl", [*train, *rows("test", 3, lambda i: words[i])])
    whole = data.load(f"text:{path}", valid_fraction=0.0)
    assert whole.classes == 3 and whole.train.labels.tolist() == [1, 0, 2] * 2
    assert not len(whole.valid.labels)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [{"split": "train", "sentence": "  ", "label": 0}],
            r"line 5 has the sentence '  ': .*empt",
        ),
        ([{"split": "train", "sentence": "\u200d", "label": 0}], "leaves nothing: expected a sent"),
        ([{"split": "train", "sentence": "a"}], "line 5 is .*expected sentence and label"),
        ([{"split": "train", "sentence": "a", "label": 0.5}], "line 5 has the label 0.5: expected"),
        (
            [{"split": "train", "sentence": "a", "label": "x"}],
            r"labels \[0, 1, 'x'\]: expected int",
        ),
        (
            [{"split": "test", "sentence": "a", "label": 2}],
            "test label 2 at index 0 .*for 2 classes",
        ),
        (
            [{"split": "tset", "sentence": "a", "label": 0}],
            "a row of split 'tset': expected one of",
        ),
        ([], "has no test sentences: expected train and test"),
    ],
)
def test_rows_that_are_not_so(tmp_path, lines, message):
    path = jsonl(tmp_path / "a.jsonl", [*rows("train"), *lines])
    if "split" in message or "leaves" in message or "line 5" in message or "labels" in message:
        jsonl(path, [*rows("train"), *lines, *rows("test", 2)])
    with pytest.raises(data.DataError, match=message) as caught:
        data.load(f"text:{path}", valid_fraction=0.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence\tlabel\na film\n", "line 2 has 1 columns: expected 2, sentence, label"),
        ("label\tsentence\n1\ta\rfilm\n", "line 2 has a carriage return in it"),
        ("a film\t1\n", r"names the columns \['a film', '1'\]: expected sentence and label"),
        ("sentence\tlabel\nfilm\t-1\n", "labels|label"),
    ],
)
def test_columns_that_are_not_so(tmp_path, text, message):
    (tmp_path / "train.tsv").write_text(text)
    (tmp_path / "test.tsv").write_text("sentence\tlabel\na\t0\n")
    with pytest.raises(data.DataError, match=message):
        data.load("text:.", data_dir=str(tmp_path), valid_fraction=0.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sst2", {}, "sst2 was not found in .*Nothing was downloaded"),
        ("text:gone", {}, "text:gone is at .*where nothing is"),
        ("text", {}, "expected text:FILE or text:FOLDER"),
        ("synthetic_text:2:x", {}, "synthetic_text is '2:x': expected"),
        ("synthetic_text", {"words": 3}, "dataset.options are {'words': 3}: expected those of"),
        ("synthetic_text", {"vocabulary": 5}, "vocabulary size is 5: expected an integer of at l"),
        ("synthetic_text", {"length": 0}, "length is 0: expected an integer of at least 1"),
        ("sst2:small", {}, "data set is 'sst2:small': expected one of"),
    ],
)
def test_names_and_options_that_are_refused(tmp_path, name, options, message):
    with pytest.raises(data.DataError, match=message):
        data.load(name, data_dir=str(tmp_path), options=options)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(data.DataError, match=r"need the package tokenizers .*distill_jax\[text\]"):
        data.load("synthetic_text")


# ----------------------------------------------------------------------------------------- trained
def test_a_run_keeps_its_vocabulary_and_refuses_a_teacher_of_another(tmp_path):
    first = distill_jax.run(CONFIG, workdir=tmp_path / "first", progress=False)
    (file,) = (tmp_path / "first").glob("vocabulary-*.json")
    vocabulary = data.read_vocabulary(file)
    whole = data.load(**CONFIG["dataset"])
    assert whole.spec.source == vocabulary.digest
    assert first.rows[0]["teachers"] == ["bilstm_8"]
    # A sentence of one's own, by the network of the folder.
    sentences = vocabulary.encode(["class1word0 common3 class1word1"] * 2, 16)
    loaded = distill_jax.load(tmp_path / "first")
    np.testing.assert_allclose(loaded.logits(sentences), first.logits(sentences), rtol=1e-6)

    def taught(**options):
        (teacher,) = (tmp_path / "first" / "stages").glob("bilstm_8-*")
        dataset = {**CONFIG["dataset"], "options": options}
        config = {**CONFIG, "dataset": dataset, "teacher_weights": str(teacher)}
        return distill_jax.run(config, progress=False).rows

    assert taught()[0]["teachers"] == ["bilstm_8"]
    with pytest.raises(distill_jax.ConfigError, match="preprocessed by .*vocabularies") as caught:
        taught(vocabulary=100)
    assert vocabulary.digest in str(caught.value) and "\n" not in str(caught.value)


def test_indices_of_nothing_that_there_is_are_refused():
    spec = data.Indices(np.zeros(3, np.int32), 5)
    task = data.Task(spec, 2)
    good = data.Indices(np.ones((4, 3), np.int32), 5)
    bad = data.Indices(np.full((4, 3), 5, np.int32), 5)
    labels = np.arange(4) % 2
    fine = data.from_arrays((good, labels), (good, labels), task=task, valid_fraction=0.0)
    assert len(fine.test.labels) == 4
    with pytest.raises(data.DataError, match=r"test inputs.values hold 5|hold 5 at example 0"):
        data.from_arrays((good, labels), (bad, labels), task=task)
    other = data.Indices(np.ones((4, 3), np.int32), 5, "another")
    with pytest.raises(data.DataError, match="test inputs are .*another.*: expected .*Indices"):
        data.from_arrays((good, labels), (other, labels), task=task)
