"""The floors of the package, read from its imports: a module imports only from floors below."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "distill_jax"
FLOORS = {
    "guidance": 0,
    "rng": 0,
    "losses": 0,
    "dropping": 0,
    "metrics": 0,
    "fidelity": 0,
    "identity": 0,
    "models": 1,
    "data": 1,
    "optim": 1,
    "frozen": 2,
    "step": 3,
    "parallel": 4,
    "checkpoint": 4,
    "report": 4,
    "preflight": 4,
    "recipe": 5,
    "workdir": 5,
    "programs": 6,
    "scoring": 7,
    "asked": 8,
    "population": 9,
    "training": 10,
    "config": 11,
    "planning": 12,
    "curriculum": 13,
    "main": 14,
}
BESIDE = {"interop": {"models"}}  # rooms beside the floors, and all that they may import
NEIGHBOURS = {("curriculum", "interop"), ("planning", "interop")}
CONFIG_READERS = {"planning", "curriculum", "__init__", "main"}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(module):
    return module.partition("/")[0].removesuffix(".py")


def imported_rooms(source, rooms):
    """The rooms that `source` imports, wherever in the file; the package itself is "__init__"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative imports hide the floor"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for package, *rest in (name.split(".") for name in names):
            if package == "distill_jax":
                found.add(rest[0] if rest and rest[0] in rooms else "__init__")
    return found


def breaches(room, imported):
    """What `room` must not import of what it imports."""
    others = imported - {room}
    if room == "__init__":
        return others - {"config", "curriculum"}
    if room in BESIDE:
        return others - BESIDE[room]
    allowed = {other for other, floor in FLOORS.items() if floor < FLOORS[room]}
    allowed |= {other for one, other in NEIGHBOURS if one == room}
    if room not in CONFIG_READERS:
        allowed -= {"config"}
    if room == "main":
        allowed |= set(BESIDE) | {"__init__"}
    return others - allowed


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_floors_below(module):
    rooms = set(FLOORS) | set(BESIDE)
    room = room_of(module)
    assert room in rooms | {"__init__"}, f"{module} stands on no floor: give it one"
    source = (PACKAGE / module).read_text(encoding="utf-8")
    assert not breaches(room, imported_rooms(source, rooms))


def test_every_room_is_there():
    assert {room_of(module) for module in MODULES} == set(FLOORS) | set(BESIDE) | {"__init__"}


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("losses", "import jax", set()),
        ("losses", "from distill_jax import optim, rng", {"optim", "rng"}),
        ("step", "from distill_jax.models import Network", set()),
        ("step", "import distill_jax.parallel as p", {"parallel"}),
        ("step", "def f():\n    from distill_jax.training import Recipe", {"training"}),
        ("optim", "from distill_jax.models.layers import Mode", {"models"}),
        ("training", "from distill_jax.config import resolve", {"config"}),
        ("training", "from distill_jax import resolve", {"__init__"}),
        ("config", "from distill_jax import curriculum", {"curriculum"}),
        ("curriculum", "from distill_jax import config, training", set()),
        ("interop", "from distill_jax import data, models", {"data"}),
        ("interop", "from distill_jax.interop.files import read", set()),
        ("models", "from distill_jax.interop import files", {"interop"}),
        ("models", "from distill_jax.models import plain", set()),
    ],
)
def test_breaches_are_seen_in_every_form_of_import(room, source, expected):
    assert breaches(room, imported_rooms(source, set(FLOORS) | set(BESIDE))) == expected
