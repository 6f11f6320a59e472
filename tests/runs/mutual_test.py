"""Runs of graphs with cycles: rows, weights and recipes of each network; saved as one."""

import itertools
import json

import jax
import numpy as np
import pytest
from marks import slow

import distill_jax
from distill_jax import models
from distill_jax.runs import stage_folder
from distill_jax.runs.checkpoint import CheckpointError
from distill_jax.runs.config import ConfigError
from distill_jax.train import fit
from distill_jax.train.reporter import Reporter

BASE = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("mutual",),
    "recipe": {"epochs": 2, "batch_size": 12},
}
PAIR = ("plane4", "plane2")


def run(workdir=None, reporter=None, stop=None, **changes):
    return distill_jax.run({**BASE, **changes}, workdir=workdir, reporter=reporter, stop=stop)


def by_network(results, guidance="mutual", seed=0):
    return {
        row["network"]: row
        for row in results.rows
        if (row["guidance"], row["seed"]) == (guidance, seed)
    }


def same_weights(one, other, exactly=True):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if exactly:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def mutual():
    return run()


class Started(Reporter):
    """Notes how many networks were trained at once."""

    def __init__(self):
        self.at_once = []

    def stage_started(self, stages, step, steps, histories):
        """The names."""
        self.at_once.append([stage.network.name for stage in stages])


# ----------------------------------------------------------------------- one row, weights, history
def test_each_network_of_a_cycle_has_its_own_row_history_and_weights(mutual):
    rows = by_network(mutual)
    assert tuple(rows) == PAIR
    for name, other in itertools.permutations(PAIR):
        row = rows[name]
        assert row["teachers"] == [other] and row["graph"] == "mutual"
        network, variables = mutual.networks["mutual", name, 0]
        assert network == models.build(name, 4, (8, 8, 1))
        assert row["parameters"] == models.count_parameters(network)
        history = mutual.histories["mutual", name, 0]
        assert [record["epoch"] for record in history] == [1, 2]
        assert all(record["train_dml"] > 0 for record in history)
        best = max(range(2), key=lambda i: (history[i]["valid_accuracy"], i))
        assert row["best_epoch"] == best + 1
        assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, network.shapes)
    assert rows["plane4"]["stage"] != rows["plane2"]["stage"]
    assert rows["plane4"]["state_digest"] != rows["plane2"]["state_digest"]


@pytest.mark.parametrize("clip", [*slow(0.0), 0.01])
def test_in_a_cycle_a_network_draws_and_clips_as_it_does_alone(clip):
    """By teaching that counts nothing: what is left is each one's own training."""
    recipe = {**BASE["recipe"], "augment": "crop_flip", "clip_norm": clip}
    networks = ("plane2", "plane2#2")
    results = run(
        networks=networks,
        students=networks,
        guidance=("none", "mutual"),
        methods={"dml": 0.0},
        recipe=recipe,
    )
    for name in networks:
        (_, alone), (_, together) = (results.networks[x, name, 0] for x in ("none", "mutual"))
        same_weights(alone, together, exactly=False)
        losses = [
            [record["train_ce"] for record in results.histories[x, name, 0]]
            for x in ("none", "mutual")
        ]
        np.testing.assert_allclose(*losses, rtol=1e-5)
    first, second = (results.histories["none", name, 0][0]["train_ce"] for name in networks)
    assert first != second


def test_students_that_are_named_are_the_rows_and_the_others_are_trained_all_the_same(mutual):
    results = run(students=("plane4",), guidance=("none", "mutual"))
    assert [(row["guidance"], row["network"]) for row in results.rows] == [
        ("none", "plane4"),
        ("mutual", "plane4"),
    ]
    digest = by_network(mutual)["plane4"]["state_digest"]
    assert by_network(results)["plane4"]["state_digest"] == digest


# ------------------------------------------------------------------------------------------ graphs
GRAPH = "plane4<plane6+plane2;plane2<plane4;plane2#2<plane2"
NAMES = ("plane6", "plane4", "plane2", "plane2#2")


