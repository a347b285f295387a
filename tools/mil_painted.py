"""Hierarchical MIL compared with ABMIL on synthetic cohorts of several sites: accuracy, calibration, uncertainty, OOD slides.

    python tools/mil_painted.py OUT [SEED ...]

The rows of other seeds stay as they were recorded last. A run that was stopped continues with the files in OUT.

For each seed, a cohort is painted and an encoder is trained on its training cases under mean pooling, which favours neither
model. All aggregators then learn from the same frozen features, with one recipe fixed beforehand. The test cases are used once.
Out-of-distribution (OOD) slides are never trained on: a stain of no site, a blur stronger than any site's, and tissue without
tumour (fat, mucin, necrosis). Vacuity, or entropy, is scored by how well it separates them from the test cases.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from record import earlier_rows, record

from crcjax.data.cohort import load_cohort
from crcjax.demo import demo_config
from crcjax.models.heads import BY_DENSITY
from crcjax.models.mil import build_model, params_of
from crcjax.models.prediction import Prediction
from crcjax.predict.feature_density import fit_density, summary
from crcjax.predict.predictor import Predictor
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.synthetic import painter
from crcjax.slides.synthetic.painter import SITES, SlideSpec, paint_cohort, paint_slide
from crcjax.slides.synthetic.tissue_map import Tissue, architecture
from crcjax.slides.tiling.plan import TilingParams
from crcjax.slides.tiling.quality_control import QualityLimits
from crcjax.train.loop import train
from crcjax.train.losses import bag_losses
from crcjax.validation.estimate import Estimate
from crcjax.validation.ranking import auroc_estimate
from crcjax.validation.risk_coverage import selective_risk
from crcjax.validation.statistics import evaluate

CASES = {"train": 72, "val": 18, "test": 60}
# Out-of-distribution slides of each kind.
OOD_SLIDES = 24
MODELS = (
    ("gated_abmil", "softmax"),
    ("hierarchical", "softmax"),
    ("gated_abmil", "evidential"),
    ("hierarchical", "evidential"),
)
TILING = TilingParams(("5x", "10x"))
STEPS, BATCH = 800, 16
UNSEEN = painter.Site("unseen", "unseen", (0.45, 0.60, 0.66), (0.35, 0.70, 0.62), (240, 236, 220), 0.4, 80)
BLURRED = replace(SITES[0], blur_um=2.5)


@dataclass(frozen=True)
class Bags:
    """The bags of several slides, padded to the same number of regions."""

    features: np.ndarray
    mask: np.ndarray
    position: np.ndarray
    label: np.ndarray


def without_tumour(subtype: str, seed: int, width_um: float, height_um: float) -> np.ndarray:
    """The tissue map of a slide, filled with fat, mucin and necrosis."""
    kinds = architecture(subtype, seed, width_um, height_um)
    rng = np.random.default_rng([seed, 30])
    patches = rng.choice([Tissue.ADIPOSE, Tissue.MUCIN, Tissue.NECROSIS], (8, 8)).astype(np.uint8)
    filling = cv2.resize(patches, kinds.shape[::-1], interpolation=cv2.INTER_NEAREST)
    return np.where(kinds > 0, filling, 0).astype(np.uint8)


def paint_ood(folder: Path, seed: int) -> dict[str, list[Path]]:
    """Paints the slides of each out-of-distribution kind, with all subtypes in turn."""
    paths: dict[str, list[Path]] = {}
    kinds = {
        "unseen stain": (UNSEEN, architecture),
        "blur": (BLURRED, architecture),
        "no tumour": (SITES[0], without_tumour),
    }
    for name, (site, tissue_map) in kinds.items():
        for i in range(OOD_SLIDES):
            spec = SlideSpec(painter.SUBTYPES[i % 3], 1000 * seed + 10_000 + i, site)
            path = folder / f"{name.replace(' ', '-')}-{i:02d}.svs"
            if not path.exists():
                painter._scene.cache_clear()
                with mock.patch.object(painter, "architecture", tissue_map):
                    paint_slide(path, spec)
            paths.setdefault(name, []).append(path)
    return paths


def encoded(predictor: Predictor, store: Path, slide_ids: list[str], labels: list[int], regions: int) -> Bags:
    """The encoder's features of slides in a store."""
    member, bags = predictor.members[0], []
    for slide_id in slide_ids:
        tiled = open_store(store, slide_id)
        features = np.concatenate(list(member.encode(tiled.read_pixels(range(len(tiled.mask))), None)))
        pad = ((0, regions - len(features)), (0, 0))
        position = (tiled.origin / tiled.region_px).astype(np.float32)
        bags.append((np.pad(features, (*pad, (0, 0))), np.pad(tiled.mask, pad), np.pad(position, pad)))
    return Bags(*(np.stack(arrays) for arrays in zip(*bags, strict=True)), np.array(labels))


