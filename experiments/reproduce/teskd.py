"""The tables of TESKD (arXiv 2110.00329)."""

from __future__ import annotations

from experiments.reproduce.tables import Row, Table, rising

UNKNOWN = "No figures of this backbone are at hand; the order is what the paper says of its method."


def _rows(backbone: str, plain: float | None, evolved: float | None) -> tuple[Row, ...]:
    grown = f"evolving:{backbone}"
    detached = {"evolve.detach_target": True}
    return (
        Row("plain", "none", plain, backbone),
        Row("TESKD", "none", evolved, grown),
        Row("TESKD, detached", "none", None, grown, detached),
    )


def _cifar100(name: str, plain: float | None = None, evolved: float | None = None) -> Table:
    backbone = f"cifar_{name}"
    return Table(
        name=f"teskd-{name}-cifar100",
        dataset="cifar100",
        config=f"teskd_cifar100:{name}",
        networks=(backbone, f"evolving:{backbone}"),
        rows=_rows(backbone, plain, evolved),
        order=() if evolved else rising("plain", "TESKD"),
        note="" if evolved else UNKNOWN,
    )


TABLES = (
    _cifar100("resnet18", 74.41, 79.15),
    _cifar100("resnet34"),
    _cifar100("senet18"),
    _cifar100("resnext18"),
    _cifar100("vgg16"),
    Table(
        name="teskd-resnet18-imagenet",
        dataset="tfds:imagenet2012",
        config="teskd_imagenet_resnet18",
        networks=("imagenet_resnet18", "evolving:imagenet_resnet18"),
        rows=_rows("imagenet_resnet18", 69.71, 71.14),
    ),
)
