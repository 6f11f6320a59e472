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
# # Searching temperature and weight
#
# Distillation has two numbers of its own: the temperature $T$, which softens the outputs, and the
# weight $\lambda$ of the teacher's term. The code of TAKD searched both, $\lambda$ from 0.05 to 1
# in steps of 0.05 and $T$ among 1, 2, 5, 10, 15 and 20, in 120 trials of a tree-structured Parzen
# estimator, and chose by accuracy on the *test* set. What is chosen there looks better than it
# is. Here the choice is made on a validation split, and the test set is scored once.

# %%
import matplotlib.pyplot as plt
import numpy as np

import distill_jax

weights = (0.1, 0.3, 0.5, 0.7, 0.9)
temperatures = (1.0, 2.0, 5.0, 10.0, 20.0)
config = {
    "networks": ("plane4", "plane2"),
    "guidance": ("none", "direct"),
    "seeds": (0, 1, 2),
    "sweep": {"kd_weight": weights, "temperature": temperatures},
    "dataset": {"name": "digits", "valid_fraction": 0.2},
    "recipe": {
        "epochs": 40,
        "batch_size": 50,
        "train_limit": 10,
        "learning_rate": 0.02,
        "schedule": "cosine",
    },
    "overrides": {"plane4": {"train_limit": 0, "epochs": 10, "seed": 0}},
}
results = distill_jax.run(config, progress=False)
print(len(results.rows), "results")

# %% [markdown]
# A sweep is a grid: every guidance once for each combination that concerns it, and `none` once,
# as it has no teacher. The numbers are inputs of the compiled step, so nothing is compiled again,
# and several values train at once.

# %%
valid = np.zeros((len(weights), len(temperatures)))
for row in (row for row in results.rows if row["teachers"]):
    place = weights.index(row["kd_weight"]), temperatures.index(row["temperature"])
    valid[place] += 100 * row["valid_accuracy"] / len(config["seeds"])
alone = 100 * np.mean([row["valid_accuracy"] for row in results.rows if not row["teachers"]])
best = np.unravel_index(valid.argmax(), valid.shape)

figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
image = axis.imshow(valid, origin="lower", cmap="Blues")
for i, j in np.ndindex(*valid.shape):
    text = f"{valid[i, j]:.1f}" + "*" * ((i, j) == best)
    colour = "white" if valid[i, j] > valid.min() / 2 + valid.max() / 2 else "black"
    axis.text(j, i, text, ha="center", va="center", color=colour)
axis.set(xticks=range(5), xticklabels=[f"{x:g}" for x in temperatures], xlabel="temperature T")
axis.set(yticks=range(5), yticklabels=weights, ylabel="weight λ of the teacher")
figure.colorbar(image, label="validation accuracy (%)")
axis.set_title(f"mean of three seeds; without a teacher {alone:.1f} %")
plt.show()

# %% [markdown]
# ## Choosing
#
# The best value of the grid (`*`), then its test accuracy. Neighbours that are as good within
# their spread are as good a choice; a lone peak is probably luck.

# %%
weight, temperature = weights[best[0]], temperatures[best[1]]
chosen = [
    row["test_accuracy"]
    for row in results.rows
    if row["teachers"] and (row["kd_weight"], row["temperature"]) == (weight, temperature)
]
untaught = [row["test_accuracy"] for row in results.rows if not row["teachers"]]
print(f"chosen on the validation split: λ = {weight}, T = {temperature:g}")
print(f"test accuracy: {100 * np.mean(chosen):.2f} %, alone {100 * np.mean(untaught):.2f} %")

# %% [markdown]
# λ and T belong to one way of counting the loss. The code of TAKD divides the KL by the number of
# classes (`loss.kl_reduction="element_mean"`), so its λ means less here. For searches that learn
# from earlier trials and stop bad ones early, there is `python -m experiments.search`.
