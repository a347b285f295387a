"""Config fields that were renamed: their old names are accepted, with a warning, until the next release."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

from ml_collections import ConfigDict

# Old name to new name. Values are unchanged, except those of augment.jpeg (`_converted`).
OLD_NAMES = {
    "data.bags": "data.batch_size",
    "data.regions": "data.regions_per_bag",
    "data.draw_seed": "data.sampling_seed",
    "data.region_draw": "data.region_sampling",
    "train.members": "train.ensemble_size",
    "train.agree_every": "train.replica_check_every",
    "model.batch_norm": "model.batch_norm_momentum",
    "mesh.shard_params": "mesh.fsdp_min_size",
    "augment.exchange": "augment.stain_swap_prob",
    "augment.jpeg": "augment.jpeg_min_quality",
}
# The field within its section is enough: no section has a field with the old name of another section's field.
_NEW_FIELDS = {old.split(".")[1]: new.split(".")[1] for old, new in OLD_NAMES.items()}


class Section(ConfigDict):
    """A ConfigDict that accepts the old names of its fields, with a FutureWarning."""

    def __getitem__(self, key: str) -> Any:
        if self._is_old(key):
            _warn(key, _NEW_FIELDS[key])
            return _converted(key, super().__getitem__(_NEW_FIELDS[key]))
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if self._is_old(key):
            _warn(key, _NEW_FIELDS[key])
            key, value = _NEW_FIELDS[key], _converted(key, value)
        super().__setitem__(key, value)

    def _is_old(self, key: str) -> bool:
        return key not in self._fields and _NEW_FIELDS.get(key) in self._fields


def renamed_argument(argument: str) -> str:
    """Returns a command line's --config.OLD=VALUE with the new name of the field; other arguments are unchanged."""
    name, equals, value = argument.partition("=")
    old = name.lstrip("-").removeprefix("config.")
    if not name.startswith(("--config.", "-config.")) or old not in OLD_NAMES:
        return argument
    _warn(f"--config.{old}", f"--config.{OLD_NAMES[old]}")
    # The parser of the flags refuses what is no number with its own message.
    with suppress(ValueError):
        value = str(_converted(old.split(".")[1], float(value))) if old == "augment.jpeg" else value
    return f"--config.{OLD_NAMES[old]}{equals}{value}"


def renamed_fields(written: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's config.json with the new names of the fields; `written` may be of any version."""
    renamed = {name: dict(value) if isinstance(value, dict) else value for name, value in written.items()}
    for old, new in OLD_NAMES.items():
        section, old_field = old.split(".")
        fields = renamed.get(section)
        if isinstance(fields, dict) and old_field in fields:
            fields[new.split(".")[1]] = _converted(old_field, fields.pop(old_field))
    return renamed


def _converted(old_field: str, value: Any) -> Any:
    """The value of the new field for that of the old one, and the other way round.

    augment.jpeg was the width of the range of qualities below 100: 30 sampled qualities from 70 to 100.
    """
    return 100.0 - value if old_field == "jpeg" else value


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name ends with the next release", FutureWarning, stacklevel=3)