def fitted(config: ConfigDict, train: Bags, seed: int) -> tuple[nnx.GraphDef, dict]:
    """Trains an aggregator and its head for STEPS steps on the training bags."""
    model = build_model(config.model, 3, seed, TILING.factors)
    graph, params = nnx.graphdef(model), params_of(model)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, STEPS // 10, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))
    arrays = jax.tree.map(jnp.asarray, (train.features, train.mask, train.position, train.label))

    def step(carry: tuple, at: jax.Array) -> tuple[tuple, None]:
        params, moments = carry
        batch_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), at))
        chosen = jax.random.choice(batch_key, len(train.label), (BATCH,), replace=False)
        features, mask, position, label = (part[chosen] for part in arrays)

        def loss(params: dict) -> jax.Array:
            keys = jax.random.split(dropout_key, len(label))
            prediction = nnx.merge(graph, params).pool(features, mask, position, keys, label)
            return bag_losses(prediction, label, at, config.train).mean()

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(STEPS)))(
        (params, optimizer.init(params))
    )
    return graph, params


def predicted(graph: nnx.GraphDef, params: dict, bags: Bags) -> Prediction:
    """Predicts bags."""
    return jax.jit(lambda *bag: nnx.merge(graph, params).pool(*bag))(bags.features, bags.mask, bags.position)


def uncertainty_of(prediction: Prediction) -> np.ndarray:
    """Vacuity, or entropy for a head without evidence."""
    probs = np.asarray(prediction.probs, np.float64)
    entropy = -(probs * np.log(np.maximum(probs, 1e-12))).sum(axis=1)
    return entropy if prediction.vacuity is None else np.asarray(prediction.vacuity)


def summaries(bags: Bags) -> np.ndarray:
    """The summaries of bags whose density is fitted."""
    return np.stack([summary(*bag) for bag in zip(bags.features, bags.mask, strict=True)])


