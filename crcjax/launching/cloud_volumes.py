"""Volumes where a cloud, and not the job, decides where they are mounted."""

from __future__ import annotations

import re
from collections.abc import Mapping

from crcjax.errors import InputError
from crcjax.launching.job import TrainingJob


def cloud_sources(job: TrainingJob, field: str, pattern: str, description: str) -> dict[str, str]:
    """The field `field` of every volume, by the volume's path.

    Raises InputError: the job has no volume, so that nothing of a run would outlive its machines, or a volume's field does
    not match `pattern`.
    """
    if not job.volumes:
        raise InputError(
            "the job needs a volume, on which stores and checkpoints outlive its machines; add [[volumes]]"
        )
    for volume in job.volumes:
        if not re.fullmatch(pattern, getattr(volume, field)):
            raise InputError(
                f"the volume {volume.claim}'s field {field} must be {description}, got {getattr(volume, field)!r}"
            )
    return {volume.path: getattr(volume, field) for volume in job.volumes}


def moved(text: str, mount_by_path: Mapping[str, str]) -> str:
    """A text with every path on a volume replaced by the path where the cloud mounts that volume.

    Paths are recognised at the start, and after `=`, `,` and `:`.
    """
    longest_first = sorted(mount_by_path, key=len, reverse=True)
    if not longest_first:
        return text
    paths = "|".join(re.escape(path.rstrip("/")) for path in longest_first)
    return re.sub(rf"(?:(?<=^)|(?<=[=,:]))(?:{paths})(?=$|[/,:])", lambda match: mount_by_path[match[0]], text)


def in_folder(folder: str, command: list[str]) -> list[str]:
    """A command that runs in a folder; its arguments reach it as they are."""
    return ["/bin/sh", "-c", 'cd "$0" && exec "$@"', folder, *command]


def supervised(job: TrainingJob, arguments: list[str]) -> list[str]:
    """The training command under `crcjax supervise`, for platforms that cannot tell a preemption from a failure.

    Status 85 starts the command again without counting, and a lost process as often as the job allows.
    """
    supervisor = ["crcjax", "supervise", f"--max-failures={job.restarts + 1}", "--"]
    return [*supervisor, "python", "-m", "crcjax.main", *arguments]
