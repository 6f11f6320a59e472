"""Which of the weights in a file are a network's.

Checkpoints hold more than one network's weights, under keys of many names, and wrappers put their
own names before them. What is taken is what bears all of the network's names, whatever stands
before these; where that leaves a choice it is refused, and the choice is the caller's.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from distill_jax import graph, models
from distill_jax.interop import torch_weights
from distill_jax.interop.torch_files import Contents, Entry
from distill_jax.interop.torch_weights import WeightsError
from distill_jax.models import Network

_USUAL = ("state_dict", "model", "model_state_dict", "net")  # keys of state dicts
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and averages, torch.compile
_COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")  # the last: thop's


@dataclasses.dataclass(frozen=True)
class _View:
    """What a network would take of one mapping: the entries behind a prefix, under its names.

    Args:
      path: the keys that lead to the mapping.
      prefix: of a wrapper, with its dot.
      names: of the entries behind the prefix, name in the mapping -> the network's name.
      right: how many of the network's entries are there with their shapes.
      complete: whether all of the network's parameters are, and nothing else.
      beside: weights of the mapping that are not behind the prefix.
    """

    path: str
    prefix: str
    names: dict[str, str]
    right: int
    complete: bool
    beside: tuple[str, ...]

    @property
    def label(self) -> str:
        return ".".join(part for part in (self.path, self.prefix[:-1]) if part)


def choose(contents: Contents, network: Network, choice: str | None) -> dict[str, np.ndarray]:
    """The state dict of `network` in a file, under the network's names.

    Args:
      contents: of the file.
      network: whose weights they are.
      choice: keys or a wrapper's name, where several weights would do.

    Raises:
      WeightsError: several would do, others stand beside them, or what `Contents.arrays` raises.
    """
    views = [
        _view(path, prefix, entries, names, network)
        for path, entries in contents.entries.items()
        for names in _namings(network)
        for prefix in _prefixes(entries, names.values())
    ]
    if choice is not None:
        views = [view for view in views if _is_chosen(view.label, choice)]
    if not views:
        raise WeightsError(_nothing(contents, choice))
    complete = {view.label: view for view in views if view.complete}
    best = max(complete.values() or views, key=lambda view: (view.right, _is_usual(view.path)))
    others = [label for label in complete if label != best.label]
    if choice is None and best.complete:
        beside = {_outer(name): None for name in best.beside}
        for key in (*contents.averages, *beside):
            told = any(f"{key}.".startswith(f"{label}.") for label in others)
            if not told and not any(_is_chosen(x, key) for x in (best.label, *others)):
                others.append(key)
    if others and best.complete:
        raise _several([best.label, *others], f"those of {network.name} alone")
    arrays = contents.arrays(best.path)
    return {ours: arrays[name] for name, ours in best.names.items()}


def only(contents: Contents, choice: str | None) -> dict[str, np.ndarray]:
    """The one state dict in a file, without the names of wrappers before all of its names.

    Raises:
      WeightsError: there are several, or none, or what `Contents.arrays` raises.
    """
    paths = list(contents.entries)
    if choice is not None:
        paths = [path for path in paths if _is_chosen(path, choice)]
    else:
        paths = [path for path in paths if _is_usual(path)] or paths
    if not paths:
        raise WeightsError(_nothing(contents, choice))
    averages = [] if choice is not None else [k for k in contents.averages if k not in paths]
    if len(paths) > 1 or averages:
        raise _several([*paths, *averages], "one state dict")
    return unwrapped(contents.arrays(paths[0]))


def names_in(state: Iterable[str], network: Network) -> dict[str, str]:
    """The names of a state dict -> the network's, in the way of naming that most of them are of."""
    state = set(state)
    naming = max(_namings(network), key=lambda names: len(state & set(names.values())))
    return {theirs: name for name, theirs in naming.items()}


