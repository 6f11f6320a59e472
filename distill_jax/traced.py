"""What was traced is kept on disk: a later process neither traces nor lowers it again.

XLA's own cache keeps what is compiled, by the program that was lowered. It stays the only place of
machine code; what is kept here is that program, which leads there. Python code says what it is by
the text of its description, so only programs of the library's own code are kept.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import export

from distill_jax import identity

log = logging.getLogger("distill_jax")
_PACKAGES = ("flax", "jax", "jaxlib", "numpy", "optax")
_folder: Path | None = None


def keep_in(folder: Path | None) -> None:
    """Keeps what is traced from now on in a folder, made where there is none; None keeps nothing.

    What is in the folder is trusted like code. One that others may write to is warned of, and is
    not used.
    """
    global _folder
    _folder = None
    if folder is None:
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        log.warning("traced programs are not kept in %s: %s", folder, error)
        return
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.warning(
            "traced programs are not kept in %s: others may write to it, expected a folder of this "
            "user's alone (chmod 700)",
            folder,
        )
        return
    _folder = folder


class Program:
    """A jitted function, traced once for all processes that call it with the like.

    Args:
      function: pure; arguments and results are trees of arrays.
      key: all that decides what it computes; kept is only what the library's own code makes, and
        nothing where it is None.
      donated: how many arguments, the first ones, are donated.
      options: of `jax.jit`.
    """

    def __init__(self, function: Callable, key: Any, donated: int = 0, **options: Any):
        self.jitted = jax.jit(function, donate_argnums=range(donated), **options)
        self.function, self.donated, self.options = function, donated, options
        self.name, self.lower = function.__name__, self.jitted.lower
        self._key = key
        self._loaded: dict[Any, tuple[Callable, Any] | None] = {}

    def __call__(self, *arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        if _folder is None or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self.jitted(*arguments)
        kind = tree, tuple(map(_kind, leaves))
        if kind not in self._loaded:
            self._loaded[kind] = self._load(arguments, kind)
        if (loaded := self._loaded[kind]) is None:
            return self.jitted(*arguments)
        function, results = loaded
        return jax.tree.unflatten(results, function(*leaves))

    def shapes(self, *arguments: Any) -> Any:
        """As `jax.eval_shape`, of arguments that may be shapes."""

        def make():
            found = jax.eval_shape(self.jitted, *arguments)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found)

        leaves, tree = jax.tree.flatten(arguments)
        if _folder is None or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return make()
        digest = self._digest("shapes", (tree, tuple(map(_kind, leaves))))
        return make() if digest is None else remembered(digest, make)

    def _load(self, arguments: Any, kind: Any) -> tuple[Callable, Any] | None:
        """The function of leaves, and the tree of its results; None where it cannot be kept."""
        digest = self._digest("program", kind)
        if digest is None:
            return None
        try:
            kept, places = remembered(digest, lambda: self._exported(arguments))
            exported = export.deserialize(bytearray(kept))
        except Exception as error:  # what JAX cannot export: it is run as it is
            log.info("%s is traced at every start: %s", self.name, error)
            return None

        def call(*leaves):
            results = exported.call(*map(_raw, leaves))
            return list(map(_restored, results, jax.tree.leaves(places)))

        call.__name__ = self.name  # what logs and profiles call it
        given_up = range(len(jax.tree.leaves(arguments[: self.donated])))
        return jax.jit(call, donate_argnums=given_up, **self.options), jax.tree.structure(places)

    def _exported(self, arguments: Any) -> tuple[bytes, Any]:
        """The serialised function of leaves, and its results with the name of each for an array.

        Keys cross as their numbers: JAX before 0.10.2 constrains one over devices by a wrong rank.
        """
        leaves, tree = jax.tree.flatten(arguments)
        names = list(map(_random, leaves))
        results: list[Any] = []

        def flat(*leaves):
            given = jax.tree.unflatten(tree, map(_restored, leaves, names))
            found = self.function(*given)
            results.append(jax.tree.map(_random, found))
            return list(map(_raw, jax.tree.leaves(found)))

        kept = export.export(jax.jit(flat, **self.options))(*map(_raw, leaves)).serialize()
        return bytes(kept), results[-1]

    def _digest(self, what: str, kind: Any) -> str | None:
        """The name of an entry; None where none is to be made."""
        described = self._described if _folder is not None else None
        if described is None:
            return None
        tree, leaves = kind
        options = repr(self.options), self.donated
        entry = [what, self.name, *options, described, str(tree), list(map(_text, leaves))]
        return identity.digest_json([_surroundings(), _settings(), entry])

    @functools.cached_property
    def _described(self) -> str | None:
        return None if self._key is None else identity.describe_own(self._key)


def remembered(digest: str, make: Callable[[], Any]) -> Any:
    """What `make` gave an earlier process under the same digest, or gives now; it is pickled."""
    assert _folder is not None
    path = _folder / digest
    try:
        written = path.read_bytes()
        if written[:32] == _seal(digest, written[32:]):
            return pickle.loads(written[32:])
        log.warning("%s is damaged, or is another's: it is traced and written anew", path)
    except FileNotFoundError:
        pass
    except Exception as error:
        log.warning("%s cannot be read (%s): it is traced and written anew", path, error)
    made = make()
    try:
        _write(path, digest, pickle.dumps(made))
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
    return made


def _write(path: Path, digest: str, content: bytes) -> None:
    """Writes an entry, whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_seal(digest, content) + content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _seal(digest: str, content: bytes) -> bytes:
    """What an entry begins with; that of another name or with other bytes does not."""
    return hashlib.sha256(digest.encode() + content).digest()


def _random(leaf: Any) -> str:
    """The random number generator that an array's keys are of; empty of one without keys."""
    keys = jax.dtypes.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key)
    return str(jax.random.key_impl(leaf)) if keys else ""


def _raw(leaf: Any) -> Any:
    """The numbers of an array of keys; any other as it is."""
    return jax.random.key_data(leaf) if _random(leaf) else leaf


def _restored(leaf: Any, random: str) -> Any:
    """The array whose numbers `_raw` gave."""
    return jax.random.wrap_key_data(leaf, impl=random) if random else leaf


def _kind(leaf: Any) -> Any:
    """What a program is traced for, of one array."""
    aval = leaf.aval if isinstance(leaf, jax.Array) else jax.typeof(leaf)
    sharding, committed = getattr(leaf, "sharding", None), getattr(leaf, "committed", False)
    return aval.dtype, aval.shape, aval.weak_type, sharding, committed


def _text(kind: Any) -> str:
    """The same in every process."""
    *_, sharding, _ = kind
    devices = sorted(device.id for device in sharding.device_set) if sharding else []
    return f"{' '.join(map(str, kind))} {devices}"


@functools.cache
def _surroundings() -> list[Any]:
    """What else decides what is traced, and stays in a process: versions, code, devices."""
    package, code = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)} ".encode() + path.read_bytes())
    versions = [importlib.metadata.version(name) for name in _PACKAGES]
    devices = [[device.platform, device.device_kind, device.id] for device in jax.devices()]
    return [versions, code.hexdigest(), devices, os.environ.get("XLA_FLAGS", "")]


def _settings() -> dict[str, str]:
    """JAX's settings, but for those of its cache and its log, which decide nothing."""
    values = jax.config.values.items()
    return {k: repr(v) for k, v in values if not ("cache" in k or "log" in k)}
