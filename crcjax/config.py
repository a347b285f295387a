"""The default config: every field with its meaning, its unit and when to change it. `configs/*.py` override parts of it."""

from __future__ import annotations

from ml_collections import ConfigDict

from crcjax.config_names import Section


def get_config() -> ConfigDict:
    """Returns the default config. It is locked, so that an unknown field in a config file is an error."""
    config = Section()

    # Seed of the model's first weights, augmentation, dropout and sampling. Runs that differ in it alone make an ensemble.
    config.seed = 0

    config.data = data = Section()
    # Folder of tile stores that `crcjax tile --out` wrote. Required.
    data.store = ""
    # CSV with the columns slide_id, case_id, that of `label` and, where known, path, site, scanner and split. Required.
    data.cohort = ""
    # True trains on the features that `crcjax embed` or `crcjax import` stored for model.encoder, without augmentation.
    # False trains on pixels.
    data.features = False
    # Magnifications of the store that the model sees, such as ("10x", "20x"). () takes all of them; with data.features, all
    # that have features.
    data.magnifications = ()
    # Content of a bag: "slide", or "case" for all slides of a case. Choose "case" where the label belongs to the case.
    data.unit = "slide"
    # The target: the cohort's column of the labels. Predictions and bundles state it.
    data.label = "subtype"
    # The cancer of the cohort, which bundles state.
    data.cancer_type = "colorectal"
    # Names of the classes in the column of the labels. For the consensus molecular subtypes: CMS1,CMS2,CMS3,CMS4.
    data.classes = ("canonical", "immune", "stromal")
    # Fraction of the cases used for model selection, where the cohort has no column split, and within cross-validation.
    data.val_fraction = 0.2
    # Fraction of the cases that training never reads, where the cohort has no column split.
    data.test_fraction = 0.2
    # Seed of splits and folds. Keep it the same in all runs of an ensemble, so that they share their test cases.
    data.split_seed = 0
    # Number of cross-validation folds. 0 uses the split above. See docs/training.md.
    data.folds = 0
    # Index of the test fold, from 0. Training never reads it. `crcjax crossvalidate` sets it.
    data.fold = 0
    # The unit that is never divided between folds: "case", or "site" to estimate performance at a new hospital.
    data.fold_by = "case"
    # Seed of the bags of every step. -1 uses `seed`. Set it so that runs of different seeds see the same bags.
    data.sampling_seed = -1
    # Regions sampled per bag and step. More regions show more of a slide, and take memory in proportion.
    data.regions_per_bag = 32
    # True lets the sites of a class take turns in sampling. Use it where one large site would dominate a class.
    data.by_site = False
    # How regions are sampled: "uniform", or "spread" over the tissue, so that a small bag still covers the whole section.
    data.region_sampling = "uniform"
    # Fraction of the bags, at most 0.3, given to slides in proportion to their running loss. Raise it where training
    # neglects hard slides and the labels are reliable.
    data.mine_slides = 0.0
    # Fraction of the regions, at most 0.3, that are the regions of highest attention when the slide was last misclassified.
    data.mine_regions = 0.0
    # Steps between updates of the losses and attention that mining samples by. Keep it above the number of prefetched
    # steps, or the loader waits.
    data.mine_every = 50
    # Bags per optimiser step, over all devices. Make it a multiple of the devices along mesh.data.
    data.batch_size = 8
    # Lengths, in regions, to which whole slides are padded for evaluation and prediction. XLA compiles one program for each.
    data.region_buckets = (64, 256, 1024, 4096)
    # Threads that read stores ahead of the device, in each reader process. Raise it where the log's "data wait" is high.
    data.read_threads = 4
    # Reader processes. 0 reads in threads of the training process; raise it where Python's interpreter lock, not the disk,
    # limits reading.
    data.workers = 0
    # Batches held ready in host memory, by each reader process.
    data.prefetch = 4
    # Batches held ready on the devices, so that no step waits for a transfer.
    data.device_prefetch = 2

    config.stain = stain = Section()
    # Stain normalisation on the device: "none", "macenko", "vahadane" or "reinhard". Use it where scanners or laboratories
    # differ in colour.
    stain.method = "none"
    # The stain that tiles are normalised to: "standard", the published reference, or the slide_id of a slide in the store.
    stain.reference = "standard"

    config.mesh = mesh = Section()
    # Devices that divide the bags of a step between them. 0 takes as many as divide data.batch_size.
    mesh.data = 0
    # Devices that divide the regions of each bag. 0 uses the devices that `data` and `model` leave. For bags too large for one
    # device.
    mesh.bag = 0
    # Devices that divide the weights of each layer. For encoders too large for one device.
    mesh.model = 1
    # Parameters with at least this many numbers are sharded over mesh.data, with their optimiser state. 0 replicates all.
    mesh.fsdp_min_size = 65536

    config.augment = augment = Section()
    # Flips and rotations by right angles, each tile its own: tissue has no preferred orientation.
    augment.flips = True
    # Standard deviation of the log gain of each colour channel in optical density. Raise it for more varied scanners.
    augment.stain = 0.15
    # Standard deviation of the log gain of haematoxylin, eosin and the residual, along the slide's own stain vectors where
    # they were estimated. 0 disables it; 0.05 to 0.2 is usual.
    augment.hed = 0.0
    # Probability that a slide takes the stain of another slide of the batch. Raise it where stains differ between sites.
    augment.stain_swap_prob = 0.0
    # Largest standard deviation of a Gaussian blur, in px. 0 disables it.
    augment.blur = 0.0
    # Largest standard deviation of Gaussian noise, in intensities of 0 to 255. 0 disables it.
    augment.noise = 0.0
    # Lowest JPEG quality that tiles are re-encoded with; the quality is sampled from [jpeg_min_quality, 100]. 100 disables
    # it.
    augment.jpeg_min_quality = 100.0
    # Whether that JPEG halves the resolution of its colour channels, as most scanners do.
    augment.jpeg_420 = True
    # Fraction of the tiles with a simulated pen mark, fold, bubble, blur or dust. These are the labels of tasks.artefact.
    augment.artefacts = 0.0
    # Whether the tiles of a "slide" share the parameters above or each "instance" has its own. Flips and artefacts are
    # always sampled for each tile.
    augment.each = "slide"

    config.model = model = Section()
    # Tile encoder: "compact", trained from pixels, or a published encoder of docs/encoders.md.
    model.encoder = "compact"
    # File of the published encoder's weights. Training copies them into the run, so prediction does not need the file.
    model.weights = ""
    # Numbers in each imported feature. Training sets it on data.features of `crcjax import`; leave it at 0.
    model.imported_features = 0
    # Clips stored features, standardised over the training slides, at this many standard deviations. 0 takes them as they are
    # stored. Try 3 for features whose columns differ in scale or have outliers, as measured or hand-made features do.
    model.standardise = 0.0
    # Probability of dropping a column of the stored features from a whole bag, in training only. Raise it where few bags have
    # many features.
    model.feature_dropout = 0.0
    # True leaves a published encoder's weights as they are; False fine-tunes them, which needs far more memory.
    model.frozen = True
    # Weight of one step's batch statistics in the running statistics of a fine-tuned encoder's batch norms. 0 normalises by
    # the published statistics. Use 0.1 with many tiles per micro-batch.
    model.batch_norm_momentum = 0.0
    # Regions of each bag that are encoded at a time in training. Lower it where memory is short.
    model.encode_regions = 64
    # Rematerialisation in the encoder and in blocks of transmil and hierarchical: "full" recomputes all activations in the
    # backward pass; "dots" all except matrix products; "none" recomputes nothing. "none" is fastest and takes the most memory.
    model.remat = "full"
    # Channels of the compact encoder's first stage; each later stage doubles them.
    model.width = 32
    # Numbers in an instance's feature after the projection. A multiple of 4 times model.heads.
    model.features = 128
    # Multiple-instance aggregator: mean, max, abmil, gated_abmil, clam_sb, clam_mb, dsmil, transmil, hierarchical, or
    # one of your own. See docs/models.md.
    model.mil = "gated_abmil"
    # Hidden units of the attention (Ilse et al. 2018).
    model.attention = 64
    # Attention heads of transmil and hierarchical.
    model.heads = 4
    # Attention layers over the regions, in hierarchical.
    model.layers = 1
    # Instances of highest and of lowest attention that CLAM's instance loss uses (Lu et al. 2021); at most half of a bag.
    model.clam_instances = 8
    # Output: "softmax"; "evidential", Dirichlet evidence with vacuity (Sensoy et al. 2018); or "evidential_density", which
    # also reduces the evidence of out-of-distribution slides. See docs/uncertainty.md.
    model.head = "softmax"
    # Probability of dropping a number of an instance's feature, in training only.
    model.dropout = 0.1
    # Precision of the computation: "float32", "bfloat16", or "float16" with loss scaling. Parameters stay float32. Use
    # "bfloat16" on GPUs.
    model.dtype = "float32"

    config.train = train = Section()
    # Optimiser steps.
    train.steps = 300
    # Runs with consecutive seeds that are trained together on the same stored features. See docs/training.md.
    train.ensemble_size = 1
    # Gradient accumulation: the micro-batches, at least, that a step's bags are divided into. Training raises the number
    # where memory is short.
    train.micro_batches = 1
    # GiB of each device's memory that a step may take. 0 uses nine tenths of it; on CPUs, nine tenths of the machine's.
    train.memory_gib = 0.0
    # Steps between evaluations on the validation cases.
    train.eval_every = 100
    # Steps between checkpoints. A killed run repeats at most this many steps.
    train.checkpoint_every = 50
    # Minutes after which a report is followed by a checkpoint even if checkpoint_every is not reached. -1 computes them from the
    # measured cost of a save and the time between failures; 0 saves by steps alone. See docs/recovery.md.
    train.checkpoint_minutes = -1.0
    # Mean hours between failures of the whole run, for checkpoint_minutes -1. 0 estimates them from the run's own failures.
    train.mtbf_hours = 0.0
    # Steps between reports of training metrics.
    train.log_every = 10
    # Steps between bitwise comparisons of the replicas' parameters in a run of several processes. 0 never compares.
    train.replica_check_every = 100
    # Seconds without a finished step, or an evaluated slide, after which all processes write their stacks to their logs and end
    # with status 4. Raise it above the time that compiling takes.
    train.stall_timeout_s = 900.0
    # Seconds without a heartbeat after which a process counts as lost, and all others end with status 4. Raise it where machines
    # are so busy that processes do not run for seconds.
    train.peer_timeout_s = 10.0
    # Where a preemption is announced besides by SIGTERM and SIGUSR1: "gcp", "aws" or "azure" for the cloud's metadata server, an
    # http address that answers with a text, or the path of a file that appears. Empty: by signals alone.
    train.preemption_notice = ""
    # Newest checkpoints that are kept. With one, a damaged checkpoint costs the whole run.
    train.keep_newest = 2
    # Checkpoints kept for their validation metrics, beside the newest ones: that many by balanced accuracy, and that many by
    # each metric of keep_best_by.
    train.keep_best = 1
    # Further validation metrics by which the best checkpoints are kept, such as ("loss",).
    train.keep_best_by = ()
    # Checkpoints of steps that are multiples of this are kept for ever. 0 keeps none.
    train.keep_every = 0
    # Seconds after which a save that does not end is abandoned and reported; training goes on. Raise it above the time that
    # the slowest disk takes.
    train.save_timeout_s = 600.0
    # File of an Ed25519 private key that signs every checkpoint; a run with a key resumes from its own checkpoints alone. See
    # docs/recovery.md.
    train.signing_key = ""
    # Loss: "cross_entropy" or "focal" for the softmax head; "evidential" or "evidential_digamma" for the evidential heads.
    train.loss = "cross_entropy"
    # Exponent of the focal loss (Lin et al. 2017). 0 is cross-entropy.
    train.focal_gamma = 2.0
    # Steps over which the weight of the evidential loss's KL term rises from 0 to 1. A tenth of train.steps is a start.
    train.annealing_steps = 100
    # Weight of the instance loss of CLAM and DSMIL relative to the bag's loss; Lu et al. 2021 use 0.43.
    train.instance_weight = 0.3
    # Beta of class weighting by effective number (Cui et al. 2019), beside balanced sampling. 1 weighs all classes alike; 0
    # weighs each by its number of slides.
    train.class_balance = 1.0
    # Weight of the supervised contrastive loss on bag embeddings (Khosla et al. 2020). 0 leaves it out; it needs 16 bags or
    # more per step.
    train.contrastive_weight = 0.0
    # Temperature of the contrastive loss. Lower values concentrate on the hardest pairs.
    train.contrastive_temperature = 0.1
    # Label smoothing of cross_entropy and focal. Raise it where the reference labels are less reliable.
    train.label_smoothing = 0.05

    # Steps that go wrong: when one is left out, and when the run goes back. See docs/recovery.md.
    config.health = health = Section()
    # Norm of the gradient, before clipping, above which a step is left out. Lower it if the loss jumps after steps with large
    # gradients.
    health.max_gradient_norm = 1e6
    # Steps left out in series after which the run goes back to the last good checkpoint.
    health.max_left_out = 5
    # Robust z-score of the mean loss between two reports, against the reports before, at which the run goes back. 0 never.
    health.loss_spike_z = 10.0
    # Times that a run goes back and passes over the bags that went wrong, before it ends with status 5. 0 ends it at once.
    health.max_rollbacks = 3
    # Reports in series without an accuracy above chance or a falling loss, after which the log warns. 0 never.
    health.stuck_reports = 100
    # Steps between steps that are computed again, on other devices where there are some, and compared bit by bit: it finds
    # devices that compute wrongly. 0 never; 1000 costs a thousandth of the time, and memory for two more states.
    health.recompute_every = 0

    # Readings of every process and its machine while it trains. See docs/monitoring.md.
    config.monitor = monitor = Section()
    # Seconds between samples. 0 takes none. Raise it where a shared file system is slow.
    monitor.interval_s = 1.0
    # Port on which process 0 of each machine answers Prometheus at /metrics; the machine's next process takes the next port. 0
    # answers on none.
    monitor.metrics_port = 0
    # Address of this machine on which /metrics is answered, without a password. "0.0.0.0" answers every network.
    monitor.metrics_address = "127.0.0.1"

    # TOML file with the receivers of notifications about faulty machines: webhooks, e-mail, a file. Empty: they are in the log
    # and in RUN/monitor/findings.jsonl alone.
    monitor.notifications = ""

    # Auxiliary tasks: predictions for every tile beside the bag's subtype. See docs/tasks.md.
    config.tasks = tasks = Section()
    # Weight of the loss of predicting a tile's tissue class, where tasks.labels states it. 0 leaves a task out.
    tasks.tissue = 0.0
    # Weight of the loss of predicting the slide's stain estimate, standardised over the training slides.
    tasks.stain = 0.0
    # Weight of the loss of predicting a tile's artefact, simulated by augment.artefacts or stated in tasks.labels.
    tasks.artefact = 0.0
    # "fixed" keeps these weights; "learned" starts from them and learns each task's uncertainty (Kendall et al. 2018).
    tasks.weighting = "fixed"
    # Folder with SLIDE_ID.geojson as QuPath exports it, or SLIDE_ID.truth.npz of a synthetic slide.
    tasks.labels = ""
    # Names of the labelled areas that tasks.tissue tells apart.
    tasks.tissue_classes = ()

    config.optimizer = optimizer = Section()
    # Update rule: "adamw"; "lamb" for batches of hundreds of bags; "lion", with a tenth of adamw's learning rate; "adam"; or
    # "sgd" with momentum.
    optimizer.name = "adamw"
    # Decay of the running mean of gradients. In sgd, the momentum.
    optimizer.beta1 = 0.9
    # Decay of the running mean of squared gradients; unused in sgd. Lion's authors use 0.99.
    optimizer.beta2 = 0.999
    # Learning rate after the warm-up: "cosine" or "linear" decay to the final fraction, "constant", or "one_cycle", which
    # rises and falls as a cosine.
    optimizer.schedule = "cosine"
    # Highest learning rate of the schedule. Lower it if the loss is not finite or jumps.
    optimizer.learning_rate = 1e-3
    # Steps over which the learning rate rises linearly from zero; in one_cycle, as a cosine from a 25th of the highest.
    optimizer.warmup_steps = 30
    # Learning rate at the last step, as a fraction of the highest; unused in the constant schedule.
    optimizer.final_fraction = 0.01
    # Weight decay of matrices and kernels; biases and scales have none. In adam and sgd it is added to the gradient, in the
    # others it is decoupled from it.
    optimizer.weight_decay = 1e-2
    # Gradients are scaled down to this global norm.
    optimizer.clip_norm = 1.0

    return config.lock()
