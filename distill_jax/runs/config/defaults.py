"""Every field of a config with its default, and how a config is cut down to seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from distill_jax import data
from distill_jax.methods import TESKD


def default_config() -> ml_collections.ConfigDict:
    """Every field there is, with its default; a config file changes some of them."""
    return ml_collections.ConfigDict(
        {
            "name": "experiment",
            # Where examples come from: one of distill_jax.data.NAMES or a registered data set.
            "dataset": {
                "name": "digits",
                "data_dir": "",
                "valid_fraction": 0.1,
                "split_seed": 0,
                "mean": (),
                "std": (),
                # Arguments of a registered data set's function.
                "options": ml_collections.FieldReference({}, field_type=object),
            },
            # The row, largest first, and what is compared in it: none, direct, chain, dense,
            # mutual, a path a>b>c, edges c<a+b;a<c (those of a cycle teach each other live), or a
            # square matrix whose [i][j] lets j teach i; with +drop the last network is taught
            # stochastically.
            "networks": ("plane6", "plane4", "plane2"),
            "guidance": ("none", "direct", "chain", "dense"),
            # Whose results are wanted; the smallest where empty, with those of its cycle.
            "students": (),
            "seeds": (0,),
            # standard: the field's usual loss, weights chosen on the validation split;
            # paper: the loss as the papers write it; official: as their codes compute it, and the
            # best epoch chosen on the test set as they do.
            "protocol": "standard",
            "selection": "",  # validation, test or last; by protocol where empty
            "recipe": {
                "epochs": 30,
                "batch_size": 128,
                "last_batch": "drop",
                "augment": "none",
                "train_limit": 0,
                "sync_bn": True,
                "temperature": 4.0,
                "kd_weight": 0.5,
                "optimizer": "sgd",
                # Where unset what the network's family was published with; 0.001 of adamw.
                "learning_rate": ml_collections.config_dict.placeholder(float),
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 1e-4,
                "schedule": "constant",
                "milestones": (0.5, 0.75),
                "decay": 0.1,
                "warmup_epochs": 0.0,
                "clip_norm": 0.0,  # of all gradients together; 0 clips nothing
                "accumulate_steps": 1,  # steps whose gradients make one update
                "decayed": "all",  # or kernels: weight decay spares biases and BatchNorms
                "trainable": (),  # regular expressions of the parameters that move; all where empty
                "frozen": (),  # and of those that do not
            },
            # What teaches, with its weight: {"kd": 1.0, "fitnet": 100.0}; dml along the edges of a
            # cycle alone, and where it is not named all others travel along these too. The
            # cross-entropy counts (1 - kd_weight) beside kd, else 1; {"ce": weight} says otherwise.
            "methods": ml_collections.FieldReference({"kd": 1.0, "dml": 1.0}, field_type=object),
            # {method: {number: value}}, such as {"fitnet": {"hint_layer": 1}}.
            "method_options": ml_collections.FieldReference({}, field_type=object),
            # Trained before the stage itself, each from the weights of the one before: a dict of
            # recipe fields and methods that differ, such as {"methods": {"fitnet": 1, "ce": 0},
            # "epochs": 10, "trainable": ("conv1.*", "bn1.*", "layer1.*", "layer2.*")}.
            "phases": (),
            # How the terms of kd are counted; by protocol where empty.
            "loss": {"kl_reduction": "", "cross_entropy": "", "teachers": ""},
            # teacher_droppable: whether the largest may be dropped too; by protocol where unset.
            "dropping": {
                "kind": "",
                "number": 1,
                "survival": 0.75,
                "teacher_droppable": ml_collections.config_dict.placeholder(bool),
            },
            # TESKD, for networks called evolving:NAME; see distill_jax.methods.TESKD.
            "evolve": dataclasses.asdict(TESKD()),
            # Networks that are not trained but read: FILE for the largest of the row, or
            # NAME=FILE,NAME=FILE. FILE#NAME takes one of several weights in a file; a network of an
            # earlier run is its stage's folder, or RUN_FOLDER:GUIDANCE/NETWORK/SEED.
            "teacher_weights": "",
            # {network: {recipe field, methods, method_options or seed: value}}
            "overrides": {},
            # {label: {recipe field: value}}: plain training of the students, changed like that.
            "controls": {},
            # {recipe field or "survival": values}: every row once for each of them, trained at once
            # where they are numbers of the loss or the optimizer.
            "sweep": ml_collections.FieldReference({}, field_type=object),
            "dtype": "float32",
            "parallel": "jit",  # or pmap
            "devices": 1,  # 0 takes all; on a CPU as many as are asked for
            "population": 0,  # how many seeds or values train at once: 0 as pays, 1 one by one
            # Where the teachers' logits come from: graph, computed at every step; table, computed
            # once for images that never change; auto, the table where it can be and is small.
            "teacher_logits": "auto",
            "nonfinite": "halt",  # or "skip N" to pass over up to N steps that are not finite
            "checkpoint_every": "5 minutes",
        }
    )


def smoke(config: ml_collections.ConfigDict, **changes: Any) -> ml_collections.ConfigDict:
    """The config cut down to seconds: synthetic images of the right kind, one epoch, one seed."""
    shape, classes = {
        "digits": ("8x8x1", 10),
        "fashion_mnist": ("28x28x1", 10),
        "cifar100": ("32x32x3", 100),
    }.get(config.dataset.name, ("32x32x3", 10))
    config.name += "-smoke"
    if data.identity_of(config.dataset.name) is None:  # no images are made up for another task
        train, test = max(128, 2 * classes), max(64, classes)
        config.dataset.name = f"synthetic:{shape}:{classes}:{train}:{test}"
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
