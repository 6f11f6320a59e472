"""Every field of a config: its path, its default and what it means."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from distill_jax.methods import TESKD


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of the config.

    Args:
      path: where it stands, dotted.
      default: its value where none is given.
      about: what it means, its values and units, in one plain line.
      kind: the type of a field that is unset by default; `object` of one of several types, and of
        a dict that is given whole, whose keys may have dots.
    """

    path: str
    default: Any
    about: str
    kind: type | None = None

    @property
    def section(self) -> str:
        """The section it belongs to, "" at the top."""
        return self.path.rpartition(".")[0]


# In the order of the help and of docs/config.md.
SECTIONS = {
    "": "The experiment",
    "dataset": "Where examples come from",
    "recipe": "How each network is trained",
    "loss": "How the terms of kd are counted",
    "dropping": "How teachers are dropped, in guidances that end in +drop",
    "evolve": "TESKD, for networks called evolving:NAME",
    "init": "Weights that networks start from, and are trained on",
}

FIELDS = (
    Field("name", "experiment", "Name of the experiment. Results go to runs/NAME by default."),
    Field(
        "dataset.name",
        "digits",
        "digits, fashion_mnist, cifar10, cifar100, folder:DIR, tfds:NAME, "
        "synthetic:HxWxC:CLASSES:TRAIN:TEST, sst2, text:PATH, fb15k237, wn18rr, "
        "triples:PATH, or a registered data set.",
    ),
    Field(
        "dataset.data_dir",
        "",
        "Folder that holds the files. Where empty, the usual places are searched: "
        "$DISTILL_JAX_DATA, then ~/.cache/distill_jax.",
    ),
    Field(
        "dataset.valid_fraction",
        0.1,
        "Fraction of each class's training images that is held out for validation.",
    ),
    Field("dataset.split_seed", 0, "Seed by which the held-out images are chosen."),
    Field(
        "dataset.mean",
        (),
        "Mean of each channel, in units of pixel/255. Where empty, the published one or that of "
        "the training images.",
    ),
    Field("dataset.std", (), "Standard deviation of each channel, in the same units."),
    Field(
        "dataset.options",
        {},
        "Arguments of a registered data set's function; of sst2 and text vocabulary (8000 word "
        "pieces at most) and length (64 tokens); of folder size (height and width, 0 for the most "
        "frequent) and test_fraction (0, of folders that are classes).",
        object,
    ),
    Field("networks", ("plane6", "plane4", "plane2"), "The row of networks, largest first."),
    Field(
        "guidance",
        ("none", "direct", "chain", "dense"),
        "Who teaches whom; each is trained and compared. none, direct, chain, dense, mutual, a "
        "path a>b>c, edges c<a+b;a<c, or a square matrix whose [i][j] lets j teach i. With +drop, "
        "teachers of the last network are dropped at random.",
    ),
    Field(
        "students",
        (),
        "Networks whose results are wanted. Where empty, the smallest, with those on its cycle.",
    ),
    Field("seeds", (0,), "Every network is trained once for each of these."),
    Field(
        "protocol",
        "standard",
        "standard: the field's usual loss, weights chosen on the validation split. paper: the loss "
        "as the papers write it. official: the loss as the authors' codes compute it, weights "
        "chosen on the test set.",
    ),
    Field(
        "selection",
        "",
        "Which epoch's weights are kept: validation (the best there), test (the best there, biased "
        "upwards) or last. Where empty, by protocol: test of official, else validation.",
    ),
    Field("recipe.epochs", 30, "Epochs of training."),
    Field("recipe.batch_size", 128, "Examples of a step, over all devices together."),
    Field("recipe.last_batch", "drop", "The incomplete batch of an epoch: drop it or keep it."),
    Field(
        "recipe.augment",
        "none",
        "none, flip (random mirror images), crop_flip (random crops of the padded image too) or "
        "inception_crop (random parts of 8 % or more, resized, and mirror images).",
    ),
    Field(
        "recipe.mixup",
        0.0,
        "α of mixup, by which images of a batch are mixed by twos, and their labels; 0 for none.",
    ),
    Field(
        "recipe.cutmix",
        0.0,
        "α of CutMix, which puts a box of one image into another. 0 for none; where mixup is "
        "above 0 too, each mini-batch has one of both.",
    ),
    Field("recipe.train_limit", 0, "Training images a class; 0 takes all."),
    Field(
        "recipe.sync_bn", True, "BatchNorm sees the whole batch, and not each device its own share."
    ),
    Field("recipe.temperature", 4.0, "T of kd, above 0."),
    Field("recipe.kd_weight", 0.5, "λ of kd, from 0 to 1; the cross-entropy has 1 - λ."),
    Field(
        "recipe.label_smoothing",
        0.0,
        "ε, from 0 to below 1, that the cross-entropy with the labels takes from the label and "
        "spreads over all classes.",
    ),
    Field(
        "recipe.ema",
        0.0,
        "Decay, a step, of an exponential moving average of the network's weights and statistics, "
        "such as 0.999. The average is what is evaluated, kept and teaches others; 0 keeps none.",
    ),
    Field("recipe.optimizer", "sgd", "sgd, adamw or a registered one."),
    Field(
        "recipe.learning_rate",
        None,
        "Largest learning rate of the schedule. Where unset, what the network's family was "
        "published with; 0.001 of adamw.",
        float,
    ),
    Field("recipe.momentum", 0.9, "Momentum of sgd."),
    Field("recipe.nesterov", False, "Nesterov momentum of sgd."),
    Field("recipe.weight_decay", 1e-4, "Weight decay, of what recipe.decayed says."),
    Field(
        "recipe.schedule",
        "constant",
        "constant, piecewise, cosine (to zero) or takd_code (what TAKD's code does to ResNets).",
    ),
    Field(
        "recipe.milestones",
        (0.5, 0.75),
        "Fractions of the run at which piecewise multiplies the rate by recipe.decay.",
    ),
    Field("recipe.decay", 0.1, "Factor by which piecewise multiplies the rate."),
    Field("recipe.warmup_epochs", 0.0, "Epochs of linear warm-up from zero."),
    Field(
        "recipe.clip_norm",
        0.0,
        "Gradients are scaled down to this norm, that of all of them together; 0 leaves them.",
    ),
    Field("recipe.accumulate_steps", 1, "Steps whose gradients are averaged for one update."),
    Field(
        "recipe.decayed", "all", "What decays: all, or kernels, which spares biases and BatchNorms."
    ),
    Field(
        "recipe.trainable",
        (),
        "Regular expressions of the parameters that are trained, such as 'layer3.*'. Where empty, "
        "all are.",
    ),
    Field("recipe.frozen", (), "Regular expressions of parameters that are not trained."),
    Field(
        "methods",
        {"kd": 1.0, "dml": 1.0},
        "How teachers teach: kd, dml, fitnet, others that docs/methods.md lists, or registered "
        "methods, each with its weight. dml serves the edges of a cycle alone; without it the "
        "others serve these too. The cross-entropy weighs 1 - recipe.kd_weight beside kd, else 1; "
        "an entry ce sets its weight.",
        object,
    ),
    Field(
        "method_options",
        {},
        'Options of methods by name, such as {"fitnet": {"hint_layer": 1}}.',
        object,
    ),
    Field(
        "phases",
        (),
        "Training that goes before, each phase from the weights of the one before it: a dict of "
        'recipe fields and methods that differ, such as {"methods": {"fitnet": 1, "ce": 0}, '
        '"epochs": 10}.',
    ),
    Field(
        "loss.kl_reduction",
        "",
        "batch_mean sums the KL over classes; element_mean averages it over them. Where empty, by "
        "protocol: official has element_mean, others batch_mean.",
    ),
    Field(
        "loss.cross_entropy",
        "",
        "How often the cross-entropy counts: once, per_teacher or per_kept_teacher. Where empty, "
        "by protocol: paper has per_teacher, others once.",
    ),
    Field(
        "loss.teachers",
        "",
        "mean or sum over the teachers. Where empty, by protocol: standard has mean, others sum.",
    ),
    Field(
        "loss.standardise",
        False,
        "Take mean and standard deviation out of each example's logits before the KL of kd.",
    ),
    Field(
        "dropping.kind",
        "",
        "fixed drops the same number for every mini-batch; bernoulli keeps each teacher with a "
        "probability; none drops nobody. Where empty, by protocol: paper has bernoulli, others "
        "fixed.",
    ),
    Field("dropping.number", 1, "How many teachers fixed drops."),
    Field("dropping.survival", 0.75, "Probability by which bernoulli keeps a teacher."),
    Field(
        "dropping.teacher_droppable",
        None,
        "Whether the largest may be dropped too. Where unset, True unless the protocol is paper.",
        bool,
    ),
    Field("evolve.temperature", TESKD.temperature, "T of the softened logits, above 0."),
    Field("evolve.ce_weight", TESKD.ce_weight, "Weight of the cross-entropies of all exits."),
    Field("evolve.kd_weight", TESKD.kd_weight, "Weight of the KL from the backbone to a branch."),
    Field("evolve.feature_weight", TESKD.feature_weight, "Weight of the feature term."),
    Field(
        "evolve.detach_target",
        TESKD.detach_target,
        "Keep the branches from teaching the backbone through the KL.",
    ),
    Field(
        "evolve.branch_weights",
        TESKD.branch_weights,
        "One factor for each branch, the deepest first. Where empty, all are 1.",
    ),
    Field(
        "evolve.feature_reduction",
        TESKD.feature_reduction,
        "The feature term over the batch: sum (grows with it, as in the authors' code) or mean.",
    ),
    Field(
        "teacher_weights",
        "",
        "Networks that are read and not trained: FILE for the largest, or NAME=FILE,NAME=FILE. "
        "FILE#ENTRY takes one of several weights in a file. In place of a file, a stage's folder "
        "or RUN_FOLDER:GUIDANCE/NETWORK/SEED; or logits:FILE.npz, the logits of a network of any "
        "name that was run elsewhere.",
    ),
    Field(
        "init.weights",
        "",
        "Networks that start from weights in a file and are fine-tuned, where those of "
        "teacher_weights stay as they are: FILE for the largest, or NAME=FILE,NAME=FILE. What may "
        "stand for FILE is the same, but for logits.",
    ),
    Field(
        "init.anew",
        "",
        "classifier: the last layer of these networks is drawn from the seed, whatever the file "
        "has there. Where the file has another number of classes than the data set, this has to "
        "be asked for.",
    ),
    Field(
        "overrides",
        {},
        "What differs for one network: {network: {recipe field, methods, method_options or seed: "
        "value}}.",
    ),
    Field(
        "controls",
        {},
        "Plain training of the students to compare with, under other recipe fields: {label: "
        "{recipe field: value}}.",
    ),
    Field(
        "sweep",
        {},
        "Values to compare, every guidance once for each: {recipe field, survival or "
        "methods.NAME: values}, all combinations; or a list of such.",
        object,
    ),
    Field("dtype", "float32", "What networks compute in: float32, bfloat16 or float64."),
    Field(
        "precision",
        "default",
        "Of matrix products and convolutions in float32: default (the device's own, TF32 or "
        "bfloat16 on many), high or highest (float32). Logits are computed at the highest always.",
    ),
    Field(
        "deterministic",
        False,
        "Only operations of a GPU that give the same bytes each time; on other devices all do.",
    ),
    Field("parallel", "jit", "How several devices share a step: jit (shard_map) or pmap."),
    Field(
        "devices",
        "auto",
        "Devices that share each batch: a number, 0 for all, or auto. auto takes two cores of a "
        "CPU where each gets 16 examples or more, all GPUs or TPUs where each gets 128, else one, "
        "and all there are with several processes, which it counts together.",
        object,
    ),
    Field(
        "workers",
        0,
        "Processes that decode streamed images for training, as many for each process that trains; "
        "0 decodes in threads. Needs grain.",
    ),
    Field(
        "population",
        0,
        "Seeds or swept values that train at once: 0 as many as pays, 1 one by one.",
    ),
    Field(
        "teacher_logits",
        "auto",
        "graph computes the frozen teachers' logits at every step. table computes them once, for "
        "images that never change. auto is table where that can be and is small.",
    ),
    Field(
        "nonfinite",
        "halt",
        "At a step that is not finite: halt there, or 'skip N' to pass over up to N of them.",
    ),
    Field(
        "checkpoint_every",
        "5 minutes",
        "How often a stage is saved, in steps, epochs, minutes or seconds, such as '500 steps'.",
    ),
    Field(
        "tensorboard",
        False,
        "Write files for TensorBoard to the working directory too; needs tensorboardX.",
    ),
)


def default_config() -> ml_collections.ConfigDict:
    """Every field there is, with its default; a config file changes some of them."""
    nested: dict[str, Any] = {}
    for field in FIELDS:
        name = field.path.rpartition(".")[2]
        within = nested.setdefault(field.section, {}) if field.section else nested
        within[name] = field.default
        if field.kind is not None:
            within[name] = ml_collections.FieldReference(field.default, field_type=field.kind)
    return ml_collections.ConfigDict(nested)  # copies the dicts
