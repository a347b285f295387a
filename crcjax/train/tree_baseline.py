"""The tree baseline: extremely randomised trees on the smallest and largest value of every stored feature of a bag.

Trees need no tuning. A MIL model that does not beat them has learned nothing that depends on more than single features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict
from sklearn.ensemble import ExtraTreesClassifier

from crcjax.config_check import check_config
from crcjax.data.bags import featured, label_of, open_features, open_stores
from crcjax.data.case_bags import by_unit
from crcjax.data.cohort import Cohort
from crcjax.data.slide_quality import without_refused
from crcjax.errors import InputError
from crcjax.predict.provenance import PredictedBy, row_without_prediction
from crcjax.slides.preprocess.manifest import refused_slides
from crcjax.slides.store.tile_store import TileStore
from crcjax.train.crossvalidate import divided_by_fold, labelled_in_folds
from crcjax.validation.predictions_table import PredictionRow, write_predictions
from crcjax.validation.statistics import entropy

TREES = 500


def crossvalidate_trees(config: ConfigDict, out: Path, *, on_line: Callable[[str], None] = print) -> Path:
    """Predicts the cases of every fold by trees that learned from all other cases of the folds.

    The folds are those of `crossvalidate` with the same config. Trees select nothing, so that they learn from the fold's
    inner validation cases too.

    Args:
      config: the config. Trees read config.seed, config.data and the encoder's name.
      out: the folder of predictions-trees.csv, with one line per labelled slide of the folds.
      on_line: called with each line of progress.

    Returns:
      The path of the table.

    Raises:
      InputError: the folds are not usable, or a slide has no stored features.
      OutputError: `out` cannot be written.
    """
    check_config(config)
    if not config.data.features:
        raise InputError(
            "config.data.features must be True for the tree baseline, which reads stored features, got False; run crcjax "
            "embed or import, and set config.model.encoder to the name of the features"
        )
    config, folds = divided_by_fold(config)
    bags = _bags(config, without_refused(labelled_in_folds(folds), config.data.store)[0])
    refusals, classes = refused_slides(Path(config.data.store)), folds[0].classes
    rows: list[PredictionRow] = []
    by = PredictedBy("extra trees", "", "", lambda name: "", config.data.label)
    for fold, divided in enumerate(folds):
        test = divided.split("test")
        is_test = np.isin(bags.case, test.cases)
        probs = tree_probabilities(
            bags.extremes[~is_test], bags.label[~is_test], bags.extremes, len(classes), config.seed
        )
        for row in test.rows:
            empty = replace(by.row(row.slide_id, row.case_id, row.site, row.scanner, row.label), fold=str(fold))
            if refusal := refusals.get(row.slide_id):
                rows.append(row_without_prediction(empty, refusal["status"], refusal["reason"]))
            else:
                rows.append(_predicted(empty, probs[bags.index_of[row.slide_id]], classes, bags.stores[row.slide_id]))
        on_line(f"fold {fold}: trees of {(~is_test).sum()} bags predict {len(test.rows)} slides")
    path = out / "predictions-trees.csv"
    write_predictions(path, rows, classes)
    on_line(f"{len(rows)} slides, each predicted by trees that never saw its case: {path}")
    return path


def bag_extremes(
    features: Float[np.ndarray, "region slot feature"], mask: Bool[np.ndarray, "region slot"]
) -> Float[np.ndarray, " extreme"]:
    """The smallest values of all features over a bag's valid instances, then the largest ones; zeros for an empty bag."""
    valid = features[mask].astype(np.float32)
    if not len(valid):
        return np.zeros(2 * features.shape[-1], np.float32)
    return np.concatenate([valid.min(axis=0), valid.max(axis=0)])


def tree_probabilities(
    extremes: Float[np.ndarray, "train extreme"],
    label: Int[np.ndarray, " train"],
    others: Float[np.ndarray, "bag extreme"],
    classes: int,
    seed: int,
) -> Float[np.ndarray, "bag class"]:
    """Class probabilities of `others` by extremely randomised trees (Geurts et al. 2006) trained on labelled bags."""
    trees = ExtraTreesClassifier(TREES, random_state=seed, n_jobs=-1).fit(extremes, label)
    probs = np.zeros((len(others), classes))
    # A class without training bags has no column.
    probs[:, trees.classes_] = trees.predict_proba(others)
    return probs


@dataclass(frozen=True)
class _Bags:
    """The extremes, labels and cases of all bags, the bag of each slide by id, and the open store of each slide."""

    extremes: Float[np.ndarray, "bag extreme"]
    label: Int[np.ndarray, " bag"]
    case: np.ndarray
    index_of: dict[str, int]
    stores: dict[str, TileStore]


def _bags(config: ConfigDict, cohort: Cohort) -> _Bags:
    encoder = config.model.encoder
    stores = open_stores(config.data.store, cohort, pixels=False)
    magnifications = config.data.magnifications or featured(stores, encoder)
    for store in stores:
        store.see(magnifications)
    by_bag, bag_stores, readers = by_unit(
        config.data.unit, cohort, stores, open_features(stores, encoder, magnifications)
    )
    cases = [row.case_id for row in by_bag.rows]
    return _Bags(
        np.stack(
            [
                bag_extremes(reader.read(range(len(store.mask))), store.mask)
                for store, reader in zip(bag_stores, readers, strict=True)
            ]
        ),
        np.array([label_of(row, cohort.classes) for row in by_bag.rows]),
        np.array(cases),
        {
            row.slide_id: cases.index(row.case_id) if config.data.unit == "case" else index
            for index, row in enumerate(cohort.rows)
        },
        {store.slide_id: store for store in stores},
    )


def _predicted(
    row: PredictionRow, probs: Float[np.ndarray, " class"], classes: Sequence[str], store: TileStore
) -> PredictionRow:
    predicted = replace(
        row,
        status="ok",
        call=classes[int(probs.argmax())],
        probs=tuple(map(float, probs)),
        entropy=entropy(probs),
        regions=int(store.mask.any(axis=1).sum()),
        synthetic=store.info.synthetic,
    )
    return predicted.with_qc(store.qc)