def test_edges_into_and_out_of_a_cycle_are_frozen_and_inside_it_live():
    started = Started()
    results = run(networks=NAMES, guidance=(GRAPH,), students=NAMES, reporter=started)
    assert started.at_once == [["plane6"], ["plane4", "plane2"], ["plane2#2"]]
    rows = by_network(results, GRAPH)
    assert [rows[name]["teachers"] for name in NAMES] == [
        [],
        ["plane6", "plane2"],
        ["plane4"],
        ["plane2"],
    ]
    terms = {
        name: {k for k in results.histories[GRAPH, name, 0][0] if k in ("train_kl", "train_dml")}
        for name in NAMES
    }
    assert terms == {
        "plane6": set(),
        "plane4": {"train_kl", "train_dml"},
        "plane2": {"train_dml"},
        "plane2#2": {"train_kl"},
    }
    assert set(rows["plane4"]["agreement"]) == {"plane6"}
    history = results.histories[GRAPH, "plane4", 0]
    for record in history:  # (1 - λ) CE + λT² KL + KL to the peer
        parts = [record[f"train_weighted_{name}"] for name in ("ce", "kl", "dml")]
        assert record["train_loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert parts[0] == pytest.approx(0.5 * record["train_ce"], rel=1e-5)


def test_a_cycle_with_a_cache_of_its_frozen_teachers_trains_as_without():
    graph = "plane4<plane6+plane2;plane2<plane4+plane6"
    losses = []
    for how in ("graph", "table"):
        results = run(networks=NAMES[:3], guidance=(graph,), teacher_logits=how)
        losses.append([x["train_loss"] for x in results.histories[graph, "plane2", 0]])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_matrix_is_the_graph_of_its_edges(mutual):
    results = run(guidance=(((0, 1), (1, 0)),))
    label = "plane4<plane2;plane2<plane4"
    for name, row in by_network(mutual).items():
        assert by_network(results, label)[name]["stage"] == row["stage"]


@pytest.mark.parametrize("other", [{}, *slow({"fitnet": 1.0})])
def test_any_method_travels_along_live_edges(other):
    results = run(methods={"kd": 1.0, **other})
    for name in PAIR:
        record = results.histories["mutual", name, 0][0]
        assert all(record[f"train_{term}"] > 0 for term in ("kl", *other))
        assert record["train_weighted_ce"] == pytest.approx(0.5 * record["train_ce"], rel=1e-5)


def test_a_network_that_teaches_itself_is_shown_itself():
    """By a term that is zero only where both are the same, and by one that sees who they are."""

    def gap(student, teacher, labels, hyper):
        return ((student.logits - teacher.logits) ** 2).sum(-1)

    def lower(student, teacher, labels, hyper):
        return (student.logits * teacher.logits).mean(-1)

    distill_jax.register_method("own_gap", gap)
    distill_jax.register_method("own_product", lower)
    results = run(guidance=("plane2<plane2",), methods={"own_gap": 1.0, "own_product": 1.0})
    ((_, record),) = by_network(results, "plane2<plane2").items()
    assert record["teachers"] == ["plane2"] and record["network"] == "plane2"
    epoch = results.histories["plane2<plane2", "plane2", 0][0]
    assert epoch["train_own_gap"] == 0 and epoch["train_own_product"] > 0


def test_dropping_in_a_cycle_is_of_frozen_teachers():
    graph = "plane4<plane2;plane2<plane4+plane6+plane6#2+drop"
    results = run(networks=("plane6", "plane6#2", *PAIR), guidance=(graph,))
    for record in results.histories[graph, "plane2", 0]:
        assert record["train_kept"] == 0.5
    assert "train_kept" not in results.histories[graph, "plane4", 0][0]


# ------------------------------------------------------------------ devices, populations, own rules
@pytest.mark.devices
@pytest.mark.parametrize("parallel", ["jit", *slow("pmap")])
def test_devices_share_the_batch_of_a_cycle(mutual, parallel):
    results = run(parallel=parallel, devices=2)
    for name in PAIR:
        (_, expected), (_, variables) = (x.networks["mutual", name, 0] for x in (mutual, results))
        same_weights(expected, variables, exactly=False)


@pytest.mark.devices
def test_a_population_of_cycles_is_each_of_them_alone(mutual):
    started = Started()
    results = run(seeds=(0, 1), devices=2, population=2, reporter=started)
    assert started.at_once == [[*PAIR, *PAIR]]
    other = run(seeds=(1,))
    for seed, alone in ((0, mutual), (1, other)):
        for name, row in by_network(alone, seed=seed).items():
            assert by_network(results, seed=seed)[name]["state_digest"] == row["state_digest"]


def test_each_network_has_its_own_optimizer_and_numbers(mutual):
    own = {"plane2": {"optimizer": "adamw", "learning_rate": 1e-3, "methods": {"dml": 3.0}}}
    results = run(overrides=own)
    record = results.histories["mutual", "plane2", 0][0]
    assert record["learning_rate"] == pytest.approx(1e-3)
    assert record["train_weighted_dml"] == pytest.approx(3 * record["train_dml"], rel=1e-5)
    other = results.histories["mutual", "plane4", 0][0]
    assert other["learning_rate"] == pytest.approx(0.01)
    assert other["train_weighted_dml"] == pytest.approx(other["train_dml"], rel=1e-5)
    stages = [by_network(x)["plane4"]["stage"] for x in (results, mutual)]
    assert stages[0] != stages[1]  # it is taught by another network


# ------------------------------------------------------------------------------- saved and resumed
def outcome(results):
    return {name: (row["state_digest"], row["stage"]) for name, row in by_network(results).items()}


def test_a_cycle_that_is_stopped_and_resumed_ends_with_the_same_bytes(mutual, tmp_path):
    asked = itertools.count()
    with pytest.raises(fit.Interrupted):
        run(tmp_path, stop=lambda: next(asked) >= 3, checkpoint_every="1 step")
    saved = list(tmp_path.glob("stages/*/progress/*"))
    assert saved
    started = Started()
    assert outcome(run(tmp_path, reporter=started)) == outcome(mutual)
    assert started.at_once == [list(PAIR)]
    places = sorted(tmp_path.glob("stages/*"))
    assert len(places) == 2 and not list(tmp_path.glob("stages/*/progress"))
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sorted((x["network"], x["epoch"]) for x in lines) == [
        ("plane2", 1),
        ("plane2", 2),
        ("plane4", 1),
        ("plane4", 2),
    ]
    again = Started()
    assert outcome(run(tmp_path, reporter=again)) == outcome(mutual) and not again.at_once


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_run_that_ends_between_the_saves_of_a_cycle_loses_nothing(
    mutual, tmp_path, monkeypatch, failing
):
    """The first weights are safe and the second are not; or both are, and nothing is tidied."""
    saves, save, tidy = itertools.count(1), stage_folder.save, stage_folder.write_json

    def fails_at(count, function):
        def called(*arguments):
            if "results.json" in str(arguments[0]) or next(saves) != count:
                return function(*arguments)
            raise CheckpointError("the power went")

        return called

    with monkeypatch.context() as patch:
        patch.setattr(stage_folder, "save", fails_at(failing, save))
        patch.setattr(stage_folder, "write_json", fails_at(failing, tidy))
        with pytest.raises(CheckpointError, match="power"):
            run(tmp_path, checkpoint_every="1 step")
    assert list(tmp_path.glob("stages/*/progress"))
    assert outcome(run(tmp_path)) == outcome(mutual)
    assert not list(tmp_path.glob("stages/*/progress"))
    for place in tmp_path.glob("stages/*"):
        assert (place / "weights").exists() and (place / "result.json").exists()


# ---------------------------------------------------------------------------------------- refusals
def test_one_network_that_is_not_finite_stops_all_and_is_named():
    def spoilt(student, teacher, labels, hyper):
        return (0 * student.logits[:, 0]) ** 0.5  # 0, with a gradient of 0 times infinity

    distill_jax.register_method("spoilt", spoilt)
    with pytest.raises(FloatingPointError) as caught:
        run(overrides={"plane2": {"methods": {"spoilt": 1.0}}})
    assert str(caught.value).startswith(
        "mutual: plane4, plane2, seed 0: step 1 of 6 is not finite in gradients of plane2; its "
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "but epochs is 2 and 3"),
        ({"batch_size": 6}, "but batch_size is 12 and 6"),
        ({"augment": "flip"}, "but augment is 'none' and 'flip'"),
        ({"train_limit": 3}, "but train_limit is 0 and 3"),
        ({"last_batch": "keep"}, "but last_batch is 'drop' and 'keep'"),
        ({"sync_bn": False}, "but sync_bn is True and False"),
        ({"mixup": 0.2}, "but mixup is 0.0 and 0.2"),
        ({"cutmix": 1.0}, "but cutmix is 0.0 and 1.0"),
        ({"seed": 7}, "but seed is 0 and 7"),
    ],
)
def test_networks_of_a_cycle_that_do_not_agree_are_refused_with_both_values(changes, message):
    with pytest.raises(ConfigError) as caught:
        run(overrides={"plane2": changes})
    assert "plane4 and plane2 teach each other" in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": ("plane2<plane2",)}, "plane2 teaches plane2, but none of its methods does"),
        ({"guidance": ("chain",), "methods": {"dml": 1.0}}, "plane4 teaches plane2, but none"),
        ({"guidance": (((0, 1), (1,)),)}, "rows of a matrix of teachers have one length"),
        ({"guidance": (((0, 1, 1), (1, 0, 0)),)}, "shape (2, 2), got (2, 3)"),
        ({"guidance": (((0, 2), (1, 0)),)}, "holds only 0 and 1 (or booleans), got 2"),
        ({"guidance": ("mutual+drop",)}, "cannot drop 1 of 0 teachers"),
        ({"networks": ("plane2", "plane2#1")}, "plane2#2, plane2#3"),
        ({"networks": ("plane2",)}, "'mutual' guidance needs at least two networks"),
    ],
)
def test_graphs_that_cannot_be_trained_are_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError) as caught:
        run(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_networks_of_other_class_counts_are_refused():
    from flax import linen as nn

    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            return nn.Dense(3)(x.reshape(len(x), -1))

    distill_jax.register_network("narrow", lambda classes, inputs: Narrow())
    with pytest.raises(ConfigError, match="narrow.*4"):
        run(networks=("narrow", "plane2"))
