"""DGKD on CIFAR: a row of ResNets, each taught by all larger ones.

  python -m distill_jax.main --config=configs/dgkd_resnet.py --config.dataset.data_dir=DIR
  python -m distill_jax.main --config=configs/dgkd_resnet.py:cifar100 --config.dataset.data_dir=DIR

On CIFAR-10 ResNet-26, 20, 14 and 8; published (top-1): TAKD 88.01, DGKD 89.02, with stochastic
teaching 89.66. On CIFAR-100 ResNet-110, 56, 32, 20 and 8, whose assistants are those that TAKD
compares; no published number for this row.
Weights are chosen on a validation split here;
--config.protocol=official chooses them as the authors do, on the test set.
"""

from distill_jax import config_arguments, default_config, smoke

NETWORKS = {
    "cifar10": ("resnet26", "resnet20", "resnet14", "resnet8"),
    "cifar100": ("resnet110", "resnet56", "resnet32", "resnet20", "resnet8"),
}


def get_config(arguments: str = ""):
    """The config; of cifar10, or `:cifar100`; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments, dataset=tuple(NETWORKS))
    config = default_config()
    config.name = f"dgkd_{given.dataset}_resnet"
    config.dataset.name = given.dataset
    config.networks = NETWORKS[given.dataset]
    config.guidance = ("none", "direct", "chain", "dense", "dense+drop")
    config.seeds = (0, 1, 2)
    # The code's recipe.
    config.recipe.update(epochs=160, batch_size=128, learning_rate=0.1, weight_decay=1e-4)
    config.recipe.update(schedule="piecewise", milestones=(0.5, 0.75))
    # The code's T and λ (the labels teach only when every source is dropped), with its KL
    # averaged over classes.
    config.loss.update(kl_reduction="element_mean", teachers="sum")
    config.recipe.update(temperature=5.0, kd_weight=1.0)
    few = ("resnet14", "resnet8", "resnet8#2")
    return smoke(config, networks=few) if given.smoke else config
