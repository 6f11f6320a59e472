"""DGKD on CIFAR-10: ResNet-26, 20, 14 and 8, each taught by all larger ones.

  python -m distill_jax.main --config=configs/dgkd_cifar10_resnet.py --config.dataset.data_dir=DIR

Published (top-1): TAKD 88.01, DGKD 89.02, with stochastic teaching 89.66.
Weights are chosen on a validation split here;
--config.protocol=official chooses them as the authors do, on the test set.
"""

from distill_jax import default_config
from distill_jax import smoke as cut_down


def get_config(mode: str = ""):
    """The config; `:smoke` cuts it down to seconds."""
    config = default_config()
    config.name = "dgkd_cifar10_resnet"
    config.dataset.name = "cifar10"
    config.networks = ("resnet26", "resnet20", "resnet14", "resnet8")
    config.guidance = ("none", "direct", "chain", "dense", "dense+drop")
    config.seeds = (0, 1, 2)
    # The code's recipe.
    config.recipe.update(epochs=160, batch_size=128, learning_rate=0.1, weight_decay=1e-4)
    config.recipe.update(schedule="piecewise", milestones=(0.5, 0.75))
    # The code's T and λ (the labels teach only when every source is dropped), with its KL
    # averaged over classes.
    config.loss.kl_reduction = "element_mean"
    config.recipe.update(temperature=5.0, kd_weight=1.0)
    return cut_down(config, networks=("resnet14", "resnet8")) if mode == "smoke" else config
