"""Every file of configs/ is a whole experiment: it is valid, says how it is started, and trains."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import Array
from ml_collections import ConfigDict

from crcjax.config_check import check_config
from crcjax.models.mil import Params, build_model
from crcjax.parallel.mesh import AXES, _shape
from crcjax.runs.checkpoint import newest_step
from crcjax.slides.store.features import write_features
from crcjax.slides.store.tile_store import open_store, tiled_slides
from crcjax.train.loop import train
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import abstract_state

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}
# What a laptop trains in seconds, with every choice of the config kept.
SHRUNK = {
    **{"data.regions_per_bag": 4, "data.batch_size": 4, "data.region_buckets": (64, 128), "data.magnifications": ("10x",)},
    **{"model.width": 8, "model.features": 16, "model.attention": 8, "model.heads": 2, "model.clam_instances": 2},
    **{"train.steps": 3, "train.eval_every": 3, "train.checkpoint_every": 3, "train.log_every": 1},
    "optimizer.warmup_steps": 1,
}  # fmt: skip


def _config(name: str) -> ConfigDict:
    return runpy.run_path(str(CONFIGS[name]))["get_config"]()


@pytest.fixture(scope="module")
def features(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the painted store with imported features of six numbers, named `theirs`."""
    store = tmp_path_factory.mktemp("features") / "store"
    shutil.copytree(painted / "store", store)
    rng = np.random.default_rng(0)
    about = {"encoder": "theirs", "weights_sha256": None, "mpp": [1.0], "dtype": "float16", "width": 6, "imported": {}}
    for slide_id in tiled_slides(str(store)):
        values = rng.standard_normal((len(open_store(str(store), slide_id).mask), 1, 6)).astype(np.float16)
        write_features(store, slide_id, "theirs", values, about | {"magnifications": ["10x"]})
    return store


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_valid_and_its_docstring_has_its_command_and_what_it_gives(name: str) -> None:
    config = _config(name)
    config.data.store, config.data.cohort = "store", "cohort.csv"
    check_config(config)
    text = CONFIGS[name].read_text().split('"""')[1]
    command = "crossvalidate" if config.data.folds else "launch/slurm/train.sbatch" if name == "epoc" else "crcjax.main"
    assert re.search(rf"{command} [^\n]*--config configs/{name}\.py", text)
    assert re.search(r"^Gives ", text, re.MULTILINE)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_trains_three_steps(name: str, painted: Path, features: Path, tmp_path: Path) -> None:
    config = _config(name)
    config.update_from_flattened_dict(SHRUNK)
    config.data.cohort, config.data.store = str(painted / "cohort.csv"), str(painted / "store")
    if config.data.features:
        config.data.store, config.model.encoder = str(features), "theirs"
    if config.data.folds:
        config.data.folds, config.train.ensemble_size = 2, 2
    train(config, tmp_path)
    runs = [tmp_path / "seed-0", tmp_path / "seed-1"] if config.train.ensemble_size == 2 else [tmp_path]
    for run in runs:
        assert newest_step(run) == 3
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert np.isfinite([line["train/loss"] for line in lines if "train/loss" in line]).all()


def test_epocs_model_and_state_have_their_shapes_on_4_x_8_devices() -> None:
    config = _config("epoc")
    mesh = AbstractMesh(_shape(config, 32), AXES, axis_types=(AxisType.Auto,) * 3)
    assert (mesh.shape["data"], config.data.batch_size // mesh.shape["data"]) == (32, 2)
    model = nnx.eval_shape(lambda: build_model(config.model, 3, 0, (1, 2, 4)))
    state = abstract_state(model, build_optimizer(config.optimizer, config.train.steps), config, mesh)
    leaves = jax.tree.leaves(state)
    # Nothing is sharded (mesh.fsdp_min_size 0): every device has the whole state.
    assert all(leaf.sharding.shard_shape(leaf.shape) == leaf.shape for leaf in leaves)
    assert 1e6 < sum(leaf.size for leaf in jax.tree.leaves(state.params)) < 1e7

    def pool(params: Params) -> tuple[Array, Array]:
        bag = (2, config.data.regions_per_bag, 21)
        features, mask, position = (
            jnp.zeros((*bag, config.model.features)),
            jnp.ones(bag, bool),
            jnp.zeros((*bag[:2], 2)),
        )
        prediction = nnx.merge(nnx.graphdef(model), params).pool(features, mask, position)
        return prediction.alpha, prediction.region_attention

    alpha, region_attention = jax.eval_shape(pool, state.params)
    assert (alpha.shape, region_attention.shape) == ((2, 3), (2, config.data.regions_per_bag))


@pytest.mark.slow
def test_epoc_compiles_for_4_x_8_devices_and_95_percent_efficiency_are_predicted() -> None:
    code = "import json, collectives\nprint(json.dumps(collectives.row((64, 32, 32, 1, 1, 0))))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tools", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    config = _config("epoc")
    assert (row["bags"], row["devices"]) == (config.data.batch_size, 32)
    assert row["MB across hosts"] > 1.0
    assert row["efficiency without overlap"] >= 0.95
