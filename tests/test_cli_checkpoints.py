"""The commands of `crcjax checkpoints` and `crcjax predict --bundle`, as a user types them."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., subprocess.CompletedProcess]


def _table(out: Path) -> list[dict[str, str]]:
    """The rows of a table, without the durations, and without the bundle's id, which a run has not."""
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: row[name] for name in row if not name.startswith("seconds_") and name != "bundle_id"} for row in rows
    ]


def test_a_signed_calibrated_bundle_predicts_the_table_of_its_run_and_a_changed_one_nothing(
    crcjax: Command, run: Path, painted: Path, tmp_path: Path
) -> None:
    cohort, bundle, key, public = (tmp_path / name for name in ("cohort.csv", "bundle", "key.pem", "key.pub"))
    header, *lines = (painted / "cohort.csv").read_text().replace("slides/", f"{painted}/slides/").splitlines(True)
    cohort.write_text(header + "".join(line for line in lines if ",val" in line))
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    by_run = ("predict", "--run", run, "--cohort", cohort, "--out")
    assert crcjax(*by_run, tmp_path / "uncalibrated").returncode == 0
    calibration = tmp_path / "calibration.json"
    table = tmp_path / "uncalibrated" / "predictions.csv"
    fitted = crcjax("calibrate", "--predictions", table, "--cohort", cohort, "--out", calibration, "--error", 0.4)
    assert fitted.returncode == 0, fitted.stderr

    options = ("--out", bundle, "--calibration", calibration, "--key", key)
    exported = crcjax("checkpoints", "export", run, *options)
    assert exported.returncode == 0, exported.stderr
    assert "balanced_accuracy" in exported.stderr
    assert exported.stderr.rstrip().endswith(", signed")

    assert crcjax(*by_run, tmp_path / "run", "--calibration", calibration).returncode == 0
    by_bundle = ("predict", "--bundle", bundle, "--cohort", cohort, "--out")
    done = crcjax(*by_bundle, tmp_path / "bundle-out")
    assert done.returncode == 0
    assert "signature was not checked, which --trust does" in done.stderr
    assert _table(tmp_path / "bundle-out") == _table(tmp_path / "run")
    assert {row["split"] for row in _table(tmp_path / "run")} == {"val"}
    stored = ("--store", painted / "store", "--trust", public)
    # A process of its own, as a service on another machine.
    command = [sys.executable, "-m", "crcjax.cli", *map(str, (*by_bundle, tmp_path / "stored", *stored))]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "was not checked" not in process.stderr
    by_store = crcjax(*by_run, tmp_path / "run-stored", "--store", painted / "store", "--calibration", calibration)
    assert by_store.returncode == 0
    assert _table(tmp_path / "stored") == _table(tmp_path / "run-stored")

    for arguments, words in (
        (("--bundle", bundle, "--run", run), "give either --run, once or several times, or --bundle"),
        ((), "give either --run"),
        (("--run", run, "--trust", public), "--trust and --encoder-weights are for a --bundle"),
        (("--bundle", bundle, "--calibration", calibration), "has a calibration of its own; leave --calibration out"),
        (("--bundle", run), "is not a bundle"),
        (("--run", bundle), "is not a run directory"),
    ):
        refused = crcjax("predict", *arguments, "--cohort", cohort, "--out", tmp_path / "none")
        assert (refused.returncode, words in refused.stderr) == (2, True), refused.stderr
    weights = bundle / "weights-0.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = crcjax(*by_bundle, tmp_path / "none")
    assert (damaged.returncode, damaged.stderr.count("\n")) == (2, 1)
    assert f"{bundle}: weights-0.safetensors is changed" in damaged.stderr
    assert not (tmp_path / "none").exists()


def _snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_checkpoints_are_listed_shown_and_verified_without_a_change(crcjax: Command, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = _snapshot(copy)
    listed = crcjax("checkpoints", "list", copy)
    header, *rows = listed.stdout.splitlines()[1:]
    assert header.split() == [
        "step",
        "balanced_accuracy",
        "loss",
        "size",
        "age",
        "config",
        "data",
        "state",
        "used",
        "by",
    ]
    assert rows[-1].endswith("resume")
    assert sum("predict" in row for row in rows) == 1
    (values,) = json.loads(crcjax("checkpoints", "list", copy, "--json").stdout)
    best, newest = (
        next(entry for entry in values["checkpoints"] if entry[use]) for use in ("predicts", "is_resumed_from")
    )
    assert crcjax("checkpoints", "best", copy).stdout == f"{best['step']}\n"
    assert crcjax("checkpoints", "best", copy, "--metric", "loss").returncode == 0
    shown = crcjax("checkpoints", "show", copy).stdout
    assert f"loss                 {best['metrics']['loss']:.4f}\n" in shown
    assert f"data SHA-256         {best['data_sha256']}\n" in shown
    number = len(values["checkpoints"])
    verified = crcjax("checkpoints", "verify", copy)
    assert (verified.returncode, verified.stdout) == (0, "")
    assert verified.stderr == f"{copy}: {number} checkpoints: {number} whole, 0 damaged\n"
    unsigned = crcjax("checkpoints", "verify", copy, "--trust", _public_key(tmp_path))
    assert (unsigned.returncode, unsigned.stdout.count("manifest.sig: missing")) == (1, number)
    assert _snapshot(copy) == before

    folder = copy / "checkpoints" / str(newest["step"])
    (folder / "checkpoint.json").unlink()
    array = max((folder / "default").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = array.read_bytes()
    array.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = _snapshot(copy)
    damaged = crcjax("checkpoints", "verify", copy)
    assert damaged.returncode == 1
    assert damaged.stdout.splitlines() == [
        f"{folder / 'checkpoint.json'}: missing",
        f"{array}: changed: its SHA-256 is not the manifest's",
    ]
    shown = crcjax("checkpoints", "show", copy, "--step", newest["step"]).stdout
    assert "state                damaged\n" in shown
    assert shown.count("damaged              ") == 2
    refused = crcjax("checkpoints", "show", copy, "--step", 77)
    assert (refused.returncode, "has no checkpoint of step 77" in refused.stderr) == (2, True)
    assert _snapshot(copy) == before


def test_pruning_lists_first_and_removes_with_yes_alone(crcjax: Command, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = _snapshot(copy)
    planned = crcjax("checkpoints", "prune", copy)
    assert planned.returncode == 0
    assert "add --yes to remove them" in planned.stderr
    assert _snapshot(copy) == before
    removed = crcjax("checkpoints", "prune", copy, "--yes")
    assert removed.stdout == planned.stdout.replace("would remove", "removed")
    (values,) = json.loads(crcjax("checkpoints", "list", copy, "--json").stdout)
    assert all(entry["predicts"] or entry["is_resumed_from"] for entry in values["checkpoints"])
    number = len(before) - len(_snapshot(copy))
    assert number > 0
    assert crcjax("checkpoints", "prune", copy, "--yes").stdout == ""


def test_the_checkpoints_of_an_ensemble_are_those_of_its_members(crcjax: Command, run: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        shutil.copytree(run, tmp_path / "ensemble" / f"seed-{seed}")
    values = json.loads(crcjax("checkpoints", "list", tmp_path / "ensemble", "--json").stdout)
    assert [Path(member["run"]).name for member in values] == ["seed-0", "seed-1"]
    assert len(set(crcjax("checkpoints", "best", tmp_path / "ensemble").stdout.splitlines())) == 1


def _public_key(folder: Path) -> Path:
    key, public = folder / "key.pem", folder / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    return public
