"""DGKD on FB15k-237: ComplEx of 256, 128 and 64 dimensions teach one of 32.

  python -m distill_jax.main --config=configs/dgkd_fb15k237.py --config.dataset.data_dir=DIR

Each question (head, relation, ?) is scored against all entities, in both directions. The teachers'
logits are computed at every step: a table of all would take tens of GB. Weights are chosen by the
filtered MRR on the validation split.
"""

from distill_jax import config_arguments, default_config, smoke


def get_config(arguments: str = ""):
    """The config; of fb15k237, or `:wn18rr`; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments, dataset=("fb15k237", "wn18rr"))
    config = default_config()
    config.name = f"dgkd_{given.dataset}"
    config.dataset.name = given.dataset
    config.networks = ("complex_256", "complex_128", "complex_64", "complex_32")
    config.guidance = ("none", "direct", "chain", "dense", "dense+drop")
    config.seeds = (0, 1, 2)
    config.recipe.update(epochs=30, batch_size=1024, optimizer="adamw", learning_rate=1e-3)
    config.recipe.update(weight_decay=0.0, schedule="cosine", temperature=1.0, kd_weight=0.5)
    config.methods = {"kd": 1.0, "n3": 0.01}
    small = ("complex_16", "complex_8", "complex_4")
    return smoke(config, networks=small) if given.smoke else config
