"""Ours against ABMIL on the same features of painted multi-site cohorts: accuracy, calibration, doubt, and strange slides.

    python tools/mil_painted.py OUT [SEED ...]     # of the other seeds, the rows recorded last stay; OUT is gone on from

For each seed a cohort is painted and an encoder trained on its training cases under mean pooling, which favours neither;
its features, frozen, are what every aggregator then learns from, with one recipe fixed beforehand. The test cases are
looked at once. Strange slides are never trained on: a stain of no site, blur beyond any site's, and tissue without a
tumour (fat, mucin, necrosis), each judged by how well vacuity, or entropy, tells it from the test cases.
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
from crcjax.models.mil import Prediction, build_model, params_of
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
from crcjax.validation.selective import risk_coverage_area
from crcjax.validation.statistics import Estimate, Resamples, auroc, evaluate, percentile_interval

CASES = {"train": 72, "val": 18, "test": 60}
STRANGE = 24  # slides of each kind
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
    """Slides of one kind, padded to one length."""

    features: np.ndarray
    mask: np.ndarray
    position: np.ndarray
    label: np.ndarray


def without_tumour(subtype: str, seed: int, width_um: float, height_um: float) -> np.ndarray:
    """The outline of a slide, filled with fat, mucin and necrosis."""
    kinds = architecture(subtype, seed, width_um, height_um)
    rng = np.random.default_rng([seed, 30])
    patches = rng.choice([Tissue.ADIPOSE, Tissue.MUCIN, Tissue.NECROSIS], (8, 8)).astype(np.uint8)
    return np.where(kinds > 0, cv2.resize(patches, kinds.shape[::-1], interpolation=cv2.INTER_NEAREST), 0).astype(
        np.uint8
    )


def paint_strange(folder: Path, seed: int) -> dict[str, list[Path]]:
    """Slides of each strange kind, of all subtypes in turn."""
    found: dict[str, list[Path]] = {}
    kinds = {
        "unseen stain": (UNSEEN, architecture),
        "blur": (BLURRED, architecture),
        "no tumour": (SITES[0], without_tumour),
    }
    for name, (site, drawn) in kinds.items():
        for i in range(STRANGE):
            spec = SlideSpec(painter.SUBTYPES[i % 3], 1000 * seed + 10_000 + i, site)
            path = folder / f"{name.replace(' ', '-')}-{i:02d}.svs"
            if not path.exists():
                painter._scene.cache_clear()
                with mock.patch.object(painter, "architecture", drawn):
                    paint_slide(path, spec)
            found.setdefault(name, []).append(path)
    return found


def encoded(predictor: Predictor, store: Path, slide_ids: list[str], labels: list[int], regions: int) -> Bags:
    """The encoder's features of slides in a store."""
    member, parts = predictor.members[0], []
    for slide_id in slide_ids:
        held = open_store(store, slide_id)
        features = np.concatenate(list(member.encode(held.read_pixels(range(len(held.mask))), None)))
        pad = ((0, regions - len(features)), (0, 0))
        position = (held.origin / held.region_px).astype(np.float32)
        parts.append((np.pad(features, (*pad, (0, 0))), np.pad(held.mask, pad), np.pad(position, pad)))
    return Bags(*(np.stack(part) for part in zip(*parts, strict=True)), np.array(labels))


def fitted(config: ConfigDict, train: Bags, seed: int) -> tuple[nnx.GraphDef, dict]:
    """An aggregator and head after STEPS steps on the training bags."""
    model = build_model(config.model, 3, seed, TILING.factors)
    graph, params = nnx.graphdef(model), params_of(model)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, STEPS // 10, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))
    arrays = jax.tree.map(jnp.asarray, (train.features, train.mask, train.position, train.label))

    def step(carry: tuple, at: jax.Array) -> tuple[tuple, None]:
        params, moments = carry
        draw, dropout = jax.random.split(jax.random.fold_in(jax.random.key(seed), at))
        chosen = jax.random.choice(draw, len(train.label), (BATCH,), replace=False)
        features, mask, position, label = (part[chosen] for part in arrays)

        def loss(params: dict) -> jax.Array:
            keys = jax.random.split(dropout, len(label))
            found = nnx.merge(graph, params).pool(features, mask, position, keys, label)
            return bag_losses(found, label, at, config.train).mean()

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(STEPS)))(
        (params, optimizer.init(params))
    )
    return graph, params


def predicted(graph: nnx.GraphDef, params: dict, bags: Bags) -> Prediction:
    """What an aggregator says of slides."""
    return jax.jit(lambda *bag: nnx.merge(graph, params).pool(*bag))(bags.features, bags.mask, bags.position)


def doubt_of(found: Prediction) -> np.ndarray:
    """Vacuity or, without it, entropy."""
    probs = np.asarray(found.probs, np.float64)
    entropy = -(probs * np.log(np.maximum(probs, 1e-12))).sum(axis=1)
    return entropy if found.vacuity is None else np.asarray(found.vacuity)


def summaries(bags: Bags) -> np.ndarray:
    """What the density is of."""
    return np.stack([summary(*bag) for bag in zip(bags.features, bags.mask, strict=True)])


