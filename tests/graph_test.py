"""Graphs: every row, every text form, the plans that follow, and every error by name."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax import graph
from distill_jax.graph import Component, Graph, GraphError

ROW = ("a", "b", "c", "d")


def teachers(*lists):
    return tuple(tuple(names) for names in lists)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (graph.none(ROW), teachers("", "", "", "")),
        (graph.direct(ROW), teachers("", "a", "a", "a")),
        (graph.chain(ROW), teachers("", "a", "b", "c")),
        (graph.dense(ROW), teachers("", "a", "ab", "abc")),
        (graph.path(ROW, ["a", "c", "d"]), teachers("", "", "a", "c")),
        (graph.path(ROW, ["b", "d"]), teachers("", "", "", "b")),
        (graph.custom(ROW, {"d": "ca", "b": "a"}), teachers("", "a", "", "ac")),
        (graph.custom(ROW, {}), teachers("", "", "", "")),
        (graph.custom(ROW[:3], [[0, 0, 0], [1, 0, 0], [1, 0, 0]]), teachers("", "a", "a")),
        (graph.custom(["a"], np.zeros((1, 1), bool)), teachers("")),
        (graph.none(["a"]), teachers("")),
        (graph.mutual(ROW[:3]), teachers("bc", "ac", "ab")),
        (graph.custom(ROW[:3], {"a": "ca", "c": "b"}), teachers("ac", "", "b")),
        (graph.custom(ROW[:2], [[1, 1], [0, 0]]), teachers("ab", "")),
        (graph.path(ROW, ["c", "a"]), teachers("c", "", "", "")),
    ],
)
def test_constructors_give_each_network_its_teachers_largest_first(row, expected):
    assert row.teachers == expected
    assert tuple(row.of(name) for name in row.names) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", np.zeros((4, 4))),
        ("direct", np.vstack([np.zeros(4), np.tile([1, 0, 0, 0], (3, 1))])),
        ("chain", np.eye(4, k=-1)),
        ("mutual", 1 - np.eye(4)),
        ("dense", np.tril(np.ones((4, 4)), -1)),
    ],
)
def test_matrix_rows_are_students_and_columns_teachers(kind, expected):
    matrix = graph.NAMED[kind](ROW).matrix()
    assert matrix.dtype == bool
    np.testing.assert_array_equal(matrix, expected.astype(bool))


def test_graphs_are_hashable_and_equal_by_value():
    assert {graph.chain(ROW)} == {graph.path(list(ROW), list(ROW))}
    assert graph.chain(ROW) != graph.dense(ROW)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("none", graph.none(ROW)),
        ("direct", graph.direct(ROW)),
        (" chain ", graph.chain(ROW)),
        ("dense", graph.dense(ROW)),
        ("a>c>d", graph.path(ROW, ["a", "c", "d"])),
        (" a > d ", graph.path(ROW, ["a", "d"])),
        ("d<a", graph.custom(ROW, {"d": "a"})),
        ("c<a+b;d<a+c", graph.custom(ROW, {"c": "ab", "d": "ac"})),
        (" d < c + a ; ", graph.custom(ROW, {"d": "ac"})),
        ("mutual", graph.mutual(ROW)),
        ("a<d", graph.custom(ROW, {"a": "d"})),
        ("b<a;a<b+a", graph.custom(ROW, {"a": "ab", "b": "a"})),
    ],
)
def test_from_spec_reads_every_text_form(spec, expected):
    assert graph.from_spec(spec, ROW) == expected


@pytest.mark.parametrize(
    ("row", "students", "expected"),
    [
        (graph.none(ROW), (), [("d", "")]),
        (graph.direct(ROW), (), [("a", ""), ("d", "a")]),
        (graph.chain(ROW), (), [("a", ""), ("b", "a"), ("c", "b"), ("d", "c")]),
        (graph.dense(ROW), ("c",), [("a", ""), ("b", "a"), ("c", "ab")]),
        (graph.path(ROW, ["a", "c", "d"]), (), [("a", ""), ("c", "a"), ("d", "c")]),
        (graph.none(ROW), ("d", "b"), [("b", ""), ("d", "")]),
        (graph.direct(ROW), ["a"], [("a", "")]),
    ],
)
def test_plan_trains_only_what_the_students_need(row, students, expected):
    assert graph.plan(row, students) == tuple(Component((n,), (tuple(t),)) for n, t in expected)


@st.composite
def graphs_and_students(draw, lower=False):
    """A square matrix, and the places of some networks."""
    size = draw(st.integers(1, 7))
    bits = draw(st.lists(st.booleans(), min_size=size * size, max_size=size * size))
    students = draw(st.sets(st.integers(0, size - 1)))
    matrix = np.reshape(bits, (size, size))
    return np.tril(matrix, -1) if lower else matrix, students


def names_of(matrix):
    return tuple(f"n{i}" for i in range(len(matrix)))


def ancestors(matrix, students):
    reached, todo = set(), list(students)
    while todo:
        student = todo.pop()
        reached.add(student)
        todo.extend(set(np.flatnonzero(matrix[student]).tolist()) - reached)
    return reached


@given(graphs_and_students())
def test_a_plan_is_the_strong_components_of_the_ancestors_teachers_first(case):
    matrix, students = case
    names = names_of(matrix)
    row = graph.custom(names, matrix)
    np.testing.assert_array_equal(row.matrix(), matrix)
    assert graph.custom(names, dict(zip(names, row.teachers, strict=True))) == row
    components = graph.plan(row, [names[i] for i in students])
    needed = ancestors(matrix, students or {len(names) - 1})
    planned = [name for one in components for name in one.networks]
    assert sorted(planned) == sorted(names[i] for i in needed)
    done: set[str] = set()
    for one in components:
        done |= set(one.networks)
        places = [names.index(name) for name in one.networks]
        assert places == sorted(places)
        for i in places:  # together are those that reach each other, through whomever
            mutual = {j for j in ancestors(matrix, [i]) if i in ancestors(matrix, [j])}
            assert mutual == set(places)
            name = names[i]
            assert one.frozen(name) + one.live(name) == tuple(
                sorted(row.of(name), key=lambda x: (x in one.networks, names.index(x)))
            )
            assert set(one.live(name)) <= set(one.networks)
            assert set(one.frozen(name)) <= done - set(one.networks)


@given(graphs_and_students(lower=True))
def test_without_cycles_networks_are_trained_one_by_one_in_the_rows_order(case):
    matrix, students = case
    names = names_of(matrix)
    row = graph.custom(names, matrix)
    needed = sorted(ancestors(matrix, students or {len(names) - 1}))
    assert graph.plan(row, [names[i] for i in students]) == tuple(
        Component((names[i],), (tuple(names[j] for j in np.flatnonzero(matrix[i])),))
        for i in needed
    )


@given(graphs_and_students(), st.randoms())
def test_components_are_the_same_whatever_the_order_of_the_row(case, random):
    matrix, students = case
    names, order = names_of(matrix), list(range(len(matrix)))
    random.shuffle(order)
    wanted = [names[i] for i in students] or [names[-1]]
    plans = [
        graph.plan(graph.custom(names, matrix), wanted),
        graph.plan(graph.custom([names[i] for i in order], matrix[np.ix_(order, order)]), wanted),
    ]
    one, other = (
        {frozenset(c.networks): {n: set(c.frozen(n) + c.live(n)) for n in c.networks} for c in plan}
        for plan in plans
    )
    assert one == other


@given(graphs_and_students())
def test_the_text_of_the_edges_is_the_graph(case):
    matrix, _ = case
    row = graph.custom(names_of(matrix), matrix)
    assert graph.from_spec(row.edges, row.names) == row


def raised(match):
    return pytest.raises(GraphError, match=re.escape(match))


@pytest.mark.parametrize("kind", ["direct", "chain", "dense", "mutual"])
def test_a_row_of_one_has_nobody_to_teach(kind):
    with raised(f"'{kind}' guidance needs at least two networks, got ('a',)"):
        graph.from_spec(kind, ["a"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: graph.none([]), "at least one network"),
        (lambda: graph.none("abc"), "a row is a tuple of network names, got 'abc'"),
        (lambda: graph.dense("abc"), "a row is a tuple of network names, got 'abc'"),
        (lambda: graph.path(ROW, "abc"), "a row is a tuple of network names, got 'abc'"),
        (lambda: graph.custom("ab", {}), "a row is a tuple of network names, got 'ab'"),
        (lambda: graph.none(["a", ""]), "a row is a tuple of network names"),
        (lambda: graph.none(["a", 3]), "a row is a tuple of network names"),
        (lambda: graph.dense(["b", "a", "b", "a"]), "repeated: a, b"),
        (lambda: graph.path(ROW, ["a"]), "'path' guidance needs at least two networks"),
        (lambda: graph.path(ROW, ["a", "x"]), "'x' is not in the row ('a', 'b', 'c', 'd')"),
        (lambda: graph.path(ROW, ["a", "b", "a"]), "repeated: a"),
        (lambda: graph.custom(ROW, {"x": "a"}), "'x' is not in the row"),
        (lambda: graph.custom(ROW, {"d": "x"}), "'x' is not in the row"),
        (lambda: graph.custom(ROW, {"d": "aa"}), "'d' names a teacher twice"),
        (lambda: graph.custom(ROW[:2], [[0, 0]]), "shape (2, 2), got (1, 2)"),
        (lambda: graph.custom(ROW[:2], np.zeros((2, 2, 1))), "shape (2, 2), got (2, 2, 1)"),
        (
            lambda: graph.custom(ROW[:2], [[0, 0], [2, 0]]),
            "holds only 0 and 1 (or booleans), got 2",
        ),
        (
            lambda: graph.custom(ROW[:2], [[0, 0], [1]]),
            "rows of a matrix of teachers have one length",
        ),
        (lambda: graph.custom(ROW[:2], [[0, 0, 0], [1, 0, 0]]), "shape (2, 2), got (2, 3)"),
        (lambda: graph.custom(ROW[:2], [[0, 0], [np.nan, 0]]), "holds only 0 and 1"),
        (lambda: Graph(ROW, ((),)), "4 networks need 4 lists of teachers, got 1"),
        (lambda: graph.chain(ROW).of("x"), "'x' is not in the row"),
        (lambda: graph.plan(graph.chain(ROW), ["x"]), "'x' is not in the row"),
        (lambda: graph.from_spec("dens", ROW), "unknown guidance 'dens'"),
        (lambda: graph.from_spec("", ROW), "unknown guidance ''"),
        (lambda: graph.from_spec("a>x", ROW), "'x' is not in the row"),
        (lambda: graph.from_spec("a>", ROW), "a row is a tuple of network names"),
        (lambda: graph.from_spec("d<a;d<b", ROW), "gives teachers to 'd' twice"),
        (lambda: graph.from_spec("d<", ROW), "'' is not in the row"),
        (lambda: graph.from_spec("d<a<b", ROW), "'a<b' is not in the row"),
    ],
)
def test_impossible_rows_are_refused_by_name(build, message):
    with raised(message):
        build()


@pytest.mark.parametrize(
    ("build", "hint"),
    [
        (lambda: graph.from_spec("dens", ROW), "did you mean 'dense'?"),
        (lambda: graph.path(["plane6", "plane2"], ["plane66", "plane2"]), "mean 'plane6'?"),
    ],
)
def test_a_near_miss_is_answered_with_the_name_meant(build, hint):
    with raised(hint):
        build()
