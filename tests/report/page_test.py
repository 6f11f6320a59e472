"""What the page says of records, without a run."""

import re

from distill_jax.report.page import RunRecord, StageRecord, charts, sections

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
