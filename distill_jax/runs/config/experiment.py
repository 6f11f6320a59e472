"""The typed values that come of a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from distill_jax import graph, methods
from distill_jax.methods import KD, TESKD, CrossEntropy, LossOptions, Method
from distill_jax.models import Network, backbone_name, published_rate
from distill_jax.train.dropping import Dropping
from distill_jax.train.optim import OptimOptions
from distill_jax.train.sharding import Topology
from distill_jax.train.stage import Recipe

CLASSIFIER = "classifier"  # what `init.anew` draws
LOGITS = "logits:"  # before a file of logits, in the place of weights
ADAM_RATE = 1e-3  # of adamw, where none is given
# The loss as the papers' texts have it, and as the authors' codes compute it. A chain has one
# teacher, so that the cross-entropy counts once either way. The standard is the mean over teachers:
# steps are then of one size however many there are.
LOSSES = {
    "standard": LossOptions(teachers="mean"),
    "paper": LossOptions(cross_entropy="per_teacher"),
    "official": LossOptions(kl_reduction="element_mean"),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A line of the table: a graph under its label.

    Args:
      label: what the table calls it.
      spec: the guidance as the config names it.
      graph: who teaches whom.
      students: the networks whose results are wanted.
      stochastic: teachers of the last network are dropped at random.
      changes: recipe fields, and weights of methods as "methods.NAME", that differ from the
        experiment's for the networks whose results are wanted.
      control: plain training under other recipe fields, to compare with.
    """

    label: str
    spec: str
    graph: graph.Graph
    students: tuple[str, ...]
    stochastic: bool = False
    changes: tuple[tuple[str, Any], ...] = ()
    control: bool = False


@dataclasses.dataclass(frozen=True)
class Init:
    """What networks start from.

    Args:
      weights: network -> file.
      anew: what of it is drawn in spite of these: "" or CLASSIFIER.
    """

    weights: dict[str, str]
    anew: str = ""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved config: everything typed and checked, nothing left to default."""

    name: str
    dataset: dict[str, Any]
    networks: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    students: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: dict[str, Any]
    overrides: dict[str, dict[str, Any]]
    methods: dict[str, float]
    method_options: dict[str, dict[str, Any]]
    phases: tuple[dict[str, Any], ...]
    loss: LossOptions
    evolve: TESKD
    dropping: Dropping
    teacher_weights: dict[str, str]
    init: Init
    selection: str
    protocol: str
    dtype: str
    precision: str
    deterministic: bool
    topology: Topology
    population: int
    workers: int
    teacher_logits: str
    max_nonfinite_steps: int
    checkpoint_every: str
    tensorboard: bool

    def recipe_of(self, network: str, **changes: Any) -> Recipe:
        """The recipe of one network, with its overrides and then `changes`."""
        values = {
            "selection": self.selection,
            **self.recipe,
            **self.overrides.get(network, {}),
            **changes,
        }
        if values["learning_rate"] is None:
            base = graph.architecture(backbone_name(network))[0]
            adam = values["optimizer"] == "adamw"
            values["learning_rate"] = ADAM_RATE if adam else published_rate(base)
        fields = {f.name for f in dataclasses.fields(OptimOptions)}
        optim = OptimOptions(**{k: v for k, v in values.items() if k in fields})
        others = {f.name for f in dataclasses.fields(Recipe)} - {"optim"}
        return Recipe(**{k: v for k, v in values.items() if k in others}, optim=optim)

    def methods_of(
        self,
        network: Network,
        frozen: Sequence[str],
        live: Sequence[str],
        changes: Mapping[str, Any],
        before: Collection[str] = (),
        phase: bool = False,
    ) -> list[tuple[str, Method, float]]:
        """The methods of one network with their weights, the cross-entropy first.

        Args:
          network: the network; one with branches has the method that trains them besides, where
            none that is named does.
          frozen: the names of its frozen teachers.
          live: those of its live ones.
          changes: what differs from the experiment's: "methods", "method_options" and, as
            "methods.NAME", other weights of methods that it has.
          before: the names of those that earlier phases have.
          phase: whether they are a phase's, in which those that are new may be prepared.

        Raises:
          ValueError: a teacher that none of the methods hears, or a method that is not prepared.
        """
        named, ce, brought = self._named(network, changes, before, phase)
        every, own = [method for _, method, _ in named], network.name
        heard = [methods.heard(method, every, own, len(frozen), live) for method in every]
        chosen = [
            one for one, places in zip(named, heard, strict=True) if places or not one[1].taught
        ]
        if brought and any(m.trains_branches for name, m, _ in chosen if name != network.method):
            chosen = [one for one in chosen if one[0] != network.method]
        for name, method, _ in chosen:
            if not phase and name not in before and method.preparation() is not None:
                raise ValueError(
                    f"method {name!r} for {own} teaches after a phase that prepares it: expected "
                    f"one in config.phases, such as {{'methods': {{{name!r}: 1}}, 'epochs': 30}}"
                )
        if any(method.taught for method in every):
            for place, teacher in enumerate((*frozen, *live)):
                pairs = zip(every, heard, strict=True)
                if not any(place in places for method, places in pairs if method.taught):
                    raise ValueError(
                        f"{teacher} teaches {own}, but none of its methods does so along that edge "
                        f"({', '.join(name for name, *_ in named)}): name one in config.methods"
                    )
        if not (frozen or live) and any(method.taught for method in every):
            ce = None  # weighed against what is not there
        if ce is None and any(method.replaces_ce for _, method, _ in chosen):
            return chosen
        beside_kd = ce is None and any(name == "kd" for name, *_ in chosen)
        term = CrossEntropy(self.loss if beside_kd else None)
        return [("ce", term, 1.0 if ce is None else ce), *chosen]

    def _named(
        self,
        network: Network,
        changes: Mapping[str, Any],
        before: Collection[str],
        phase: bool,
    ) -> tuple[list[tuple[str, Method, float]], float | None, bool]:
        """The methods that are named with their weights, first the one that the network brings.

        Returns:
          The methods, the weight of the cross-entropy where it is told, and whether the first of
          them is the network's without being named.
        """
        own = self.overrides.get(network.name, {})
        values = {**own, **changes}
        weights = dict(values.get("methods", self.methods))
        swept = {
            name.removeprefix("methods."): value
            for name, value in values.items()
            if name.startswith("methods.")
        }
        weights |= {name: value for name, value in swept.items() if name in weights}
        options = {**self.method_options, **own.get("method_options", {})}
        options |= changes.get("method_options", {})
        ce = weights.pop("ce", None)
        brought = network.method is not None and network.method not in weights
        if network.method is not None:
            weights = {network.method: weights.pop(network.method, 1.0), **weights}
        elsewhere: dict[str, Method] = {"kd": KD(self.loss), "teskd": self.evolve}
        named = []
        for name, weight in weights.items():
            method = elsewhere.get(name) or methods.build(name, options.get(name))
            prepared = method.preparation() if phase and name not in before else None
            named.append((name, prepared or method, weight))
        return named, ce, brought

    def seed_of(self, network: str, seed: int) -> int:
        """The seed of one network: its override's, else the run's."""
        return self.overrides.get(network, {}).get("seed", seed)
