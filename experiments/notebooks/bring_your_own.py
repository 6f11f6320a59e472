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
# # Your own network, method and data
#
# Nothing here is built in: points in a plane as data, small networks in Flax, and a method in
# four lines.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn
from sklearn.datasets import make_moons

import distill_jax

# %% [markdown]
# ## Data
#
# `from_arrays` takes the inputs and labels of a training and a test set. A `Task` says what one
# example is; without preprocessing a network sees it as it stands.

# %%
points, labels = make_moons(1600, noise=0.3, random_state=0)
points = points.astype(np.float32)
halves = (points[:800], labels[:800]), (points[800:], labels[800:])
task = distill_jax.data.Task(points[0], classes=2)
moons = distill_jax.data.from_arrays(*halves, task=task, valid_fraction=0.25)
print(len(moons.train.labels), "to train on,", len(moons.test.labels), "to test on")

# %% [markdown]
# ## Networks
#
# A name and a function that builds the module. The name works wherever that of a built-in network
# does.


# %%
class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(2)(x)


for name, width in (("wide", 64), ("narrow", 6)):
    distill_jax.register_network(name, lambda classes, inputs, width=width: Net(width))

# %% [markdown]
# ## A method
#
# The simplest is a function of one edge, a student and one teacher, that gives a number for each
# example. This one compares logits after taking out each example's mean, which the softmax does
# not see.


# %%
def centred(student, teacher, labels, hyper):
    def centre(logits):
        return logits - logits.mean(-1, keepdims=True)

    return jnp.sum((centre(student.logits) - centre(teacher.logits)) ** 2, -1)


distill_jax.register_method("centred", centred)

# %% [markdown]
# ## Training
#
# The teacher sees all points, the student four of each class: too few to find the border by itself.

# %%
seeds = (0, 1, 2, 3, 4)
config = {
    "networks": ("wide", "narrow"),
    "guidance": ("none", "direct"),
    "seeds": seeds,
    "recipe": {
        "epochs": 200,
        "batch_size": 8,
        "train_limit": 4,
        "optimizer": "adamw",
        "learning_rate": 0.01,
    },
    "overrides": {"wide": {"train_limit": 0, "batch_size": 50, "epochs": 30, "seed": 0}},
}
by_method = {
    "kd": distill_jax.run(config, dataset=moons, progress=False),
    "centred": distill_jax.run(
        config | {"methods": {"centred": 0.1}}, dataset=moons, progress=False
    ),
}
by_method["centred"]

# %% [markdown]
# ## What the student learned
#
# `results.logits` takes inputs as the data set has them, here a grid of points.

# %%
x, y = np.meshgrid(np.linspace(-2, 3, 120), np.linspace(-1.5, 2, 120))
grid = np.stack([x.ravel(), y.ravel()], -1).astype(np.float32)
columns = {
    "no teacher": (by_method["kd"], "none"),
    "kd": (by_method["kd"], "direct"),
    "centred": (by_method["centred"], "direct"),
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
for axis, (title, (results, guidance)) in zip(axes, columns.items(), strict=True):
    logits = results.logits(grid, guidance=guidance, network="narrow", seed=0)
    rows = [row for row in results.rows if row["guidance"] == guidance]
    mean = 100 * np.mean([row["test_accuracy"] for row in rows])
    axis.contourf(x, y, (logits[:, 1] - logits[:, 0]).reshape(x.shape), levels=[-99, 0, 99])
    shown = moons.test.images[:200], moons.test.labels[:200]
    axis.scatter(*shown[0].T, c=shown[1], s=6, cmap="gray")
    axis.set(title=f"{title}: {mean:.1f} % over five seeds", xlabel="first coordinate")
axes[0].set_ylabel("second coordinate")
plt.show()

# %% [markdown]
# The code of what you register is part of each result's id, so a changed function never passes
# for the old one. `docs/adding.md` has methods with trained parameters, optimizers, metrics,
# dicts as inputs, and nnx modules.
