"""DGKD on SST-2: a row of transformers teaches a bidirectional LSTM, each by all larger ones.

  python -m distill_jax.main --config=configs/dgkd_sst2.py --config.dataset.data_dir=DIR

Nothing is pretrained, see takd_sst2.
"""

from distill_jax import config_arguments, default_config, smoke


def get_config(arguments: str = ""):
    """The config; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments)
    config = default_config()
    config.name = "dgkd_sst2"
    config.dataset.name = "sst2"
    config.networks = ("transformer_6_256", "transformer_4_128", "transformer_2_64", "bilstm_32")
    config.guidance = ("none", "direct", "chain", "dense", "dense+drop")
    config.seeds = (0, 1, 2)
    config.recipe.update(epochs=4, batch_size=64, optimizer="adamw", learning_rate=3e-4)
    config.recipe.update(weight_decay=0.01, decayed="kernels", clip_norm=1.0)
    config.recipe.update(schedule="cosine", warmup_epochs=1.0, temperature=2.0, kd_weight=0.5)
    config.overrides = {"bilstm_32": {"learning_rate": 2e-3}}
    config.loss.teachers = "sum"  # as DGKD counts them
    small = ("transformer_2_32", "transformer_1_32", "bilstm_16")
    if given.smoke:
        config.overrides = {"bilstm_16": {"learning_rate": 2e-3}}
        return smoke(config, networks=small)
    return config
