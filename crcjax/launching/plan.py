"""Estimates memory, micro-batches, time and cost of a training or a prediction before it is submitted, from measured figures.

Every figure was measured on one card, which the plan names; for several GPUs, times are predicted. The figures are those of
docs/benchmarks.md (device_gpu, memory_gpu, collectives), and a test compares them with the records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from crcjax.errors import InputError

CARD = "NVIDIA H100 80GB HBM3"
# Memory that a step may use: XLA and CUDA keep the rest.
_USABLE_GIB = 80 * 0.9
TRAINING_GPUS, PREDICTION_GPUS = (1, 4, 32), (1, 4, 16)


@dataclass(frozen=True)
class TrainingFigure:
    """A measured step of one GPU: its milliseconds and its bags, and the tiles of a bag. Pixels of 256 px a tile, bfloat16."""

    step_ms: float
    bags: int
    regions: int
    slots: int

    @property
    def us_per_tile(self) -> float:
        return 1e3 * self.step_ms / (self.bags * self.regions * self.slots)


TRAINING = {
    "compact": TrainingFigure(98.62808599999084, 32, 64, 5),
    "vit-s16": TrainingFigure(112.45503100001031, 8, 64, 1),
}
# Tiles of 256 px that one GPU encodes in a second; reading them is not included.
TILES_PER_S = {
    "lunit-dino-s16": 15972.02948249626,
    "uni": 2707.605435213279,
    "uni2-h": 1188.3377544719344,
    "imagenet-resnet50": 16157.347317020944,
    "imagenet-swin-t": 7786.463182052224,
}
# Memory of a step of the compact encoder without rematerialisation, measured with 2,048 tiles of 256 px.
MIB_PER_TILE = 15360.573974609375 / 2048
# Milliseconds that a step of configs/epoc.py communicates, predicted for 8 GPUs of one host and for 32 of four.
COMMUNICATION_MS = {8: 0.027412839999999997 + 0.01, 32: 0.54629874 + 0.030000000000000002}


@dataclass(frozen=True)
class TrainingPlan:
    """One row of the training's table: `basis` says whether the step's time was measured, and on which card."""

    gpus: int
    micro_batches: int
    memory_gib: float
    step_ms: float
    hours: float
    cost: float
    basis: str


@dataclass(frozen=True)
class PredictionPlan:
    """One row of the prediction's table."""

    gpus: int
    slides_per_hour: float
    hours: float
    cost: float
    basis: str


def plan_training(model: str, bags: int, regions: int, slots: int, steps: int, price: float, gpus: int) -> TrainingPlan:
    """The plan of a training on `gpus` GPUs, with the bags of a step divided evenly among them.

    Args:
      model: a key of TRAINING.
      bags: bags of a step, over all GPUs.
      regions: regions of a bag.
      slots: tiles of a region.
      steps: steps of the training.
      price: of one GPU for one hour.
      gpus: the number of GPUs.

    Raises:
      InputError: a value cannot be planned.
    """
    figure = TRAINING.get(model)
    if figure is None:
        raise InputError(f"model must be one of {', '.join(TRAINING)}, got {model!r}; others were not measured")
    share = math.ceil(bags / gpus)
    tiles = share * regions * slots
    micro_batches = next(
        (n for n in range(1, share + 1) if _memory_gib(math.ceil(share / n), regions, slots) <= _USABLE_GIB), 0
    )
    if not micro_batches:
        raise InputError(
            f"one bag of {regions} regions with {slots} tiles takes {_memory_gib(1, regions, slots):.0f} GiB, and {CARD} has "
            f"{_USABLE_GIB:.0f} GiB for it; use fewer regions, or config.model.remat"
        )
    communication_ms = 0.0 if gpus == 1 else COMMUNICATION_MS[8 if gpus <= 8 else 32]
    step_ms = figure.us_per_tile * tiles / 1e3 + communication_ms
    is_measured = gpus == 1 and (bags, regions, slots) == (figure.bags, figure.regions, figure.slots)
    hours = steps * step_ms / 3.6e6
    memory_gib = _memory_gib(math.ceil(share / micro_batches), regions, slots)
    return TrainingPlan(gpus, micro_batches, memory_gib, step_ms, hours, hours * gpus * price, _basis(is_measured))


def plan_prediction(encoder: str, slides: int, tiles: int, price: float, gpus: int) -> PredictionPlan:
    """The plan of a prediction of `slides` slides with `tiles` tiles each; GPUs share nothing. Raises InputError."""
    if encoder not in TILES_PER_S:
        raise InputError(f"encoder must be one of {', '.join(TILES_PER_S)}, got {encoder!r}; others were not measured")
    slides_per_hour = 3600 * TILES_PER_S[encoder] * gpus / tiles
    hours = slides / slides_per_hour
    return PredictionPlan(gpus, slides_per_hour, hours, hours * gpus * price, _basis(gpus == 1))


def _memory_gib(bags: int, regions: int, slots: int) -> float:
    return bags * regions * slots * MIB_PER_TILE / 1024


def _basis(is_measured: bool) -> str:
    return f"measured on one {CARD}" if is_measured else f"predicted from one {CARD}"
