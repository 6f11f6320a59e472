"""What the page says of records, without a run."""

import json
import re

from distill_jax.report.page import RunRecord, StageRecord, charts, graph, sections
from distill_jax.runs.run_record import read_record

SEEDS = (0, 1, 2)


def row(guidance, seed, stage, teachers=(), **others):
    about = {"graph": guidance, "changes": {}, "control": False, "backbone": "plane2"}
    about |= {"protocol": "standard", "selection": "validation", "parameters": 100}
    measured = {"test_accuracy": 0.5, "last_test_accuracy": 0.5, "ece": 0.1}
    taught = {"teachers": list(teachers), "agreement": dict.fromkeys(teachers, 0.75)}
    taught["kl"] = dict.fromkeys(teachers, 0.5)
    about |= {"guidance": guidance, "network": "plane2", "seed": seed, "stage": stage}
    return about | measured | taught | others


def stage(seed, epochs, accuracy=0.5, **others):
    history = [
        {"epoch": epoch, "valid_accuracy": accuracy, "train_loss": 1.0, "train_weighted_ce": 1.0}
        for epoch in range(1, epochs + 1)
    ]
    about = {"guidance": ("none",), "edges": {}, "epochs": 4, "history": history}
    return StageRecord(id=f"s{seed}", network="plane2", seed=seed, **about | others)


def record(rows=(), stages=()):
    return RunRecord("small", list(rows), list(stages), ("plane2",), {}, {})


def marks(picture):
    """What is drawn within the axes, ticks apart."""
    return re.findall("<use ", "".join(re.findall("<g clip-path.*?</g>", picture.svg)))


def test_seeds_under_which_one_network_stands_have_no_spread():
    """Its seed is fixed, or its weights are given: one training has no deviation."""
    rows = [row("direct", seed, "one", ["plane4"]) for seed in SEEDS]
    assert sections.fidelity(record(rows)).rows == [
        ["direct", "plane2", "10.00", "plane4", "75.00", "0.5000"]
    ]
    (picture,) = charts.results([record(rows)])
    assert len(marks(picture)) == 2  # the seed and the mean, without the caps of a deviation
    (picture,) = charts.agreement(record(rows))
    assert len(marks(picture)) == 1
    apart = [row("direct", seed, f"of {seed}", ["plane4"]) for seed in SEEDS]
    assert sections.fidelity(record(apart)).rows[0][4] == "75.00 ± 0.00"
    (picture,) = charts.results([record(apart)])
    assert len(marks(picture)) == 3 + 1 + 2


def test_a_picture_says_over_how_many_seeds_its_means_are():
    (picture,) = charts.curves(record(stages=[stage(seed, 4) for seed in SEEDS]))
    assert picture.note == "mean of 3 seeds; the band is from the lowest to the highest"
    (picture,) = charts.curves(record(stages=[stage(0, 4), stage(1, 4), stage(2, 1)]))
    assert picture.note.startswith("mean of the seeds that have the epoch, 2 to 3; the band")
    taught = stage(0, 4, guidance=("direct",))
    (picture,) = charts.curves(record(stages=[stage(0, 4), stage(1, 4), taught]))
    assert picture.note.startswith("mean of the seeds that have the epoch, 1 to 2; the band")
    (picture,) = charts.curves(record(stages=[stage(0, 4)]))
    assert not picture.note


def test_teachers_whose_agreement_is_not_measured_are_named():
    """Those that learn together with their student are; agreement is with frozen ones."""
    live = row("mutual", 0, "a", agreement={}, kl={}, teachers=["plane6", "plane4"])
    table = sections.fidelity(record([live]))
    assert [line[3:] for line in table.rows] == [["plane6", "", ""], ["plane4", "", ""]]
    assert "agreement: it is measured with frozen teachers alone" in sections.missing(
        record([live])
    )
    frozen = row("chain", 0, "b", ["plane4"])
    assert not any("agreement" in line for line in sections.missing(record([frozen])))
    alone = record([row("none", 0, "c")])
    assert sections.fidelity(alone).rows[0][3] == "-"
    assert "agreement: no network of the table has a teacher" in sections.missing(alone)


def test_a_teacher_that_was_lost_is_said_to_have_failed():
    """It is no result; its students' rows name it."""
    ways = {"edges": {}, "epochs": 4}
    teacher = StageRecord("t", "plane4", 0, ("direct",), **ways)
    student = StageRecord("s", "plane2", 0, ("direct",), **ways | {"edges": {"plane4": ("kd",)}})
    lost = {"failed": "plane4, seed 0: step 2", "failed_stages": ["s", "t"]}
    run = record([row("direct", 0, "s", ["plane4"], **lost)], [teacher, student])
    assert [line[4] for line in sections.stages(run).rows] == ["0 of 1, 1 failed"] * 2
    (picture,) = graph.graphs(run)
    assert picture.svg.count(">failed<") == 2 and "not finished" not in picture.svg


def test_labels_that_have_commas_are_told_apart():
    swept = ("direct, temperature=1.0", "direct, temperature=4.0")
    run = record(stages=[stage(0, 1, guidance=swept), stage(0, 1, guidance=("direct", "chain"))])
    labels = [group.label for group in run.groups]
    assert labels == ["direct, temperature=1.0; direct, temperature=4.0", "direct, chain"]


def test_a_network_whose_weights_were_given_is_there(tmp_path):
    """It has no folder: where it is a result its row tells of it."""
    about = {"stage": "t", "network": "plane4", "teachers": [], "seed": 0, "guidance": ["direct"]}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text(json.dumps({"stages": [about | {"epochs": 0}]}))
    run = read_record(tmp_path)
    assert sections.state(run) == "1 of 1 stages are done"
    assert sections.stages(run).rows[0][4:] == ["weights are given", "", "", ""]
    (picture,) = graph.graphs(run)
    assert ">given<" in picture.svg and "not finished" not in picture.svg
    rows = [row("direct", 0, "t", network="plane4", seconds=0.0, epochs=0)]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    run = read_record(tmp_path)
    assert sections.state(run) == "1 of 1 stages are done"
    assert sections.stages(run).rows[0][4:6] == ["weights are given", "50.00 %"]
    (picture,) = graph.graphs(run)
    assert ">50.00 %<" in picture.svg
    assert [picture.name for picture in charts.efficiency(run)] == ["parameters"]
    assert not charts.costs(run)
