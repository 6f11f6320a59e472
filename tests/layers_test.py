"""The rooms of the package, read from its imports: a room imports only from those before it."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "distill_jax"
ROOMS = (
    "rng",
    "refusals",
    "identity",
    "changed",
    "processes",
    "traced",
    "graph",
    "models",
    "interop",
    "data",
    "methods",
    "evals",
    "train",
    "report",
    "runs",
    "commands",
    "main",
    "__main__",
)
# What `distill_jax` itself offers.
API = {"data", "interop", "methods", "models", "processes", "report", "runs", "train"}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(module):
    return module.partition("/")[0].removesuffix(".py")


def imported_rooms(source):
    """The rooms that `source` imports, wherever in the file; the package itself is "__init__"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative imports hide the room"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for package, *rest in (name.split(".") for name in names):
            if package == "distill_jax":
                found.add(rest[0] if rest and rest[0] in ROOMS else "__init__")
    return found


def breaches(room, imported):
    """What `room` must not import of what it imports."""
    others = imported - {room}
    if room == "__init__":
        return others - API
    allowed = set(ROOMS[: ROOMS.index(room)])
    return others - allowed - ({"__init__"} if room == "main" else set())


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_the_rooms_before_its_own(module):
    room = room_of(module)
    assert room in {*ROOMS, "__init__"}, f"{module} stands in no room: give it one"
    source = (PACKAGE / module).read_text(encoding="utf-8")
    assert not breaches(room, imported_rooms(source))


def test_every_room_is_there():
    assert {room_of(module) for module in MODULES} == {*ROOMS, "__init__"}


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("graph", "import numpy", set()),
        ("graph", "from distill_jax import models, rng", {"models"}),
        ("train", "from distill_jax.models import Network", set()),
        ("methods", "import distill_jax.train.step as s", {"train"}),
        ("train", "def f():\n    from distill_jax.runs import config", {"runs"}),
        ("data", "from distill_jax.train.step import Batch", {"train"}),
        ("train", "from distill_jax import resolve", {"__init__"}),
        ("runs", "from distill_jax import interop, train", set()),
        ("interop", "from distill_jax import data, models", {"data"}),
        ("models", "from distill_jax.interop import files", {"interop"}),
        ("models", "from distill_jax.models.zoo import plain", set()),
    ],
)
def test_breaches_are_seen_in_every_form_of_import(room, source, expected):
    assert breaches(room, imported_rooms(source)) == expected
