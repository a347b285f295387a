"""Cross-validation, ensembles and sweeps: many runs from one config, and one table of predictions of unseen cases."""

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
from crcjax.data.splits import divide
from crcjax.errors import InputError
from crcjax.predict.predict_store import predict_stored
from crcjax.runs.checkpoint import best_metrics, rank
from crcjax.train.ensemble import train_members
from crcjax.train.loop import train
from crcjax.validation.predictions_table import PredictionRow, write_predictions, write_table

# What decides which cases a run sees: swept, it would be chosen by other cases.
_FIXED = {"seed", "data.store", "data.cohort", "data.classes", "data.val_fraction", "data.test_fraction"}
_FIXED |= {"data.split_seed", "data.folds", "data.fold", "data.fold_by"}
Point = dict[str, object]  # of a sweep: config fields and their values


@dataclass(frozen=True)
class Trained:
    """One run of a cross-validation; `metrics` are those of its best checkpoint on its inner validation cases."""

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
    """Trains every fold, seed and point of the sweep, and predicts each case by runs that never saw it.

    With config.train.ensemble_size above 1, that many seeds of a fold are trained together. The runs are written to
    OUT/fold-F[/sweep-P]/seed-S and are resumed when the command is given again. In each fold, the point of the sweep is
    selected whose runs are best on the fold's inner validation cases; its runs, one per seed, form an ensemble. Writes
    OUT/runs.csv, one line per run, and OUT/predictions.csv, with one line per labelled slide of the folds as in
    `crcjax predict`, and its fold. Raises InputError before training if the folds, the swept fields or the store are not
    usable, and OutputError if `out` cannot be written.
    """
    check_config(config)
    config, cohort = _with_folds(config), load_cohort(config.data.cohort, config.data.classes)
    points = _points(config, sweep or {})
    if config.data.folds < 2:
        raise InputError(
            f"config.data.folds must be at least 2, got {config.data.folds}; try 5, or set config.data.fold_by to site"
        )
    for fold in range(config.data.folds):
        divided = divide(cohort, _of_fold(config, fold).data)
    if len(points) > 1 and not divided.split("val").rows:
        raise InputError(
            "config.data.val_fraction must leave validation cases to select a point of the sweep by; raise it"
        )
    labelled = [row for row in divided.rows if row.split]
    open_stores(config.data.store, Cohort(tuple(labelled), cohort.classes), pixels=not config.data.features)
    runs: list[Trained] = []
    selected: set[Path] = set()
    rows: list[PredictionRow] = []
    for fold in range(config.data.folds):
        folder = out / f"fold-{fold}"
        trained: list[list[Trained]] = []
        for number, point in enumerate(points):
            place = folder / f"sweep-{number}" if len(points) > 1 else folder
            members = [(config.seed + member, place / f"seed-{config.seed + member}") for member in range(seeds)]
            trained.append(_train(_of_fold(config, fold, point), fold, point, members))
        chosen = max(trained, key=_rank)
        on_line(f"fold {fold}: " + _said(chosen))
        test = divide(cohort, _of_fold(config, fold).data).split("test")
        test_rows = predict_stored([run.path for run in chosen], Path(config.data.store), test)
        rows += [replace(row, fold=str(fold)) for row in test_rows]
        runs += [run for members in trained for run in members]
        selected |= {run.path for run in chosen}
        write_table(out / "runs.csv", [_run_row(run, run.path in selected, out) for run in runs])
    write_predictions(out / "predictions.csv", rows, cohort.classes)
    on_line(f"{len(rows)} slides, each predicted by runs that never saw its case: {out / 'predictions.csv'}")


def _with_folds(config: ConfigDict) -> ConfigDict:
    """By site without a number of folds, every site is one: leave one site out."""
    config = config.copy_and_resolve_references()
    if config.data.fold_by == "site" and not config.data.folds:
        cohort = load_cohort(config.data.cohort, config.data.classes)
        config.data.folds = len({row.site for row in cohort.rows if row.subtype and row.site and row.split != "test"})
    return config


def _of_fold(config: ConfigDict, fold: int, point: Point | None = None) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.data.fold = fold
    config.update_from_flattened_dict(point or {})
    return config


def _points(config: ConfigDict, sweep: Mapping[str, Sequence[str]]) -> list[Point]:
    """All combinations of the values of the fields. Raises InputError."""
    values = {name: [_parsed(config, name, text) for text in texts] for name, texts in sweep.items()}
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _parsed(config: ConfigDict, name: str, text: str) -> object:
    default: object = config
    for part in name.split("."):
        default = default.get(part) if isinstance(default, ConfigDict) else None
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


def _said(members: Sequence[Trained]) -> str:
    point = ", ".join(f"{name}={value}" for name, value in members[0].point.items())
    accuracies = [run.metrics["balanced_accuracy"] for run in members if run.metrics]
    inner = f"inner validation balanced accuracy {np.mean(accuracies):.3f}" if accuracies else "no inner validation"
    return f"{inner}, {len(members)} run(s)" + (f", chosen {point}" if point else "")


def _run_row(run: Trained, chosen: bool, out: Path) -> dict[str, str]:
    metrics = {f"val_{name}": f"{value:.6f}" for name, value in (run.metrics or {}).items()}
    swept = {name: str(value) for name, value in run.point.items()}
    of = {"fold": str(run.fold), **swept, "seed": str(run.seed), "step": str(run.step), **metrics}
    return {**of, "chosen": "yes" if chosen else "no", "run": str(run.path.relative_to(out))}
