"""One prediction per case: all slides of a patient form one bag, for labels that belong to the patient.

    crcjax tile SLIDES --out STORE --mag 20x
    crcjax embed STORE --encoder uni2-h --weights pytorch_model.bin
    python -m crcjax.main --config configs/case_level.py --workdir RUN --config.data.store=STORE \\
        --config.data.cohort=cohort.csv --config.model.weights=pytorch_model.bin

Gives RUN for `crcjax predict --run RUN`, which then predicts all slides of a case alike. Regions are sampled over all slides
of the case, so that a bag holds more of them than in configs/abmil.py.
"""

from ml_collections import ConfigDict

from crcjax.config import get_config as default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.unit = "case"
    config.data.features = True
    config.data.batch_size = 16
    config.data.regions_per_bag = 4096
    config.data.region_sampling = "spread"
    config.data.region_buckets = (256, 1024, 4096, 16384)
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
