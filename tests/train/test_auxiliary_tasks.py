"""Auxiliary tasks of every instance."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import metrics

from crcjax.config import get_config
from crcjax.data.augment import Augmentation, ColourChange
from crcjax.data.bags import Bag
from crcjax.data.cohort import load_cohort
from crcjax.data.corruptions import ARTEFACTS, Artefacts
from crcjax.errors import InputError
from crcjax.models.mil import build_model, params_of
from crcjax.parallel.mesh import device_mesh
from crcjax.predict.predictor import Predictor
from crcjax.runs.checkpoint import restore_params
from crcjax.slides.stain.methods import StainMatrix
from crcjax.slides.wsi.slide import open_slide
from crcjax.train.auxiliary_tasks import Tasks, add_heads, open_tasks
from crcjax.train.loop import train
from crcjax.train.metrics import compute_task_metrics, task_metrics
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import build_step, init_state

TISSUES = ("glands", "cribriform", "stroma")
PAINTED = ("cribriform", "stroma", "lymphoid", "glands", "desmoplastic")


def _bag(seed: int = 0) -> Bag:
    """Six bags of four regions of features with some padding and unknown labels, and the stain of each slide."""
    rng = np.random.default_rng(seed)
    shape = (6, 4, 2)
    mask, region = rng.random(shape) < 0.7, np.tile(np.arange(4, dtype=np.int32), (6, 1))
    mask[:, -1], region[:, -1] = False, -1
    labels = np.stack([rng.integers(-1, 3, shape), rng.integers(-1, 2, shape)], axis=-1).astype(np.int8)
    vectors = rng.uniform(0.2, 1.0, (6, 2, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    light, reliable = np.full((6, 3), 240, np.float32), np.arange(6) != 2
    stain = StainMatrix(vectors, rng.uniform(0.5, 2.0, (6, 2)).astype(np.float32), light, reliable)
    tiles = rng.normal(size=(*shape, 6)).astype(np.float32)
    weight = rng.uniform(0.5, 1.5, 6).astype(np.float32)
    label, position = np.arange(6, dtype=np.int32) % 3, np.zeros((6, 4, 2), np.float32)
    return Bag(tiles, mask, position, label, weight, region, np.arange(6, dtype=np.int32), stain, labels)


@pytest.fixture
def config():
    """All tasks on features: the step treats them alike, and compiles in a fraction of the time."""
    config = get_config()
    config.data.features, config.model.encoder, config.model.imported_features = True, "theirs", 6
    config.model.features, config.model.attention = 16, 8
    config.optimizer.warmup_steps, config.train.steps, config.optimizer.learning_rate = 2, 60, 1e-2
    config.augment.artefacts, config.augment.stain, config.model.dropout = 0.3, 0.0, 0.0
    config.tasks.tissue, config.tasks.stain, config.tasks.artefact = 0.5, 0.7, 0.9
    config.tasks.labels, config.tasks.tissue_classes = "labels", TISSUES
    return config


def _tasks(config) -> Tasks:
    bag = _bag()
    stains = [jax.tree.map(lambda leaf, i=i: leaf[i], bag.stain) for i in range(6)]
    tasks = open_tasks(config, list(bag.tile_labels), stains)
    assert tasks is not None
    return tasks


def _steps(config, count: int, bag: Bag):
    mesh, tasks, model = device_mesh(), _tasks(config), build_model(config.model, 3, 0, (1, 1))
    add_heads(model, tasks, 0)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    step, state = build_step(model, optimizer, config, mesh, tasks=tasks), init_state(model, optimizer, config, mesh)
    actual = []
    for _ in range(count):
        state, metrics = step(state, bag)
        actual.append({name: float(value) for name, value in metrics.items()})
    return state, actual


def test_losses_equal_plain_formulas_over_labelled_instances_alone(config) -> None:
    tasks, bag, rng = _tasks(config), _bag(), np.random.default_rng(1)
    shape = bag.mask.shape
    kind = rng.integers(0, 3, shape).astype(np.int32) * (rng.random(shape) < 0.5)
    kind = kind.astype(np.int32)
    density = (np.eye(3) + rng.normal(0, 0.1, (*shape, 3, 3))).astype(np.float32)
    light = np.full((6, 1, 1, 3), 240, np.float32)
    change = ColourChange(jnp.asarray(density), jnp.asarray(light), jnp.broadcast_to(light, (*shape, 3)))
    shapes = jnp.zeros((*shape, 6)), jnp.zeros((*shape, 6, 3))
    augmentation = Augmentation(colour=change, artefacts=Artefacts(jnp.asarray(kind), *shapes))
    predicted = {name: rng.normal(size=(*shape, size)).astype(np.float32) for name, size in tasks.outputs.items()}
    vectors, strength = np.asarray(bag.stain.vectors), np.asarray(bag.stain.concentration)
    of_slides = np.concatenate([vectors.reshape(6, 6), strength], axis=1)[np.asarray(bag.stain.reliable)]
    mean, deviation = of_slides.mean(axis=0), np.maximum(of_slides.std(axis=0), 0.01)
    terms: dict[str, list[float]] = {"tissue": [], "stain": [], "artefact": []}
    for place in np.argwhere(bag.mask):
        i, at = place[0], tuple(place)
        tissue, annotated = bag.tile_labels[at].tolist()
        if tissue >= 0:
            terms["tissue"].append(np.log(np.exp(predicted["tissue"][at]).sum()) - predicted["tissue"][at][tissue])
        if bag.stain.reliable[i] and not kind[at]:
            changed_vectors = vectors[i] @ density[at]
            length = np.linalg.norm(changed_vectors, axis=1)
            numbers = np.concatenate([(changed_vectors / length[:, None]).ravel(), strength[i] * length])
            terms["stain"].append(np.mean((predicted["stain"][at] - (numbers - mean) / deviation) ** 2))
        artefact = annotated if not kind[at] else kind[at] if annotated == 0 else -1
        if artefact >= 0:
            terms["artefact"].append(
                np.log(np.exp(predicted["artefact"][at]).sum()) - predicted["artefact"][at][artefact]
            )
    labelled = tasks.labelled_instances(bag, augmentation)
    assert {name: int(value) for name, value in labelled.items()} == {name: len(of) for name, of in terms.items()}
    assert all(0 < len(of) < bag.mask.sum() for of in terms.values())
    actual = tasks.losses({name: jnp.asarray(value) for name, value in predicted.items()}, bag, augmentation, labelled)
    for name, of in terms.items():
        np.testing.assert_allclose(actual[f"{name}_loss"], np.mean(of), rtol=1e-4)


def test_the_step_minimises_the_weighted_sum_and_reports_each_loss(config) -> None:
    tasks = _tasks(config)
    losses = {
        name: jnp.float32(i + 1.0) for i, name in enumerate(("loss", "tissue_loss", "stain_loss", "artefact_loss"))
    }
    assert float(tasks.objective({}, losses, {}, 1.0)) == pytest.approx(1 + 0.5 * 2 + 0.7 * 3 + 0.9 * 4)
    state, actual = _steps(config, 60, _bag())
    for name in losses:
        assert actual[-1][name] < actual[0][name]
    assert "log_variance" not in state.params["tasks"]


def test_padding_and_masked_tiles_have_no_effect(config) -> None:
    bag, other = _bag(), _bag(1)
    hidden = ~bag.mask
    tiles = np.where(hidden[..., None], other.tiles, bag.tiles)
    labels = np.where(hidden[..., None], 2 - np.maximum(bag.tile_labels, 0), bag.tile_labels).astype(np.int8)
    (one, of_one), (two, of_two) = (
        _steps(config, 2, of) for of in (bag, replace(bag, tiles=tiles, tile_labels=labels))
    )
    assert not np.allclose(tiles, bag.tiles)
    for a, b in zip(of_one, of_two, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weighting", ["fixed", "learned"])
def test_micro_batches_give_the_step_of_the_whole_batch(config, weighting: str) -> None:
    config.tasks.weighting = weighting
    whole, of_whole = _steps(config, 3, _bag())
    config.train.micro_batches = 3
    accumulated, of_accumulated = _steps(config, 3, _bag())
    for one, other in zip(of_whole, of_accumulated, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(accumulated.params), strict=True):
        assert np.linalg.norm(one - other) <= 2e-5 * np.linalg.norm(one)


def test_learned_weights_converge_to_the_inverse_of_twice_the_loss(config) -> None:
    """At the minimum over s, exp(-s) w L + s / 2 has the weight 1 / (2 L); half a squared error has the same weight."""
    config.tasks.weighting = "learned"
    tasks = _tasks(config)
    params = {"tasks": {"log_variance": jnp.zeros(4)}}
    losses = {"loss": jnp.float32(0.8), "tissue_loss": jnp.float32(0.1), "stain_loss": jnp.float32(3.0)}
    losses |= {"artefact_loss": jnp.float32(0.0)}
    labelled = {"tissue": jnp.float32(9), "stain": jnp.float32(9), "artefact": jnp.float32(0)}
    start = {name: float(value) for name, value in tasks.learned_weights(params).items()}
    expected = {"subtype_weight": 1.0, "tissue_weight": 0.5, "stain_weight": 0.35, "artefact_weight": 0.9}
    assert start == pytest.approx(expected)
    gradient = jax.jit(jax.grad(lambda params: tasks.objective(params, losses, labelled, 1.0)))
    for _ in range(2000):
        params = jax.tree.map(lambda value, slope: value - 3e-3 * slope, params, gradient(params))
    actual = {name: float(value) for name, value in tasks.learned_weights(params).items()}
    assert actual["subtype_weight"] == pytest.approx(1 / (2 * 0.8), rel=1e-3)
    assert actual["tissue_weight"] == pytest.approx(1 / (2 * 0.1), rel=1e-3)
    assert actual["stain_weight"] == pytest.approx(1 / (2 * 3.0), rel=1e-3)
    assert actual["artefact_weight"] == start["artefact_weight"]  # nothing was known of it


def test_learned_weights_stay_bounded_and_are_not_stuck_there(config) -> None:
    config.tasks.weighting = "learned"
    tasks = _tasks(config)
    far = {"tasks": {"log_variance": jnp.float32([1.0, -1.0, 1.0, -1.0])}}
    weights = [float(value) for value in tasks.learned_weights(far).values()]
    assert max(weights) < 55
    assert min(weights) > 0.5 * 0.7 / 55
    losses = {name: jnp.float32(1.0) for name in ("loss", "tissue_loss", "stain_loss", "artefact_loss")}
    labelled = dict.fromkeys(("tissue", "stain", "artefact"), jnp.float32(1))
    slope = jax.grad(lambda params: tasks.objective(params, losses, labelled, 1.0))(far)["tasks"]["log_variance"]
    assert (np.sign(slope) == [1, -1, 1, -1]).all()


def test_learned_weights_change_in_training_and_are_reported(config) -> None:
    config.tasks.weighting = "learned"
    config.tasks.tissue, config.tasks.stain, config.tasks.artefact = 5.0, 0.05, 5.0  # too much, too little, too much
    state, actual = _steps(config, 60, _bag())
    change = {
        name: actual[-1][f"{name}_weight"] / actual[0][f"{name}_weight"] for name in ("tissue", "stain", "artefact")
    }
    assert change["tissue"] < 0.8
    assert change["stain"] > 1.25
    assert change["artefact"] < 0.8
    assert state.params["tasks"]["log_variance"].shape == (4,)


def test_without_tasks_the_model_has_no_heads_and_with_them_the_rest_of_it_is_the_same(config) -> None:
    plain, model = (build_model(config.model, 3, 0) for _ in range(2))
    assert "tasks" not in params_of(plain)
    add_heads(model, _tasks(config), 0)
    with_heads = params_of(model)
    assert set(with_heads.pop("tasks")["heads"]) == {"tissue", "stain", "artefact"}
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params_of(plain), with_heads)
    assert all(jax.tree.leaves(same))
    config.tasks.tissue = config.tasks.stain = config.tasks.artefact = 0.0
    assert open_tasks(config, [], []) is None


def test_metrics_of_tasks_are_of_labelled_instances_alone_and_add_up_over_bags() -> None:
    classes, tissue = jnp.eye(4)[jnp.array([0, 1, 1, 2, 2, 0])], jnp.array([0, 0, 1, -1, 2, 0])
    numbers, stain = jnp.array([[1.0, 3.0], [9.0, 9.0]] * 3), jnp.array([[2.0, 1.0], [0.0, 0.0]] * 3)
    is_labelled = {"tissue": jnp.array([True, True, True, False, True, True]), "stain": jnp.array([True, False] * 3)}

    def of_bag(at: np.ndarray) -> metrics.Collection:
        predicted = {"tissue": classes[at], "stain": numbers[at], "artefact": classes[at]}
        targets = {"tissue": (tissue[at], is_labelled["tissue"][at]), "stain": (stain[at], is_labelled["stain"][at])}
        return task_metrics(predicted, targets | {"artefact": (tissue[at], jnp.zeros(len(at), bool))})

    first, second = (of_bag(at) for at in np.split(np.arange(6), [2]))
    for collection in (of_bag(np.arange(6)), first.merge(second)):
        assert compute_task_metrics(collection) == pytest.approx(
            {
                # Class 0 is predicted for two of three instances, classes 1 and 2 always; no instance is of class 3.
                "tissue_balanced_accuracy": (2 / 3 + 1 + 1) / 3,
                "tissue_constant": 1 / 3,
                "stain_error": (1 + 4) / 2,
                "stain_constant": (4 + 1) / 2,
            }
        )


def _set(config, changes: dict) -> None:
    with config.unlocked():
        config.update_from_flattened_dict(changes)


REFUSED = {
    r"config\.tasks\.weighting must be one of fixed, learned, got 'some'": {"tasks.weighting": "some"},
    r"config\.tasks\.tissue must be at least 0, got -1\.0": {"tasks.tissue": -1.0},
    r"config\.tasks\.stain needs pixels, which config\.data\.features": {"tasks.stain": 1.0, "data.features": True},
    r"config\.tasks\.artefact needs pixels": {"tasks.artefact": 1.0, "data.features": True},
    r"config\.tasks\.stain must be 0 with config\.data\.unit case": {"tasks.stain": 1.0, "data.unit": "case"},
    r"config\.tasks\.stain must be 0 with config\.stain\.method": {"tasks.stain": 1.0, "stain.method": "macenko"},
    r"config\.tasks\.tissue needs labels": {"tasks.tissue": 1.0},
    r"config\.tasks\.tissue_classes must be two or more different names .*, got \(\)": {
        "tasks.tissue": 1.0,
        "tasks.labels": "LABELS",
    },
    r"slides has no training tile of class bone; correct": {
        "tasks.tissue": 1.0,
        "tasks.labels": "LABELS",
        "tasks.tissue_classes": ("stroma", "bone"),
    },
    r"config\.train\.ensemble_size 2: an ensemble has no auxiliary tasks": {
        "train.ensemble_size": 2,
        "data.features": True,
        "tasks.tissue": 1.0,
    },
    r"config\.tasks\.artefact needs artefacts": {"tasks.artefact": 1.0},
    r"config\.tasks\.artefact: .*slides has no training tile with pen": {
        "tasks.artefact": 1.0,
        "tasks.labels": "LABELS",
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_invalid_tasks_are_refused_by_their_field(message: str, small_config, painted: Path, tmp_path: Path) -> None:
    changes = {
        name: str(painted / "slides") if value == "LABELS" else value for name, value in REFUSED[message].items()
    }
    _set(small_config, changes)
    with pytest.raises(InputError, match=message):
        train(small_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tissue_is_predicted_for_the_tiles_of_cases(small_config, painted: Path, tmp_path: Path) -> None:
    small_config.data.unit, small_config.tasks.tissue = "case", 1.0
    small_config.tasks.labels, small_config.tasks.tissue_classes = str(painted / "slides"), PAINTED
    train(small_config, tmp_path)
    actual = [line for line in _metrics(tmp_path) if "val/tissue_balanced_accuracy" in line]
    assert len(actual) == 2
    assert all(line["val/tissue_constant"] <= 0.5 for line in actual)


def _metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_each_task_is_learned_and_the_run_predicts_slides(small_config, painted: Path, tmp_path: Path) -> None:
    """On the nine slides outside training, the metrics exceed the best constant's; chance is 1/5 and 1/6."""
    with open(painted / "cohort.csv", newline="") as file:
        rows = [{**row, "path": str(painted / row["path"])} for row in csv.DictReader(file)]
    with open(tmp_path / "cohort.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows([row | {"split": "train" if row["split"] == "train" else "val"} for row in rows])
    changes = {
        "data.cohort": str(tmp_path / "cohort.csv"),
        "data.batch_size": 8,
        "data.regions_per_bag": 8,
        "model.features": 32,
    }
    changes |= {
        "augment.artefacts": 0.3,
        "augment.stain": 0.0,
        "augment.stain_swap_prob": 0.5,
        "augment.each": "instance",
    }
    changes |= {"tasks.tissue": 1.0, "tasks.stain": 1.0, "tasks.artefact": 1.0, "tasks.labels": str(painted / "slides")}
    changes |= {"tasks.tissue_classes": PAINTED, "optimizer.learning_rate": 5e-3, "optimizer.warmup_steps": 10}
    changes |= {"train.steps": 300, "train.eval_every": 300, "train.checkpoint_every": 300, "train.log_every": 100}
    _set(small_config, changes)
    run = tmp_path / "run"
    train(small_config, run)
    actual = next(line for line in _metrics(run) if "val/loss" in line)
    print({name: round(value, 3) for name, value in actual.items() if name.startswith("val/")})
    assert actual["val/tissue_balanced_accuracy"] > 1.8 * actual["val/tissue_constant"]
    assert actual["val/artefact_balanced_accuracy"] > 1.8 * actual["val/artefact_constant"]
    assert actual["val/stain_error"] < 0.9 * actual["val/stain_constant"]

    model = build_model(small_config.model, 3, 0)
    add_heads(
        model, Tasks({}, {"tissue": 5, "stain": 8, "artefact": len(ARTEFACTS)}, False, *np.zeros((2, 8), np.float32)), 0
    )
    assert restore_params(run, model)[0]["tasks"]["heads"]["stain"]["kernel"].shape == (32, 8)
    with open_slide(Path(str(load_cohort(painted / "cohort.csv", None).rows[0].path))) as slide:
        assert Predictor(run).predict(slide, 1).probs.sum() == pytest.approx(1.0, abs=1e-5)
