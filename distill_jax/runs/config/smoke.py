"""How a config is cut down to seconds."""

from __future__ import annotations

from typing import Any

import ml_collections

from distill_jax import data

# In the place of other tasks than images.
_MADE_UP = {
    **dict.fromkeys(("sst2", "text"), "synthetic_text:2:128:64"),
    **dict.fromkeys(("fb15k237", "wn18rr", "triples"), "synthetic_triples:40:4:400"),
}


def smoke(config: ml_collections.ConfigDict, **changes: Any) -> ml_collections.ConfigDict:
    """The config cut down to seconds: made-up examples of the right kind, one epoch, one seed."""
    source = config.dataset.name.partition(":")[0]
    shape, classes = {
        "digits": ("8x8x1", 10),
        "fashion_mnist": ("28x28x1", 10),
        "cifar100": ("32x32x3", 100),
    }.get(config.dataset.name, ("32x32x3", 10))
    config.name += "-smoke"
    if source in _MADE_UP:
        config.dataset.name = _MADE_UP[source]
        config.dataset.options = {}
    elif data.identity_of(config.dataset.name) is None:  # no images are made up for another task
        train, test = max(128, 2 * classes), max(64, classes)
        config.dataset.name = f"synthetic:{shape}:{classes}:{train}:{test}"
        config.dataset.options = {}
        config.dataset.valid_fraction = 0.5
    config.seeds = (0,)
    config.recipe.update(epochs=1, batch_size=32, warmup_epochs=0.0)
    for section in (config.recipe, *config.overrides.values(), *config.controls.values()):
        if section.get("train_limit"):
            section.train_limit = 4
        if "epochs" in section:
            section.epochs = 1
    config.phases = tuple({**phase, "epochs": 1} for phase in config.phases)
    config.update(changes)
    return config
