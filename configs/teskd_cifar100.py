"""TESKD on CIFAR-100: a network evolved by its own student branches, against plain training.

  python -m distill_jax.main --config=configs/teskd_cifar100.py --config.dataset.data_dir=DIR
  python -m distill_jax.main --config=configs/teskd_cifar100.py:vgg16 --config.dataset.data_dir=DIR

ResNet-18, or one of ResNet-34, SENet-18, ResNeXt-18 and VGG-16 as `NETWORKS` calls them.
Published (top-1) of ResNet-18: evolved 79.15, plain 74.41.
The authors' recipe; the weights are those of the best validation epoch here.
"""

from distill_jax import config_arguments, default_config, smoke
from distill_jax.data import NORMALISATION

NETWORKS = ("resnet18", "resnet34", "senet18", "resnext18", "vgg16")


def get_config(arguments: str = ""):
    """The config; of resnet18, or `:NETWORK`; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments, network=NETWORKS)
    config = default_config()
    config.name = f"teskd_cifar100_{given.network}"
    config.dataset.name = "cifar100"
    config.dataset.mean, config.dataset.std = NORMALISATION["cifar_teskd"]
    config.networks = (f"cifar_{given.network}", f"evolving:cifar_{given.network}")
    config.students = config.networks
    config.guidance = ("none",)
    config.dtype = "bfloat16"
    config.recipe.update(epochs=200, batch_size=128, augment="crop_flip")
    config.recipe.update(learning_rate=0.1, nesterov=True, weight_decay=5e-4)
    config.recipe.update(schedule="piecewise", milestones=(0.5, 0.75))
    small = ("resnet8", "evolving:resnet8")
    return smoke(config, networks=small, students=small) if given.smoke else config
