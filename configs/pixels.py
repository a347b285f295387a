"""End to end from pixels: the compact encoder and the aggregator are trained together, without any published weights.

    crcjax tile SLIDES --out STORE --mag 10x
    python -m crcjax.main --config configs/pixels.py --workdir RUN --config.data.store=STORE --config.data.cohort=cohort.csv

Gives RUN for `crcjax predict --run RUN`. Take it where no foundation encoder may be used, or as the baseline that one has to
beat. One GPU; on several, the bags of a step are divided between them. To fine-tune a published encoder instead, set
model.encoder, model.weights and model.frozen=False, and lower the learning rate to 1e-5.
"""

from ml_collections import ConfigDict

from crcjax.config import get_config as default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.batch_size = 32
    config.data.regions_per_bag = 64
    config.data.read_threads = 16
    config.augment.stain = 0.15
    config.augment.hed = 0.1
    config.augment.blur = 1.0
    config.augment.jpeg_min_quality = 60.0
    config.augment.each = "instance"
    config.model.encoder = "compact"
    config.model.width = 64
    config.model.features = 512
    config.model.mil = "gated_abmil"
    config.model.attention = 256
    config.model.dtype = "bfloat16"
    config.train.steps = 20_000
    config.train.eval_every = 1000
    config.train.checkpoint_every = 500
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1000
    return config
