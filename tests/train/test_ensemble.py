"""Ensembles: runs that differ in their seed, trained by one vmapped step."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError, StoppedError
from crcjax.models.encoders import registry as encoders
from crcjax.models.encoders.convnets import ResNet
from crcjax.models.encoders.registry import PretrainedEncoder
from crcjax.models.encoders.torch_weights import torch_tensors
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.parallel.process_group import ProcessGroup
from crcjax.predict.embed import embed_store
from crcjax.predict.predictor import Predictor
from crcjax.runs.checkpoint import Checkpointer, newest_step
from crcjax.runs.pretrained_weights import is_frozen
from crcjax.runs.run_directory import open_run
from crcjax.runs.train_state import TrainState
from crcjax.slides.store.features import write_features
from crcjax.slides.store.tile_store import open_store, tiled_slides
from crcjax.slides.wsi.slide import open_slide
from crcjax.train.crossvalidate import crossvalidate
from crcjax.train.ensemble import ensembles_of_runs, train_members
from crcjax.train.loop import train
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import init_state

SMALL = PretrainedEncoder(partial(ResNet, depths=(1,), width=8), 32, 1.0, "", resize_px=64, size_px=48)


@pytest.fixture(scope="module")
def store(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the synthetic store with imported features of six numbers, whose weights are unknown."""
    folder = tmp_path_factory.mktemp("store") / "store"
    shutil.copytree(painted / "store", folder)
    rng = np.random.default_rng(0)
    about = {"encoder": "theirs", "weights_sha256": None, "mpp": [1.0], "dtype": "float16", "width": 6, "imported": {}}
    for slide_id in tiled_slides(str(folder)):
        values = rng.standard_normal((len(open_store(str(folder), slide_id).mask), 1, 6)).astype(np.float16)
        write_features(folder, slide_id, "theirs", values, about | {"magnifications": ["10x"]})
    return folder


@pytest.fixture
def config(small_config, store: Path):
    """A config of an ensemble of two members, with standardised features and dropout."""
    small_config.data.store, small_config.data.features, small_config.model.encoder = str(store), True, "theirs"
    small_config.model.standardise, small_config.model.feature_dropout = 2.0, 0.25
    small_config.train.ensemble_size, small_config.seed = 2, 5
    small_config.train.steps = small_config.train.eval_every = 4
    small_config.train.checkpoint_every = 3
    return small_config


def _state(run: Path) -> TrainState:
    """The state that a run resumes from."""
    config = open_run(run).config
    model = build_model(config.model, 3, config.seed)
    optimizer = build_optimizer(config.optimizer, config.train.steps, partial(is_frozen, True))
    checkpoints = Checkpointer(run)
    state = checkpoints.restore(init_state(model, optimizer, config, device_mesh(config)))
    checkpoints.close()
    return state


def _assert_close(one: TrainState, other: TrainState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _steps(run: Path, name: str) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if name in line]


