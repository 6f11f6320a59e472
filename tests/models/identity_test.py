"""What a network is, as text: the same in every process, another for other code."""

import functools
import importlib.util
import json
import linecache
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from distill_jax import identity, models

CODE = """
import functools
import jax, numpy as np
from flax import linen as nn, nnx
SCALE = 2.0

class Block(nn.Module):
    width: int
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(self.width)(x)) * SCALE

class CNN(nn.Module):
    classes: int
    activate: object = nn.gelu
    names: tuple = ("a", "b")
    @nn.compact
    def __call__(self, x):
        x = Block(4)(x.reshape(len(x), -1))
        return nn.Dense(self.classes)(self.activate(x))

class Graph(nnx.Module):
    def __init__(self, classes, rngs):
        self.out = nnx.Linear(64, classes, rngs=rngs)
        self.act = nnx.relu
    def __call__(self, x):
        return self.out(self.act(x.reshape(len(x), -1)))

def pair(classes):
    def init(key):
        return {"params": {"w": jax.random.normal(key, (64, classes))}}
    def apply(variables, x):
        return x.reshape(len(x), -1) @ variables["params"]["w"] * SCALE
    return init, apply
"""


def module_of(tmp_path, text=CODE):
    """The code as a module of its own, imported anew."""
    path = tmp_path / "outside_code.py"
    path.write_text(text)
    linecache.clearcache()
    spec = importlib.util.spec_from_file_location("outside_code", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["outside_code"] = module  # where inspect looks for the source
    spec.loader.exec_module(module)
    return module


def identity_of(kind, code, version="1"):
    builds = {
        "linen": lambda classes, inputs: code.CNN(classes),
        "nnx": lambda classes, inputs: code.Graph(classes, nnx.Rngs(0)),
        "pair": lambda classes, inputs: code.pair(classes),
    }
    models.register_network("outside_identity", builds[kind], version)
    return models.build("outside_identity", 3, (8, 8, 1)).identity


def test_a_built_in_network_is_its_name_and_type():
    assert models.build("plane2", 3, (8, 8, 1)).identity == ["plane2", "float32"]
    half = models.build("evolving:plane2", 3, (8, 8, 1), "bfloat16")
    assert half.identity == ["evolving:plane2", "bfloat16"]


def test_a_registered_network_is_name_version_shapes_and_code(tmp_path):
    found = identity_of("linen", module_of(tmp_path))
    assert found == identity.plain(found)
    assert found["name"] == "outside_identity" and found["version"] == "1"
    assert found["shapes"]["['params']['Dense_0']['kernel']"] == "float32 (4, 3)"
    assert "outside_code.CNN" in found["repr"] and "classes=3" in found["repr"]
    assert "0x" not in found["repr"]


def test_the_same_in_another_process(tmp_path):
    code = module_of(tmp_path)
    here = [identity_of(kind, code) for kind in ("linen", "nnx", "pair")]
    script = f"""
        import sys, json, pathlib
        sys.path[:0] = {[str(pathlib.Path(__file__).parent), *sys.path]!r}
        import identity_test
        code = identity_test.module_of(pathlib.Path({str(tmp_path)!r}))
        print(json.dumps([identity_test.identity_of(k, code) for k in ("linen", "nnx", "pair")]))
    """
    there = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
    )
    assert json.loads(there.stdout) == here


CHANGES = {
    "linen": [
        ("activate: object = nn.gelu", "activate: object = nn.relu"),
        ('names: tuple = ("a", "b")', 'names: tuple = ("a", "c")'),
        ("Block(4)(x", "Block(2 + 2)(x"),
        ("nn.relu(nn.Dense", "nn.tanh(nn.Dense"),  # in a block that the network names
        ("SCALE = 2.0", "SCALE = 3.0"),
    ],
    "nnx": [
        ("self.act = nnx.relu", "self.act = nnx.gelu"),
        ("self.out(self.act(", "self.out(1 * self.act("),
    ],
    "pair": [('["w"] * SCALE', '["w"] / SCALE'), ("SCALE = 2.0", "SCALE = 3.0")],
}


