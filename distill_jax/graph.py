"""Who teaches whom: a square matrix over a row of networks, and the stages that follow from it.

Frozen networks teach along edges that lie on no cycle. Networks on a cycle are trained together by
one step and teach each other live; so does a network that teaches itself.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class GraphError(ValueError):
    """A row of networks, or a choice of teachers in it, that cannot be trained."""


class Component(NamedTuple):
    """Networks that are trained together: one, or those of a cycle, in the row's order.

    Args:
      networks: their names.
      teachers: those of each, in the row's order: frozen, but for those among `networks`.
    """

    networks: tuple[str, ...]
    teachers: tuple[tuple[str, ...], ...]

    def frozen(self, network: str) -> tuple[str, ...]:
        """The frozen teachers of one of its networks."""
        return tuple(name for name in self._of(network) if name not in self.networks)

    def live(self, network: str) -> tuple[str, ...]:
        """The teachers of one of its networks that are trained with it."""
        return tuple(name for name in self._of(network) if name in self.networks)

    def _of(self, network: str) -> tuple[str, ...]:
        return self.teachers[self.networks.index(network)]


@dataclasses.dataclass(frozen=True)
class Graph:
    """A row of networks and, for each of them, its teachers.

    Args:
      names: networks from the largest to the smallest.
      teachers: for each network the names of those that teach it; in the row's order whatever order
        they are given in.

    Raises:
      GraphError: empty row, duplicate or unknown name.
    """

    names: tuple[str, ...]
    teachers: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        _check_names(self.names)
        if len(self.teachers) != len(self.names):
            raise GraphError(
                f"{len(self.names)} networks need {len(self.names)} lists of teachers, "
                f"got {len(self.teachers)}"
            )
        for student, teachers in zip(self.names, self.teachers, strict=True):
            if len(set(teachers)) != len(teachers):
                raise GraphError(f"{student!r} names a teacher twice: {teachers}")
            for teacher in teachers:
                _check_known(teacher, self.names)
        ordered = tuple(tuple(sorted(own, key=self.names.index)) for own in self.teachers)
        object.__setattr__(self, "teachers", ordered)

    def matrix(self) -> np.ndarray:
        """(n, n) booleans: [i, j] is true where j teaches i."""
        matrix = np.zeros((len(self.names), len(self.names)), bool)
        for i, teachers in enumerate(self.teachers):
            matrix[i, [self.names.index(teacher) for teacher in teachers]] = True
        return matrix

    def of(self, network: str) -> tuple[str, ...]:
        """The teachers of one network, in the row's order."""
        _check_known(network, self.names)
        return self.teachers[self.names.index(network)]

    @property
    def edges(self) -> str:
        """The edges as text, such as `b<a;c<a+b`; "none" where there are none."""
        pairs = zip(self.names, self.teachers, strict=True)
        return ";".join(f"{name}<{'+'.join(own)}" for name, own in pairs if own) or "none"


def none(names: Sequence[str]) -> Graph:
    """Nobody teaches: each network is trained on the labels alone (NOKD)."""
    return _from_indices(names, lambda i: range(0))


def direct(names: Sequence[str]) -> Graph:
    """The largest teaches every other network: KD (Hinton et al. 2015; BLKD)."""
    _needs_two(names, "direct")
    return _from_indices(names, lambda i: range(min(i, 1)))


def chain(names: Sequence[str]) -> Graph:
    """Each network is taught by the one just before it: TAKD (Mirzadeh et al. 2020)."""
    _needs_two(names, "chain")
    return _from_indices(names, lambda i: range(max(i - 1, 0), i))


def dense(names: Sequence[str]) -> Graph:
    """Each network is taught by all larger ones: DGKD (Son et al. 2021)."""
    _needs_two(names, "dense")
    return _from_indices(names, range)


def mutual(names: Sequence[str]) -> Graph:
    """Every network teaches every other, all trained together: DML (Zhang et al. 2018)."""
    _needs_two(names, "mutual")
    return _from_indices(names, lambda i: (j for j in range(len(names)) if j != i))


def custom(
    names: Sequence[str], edges: Mapping[str, Sequence[str]] | Sequence[Sequence[bool]] | np.ndarray
) -> Graph:
    """Any graph: `edges` is {student: teachers} or a square matrix whose [i, j] lets j teach i.

    Raises:
      GraphError: as `Graph`, or a matrix of another shape or with entries other than 0 and 1.
    """
    _check_names(names)
    names = tuple(names)
    if isinstance(edges, Mapping):
        for name in edges:
            _check_known(name, names)
        return Graph(names, tuple(tuple(edges.get(name, ())) for name in names))
    try:
        matrix = np.asarray(edges)
    except ValueError:
        raise GraphError("the rows of a matrix of teachers have one length, got several") from None
    if matrix.shape != (len(names), len(names)):
        raise GraphError(
            f"the matrix of {len(names)} networks has shape {(len(names), len(names))}, "
            f"got {matrix.shape}"
        )
    odd = matrix[~np.isin(matrix, (0, 1))]
    if odd.size:
        raise GraphError(f"a matrix of teachers holds only 0 and 1 (or booleans), got {odd[0]}")
    return _from_indices(names, lambda i: np.flatnonzero(matrix[i]).tolist())


