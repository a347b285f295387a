"""Five folds with an ensemble of five seeds each: every case is predicted once, by runs that never saw it.

    crcjax tile SLIDES --out STORE --mag 20x
    crcjax embed STORE --encoder uni2-h --weights pytorch_model.bin
    crcjax crossvalidate --config configs/crossvalidated_ensemble.py --out CV --seeds 5 --config.data.store=STORE \\
        --config.data.cohort=cohort.csv --config.model.weights=pytorch_model.bin
    crcjax validate --predictions CV/predictions.csv --cohort cohort.csv --out REPORT

Gives 25 runs CV/fold-F/seed-S, CV/runs.csv and CV/predictions.csv. The five seeds of a fold are trained together on the same
bags. For an estimate at new hospitals, add --config.data.fold_by=site --config.data.folds=0: each site is then left out once.
"""

from ml_collections import ConfigDict

from crcjax.config import get_config as default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.folds = 5
    config.data.val_fraction = 0.2
    config.data.features = True
    config.data.batch_size = 16
    config.data.regions_per_bag = 2048
    config.model.encoder = "uni2-h"
    config.model.features = 512
    config.model.mil = "gated_abmil"
    config.model.attention = 256
    config.model.dropout = 0.25
    config.train.ensemble_size = 5
    config.train.steps = 5000
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 100
    return config
