"""The run directory: the resolved config, and the versions, tiling and cases that the run's numbers depend on."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from hashlib import file_digest, sha256
from io import StringIO
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import crcjax
from crcjax.config import get_config
from crcjax.config_names import renamed_fields
from crcjax.data.cohort import Cohort
from crcjax.errors import InputError, writing
from crcjax.runs.code_id import code_id
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.slides.tiling.plan import TilingParams

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy", "openslide-bin")
# The training and validation slides of a run, with labels and content hashes.
DATA_MANIFEST = "data_manifest.csv"
# Fields that a resumed run may change: they change reading speed, reports and the mesh, and numbers by rounding alone.
_FREE = {
    "data.read_threads",
    "data.workers",
    "data.prefetch",
    "data.device_prefetch",
    "train.log_every",
    "train.replica_check_every",
    "train.stall_timeout_s",
    "train.save_timeout_s",
    "train.keep_newest",
    "train.keep_best",
    "train.keep_best_by",
    "train.keep_every",
    "train.signing_key",
    "train.peer_timeout_s",
    "train.preemption_notice",
    "train.checkpoint_minutes",
    "train.mtbf_hours",
    "health.recompute_every",
    "health.stuck_reports",
    "monitor.interval_s",
    "monitor.metrics_port",
    "monitor.metrics_address",
    "monitor.notifications",
}
# Fields that hold paths.
PATHS = ("data.store", "data.cohort", "model.weights", "tasks.labels")
_FREE |= {"train.micro_batches", "train.memory_gib", "mesh.data", "mesh.bag", "mesh.model", "mesh.fsdp_min_size"}


@dataclass(frozen=True)
class Run:
    """An existing run directory.

    Attributes:
      path: the directory.
      config: the config of the run.
      tiling: how its slides were tiled.
      split_of: the split of each training and validation slide and case, by id.
      normaliser: the stain normaliser of config.stain.
      encoder_sha256: the SHA-256 of the file of the published encoder's weights; None without one, and in older runs.
      synthetic: whether any of its slides is synthetic; None in older runs.
    """

    path: Path
    config: ConfigDict
    tiling: TilingParams
    split_of: dict[str, str]
    normaliser: StainNormaliser | None
    encoder_sha256: str | None = None
    synthetic: bool | None = None

    def ids(self, split: str) -> list[str]:
        """The ids of the slides and cases of one split."""
        return [name for name, name_split in self.split_of.items() if name_split == split]


def open_run(path: str | Path) -> Run:
    """Opens a run directory. Config fields that did not exist when it was made have their defaults.

    Raises InputError if it is not a run directory.
    """
    path = Path(path)
    try:
        config = config_from_json(json.loads((path / "config.json").read_text()))
        facts = json.loads((path / "run.json").read_text())
        tiling, split_of, stain = TilingParams.from_json(facts["tiling"]), facts["split_of"], facts["stain"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: is not a run directory ({error}); give the --workdir of crcjax train") from error
    normaliser = StainNormaliser.from_json(stain) if stain else None
    return Run(path, config, tiling, split_of, normaliser, facts.get("encoder_sha256"), facts.get("synthetic"))


def member_runs(path: str | Path) -> list[Path]:
    """The run directories of an ensemble that was trained in one directory, or the directory itself."""
    path = Path(path)
    return sorted(config.parent for config in path.glob("seed-*/config.json")) or [path]


def config_from_json(values: dict[str, Any]) -> ConfigDict:
    """The config with these values, and the defaults of fields that did not exist when they were written.

    Raises ValueError, KeyError, AttributeError or TypeError for values that are no config.
    """
    config = get_config()
    config.update(renamed_fields(_tuples(values)))
    return config


def start_run(
    path: Path,
    config: ConfigDict,
    tiling: TilingParams,
    cohort: Cohort,
    normaliser: StainNormaliser | None = None,
    is_main: bool = True,
    *,
    content_hash: Mapping[str, str] | None = None,
    encoder_sha256: str | None = None,
    synthetic: bool | None = None,
) -> None:
    """Writes config.json, run.json and data_manifest.csv, or checks the first two if the run exists.

    Args:
      path: the run directory.
      config: the whole config.
      tiling: how the slides were tiled.
      cohort: the training and validation slides.
      normaliser: the stain normaliser.
      is_main: whether this process writes; other processes wait for the files and check them.
      content_hash: the content hash of each slide, by its id, for the data manifest.
      encoder_sha256: the SHA-256 of the file of the published encoder's weights.
      synthetic: whether any of the slides is synthetic.

    Raises:
      InputError: the run was started with another config, tiling, cohort, stain reference or encoder; the message names
        the difference.
      OutputError: the directory cannot be written.
    """
    if not is_main:
        _await(path / "config.json")
    # By slide id and by case id, since prediction looks up both.
    split_of = {name: row.split for row in cohort.rows for name in (row.slide_id, row.case_id)}
    if (path / "config.json").exists():
        run = open_run(path)
        # Batch norms compute statistics over one micro-batch, so that its size changes the training.
        free = _FREE - {"train.micro_batches"} if config.model.batch_norm_momentum else _FREE
        if changed := _changed(_settings(run.config), _settings(config), free):
            raise InputError(
                f"{path}: was started with another config ({changed}); give another --workdir, or the same values"
            )
        if changed := _changed(dict(_leaves(run.tiling.to_json())), dict(_leaves(tiling.to_json()))):
            raise InputError(
                f"{path}: was started on slides that were tiled in another way ({changed}); give another --workdir"
            )
        moved = sorted(name for name in run.split_of | split_of if run.split_of.get(name) != split_of.get(name))
        if moved:
            difference = f"{moved[0]} was in {run.split_of.get(moved[0])}, is in {split_of.get(moved[0])}"
            raise InputError(f"{path}: was started on another cohort ({difference}); give another --workdir")
        if normaliser and (not run.normaliser or run.normaliser.to_json() != normaliser.to_json()):
            raise InputError(
                f"{path}: config.stain.reference was tiled anew since it was started; give another --workdir"
            )
        if encoder_sha256 and run.encoder_sha256 not in (None, encoder_sha256):
            raise InputError(
                f"{path}: was started with the weights {run.encoder_sha256}, and {config.model.weights} holds "
                f"{encoder_sha256}; give that file, or another --workdir"
            )
        return
    with writing(path, "choose another --workdir"):
        path.mkdir(parents=True, exist_ok=True)
        facts = code_facts() | {
            "tiling": tiling.to_json(),
            "split_of": split_of,
            "stain": normaliser.to_json() if normaliser else None,
            "encoder_sha256": encoder_sha256,
            "synthetic": synthetic,
        }
        (path / DATA_MANIFEST).write_text(_data_manifest(cohort, content_hash or {}), newline="")
        (path / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
        # Written last: a run with a config.json has started.
        (path / "config.json").write_text(_config_text(config))


def _data_manifest(cohort: Cohort, content_hash: Mapping[str, str]) -> str:
    """The training and validation slides as CSV, with labels and content hashes, sorted by slide id."""
    text = StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("slide_id", "case_id", "split", "label", "site", "scanner", "content_hash"))
    for row in sorted(cohort.rows, key=lambda row: row.slide_id):
        hash_or_empty = content_hash.get(row.slide_id, "")
        table.writerow((row.slide_id, row.case_id, row.split, row.label, row.site, row.scanner, hash_or_empty))
    return text.getvalue()


def code_facts() -> dict[str, Any]:
    """The versions of crcjax and of the packages that a run's numbers depend on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"code_version": crcjax.__version__, "commit": commit(), "versions": versions}