@pytest.mark.parametrize(
    ("kind", "old", "new"), [(kind, *pair) for kind, pairs in CHANGES.items() for pair in pairs]
)
def test_other_code_is_another_network(kind, old, new, tmp_path):
    before = identity_of(kind, module_of(tmp_path))
    assert CODE.count(old) == 1
    after = identity_of(kind, module_of(tmp_path, CODE.replace(old, new)))
    assert after["shapes"] == before["shapes"] and after["repr"] != before["repr"]
    assert identity_of(kind, module_of(tmp_path)) == before


def test_other_versions_are_other_networks(tmp_path):
    code = module_of(tmp_path)
    differ = identity.differences(identity_of("linen", code), identity_of("linen", code, "2"))
    assert differ == ["version is '1' there and '2' here"]


def closure(number):
    return lambda x: x + number


class Plain:
    """No dataclass."""

    def __init__(self, width):
        self.width = width

    def method(self, x):
        return x


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (closure(1), closure(2)),
        (functools.partial(nn.Dense, 3), functools.partial(nn.Dense, 4)),
        (nn.initializers.variance_scaling(1.0, "fan_in", "normal"), nn.initializers.he_normal()),
        (nn.Dense(3), nn.Dense(3, use_bias=False)),
        (jax.jit(closure(1)), jax.jit(closure(2))),
        (nn.relu, nn.gelu),
        ({"a": [1, (2, closure(3))]}, {"a": [1, (2, closure(4))]}),
        (np.zeros(3), np.ones(3)),
        (jnp.zeros(3), jnp.zeros(3, int)),
        (jax.random.key(0), jax.random.key(1)),
        (Plain(1), Plain(2)),
        (Plain(1).method, Plain(2).method),
        (nn.remat(nn.Dense), nn.Dense),
        (eval("lambda x: x + 1"), eval("lambda x: x + 2")),
        (eval("lambda x: x in {1, 'a', 'b'}"), eval("lambda x: x in {1, 'a', 'c'}")),
        (jnp.float32, jnp.bfloat16),
        (range(3), range(4)),
        (pathlib.Path("a"), pathlib.Path("b")),
        (types.SimpleNamespace(k=1), types.SimpleNamespace(k=2)),
        (ml_collections.ConfigDict({"k": 1}), ml_collections.ConfigDict({"k": 2})),
    ],
)
def test_values_that_differ_are_described_apart(one, other):
    texts = identity.describe(one), identity.describe(other)
    assert texts[0] != texts[1]
    assert identity.describe(one) == texts[0]
    assert all("0x" not in text for text in texts)


def test_the_order_of_names_does_not_count():
    assert identity.describe({"a": 1, "b": 2}) == identity.describe({"b": 2, "a": 1})
    assert identity.describe({"x", "y", "z"}) == identity.describe({"z", "y", "x"})


def test_what_refers_to_itself_ends():
    loop = Plain([])
    loop.width += [loop, 1]
    other = Plain([])
    other.width += [other, 2]
    assert identity.describe(loop).endswith("Plain()#1, 1])")
    assert identity.describe(loop) != identity.describe(other)


def test_which_of_two_is_meant_again_counts():
    one, other = closure(1), closure(2)
    assert identity.describe([one, other, one]) != identity.describe([one, other, other])


def test_a_function_whose_file_holds_no_code_any_more_is_its_bytecode(tmp_path):
    texts = (f"def function(x):\n    return x + {number}\n" for number in (1, 2))
    one, other = (module_of(tmp_path, text).function for text in texts)
    (tmp_path / "outside_code.py").write_text('It isn\'t code.\n"""\n')
    linecache.clearcache()
    assert identity.describe(one) != identity.describe(other)


def described(tmp_path, text, name="it"):
    """The description of what a module of this text calls `name`."""
    return identity.describe(getattr(module_of(tmp_path, text), name))


