"""What a published table is: its rows, how each is trained, and the order that it claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: a network that is trained in one way.

    Args:
      label: its name in the table.
      guidance: who teaches whom, as `config.guidance`.
      published: accuracy in percent; None where no figure is at hand.
      network: whose accuracy it is; the table's last where empty.
      changes: fields of the config that differ from the table's, dotted.
      setting: the name of a method as `experiments.compare` sets it; "" leaves the config's.
    """

    label: str
    guidance: str
    published: float | None = None
    network: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    setting: str = ""


class Claim(NamedTuple):
    """What a paper says of two rows, by their labels."""

    better: str
    worse: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A published table.

    Args:
      name: begins with the paper's.
      dataset: as `config.dataset.name`.
      config: the file that has its recipe, with arguments, as `load_config` takes it.
      networks: largest first.
      rows: in the paper's order.
      changes: fields of the config that differ, dotted.
      order: what is claimed where figures do not say it; empty takes it from them.
      note: what the reader has to know, one sentence or two.
    """

    name: str
    dataset: str
    config: str
    networks: tuple[str, ...]
    rows: tuple[Row, ...]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    order: tuple[Claim, ...] = ()
    note: str = ""

    def network_of(self, row: Row) -> str:
        """Whose accuracy a row is."""
        return row.network or self.networks[-1]

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The published order: of each row that has a figure and the one before it that has."""
        if self.order:
            return self.order
        known = [row for row in self.rows if row.published is not None]
        pairs = zip(known, known[1:], strict=False)
        by_figure = [sorted(pair, key=lambda row: row.published) for pair in pairs]
        return tuple(
            Claim(better.label, worse.label)
            for worse, better in by_figure
            if worse.published != better.published
        )


def rising(*labels: str) -> tuple[Claim, ...]:
    """The claims that each of these is better than the one before it."""
    return tuple(Claim(one, before) for before, one in zip(labels, labels[1:], strict=False))
