"""Low-data distillation on digits, a minute on two cores: does a teacher help, and who?

  python -m distill_jax.main --config=configs/quickstart.py

The teacher has all 1,037 training images, everybody below it 10 a class. "none, full data" is the
control: what the student reaches with all of the data and no teacher.
"""

from distill_jax import config_arguments, default_config, smoke


def get_config(arguments: str = ""):
    """The config; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments)
    config = default_config()
    config.name = "quickstart"
    config.networks = ("plane6", "plane4", "plane2")
    config.guidance = ("none", "direct", "chain", "dense")
    config.seeds = (0, 1, 2, 3, 4)
    config.dataset.valid_fraction = 0.2
    config.recipe.update(epochs=80, batch_size=50, train_limit=10)
    config.recipe.update(learning_rate=0.02, schedule="cosine", temperature=4.0, kd_weight=0.7)
    config.loss.teachers = "sum"  # as DGKD counts them
    config.overrides = {"plane6": {"train_limit": 0, "epochs": 10}}
    config.controls = {"full data": {"train_limit": 0, "epochs": 10}}
    return smoke(config) if given.smoke else config
