"""The commands as a user types them; one of each kind of exit status in a process of its own."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from scipy.special import logit

from crcjax.slides.preprocess.manifest import read_manifest
from crcjax.slides.store.tile_store import open_store, tiled_slides
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide

COMMAND = [sys.executable, "-m", "crcjax.cli"]
Command = Callable[..., subprocess.CompletedProcess]


def _process(*arguments: object) -> subprocess.CompletedProcess:
    """Runs the command as a shell does."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good slide and five bad ones."""
    folder = tmp_path_factory.mktemp("slides")
    good = paint_slide(folder / "good.svs", SlideSpec("immune", 3, size_px=(800, 640), mpp=1.0))
    (folder / "good.truth.npz").unlink()
    (folder / "empty.svs").touch()
    (folder / "text.svs").write_text("slide_id,case_id\n")
    (folder / "cut.svs").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    return folder


def test_help_does_not_wait_for_jax_and_documents_the_exit_statuses() -> None:
    code = "import sys, crcjax.cli; sys.argv[1:] = ['--help']\ntry: crcjax.cli.main()\nfinally: assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for words in ("0 everything was done", "1 the run finished, but slides", "2 wrong arguments", "3 stopped because"):
        assert words in shown


def test_the_version_and_the_training_command_answer_as_their_counterparts_do(tmp_path: Path) -> None:
    import crcjax

    assert _process("--version").stdout.strip() == f"crcjax {crcjax.__version__}"
    shown = _process("train", "--help").stdout
    assert all(
        words in shown for words in ("--config configs/demo.py", "--coordinator", "Exit status", "--workdir RUN")
    )
    module = [sys.executable, "-m", "crcjax.main"]
    wrong = ["--config", "configs/demo.py", "--config.train.step=3", "--workdir", str(tmp_path)]
    ours, other = _process("train", *wrong), subprocess.run([*module, *wrong], capture_output=True, text=True)
    assert ours.returncode == other.returncode == 2
    assert ours.stderr == other.stderr
    assert "did you mean --config.train.steps?" in ours.stderr


def test_every_command_answers_help_without_the_extras() -> None:
    code = (
        "import sys\nfor name in ('h5py', 'ray', 'pandas', 'anndata', 'torch', 'fastapi'): sys.modules[name] = None\n"
        "from typer.testing import CliRunner\nfrom crcjax.cli import app\n"
        "from typer.main import get_command\n"
        "commands = get_command(app).commands\n"
        "names = [(name,) for name in commands]\n"
        "names += [(group, name) for group in commands for name in getattr(commands[group], 'commands', ())]\n"
        "assert ('checkpoints', 'export') in names\n"
        "for name in names:\n"
        "    done = CliRunner().invoke(app, [*name, '--help'])\n"
        "    assert done.exit_code == 0 and len(done.output) > 100, (name, done.output)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tiling_names_each_bad_slide_finishes_the_good_one_and_exits_1(
    crcjax: Command, slides: Path, tmp_path: Path
) -> None:
    absent = slides / "absent.svs"
    done = _process("tile", slides, absent, "--out", tmp_path, "--mag", "10x", "--tile-px", 64)
    assert done.returncode == 1
    for name, words in {
        "empty.svs": "the file is empty",
        "text.svs": "not a slide",
        "cut.svs": "damaged, cut off",
        "absent.svs": "no such file",
    }.items():
        lines = [line for line in done.stderr.splitlines() if name in line]
        assert len(lines) == 1, done.stderr
        assert words in lines[0]
    assert "Traceback" not in done.stderr
    assert "1 of 5 slides tiled" in done.stderr
    assert open_store(tmp_path, "good").pixels == "jpeg"
    again = crcjax("tile", slides / "good.svs", "--out", tmp_path, "--mag", "10x", "--tile-px", 64)
    assert again.returncode == 0
    other = crcjax("tile", slides / "good.svs", "--out", tmp_path, "--mag", "10x", "--tile-px", 128)
    assert other.returncode == 2
    assert "tile_px 64, not 128" in other.stderr


