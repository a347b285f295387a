"""Hierarchical multiple-instance learning on stored features of a frozen foundation encoder. Start here with real slides.

    crcjax tile SLIDES --out STORE --mag 10x,20x
    crcjax embed STORE --encoder uni2-h --weights pytorch_model.bin --mag 10x,20x
    python -m crcjax.main --config configs/features_hierarchical.py --workdir RUN --config.data.store=STORE \\
        --config.data.cohort=cohort.csv --config.model.weights=pytorch_model.bin

Gives RUN for `crcjax predict --run RUN`. Attention spans tiles within a region, then regions within a slide. Training reads
features, so that it needs one GPU or some CPU cores. For features of `crcjax import`, set model.encoder to their name and
leave model.weights empty.
"""

from ml_collections import ConfigDict

from crcjax.config import get_config as default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.features = True
    config.data.batch_size = 32
    config.data.regions_per_bag = 512
    config.data.region_sampling = "spread"
    config.model.encoder = "uni2-h"
    config.model.features = 512
    config.model.mil = "hierarchical"
    config.model.heads = 8
    config.model.attention = 256
    config.model.dropout = 0.25
    config.train.steps = 5000
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 250
    config.optimizer.weight_decay = 0.05
    return config
