"""The tables of TAKD (arXiv 1902.03393)."""

from __future__ import annotations

import itertools

from experiments.reproduce.tables import Claim, Row, Table

PLAIN = ("plane10", "plane8", "plane6", "plane4", "plane2")
RESNETS = ("resnet110", "resnet56", "resnet32", "resnet20", "resnet14", "resnet8")
# λ and T that the author gave for ResNet 110 -> 20, 110 -> 8 and 110 -> 20 -> 8 on CIFAR-100.
FIRST, ALONE, LAST = ((0.5, 5.0), (0.2, 2.0), (0.15, 5.0))


def _numbers(kd_weight: float, temperature: float) -> dict[str, float]:
    return {"kd_weight": kd_weight, "temperature": temperature}


def _recipe(kd_weight: float, temperature: float) -> dict[str, float]:
    return {f"recipe.{name}": x for name, x in _numbers(kd_weight, temperature).items()}


def _main(kind: str, dataset: str, networks: tuple[str, ...], *figures: float) -> Table:
    return Table(
        name=f"takd-{kind}-{dataset}",
        dataset=dataset,
        config=f"takd_{kind}:{dataset}",
        networks=networks,
        rows=(
            Row("NOKD", "none", figures[0]),
            Row("BLKD", "direct", figures[1]),
            Row("TAKD", "chain", figures[2]),
        ),
    )


def _sizes(kind: str, dataset: str, networks: tuple[str, ...], *figures: float) -> Table:
    """A row for each assistant between the largest network and the smallest."""
    first, *assistants, last = networks
    pairs = zip(assistants, figures, strict=True)
    return Table(
        name=f"takd-size-{kind}-{dataset}",
        dataset=dataset,
        config=f"takd_{kind}:{dataset}",
        networks=networks,
        rows=tuple(Row(f"TA {name}", f"{first}>{name}>{last}", x) for name, x in pairs),
    )


def _methods(student: str, assistant: str, *figures: float) -> Table:
    """The methods that TAKD is compared with, from ResNet-26 in 80 epochs."""
    teacher = "resnet26"
    taught = f"{student}<{teacher}"
    rows = (
        Row("NOKD", "none"),
        Row("BLKD", "direct"),
        Row("FitNet", taught, setting="fitnet"),
        Row("AT", taught, setting="at"),
        Row("FSP", taught, setting="fsp"),
        Row("BSS", taught, changes={"methods": {"bss": 2.0, "kd": 1.0}}),
        Row("MUTUAL", f"{teacher}<{student};{taught}", changes={"methods": {"dml": 1.0}}),
        Row("TAKD", "chain"),
    )
    return Table(
        name=f"takd-methods-{student}-cifar10",
        dataset="cifar10",
        config="takd_resnet:cifar10",
        networks=(teacher, assistant, student),
        rows=tuple(Row(**{**vars(r), "published": x}) for r, x in zip(rows, figures, strict=True)),
        changes={"recipe.epochs": 80},
        note="FitNet, AT and FSP with the weights of the field's codes, BSS and mutual learning "
        "with their usual ones: those of the paper are not known.",
    )


def _paths(dataset: str) -> Table:
    """All 16 paths that begin with the largest network; that of itself alone has no row."""
    teacher, *others = PLAIN
    rows: list[Row] = []
    claims: list[Claim] = []
    for place, student in enumerate(others):
        size = student.removeprefix("plane")
        rows.append(Row(f"{size} alone", "none", network=student))
        labels = []
        for count in range(place + 1):
            for through in itertools.combinations(others[:place], count):
                path = (teacher, *through, student)
                label = ">".join(name.removeprefix("plane") for name in path)
                rows.append(Row(label, ">".join(path), network=student))
                labels.append(label)
        direct, *paths = labels
        claims += [Claim(path, worse) for path in paths for worse in (f"{size} alone", direct)]
        if student in ("plane4", "plane2"):  # of these the full path is said to be the best
            claims += [Claim(labels[-1], path) for path in paths[:-1]]
    return Table(
        name=f"takd-paths-{dataset}",
        dataset=dataset,
        config=f"takd_plain:{dataset}",
        networks=PLAIN,
        rows=tuple(rows),
        order=tuple(claims),
        note="The 15 paths from 10 that reach a student; the 16th is 10 itself. Published as a "
        "figure: each with an assistant beats its student alone and by the teacher, the full one "
        "is best for 4 and 2.",
    )


TABLES = (
    _main("plain", "cifar10", ("plane10", "plane4", "plane2"), 70.16, 72.57, 73.51),
    _main("plain", "cifar100", ("plane10", "plane4", "plane2"), 41.09, 44.57, 44.92),
    _main("resnet", "cifar10", ("resnet110", "resnet20", "resnet8"), 88.52, 88.65, 88.98),
    Table(
        name="takd-resnet-cifar100",
        dataset="cifar100",
        config="takd_resnet:cifar100",
        networks=("resnet110", "resnet20", "resnet8"),
        rows=(
            Row("NOKD", "none", 61.37),
            Row("BLKD", "direct", 61.41, changes=_recipe(*ALONE)),
            Row("TAKD", "chain", 61.82, changes={"overrides": {"resnet20": _numbers(*FIRST)}}),
        ),
        changes=_recipe(*LAST),
    ),
    Table(
        name="takd-resnet-imagenet",
        dataset="tfds:imagenet2012",
        config="teskd_imagenet_resnet18",
        networks=("imagenet_resnet50", "imagenet_resnet34", "imagenet_resnet18"),
        rows=(
            Row("NOKD", "none", 65.20),
            Row("BLKD", "direct", 66.60),
            Row("TAKD", "chain", 67.36),
        ),
        note="Published for ResNet-50, 20 and 14, whose blocks are not known: here 50, 34 and 18, "
        "in the usual 90 epochs, so that only the order can be compared.",
    ),
    _sizes("plain", "cifar10", PLAIN, 72.75, 73.15, 73.51),
    _sizes("plain", "cifar100", PLAIN, 44.28, 44.57, 44.92),
    _sizes("resnet", "cifar10", RESNETS, 88.70, 88.73, 88.90, 88.98),
    _sizes("resnet", "cifar100", RESNETS, 61.47, 61.55, 61.82, 61.5),
    _methods("resnet8", "resnet14", 86.02, 86.66, 86.73, 86.86, 87.07, 87.32, 87.71, 88.01),
    _methods("resnet14", "resnet20", 89.11, 89.75, 89.72, 89.84, 89.92, 90.34, 90.54, 91.23),
    _paths("cifar10"),
    _paths("cifar100"),
)
