"""Cross-validation, ensembles and sweeps: trains many runs from one config and predicts every case by runs that excluded it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from crcjax.config_check import check_config
from crcjax.data.bags import open_stores
from crcjax.data.cohort import Cohort, load_cohort
from crcjax.data.slide_quality import without_refused
from crcjax.data.splits import divide
from crcjax.errors import InputError
from crcjax.predict.predict_store import predict_stored
from crcjax.runs.checkpoint import best_metrics
from crcjax.runs.retention import rank
from crcjax.train.ensemble import train_members
from crcjax.train.loop import train
from crcjax.validation.predictions_table import PredictionRow, write_predictions, write_table

# Fields that decide which cases a run trains on. In a sweep, points with other cases could not be compared.
_FIXED = {"seed", "data.store", "data.cohort", "data.classes", "data.val_fraction", "data.test_fraction"}
_FIXED |= {"data.split_seed", "data.folds", "data.fold", "data.fold_by"}
# A point of a sweep: config fields and their values.
Point = dict[str, object]


@dataclass(frozen=True)
class Trained:
    """A trained run of a cross-validation.

    `step` and `metrics` are those of its best checkpoint on the fold's inner validation cases; without such cases, metrics
    are None.
    """

    fold: int
    point: Point
    seed: int
    path: Path
    step: int
    metrics: dict[str, float] | None


def crossvalidate(
    config: ConfigDict,
    out: Path,
    *,
    seeds: int = 1,
    sweep: Mapping[str, Sequence[str]] | None = None,
    on_line: Callable[[str], None] = print,
) -> None:
    """Trains every fold, seed and point of a sweep, and predicts each case by runs that never saw it.

    In each fold, the point of the sweep is selected whose runs are best on the fold's inner validation cases. Its runs, one
    per seed, form an ensemble that predicts the fold. Existing runs are resumed.

    | written | content |
    |---|---|
    | OUT/fold-F[/sweep-P]/seed-S | the run directories |
    | OUT/runs.csv | one line per run, and whether it was selected |
    | OUT/predictions.csv | one line per labelled slide of the folds, as in `crcjax predict`, with its fold |

    Args:
      config: the config of all runs. With config.train.ensemble_size above 1, that many seeds of a fold train as one
        ensemble.
      out: the folder OUT.
      seeds: runs of each fold and point; their seeds count up from config.seed.
      sweep: the values of each swept config field, as text. All combinations are trained.
      on_line: called with each line of progress.

    Raises:
      InputError: the folds, the swept fields or the store are not usable; nothing is trained.
      OutputError: `out` cannot be written.
    """
    check_config(config)
    config, folds = divided_by_fold(config)
    points = _points(config, sweep or {})
    if len(points) > 1 and not folds[0].split("val").rows:
        raise InputError(
            "config.data.val_fraction must leave validation cases to select a point of the sweep by; raise it"
        )
    tiled, _ = without_refused(labelled_in_folds(folds), config.data.store)
    open_stores(config.data.store, tiled, pixels=not config.data.features)
    runs: list[Trained] = []
    selected: set[Path] = set()
    rows: list[PredictionRow] = []
    for fold, divided in enumerate(folds):
        fold_folder = out / f"fold-{fold}"
        runs_of_points: list[list[Trained]] = []
        for number, point in enumerate(points):
            folder = fold_folder / f"sweep-{number}" if len(points) > 1 else fold_folder
            members = [(config.seed + member, folder / f"seed-{config.seed + member}") for member in range(seeds)]
            runs_of_points.append(_train(_config_of_fold(config, fold, point), fold, point, members))
        best = max(runs_of_points, key=_rank)
        on_line(f"fold {fold}: " + _summary(best))
        test_rows = predict_stored([run.path for run in best], Path(config.data.store), divided.split("test"))
        rows += [replace(row, fold=str(fold)) for row in test_rows]
        runs += [run for point_runs in runs_of_points for run in point_runs]
        selected |= {run.path for run in best}
        write_table(out / "runs.csv", [_run_row(run, run.path in selected, out) for run in runs])
    write_predictions(out / "predictions.csv", rows, folds[0].classes)
    on_line(f"{len(rows)} slides, each predicted by runs that never saw its case: {out / 'predictions.csv'}")


def divided_by_fold(config: ConfigDict) -> tuple[ConfigDict, list[Cohort]]:
    """The config with its number of folds, and the cohort as each fold divides it.

    By site, the number of folds defaults to the number of sites (leave one site out). Raises InputError for folds that are
    not usable.
    """
    config = config.copy_and_resolve_references()
    cohort = load_cohort(config.data.cohort, config.data.classes, config.data.label)
    if config.data.fold_by == "site" and not config.data.folds:
        config.data.folds = len({row.site for row in cohort.rows if row.label and row.site and row.split != "test"})
    if config.data.folds < 2:
        raise InputError(
            f"config.data.folds must be at least 2, got {config.data.folds}; try 5, or set config.data.fold_by to site"
        )
    return config, [divide(cohort, _config_of_fold(config, fold).data) for fold in range(config.data.folds)]


def labelled_in_folds(folds: Sequence[Cohort]) -> Cohort:
    """The labelled slides of a cohort that are in its folds, which `divided_by_fold` returns."""
    return replace(folds[0], rows=tuple(row for row in folds[0].rows if row.split))


def _config_of_fold(config: ConfigDict, fold: int, point: Point | None = None) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.data.fold = fold
    config.update_from_flattened_dict(point or {})
    return config


def _points(config: ConfigDict, sweep: Mapping[str, Sequence[str]]) -> list[Point]:
    """All combinations of the swept values. Raises InputError."""
    values = {name: [_parsed(config, name, text) for text in texts] for name, texts in sweep.items()}
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _parsed(config: ConfigDict, name: str, text: str) -> object:
    default: object = config
    for key in name.split("."):
        default = default.get(key) if isinstance(default, ConfigDict) else None
    if name in _FIXED or not isinstance(default, bool | int | float | str):
        raise InputError(
            f"--sweep {name} must name a number, text or true/false field of the config that does not decide the split; try "
            "--sweep optimizer.learning_rate=1e-3,3e-4"
        )
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise InputError(f"--sweep {name} must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError:
        raise InputError(f"--sweep {name} must be of type {type(default).__name__}, got {text!r}") from None


def _train(config: ConfigDict, fold: int, point: Point, members: Sequence[tuple[int, Path]]) -> list[Trained]:
    if config.train.ensemble_size > 1:
        train_members(config, dict(members))
    else:
        for seed, path in members:
            config.seed = seed
            train(config, path)
    member_metrics = [best_metrics(path) for _, path in members]
    return [
        Trained(fold, point, seed, path, step, metrics)
        for (seed, path), (step, metrics) in zip(members, member_metrics, strict=True)
    ]


def _rank(members: Sequence[Trained]) -> float:
    return float(np.mean([rank(run.metrics) if run.metrics else 0.0 for run in members]))


def _summary(members: Sequence[Trained]) -> str:
    point = ", ".join(f"{name}={value}" for name, value in members[0].point.items())
    accuracies = [run.metrics["balanced_accuracy"] for run in members if run.metrics]
    inner = f"inner validation balanced accuracy {np.mean(accuracies):.3f}" if accuracies else "no inner validation"
    return f"{inner}, {len(members)} run(s)" + (f", chosen {point}" if point else "")


def _run_row(run: Trained, is_selected: bool, out: Path) -> dict[str, str]:
    metrics = {f"val_{name}": f"{value:.6f}" for name, value in (run.metrics or {}).items()}
    swept = {name: str(value) for name, value in run.point.items()}
    cells = {"fold": str(run.fold), **swept, "seed": str(run.seed), "step": str(run.step), **metrics}
    return {**cells, "chosen": "yes" if is_selected else "no", "run": str(run.path.relative_to(out))}
