"""The valid values of every config field, checked before anything is read or written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points

from ml_collections import ConfigDict

from crcjax.config import get_config
from crcjax.errors import InputError


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; `above` and `below` exclude the end itself."""

    least: int | float = -math.inf
    most: int | float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: int | float) -> bool:
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return math.isfinite(value) and low and high

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"above {self.least}" if self.above else f"at least {self.least}"
        return f"{'above' if self.above else 'from'} {self.least} {'to below' if self.below else 'to'} {self.most}"


_SEED = Range(0, 2**31 - 1)
_COUNT = Range(1)
_FROM_ZERO = Range(0)
_FRACTION = Range(0, 1)
_BELOW_ONE = Range(0, 1, below=True)
_POSITIVE = Range(0, above=True)
# Training on more hard cases than this learns the errors of their labels.
_MINED = Range(0, 0.3)

RANGES: dict[str, Range] = {
    "seed": _SEED,
    "data.val_fraction": _BELOW_ONE,
    "data.test_fraction": _BELOW_ONE,
    "data.split_seed": _SEED,
    "data.folds": _FROM_ZERO,
    "data.fold": _FROM_ZERO,
    "data.sampling_seed": Range(-1, 2**31 - 1),
    "data.regions_per_bag": _COUNT,
    "data.mine_slides": _MINED,
    "data.mine_regions": _MINED,
    "data.mine_every": _COUNT,
    "data.batch_size": _COUNT,
    "data.read_threads": _COUNT,
    "data.workers": _FROM_ZERO,
    "data.prefetch": _COUNT,
    "data.device_prefetch": _COUNT,
    "mesh.data": _FROM_ZERO,
    "mesh.bag": _FROM_ZERO,
    "mesh.model": _COUNT,
    "mesh.fsdp_min_size": _FROM_ZERO,
    "augment.stain": _FROM_ZERO,
    "augment.hed": _FROM_ZERO,
    "augment.stain_swap_prob": _FRACTION,
    "augment.blur": _FROM_ZERO,
    "augment.noise": Range(0, 255),
    "augment.jpeg_min_quality": Range(1, 100),
    "augment.artefacts": _FRACTION,
    "model.imported_features": _FROM_ZERO,
    "model.standardise": _FROM_ZERO,
    "model.feature_dropout": _BELOW_ONE,
    "model.batch_norm_momentum": _FRACTION,
    "model.encode_regions": _COUNT,
    "model.width": _COUNT,
    "model.features": _COUNT,
    "model.attention": _COUNT,
    "model.heads": _COUNT,
    "model.layers": _COUNT,
    "model.clam_instances": _COUNT,
    "model.dropout": _BELOW_ONE,
    "train.steps": _COUNT,
    "train.ensemble_size": _COUNT,
    "train.micro_batches": _COUNT,
    "train.memory_gib": _FROM_ZERO,
    "train.eval_every": _COUNT,
    "train.checkpoint_every": _COUNT,
    "train.checkpoint_minutes": Range(-1),
    "train.mtbf_hours": _FROM_ZERO,
    "train.log_every": _COUNT,
    "train.replica_check_every": _FROM_ZERO,
    "train.stall_timeout_s": _POSITIVE,
    "train.keep_newest": _COUNT,
    # Heartbeats come every half second, and a busy machine delays them.
    "train.peer_timeout_s": Range(2.0),
    "train.keep_best": _COUNT,
    "train.keep_every": _FROM_ZERO,
    "train.save_timeout_s": _POSITIVE,
    "train.focal_gamma": _FROM_ZERO,
    "train.annealing_steps": _COUNT,
    "train.instance_weight": _FROM_ZERO,
    "train.class_balance": _FRACTION,
    "train.contrastive_weight": _FROM_ZERO,
    "train.contrastive_temperature": _POSITIVE,
    "train.label_smoothing": _BELOW_ONE,
    "health.max_gradient_norm": _POSITIVE,
    "health.max_left_out": _COUNT,
    "health.loss_spike_z": _FROM_ZERO,
    "health.max_rollbacks": _FROM_ZERO,
    "health.stuck_reports": _FROM_ZERO,
    "health.recompute_every": _FROM_ZERO,
    "monitor.interval_s": _FROM_ZERO,
    "monitor.metrics_port": Range(0, 65000),
    "tasks.tissue": _FROM_ZERO,
    "tasks.stain": _FROM_ZERO,
    "tasks.artefact": _FROM_ZERO,
    "optimizer.beta1": _BELOW_ONE,
    "optimizer.beta2": _BELOW_ONE,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _FROM_ZERO,
    "optimizer.final_fraction": _FRACTION,
    "optimizer.weight_decay": _FROM_ZERO,
    "optimizer.clip_norm": _POSITIVE,
}

