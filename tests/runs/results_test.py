"""What `run` gives: rows, what its networks say of inputs, and how it is shown."""

import json
import sys
import types

import jax
import numpy as np
import pytest

import distill_jax
from distill_jax import data
from distill_jax.runs.plan import make_plan
from distill_jax.runs.results import Results, results_of

TINY = {
    "dataset": {"name": "synthetic:8x8x3:4:96:48", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("none", "direct"),
    "seeds": (0, 1),
    "sweep": {"kd_weight": (0.1, 0.9)},
    "recipe": {"epochs": 2, "batch_size": 24, "temperature": 3.0},
}


@pytest.fixture(scope="module")
def results():
    return distill_jax.run(TINY, progress=False)


@pytest.fixture(scope="module")
def dataset():
    return data.load(**TINY["dataset"])


# ----------------------------------------------------------------------------------- what they say
def test_predictions_are_those_that_were_scored(results, dataset):
    for row in results.rows:
        key = {name: row[name] for name in ("guidance", "network", "seed")}
        classes = results.predict(dataset.test.images, **key)
        assert np.issubdtype(classes.dtype, np.integer) and classes.shape == (48,)
        assert np.mean(classes == dataset.test.labels) == row["test_accuracy"]
    logits = results.logits(dataset.test.images[:5], **key)
    assert logits.shape == (5, 4) and logits.dtype == np.float32
    whole = results.logits(dataset.test.images, **key)
    np.testing.assert_allclose(logits, whole[:5], rtol=1e-5, atol=1e-6)


def test_many_examples_are_run_in_batches(results, dataset):
    many = np.tile(dataset.test.images, (13, 1, 1, 1))  # 624: two batches and a part
    few = results.logits(dataset.test.images)
    np.testing.assert_allclose(results.logits(many), np.tile(few, (13, 1)), rtol=1e-5, atol=1e-6)


def test_the_best_by_validation_is_asked_among_those_that_match(results, dataset):
    rows = [row for row in results.rows if row["seed"] == 1]
    best = max(rows, key=lambda row: row["valid_accuracy"])
    logits = results.logits(dataset.test.images, seed=1)
    own = results.logits(dataset.test.images, best["guidance"], "plane2", 1)
    np.testing.assert_array_equal(logits, own)
    low = min(rows, key=lambda row: row["valid_accuracy"])
    assert low["valid_accuracy"] < best["valid_accuracy"]
    asked = results.logits(dataset.test.images, low["guidance"], seed=1)
    assert not np.array_equal(asked, own)


def test_without_validation_one_network_has_to_be_named(results, dataset):
    rows = [{**row, "valid_accuracy": None} for row in results.rows]
    unknown = Results(rows, results.networks, results.histories, results.preprocess)
    with pytest.raises(ValueError, match="6 networks and no validation accuracy to choose by"):
        unknown.predict(dataset.test.images)
    assert unknown.predict(dataset.test.images, "none", "plane2", 0).shape == (48,)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"guidance": "chian"}, "'chian'.*there are guidance none, 'direct, kd_weight=0.1'"),
        ({"network": "plane4"}, "network plane2; seed 0, 1"),
        ({"seed": 7}, "seed 0, 1"),
    ],
)
def test_an_unknown_name_is_answered_with_those_there_are(results, dataset, named, message):
    with pytest.raises(KeyError, match=message):
        results.predict(dataset.test.images, **named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images[0], r"uint8 \(8, 8, 3\): expected images, uint8 \(N, 8, 8, 3\)"),
        (lambda images: images / 255, "float64"),
        (lambda images: images.astype(np.int32), "int32"),
        (lambda images: images[:, :4], r"\(48, 4, 8, 3\)"),
        (lambda images: images[:0], "one example or more"),
        (lambda images: {"a": images, "b": images[:3]}, "as many in each array"),
        (lambda images: {"image": images}, "expected images"),
    ],
)
def test_inputs_that_are_none_of_the_data_sets_are_refused(results, dataset, change, message):
    with pytest.raises(ValueError, match=message):
        results.predict(change(dataset.test.images))


def test_float_images_are_scaled_by_their_range():
    random = np.random.RandomState(0)
    images, labels = random.uniform(-1, 1, (64, 8, 8, 1)).astype(np.float32), np.arange(64) % 4
    pair = images, labels
    floats = data.from_arrays(pair, pair, classes=4, value_range=(-1.0, 1.0))
    config = {**TINY, "guidance": "none", "seeds": (0,), "sweep": {}, "networks": ("plane2",)}
    given = distill_jax.run(config, dataset=floats, progress=False)
    accuracy = np.mean(given.predict(images) == labels)
    assert accuracy == given.rows[0]["test_accuracy"]
    with pytest.raises(ValueError, match="expected images, floats from -1.0 to 1.0"):
        given.predict(255 * images)


