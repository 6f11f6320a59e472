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
# # The idea in ten minutes
#
# A large network is accurate and slow; a small one is quick and less accurate. **Knowledge
# distillation** trains the small one, the *student*, on the labels and on the outputs of the
# large one, its *teacher*. This notebook shows what a student gains from that, what goes wrong
# when the teacher is too large, and what two papers do about it.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import distill_jax

networks = ("plane6", "plane4", "plane2")  # plain CNNs of 6, 4 and 2 layers
digits = distill_jax.data.load("digits")  # 8×8 images that come with scikit-learn
for name in networks:
    network = distill_jax.models.build(name, digits.classes, (8, 8, 1))
    print(f"{name}: {distill_jax.models.count_parameters(network):,} parameters")

# %% [markdown]
# ## What a teacher knows
#
# A label says "this is a 3". A teacher's output says more: what else the image looks like. Its
# probabilities are nearly all in one class, so they are *softened*: logits are divided by a
# temperature $T$ before the softmax. With $s$ and $t$ the logits of student and teacher, the loss
# of a student is
#
# $$L = (1-\lambda)\,\mathrm{CE}(y, s)
#     + \lambda\,T^2\,\mathrm{KL}\big(\mathrm{softmax}(t/T)\,\|\,\mathrm{softmax}(s/T)\big).$$
#
# The factor $T^2$ keeps the gradient's size as $T$ grows.

# %%
recipe = {"epochs": 10, "batch_size": 50, "learning_rate": 0.02}
data = {"name": "digits", "valid_fraction": 0.2}
teacher = distill_jax.run(
    {"networks": ("plane6",), "guidance": "none", "dataset": data, "recipe": recipe},
    progress=False,
)
images = digits.test.images[:200]
logits = teacher.logits(images)
i = int(np.argmin(np.ptp(logits, axis=1)))  # one that it is not sure of
figure, axes = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
axes[0].imshow(images[i, ..., 0], cmap="gray")
axes[0].set(title=f"label {digits.test.labels[i]}", xticks=[], yticks=[])
for axis, temperature in zip(axes[1:], (1, 4), strict=True):
    axis.bar(range(10), jax.nn.softmax(logits[i] / temperature))
    axis.set(title=f"teacher, T = {temperature}", xlabel="class", ylabel="probability")
    axis.set(xticks=range(10), ylim=(0, 1))
plt.show()

# %% [markdown]
# ## The capacity gap, and assistants
#
# One might think that the best teacher makes the best student. It does not: beyond some size a
# better teacher teaches worse. The student is too small to imitate it, and its outputs are so
# certain that they say little more than the labels.
#
# - **TAKD** (Mirzadeh et al., [1902.03393](https://arxiv.org/abs/1902.03393)) puts *teacher
#   assistants* of sizes in between: the teacher teaches the assistant, and the assistant alone
#   teaches the student. There may be several, one after another.
# - **DGKD** (Son et al., [2009.08825](https://arxiv.org/abs/2009.08825)) notes that an error of
#   one assistant travels down such a chain. So each network is taught by *all* larger ones: the
#   student hears the teacher and every assistant. For each mini-batch some of them are left out
#   at random (*stochastic teaching*), which keeps the student from leaning on one.
#
# ## Who teaches whom is a matrix
#
# With the networks in a row, largest first, all of these are square matrices: entry $(i, j)$ says
# whether network $j$ teaches network $i$.

# %%
guidances = ("none", "direct", "chain", "dense")
experiment = distill_jax.resolve({"networks": networks, "guidance": guidances})
titles = ("none", "direct: KD", "chain: TAKD", "dense: DGKD")
figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), sharey=True, layout="constrained")
for axis, title, one in zip(axes, titles, experiment.comparisons, strict=True):
    axis.imshow(one.graph.matrix(), cmap="Blues", vmin=0, vmax=1.5)
    axis.set(title=title, xlabel="teacher", xticks=range(3), yticks=range(3))
    axis.set(xticklabels=networks, yticklabels=networks)
axes[0].set_ylabel("student")
plt.show()

# %% [markdown]
# A name is shorthand for a matrix, and any other matrix will do. Below the diagonal teachers are
# trained first and stay as they are; networks that teach each other are trained together.

# %%
matrix = [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
(own,) = distill_jax.resolve({"networks": networks, "guidance": (matrix,)}).comparisons
print(own.label)
print("the same as dense:", own.graph == experiment.comparisons[-1].graph)

# %% [markdown]
# ## Does it help?
#
# The teacher sees all images, everybody below it ten of each class. Each student is trained three
# times. Networks that several guidances need are trained once.

# %%
config = {
    "networks": networks,
    "guidance": (*guidances, "dense+drop"),  # the last with stochastic teaching
    "seeds": (0, 1, 2),
    "dataset": data,
    "recipe": {
        "epochs": 60,
        "batch_size": 50,
        "train_limit": 10,
        "learning_rate": 0.02,
        "schedule": "cosine",
        "temperature": 4.0,
        "kd_weight": 0.7,
    },
    "loss": {"teachers": "sum"},  # as DGKD counts several teachers
    "overrides": {"plane6": {"train_limit": 0, "epochs": 10}},
}
results = distill_jax.run(config, progress=False)
results

# %% [markdown]
# The gain is taken seed by seed against the student without a teacher, with its 95 % interval. An
# interval that contains zero means that three seeds do not settle it; small data sets such as
# this one rarely rank the methods.

# %%
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for guidance in config["guidance"]:
    epochs = [results.histories[guidance, "plane2", seed] for seed in config["seeds"]]
    curves = 100 * np.array([[one["valid_accuracy"] for one in own] for own in epochs])
    axis.plot(range(1, curves.shape[1] + 1), curves.mean(0), label=guidance)
axis.set(xlabel="epoch", ylabel="validation accuracy (%)", title="plane2, mean of three seeds")
axis.set_ylim(60, 100)
axis.legend()
plt.show()

# %% [markdown]
# ## What the papers found
#
# Top-1 test accuracy in %, plain CNNs on CIFAR-100, a student of 2 layers. TAKD's table has a
# teacher of 10 layers and one assistant of 4; DGKD's has assistants of 8, 6 and 4.
#
# | | no teacher | KD | TAKD | DGKD | DGKD, stochastic |
# |---|---|---|---|---|---|
# | 10 → 4 → 2 | 41.09 | 44.57 | 44.92 | | |
# | 10 → 8 → 6 → 4 → 2 | | | 45.14 | 48.92 | 50.15 |
#
# The third paper, TESKD, needs no larger network at all: see `teskd.ipynb`.