def training_facts(config: ConfigDict, path: Path) -> dict[str, Any]:
    """The config and the code that train, and the SHA-256 of the config (as config.json is written) and of the data manifest."""
    manifest = path / DATA_MANIFEST
    return code_facts() | {
        "config": config.to_dict(),
        "config_sha256": sha256(_config_text(config).encode()).hexdigest(),
        "data_sha256": sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else "",
    }


def _config_text(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1) + "\n"


def common_facts(config: ConfigDict, path: Path) -> dict[str, str]:
    """The facts that must be equal in all processes of a run, by name.

    They are the config, the run directory, the code, the packages, and the content of the cohort, store, weights and labels.
    """
    cohort = Path(config.data.cohort)
    slides = sorted(Path(config.data.store).glob("*.zarr/zarr.json")) if config.data.store else []
    listing = sha256()
    for slide in slides:
        listing.update(slide.parent.name.encode() + slide.read_bytes())
    other_files = {"the weights": config.model.weights, "the labels": config.tasks.labels}
    return {
        "--workdir": str(path),
        **{f"config.{name}": repr(value) for name, value in _settings(config).items()},
        "crcjax": f"{crcjax.__version__}, commit {commit()}, source {code_id()}",
        "Python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "the cohort file": sha256(cohort.read_bytes()).hexdigest()[:12] if cohort.is_file() else "absent",
        "the store": f"{len(slides)} slides, listing {listing.hexdigest()[:12]}",
        **{name: _digest(Path(path)) for name, path in other_files.items() if path},
    }


def _digest(path: Path) -> str:
    """A hash of a file, or of all files of a folder; "absent" if a file cannot be read."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = sha256()
    for file in files:
        try:
            with open(file, "rb") as opened:
                digest.update(file.name.encode() + file_digest(opened, "sha256").digest())
        except OSError:
            return "absent"
    return digest.hexdigest()[:12]


def _await(file: Path) -> None:
    """Waits up to 30 s for a file of another machine: network file systems show it with a delay. Raises InputError."""
    for _ in range(300):
        if file.exists():
            return
        time.sleep(0.1)
    raise InputError(
        f"{file} must be visible to all processes, but only process 0 sees it; try a --workdir that all machines share"
    )


def _settings(config: ConfigDict) -> dict[str, object]:
    """The value of every field by its dotted name. Paths are absolute, so that spellings of one path are equal."""
    leaves = dict(_leaves(config))
    return leaves | {name: str(Path(str(leaves[name])).resolve()) for name in PATHS if leaves[name]}


def _changed(before: dict[str, object], now: dict[str, object], free: Set[str] = frozenset()) -> str:
    """The first five settings that differ, as text; empty if all are equal."""
    names = [name for name in sorted(before | now) if name not in free and before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names[:5])


def _leaves(config: ConfigDict | dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _tuples(value: Any) -> Any:
    """Converts the lists of a JSON value to tuples, as the config has them."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def commit() -> str | None:
    """The commit of a source checkout, with a + for uncommitted changes; None without a checkout."""
    root = Path(crcjax.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or None
