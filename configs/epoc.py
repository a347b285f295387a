"""A trial's cohort on 4 nodes of 8 GPUs: 10x, 20x and 40x from pixels, with every choice of the EPOC design.

    crcjax tile SLIDES --out STORE --mag 10x,20x,40x
    sbatch --nodes=4 --gpus-per-node=8 launch/slurm/train.sbatch --config configs/epoc.py --workdir RUN \\
        --config.data.store=STORE --config.data.cohort=cohort.csv

Gives RUN for `crcjax predict --run RUN`: subtype probabilities with vacuity, an uncertainty that one run states. Tiles are
normalised to the published Macenko reference on the device. An auxiliary task predicts simulated artefacts; with labelled
tissue, add --config.tasks.tissue=0.2 --config.tasks.labels=LABELS --config.tasks.tissue_classes=tumour,stroma,normal.
Two bags of 32 regions, 21 tiles each, per GPU: tools/collectives.py predicts more than 95 % efficiency of 32 GPUs so. No run
on several GPUs has been measured.
"""

from ml_collections import ConfigDict

from crcjax.config import get_config as default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.magnifications = ("10x", "20x", "40x")
    config.data.batch_size = 64
    config.data.regions_per_bag = 32
    config.data.region_sampling = "spread"
    config.data.by_site = True
    config.data.read_threads = 16
    config.stain.method = "macenko"
    # The model has a few million parameters: sharding them would only add communication (tools/collectives.py).
    config.mesh.fsdp_min_size = 0
    config.augment.stain = 0.1
    config.augment.blur = 1.0
    config.augment.jpeg_min_quality = 60.0
    config.augment.artefacts = 0.1
    config.model.width = 64
    config.model.features = 256
    config.model.mil = "hierarchical"
    config.model.heads = 8
    config.model.attention = 128
    config.model.encode_regions = 4
    config.model.head = "evidential"
    config.model.dtype = "bfloat16"
    config.train.loss = "evidential"
    config.train.annealing_steps = 2000
    config.train.steps = 20_000
    config.train.eval_every = 1000
    config.train.checkpoint_every = 500
    config.tasks.artefact = 0.2
    config.tasks.weighting = "learned"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1000
    return config
