"""Link prediction: ranks against a ranker in float64, scores by hand, files, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill_jax
from distill_jax import data, models
from distill_jax.data import ranking
from distill_jax.methods import Shapes
from distill_jax.methods.registry import EdgeMethod
from distill_jax.train import inference
from distill_jax.train.teachers import FrozenTeachers
from distill_jax.train.terms import teacher_needs

NAME = "synthetic_triples:12:2:160"
CONFIG = {
    "dataset": {"name": NAME},
    "networks": ("complex_8", "complex_4"),
    "guidance": ("direct",),
    "devices": 1,
    "methods": {"kd": 1.0, "n3": 0.01},
    "recipe": {"epochs": 2, "batch_size": 40, "optimizer": "adamw", "learning_rate": 0.02},
}


def by_hand(scores, labels, questions, known):
    """(MRR, Hits@1, 3, 10) in float64: every other right answer left out, of equals the mean."""
    ranks = []
    for own, label, question in zip(np.float64(scores), labels, questions, strict=True):
        others = [c for c in range(len(own)) if c == label or c not in known[question]]
        higher = sum(own[c] > own[label] for c in others)
        equal = sum(own[c] == own[label] for c in others if c != label)
        ranks.append(1 + higher + equal / 2)
    ranks = np.array(ranks)
    return [np.mean(1 / ranks), *(np.mean(ranks <= k) for k in (1, 3, 10))]


def known_of(*splits):
    known = {}
    for split in splits:
        pairs = zip(split.images["head"].values, split.images["relation"].values, strict=True)
        for question, label in zip(pairs, split.labels, strict=True):
            known.setdefault(tuple(map(int, question)), set()).add(int(label))
    return known


def questions(split):
    pairs = zip(split.images["head"].values, split.images["relation"].values, strict=True)
    return [tuple(map(int, pair)) for pair in pairs]


METRICS = ("mrr", "hits1", "hits3", "hits10")


@pytest.mark.parametrize("levels", [3, 10**6], ids=["many equal scores", "few"])
def test_metrics_are_those_of_a_ranker_in_float64(levels):
    whole = data.load(NAME)
    known = known_of(whole.train, whole.valid, whole.test)
    split, rng = whole.test, np.random.default_rng(0)
    scores = rng.integers(0, levels, (len(split.labels), whole.classes)).astype(np.float32)
    found = [np.divide(*whole.metrics[x](scores, split.labels, split.images)) for x in METRICS]
    np.testing.assert_allclose(
        found, by_hand(scores, split.labels, questions(split), known), rtol=1e-12
    )
    assert 0 <= found[1] < found[2] < found[3] < 1


def test_scores_that_are_not_finite_have_no_rank():
    whole = data.load(NAME)
    scores = np.zeros((len(whole.test.labels), whole.classes), np.float32)
    scores[1, 0] = np.nan
    for name in METRICS:
        total, count = whole.metrics[name](scores, whole.test.labels, whole.test.images)
        assert np.isnan(total) and count == len(scores)


def test_ranks_are_not_taken_for_those_of_other_scores():
    whole = data.load(NAME)
    labels = whole.test.labels
    for best in (True, False, True):  # an array of its own each time, perhaps in the same place
        scores = np.zeros((len(labels), whole.classes), np.float32)
        scores[np.arange(len(labels)), labels] = 1.0 if best else -1.0
        hits = np.divide(*whole.metrics["hits1"](scores, labels, whole.test.images))
        assert (hits == 1) == best
        del scores


def test_every_triple_is_asked_in_both_directions():
    whole = data.load(NAME)
    half = len(whole.train.labels) // 2
    head, relation = (whole.train.images[x].values for x in ("head", "relation"))
    np.testing.assert_array_equal(head[half:], whole.train.labels[:half])
    np.testing.assert_array_equal(whole.train.labels[half:], head[:half])
    np.testing.assert_array_equal(relation[half:], relation[:half] + 2)
    assert whole.select_by == "mrr" and whole.classes == 12


def scores_by_hand(kind, params, head, relation):
    e, r = (np.float64(params[x]) for x in ("entities", "relations"))
    if kind == "complex":
        e, r = (x[:, : x.shape[1] // 2] + 1j * x[:, x.shape[1] // 2 :] for x in (e, r))
        return np.real(np.einsum("bd,bd,cd->bc", e[head], r[relation], np.conj(e)))
    if kind == "distmult":
        return np.einsum("bd,bd,cd->bc", e[head], r[relation], e)
    return -np.linalg.norm(e[head][:, None] + r[relation][:, None] - e[None], axis=-1)


@pytest.mark.parametrize("kind", ["complex", "distmult", "transe"])
def test_scores_are_those_of_the_papers(kind):
    whole = data.load(NAME)
    network = models.build(f"{kind}_4", whole.classes, whole.inputs)
    variables = jax.tree.map(lambda x: 10 * x, network.init(jax.random.key(0)))
    asked = data.take(whole.test.images, slice(6))
    outputs = network.apply(variables, jax.tree.map(jnp.asarray, asked))[0]
    expected = scores_by_hand(
        kind, variables["params"], asked["head"].values, asked["relation"].values
    )
    np.testing.assert_allclose(outputs.logits, expected, rtol=2e-4, atol=2e-4)
    moduli = [np.asarray(x) for x in outputs.embeddings]
    np.testing.assert_array_equal(moduli[0], moduli[2])
    table = np.float64(variables["params"]["entities"][asked["head"].values])
    if kind == "complex":
        table = table[:, :4] + 1j * table[:, 4:]
    np.testing.assert_allclose(moduli[0], np.abs(table), rtol=1e-5, atol=1e-6)


def test_a_function_of_an_edge_compares_the_embeddings_of_a_frozen_teacher():
    """Which were none to it, so that functions that walk them by pairs gave 0."""

    def gap(student, teacher, labels, hyper):
        pairs = zip(student.embeddings, teacher.embeddings, strict=False)
        return sum(jnp.square(s - t).mean(-1) for s, t in pairs) + jnp.zeros(len(labels))

    whole = data.load(NAME)
    network = models.build("distmult_4", whole.classes, whole.inputs)
    shapes = Shapes(network.output_shapes, (network.output_shapes,), whole.classes, 8)
    method = EdgeMethod(name="gap", loss=gap).for_shapes(shapes)
    assert method.needs == ("embeddings",)
    asked = jax.tree.map(jnp.asarray, data.take(whole.test.images, slice(6)))
    own, other = (network.init(jax.random.key(seed)) for seed in (0, 1))
    frozen = FrozenTeachers((network,), teacher_needs((("gap", method),)))
    (shown,) = frozen.outputs((other,), asked, None).each()
    student = network.apply(own, asked)[0]
    labels = jnp.zeros(6, jnp.int32)
    expected = gap(student, network.apply(other, asked)[0], labels, None)
    assert expected.min() > 0
    np.testing.assert_allclose(gap(student, shown, labels, None), expected, rtol=1e-5)


def test_a_run_is_measured_and_chooses_by_the_filtered_rank(monkeypatch):
    """Also in pieces, as all logits of so many entities would not be at hand at once."""
    whole = data.load(NAME)
    results = distill_jax.run(CONFIG, progress=False)
    (row,) = results.rows
    key = ("direct", "complex_4", 0)
    scores = results.logits(whole.test.images, *key)
    known = known_of(whole.train, whole.valid, whole.test)
    expected = by_hand(scores, whole.test.labels, questions(whole.test), known)
    np.testing.assert_allclose([row[f"test_{x}"] for x in METRICS], expected, rtol=1e-6)
    history = results.histories[key]
    best = max(range(2), key=lambda i: (history[i]["valid_mrr"], i))
    assert row["best_epoch"] == best + 1 and row["valid_mrr"] == history[best]["valid_mrr"]
    assert {"train_ce", "train_kl", "train_n3"} <= history[0].keys()
    monkeypatch.setattr(inference, "at_once", lambda classes: 16)
    (again,) = distill_jax.run(CONFIG, progress=False).rows
    for name in (*(f"test_{x}" for x in METRICS), "test_accuracy", "ece", "valid_mrr"):
        assert again[name] == pytest.approx(row[name], rel=1e-6), name
    for name in ("agreement", "kl"):
        assert again[name] == pytest.approx(row[name], rel=1e-5)


# ------------------------------------------------------------------------------------------- files
LINES = ["ann\tknows\tbob", "bob\tknows\tcid", "cid\tlikes\tann"]


def folder(path, **parts):
    for part in ("train", "valid", "test"):
        (path / f"{part}.txt").write_text("\n".join([*parts.get(part, LINES), ""]))
    return path


def test_names_are_numbered_in_their_order_and_kept(tmp_path):
    whole = data.load(f"triples:{folder(tmp_path)}")
    assert whole.classes == 3
    np.testing.assert_array_equal(whole.train.images["head"].values, [0, 1, 2, 1, 2, 0])
    np.testing.assert_array_equal(whole.train.images["relation"].values, [0, 0, 1, 2, 2, 3])
    assert whole.task.files["entities.txt"].split() == ["ann", "bob", "cid"]
    folder(tmp_path, test=["ann\tknows\tdan"])
    other = data.load(f"triples:{tmp_path}")
    assert other.spec["head"].source != whole.spec["head"].source


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    whole = data.load(f"triples:{folder(tmp_path)}")
    (tmp_path / "train.txt").write_text("\n".join(LINES), encoding="utf-8-sig")
    marked = data.load(f"triples:{tmp_path}")
    assert marked.task.files == whole.task.files and marked.classes == 3


def archive(path, **changes):
    triples = np.array([[0, 0, 1], [1, 1, 2], [2, 0, 0]], np.int32)
    arrays = {**dict.fromkeys(("train", "valid", "test"), triples), "entities": 3, "relations": 2}
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def test_archives_go_by_their_names(tmp_path):
    archive(tmp_path / "wn18rr.npz")
    whole = data.load("wn18rr", data_dir=str(tmp_path))
    assert whole.name == "wn18rr" and whole.spec["relation"].size == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"test": np.zeros((2, 2), np.int32)},
            r"test is int32 \(2, 2\): expected integers \(N, 3\)",
        ),
        ({"valid": np.array([[0, 0, 3]])}, "valid has the tail 3 in triple 0 .*expected 0 to 2"),
        ({"train": np.array([[-1, 0, 1]])}, "train has the head -1 in triple 0"),
        ({"train": np.array([[0, 2, 1]])}, "train has the relation 2 in triple 0 .*0 to 1"),
        ({"entities": None}, "has no entities: expected"),
        ({"test": np.zeros((0, 3), np.int32)}, "test has no triples"),
    ],
)
def test_archives_that_are_not_so(tmp_path, changes, message):
    archive(tmp_path / "a.npz", **changes)
    with pytest.raises(data.DataError, match=message) as caught:
        data.load("triples:a.npz", data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_so(tmp_path):
    for lines, message in (
        (["ann\tknows"], "valid.txt line 1 has 2 columns: expected head, relation and tail"),
        ([], "valid.txt has no triples"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.load(f"triples:{folder(tmp_path, valid=lines)}")
    for name, message in (
        ("fb15k237", "fb15k237 was not found in .*Nothing was downloaded"),
        ("triples:gone", "triples:gone is at .*where nothing is"),
        ("synthetic_triples:3:x", "synthetic_triples is '3:x': expected"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.load(name, data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"networks": ("complex_8", "bilstm_4")}, "bilstm_4 takes tokens"),
        ({"networks": ("complex_8", "plane2")}, "plane2 takes images"),
        (
            {"dataset": {"name": "synthetic:8x8x1:4:96:32"}, "networks": ("plane4", "plane2")},
            "n3 weighs embeddings, and the student shows none",
        ),
    ],
)
def test_networks_that_do_not_fit(config, message):
    with pytest.raises(distill_jax.ConfigError, match=message):
        distill_jax.run({**CONFIG, **config}, progress=False)


def test_a_metric_of_the_task_has_to_be_there_to_choose_by():
    known = ranking.known_answers(np.zeros(1), np.zeros(1), np.zeros(1), 1)
    spec = {"head": data.Indices(np.int32(0), 5), "relation": data.Indices(np.int32(0), 1)}
    with pytest.raises(data.DataError, match="select_by is 'mr': expected one of accuracy, mrr, "):
        data.Task(spec, 5, metrics=ranking.rank_metrics(known), select_by="mr")
