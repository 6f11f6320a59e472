"""The kinds of networks with branches: PREFIX:NAME is the network NAME with a kind's branches."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn

from distill_jax.models.zoo import evolving
from distill_jax.models.zoo.branches import Branched, Exits, Peers


class Kind(NamedTuple):
    """Networks with branches of one kind.

    Args:
      method: the method that trains the branches, which such a network brings.
      build: (backbone's module, classes) and, where the branches are peers, their number -> module.
      peers: how many peers there are beside the network itself; PREFIXn:NAME has n. 0 where there
        are as many branches as the stages ask for.
    """

    method: str
    build: Callable[..., Branched]
    peers: int = 0

    def grow(self, backbone: nn.Module, classes: int, peers: int) -> Branched:
        """The module with the branches; `peers` is 0 where their number is not told."""
        return self.build(backbone, classes, *([peers or self.peers] if self.peers else []))


BRANCHED: dict[str, Kind] = {
    "evolving": Kind("teskd", evolving.build),
    "one": Kind("one", Peers, 2),
    "okddip": Kind("okddip", Peers, 3),
    "byot": Kind("byot", Exits),
    "dks": Kind("dks", Exits),
}


class Prefix(NamedTuple):
    """The parts of a network's name.

    Args:
      kind: of its branches; None where it has none.
      peers: their number, 0 where it is not told.
      backbone: the name of the network without branches.
    """

    kind: Kind | None
    peers: int
    backbone: str


def split_name(name: str) -> Prefix:
    """The parts of a network's name; what begins with no prefix is a backbone."""
    match = re.fullmatch(r"([a-z]+)([1-9][0-9]?)?:(.*)", name, re.DOTALL)
    kind = BRANCHED.get(match[1]) if match else None
    if match is None or kind is None or (match[2] and not kind.peers):
        return Prefix(None, 0, name)
    return Prefix(kind, int(match[2] or 0), match[3])


def backbone_name(name: str) -> str:
    """The name of the network that is left when the branches of `name` go; any other as it is."""
    return split_name(name).backbone
