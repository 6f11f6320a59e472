"""TAKD on SST-2: a transformer of 6 layers teaches one of 3, which teaches one of 1.

  python -m distill_jax.main --config=configs/takd_sst2.py --config.dataset.data_dir=DIR

Nothing is pretrained: word pieces and weights are learnt from the 6,920 sentences of the training
split. The 91.4 that is published for a student of BERT needs BERT as the teacher; docs/beyond.md
shows how the logits of any teacher are plugged in.
"""

from distill_jax import config_arguments, default_config, smoke


def get_config(arguments: str = ""):
    """The config; `:smoke` cuts it down to seconds."""
    given = config_arguments(arguments)
    config = default_config()
    config.name = "takd_sst2"
    config.dataset.name = "sst2"
    config.networks = ("transformer_6_256", "transformer_3_128", "transformer_1_64")
    config.guidance = ("none", "direct", "chain")
    config.seeds = (0, 1, 2)
    config.recipe.update(epochs=4, batch_size=64, optimizer="adamw", learning_rate=3e-4)
    config.recipe.update(weight_decay=0.01, decayed="kernels", clip_norm=1.0)
    config.recipe.update(schedule="cosine", warmup_epochs=1.0, temperature=2.0, kd_weight=0.5)
    small = ("transformer_2_32", "transformer_1_32", "bilstm_16")
    return smoke(config, networks=small) if given.smoke else config
