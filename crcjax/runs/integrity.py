"""Integrity of checkpoints: a manifest with the SHA-256 of every file, written last, signed on request, and verified.

Orbax and TensorStore do not notice a flipped bit in an array. The manifest does, from the moment it is written; that the
files were right at that moment, `array_hashes` establishes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from crcjax.errors import InputError
from crcjax.runs.checkpoint_folder import ABOUT, FOLDER, MANIFEST, SIGNATURE, finished_steps, step_folder
from crcjax.runs.signature import is_signed_by, is_signed_by_hex, public_key_of, sign
from crcjax.slides.jobs.usable_cores import usable_cores

_FORMAT = 1
# Where Orbax wrote the metrics of older checkpoints.
_OLDER_METRICS = "metrics/metrics"


@dataclass(frozen=True)
class DamagedFile:
    """One damaged file of a checkpoint: its path within the checkpoint's folder, and what is wrong with it."""

    path: str
    reason: str


@dataclass(frozen=True)
class CheckpointVerdict:
    """The result of verifying a checkpoint.

    Attributes:
      step: the step by the folder's name.
      folder: the folder.
      damaged: the damaged files; empty for a whole checkpoint.
      has_manifest: False for an older checkpoint, whose files cannot be verified, and if the manifest is missing.
      is_signed: whether it has a signature.
    """

    step: int
    folder: Path
    damaged: tuple[DamagedFile, ...]
    has_manifest: bool
    is_signed: bool

    @property
    def reason(self) -> str:
        """One word for the first damage; empty for a whole checkpoint."""
        return self.damaged[0].reason.split()[0].strip(",:") if self.damaged else ""


def verify_run(run: str | Path, public_key: Path | None = None) -> list[CheckpointVerdict]:
    """Verifies every checkpoint of a run, oldest first, and changes nothing.

    With a public key, a checkpoint without a signature by that key counts as damaged. Raises InputError if the run has no
    checkpoints or the key cannot be used.
    """
    if not (Path(run) / FOLDER).is_dir():
        raise InputError(f"{run}: has no checkpoints; train it with crcjax train --workdir {run}")
    return [verify_checkpoint(step_folder(run, step), public_key) for step in finished_steps(run)]


def verify_checkpoint(
    folder: Path, public_key: Path | None = None, private_key: Path | None = None
) -> CheckpointVerdict:
    """Compares the files of a checkpoint with its manifest, and changes nothing.

    Args:
      folder: RUN/checkpoints/STEP.
      public_key: the key that must have signed the manifest.
      private_key: the same, for a run that signs with it.
    """
    step = int(folder.name)
    signature = _read(folder / SIGNATURE)
    content = _read(folder / MANIFEST)
    if content is None:
        damaged = []
        if (folder / ABOUT).exists() or signature is not None or public_key or private_key:
            damaged.append(DamagedFile(MANIFEST, "missing, so that no file can be verified"))
        return CheckpointVerdict(step, folder, tuple(damaged), False, signature is not None)
    try:
        manifest = _parsed(content, step)
        damaged = _signature_damage(manifest.get("public_key", ""), content, signature, public_key, private_key)
        damaged += _file_damage(folder, _listed_files(manifest))
    except ValueError as error:
        damaged = [DamagedFile(MANIFEST, str(error))]
    return CheckpointVerdict(step, folder, tuple(damaged), True, signature is not None)


def step_metrics(run: str | Path, step: int) -> dict[str, float] | None:
    """The validation metrics of a checkpoint; None if it was not evaluated. Raises InputError if they are damaged."""
    folder = step_folder(run, step)
    content = _read(folder / MANIFEST)
    try:
        if content is not None:
            return _parsed(content, step)["metrics"]
        if (folder / ABOUT).exists():
            raise ValueError("missing")
        older = _read(folder / _OLDER_METRICS)
        return None if older is None else {name: float(value) for name, value in json.loads(older).items()}
    except (ValueError, TypeError, AttributeError) as error:
        name = _OLDER_METRICS if content is None and not (folder / ABOUT).exists() else MANIFEST
        raise InputError(f"{folder / name}: {error}; to leave the checkpoint out, rename {folder}") from error


