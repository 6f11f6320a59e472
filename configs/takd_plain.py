"""TAKD on CIFAR: plain CNN 10 teaches 4, which teaches 2.

  python -m distill_jax.main --config=configs/takd_plain.py --config.dataset.data_dir=DIR
  python -m distill_jax.main --config=configs/takd_plain.py:cifar100 --config.dataset.data_dir=DIR

Published (top-1) on CIFAR-10: alone 70.16, from the teacher 72.57, by the assistant 73.51; on
CIFAR-100: alone 41.09, from the teacher 44.57, by the assistant 44.92.
Weights are chosen on a validation split here;
--config.protocol=official chooses them as the authors do, on the test set.
"""

from distill_jax import config_arguments, default_config, smoke


def get_config(arguments: str = ""):
    """The config; of cifar10, or `:cifar100`; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments, dataset=("cifar10", "cifar100"))
    config = default_config()
    config.name = f"takd_{given.dataset}_plain"
    config.dataset.name = given.dataset
    config.networks = ("plane10", "plane4", "plane2")
    config.guidance = ("none", "direct", "chain")
    config.seeds = (0, 1, 2)
    # The codes' recipe: constant rate, no Nesterov, no augmentation.
    config.recipe.update(epochs=160, batch_size=128, learning_rate=0.01, weight_decay=1e-4)
    # λ and T were found for a KL averaged over classes, so that is how it is taken.
    config.loss.kl_reduction = "element_mean"
    config.recipe.update(temperature=5.0, kd_weight=0.5)
    return smoke(config, networks=("plane6", "plane4", "plane2")) if given.smoke else config