def rows_of(seed: int, folder: Path) -> Iterator[dict]:
    """Yields the rows of one seed."""
    table = paint_cohort(folder, CASES, seed=seed)
    ood = paint_ood(folder / "strange", seed)
    config = demo_config()
    config.optimizer.learning_rate, config.train.steps = 1e-3, 400
    config.seed, config.data.store, config.data.cohort = seed, str(folder / "store"), str(table)
    config.model.mil, config.data.regions_per_bag = "mean", 4
    cohort = load_cohort(table, config.data.classes)
    jobs = [TileJob(row.slide_id, Path(str(row.path))) for row in cohort.rows]
    assert all(outcome.succeeded for outcome in tile_slides(jobs, folder / "store", TILING))
    # Quality control would reject the blurred slides before any model could report their uncertainty.
    lenient = replace(
        TILING, quality=QualityLimits(min_focus=0, min_sharpness=0, min_stain=0, max_stain=99, max_bubble=9)
    )
    others = [TileJob(path.stem, path) for paths in ood.values() for path in paths]
    assert all(outcome.succeeded for outcome in tile_slides(others, folder / "strange_store", lenient))
    train(config, folder / "run")
    predictor = Predictor(folder / "run")
    ids = {split: [row.slide_id for row in cohort.split(split).rows] for split in CASES}
    label_of = {row.slide_id: cohort.classes.index(str(row.label)) for row in cohort.rows}
    regions = max(len(open_store(folder / name, slide_id).mask) for name, slide_id in _all(folder))
    learned, validation, test = (
        encoded(predictor, folder / "store", ids[split], [label_of[i] for i in ids[split]], regions) for split in CASES
    )
    ood_bags = {
        name: encoded(predictor, folder / "strange_store", [path.stem for path in paths], [0] * len(paths), regions)
        for name, paths in ood.items()
    }
    bags_of = {"": test, **ood_bags}
    summaries_of = {name: summaries(bags) for name, bags in bags_of.items()}
    density = fit_density(summaries(learned), learned.label, summaries(validation))
    excess = {name: density.excess(values) for name, values in summaries_of.items()}
    yield (
        {"seed": seed, "model": "none: feature density alone", "head": ""}
        | dict.fromkeys(("balanced accuracy", "ECE (expected if calibrated)", "risk-coverage area"), "")
        | {f"AUROC, {name}": _separation(excess[""], excess[name], seed) for name in ood_bags}
    )
    for mil, head in MODELS:
        config = demo_config()
        config.optimizer.learning_rate, config.train.steps = 1e-3, 400
        config.model.mil, config.model.head = mil, head
        config.train.loss = "cross_entropy" if head == "softmax" else "evidential"
        graph, params = fitted(config, learned, seed)
        by_head = {head: {name: predicted(graph, params, bags) for name, bags in bags_of.items()}}
        # The head that scales evidence by density trains in the same way.
        if head == "evidential":
            by_head[BY_DENSITY] = {
                name: density.scale_evidence(prediction, summaries_of[name])
                for name, prediction in by_head[head].items()
            }
        for head_name, predictions in by_head.items():
            uncertainty = {name: uncertainty_of(prediction) for name, prediction in predictions.items()}
            probs = np.asarray(predictions[""].probs, np.float64)
            yield (
                {"seed": seed, "model": mil, "head": head_name}
                | _figures(probs, uncertainty[""], test.label, cohort.classes, seed)
                | {f"AUROC, {name}": _separation(uncertainty[""], uncertainty[name]) for name in ood_bags}
            )


def _all(folder: Path) -> Iterator[tuple[str, str]]:
    for name in ("store", "strange_store"):
        for path in (folder / name).glob("*.zarr"):
            yield name, path.stem


def _figures(
    probs: np.ndarray, uncertainty: np.ndarray, label: np.ndarray, classes: tuple[str, ...], seed: int
) -> dict:
    statistics = evaluate(label, probs, classes, seed)
    wrong = probs.argmax(axis=1) != label
    return {
        "balanced accuracy": _shown(statistics["balanced_accuracy"]),
        "ECE (expected if calibrated)": f"{statistics['ECE'].value:.3f} ({statistics['ECE expected if calibrated']:.3f})",
        "risk-coverage area": _shown(selective_risk(uncertainty, wrong, seed).area),
    }


def _separation(known: np.ndarray, ood: np.ndarray) -> str:
    positive = np.repeat([False, True], [len(known), len(ood)])
    return _shown(auroc_estimate(positive, np.concatenate([known, ood])))


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.ci_low:.3f} to {estimate.ci_high:.3f})"


def main(out: Path, seeds: list[int]) -> None:
    about = (
        "Hierarchical MIL compared with gated ABMIL on synthetic slides: accuracy, calibration and out-of-distribution detection."
        "\n\n"
        f"* All slides are synthetic: {CASES['train']} training cases and {CASES['test']} test cases of {len(SITES)} sites; bags of"
        " 5x and 10x.\n"
        f"* {STEPS} steps of {BATCH} bags; no model selection; one recipe for all models.\n"
        "* Intervals of 95 %: delta method (balanced accuracy), bootstrap over cases (risk-coverage area), DeLong (AUROC).\n"
        f"* AUROC: how well a score separates {OOD_SLIDES} out-of-distribution slides of each kind, without quality control, from the"
        " test cases. The score is vacuity; with softmax, entropy; without a model, the feature density alone.\n"
        "* `evidential_density` is the model of the `evidential` row above, with its evidence scaled by feature density. The form of"
        " that scaling comes from seeds 10 and 11, which are not reported."
    )
    for seed in seeds:
        rows = [
            *rows_of(seed, out / f"seed{seed}"),
            *(row for row in earlier_rows("mil_painted") if row["seed"] != seed),
        ]
        rows.sort(key=lambda row: row["seed"])
        record("mil_painted", "python tools/mil_painted.py runs/painted 0 1 2", rows, about)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
