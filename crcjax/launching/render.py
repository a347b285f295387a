"""Writes the files of a scheduler for a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from crcjax.errors import InputError, writing
from crcjax.launching.job import TrainingJob
from crcjax.launching.kubernetes import kubernetes_files
from crcjax.launching.slurm import slurm_files

TARGETS: dict[str, Callable[[TrainingJob], dict[str, str]]] = {"slurm": slurm_files, "kubernetes": kubernetes_files}
# How a user submits the files in DIR.
SUBMIT = {"slurm": "sbatch {folder}/train.sbatch", "kubernetes": "kubectl apply -k {folder}"}


def render(job: TrainingJob, target: str, folder: Path) -> list[Path]:
    """Writes the files of the scheduler `target` into `folder`, replacing those of an earlier call, and returns their paths.

    Raises:
      InputError: `target` is not known, or the job lacks what it needs.
      OutputError: the folder cannot be written.
    """
    if target not in TARGETS:
        raise InputError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    text_by_name = TARGETS[target](job)
    with writing(folder, "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in text_by_name.items():
            (folder / name).write_text(text)
    return [folder / name for name in text_by_name]