DECORATED = """
import functools
K = 2
def scaled(k):
    def decorate(f):
        @functools.wraps(f)
        def wrapper(x):
            return 5 * k * f(x)
        return wrapper
    return decorate
@scaled(K)
def it(x):
    return x
"""
WITH_RULE = """
import jax
@jax.custom_vjp
def f(x):
    return x
f.defvjp(lambda x: (x, None), lambda left, g: (-2.0 * g,))
def it(x):
    return f(x)
"""
CLASSES = """
WIDTH = 16
class Block:
    size = 4
class it:
    width = WIDTH
    block = Block
    def method(self, x, depth=WIDTH):
        return x
"""


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (CLASSES, "16", "32"),
        (CLASSES, "size = 4", "size = 5"),
        ("N = 16\nclass it:\n    def method(self, n=N): return n\n", "16", "32"),
        ("def make(n):\n  class it:\n    n_ = n\n  return it\nit = make(16)\n", "16", "32"),
        ("import enum\nclass A(enum.Enum):\n  B = 1\nC = A.B\ndef it(): return C\n", "1", "2"),
        (WITH_RULE, "-2.0", "-3.0"),
        (DECORATED, "K = 2", "K = 3"),
        (DECORATED, "5 *", "7 *"),
    ],
)
def test_what_code_is_made_with_counts(text, old, new, tmp_path):
    assert text.count(old) == 1
    before = described(tmp_path, text)
    assert described(tmp_path, text.replace(old, new)) != before == described(tmp_path, text)


@pytest.mark.parametrize("use", ["helper.scaled(x)", "helper.inner.FACTOR * x"])
def test_what_code_names_of_a_module_beside_it_counts(use, tmp_path, monkeypatch):
    """As a config file may import one that stands beside it."""
    texts = []
    for number in (2.0, 3.0, 2.0):
        helper, inner = types.ModuleType("helper_beside"), types.ModuleType("helper_beside.inner")
        inner.FACTOR, helper.inner = number, inner
        monkeypatch.setitem(sys.modules, "helper_beside", helper)
        helper.scaled = closure(number)
        text = f"import helper_beside as helper\ndef it(x): return {use}\n"
        texts.append(described(tmp_path, text))
    assert texts[0] == texts[2] != texts[1]


USES = {
    "imported within": "def it(x):\n    import helper_within\n    return helper_within.scaled(x)\n",
    "under another name": "def it(x):\n    import helper_within as h\n    return 2 * h.scaled(x)\n",
    "a name of it": "def it(x):\n    from helper_within import scaled\n    return scaled(x)\n",
    "by a function within": (
        "def it(x):\n    import helper_within as h\n"
        "    def own(y):\n        return h.scaled(y)\n    return own(x)\n"
    ),
    "around it": (
        "def make():\n    import helper_within\n"
        "    def it(x):\n        return helper_within.scaled(x)\n    return it\nit = make()\n"
    ),
    "in a method": (
        "class it:\n    def __call__(self, x):\n"
        "        from helper_within import scaled\n        return scaled(x)\n"
    ),
}


@pytest.mark.parametrize("use", USES)
def test_what_code_imports_when_it_runs_counts(use, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    texts = []
    for number in (2.0, 3.0, 2.0):
        sys.modules.pop("helper_within", None)  # as in another process, that did not run it yet
        helper = f"FACTOR = {number}\ndef scaled(x):\n    return FACTOR * x\n"
        (tmp_path / "helper_within.py").write_text(helper)
        texts.append(described(tmp_path, USES[use]))
        assert described(tmp_path, USES[use]) == texts[-1]
    sys.modules.pop("helper_within")
    assert texts[0] == texts[2] != texts[1]


def test_what_code_imports_of_libraries_or_in_vain_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "flatbuffers", raising=False)
    text = "def it(x):\n    import flatbuffers, json, no_such_module\n    return x\n"
    assert described(tmp_path, text) == described(tmp_path, text)
    assert "flatbuffers" not in sys.modules


@pytest.mark.parametrize("scale", [2.0, 3.0])
def test_how_an_nnx_module_is_drawn_counts(scale):
    class Scaled(nnx.Module):
        def __init__(self, classes, rngs, scale):
            self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (64, classes)))

        def __call__(self, x):
            return x.reshape(len(x), -1) @ self.kernel[...]

    def identity_at(scale):
        models.register_network("outside_drawn", lambda c, _: Scaled(c, nnx.Rngs(0), scale))
        return models.build("outside_drawn", 3, (8, 8, 1)).identity

    assert (identity_at(2.0) == identity_at(scale)) == (scale == 2.0)
