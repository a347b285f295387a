"""Gated attention pooling (Ilse et al. 2018) on stored features of a frozen encoder: the simplest strong baseline.

    crcjax tile SLIDES --out STORE --mag 20x
    crcjax embed STORE --encoder uni2-h --weights pytorch_model.bin
    python -m crcjax.main --config configs/abmil.py --workdir RUN --config.data.store=STORE --config.data.cohort=cohort.csv \\
        --config.model.weights=pytorch_model.bin

Gives RUN for `crcjax predict --run RUN`. A step takes milliseconds on a GPU and a fraction of a second on CPU cores.
"""

from ml_collections import ConfigDict

from crcjax.config import get_config as default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.features = True
    config.data.batch_size = 16
    config.data.regions_per_bag = 2048
    config.model.encoder = "uni2-h"
    config.model.features = 512
    config.model.mil = "gated_abmil"
    config.model.attention = 256
    config.model.dropout = 0.25
    config.train.steps = 5000
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 100
    return config
