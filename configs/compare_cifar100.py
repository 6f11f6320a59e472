"""CIFAR-100 as the literature compares methods on it: one teacher, one student, the field's recipe.

  distill_jax train --config=compare_cifar100:resnet56:resnet20 --config.dataset.data_dir=DIR

Any two networks make a pair, the teacher first. The student is trained alone and by KD;
`python -m experiments.compare` trains it by other methods too, with their published settings.
All training images are used and the last epoch's weights are taken, so that nothing is chosen on
the test set. The codes' last batch of an epoch has 16 images; here it is dropped.
"""

from distill_jax import default_config, pair_arguments, smoke

PAIR, SMALL = "resnet56:resnet20", "resnet14:resnet8"  # where none is named; the second for smoke
SLOWER = ("mobilenet", "shufflenet")  # students that the codes train at a fifth of the rate


def get_config(arguments: str = ""):
    """The config of a pair TEACHER:STUDENT; `,smoke` cuts it down to seconds."""
    given = pair_arguments(arguments, pair=PAIR, small=SMALL)
    teacher, student = given.teacher, given.student
    config = default_config()
    config.name = "_".join(["compare_cifar100", *given.named]).replace(":", "_")
    config.dataset.update(name="cifar100", valid_fraction=0.0)
    config.networks = (teacher, student)
    config.guidance = ("none", "direct")
    config.selection = "last"
    # One teacher for all seeds of the student.
    config.overrides = {teacher: {"seed": 0}}
    config.recipe.update(epochs=240, batch_size=64, weight_decay=5e-4)
    if not student.startswith("plane"):  # no such pair is in that literature: their own rate
        config.recipe.learning_rate = 0.01 if student.startswith(SLOWER) else 0.05
    config.recipe.update(schedule="piecewise", milestones=(150 / 240, 180 / 240, 210 / 240))
    config.recipe.update(augment="crop_flip", temperature=4.0, kd_weight=0.9)
    return smoke(config, networks=(teacher, student)) if given.smoke else config
