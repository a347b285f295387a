"""The images: linted always; run from their root file systems where `make images` has built them."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "launch" / "container"
KINDS = ("edge", "service", "train")
PASSWORD = "correct horse battery"


def _sbom():
    spec = importlib.util.spec_from_file_location("sbom", CONTAINER / "sbom.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hadolint_and_shellcheck_pass() -> None:
    for program, files in (("hadolint", CONTAINER.glob("*.Dockerfile")), ("shellcheck", CONTAINER.glob("*.sh"))):
        done = subprocess.run([Path(sys.executable).with_name(program), *files], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_no_root_has_labels_and_pins_every_package(kind: str) -> None:
    text = (CONTAINER / f"{kind}.Dockerfile").read_text()
    last_stage = text.rpartition("FROM")[2]
    assert "\nUSER 10001:10001\n" in last_stage
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in last_stage
    locked = [line.partition(";")[0].strip() for line in (CONTAINER / f"{kind}.txt").read_text().splitlines()]
    assert all(re.fullmatch(r"[\w.\[\],-]+==[\w.+]+", line) for line in locked), locked
    names = {re.split(r"[\[=]", line)[0] for line in locked}
    project = ROOT / "launch" / "edge" if kind == "edge" else ROOT
    described = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    direct = {re.split(r"[\[<>=]", entry)[0].lower() for entry in described["dependencies"]}
    assert direct <= names


def test_the_bill_of_materials_lists_every_wheel_with_its_hash_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    for name in ("crcjax-0.1.0-py3-none-any.whl", "Some_Package-1.2-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr("a", name)
    (tmp_path / "lock.txt").write_text("some-package[extra]==1.2 ; python_version > '3'\n")
    own, other = _sbom().components(tmp_path / "lock.txt", tmp_path)
    assert (own["name"], own["version"]) == ("crcjax", "0.1.0")
    assert other["purl"] == "pkg:pypi/some-package@1.2"
    done = subprocess.run(["sha256sum", tmp_path / "Some_Package-1.2-py3-none-any.whl"], capture_output=True, text=True)
    assert other["hashes"][0]["content"] == done.stdout.split()[0]
    (tmp_path / "lock.txt").write_text("absent==1\n")
    with pytest.raises(SystemExit, match="has no wheel of absent==1"):
        _sbom().components(tmp_path / "lock.txt", tmp_path)


@pytest.fixture(scope="module")
def buildah(required: Callable[[str], bool]) -> Callable[..., list[str]]:
    """buildah(*words): the command of buildah over the images that `make images` has built."""
    storage = Path(os.environ.get("CRCJAX_IMAGES", ROOT / ".images"))
    if not shutil.which("buildah") or not (storage / "images").is_dir():
        message = f"no images in {storage}: make images"
        if required("images"):
            pytest.fail(message)
        pytest.skip(message)
    options = ["--root", str(storage / "images"), "--runroot", str(storage / "run"), "--storage-driver", "vfs"]
    return lambda *words: ["buildah", *options, *map(str, words)]


def _container(buildah: Callable[..., list[str]], image: str) -> str:
    done = subprocess.run(buildah("from", "--pull-never", f"localhost/{image}"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_the_edge_image_predicts_without_jax_and_without_root(buildah: Callable[..., list[str]]) -> None:
    container = _container(buildah, "crcjax-edge:0.1.0")
    try:
        run = ("run", "--isolation", "chroot", container, "--")
        done = subprocess.run(buildah(*run, "crcjax", "predict", "--help"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "--onnx" in done.stdout
        program = (
            "import importlib.util as u, os; print(os.getuid(), u.find_spec('jax'), os.access('/opt/crcjax', os.W_OK))"
        )
        done = subprocess.run(buildah(*run, "python3", "-c", program), capture_output=True, text=True)
        assert done.stdout.split() == ["10001", "None", "False"], done.stderr
        bill = subprocess.run(buildah(*run, "cat", "/opt/crcjax/sbom.json"), capture_output=True, text=True).stdout
        assert {"crcjax-edge", "onnxruntime"} <= {component["name"] for component in json.loads(bill)["components"]}
    finally:
        subprocess.run(buildah("rm", container), capture_output=True)


@pytest.mark.slow
def test_the_service_answers_a_prediction_from_the_root_file_system_of_its_image(
    buildah: Callable[..., list[str]], run: Path, painted: Path, tmp_path: Path
) -> None:
    from crcjax.data.cohort import load_cohort
    from crcjax.encryption.keys import create_key
    from crcjax.runs.bundle_export import export_bundle
    from crcjax.serve.client import Client

    shared = tmp_path / "shared"
    shared.mkdir()
    bundle = export_bundle([run], shared / "bundle").path
    create_key(shared / "site.keys")
    subprocess.run(["chown", "--recursive", "10001:10001", shared], check=True)
    container = _container(buildah, "crcjax-service:0.1.0")
    options = ["--port=0", "--state=/shared/state", f"--bundle=/shared/{bundle.name}", "--keys=file:/shared/site.keys"]
    command = buildah(
        "run", "--isolation", "chroot", "--network", "host", "--volume", f"{shared}:/shared", container, "--"
    )
    process = subprocess.Popen(
        [*command, "crcjax", "serve", *options, "--encrypted-volume"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        served = re.search(r"serving on (\S+) ", line)
        assert served, line + process.stderr.read()
        secret = process.stderr.readline().split()[-1]
        certificate = shared / "state" / "tls" / "certificate.pem"
        # The line comes before the port is open.
        curl = [
            "curl",
            "--silent",
            "--cacert",
            certificate,
            "--retry",
            "60",
            "--retry-connrefused",
            "--retry-delay",
            "1",
        ]
        subprocess.run([*curl, f"{served[1]}/livez"], check=True, stdout=subprocess.DEVNULL)
        with Client(served[1], verify=certificate) as guest:
            guest.request("POST", "/v1/redeem", json={"secret": secret, "password": PASSWORD})
            with Client.sign_in(served[1], "admin", PASSWORD, verify=certificate) as admin:
                new = {"name": "dr.frost", "role": "pathologist", "site": "leeds"}
                invitation = admin.request("POST", "/v1/accounts", json=new).json()["secret"]
            guest.request("POST", "/v1/redeem", json={"secret": invitation, "password": PASSWORD})
        with Client.sign_in(served[1], "dr.frost", PASSWORD, verify=certificate) as frost:
            path = Path(str(load_cohort(painted / "cohort.csv", None).rows[-1].path))
            prediction = frost.predict([frost.upload(path, "case")["id"]])
            (slide,) = frost.wait(prediction["id"], 240.0)["slides"]
        assert slide["call"] in ("canonical", "immune", "stromal")
    finally:
        process.terminate()
        # Shown if the test fails: why the service ended.
        print(process.communicate(timeout=60)[1])
        subprocess.run(buildah("rm", container), capture_output=True)
