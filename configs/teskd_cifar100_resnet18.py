r"""TESKD on CIFAR-100: ResNet-18 evolved by its own student branches, against plain training.

  python -m distill_jax.main --config=configs/teskd_cifar100_resnet18.py \
      --config.dataset.data_dir=DIR

Published (top-1): evolved 79.15, plain 74.41.
The authors' recipe; the weights are those of the best validation epoch here.
"""

from distill_jax import default_config
from distill_jax import smoke as cut_down
from distill_jax.data import NORMALISATION


def get_config(mode: str = ""):
    """The config; `:smoke` cuts it down to seconds."""
    config = default_config()
    config.name = "teskd_cifar100_resnet18"
    config.dataset.name = "cifar100"
    config.dataset.mean, config.dataset.std = NORMALISATION["cifar_teskd"]
    config.networks = ("cifar_resnet18", "evolving:cifar_resnet18")
    config.students = config.networks
    config.guidance = ("none",)
    config.dtype = "bfloat16"
    config.recipe.update(epochs=200, batch_size=128, augment="crop_flip")
    config.recipe.update(learning_rate=0.1, nesterov=True, weight_decay=5e-4)
    config.recipe.update(schedule="piecewise", milestones=(0.5, 0.75))
    small = ("resnet8", "evolving:resnet8")
    return cut_down(config, networks=small, students=small) if mode == "smoke" else config
