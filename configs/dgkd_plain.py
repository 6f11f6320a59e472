"""DGKD on CIFAR: plain CNN 10, 8, 6, 4 and 2, each taught by all larger ones.

  python -m distill_jax.main --config=configs/dgkd_plain.py --config.dataset.data_dir=DIR
  python -m distill_jax.main --config=configs/dgkd_plain.py:cifar100 --config.dataset.data_dir=DIR

The row of the authors' code. Published (top-1) on CIFAR-100: TAKD 45.14, DGKD 48.92, with
stochastic teaching 50.15; its CIFAR-10 results are not published as numbers.
Weights are chosen on a validation split here;
--config.protocol=official chooses them as the authors do, on the test set.
"""

from distill_jax import config_arguments, default_config, smoke


def get_config(arguments: str = ""):
    """The config; of cifar10, or `:cifar100`; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments, dataset=("cifar10", "cifar100"))
    config = default_config()
    config.name = f"dgkd_{given.dataset}_plain"
    config.dataset.name = given.dataset
    config.networks = ("plane10", "plane8", "plane6", "plane4", "plane2")
    config.guidance = ("none", "direct", "chain", "dense", "dense+drop")
    config.seeds = (0, 1, 2)
    # The codes' recipe: constant rate, no Nesterov, no augmentation.
    config.recipe.update(epochs=160, batch_size=128, learning_rate=0.01, weight_decay=1e-4)
    # The code's T and λ (the labels teach only when every source is dropped), with its KL
    # averaged over classes.
    config.loss.update(kl_reduction="element_mean", teachers="sum")
    config.recipe.update(temperature=5.0, kd_weight=1.0)
    return smoke(config, networks=("plane6", "plane4", "plane2")) if given.smoke else config
