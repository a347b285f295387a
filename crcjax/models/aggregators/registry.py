"""Which aggregator `config.model.mil` names: those of crcjax, of installed packages, and of the caller's own code."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from crcjax.config_check import AGGREGATOR_PLUGINS, allow_choice
from crcjax.errors import InputError
from crcjax.models.aggregators.hierarchical import HierarchicalAttentionMIL
from crcjax.models.aggregators.pooling import ABMIL, CLAM, DSMIL, Aggregator, MaxPool, MeanPool
from crcjax.models.aggregators.transmil import TransMIL


def _flat(aggregator: Callable[..., Aggregator], **fixed: Any) -> Callable[..., Aggregator]:
    """Adapts an aggregator that does not distinguish regions and slots to the arguments of one that does."""
    return lambda config, classes, factors, **others: aggregator(config, classes, **fixed, **others)


AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "hierarchical": HierarchicalAttentionMIL,
    "mean": _flat(MeanPool),
    "max": _flat(MaxPool),
    "abmil": _flat(ABMIL, gated=False),
    "gated_abmil": _flat(ABMIL, gated=True),
    "clam_sb": _flat(CLAM, multibranch=False),
    "clam_mb": _flat(CLAM, multibranch=True),
    "dsmil": _flat(DSMIL),
    "transmil": _flat(TransMIL),
}
_OWN = frozenset(AGGREGATORS)


def add_aggregator(name: str, aggregator: Callable[..., Aggregator]) -> None:
    """Makes `config.model.mil=name` build an aggregator of your own, in this process.

    A second call with the same name replaces the first, as a notebook's cell does that is run again. A package does the same
    for every process and command by an entry point of the group `crcjax.aggregators`.

    Args:
      name: the value of `config.model.mil`.
      aggregator: an `nnx.Module` with the signatures `__init__(config, classes, *, dtype, rngs)`, where `config` is
        `config.model`, and `__call__(bag, label=None)`, from `Instances` to `Pooled`.

    Raises:
      InputError: crcjax has an aggregator of that name.
    """
    if name in _OWN:
        raise InputError(f"{name!r} is an aggregator of crcjax; choose another name")
    AGGREGATORS[name] = _flat(aggregator)
    allow_choice("model.mil", name)


def build_aggregator(
    config: ConfigDict, classes: int, factors: tuple[int, ...], *, dtype: DTypeLike, rngs: nnx.Rngs
) -> Aggregator:
    """The aggregator that `config.model` describes.

    Raises:
      InputError: neither crcjax, nor an installed package, nor the caller's code has it.
    """
    if config.mil not in AGGREGATORS:
        for entry in entry_points(group=AGGREGATOR_PLUGINS, name=config.mil):
            add_aggregator(entry.name, entry.load())
    if config.mil not in AGGREGATORS:
        raise InputError(
            f"config.model.mil {config.mil!r}: no such aggregator here; install the package that has it or call "
            f"crcjax.add_aggregator before, or choose one of {', '.join(AGGREGATORS)}"
        )
    return AGGREGATORS[config.mil](config, classes, factors, dtype=dtype, rngs=rngs)
