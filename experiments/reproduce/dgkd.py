"""The tables of DGKD (arXiv 2009.08825)."""

from __future__ import annotations

from experiments.reproduce.tables import Claim, Row, Table, rising

PLAIN = ("plane10", "plane8", "plane6", "plane4", "plane2")
STOCHASTIC = "DGKD + drop"
# Assistants are kept with probability 0.75, the teacher always.
DROPPING = {
    "dropping.kind": "bernoulli",
    "dropping.survival": 0.75,
    "dropping.teacher_droppable": False,
}
ORDER = rising("TAKD", "DGKD", STOCHASTIC)
UNKNOWN = "No figures of this row are at hand; the order is what the paper says of its method."


def _rows(takd=None, dgkd=None, stochastic=None, kd=None) -> tuple[Row, ...]:
    return (
        Row("NOKD", "none"),
        Row("KD", "direct", kd),
        Row("TAKD", "chain", takd),
        Row("DGKD", "dense", dgkd),
        Row(STOCHASTIC, "dense+drop", stochastic),
    )


def _survival(probability: float, published: float | None = None) -> Row:
    changes = {"dropping.survival": probability}
    return Row(f"p = {probability:g}", "dense+drop", published, changes=changes)


TABLES = (
    Table(
        name="dgkd-plain-cifar10",
        dataset="cifar10",
        config="dgkd_plain:cifar10",
        networks=PLAIN,
        rows=_rows(),
        changes=DROPPING,
        order=ORDER,
        note=UNKNOWN,
    ),
    Table(
        name="dgkd-plain-cifar100",
        dataset="cifar100",
        config="dgkd_plain:cifar100",
        networks=PLAIN,
        rows=_rows(45.14, 48.92, 50.15),
        changes=DROPPING,
    ),
    Table(
        name="dgkd-resnet-cifar10",
        dataset="cifar10",
        config="dgkd_resnet:cifar10",
        networks=("resnet26", "resnet20", "resnet14", "resnet8"),
        rows=_rows(88.01, 89.02, 89.66),
        changes=DROPPING,
    ),
    Table(
        name="dgkd-resnet-cifar100",
        dataset="cifar100",
        config="dgkd_resnet:cifar100",
        networks=("resnet110", "resnet56", "resnet32", "resnet20", "resnet8"),
        rows=_rows(),
        changes=DROPPING,
        order=ORDER,
        note=UNKNOWN,
    ),
    Table(
        name="dgkd-resnet-imagenet",
        dataset="tfds:imagenet2012",
        config="teskd_imagenet_resnet18",
        networks=("imagenet_resnet50", "imagenet_resnet34", "imagenet_resnet18"),
        rows=_rows(71.37, 71.73, kd=70.57)[:-1],
        changes={"loss.teachers": "sum"},
        note="Published for ResNet-34 to 18, over assistants that are not known: here 50, 34 and "
        "18, in the usual 90 epochs, so that only the order can be compared.",
    ),
    Table(
        name="dgkd-seven-cifar100",
        dataset="cifar100",
        config="dgkd_plain:cifar100",
        networks=tuple(f"plane{size}" for size in range(10, 1, -1)),
        rows=(Row("TAKD", "chain", 44.07), Row("DGKD", "dense", 49.56)),
    ),
    Table(
        name="dgkd-survival-cifar100",
        dataset="cifar100",
        config="dgkd_plain:cifar100",
        networks=PLAIN,
        rows=(
            _survival(0.25),
            _survival(0.5),
            _survival(0.75, 50.15),
            Row("p = 1", "dense", 48.92),
        ),
        changes=DROPPING,
        order=tuple(Claim("p = 0.75", f"p = {p}") for p in ("0.25", "0.5", "1")),
        note="Assistants are kept with probability p, the teacher always; 0.75 is said to be best.",
    ),
    Table(
        name="dgkd-wrn-cifar100",
        dataset="cifar100",
        config="compare_cifar100:wrn_40_2:wrn_16_2",
        networks=("wrn_40_2", "wrn_34_2", "wrn_28_2", "wrn_22_2", "wrn_16_2"),
        rows=_rows(75.04, 76.24),
        changes={**DROPPING, "loss.teachers": "sum"},
        note="By the recipe of the literature that compares on this pair, weights of the last "
        "epoch: the paper's is not known, nor a figure of stochastic teaching.",
    ),
)
