"""Who teaches whom: a row of networks, largest first, and the stages that follow from it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class GraphError(ValueError):
    """A row of networks, or a choice of teachers in it, that cannot be trained."""


class Component(NamedTuple):
    """One network to train and the frozen networks that teach it, largest first."""

    network: str
    teachers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Graph:
    """A row of networks and, for each of them, its teachers.

    Args:
      names: networks from the largest to the smallest.
      teachers: for each network the names of those that teach it, all before it in the row.

    Raises:
      GraphError: empty row, duplicate or unknown name, or a teacher at or after its student.
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
                if self.names.index(teacher) >= self.names.index(student):
                    raise GraphError(
                        f"{teacher!r} cannot teach {student!r}: a teacher stands before its "
                        f"student in the row {self.names}"
                    )

    def matrix(self) -> np.ndarray:
        """Strictly lower-triangular (n, n) booleans: [i, j] is true where j teaches i."""
        matrix = np.zeros((len(self.names), len(self.names)), bool)
        for i, teachers in enumerate(self.teachers):
            matrix[i, [self.names.index(teacher) for teacher in teachers]] = True
        return matrix

    def of(self, network: str) -> tuple[str, ...]:
        """The teachers of one network, largest first."""
        _check_known(network, self.names)
        return self.teachers[self.names.index(network)]


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


def custom(
    names: Sequence[str], edges: Mapping[str, Sequence[str]] | Sequence[Sequence[bool]] | np.ndarray
) -> Graph:
    """Any row: `edges` is {student: teachers} or a strictly lower-triangular boolean matrix.

    Raises:
      GraphError: as `Guidance`, or a matrix of another shape or with entries on or above the
        diagonal.
    """
    _check_names(names)
    names = tuple(names)
    if isinstance(edges, Mapping):
        for name in edges:
            _check_known(name, names)
        order = {name: i for i, name in enumerate(names)}
        return Graph(
            names,
            tuple(
                tuple(sorted(edges.get(name, ()), key=lambda t: order.get(t, -1))) for name in names
            ),
        )
    matrix = np.asarray(edges)
    if matrix.shape != (len(names), len(names)):
        raise GraphError(
            f"a guidance matrix of {len(names)} networks has shape "
            f"{(len(names), len(names))}, got {matrix.shape}"
        )
    if not np.isin(matrix, (0, 1)).all():
        raise GraphError("a guidance matrix holds only 0 and 1 (or booleans)")
    for i, j in zip(*np.nonzero(np.triu(matrix)), strict=True):
        raise GraphError(
            f"entry [{i}, {j}] lets {names[j]!r} teach {names[i]!r}: a guidance matrix is "
            "strictly lower-triangular, a teacher stands before its student"
        )
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


NAMED = {"none": none, "direct": direct, "chain": chain, "dense": dense}


def from_spec(spec: str, names: Sequence[str]) -> Graph:
    """Guidance from text: a name in `NAMED`, a path `a>b>c`, or edges `c<a+b;d<a+c`.

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

    Args:
      graph: who teaches whom.
      students: the networks whose results are wanted; the smallest one where empty.
    """
    wanted = set(students) or {graph.names[-1]}
    for name in wanted:
        _check_known(name, graph.names)
    components = []
    for name, teachers in reversed(list(zip(graph.names, graph.teachers, strict=True))):
        if name in wanted:
            wanted |= set(teachers)
            components.append(Component(name, teachers))
    return tuple(reversed(components))


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