def path(names: Sequence[str], along: Sequence[str]) -> Graph:
    """A TAKD path: only the networks of `along` teach, each the next one."""
    _check_names(names)
    _needs_two(along, "path")
    names, along = tuple(names), tuple(along)
    for name in along:
        _check_known(name, names)
    return custom(
        names, {student: (teacher,) for teacher, student in zip(along, along[1:], strict=False)}
    )


NAMED = {"none": none, "direct": direct, "chain": chain, "dense": dense, "mutual": mutual}


def from_spec(spec: str, names: Sequence[str]) -> Graph:
    """A graph from text: a name in `NAMED`, a path `a>b>c`, or edges `c<a+b;d<a+c`.

    Raises:
      GraphError: the text is none of these, or names an impossible row.
    """
    spec = spec.strip()
    if spec in NAMED:
        return NAMED[spec](names)
    if ">" in spec:
        return path(names, [name.strip() for name in spec.split(">")])
    if "<" in spec:
        edges: dict[str, tuple[str, ...]] = {}
        for part in filter(None, (part.strip() for part in spec.split(";"))):
            student, _, teachers = part.partition("<")
            student = student.strip()
            if student in edges:
                raise GraphError(f"{spec!r} gives teachers to {student!r} twice")
            edges[student] = tuple(name.strip() for name in teachers.split("+"))
        return custom(names, edges)
    close = difflib.get_close_matches(spec, NAMED, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise GraphError(
        f"unknown guidance {spec!r}: expected one of {', '.join(NAMED)}, a path such as "
        f"'{'>'.join(names)}', or edges such as 'student<teacher+assistant'{hint}"
    )


def plan(graph: Graph, students: Iterable[str] = ()) -> tuple[Component, ...]:
    """The stages to train, teachers first, and only those that the asked-for students need.

    They are the strongly connected components of the graph in topological order, of several that
    could come next the one that stands first in the row.

    Args:
      graph: who teaches whom.
      students: the networks whose results are wanted; the smallest one where empty.
    """
    wanted = set(students) or {graph.names[-1]}
    for name in wanted:
        _check_known(name, graph.names)
    heard = _reachable(graph.matrix())  # [i, j]: j teaches i, itself or through others
    needed = {i for name in wanted for i in np.flatnonzero(heard[graph.names.index(name)])}
    components: list[Component] = []
    while needed:
        ready = (
            i for i in sorted(needed) if not needed & set(np.flatnonzero(heard[i] & ~heard[:, i]))
        )
        first = next(ready)
        together = np.flatnonzero(heard[first] & heard[:, first])
        names = tuple(graph.names[i] for i in together)
        components.append(Component(names, tuple(map(graph.of, names))))
        needed -= set(together)
    return tuple(components)


def _reachable(matrix: np.ndarray) -> np.ndarray:
    """The reflexive transitive closure of a boolean matrix."""
    reached = matrix | np.eye(len(matrix), dtype=bool)
    for _ in range(len(matrix).bit_length()):  # each round doubles the length of the paths
        reached = reached @ reached
    return reached


def _from_indices(names: Sequence[str], teachers_of) -> Graph:
    _check_names(names)
    names = tuple(names)
    return Graph(names, tuple(tuple(names[j] for j in teachers_of(i)) for i in range(len(names))))


def _check_names(names: Sequence[str]) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise GraphError(f"a row is a tuple of network names, got {names!r}")
    if not names:
        raise GraphError("a row needs at least one network")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise GraphError(
            f"networks stand once in a row; repeated: {', '.join(repeated)}; another draw of the "
            f"same architecture is called {repeated[0]}#2"
        )
    for name in names:
        architecture(name)


def architecture(name: str) -> tuple[str, int]:
    """(architecture, draw) of a network's name: `resnet8#2` is another draw of `resnet8`'s weights.

    Raises:
      GraphError: what follows the # is no whole number from 2 on.
    """
    base, mark, number = name.partition("#")
    if not mark:
        return base, 1
    if not (number.isascii() and number.isdecimal()) or number[0] == "0" or int(number) < 2:
        raise GraphError(
            f"{name!r}: the draws of {base} are called {base}, {base}#2, {base}#3 and so on"
        )
    return base, int(number)


def _check_known(name: str, names: Sequence[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(str(name), names, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise GraphError(f"{name!r} is not in the row {tuple(names)}{hint}")


def _needs_two(names: Sequence[str], kind: str) -> None:
    _check_names(names)
    if len(names) < 2:
        raise GraphError(f"{kind!r} guidance needs at least two networks, got {tuple(names)}")
