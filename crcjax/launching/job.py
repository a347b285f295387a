"""The description of a training job, which every scheduler's files are rendered from."""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

from crcjax.errors import InputError

# A label of DNS (RFC 1123), at most 40 characters: Kubernetes makes the names of pods from it.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Volume:
    """Storage that all nodes see: the persistent volume claim `claim` of Kubernetes, mounted at `path`.

    With SLURM, `path` is a folder of the cluster's shared file system. The clouds have their own names for it: `efs` is an
    Elastic File System of AWS (fs-…), `azure` a folder of an Azure ML datastore (azureml://datastores/NAME/paths/…), `gcp`
    an NFS share such as Filestore's (SERVER:/SHARE).
    """

    claim: str
    path: str
    read_only: bool = False
    efs: str = ""
    azure: str = ""
    gcp: str = ""


@dataclass(frozen=True)
class Cohort:
    """Tiling and prediction of a cohort by the tasks of two arrays of SLURM, each task with a shard of the slides.

    `tile` and `predict` are arguments of crcjax tile and crcjax predict, with --out. One task has the given CPUs, memory and
    GPUs; tiling uses no GPU. `restarts` bounds how often a task starts again after its process was killed.
    """

    tile: tuple[str, ...]
    predict: tuple[str, ...]
    shards: int
    cpus: int
    memory_gib: int
    time_limit_h: int
    gpus: int = 1
    restarts: int = 3


@dataclass(frozen=True)
class AwsBatch:
    """The job queue of AWS Batch, the role of the containers, and the secret in Secrets Manager that the processes share."""

    queue: str
    role_arn: str = ""
    secret_arn: str = ""


@dataclass(frozen=True)
class SageMaker:
    """What SageMaker needs beside the job: the machines, its role, an S3 address for outputs, and the network of the volumes."""

    instance_type: str
    role_arn: str
    output: str
    subnets: tuple[str, ...]
    security_groups: tuple[str, ...]


@dataclass(frozen=True)
class AzureMl:
    """The compute cluster of an Azure ML workspace. Whether its machines are spot capacity is set there."""

    compute: str


@dataclass(frozen=True)
class Vertex:
    """What Vertex AI needs beside the job: region, machines, and the network that reaches the volumes' servers."""

    region: str
    machine_type: str
    accelerator: str = ""
    network: str = ""
    service_account: str = ""


@dataclass(frozen=True)
class TrainingJob:
    """A training job: one process a node, with all of the node's GPUs.

    `arguments` are those of crcjax.main. `grace_s` is the time in seconds between the signal to stop and the end of the
    processes; a checkpoint must be saved in it. `restarts` bounds how often the job starts again after it lost a process;
    preemptions are not counted. `shared_memory_gib` is the size of /dev/shm. `image` is a container image. `spot` asks for
    capacity that a cloud may take back, where the job and not its queue decides that. `modules` and `apptainer` are the
    environment modules and the image file that SLURM's nodes load.
    """

    name: str
    arguments: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    memory_gib: int
    time_limit_h: int
    grace_s: int
    restarts: int
    image: str = ""
    shared_memory_gib: int = 8
    queue: str = ""
    priority: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    volumes: tuple[Volume, ...] = ()
    spot: bool = False
    modules: tuple[str, ...] = ()
    apptainer: str = ""
    cohort: Cohort | None = None
    aws_batch: AwsBatch | None = None
    sagemaker: SageMaker | None = None
    azure_ml: AzureMl | None = None
    vertex: Vertex | None = None


# The tables of a job's file that are dataclasses of their own.
_TABLES: dict[str, type] = {
    "cohort": Cohort,
    "aws_batch": AwsBatch,
    "sagemaker": SageMaker,
    "azure_ml": AzureMl,
    "vertex": Vertex,
}


