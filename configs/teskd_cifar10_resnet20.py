r"""TESKD small enough for a CPU: ResNet-20 on CIFAR-10, evolved against plain, two seeds.

  python -m distill_jax.main --config=configs/teskd_cifar10_resnet20.py \
      --config.dataset.data_dir=DIR

`--config.networks=resnet8,evolving:resnet8` (and `students` the same) is smaller.
"""

from distill_jax import config_arguments, default_config, smoke
from distill_jax.data import NORMALISATION


def get_config(arguments: str = ""):
    """The config; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments)
    config = default_config()
    config.name = "teskd_cifar10_resnet20"
    config.dataset.name = "cifar10"
    config.dataset.mean, config.dataset.std = NORMALISATION["cifar_teskd"]
    config.networks = ("resnet20", "evolving:resnet20")
    config.students = config.networks
    config.guidance = ("none",)
    config.seeds = (0, 1)
    config.recipe.update(epochs=30, batch_size=128, augment="crop_flip")
    config.recipe.update(learning_rate=0.1, nesterov=True, weight_decay=5e-4, schedule="cosine")
    small = ("resnet8", "evolving:resnet8")
    return smoke(config, networks=small, students=small) if given.smoke else config
