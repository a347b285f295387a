"""A trial's cohort: hundreds of resections at 10x and 20x (crcjax tile --mag 10x,20x), on GPUs."""

from ml_collections import ConfigDict

from crcjax.config import get_config as default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.batch_size = 32
    config.data.regions_per_bag = 64
    config.data.read_threads = 16
    config.mesh.fsdp_min_size = 0  # a million parameters: dividing them would only send more (tools/collectives.py)
    config.model.width = 64
    config.model.features = 512
    config.model.attention = 256
    config.model.dtype = "bfloat16"
    config.train.steps = 20_000
    config.train.eval_every = 1000
    config.train.checkpoint_every = 500
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1000
    return config
