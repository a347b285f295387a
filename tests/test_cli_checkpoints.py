"""The commands of `crcjax checkpoints` and `crcjax predict --bundle`, as a user types them."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., subprocess.CompletedProcess]


def _table(out: Path) -> list[dict[str, str]]:
    with open(out / "predictions.csv", newline="") as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


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