# ---------------------------------------------------------------------------------------- the rows
def test_rows_have_the_values_that_trained_them(results):
    found = {row["guidance"]: (row["temperature"], row["kd_weight"]) for row in results.rows}
    assert found == {
        "none": (3.0, 0.5),
        "direct, kd_weight=0.1": (3.0, 0.1),
        "direct, kd_weight=0.9": (3.0, 0.9),
    }
    json.dumps(results.rows)


def test_rows_have_every_swept_field_flat(dataset):
    config = {
        **TINY,
        "guidance": ("none", "dense+drop"),
        "networks": ("plane6", "plane4", "plane2"),
        "seeds": (0,),
        "methods": {"kd": 1.0, "fitnet": 1.0},
        "sweep": {"methods.fitnet": (0.0, 2.0), "survival": (0.5,), "learning_rate": (0.03,)},
        "overrides": {"plane2": {"temperature": 7.0}},
        "controls": {"more": {"learning_rate": 0.2}},
        "dropping": {"kind": "bernoulli"},
    }
    experiment = distill_jax.resolve(config)
    plan = make_plan(experiment, dataset, "")
    rows = results_of(plan, {}, dict.fromkeys(plan.stages, "untrained"), experiment, dataset).rows
    names = ("methods.fitnet", "survival", "learning_rate", "temperature")
    found = [tuple(row[name] for name in names) for row in rows]
    assert found == [
        (None, 0.75, 0.03, 7.0),
        (0.0, 0.5, 0.03, 7.0),
        (2.0, 0.5, 0.03, 7.0),
        (None, 0.75, 0.2, 7.0),
    ]
    assert [row["graph"] for row in rows] == ["none", "dense+drop", "dense+drop", "none"]


def test_lines_of_metrics_name_teachers_and_the_guidances_that_use_a_stage(tmp_path):
    config = {**TINY, "guidance": ("none", "direct", "chain"), "sweep": {}, "seeds": (0,)}
    distill_jax.run(config, workdir=tmp_path, progress=False)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    found = {(line["network"], *line["teachers"]): line["guidance"] for line in lines}
    assert found == {
        ("plane2",): ["none"],
        ("plane4",): ["direct", "chain"],
        ("plane2", "plane4"): ["direct", "chain"],
    }


# ------------------------------------------------------------------------------ how they are shown
def test_results_are_one_line_and_in_a_notebook_a_table(results):
    assert repr(results) == (
        "Results(6 rows: none, 'direct, kd_weight=0.1', 'direct, kd_weight=0.9'; plane2; 2 seeds)"
    )
    html = results._repr_mimebundle_([], [])["text/html"]
    assert "kd_weight=0.9" in html and "gain" in html
    many = Results([{**results.rows[0], "guidance": f"g{i}"} for i in range(40)], {}, {})
    assert repr(many) == "Results(40 rows: g0, g1, g2, g3, g4, g5 ... (40); plane2; 1 seed)"
    lost = {**results.rows[0], "failed": "why"}
    assert repr(Results([lost], {}, {}, interrupted=True)) == (
        "Results(1 row: none; plane2; 1 seed; 1 failed; interrupted)"
    )
    assert repr(Results([], {}, {})) == "Results(no rows)"
    assert "no rows" in Results([], {}, {})._repr_mimebundle_([], [])["text/plain"]


def test_a_key_that_is_not_there_is_answered_with_those_there_are(results):
    for mapping in (results.networks, results.histories):
        with pytest.raises(KeyError, match="no .'none', 'plane2', 5., as .*; network plane2; seed"):
            mapping["none", "plane2", 5]
        assert len(mapping) == 6 and ("none", "plane2", 1) in mapping
        assert mapping.get(("none", "plane2", 5)) is None
    assert "guidance none" in repr(results.networks) and len(repr(results.histories)) < 200


def test_a_frame_is_made_where_pandas_is(results, monkeypatch):
    frames = types.ModuleType("pandas")
    frames.DataFrame = lambda rows: ("frame", rows)
    monkeypatch.setitem(sys.modules, "pandas", frames)
    assert results.frame() == ("frame", results.rows)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="install it"):
        results.frame()


def test_data_sets_and_splits_are_shown_without_their_arrays(dataset):
    assert repr(dataset) == (
        "Dataset(synthetic:8x8x3:4:96:48: uint8 (8, 8, 3), 4 classes; 72 train, 24 valid, 48 test)"
    )
    assert repr(dataset.test) == "Split(48 examples: uint8 (48, 8, 8, 3))"
    spec = {"a": jax.ShapeDtypeStruct((2,), np.float32), "b": jax.ShapeDtypeStruct((), np.int32)}
    inputs = {"a": np.zeros((8, 2), np.float32), "b": np.zeros(8, np.int32)}
    task = data.Task(spec, classes=2, preprocess=lambda x, key, train: x["a"])
    pair = inputs, np.arange(8) % 2
    shown = data.from_arrays(pair, pair, task=task, valid_fraction=0)
    assert "float32 (2,)" in repr(shown) and "0 valid, 8 test" in repr(shown)
    assert repr(shown.train) == "Split(8 examples: float32 (8, 2), int32 (8,))"
