"""The Python API, as a notebook or a script uses it."""

import base64
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import crcjax
from crcjax import environment
from crcjax.errors import InputError

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG"


def _python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script as a user does, without the variables that the tests set."""
    script = folder / "script.py"
    script.write_text(code)
    kept = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    kept |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=folder, env=kept)


def test_importing_crcjax_loads_neither_jax_nor_numpy_and_sets_what_jax_needs(tmp_path: Path) -> None:
    heavy = ("jax", "numpy", "flax", "pandas", "matplotlib", "tensorstore", "openslide", "typer", "rich")
    done = _python(
        f"import sys, os, crcjax; print([m for m in {heavy} if m in sys.modules], os.environ['PJRT_NPROC'])", tmp_path
    )
    assert done.stdout.strip() == "[] 16", done.stderr
    assert {
        "open_slide",
        "tile",
        "open_store",
        "embed",
        "train",
        "predict",
        "calibrate",
        "validate",
        "demo_cohort",
    } <= set(dir(crcjax))


def test_train_and_predict_are_functions_and_packages() -> None:
    import crcjax.predict.predictor
    import crcjax.train.loop

    assert callable(crcjax.train)
    assert callable(crcjax.predict)
    assert crcjax.train.loop.train.__module__ == "crcjax.train.loop"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        crcjax.trian  # noqa: B018


def test_another_platform_is_refused_in_one_line_that_names_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sys, "platform", "darwin")
    for name in ("tile", "open_slide"):
        with pytest.raises(InputError, match="needs Linux, this is darwin"):
            getattr(crcjax, name)
    with pytest.raises(InputError, match="needs Linux"):
        crcjax.train("store", "cohort.csv", "run")


def test_a_script_without_a_main_guard_gets_one_line(painted: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").symlink_to(painted / "slides")
    done = _python("import crcjax\ncrcjax.tile('slides', 'store', magnifications='10x', tile_px=64)\n", tmp_path)
    assert done.returncode == 1
    assert "BrokenProcessPool" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("crcjax.errors.InputError: a worker process runs this script again")
    assert done.stderr.count("__main__") == 1
    painted_script = "import crcjax\ncrcjax.demo_cohort('cohort', cases={'train': 3}, size_px=(600, 600))\n"
    done = _python(painted_script, tmp_path)
    assert done.stderr.splitlines()[-1].startswith("crcjax.errors.InputError: a worker process runs this script again")
    assert done.stderr.count("Traceback") == 1
    arguments = f"{str(painted / 'store')!r}, {str(painted / 'cohort.csv')!r}, 'run'"
    fields = "workers=1, steps=2, batch_size=2, regions_per_bag=2, width=8, eval_every=2, warmup_steps=1"
    done = _python(f"import crcjax\ncrcjax.train({arguments}, {fields})\n", tmp_path)
    assert "crcjax.errors.InputError: a worker process runs this script again" in done.stderr, done.stderr
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.count("run: starting") == 1


def test_small_tissue_and_tiles_with_faults_are_tiled_if_asked(painted: Path, tmp_path: Path) -> None:
    from crcjax.slides.store.tile_store import open_store
    from crcjax.slides.tiling.plan import TilingParams

    slide = sorted((painted / "slides").glob("*.svs"))[0]
    store = crcjax.tile(
        slide, tmp_path / "store", magnifications="10x", tile_px=64, min_tissue_mm2=0.005, keep_all=True
    )
    assert open_store(store.path, slide.stem).params == TilingParams(("10x",), 64, min_tissue_mm2=0.005, keep_all=True)
    with pytest.raises(InputError, match="min_tissue_mm2 must be an area above 0"):
        crcjax.tile(slide, tmp_path / "store", min_tissue_mm2=0.0)


def test_a_store_shows_its_slides_tiles_and_features(
    painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crcjax.slides.store.features import write_features
    from crcjax.slides.store.tile_store import open_store

    shutil.copytree(painted / "store", tmp_path / "store")
    store = crcjax.open_store(str(tmp_path / "store"))
    slide_id = store.slide_ids[0]
    stored = open_store(tmp_path / "store", slide_id)
    slide, tiles = store[slide_id], store[slide_id].tiles()
    assert len(store) == 21
    assert len(store.failed) == 0
    assert slide_id in store._repr_html_()
    assert len(tiles) == stored.mask.sum() == store.slides[0]["tiles"]
    region = int(tiles.places[-1, 0])
    np.testing.assert_array_equal(tiles[-1], stored.read_pixels([region])[0, 0])
    np.testing.assert_array_equal(tiles.corners[-1], stored.origin[region])
    assert tiles.sides[0] == 64  # 64 px at 10x of a slide of 1 µm per pixel
    assert slide.plot()._repr_png_().startswith(PNG)
    assert base64.b64encode(PNG)[:4].decode() in slide._repr_html_()
    assert list(tiles.to_pandas().columns[:4]) == ["x", "y", "side", "magnification"]
    features = np.random.default_rng(0).normal(size=(*stored.mask.shape, 4)).astype(np.float16)
    about = {"encoder": "api-test", "weights_sha256": None, "mpp": None, "dtype": None, "magnifications": ["10x"]}
    write_features(tmp_path / "store", slide_id, "api-test", features, about)
    np.testing.assert_array_equal(slide.features("api-test"), features[stored.mask])
    data = slide.to_anndata("api-test")
    assert data.shape == (len(tiles), 4)
    np.testing.assert_array_equal(data.obsm["spatial"], tiles.corners + 32)
    with pytest.raises(InputError, match="no such features"):
        slide.features("uni2-h")
    for method, module in ((lambda: slide.to_anndata("api-test"), "anndata"), (tiles.to_pandas, "pandas")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=rf"needs {module}; install it: pip install 'crcjax\[notebook\]'"):
            method()


@pytest.mark.slow
def test_embedded_features_read_by_a_process_train_an_ensemble_whose_members_predict_together(
    painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flax import nnx
    from safetensors.numpy import save_file

    from crcjax.models.encoders import registry
    from crcjax.models.encoders.convnets import ResNet
    from crcjax.models.encoders.torch_weights import torch_tensors

    encoder = registry.PretrainedEncoder(partial(ResNet, depths=(1,), width=8), 32, 1.0, "", resize_px=64, size_px=48)
    monkeypatch.setitem(registry.PRETRAINED, "small", encoder)
    weights, cohort = tmp_path / "small.safetensors", painted / "cohort.csv"
    built = encoder.build(rngs=nnx.Rngs(3))
    save_file(torch_tensors(built), weights)
    shutil.copytree(painted / "store", tmp_path / "store")
    store = crcjax.embed(str(tmp_path / "store"), "small", str(weights), batch=16)
    slide = store[store.slide_ids[0]]
    assert {row["features"] for row in store.slides} == {"small"}
    expected = np.asarray(built(encoder.prepare(slide.tiles().pixels(range(len(slide.tiles()))))))
    np.testing.assert_allclose(slide.features("small"), expected, rtol=2e-3, atol=1e-4)

    fields = {"steps": 2, "eval_every": 2, "warmup_steps": 1, "batch_size": 4, "regions_per_bag": 4, "attention": 8}
    fields |= {"data__features": True, "encoder": "small", "weights": str(weights), "model__features": 16, "seed": 5}
    ensemble = crcjax.train(store, cohort, tmp_path / "run", ensemble_size=2, workers=1, **fields)
    assert [member.name for member in ensemble.members] == ["seed-5", "seed-6"]
    assert ensemble.metrics["step"] == 2

    def probabilities(predictions: crcjax.Predictions) -> np.ndarray:
        return np.array([[row[f"p_{name}"] for name in predictions.classes] for row in predictions.rows])

    members = [probabilities(crcjax.predict(member, store, cohort=cohort)) for member in ensemble.members]
    together = crcjax.predict(ensemble, store, cohort=cohort)
    assert np.abs(members[0] - members[1]).max() > 0.01
    np.testing.assert_allclose(probabilities(together), np.mean(members, axis=0), atol=2e-6)
    assert min(row["mutual_information"] for row in together.rows) > 0


def test_an_empty_folder_is_no_store_and_no_run(tmp_path: Path) -> None:
    from crcjax.api.runs import Run

    with pytest.raises(InputError, match="holds no tiled slides"):
        crcjax.open_store(tmp_path)
    with pytest.raises(InputError, match="holds no training run"):
        Run(tmp_path)
    with pytest.raises(InputError, match="does not download the weights of uni2-h"):
        crcjax.embed(tmp_path, "uni2-h")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"step": 3}, "step: is not a config field; did you mean steps"),
        ({"features": 3}, "features: several sections have this field; give data__features or model__features"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"flips": 1}, "flips must be bool, got 1"),
    ],
)
def test_a_wrong_override_names_the_field(overrides: dict, words: str) -> None:
    from crcjax.api.runs import _config, _override

    for name, value in overrides.items():
        with pytest.raises(InputError, match=re.escape(words)):
            _override(_config(None), name, value)


def test_overrides_reach_the_config_and_leave_the_given_one_as_it_is() -> None:
    from crcjax.api.runs import _config, _override
    from crcjax.config import get_config

    given = get_config()
    config = _config(given)
    for name, value in {"seed": 3, "steps": 5, "data__features": True, "region_buckets": [64]}.items():
        _override(config, name, value)
    assert (config.seed, config.train.steps, config.data.features, config.data.region_buckets) == (3, 5, True, (64,))
    assert given == get_config()
    assert _config(ROOT / "configs" / "demo.py").train.steps == 300


@pytest.mark.slow
def test_the_code_of_the_python_page_runs_in_a_process_without_flags_or_variables(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) >= 8
    body = "\n".join(blocks)
    before = "import jax\nfrom absl import flags\noptions = dict(jax.config.values)\n"
    after = (
        "assert dict(jax.config.values) == options, 'JAX options'\n"
        "assert not flags.FLAGS.is_parsed(), 'absl flags'\n"
        "for shown in (store, slide, tiles, run, predictions, calibration, shared, report, report.statistics):\n"
        "    assert '<table>' in shown._repr_html_(), shown\n"
        "assert predictions.heatmap('synthetic-0012')._repr_png_()[1:4] == b'PNG'\n"
    )
    code = "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in (before + body + after).splitlines())
    done = _python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step: is not a config field; did you mean steps?" in done.stdout
    for name in ("tiles.png", "history.png", "heatmap.png", "report/report.html", "report/metrics.json"):
        assert (tmp_path / "demo" / name).stat().st_size > 1000
