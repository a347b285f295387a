"""Examines this machine: versions, devices, slide formats and free resources, and the faults with their remedies."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from crcjax.errors import InputError
from crcjax.monitor.gpu_sensors import GpuSensors
from crcjax.serve import viewer_library
from crcjax.slides.jobs.usable_cores import usable_cores

PACKAGES = [
    "crcjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorstore",
    "openslide-python",
    "openslide-bin",
    "numpy",
    "tifffile",
    "imagecodecs",
]
# A package of every optional extra, and what needs it.
EXTRAS = {
    "dicom": ("highdicom", "crcjax pictures --dicom"),
    "h5": ("h5py", "crcjax import and export of HDF5 files"),
    "launch": ("kubernetes-validate", "schemas in crcjax launch check"),
    "monitor": ("nvidia-ml-py", "readings of GPUs"),
    "notebook": ("anndata", "to_pandas() and to_anndata()"),
    "onnx": ("onnx-ir", "crcjax export-model"),
    "parquet": ("pyarrow", "tables as Parquet"),
    "pdf": ("weasyprint", "crcjax validate --pdf"),
    "redis": ("redis", "crcjax serve --redis"),
    "serve": ("fastapi", "crcjax serve"),
    "stats": ("statsmodels", "survival in validation"),
}
FORMATS = (
    "Aperio (.svs, .tif) · Hamamatsu (.ndpi, .vms, .vmu) · Leica (.scn) · MIRAX (.mrxs) · Philips (.tiff) · Sakura "
    "(.svslide) · Trestle (.tif) · Ventana (.bif, .tif) · Zeiss (.czi) · DICOM (.dcm, one folder per slide) · tiled TIFF; "
    "OME-TIFF (.ome.tif, .ome.tiff) is read without OpenSlide"
)
_LEAST_FREE_GIB = 5.0
_LEAST_MEMORY_GIB = 4.0


@dataclass(frozen=True)
class Finding:
    """One line of the report: the subject, the observation, and the remedy if the observation is a fault."""

    about: str
    observed: str
    remedy: str = ""


def examine(folder: Path) -> list[Finding]:
    """Examines the installation and `folder`, where output would be written; findings with a remedy are faults."""
    findings = [Finding("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            findings.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "missing", "install crcjax again: pip install ."))
    findings += [_extra(name) for name in EXTRAS]
    findings += [_viewer(), _devices(), _gpu_readings(), _openslide(), *_machine(folder)]
    return findings


def _extra(name: str) -> Finding:
    """Reports an optional extra; a missing one is no fault."""
    package, purpose = EXTRAS[name]
    try:
        observed = f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        observed = f"not installed; {purpose} needs it: pip install 'crcjax[{name}]'"
    return Finding(f"extra {name}", observed)


def _viewer() -> Finding:
    """Reports the viewer of the service's page; a missing one is no fault."""
    about, name = "zooming viewer", f"{viewer_library.PACKAGE} {viewer_library.VERSION}"
    try:
        is_installed = viewer_library.read_script() is not None
    except InputError as error:
        return Finding(about, str(error), f"install it again: {viewer_library.INSTALL}")
    if is_installed:
        return Finding(about, f"{name}: {viewer_library.default_file()}")
    return Finding(about, f"not installed; the page of crcjax serve zooms with it: {viewer_library.INSTALL}")


def _devices() -> Finding:
    try:
        import jax

        devices = jax.devices()
    except (ImportError, RuntimeError) as error:
        return Finding("devices", f"none ({error})", "install jax for this machine: pip install '.[cuda12]' with a GPU")
    description = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        return Finding(
            "devices", f"{description} despite an NVIDIA driver", "install jax for GPUs: pip install '.[cuda12]'"
        )
    return Finding("devices", description)


def _gpu_readings() -> Finding:
    """The GPUs that NVML finds. A machine without GPUs has no fault."""
    sensors = GpuSensors()
    gpus = sensors.read()
    sensors.close()
    described = [f"{gpu.name}{f' {gpu.temperature_c} °C' if gpu.temperature_c is not None else ''}" for gpu in gpus]
    return Finding("GPU readings", sensors.absent or ", ".join(described) or "no GPU is visible")


def _openslide() -> Finding:
    try:
        import openslide
    except (ImportError, OSError) as error:
        return Finding("slide formats", f"none ({error})", "install OpenSlide: pip install openslide-bin")
    return Finding("slide formats", f"OpenSlide {openslide.__library_version__}: {FORMATS}")


def _machine(folder: Path) -> list[Finding]:
    cores = usable_cores()
    memory = psutil.virtual_memory().available / 2**30
    free = shutil.disk_usage(folder).free / 2**30
    try:
        with tempfile.TemporaryFile(dir=folder):
            writable = Finding("this folder", f"{folder} can be written")
    except OSError as error:
        writable = Finding("this folder", f"{folder}: {error.strerror}", "work in a folder that you may write")
    return [
        Finding("cores", str(cores)),
        Finding("memory free", f"{memory:.1f} GiB", "" if memory >= _LEAST_MEMORY_GIB else "close other programs"),
        Finding("disk free", f"{free:.1f} GiB", "" if free >= _LEAST_FREE_GIB else "free disk space for tiles"),
        writable,
    ]
