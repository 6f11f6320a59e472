r"""TESKD on ImageNet: ResNet-18 evolved by its own student branches, against plain training.

  python -m distill_jax.main --config=configs/teskd_imagenet_resnet18.py

`--config.dataset.data_dir` holds what `tfds build imagenet2012 --file_format=array_record` wrote.
Images are decoded as they are needed: random crops of 224x224 to train on, the centre to evaluate.
The usual recipe of 90 epochs, its learning rate scaled to the batch; validation is 1 % of the
training images, the published validation set is what is tested on.
"""

from distill_jax import config_arguments, default_config, smoke
from distill_jax.data import NORMALISATION


def get_config(arguments: str = ""):
    """The config; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments)
    config = default_config()
    config.name = "teskd_imagenet_resnet18"
    config.dataset.name = "tfds:imagenet2012"
    config.dataset.valid_fraction = 0.01
    config.dataset.mean, config.dataset.std = NORMALISATION["imagenet"]
    config.networks = ("imagenet_resnet18", "evolving:imagenet_resnet18")
    config.students = config.networks
    config.guidance = ("none",)
    config.dtype = "bfloat16"
    config.recipe.update(epochs=90, batch_size=1024, augment="flip")
    config.recipe.update(learning_rate=0.4, nesterov=True, weight_decay=1e-4)
    config.recipe.update(schedule="piecewise", milestones=(1 / 3, 2 / 3))
    small = ("resnet8", "evolving:resnet8")
    return smoke(config, networks=small, students=small) if given.smoke else config
