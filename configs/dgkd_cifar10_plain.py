"""DGKD on CIFAR-10: plain CNN 10, 8, 6, 4 and 2, each taught by all larger ones.

  python -m distill_jax.main --config=configs/dgkd_cifar10_plain.py --config.dataset.data_dir=DIR

The row of the authors' code; its CIFAR-10 results are not published as numbers.
Weights are chosen on a validation split here;
--config.protocol=official chooses them as the authors do, on the test set.
"""

from distill_jax import default_config
from distill_jax import smoke as cut_down


def get_config(mode: str = ""):
    """The config; `:smoke` cuts it down to seconds."""
    config = default_config()
    config.name = "dgkd_cifar10_plain"
    config.dataset.name = "cifar10"
    config.networks = ("plane10", "plane8", "plane6", "plane4", "plane2")
    config.guidance = ("none", "direct", "chain", "dense", "dense+drop")
    config.seeds = (0, 1, 2)
    # The codes' recipe: constant rate, no Nesterov, no augmentation.
    config.recipe.update(epochs=160, batch_size=128, learning_rate=0.01, weight_decay=1e-4)
    # The code's T and λ (the labels teach only when every source is dropped), with its KL
    # averaged over classes.
    config.loss.kl_reduction = "element_mean"
    config.recipe.update(temperature=5.0, kd_weight=1.0)
    return cut_down(config, networks=("plane6", "plane4", "plane2")) if mode == "smoke" else config
