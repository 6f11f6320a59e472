# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Methods along the edges of a graph
#
# A graph says *who* teaches whom; a **method** says *what* a student is compared with. The two
# are chosen apart, so any method travels along any edge. This notebook trains one student in
# several graphs, each with methods of its own:
#
# | method | what it compares |
# |---|---|
# | `kd` | softened outputs |
# | `dkd` | the label's class apart from all others, each with a weight of its own |
# | `sp` | which examples of a batch are alike |
# | `rkd` | distances and angles between the examples of a batch |
#
# The last two read feature vectors, and take those of any length.

# %%
import tempfile

import matplotlib.pyplot as plt
import numpy as np

import distill_jax

networks = ("plane4", "plane2", "plane2#2")  # two of one kind, each with weights of its own
cycle = "plane2<plane4+plane2#2;plane2#2<plane4+plane2"
runs = {
    "none": ("none", {"kd": 1.0}),
    "direct: dkd": ("direct", {"dkd": 1.0, "ce": 1.0}),
    "chain: sp": ("chain", {"sp": 100.0, "ce": 1.0}),
    "dense: kd + rkd": ("dense", {"kd": 1.0, "rkd": 1.0}),
    "cycle: kd": (cycle, {"kd": 1.0}),
}

# %% [markdown]
# `ce` is the cross-entropy with the labels. It is a term like any other; beside `kd` its weight
# is 1 - λ.
#
# Each graph is a matrix, drawn with students as rows and teachers as columns. In the last one two
# networks of one kind teach each other: entries on both sides of the diagonal make them one
# *stage*, trained by one step.

# %%
figure, axes = plt.subplots(1, 5, figsize=(11, 2.6), sharey=True, layout="constrained")
graphs = {name.partition(":")[0]: guidance for name, (guidance, _) in runs.items()}
for axis, (name, guidance) in zip(axes, graphs.items(), strict=True):
    (one,) = distill_jax.resolve({"networks": networks, "guidance": (guidance,)}).comparisons
    axis.imshow(one.graph.matrix(), cmap="Blues", vmin=0, vmax=1.5)
    axis.set(title=name, xlabel="teacher", xticks=range(3), yticks=range(3))
    axis.set(xticklabels=networks, yticklabels=networks)
    axis.tick_params("x", rotation=30)  # side by side the names would meet
axes[0].set_ylabel("student")
plt.show()

# %% [markdown]
# ## Training
#
# One run for each line. They share a *store*: a stage that is the same in several of them, such as
# the teacher or the assistant of `chain` and `dense`, has one id in all, and is trained once.

# %%
seeds = (0, 1, 2, 3)
base = {
    "networks": networks,
    "students": ("plane2#2",),
    "seeds": seeds,
    "dataset": {"name": "digits", "valid_fraction": 0.2},
    "recipe": {
        "epochs": 60,
        "batch_size": 50,
        "train_limit": 10,  # images a class
        "learning_rate": 0.02,
        "schedule": "cosine",
        "kd_weight": 0.7,
    },
    "overrides": {
        "plane4": {"train_limit": 0, "epochs": 10, "seed": 0},
        "plane2": {"methods": {"kd": 1.0}},  # the assistant, whatever its own student is taught by
    },
}
results = {}
with tempfile.TemporaryDirectory() as folder:
    for number, (name, (guidance, methods)) in enumerate(runs.items()):
        config = base | {"guidance": (guidance,), "methods": methods}
        results[name] = distill_jax.run(
            config, workdir=f"{folder}/{number}", store=f"{folder}/store", progress=False
        )
accuracies = {
    name: 100 * np.array([row["test_accuracy"] for row in own.rows])
    for name, own in results.items()
}
for name, own in accuracies.items():
    print(f"{name:16} {own.mean():.2f} ± {own.std(ddof=1):.2f} %")

# %%
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for place, own in enumerate(accuracies.values()):
    axis.plot(own, [place] * len(own), "o", color="0.6")
    axis.plot(own.mean(), place, "D", color="C0")
axis.set(yticks=range(len(runs)), yticklabels=runs, xlabel="test accuracy (%)")
axis.set_title("plane2#2 with ten images a class: four seeds, and their mean")
axis.invert_yaxis()
axis.grid(axis="x", alpha=0.3)
plt.show()

# %% [markdown]
# Grey points are seeds. Where they overlap, the order of the means says nothing yet.
#
# ## What travels, term by term
#
# Every method adds terms to the loss, and each is recorded by epoch, as it stands in the sum.

# %%
history = results["dense: kd + rkd"].histories["dense", "plane2#2", 0]
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name in (name for name in history[0] if name.startswith("train_weighted_")):
    label = name.removeprefix("train_weighted_")
    axis.plot([one["epoch"] for one in history], [one[name] for one in history], label=label)
axis.set(xlabel="epoch", ylabel="term of the loss", yscale="log")
axis.set_title("dense: kd + rkd, seed 0")
axis.legend()
plt.show()

# %% [markdown]
# `docs/methods.md` lists all methods with their usual weights. `overrides` gives one network of a
# row methods of its own.
