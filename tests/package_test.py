"""What is installed: the packages that setup.cfg lists, and versions that are tested."""

import configparser
import pathlib
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
CONSTRAINTS = sorted((ROOT / ".ci" / "constraints").glob("*.txt"))


def bounds():
    """{name: lower bound} of what the package and its tests need."""
    needed = SETUP["options"]["install_requires"], SETUP["options.extras_require"]["test"]
    found = {}
    for requirement in map(Requirement, "\n".join(needed).split()):
        (bound,) = (s for s in requirement.specifier if s.operator == ">=")
        found[canonicalize_name(requirement.name)] = Version(bound.version)
    return found


def pins(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    pairs = (line.split("==") for line in lines)
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_every_folder_of_modules_is_listed_and_the_configs_come_along():
    modules = (path.relative_to(ROOT) for path in (ROOT / "distill_jax").rglob("*.py"))
    folders = {".".join(path.parent.parts) for path in modules}
    listed = SETUP["options"]["packages"].split()
    assert sorted(listed) == sorted({*folders, "distill_jax.configs"})
    assert SETUP["options"]["package_dir"].split() == ["distill_jax.configs", "=", "configs"]


def test_the_oldest_versions_tested_are_the_lower_bounds():
    tested = pins(CONSTRAINTS[0])
    assert {name: tested.get(name) for name in bounds()} == bounds()


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_all_that_is_needed_is_pinned_and_allowed(path):
    tested = pins(path)
    assert not {name for name, bound in bounds().items() if tested[name] < bound}
    python, jax = (tuple(map(int, pair)) for pair in re.findall(r"(\d)(\d\d)", path.stem))
    assert tested["jax"].release[:2] == tested["jaxlib"].release[:2] == jax
    assert "{} :: {}.{}".format("Programming Language :: Python", *python) in (
        SETUP["metadata"]["classifiers"].splitlines()
    )
