r"""Fine-tuning on a folder of pictures: teacher and student saw ImageNet, then see your classes.

  distill_jax train --config=finetune_folder --config.dataset.data_dir=DIR \
      --config.init.weights=imagenet_resnet34=resnet34.pth,imagenet_resnet18=resnet18.pth

DIR holds train/CLASS and test/CLASS, or is CUB-200 as it is published. The files are torchvision's
state dicts; nothing is downloaded. The classifier is drawn anew, everything else starts from them.
The teacher is fine-tuned once, then the student alone and with its help. Any two networks make a
pair, as in `finetune_folder:imagenet_resnet50:imagenet_resnet18`.

The usual recipe: images at the side that the networks were trained at, normalised as ImageNet's,
random parts of them, and a tenth of the rate of training from scratch over a few epochs.
"""

from distill_jax import default_config, pair_arguments, smoke
from distill_jax.data import NORMALISATION

PAIR = "imagenet_resnet34:imagenet_resnet18"
SMALL = "resnet14:resnet8"  # where none is named for smoke, which starts from fresh weights


def get_config(arguments: str = ""):
    """The config of a pair TEACHER:STUDENT; `,smoke` cuts it down to seconds."""
    given = pair_arguments(arguments, pair=PAIR, small=SMALL)
    teacher, student = given.teacher, given.student
    config = default_config()
    config.name = "_".join(["finetune_folder", *given.named]).replace(":", "_")
    config.dataset.name = "folder"
    config.dataset.options = {"size": 224}
    config.dataset.mean, config.dataset.std = NORMALISATION["imagenet"]
    config.networks = (teacher, student)
    config.guidance = ("none", "direct")
    config.seeds = (0, 1, 2)
    config.overrides = {teacher: {"seed": 0}}  # one teacher for all seeds of the student
    config.init.anew = "classifier"
    config.recipe.update(epochs=20, batch_size=64, augment="inception_crop")
    config.recipe.update(learning_rate=0.01, weight_decay=1e-4)
    config.recipe.update(schedule="cosine", warmup_epochs=1.0, temperature=4.0, kd_weight=0.5)
    return smoke(config, init={"weights": "", "anew": ""}) if given.smoke else config
