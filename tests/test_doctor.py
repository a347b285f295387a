"""The doctor names what is missing or short, and what to do about it."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from crcjax import doctor
from crcjax.doctor import Finding, examine

ABSENT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            raise ImportError("{module} is not here")

sys.meta_path.insert(0, Absent())
from crcjax.cli import main
sys.argv = ["crcjax", "doctor"]
main()
"""


def _about(folder: Path) -> dict[str, Finding]:
    return {finding.about: finding for finding in examine(folder)}


def test_it_tells_the_versions_devices_formats_and_room_of_this_machine(tmp_path: Path) -> None:
    findings = _about(tmp_path)
    assert findings["jax"].observed == importlib.metadata.version("jax")
    assert findings["devices"].observed.startswith(f"{jax.device_count()} x ")
    assert findings["cores"].observed == str(len(os.sched_getaffinity(0)))
    assert all(name in findings["slide formats"].observed for name in ("Aperio", "DICOM", "OME-TIFF"))
    assert float(findings["disk free"].observed.split()[0]) == pytest.approx(
        shutil.disk_usage("/tmp").free / 2**30, rel=0.1
    )


def test_a_package_that_is_not_installed_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ["no-such-package"])
    finding = _about(tmp_path)["no-such-package"]
    assert finding.observed == "missing"
    assert "pip install" in finding.remedy


def test_every_extra_that_a_command_asks_for_is_listed_and_a_missing_one_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = "".join(path.read_text() for path in Path(doctor.__file__).parent.rglob("*.py"))
    assert set(re.findall(r'require_extra\("[\w.]+", "(\w+)"', sources)) <= set(doctor.EXTRAS)
    monkeypatch.setitem(doctor.EXTRAS, "dicom", ("no-such-package", "crcjax pictures --dicom"))
    finding = _about(tmp_path)["extra dicom"]
    assert finding.observed == "not installed; crcjax pictures --dicom needs it: pip install 'crcjax[dicom]'"
    assert finding.remedy == ""


@pytest.mark.parametrize(
    ("module", "words"), [("openslide", "pip install openslide-bin"), ("jax", "install jax for this machine")]
)
def test_a_library_that_cannot_be_loaded_is_a_fault_and_status_1(module: str, words: str) -> None:
    done = subprocess.run([sys.executable, "-c", ABSENT.format(module=module)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    faults = " ".join(line for line in done.stdout.split("wrong: ")[1:])
    assert f"{module} is not here" in faults
    assert words in " ".join(faults.split())
    assert "Traceback" not in done.stderr


def test_a_small_disk_is_a_fault(small_disk: Path) -> None:
    assert _about(small_disk)["disk free"].remedy == "free disk space for tiles"


def test_a_folder_that_cannot_be_written_is_a_fault() -> None:
    finding = _about(Path("/proc"))["this folder"]  # not even by root
    assert finding.observed.startswith("/proc: ")
    assert finding.remedy == "work in a folder that you may write"


def test_little_memory_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LEAST_MEMORY_GIB", 1e6)
    assert _about(tmp_path)["memory free"].remedy == "close other programs"
