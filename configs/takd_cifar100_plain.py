"""TAKD on CIFAR-100: plain CNN 10 teaches 4, which teaches 2.

  python -m distill_jax.main --config=configs/takd_cifar100_plain.py --config.dataset.data_dir=DIR

Published (top-1): alone 41.09, from the teacher 44.57, by the assistant 44.92.
Weights are chosen on a validation split here;
--config.protocol=official chooses them as the authors do, on the test set.
"""

from distill_jax import default_config
from distill_jax import smoke as cut_down


def get_config(mode: str = ""):
    """The config; `:smoke` cuts it down to seconds."""
    config = default_config()
    config.name = "takd_cifar100_plain"
    config.dataset.name = "cifar100"
    config.networks = ("plane10", "plane4", "plane2")
    config.guidance = ("none", "direct", "chain")
    config.seeds = (0, 1, 2)
    # The codes' recipe: constant rate, no Nesterov, no augmentation.
    config.recipe.update(epochs=160, batch_size=128, learning_rate=0.01, weight_decay=1e-4)
    # λ and T were found for a KL averaged over classes, so that is how it is taken.
    config.loss.kl_reduction = "element_mean"
    config.recipe.update(temperature=5.0, kd_weight=0.5)
    return cut_down(config, networks=("plane6", "plane4", "plane2")) if mode == "smoke" else config