def test_tiling_looks_up_the_files_of_each_slide_once(
    crcjax: Command, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crcjax.data import slide_selection
    from crcjax.slides.wsi import discovery

    searches, lookups = [], []

    def find_slides(paths: list[Path]) -> list[Path]:
        searches.append(paths)
        return find_all(paths)

    def slide_files(path: Path) -> list[Path]:
        lookups.append(path.name)
        return files_of(path)

    find_all, files_of = slide_selection.find_slides, discovery.slide_files
    monkeypatch.setattr(slide_selection, "find_slides", find_slides)
    monkeypatch.setattr(discovery, "slide_files", slide_files)
    done = crcjax("tile", slides / "empty.svs", slides / "text.svs", "--out", tmp_path, "--shard", "1/1")
    assert done.returncode == 1
    assert "0 of 2 slides tiled" in done.stderr
    assert len(searches) == 1
    assert sorted(lookups) == ["empty.svs", "text.svs"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mag", "20"], "magnification '20'"),
        (["--mag", "20x,30x"], "do not differ by a power of two"),
        (["--tile-px", "4"], "tile_px 4"),
        (["--mpp", "250"], "--mpp 250"),
        (["--min-tissue-mm2", "0"], "min_tissue_mm2 must be an area above 0"),
        (["--limit", "max_pens=1"], "max_pens"),
        (["--limit", "min_tissue=1.5"], "min_tissue 1.5: must be a fraction above 0 and up to 1"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    crcjax: Command, slides: Path, tmp_path: Path, arguments: list, words: str
) -> None:
    done = crcjax("tile", slides / "good.svs", "--out", tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_option_sets_the_smallest_piece_of_tissue(crcjax: Command, tmp_path: Path) -> None:
    """A piece of 0.0144 mm2; without the option, the error names it."""
    picture = np.full((1000, 1000, 3), 240, np.uint8)
    picture[380:620, 380:620] = np.random.default_rng(0).normal((200, 110, 160), 25, (240, 240, 3)).clip(0, 255)
    path, options = tmp_path / "core.tif", {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, picture, photometric="rgb", tile=(240, 240), compression="deflate", **options)
    refused = crcjax("tile", path, "--out", tmp_path / "refused", "--tile-px", 64)
    assert refused.returncode == 1
    assert re.search(r"no_tissue: .*has 0\.01\d+ mm², below the limit of 0\.02 mm² \(--min-tissue-mm2", refused.stderr)
    tiled = crcjax("tile", path, "--out", tmp_path / "tiled", "--tile-px", 64, "--min-tissue-mm2", "0.01")
    assert tiled.returncode == 0, tiled.stderr
    assert open_store(tmp_path / "tiled", "core").params.min_tissue_mm2 == 0.01


def test_limits_decide_what_is_kept_and_the_overview_shows_it(crcjax: Command, slides: Path, tmp_path: Path) -> None:
    tile = ("tile", slides / "good.svs", "--mag", "10x", "--tile-px", 64, "--out")
    assert crcjax(*tile, tmp_path / "usual").returncode == 0
    told = crcjax(*tile, tmp_path / "strict", "--limit", "min_focus=0.4")
    assert told.returncode == 0
    usual, strict = (open_store(tmp_path / name, "good") for name in ("usual", "strict"))
    assert 0 < strict.mask.sum() < usual.mask.sum()
    assert strict.attributes["verdict"]["faults"]["blurred"] > 0
    verdict, noted = strict.attributes["verdict"], read_manifest(tmp_path / "strict")["good"]
    assert verdict["reasons"]
    assert (noted["verdict"], noted["reason"]) == (verdict["verdict"], "; ".join(verdict["reasons"]))
    assert f"tiled, {verdict['verdict']}: {slides / 'good.svs'}: {noted['reason']}" in told.stderr
    assert f"{verdict['verdict']} 1" in told.stderr.splitlines()[-1]
    refused = crcjax(*tile, tmp_path / "strict")
    assert refused.returncode == 2
    cohort = tmp_path / "cohort.csv"
    cohort.write_text("slide_id,case_id,site\ngood,1,north\nabsent,2,south\n")
    shown = crcjax("overview", tmp_path / "strict", "--cohort", cohort)
    assert shown.returncode == 0, shown.stderr
    page = (tmp_path / "strict" / "overview" / "index.html").read_text()
    assert "north" in page
    assert "Not in the store: absent" in page
    assert crcjax("overview", tmp_path / "nothing").returncode == 2
    wide = crcjax("overview", tmp_path / "strict", "--limit", "max_stain_degrees=200")
    assert (wide.returncode, wide.stderr.count("\n")) == (2, 1)
    assert "max_stain_degrees 200.0: must be an angle from 0 to 180 degrees" in wide.stderr


def test_the_help_tells_the_limits_of_the_code() -> None:
    from typer.main import get_command

    from crcjax.cli import app
    from crcjax.slides.tiling.quality_control import QualityLimits, StainLimits

    for command, limits in (("tile", QualityLimits()), ("overview", StainLimits())):
        (option,) = (param for param in get_command(app).commands[command].params if param.name == "limit")  # type: ignore[attr-defined]
        told = re.findall(r"(\w+)=(\d+(?:\.\d+)?)", option.help)
        assert len(told) == 2
        assert all(getattr(limits, name) == float(value) for name, value in told)


def test_a_full_disk_stops_with_status_3_and_leaves_nothing_that_looks_finished(slides: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(4 * 2**20 - 50_000))
    done = _process("tile", slides / "good.svs", "--out", small_disk / "store", "--mag", "10x", "--tile-px", 256)
    assert done.returncode == 3, done.stderr
    assert "store: cannot be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(small_disk.rglob("*.zarr"))


def test_a_cohort_gives_ids_and_an_absent_file_is_one_failed_line(
    crcjax: Command, slides: Path, run: Path, tmp_path: Path
) -> None:
    table = tmp_path / "cohort.csv"
    table.write_text(f"slide_id,case_id,path\nA-1,A,{slides / 'good.svs'}\nB-1,B,absent.svs\n")
    tiled = crcjax("tile", "--cohort", table, "--out", tmp_path / "store", "--mag", "10x", "--tile-px", 64)
    assert tiled.returncode == 1
    assert open_store(tmp_path / "store", "A-1").info.synthetic
    predicted = crcjax("predict", "--run", run, "--cohort", table, "--out", tmp_path / "out")
    assert predicted.returncode == 1
    with open(tmp_path / "out" / "predictions.csv") as file:
        first, second = csv.DictReader(file)
    assert (first["slide_id"], first["case_id"], first["status"], first["synthetic"]) == ("A-1", "A", "ok", "yes")
    probs = [float(first[f"p_{name}"]) for name in ("canonical", "immune", "stromal")]
    assert sum(probs) == pytest.approx(1, abs=1e-5)
    assert float(first["entropy"]) == pytest.approx(-sum(p * np.log(p) for p in probs), abs=1e-3)
    assert (second["status"], second["p_immune"]) == ("failed", "")
    assert second["reason"].startswith("missing: no such file")
    assert all(float(first[f"seconds_{stage}"]) >= 0 for stage in ("total", "plan", "encode", "pool"))
    assert re.fullmatch("[0-9a-f]{64}", first["slide_sha256"])
    assert re.fullmatch("[0-9a-f]{12}", first["pipeline_id"])
    assert (tmp_path / "out" / "heatmaps" / "A-1.png").exists()
    with np.load(tmp_path / "out" / "attention" / "A-1.npz") as saved:
        assert saved["attention"].sum() == pytest.approx(1, abs=1e-5)
        assert len(saved["origin"]) == len(saved["attention"])


def test_predicting_from_the_file_equals_predicting_from_the_store(painted: Path, run: Path, tmp_path: Path) -> None:
    from crcjax.predict.predictor import Predictor
    from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
    from crcjax.slides.wsi.slide import open_slide

    predictor = Predictor(run)
    path = sorted((painted / "slides").glob("*.svs"))[0]
    tile_slides([TileJob("a", path)], tmp_path, predictor.tiling, pixels="lossless")
    store = open_store(tmp_path, "a")
    with open_slide(path) as slide:
        found = predictor.predict(slide, threads=2)
    assert (found.origin == store.origin).all()
    assert (found.mask == store.mask).all()
    forward, pixels = predictor.members[0].forward, store.read_pixels(range(len(store.mask)))
    chunks = (pixels[start : start + forward.chunk] for start in range(0, len(pixels), forward.chunk))
    stored = forward.bag(
        predictor.members[0].params, chunks, store.mask, (store.origin / store.region_px).astype(np.float32)
    )
    np.testing.assert_array_equal(found.prediction.probs, stored.probs)


def test_a_store_is_predicted_without_its_slides_as_they_would_be(
    crcjax: Command, painted: Path, run: Path, tmp_path: Path
) -> None:
    rows, some = {}, tmp_path / "some.csv"
    head, *lines = (painted / "cohort.csv").read_text().replace("slides/", f"{painted}/slides/").splitlines(True)
    some.write_text("".join([head, *lines[::5]]))
    for name, options in {"slides": (), "store": ("--store", painted / "store")}.items():
        out = tmp_path / name
        done = crcjax("predict", "--run", run, "--cohort", some, "--out", out, *options)
        assert done.returncode == 0, done.stderr
        with open(out / "predictions.csv") as file:
            rows[name] = list(csv.DictReader(file))
    of_slides, of_stores = (
        logit([[float(row[f"p_{name}"]) for name in ("canonical", "immune", "stromal")] for row in rows[source]])
        for source in ("slides", "store")
    )
    # The store's tiles are JPEG, which changes much less than the difference between slides does.
    assert np.abs(of_stores - of_slides).max() < 0.25 * of_slides.std(axis=0).min()
    for from_slide, from_store in zip(rows["slides"], rows["store"], strict=True):
        assert list(from_slide) == list(from_store)
        for name, value in from_store.items():
            if not name.startswith(("p_", "alpha_", "seconds_", "stain_")) and name not in (
                "entropy",
                "expected_entropy",
                "mutual_information",
                "vacuity",
                "call",
            ):
                assert value == from_slide[name], name
        slide_id = from_slide["slide_id"]
        shown = [tmp_path / name / "attention" / f"{slide_id}.npz" for name in rows]
        with np.load(shown[0]) as of_slide, np.load(shown[1]) as of_store:
            assert set(of_slide) == set(of_store)
            for name in ("origin", "region_px", "mpp"):
                np.testing.assert_array_equal(of_store[name], of_slide[name])
            for name in ("attention", "slot_attention", "class_attention", "attribution"):
                np.testing.assert_allclose(of_store[name], of_slide[name], atol=0.1 * np.abs(of_slide[name]).max())
        for name in ("stain_red", "stain_green", "stain_blue"):
            assert float(from_store[name]) == pytest.approx(float(from_slide[name]), abs=0.02)
        pictures = [cv2.imread(str(tmp_path / name / "heatmaps" / f"{slide_id}.png")) for name in rows]
        assert pictures[0].shape[1] == pictures[1].shape[1]
        assert pictures[1].std() > 10
    lacking = tmp_path / "lacking.csv"
    lacking.write_text(f"slide_id,case_id\nabsent,a\n{rows['store'][0]['slide_id']},b\n")
    done = crcjax("predict", "--run", run, "--store", painted / "store", "--cohort", lacking, "--out", tmp_path / "two")
    assert done.returncode == 1
    assert "failed: absent: not_tiled: is not in" in done.stderr
    with open(tmp_path / "two" / "predictions.csv") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["failed", "ok"]
    refused = crcjax("predict", "--run", run, "--store", painted / "store", "--out", tmp_path, "--mpp", "1")
    assert refused.returncode == 2
    assert "--store cannot be combined with --mpp; leave out one or the other" in refused.stderr


def test_validation_reports_the_held_out_cases_and_the_attention(
    crcjax: Command, painted: Path, run: Path, tmp_path: Path
) -> None:
    predicted = crcjax("predict", "--run", run, "--cohort", painted / "cohort.csv", "--out", tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    done = crcjax(
        *("validate", "--predictions", tmp_path / "predictions.csv", "--cohort", painted / "cohort.csv"),
        *("--out", tmp_path / "report", "--truth", painted / "slides"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["synthetic"] is True
    assert metrics["flow"]["cases evaluated"] == 6
    assert set(metrics["attention"]) == {"canonical", "immune", "stromal", "all subtypes"}


def test_pictures_of_a_prediction_are_written_for_every_slide_and_a_missing_slide_is_named(
    crcjax: Command, painted: Path, run: Path, tmp_path: Path
) -> None:
    slides = sorted((painted / "slides").glob("*.svs"))[:2]
    predicted = crcjax("predict", "--run", run, *slides, "--attribution", "gradient", "--out", tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    done = crcjax("pictures", tmp_path, *slides, "--tiles", "3")
    assert done.returncode == 0, done.stderr
    assert "pictures of 2 of 2 predicted slides" in done.stderr
    for slide in slides:
        for file in (f"overlays/{slide.stem}.geojson", f"overlays/{slide.stem}.ome.tif", f"sheets/{slide.stem}.jpg"):
            assert (tmp_path / file).stat().st_size > 1000
        assert "Research use only" in (tmp_path / "reports" / f"{slide.stem}.html").read_text()
    done = crcjax("pictures", tmp_path, slides[0], "--dicom")
    assert done.returncode == 1
    assert f"{slides[0]}: is no DICOM slide" in done.stderr


def test_slides_beyond_the_limits_of_the_calibration_are_no_calls_with_status_0(
    crcjax: Command, painted: Path, run: Path, tmp_path: Path
) -> None:
    slides, out = sorted((painted / "slides").glob("*.svs"))[:2], tmp_path / "out"
    predict = ("predict", "--run", run, *slides, "--out", out)
    assert crcjax(*predict).returncode == 0
    with open(out / "predictions.csv") as file:
        usual = list(csv.DictReader(file))
    entropies = sorted(float(row["entropy"]) for row in usual)
    assert entropies[0] < entropies[1]
    limits = {"share": 0.02, "slides": 60, "largest": {"entropy": sum(entropies) / 2}, "stain": []}
    values = {"model": usual[0]["model"], "classes": ["canonical", "immune", "stromal"], "temperature": 1.0}
    values |= {"method": "lac", "error": 0.1, "thresholds": {"": "0.9"}, "cases": {"": 60}, "limits": limits}
    (tmp_path / "calibration.json").write_text(json.dumps(values))
    for _ in range(2):  # the second time, both rows are kept
        done = crcjax(*predict, "--calibration", tmp_path / "calibration.json")
        assert done.returncode == 0, done.stderr
        assert "2 of 2 slides predicted" in done.stderr
        with open(out / "predictions.csv") as file:
            rows = list(csv.DictReader(file))
        for before, row in zip(usual, rows, strict=True):
            is_refused = float(before["entropy"]) == entropies[1]
            assert (row["status"], row["call"]) == (("not_evaluable", "") if is_refused else ("ok", before["call"]))
            assert row["reason"].startswith("entropy: ") == is_refused
            assert float(row["p_immune"]) == pytest.approx(float(before["p_immune"]))
    assert done.stderr.count("not_evaluable: ") == 1
    assert crcjax("pictures", out, *slides).returncode == 0
    refused = next(row for row in rows if row["status"] == "not_evaluable")
    page = (out / "reports" / f"{refused['case_id']}.html").read_text()
    assert "Not evaluable" in page
    assert refused["reason"] in page


def test_a_folder_that_is_no_run_is_named(crcjax: Command, slides: Path, tmp_path: Path) -> None:
    done = crcjax("predict", "--run", tmp_path, slides / "good.svs", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "is not a run directory" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_doctor_finds_nothing_wrong_here() -> None:
    done = _process("doctor")
    assert done.returncode == 0, done.stdout
    for words in ("OpenSlide 4", "(cpu)", "disk free", "nothing is wrong"):
        assert words in done.stdout


def test_shards_share_a_store_and_what_is_wrong_with_shard_or_cluster_is_one_line(
    crcjax: Command, tmp_path: Path
) -> None:
    folder, store = tmp_path / "slides", tmp_path / "store"
    folder.mkdir()
    for name in ("a", "b"):
        paint_slide(folder / f"{name}.svs", SlideSpec("immune", 3, size_px=(800, 640), mpp=1.0))
    tile = ("tile", folder, "--out", store, "--mag", "10x", "--tile-px", 64)
    for shard in ("1/2", "2/2"):
        done = crcjax(*tile, "--shard", shard, "--slide-timeout-s", 100, "--slide-memory-gib", 4)
        assert (done.returncode, "1 of 1 slides tiled" in done.stderr) == (0, True)
    assert "2 of 2 slides tiled" in crcjax(*tile).stderr
    wrong = {("--shard", "3/2"): "write I/N with I from 1 to N", ("--executor", "ray"): "--executor ray"}
    for arguments, words in wrong.items():
        refused = crcjax(*tile, *arguments)
        assert refused.returncode == 2
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr
    assert "sbatch --array" in crcjax("tile", "--help").stdout


def test_what_is_exported_for_trident_is_imported_and_bad_files_are_one_line(
    crcjax: Command, slides: Path, tmp_path: Path
) -> None:
    assert crcjax("tile", slides / "good.svs", "--out", tmp_path / "store", "--mag", "10x").returncode == 0
    exported = crcjax("export", tmp_path / "store", "--out", tmp_path / "out", "--format", "trident")
    assert (exported.returncode, "1 of 1 slides exported" in exported.stderr) == (0, True), exported.stderr
    files = tmp_path / "out" / "10x_256px_0px_overlap"
    (files / "bad.h5").write_text("no HDF5")
    done = crcjax("import", files, "--slides", slides / "good.svs", "--out", tmp_path / "theirs")
    assert done.returncode == 1
    assert "1 of 2 slides imported" in done.stderr
    assert [line for line in done.stderr.splitlines() if "bad.h5: is not an HDF5 file; give" in line]
    ours, theirs = (open_store(tmp_path / name, "good") for name in ("store", "theirs"))
    assert theirs.origin.tolist() == ours.origin[ours.mask[:, 0]].tolist()
    assert theirs.info.content_hash == ours.info.content_hash
    refused = crcjax("import", tmp_path / "store", "--out", tmp_path / "none")
    assert (refused.returncode, "no HDF5 files" in refused.stderr) == (2, True)
    assert "docs/interchange.md" in crcjax("import", "--help").stdout


def test_embedding_refuses_weights_in_one_line_and_writes_features_of_good_ones(
    crcjax: Command, painted: Path, tmp_path: Path
) -> None:
    from flax import nnx
    from safetensors.numpy import save_file

    from crcjax.models.encoders.registry import PRETRAINED
    from crcjax.models.encoders.torch_weights import torch_tensors
    from crcjax.slides.store.features import read_features

    stores = map(partial(open_store, painted / "store"), tiled_slides(painted / "store"))
    name = min(stores, key=lambda opened: opened.mask.sum()).slide_id
    shutil.copytree(painted / "store" / f"{name}.zarr", tmp_path / "store" / f"{name}.zarr")
    tensors = torch_tensors(PRETRAINED["imagenet-resnet50-clam"].build(rngs=nnx.Rngs(0)))
    save_file(tensors, tmp_path / "good.safetensors")
    tensors.pop("bn1.bias")
    save_file(tensors, tmp_path / "bad.safetensors")
    options = ("--encoder", "imagenet-resnet50-clam", "--batch", 16, "--weights")
    done = {
        kind: crcjax("embed", tmp_path / "store", *options, tmp_path / f"{kind}.safetensors")
        for kind in ("bad", "good")
    }
    assert (done["bad"].returncode, done["good"].returncode) == (2, 0), done["good"].stderr
    assert "does not fit imagenet-resnet50-clam: 1 missing: bn1.bias;" in done["bad"].stderr.splitlines()[-1]
    assert "1 of 1 slides have features of imagenet-resnet50-clam" in done["good"].stderr
    assert read_features(tmp_path / "store", name, "imagenet-resnet50-clam").shape[-1] == 1024