def write_manifest(
    folder: Path, step: int, metrics: Mapping[str, float] | None = None, private_key: Path | None = None
) -> int:
    """Writes the manifest of a complete checkpoint folder, atomically and durably; returns the bytes of all files.

    `private_key` signs it. Raises OSError, and InputError for a key that cannot be used.
    """
    paths = _files(folder)
    with ThreadPoolExecutor(usable_cores()) as threads:
        digests = threads.map(_hash, (folder / path for path in paths))
        sizes = {path: (folder / path).stat().st_size for path in paths}
        entries = {path: {"bytes": sizes[path], "sha256": digest} for path, digest in zip(paths, digests, strict=True)}
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "step": step,
        "metrics": metrics,
        # With it, a damaged signature is noticed by those who do not have the key.
        "public_key": public_key_of(private_key) if private_key else "",
        "files": entries,
    }
    content = _text(manifest | {"manifest_sha256": _digest(manifest)})
    if private_key:
        write_durably(folder / SIGNATURE, sign(private_key, content))
    write_durably(folder / MANIFEST, content)
    return sum(sizes.values())


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file so that after a crash it is there whole, or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_files(folder: Path) -> None:
    """Makes the files of a folder durable, and drops them from memory, so that reading them reads the disk. Raises OSError."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parsed(content: bytes, step: int) -> dict[str, Any]:
    """The manifest of a step. Raises ValueError, with the reason, for a damaged manifest."""
    try:
        manifest = json.loads(content)
        stated = manifest.pop("manifest_sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("empty" if not content else "unreadable") from None
    # The text is compared too, since JSON ignores some changes of it.
    if stated != _digest(manifest) or content != _text(manifest | {"manifest_sha256": stated}):
        raise ValueError("changed: its own SHA-256 does not match")
    if manifest["format"] != _FORMAT:
        raise ValueError(f"unknown format {manifest['format']}; a newer crcjax wrote it")
    if manifest["step"] != step:
        raise ValueError(f"swapped: it is the manifest of step {manifest['step']}")
    return manifest


def _listed_files(manifest: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The size and SHA-256 of each file."""
    return {path: (entry["bytes"], entry["sha256"]) for path, entry in manifest["files"].items()}


def _text(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _digest(manifest: dict[str, Any]) -> str:
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _signature_damage(
    stated_key: str, content: bytes, signature: bytes | None, public_key: Path | None, private_key: Path | None
) -> list[DamagedFile]:
    """The damage to a signature, or to a signed manifest. Raises ValueError if `stated_key` is no public key."""
    if not (stated_key or public_key or private_key):
        return []
    if signature is None:
        return [DamagedFile(SIGNATURE, "missing, and the run has a key")]
    if stated_key and not is_signed_by_hex(stated_key, content, signature):
        return [DamagedFile(SIGNATURE, f"changed, or {MANIFEST} is: they do not match")]
    is_valid = is_signed_by(public_key, content, signature) if public_key else True
    # Ed25519 signatures are deterministic (RFC 8032, section 5.1.6).
    if private_key and sign(private_key, content) != signature:
        is_valid = False
    return [] if is_valid else [DamagedFile(MANIFEST, "edited, or signed by another key")]


def _file_damage(folder: Path, files: dict[str, tuple[int, str]]) -> list[DamagedFile]:
    existing = {path for path in _files(folder) if path not in (MANIFEST, SIGNATURE)}
    damaged = [DamagedFile(path, "missing") for path in sorted(set(files) - existing)]
    damaged += [DamagedFile(path, "extra: the manifest does not list it") for path in sorted(existing - set(files))]
    same_size = []
    for path in sorted(existing & set(files)):
        size, listed_size = (folder / path).stat().st_size, files[path][0]
        if size == listed_size:
            same_size.append(path)
        else:
            kind = "empty" if not size else "truncated" if size < listed_size else "longer"
            damaged.append(DamagedFile(path, f"{kind}: {size} bytes, the manifest lists {listed_size}"))
    with ThreadPoolExecutor(usable_cores()) as threads:
        reasons = threads.map(lambda path: _content_damage(folder / path, files[path][1]), same_size)
        return damaged + [DamagedFile(*pair) for pair in zip(same_size, reasons, strict=True) if pair[1]]


def _content_damage(path: Path, listed_sha256: str) -> str:
    try:
        return "" if _hash(path) == listed_sha256 else "changed: its SHA-256 is not the manifest's"
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _files(folder: Path) -> list[str]:
    """The files of a checkpoint except hidden ones, which file systems and editors leave behind."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if not any(part.startswith(".") for part in path.parts))


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> bytes | None:
    """The content of a file; None if there is none, empty if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return b""
