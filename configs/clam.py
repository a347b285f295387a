"""CLAM-SB (Lu et al. 2021) on stored features of a frozen encoder: a baseline for comparisons.

    crcjax tile SLIDES --out STORE --mag 20x
    crcjax embed STORE --encoder imagenet-resnet50-clam --weights resnet50.safetensors
    python -m crcjax.main --config configs/clam.py --workdir RUN --config.data.store=STORE --config.data.cohort=cohort.csv \\
        --config.model.weights=resnet50.safetensors

Gives RUN for `crcjax predict --run RUN`. As in the paper: gated attention of 512 and 256 units, dropout 0.25, instance loss
of 8 instances weighted 0.3 to 0.7 of the bag's (0.43), Adam at 2e-4 with L2 regularisation 1e-5 and no schedule. Unlike
there, a step has 8 bags, classes are sampled in turn, and weight decay leaves biases out.
"""

from ml_collections import ConfigDict

from crcjax.config import get_config as default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.features = True
    config.data.regions_per_bag = 4096
    config.model.encoder = "imagenet-resnet50-clam"
    config.model.features = 512
    config.model.mil = "clam_sb"
    config.model.attention = 256
    config.model.clam_instances = 8
    config.model.dropout = 0.25
    config.train.instance_weight = 0.43
    config.train.label_smoothing = 0.0
    config.train.steps = 5000
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.optimizer.name = "adam"
    config.optimizer.schedule = "constant"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 1e-5
    return config
