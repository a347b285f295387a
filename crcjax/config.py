"""The whole default config: every field with its unit and the reason for its value. `configs/*.py` only override it."""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The default config; locked, so that an unknown field in a config file is an error."""
    config = ConfigDict()
    config.seed = 0  # folded by step, slide and purpose; the only source of randomness

    config.data = data = ConfigDict()
    data.store = ""  # folder of tile stores, as `crcjax tile --out` wrote it
    data.cohort = ""  # CSV with slide_id, case_id, subtype and optionally path, site, scanner, split
    data.features = False  # train on what crcjax embed or import stored for config.model.encoder, unaugmented
    data.magnifications = ()  # of the store's, that the model sees; (): all, or set by training, all that have features
    data.unit = "slide"  # what a bag holds: a slide, or all slides of a case, which must have one label anyway
    data.classes = ("canonical", "immune", "stromal")  # the label scheme; CMS1 to CMS4 by override
    data.val_fraction = 0.2  # of the cases, for model selection, where the cohort has no split column
    data.test_fraction = 0.2  # of the cases, never seen by training, where the cohort has no split column
    data.split_seed = 0  # draws splits and folds; runs of other config.seed share them, so that they make an ensemble
    data.folds = 0  # of cross-validation, see docs/training.md; 0, the splits above
    data.fold = 0  # the fold that is test, from 0; training never reads it, and selects on val_fraction of the others
    data.fold_by = "case"  # or site: all cases of a site in one fold, to see how a model does at a new one
    data.sampling_seed = (
        -1
    )  # draws the bags of every step; -1: config.seed does. Given, runs of several seeds see the same
    data.regions_per_bag = 32  # regions sampled per bag and step; memory grows with it, evidence per step too
    data.by_site = False  # the sites of a class take turns, so that no class is learned from its largest site alone
    data.region_sampling = (
        "uniform"  # or spread: from as many parts of the tissue as regions, in proportion to its tissue
    )
    data.mine_slides = 0.0  # share of bags, at most 0.3, given to slides in proportion to their running loss
    data.mine_regions = 0.0  # share of a bag, at most 0.3, of a slide called wrongly: its regions of highest attention
    data.mine_every = 50  # steps by one memory of losses and attention; fewer than are prefetched, and a step may wait
    data.batch_size = 8  # bags per step, over all devices
    data.region_buckets = (64, 256, 1024, 4096)  # padded lengths of whole bags; XLA compiles one program each
    data.read_threads = 4  # threads that read stores ahead of the device, of each worker or of the process itself
    data.workers = (
        0  # processes that read; threads alone feed a device until Python's lock, not the disk, holds them up
    )
    data.prefetch = 4  # batches held ready in host memory, of each worker or of the process itself
    data.device_prefetch = 2  # batches held ready on the devices, so that no transfer waits for a step to end

    config.stain = stain = ConfigDict()
    stain.method = "none"  # none, macenko, vahadane or reinhard: tiles brought to one stain, on the device
    stain.reference = "standard"  # the published reference, or the slide_id of a slide in the store

    config.mesh = mesh = ConfigDict()
    mesh.data = 0  # devices along which the bags of a step are divided; 0: as many as divide data.batch_size
    mesh.bag = 0  # devices along which a bag's regions are divided; 0: those that data and model leave
    mesh.model = 1  # devices along which each layer's weights are divided; for encoders that one device cannot hold
    mesh.fsdp_min_size = (
        65536  # numbers in a parameter from which it is divided over data, with its moments; 0: none is
    )

    config.augment = augment = ConfigDict()
    augment.flips = True  # flips and right-angle turns: tissue has no up
    augment.stain = 0.15  # standard deviation of the log gain per colour channel in optical density; scanners differ
    augment.hed = 0.0  # of the log gain of haematoxylin, eosin and the rest, along the slide's own stains if estimated
    augment.stain_swap_prob = 0.0  # probability that a slide is given the stains of another one of the batch
    augment.blur = 0.0  # px, the largest standard deviation of a Gaussian
    augment.noise = 0.0  # intensities of 255, the largest standard deviation
    augment.jpeg_min_quality = 0.0  # below 100, the lowest quality of a JPEG that tiles pass through: 70 is 30 to 100
    augment.jpeg_420 = True  # that JPEG has its colours at half the resolution, as most scanners' have
    augment.artefacts = (
        0.0  # share of tiles with a simulated pen, fold, bubble, blur or dust: the artefact task's labels
    )
    augment.each = "slide"  # or instance: whose draw each of these is, but for flips and artefacts, always a tile's

    config.model = model = ConfigDict()
    model.encoder = "compact"  # the tile encoder, trained end to end from pixels, or one of docs/encoders.md
    model.weights = ""  # file of a published encoder's weights, read when training starts
    model.imported_features = 0  # numbers in each feature of crcjax import; set by training on such, without weights
    model.frozen = True  # a published encoder stays as it is, and the model learns on its features
    model.batch_norm_momentum = (
        0.0  # a step's share, by micro-batches, in a trained encoder's running statistics; 0: the published ones norm
    )
    model.encode_regions = 64  # of each bag encoded at a time in training; memory grows with it, not with the bag
    # What is made again in the backward pass of several such parts, and of blocks of instances in transmil and hierarchical:
    # all (full), all but matrix products (dots), or none.
    model.remat = "full"
    model.width = 32  # channels of the encoder's first stage; doubles per stage
    model.features = 128  # numbers per instance
    model.mil = "gated_abmil"  # mean, max, abmil, gated_abmil, clam_sb, clam_mb, dsmil, transmil, hierarchical
    model.attention = 64  # hidden units of the gated attention (Ilse 2018)
    model.heads = 4  # attention heads of transmil and hierarchical; features are a multiple of 4 times this
    model.layers = 1  # attention layers across the regions, of hierarchical
    model.clam_instances = 8  # first and last instances that CLAM judges (Lu 2021); at most half of the bag
    # softmax; evidential: Dirichlet evidence with its vacuity (Sensoy 2018); or evidential_density: the same, of which
    # prediction leaves unusual slides little (docs/uncertainty.md).
    model.head = "softmax"
    model.dropout = 0.1  # on instance features, in training only
    model.dtype = (
        "float32"  # of the computation: float32, bfloat16, or float16 with a scaled loss; the rest stays float32
    )

    config.train = train = ConfigDict()
    train.steps = 300  # optimiser steps
    train.ensemble_size = 1  # runs, of as many seeds, trained together on the same stored features; docs/training.md
    train.micro_batches = 1  # parts, at least, that a step's bags are computed in; more where memory asks for it
    train.memory_gib = 0.0  # of each device, that steps may take; 0: nine tenths of it, on CPUs of the machine
    train.eval_every = 100  # steps between evaluations on the validation cases
    train.checkpoint_every = 50  # steps between checkpoints; a killed run repeats at most these
    train.log_every = 10  # steps between lines of metrics
    train.replica_check_every = (
        100  # steps between checks of several processes that their copies are the same to the bit; 0, never
    )
    train.stall_timeout_s = 900.0  # several processes end where none finishes a step, or a slide of an evaluation
    train.keep_best = 1  # checkpoints kept for their validation metric, beside the newest
    train.loss = "cross_entropy"  # or focal; for the evidential heads evidential (squares) or evidential_digamma
    train.focal_gamma = 2.0  # of the focal loss (Lin 2017); 0 is cross-entropy
    train.annealing_steps = 100  # steps until the evidential loss weighs its KL term fully
    train.instance_weight = (
        0.3  # of the instance loss beside the bag's 1, clam and dsmil; Lu 2021's 0.7 and 0.3 are 0.43
    )
    train.class_balance = 1.0  # beta of the effective number (Cui 2019): 1, every class counts alike; 0, by its slides
    train.contrastive_weight = 0.0  # of the supervised contrastive loss on embeddings (Khosla 2020); 0 leaves it out
    train.contrastive_temperature = 0.1  # of that loss (Khosla 2020); lower looks at the hardest pairs
    train.label_smoothing = 0.05  # of cross_entropy and focal; molecular references have errors of their own

    config.tasks = tasks = ConfigDict()  # of every tile, beside the subtype; docs/tasks.md
    tasks.tissue = 0.0  # weight of telling its tissue, one of tissue_classes, where labels say it; 0 leaves a task out
    tasks.stain = 0.0  # weight of telling its slide's stain estimate, standardised over the training slides
    tasks.artefact = 0.0  # weight of telling its artefact, simulated (augment.artefacts) or labelled
    tasks.weighting = "fixed"  # or learned, from these weights on: homoscedastic uncertainty (Kendall 2018)
    tasks.labels = ""  # folder with SLIDE_ID.geojson as QuPath writes it, or a painted slide's SLIDE_ID.truth.npz
    tasks.tissue_classes = ()  # the names of its areas that are told apart

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-3  # peak, AdamW
    optimizer.warmup_steps = 30  # linear from zero
    optimizer.final_fraction = 0.01  # of the peak, at the end of the cosine
    optimizer.weight_decay = 1e-2  # on matrices and kernels, not on biases and scales
    optimizer.clip_norm = 1.0  # global gradient norm

    return config.lock()