def test_ensemble_members_are_ordinary_runs_and_equal_runs_trained_alone(
    config, painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(encoders.PRETRAINED, "small", SMALL)
    shutil.copytree(painted / "store", tmp_path / "store")
    config.data.store, config.model.encoder = str(tmp_path / "store"), "small"
    config.model.weights = str(tmp_path / "small.safetensors")
    save_file(torch_tensors(SMALL.build(rngs=nnx.Rngs(3))), config.model.weights)
    embed_store(tmp_path / "store", "small", Path(config.model.weights))
    train(config, tmp_path / "together")
    states = {}
    for seed in (5, 6):
        together, alone = tmp_path / "together" / f"seed-{seed}", tmp_path / f"alone-{seed}"
        own = open_run(together).config
        assert (own.seed, own.data.sampling_seed, own.train.ensemble_size) == (seed, 5, 1)
        train(own, alone)
        states[seed] = _state(together)
        assert int(states[seed].step) == config.train.steps
        _assert_close(states[seed], _state(alone))
        assert [_steps(together, name) for name in ("train/loss", "val/loss")] == [[1, 2, 3, 4], [4]]
    kernels = [np.asarray(state.params["encoder"]["project"]["kernel"]) for state in states.values()]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01  # members do differ
    with open_slide(Path(str(load_cohort(painted / "cohort.csv", None).rows[0].path))) as slide:
        probs = [
            Predictor(*(tmp_path / name.format(seed) for seed in states)).predict(slide, 1).probs
            for name in ("together/seed-{}", "alone-{}")
        ]
    np.testing.assert_allclose(*probs, rtol=1e-4)


ON_FOUR = """
from functools import partial
import jax, numpy as np
from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.models.mil import build_model
from crcjax.train.ensemble import Ensemble
from crcjax.parallel.mesh import device_mesh
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import build_step, init_state

config = get_config()
config.data.features, config.data.batch_size, config.data.regions_per_bag = True, 4, 8
config.model.encoder, config.model.imported_features, config.model.mil = "theirs", 6, "gated_abmil"
config.model.features, config.model.attention = 16, 8
config.mesh.data, config.mesh.bag, config.mesh.fsdp_min_size = 2, 2, 16
config.train.micro_batches, config.optimizer.warmup_steps = 2, 2
rng, mesh = np.random.default_rng(0), device_mesh(config)
tiles, position = rng.standard_normal((4, 8, 1, 6)).astype(np.float16), rng.random((4, 8, 2)).astype(np.float32)
bag = Bag(tiles, np.ones((4, 8, 1), bool), position, np.arange(4, dtype=np.int32) % 3, np.ones(4, np.float32))
model, optimizer = partial(build_model, config.model, 3), build_optimizer(config.optimizer, config.train.steps)
ensemble = Ensemble(partial(model, 0), optimizer, config, mesh)
state = ensemble.join(init_state(model(seed), optimizer, config, mesh) for seed in (3, 9))
step = ensemble.build((3, 9), config)
for _ in range(4):
    state, _ = step(state, bag)
config.seed, together = 9, ensemble.split(state)[1]
alone, step = init_state(model(9), optimizer, config, mesh), build_step(model(0), optimizer, config, mesh)
for _ in range(4):
    alone, _ = step(alone, bag)
for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
    assert one.sharding == other.sharding
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(together))
"""


@pytest.mark.slow
def test_on_four_devices_members_equal_runs_trained_alone_and_have_their_shardings() -> None:
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PJRT_NPROC": "16"}
    subprocess.run(
        [sys.executable, "-c", ON_FOUR], check=True, env=os.environ | settings, cwd=Path(__file__).parents[2]
    )


class _StopsAfter3(ProcessGroup):
    def should_stop(self, step: int) -> bool:
        return step == 3


@pytest.mark.slow
def test_members_that_were_stopped_and_resumed_equal_uninterrupted_ones(config, tmp_path: Path) -> None:
    train(config, tmp_path / "undisturbed")
    with pytest.raises(StoppedError, match="stopped at step 3; the same command resumes"):
        train(config, tmp_path / "stopped", _StopsAfter3())
    train(config, tmp_path / "stopped")
    expected = [_state(tmp_path / "undisturbed" / f"seed-{seed}") for seed in (5, 6)]
    for seed, state in zip((5, 6), expected, strict=True):
        run = tmp_path / "stopped" / f"seed-{seed}"
        assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (state, _state(run))), strict=True))
        assert _steps(run, "train/loss") == [1, 2, 3, 4]

    run = tmp_path / "stopped" / "seed-6"
    shutil.rmtree(run / "checkpoints")  # as if a kill had left it behind the others
    train(config, tmp_path / "stopped")
    _assert_close(_state(run), expected[1])


def test_an_ensemble_has_runs_at_the_same_step_and_no_more_than_its_size() -> None:
    runs = {seed: Path(str(seed)) for seed in range(6)}
    groups = ensembles_of_runs(runs, 2, lambda run: 10 if run.name in ("1", "4", "5") else 0)
    assert [tuple(group) for group in groups] == [(0, 2), (3,), (1, 4), (5,)]
    assert all(runs[seed] == run for group in groups for seed, run in group.items())


@pytest.mark.slow
def test_a_fold_of_a_cross_validation_trains_its_seeds_as_an_ensemble(config, tmp_path: Path) -> None:
    config.data.folds, config.data.val_fraction = 2, 0.4
    config.train.steps = config.train.eval_every = 3
    crossvalidate(config, tmp_path / "cv", seeds=3)  # two together, and the third
    for fold in (0, 1):
        for seed in (5, 6, 7):
            run = tmp_path / "cv" / f"fold-{fold}" / f"seed-{seed}"
            assert newest_step(run) == 3
            assert (open_run(run).config.seed, open_run(run).config.data.sampling_seed) == (seed, 5)
    assert len((tmp_path / "cv" / "runs.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.features": False}, "2: an ensemble is trained on stored features, not on pixels"),
        ({"data.mine_slides": 0.1}, "2: hard mining would give each member other bags"),
        ({"data.mine_regions": 0.1}, "2: hard mining would give each member other bags"),
        ({"train.ensemble_size": 0}, "must be at least 1, got 0; try 1"),
    ],
)
def test_configs_that_an_ensemble_cannot_train_are_refused_with_the_reason(
    config, fields: dict, message: str, tmp_path: Path
) -> None:
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="an ensemble is trained by one process"):
        train_members(config, {5: tmp_path / "run"})