def read_job(path: Path) -> TrainingJob:
    """The job that a TOML file describes. Raises InputError: the file or one of its fields is not usable."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the TOML file of a job") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}; launch/job.toml is an example") from error
    tables = values.pop("volumes", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{path}: volumes must be tables, each headed [[volumes]], got {tables!r}")
    volumes = tuple(Volume(**_checked(Volume, table, f"{path}: a volume's ")) for table in tables)
    described = {}
    for name, kind in _TABLES.items():
        if name in values:
            table = values.pop(name)
            if not isinstance(table, dict):
                raise InputError(f"{path}: {name} must be a table headed [{name}], got {table!r}")
            described[name] = kind(**_checked(kind, table, f"{path}: {name}'s "))
    job = TrainingJob(**_checked(TrainingJob, values, f"{path}: "), volumes=volumes, **described)
    _check(job, path)
    return job


def _checked(kind: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a table, if they are the fields of `kind` and have their types."""
    types = {name: type_ for name, type_ in get_type_hints(kind).items() if name not in ("volumes", *_TABLES)}
    if unknown := sorted(values.keys() - types.keys()):
        raise InputError(f"{where}field {unknown[0]!r} is not known; the fields are {', '.join(types)}")
    needed = [known.name for known in fields(kind) if known.default is MISSING and known.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise InputError(f"{where}field {missing[0]!r} is missing; add it, as in launch/job.toml")
    checked = {}
    for name, value in values.items():
        expected, is_right = _KINDS[str(types[name])]
        if not is_right(value):
            raise InputError(f"{where}{name} must be {expected}, got {value!r}")
        checked[name] = tuple(value) if isinstance(value, list) else value
    return checked


def _is_text(value: object) -> bool:
    # A line break or a NUL would end a line of a rendered file.
    return isinstance(value, str) and value.isprintable()


_KINDS = {
    str(str): ("one line of text", _is_text),
    str(int): ("a whole number", lambda value: type(value) is int),
    str(bool): ("true or false", lambda value: type(value) is bool),
    str(tuple[str, ...]): (
        "a list of texts",
        lambda value: isinstance(value, list) and all(_is_text(item) for item in value),
    ),
    str(dict[str, str]): (
        "a table of texts",
        lambda value: isinstance(value, dict) and all(_is_text(item) for item in value.values()),
    ),
}


def _check(job: TrainingJob, path: Path) -> None:
    """Raises InputError: a value of the job is out of its range."""
    if not _NAME.fullmatch(job.name):
        raise InputError(
            f"{path}: name must be at most 40 lower-case letters, digits and hyphens, and begin with a letter, got {job.name!r}"
        )
    for flag in ("--config", "--workdir"):
        if not any(argument == flag or argument.startswith(f"{flag}=") for argument in job.arguments):
            raise InputError(f"{path}: arguments must contain {flag}, as in launch/job.toml, got {list(job.arguments)}")
    for name in ("nodes", "cpus_per_node", "memory_gib", "time_limit_h", "grace_s"):
        if getattr(job, name) < 1:
            raise InputError(f"{path}: {name} must be at least 1, got {getattr(job, name)}")
    for name in ("gpus_per_node", "restarts", "shared_memory_gib"):
        if getattr(job, name) < 0:
            raise InputError(f"{path}: {name} must not be negative, got {getattr(job, name)}")
    _check_cohort(job, path)
    if job.grace_s >= job.time_limit_h * 3600:
        raise InputError(
            f"{path}: grace_s must be shorter than time_limit_h, got {job.grace_s} s of {job.time_limit_h} h"
        )
    if wrong := [name for name in job.environment if not _VARIABLE.fullmatch(name)]:
        raise InputError(f"{path}: environment names a variable {wrong[0]!r}; names are letters, digits and _")
    if wrong := [name for name in job.environment if "SECRET" in name.upper() or "PASSWORD" in name.upper()]:
        raise InputError(
            f"{path}: environment contains {wrong[0]}, and rendered files are no place for secrets; the launchers make the "
            "rendezvous secret themselves"
        )
    for volume in job.volumes:
        if not PurePosixPath(volume.path).is_absolute() or ".." in PurePosixPath(volume.path).parts:
            raise InputError(f"{path}: a volume's path must be absolute and without '..', got {volume.path!r}")
        if not _NAME.fullmatch(volume.claim):
            raise InputError(
                f"{path}: a volume's claim must be the name of a persistent volume claim, got {volume.claim!r}"
            )
    if len({volume.path for volume in job.volumes}) < len(job.volumes):
        raise InputError(f"{path}: two volumes have the same path; give each its own")


def _check_cohort(job: TrainingJob, path: Path) -> None:
    if job.cohort is None:
        return
    for name in ("shards", "cpus", "memory_gib", "time_limit_h"):
        if getattr(job.cohort, name) < 1:
            raise InputError(f"{path}: cohort's {name} must be at least 1, got {getattr(job.cohort, name)}")
    for name in ("gpus", "restarts"):
        if getattr(job.cohort, name) < 0:
            raise InputError(f"{path}: cohort's {name} must not be negative, got {getattr(job.cohort, name)}")
    for name in ("tile", "predict"):
        arguments = getattr(job.cohort, name)
        if not any(argument.startswith("--out=") for argument in arguments):
            raise InputError(f"{path}: cohort's {name} must contain --out=FOLDER, got {list(arguments)}")
        if any(argument.startswith("--shard") for argument in arguments):
            raise InputError(f"{path}: cohort's {name} must not contain --shard, which the tasks of the array add")
