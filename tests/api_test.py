"""docs/api.md names every public thing with the signature that it has, and one line."""

import importlib
import inspect
import pathlib
import re

import distill_jax

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
LINE = re.compile(r"^- `(?P<path>[\w.]+)(?P<signature>\(.*?\))?`: (?P<text>.+)$")
ROOMS = ("", "data", "models", "methods", "interop.files")


def entries():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("- ")]
    matches = [LINE.match(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {match["path"]: match for match in matches}


def thing(path):
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:  # of a class
        return getattr(thing(module), name)


def signature(value):
    """Names and defaults, without types."""
    parameters = inspect.signature(value).parameters.values()
    bare = [p.replace(annotation=p.empty) for p in parameters if p.name != "self"]
    return str(inspect.Signature(bare))


def test_every_signature_is_that_of_the_code():
    for path, entry in entries().items():
        value = thing(path)
        if entry["signature"] is not None:
            assert entry["signature"] == signature(value), path
        else:
            assert not inspect.isfunction(value), f"{path} is a function: give its signature"


def test_every_public_name_is_there():
    named = {path.removeprefix("distill_jax.") for path in entries()}
    for room in ROOMS:
        module = importlib.import_module(f"distill_jax.{room}".rstrip("."))
        public = getattr(module, "__all__", None) or ("load_variables", "save_variables")
        modules = {name for name in public if inspect.ismodule(getattr(module, name))}
        missing = {f"{room}.{name}".lstrip(".") for name in set(public) - modules} - named
        missing -= {f"{room}.{name}".lstrip(".") for name in dir(distill_jax)}
        missing = {n for n in missing if n.rpartition(".")[2] not in distill_jax.__all__}
        assert not missing, sorted(missing)