def unwrapped(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state without the names that wrappers put before all of its names."""
    state = dict(state)
    while prefix := next((w for w in _WRAPPERS if _all_begin(state, w)), None):
        state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state


def _all_begin(names: Iterable[str], prefix: str) -> bool:
    weights = [name for name in names if not name.endswith(_COUNTERS)]
    return bool(weights) and all(name.startswith(prefix) for name in weights)


def _several(labels: list[str], expected: str) -> WeightsError:
    shown = ", ".join(label or "the top" for label in labels)
    example = next(label for label in labels if label)
    return WeightsError(
        f"holds several weights, under {shown}: expected {expected}, or the choice behind the "
        f"file's name, as in FILE#{example}"
    )


def _nothing(contents: Contents, choice: str | None) -> str:
    if contents.entries and choice is not None:
        there = [path or "(the top)" for path in contents.entries][:8]
        return (
            f"holds no weights under {choice!r}: expected one of {', '.join(there)}, or what "
            "stands before the names there"
        )
    return (
        f"holds no tensors by name: expected a state dict, at the top or under one of "
        f"{', '.join(_USUAL)}; the top holds {list(contents.top)}"
    )


def _is_usual(path: str) -> bool:
    return path.rpartition(".")[2] in _USUAL


def _is_chosen(label: str, choice: str) -> bool:
    return label == choice or (bool(choice) and f".{choice}." in f".{label}.")


def _outer(name: str) -> str:
    """The name of the module that an entry beside the weights belongs to, from the outside."""
    while prefix := next((w for w in _WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(prefix)
    return name.partition(".")[0]


def _is_weight(name: str, entry: Entry) -> bool:
    return not name.endswith(_COUNTERS) and not entry.dtype.startswith(("int", "uint", "bool"))


def _prefixes(entries: Mapping[str, Entry], wanted: Iterable[str]) -> list[str]:
    """What may stand before a network's names: "", and what does before some of them."""
    kernels = [name for name in wanted if name.endswith("weight")]
    found = {""} | {w for w in _WRAPPERS if _all_begin(entries, w)}
    for anchor in kernels[:1] + kernels[-1:]:
        found |= {
            name.removesuffix(anchor) for name in entries if f".{name}".endswith(f".{anchor}")
        }
    return sorted(found)


def _view(
    path: str, prefix: str, entries: Mapping[str, Entry], names: dict[str, str], network: Network
) -> _View:
    ours = {theirs: name for name, theirs in names.items()}
    shapes = _shapes(network)
    behind = {name: name.removeprefix(prefix) for name in entries if name.startswith(prefix)}
    renamed = {
        name: ours.get(bare, bare)
        for name, bare in behind.items()
        if not bare.endswith(_COUNTERS) or bare in ours
    }
    more = [x for x in renamed.values() if x not in shapes]
    if more and any(set(map(_first_peer, more)) <= names for names in _branches(network)):
        renamed = {name: x for name, x in renamed.items() if x not in more}
        more = []
    right = {x for name, x in renamed.items() if shapes.get(x) == entries[name].shape}
    parameters = {name for name in shapes if not name.endswith(("running_mean", "running_var"))}
    beside = [name for name in entries if name not in behind and _is_weight(name, entries[name])]
    complete = parameters <= right and not more
    return _View(path, prefix, renamed, len(right), complete, tuple(beside))


@functools.lru_cache(maxsize=128)
def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    return dict(torch_weights.entries(network))


def _first_peer(name: str) -> str:
    """A peer's entry as the first peer's: there may be any number of them."""
    return re.sub(r"^peer\d+\.", "peer1.", name)


@functools.lru_cache(maxsize=128)
def _branches(network: Network) -> tuple[frozenset[str], ...]:
    """The names of the branches' entries, of each kind of branches that it may be the backbone of.

    With these `network` was trained, and a file may hold them beside it.
    """
    if network.backbone is not network:
        return ()
    found, own = [], _shapes(network).keys()
    base = graph.architecture(network.name)[0]  # the branches are those of every draw
    for prefix in models.BRANCHED:
        try:
            whole = models.build(f"{prefix}:{base}", network.classes, network.image_shape)
        except ValueError:  # it has none of this kind
            continue
        found.append(frozenset(map(_first_peer, _shapes(whole).keys() - own)))
    return tuple(found)


# ------------------------------------------------------------------------------ names of others
_RENAMINGS = (
    (),
    ((r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear.")),  # RepDistiller's ResNet-50
    ((r"\.downsample\.", ".shortcut."),),
    ((r"^fc\.", "linear."),),
)


def _namings(network: Network) -> list[dict[str, str]]:
    """Our names -> theirs, for each way in which other code names the same network."""
    own = list(_shapes(network))
    namings = [{name: _renamed(name, rules) for name in own} for rules in _RENAMINGS]
    namings += [_as_features(own), _as_sequences(own)]
    return [naming for i, naming in enumerate(namings) if naming not in namings[:i]]


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, text in rules:
        name = re.sub(pattern, text, name)
    return name


def _as_features(names: list[str]) -> dict[str, str]:
    """torchvision's names of a VGG whose blocks are conv1, bn1, ..., layer1.0, layer1.1, ...

    There all layers are numbered through: convolution, BatchNorm, ReLU and, after a block, a pool;
    and in the classifier linear, ReLU, dropout.
    """
    if "classifier.4.weight" not in names or "layer1.0.weight" not in names:
        return {name: name for name in names}
    layers = [re.fullmatch(r"layer(\d+)\.(\d+)\.weight", name) for name in names]
    last = {0: 4}  # the number of a block's last BatchNorm, within the block
    for match in filter(None, layers):
        block, index = map(int, match.groups())
        last[block] = max(last.get(block, 0), index)
    starts = {block: sum(last[b] + 3 for b in range(block)) for block in last}

    def theirs(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        if match := re.fullmatch(r"(conv|bn)(\d)", module):
            return f"features.{3 * int(match[2]) - 3 + (match[1] == 'bn')}.{leaf}"
        if match := re.fullmatch(r"layer(\d+)\.(\d+)", module):
            return f"features.{starts[int(match[1])] + int(match[2])}.{leaf}"
        if match := re.fullmatch(r"classifier\.(\d)", module):
            return f"classifier.{int(match[1]) // 2 * 3}.{leaf}"
        return name

    return {name: theirs(name) for name in names}


def _as_sequences(names: list[str]) -> dict[str, str]:
    """The names in weiaicunzai's collection for CIFAR-100 of a ResNet of four stages.

    There the stem and each block's layers are numbered through: convolution, BatchNorm, ReLU; and
    the stages are called conv2_x to conv5_x.
    """
    if "conv1.weight" not in names or "layer4.0.conv1.weight" not in names:
        return {name: name for name in names}

    def place(match: re.Match[str]) -> int:
        return 3 * int(match[2]) - 3 + (match[1] == "bn")

    def theirs(name: str) -> str:
        name = re.sub(r"^(conv|bn)(1)\.", lambda m: f"conv1.{place(m)}.", name)
        name = re.sub(r"\.(conv|bn)(\d)\.", lambda m: f".residual_function.{place(m)}.", name)
        name = re.sub(r"^layer(\d)\.", lambda m: f"conv{int(m[1]) + 1}_x.", name)
        return name.replace(".downsample.", ".shortcut.")

    return {name: theirs(name) for name in names}
