"""An evolved teacher at the head of a DGKD row: TESKD's ResNet-20, then ResNet-14 and -8.

  python -m distill_jax.main --config=configs/evolved_dgkd_cifar10.py --config.dataset.data_dir=DIR

The head evolves with its own branches and teaches as the backbone that is left. The row
`evolving:resnet14<evolving:resnet20;...` shows both at once: a network that learns from its own
branches below it and from a frozen teacher above it.
"""

from distill_jax import config_arguments, default_config, smoke
from distill_jax.data import NORMALISATION


def get_config(arguments: str = ""):
    """The config; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments)
    config = default_config()
    config.name = "evolved_dgkd_cifar10"
    config.dataset.name = "cifar10"
    config.dataset.mean, config.dataset.std = NORMALISATION["cifar_teskd"]
    whole = ("evolving:resnet20", "evolving:resnet14", "resnet8")
    small = ("evolving:plane4", "evolving:plane2", "plane2")
    head, middle, last = config.networks = small if given.smoke else whole
    config.guidance = ("none", "dense", f"{middle}<{head};{last}<{middle}")
    config.seeds = (0, 1)
    config.recipe.update(epochs=60, batch_size=128, augment="crop_flip")
    config.loss.teachers = "sum"  # as DGKD counts them
    config.recipe.update(learning_rate=0.1, nesterov=True, weight_decay=5e-4, schedule="cosine")
    config.recipe.update(temperature=4.0, kd_weight=0.5)
    return smoke(config) if given.smoke else config
