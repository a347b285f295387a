"""Training in the Python API."""

from __future__ import annotations

import difflib
import html
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from absl import flags
from ml_collections import ConfigDict

from crcjax.api.display import Picture, Table, heading
from crcjax.audit.commands import audited
from crcjax.config import get_config
from crcjax.config_check import check_config
from crcjax.errors import InputError
from crcjax.main import read_config
from crcjax.slides.jobs.worker_pool import check_main_guard

if TYPE_CHECKING:
    from crcjax.api.stores import Store

AnyPath = str | PathLike[str]


@audited("train")
def train(
    store: Store | AnyPath,
    cohort: AnyPath,
    run: AnyPath,
    *,
    config: ConfigDict | AnyPath | None = None,
    **overrides: Any,
) -> Run:
    """Trains a model, or resumes the run from its newest checkpoint.

    JAX's options and absl's flags are restored afterwards.

    Args:
      store: the tile store.
      cohort: CSV with slide_id, case_id and subtype, and optionally site, scanner and split.
      run: the run's directory, new or to be resumed.
      config: a config file, or a ConfigDict of `crcjax.config.get_config`; by default the default config.
      **overrides: config fields by name, such as steps=200 or batch_size=4. If two sections have a field of that name, add
        the section: data__features=True, model__features=64.

    Returns:
      The trained run.

    Raises:
      InputError: the config, the cohort, the store or the run directory is not usable.
      OutputError: the run directory cannot be written.
    """
    from crcjax.train.loop import train as train_run

    check_main_guard()
    settings = _config(config)
    for name, value in overrides.items():
        _override(settings, name, value)
    settings.data.store, settings.data.cohort = os.fspath(store), os.fspath(cohort)
    check_config(settings)
    with _restored_options():
        train_run(settings, Path(run))
    return Run(run)


class Run:
    """The directory of a training run, with its metrics. Raises InputError if it holds no run."""

    def __init__(self, path: AnyPath):
        self.path = Path(path)
        if not (self.path / "config.json").exists() and not list(self.path.glob("seed-*/config.json")):
            raise InputError(f"{self.path}: holds no training run; give the directory that crcjax train wrote")

    @property
    def members(self) -> list[Path]:
        """The run directories of the ensemble members, or this directory if it is a single run."""
        return sorted(self.path.glob("seed-*")) or [self.path]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config of the training."""
        return json.loads((self.members[0] / "config.json").read_text())

    @property
    def history(self) -> Table:
        """One row per logged step, such as train/loss and val/balanced_accuracy; of an ensemble, those of the first member."""
        path = self.members[0] / "metrics.jsonl"
        rows: dict[int, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            values = json.loads(line)
            rows.setdefault(values["step"], {}).update(values)
        return Table(rows[step] for step in sorted(rows))

    @property
    def metrics(self) -> dict[str, int | float]:
        """The newest value of every metric."""
        newest: dict[str, int | float] = {}
        for row in self.history:
            newest |= row
        return newest

    def plot(self) -> Picture:
        """Plots training loss, validation loss and validation accuracy by step."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, names in ((left, ("train/loss", "val/loss")), (right, ("val/balanced_accuracy",))):
            for name in names:
                points = [(row["step"], row[name]) for row in self.history if name in row]
                axes.plot([step for step, _ in points], [value for _, value in points], ".-", label=name)
            axes.set_xlabel("step")
            axes.legend()
        return Picture.of_figure(figure, f"{self.path.name}: history")

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, step {self.metrics.get('step', 0)})"

    def _repr_html_(self) -> str:
        import base64

        metrics = Table({"metric": name, "newest value": value} for name, value in self.metrics.items())
        picture = base64.b64encode(self.plot().png).decode()
        image = f'<img alt="{html.escape(str(self.path))}" src="data:image/png;base64,{picture}">'
        return heading(f"Run {self.path}") + image + metrics._repr_html_()


def _config(config: ConfigDict | AnyPath | None) -> ConfigDict:
    if config is None:
        return get_config()
    if isinstance(config, ConfigDict):
        return config.copy_and_resolve_references()
    return read_config([f"--config={os.fspath(config)}", "--workdir=unused"])[0]


def _override(config: ConfigDict, name: str, value: Any) -> None:
    """Sets the config field FIELD or SECTION__FIELD. Raises InputError if the name is unknown or ambiguous, or the type wrong."""
    fields = {"seed": (config, "seed")}
    for section_name, section in config.items():
        if isinstance(section, ConfigDict):
            fields |= {f"{section_name}__{field}": (section, field) for field in section}
    matches = [full for full in fields if name in (full, full.split("__")[-1])]
    if not matches:
        short_names = [full.split("__")[-1] for full in fields]
        nearest = difflib.get_close_matches(name, [*fields, *dict.fromkeys(short_names)], 1, 0)[0]
        raise InputError(f"{name}: is not a config field; did you mean {nearest}?")
    if len(matches) > 1:
        raise InputError(f"{name}: several sections have this field; give {' or '.join(matches)}")
    section, field = fields[matches[0]]
    default = section[field]
    if isinstance(default, bool) != isinstance(value, bool):
        raise InputError(f"{name} must be {type(default).__name__}, got {value!r}")
    try:
        section[field] = tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be {type(default).__name__}, got {value!r}") from error


@contextmanager
def _restored_options() -> Iterator[None]:
    """Restores JAX's options and absl's flags on leaving, since a notebook may use them for other code."""
    options, were_parsed = dict(jax.config.values), flags.FLAGS.is_parsed()
    try:
        yield
    finally:
        for name, value in options.items():
            if jax.config.values[name] != value:
                jax.config.update(name, value)
                if name == "jax_compilation_cache_dir":
                    from jax.experimental.compilation_cache import compilation_cache

                    compilation_cache.reset_cache()
        if flags.FLAGS.is_parsed() and not were_parsed:
            flags.FLAGS.unparse_flags()