# A test holds these against the code that reads them: this module loads no jax, so that an error is immediate.
CHOICES: dict[str, tuple[str, ...]] = {
    "data.unit": ("slide", "case"),
    "data.fold_by": ("case", "site"),
    "data.region_sampling": ("uniform", "spread"),
    "stain.method": ("none", "macenko", "vahadane", "reinhard"),
    "augment.each": ("slide", "instance"),
    "model.remat": ("full", "dots", "none"),
    "model.mil": (
        *("mean", "max", "abmil", "gated_abmil", "clam_sb", "clam_mb"),
        *("dsmil", "transmil", "hierarchical"),
    ),
    "model.head": ("softmax", "evidential", "evidential_density"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "train.loss": ("cross_entropy", "focal", "evidential", "evidential_digamma"),
    "tasks.weighting": ("fixed", "learned"),
    "optimizer.name": ("adamw", "lamb", "lion", "adam", "sgd"),
    "optimizer.schedule": ("cosine", "linear", "constant", "one_cycle"),
}

# The group of entry points by which installed packages add aggregators: NAME = "MODULE:CLASS".
AGGREGATOR_PLUGINS = "crcjax.aggregators"
# Choices that the caller's code adds.
_ADDED: dict[str, set[str]] = {}

_REQUIRED = ("data.store", "data.cohort")
_NAMES = ("data.classes", "data.magnifications", "tasks.tissue_classes", "train.keep_best_by")


def check_config(config: ConfigDict) -> None:
    """Raises InputError for the first field that is out of range or contradicts another one."""
    for fault in _faults(config):
        raise InputError(f"config.{fault}")


def allow_choice(field: str, choice: str) -> None:
    """Makes a choice of a field valid that crcjax does not have itself."""
    _ADDED.setdefault(field, set()).add(choice)


def _choices(field: str) -> tuple[str, ...]:
    plugins = entry_points(group=AGGREGATOR_PLUGINS).names if field == "model.mil" else set()
    return (*CHOICES[field], *sorted(_ADDED.get(field, set()) | plugins))


def _faults(config: ConfigDict) -> Iterator[str]:
    default = get_config()
    for field, valid in RANGES.items():
        if config[field] not in valid:
            yield f"{field} must be {valid}, got {config[field]}; try {default[field]}"
    for field in CHOICES:
        if config[field] not in (choices := _choices(field)):
            yield f"{field} must be one of {', '.join(choices)}, got {config[field]!r}; try {default[field]}"
    yield from _tuple_faults(config)
    yield from _conflicts(config)
    for field in _REQUIRED:
        if not config[field]:
            yield f"{field} is empty; give --config.{field}=PATH"
    for field in ("data.label", "data.cancer_type"):
        if not config[field].strip():
            yield f"{field} must be a name, got {config[field]!r}; try {default[field]}"


def _tuple_faults(config: ConfigDict) -> Iterator[str]:
    buckets, classes = tuple(config.data.region_buckets), tuple(config.data.classes)
    increasing = all(a < b for a, b in zip((0, *buckets), buckets, strict=False))
    if not buckets or not all(isinstance(length, int) for length in buckets) or not increasing:
        yield f"data.region_buckets must be one or more increasing numbers of regions, got {buckets}; try 64,256"
    if len(classes) < 2:
        yield f"data.classes must name two or more classes, got {classes}; try canonical,immune,stromal"
    for field in _NAMES:
        names = tuple(config[field])
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
            yield f"{field} must be names, each once, got {names}; try NAME,NAME"


def _conflicts(config: ConfigDict) -> Iterator[str]:
    data, model, train = config.data, config.model, config.train
    if config.optimizer.warmup_steps >= train.steps:
        yield (
            f"optimizer.warmup_steps must be below config.train.steps {train.steps}, got {config.optimizer.warmup_steps}; "
            f"try {train.steps // 10}"
        )
    if config.optimizer.schedule == "one_cycle" and not (
        config.optimizer.warmup_steps and config.optimizer.final_fraction
    ):
        yield (
            f"optimizer.warmup_steps and config.optimizer.final_fraction must be above 0 in the one_cycle schedule, got "
            f"{config.optimizer.warmup_steps} and {config.optimizer.final_fraction}; try {max(1, train.steps // 4)} and 0.01"
        )
    if data.val_fraction + data.test_fraction >= 1:
        yield (
            f"data.val_fraction and config.data.test_fraction must sum to less than 1, got {data.val_fraction} and "
            f"{data.test_fraction}; try 0.2 and 0.2"
        )
    if data.folds == 1:
        yield "data.folds must be 0 or at least 2, got 1; try 5"
    if data.fold and data.fold >= data.folds:
        yield f"data.fold must be below config.data.folds {data.folds}, got {data.fold}; try 0"
    if model.features % (4 * model.heads):
        nearest = 4 * model.heads * max(1, round(model.features / (4 * model.heads)))
        yield (
            f"model.features must be a multiple of 4 x config.model.heads {model.heads}, got {model.features}; "
            f"try {nearest}"
        )
    for field in ("standardise", "feature_dropout"):
        if model[field] and not data.features:
            yield f"model.{field} must be 0 without config.data.features, to which it applies, got {model[field]}; try 0"
    evidential = train.loss.startswith("evidential"), model.head.startswith("evidential")
    if evidential[0] != evidential[1]:
        loss = "evidential" if evidential[1] else "cross_entropy"
        yield f"train.loss {train.loss!r} does not go with config.model.head {model.head!r}; try {loss}"
    if train.contrastive_weight and train.micro_batches > 1:
        yield (
            f"train.micro_batches must be 1 with config.train.contrastive_weight, which compares all bags of a step, got "
            f"{train.micro_batches}; set one of the two to 1 or 0"
        )
    yield from _stain_conflicts(config)


def _stain_conflicts(config: ConfigDict) -> Iterator[str]:
    normalised = config.stain.method != "none"
    if config.data.unit == "case" and (normalised or config.augment.stain_swap_prob):
        yield (
            "data.unit must be slide with config.stain.method or config.augment.stain_swap_prob, got case, whose slides "
            "have several stains; try none and 0, and tile with crcjax tile --stain"
        )
    if config.data.features and normalised:
        yield (
            f"stain.method must be none with config.data.features, which were computed from tiles as they are, got "
            f"{config.stain.method!r}; try none"
        )
    if config.augment.stain_swap_prob and normalised and not config.data.features:
        yield (
            f"augment.stain_swap_prob must be 0 with config.stain.method, which gives all slides one stain, got "
            f"{config.augment.stain_swap_prob}; try 0, or set config.stain.method to none"
        )