def rows_of(seed: int, folder: Path) -> Iterator[dict]:
    """One seed's rows."""
    table = paint_cohort(folder, CASES, seed=seed)
    strange = paint_strange(folder / "strange", seed)
    config = demo_config()
    config.optimizer.learning_rate, config.train.steps = 1e-3, 400
    config.seed, config.data.store, config.data.cohort = seed, str(folder / "store"), str(table)
    config.model.mil, config.data.regions_per_bag = "mean", 4
    cohort = load_cohort(table, config.data.classes)
    jobs = [TileJob(row.slide_id, Path(str(row.path))) for row in cohort.rows]
    assert all(outcome.succeeded for outcome in tile_slides(jobs, folder / "store", TILING))
    # Quality control would refuse the blurred ones, before any model could doubt them.
    lenient = replace(
        TILING, quality=QualityLimits(min_focus=0, min_sharpness=0, min_stain=0, max_stain=99, max_bubble=9)
    )
    others = [TileJob(path.stem, path) for paths in strange.values() for path in paths]
    assert all(outcome.succeeded for outcome in tile_slides(others, folder / "strange_store", lenient))
    train(config, folder / "run")
    predictor = Predictor(folder / "run")
    ids = {split: [row.slide_id for row in cohort.split(split).rows] for split in CASES}
    label_of = {row.slide_id: cohort.classes.index(str(row.subtype)) for row in cohort.rows}
    regions = max(len(open_store(folder / name, slide_id).mask) for name, slide_id in _all(folder))
    learned, validation, test = (
        encoded(predictor, folder / "store", ids[split], [label_of[i] for i in ids[split]], regions) for split in CASES
    )
    odd = {
        name: encoded(predictor, folder / "strange_store", [path.stem for path in paths], [0] * len(paths), regions)
        for name, paths in strange.items()
    }
    summarised = {name: summaries(bags) for name, bags in {"": test, **odd}.items()}
    density = fit_density(summaries(learned), learned.label, summaries(validation))
    known, *others = (density.excess(some) for some in summarised.values())
    yield (
        {"seed": seed, "model": "none: density alone", "head": ""}
        | dict.fromkeys(("balanced accuracy", "ECE (expected if calibrated)", "risk-coverage area"), "")
        | {f"AUROC, {name}": _separation(known, far, seed) for name, far in zip(odd, others, strict=True)}
    )
    for mil, head in MODELS:
        config = demo_config()
        config.optimizer.learning_rate, config.train.steps = 1e-3, 400
        config.model.mil, config.model.head = mil, head
        config.train.loss = "cross_entropy" if head == "softmax" else "evidential"
        graph, params = fitted(config, learned, seed)
        found = {name: predicted(graph, params, bags) for name, bags in {"": test, **odd}.items()}
        by_head = {head: found}
        if head == "evidential":  # learned alike
            by_head[BY_DENSITY] = {name: density.scale_evidence(found[name], some) for name, some in summarised.items()}
        for named, said in by_head.items():
            doubt = {name: doubt_of(one) for name, one in said.items()}
            probs = np.asarray(said[""].probs, np.float64)
            yield (
                {"seed": seed, "model": mil, "head": named}
                | _figures(probs, doubt[""], test.label, cohort.classes, seed)
                | {f"AUROC, {name}": _separation(doubt[""], doubt[name], seed) for name in odd}
            )


def _all(folder: Path) -> Iterator[tuple[str, str]]:
    for name in ("store", "strange_store"):
        for path in (folder / name).glob("*.zarr"):
            yield name, path.stem


def _figures(probs: np.ndarray, doubt: np.ndarray, label: np.ndarray, classes: tuple[str, ...], seed: int) -> dict:
    found = evaluate(label, probs, classes, seed)
    wrong = probs.argmax(axis=1) != label
    resampled = _resampled(len(label), seed, lambda chosen: risk_coverage_area(doubt[chosen], wrong[chosen]))
    area = percentile_interval(risk_coverage_area(doubt, wrong), resampled, len(label))
    return {
        "balanced accuracy": _shown(found["balanced_accuracy"]),
        "ECE (expected if calibrated)": f"{found['ECE']:.3f} ({found['ECE expected if calibrated']:.3f})",
        "risk-coverage area": _shown(area),
    }


def _separation(known: np.ndarray, strange: np.ndarray, seed: int) -> str:
    positive = np.repeat([False, True], [len(known), len(strange)])
    score = np.concatenate([known, strange])
    resampled = _resampled(len(score), seed, lambda chosen: auroc(positive[chosen], score[chosen]))
    return _shown(percentile_interval(auroc(positive, score), resampled, len(score)))


def _resampled(count: int, seed: int, statistic) -> np.ndarray:  # type: ignore[no-untyped-def]
    weights = Resamples.sample(count, seed).weights
    return np.array([statistic(np.repeat(np.arange(count), weight)) for weight in weights])


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.ci_low:.3f} to {estimate.ci_high:.3f})"


def main(out: Path, seeds: list[int]) -> None:
    note = (
        f"Synthetic slides throughout. {CASES['train']} cases to train, {CASES['test']} held out, of {len(SITES)} sites;"
        f" bags of 5x and 10x; {STEPS} steps of {BATCH} bags, no model selection, one recipe for all. Intervals: bootstrap"
        f" over cases. AUROC: {STRANGE} strange slides of each kind, judged without quality control, against the held-out"
        " cases, by vacuity, or with softmax by entropy; or by the density alone, without a model. evidential_density is the model of"
        " the row evidential above it, its evidence weighed by the density; that has its form from seeds 10 and 11, not reported here."
    )
    for seed in seeds:
        rows = [
            *rows_of(seed, out / f"seed{seed}"),
            *(row for row in earlier_rows("mil_painted") if row["seed"] != seed),
        ]
        rows.sort(key=lambda row: row["seed"])
        record("mil_painted", "python tools/mil_painted.py runs/painted 0 1 2", rows, note)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
