"""Each method as its authors or the field's codes set it on CIFAR-100, and what they published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

# In the order of the published figures below.
PAIRS = (
    "wrn_40_2:wrn_16_2",
    "resnet56:resnet20",
    "resnet110:resnet20",
    "resnet110:resnet32",
    "resnet32x4:resnet8x4",
    "vgg13:vgg8",
)
PLAIN, KD = "none", "kd"
DATASET = "cifar100"  # of the published figures
EPOCHS = 240  # that phases are of


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method as it is compared.

    Args:
      methods: the weights of `config.methods`.
      options: `config.method_options`.
      recipe: fields of `config.recipe` that differ.
      loss: fields of `config.loss` that differ.
      phases: `config.phases`; "epochs" is of 240.
      by_pair: weights and options of single pairs, {pair: {method: number or options}}.
      published: accuracies in percent, of `PAIRS`; 0 where none was found.
    """

    methods: Mapping[str, float]
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    phases: tuple[Mapping[str, Any], ...] = ()
    by_pair: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    published: tuple[float, ...] = ()

    def of_pair(self, pair: str) -> Setting:
        """The setting with what a pair has of its own."""
        methods, options = dict(self.methods), {k: dict(v) for k, v in self.options.items()}
        for name, own in self.by_pair.get(pair, {}).items():
            if isinstance(own, Mapping):
                options[name] = {**options.get(name, {}), **own}
            else:
                methods[name] = own
        return dataclasses.replace(self, methods=methods, options=options)

    def apply(self, config: ml_collections.ConfigDict) -> None:
        """Sets the fields of a config; phases take their part of its epochs."""
        config.methods, config.method_options = dict(self.methods), dict(self.options)
        config.recipe.update(self.recipe)
        config.loss.update(self.loss)
        config.phases = tuple(
            {**phase, "epochs": max(1, round(phase["epochs"] * config.recipe.epochs / EPOCHS))}
            for phase in self.phases
        )

    def figure(self, pair: str) -> float | None:
        """The published accuracy of a pair, in percent."""
        if pair not in PAIRS or not self.published:
            return None
        return self.published[PAIRS.index(pair)] or None


def _beside(name: str, weight: float, **more: Any) -> Setting:
    """A term beside the whole cross-entropy."""
    return Setting({name: weight, "ce": 1.0}, **more)


def _first(name: str, weight: float, **more: Any) -> Setting:
    """A phase of 30 epochs by the method alone; then training on the labels."""
    phase = {"methods": {name: weight, "ce": 0.0}, "epochs": 30}
    return Setting({"ce": 1.0}, phases=(phase,), **more)


# RepDistiller's weights, or the authors'; DKD's and ReviewKD's are those of mdistiller's pairs.
SETTINGS: dict[str, Setting] = {
    PLAIN: Setting({}, published=(73.26, 69.06, 69.06, 71.14, 72.50, 70.36)),
    KD: Setting({"kd": 1.0}, published=(74.92, 70.66, 70.67, 73.08, 73.33, 72.98)),
    "dkd": _beside(
        "dkd",
        1.0,
        options={"dkd": {"beta": 8.0}},
        by_pair={
            "wrn_40_2:wrn_16_2": {"dkd": {"beta": 6.0}},
            "resnet56:resnet20": {"dkd": {"beta": 2.0}},
            "resnet110:resnet32": {"dkd": {"beta": 2.0}},
            "vgg13:vgg8": {"dkd": {"beta": 6.0}},
        },
        published=(76.24, 71.97, 71.06, 74.11, 76.32, 74.68),
    ),
    "dist": _beside("dist", 2.0, published=(75.51, 71.75, 71.65, 73.69, 76.31, 73.89)),
    "ls_kd": Setting(
        # 0.1 of the cross-entropy and 9 of the KL at T = 2: kd_weight is part of the latter.
        {"kd": 10.0, "ce": 0.1},
        recipe={"temperature": 2.0, "kd_weight": 0.9},
        loss={"standardise": True},
        published=(76.11, 71.43, 71.48, 74.17, 76.62, 74.36),
    ),
    "ls_dkd": _beside(
        "dkd",
        9.0,
        options={"dkd": {"beta": 8.0, "temperature": 2.0, "scaling": "standardise"}},
    ),
    "normkd": Setting({"normkd": 0.9, "ce": 0.1}),
    "ctkd": Setting({"ctkd": 0.9, "ce": 0.1}, published=(0, 71.19, 0, 0, 0, 0)),
    "wttm": _beside("wttm", 4.0, published=(76.37, 71.92, 71.67, 74.13, 76.06, 74.44)),
    "nkd": _beside("nkd", 1.0),
    "mse_logits": Setting({"mse_logits": 1.0, "ce": 0.0}),
    "fitnet": _beside("fitnet", 100.0, published=(73.58, 69.21, 68.99, 71.06, 73.50, 71.02)),
    "at": _beside("at", 1000.0, published=(74.08, 70.55, 70.22, 72.31, 73.44, 71.43)),
    "sp": _beside("sp", 3000.0, published=(73.83, 69.67, 70.04, 72.69, 72.94, 72.68)),
    "cc": _beside("cc", 0.02, published=(0, 0, 0, 0, 72.97, 0)),
    "rkd": _beside("rkd", 1.0, published=(73.35, 69.61, 69.25, 71.82, 71.90, 71.48)),
    "pkt": _beside("pkt", 30000.0, published=(0, 0, 0, 0, 73.64, 0)),
    "vid": _beside("vid", 1.0, published=(74.11, 70.38, 70.16, 72.61, 73.09, 71.23)),
    "nst": _beside("nst", 50.0, published=(0, 0, 0, 0, 73.30, 0)),
    "kdsvd": _beside("kdsvd", 1.0),
    "srrl": _beside("srrl", 1.0),
    "ab": _first("ab", 1.0, published=(0, 0, 0, 0, 73.17, 0)),
    "fsp": _first("fsp", 1.0, published=(0, 0, 0, 0, 72.62, 0)),
    "ft": _beside(
        "ft",
        200.0,
        phases=({"methods": {"ft": 1.0}, "epochs": 30, "learning_rate": 0.01},),
        published=(0, 0, 0, 0, 72.86, 0),
    ),
    "crd": _beside("crd", 0.8, published=(75.48, 71.16, 71.46, 73.48, 75.51, 73.94)),
    "crd_kd": Setting({"crd": 0.8, "kd": 1.0, "ce": 1.0}, recipe={"kd_weight": 1.0}),
    "reviewkd": _beside(
        "reviewkd",
        5.0,
        by_pair={
            "resnet56:resnet20": {"reviewkd": 0.6},
            "resnet110:resnet20": {"reviewkd": 0.6},
            "resnet110:resnet32": {"reviewkd": 1.0},
        },
        published=(76.12, 71.89, 71.34, 73.89, 75.63, 74.84),
    ),
    "semckd": Setting({"semckd": 400.0, "kd": 1.0, "ce": 1.0}, recipe={"kd_weight": 1.0}),
}
