"""A training job, and the tiling and prediction of a cohort, as batch scripts of SLURM."""

from __future__ import annotations

import shlex
from importlib.resources import files

from crcjax.launching.job import Cohort, TrainingJob

_ABOUT = """# Trains on the nodes of a SLURM job, with one process per node that uses all of the node's GPUs (docs/slurm.md):
#
#   sbatch --nodes=4 --gpus-per-node=8 --mail-user=YOU train.sbatch --config configs/epoc.py --workdir RUN [...]
#
# With --array=0-4 and --config.data.folds=5, each task of the array trains one fold, in RUN/fold-I/seed-S, where
# crcjax crossvalidate --out RUN expects it. Options of sbatch on the command line override the lines below, and arguments
# after the script replace those of the job. Rendered by crcjax launch render: edit the job's TOML file, not this one.
"""


_ABOUT_ARRAY = """# crcjax {name} for a cohort, by the tasks of an array, each with a shard of the slides (docs/slurm.md):
#
#   sbatch --array=1-{shards} {name}.sbatch
#   sbatch --dependency=afterany:JOB {name}.sbatch        # the merge, without --array: completes what a task left out
#
# cohort.sh submits both, for tiling and then for prediction. Rendered by crcjax launch render: edit the job's TOML file, not
# this one.
"""
_COHORT = """#!/bin/bash
# Submits tiling and prediction of the cohort: two arrays, each with a merge after it (docs/slurm.md).
#
#   bash cohort.sh [OPTIONS OF SBATCH]
#
# Prints the numbers of the jobs. Rendered by crcjax launch render: edit the job's TOML file, not this one.
set -euo pipefail
folder=$(dirname "$0")
after=()
for stage in tile predict; do
  array=$(sbatch --parsable --array="1-${{CRCJAX_SHARDS:-{shards}}}" --mail-type=NONE "${{after[@]}}" "$@" "$folder/$stage.sbatch")
  # Whatever became of the tasks: the merge completes their work.
  merge=$(sbatch --parsable --dependency="afterany:$array" "$@" "$folder/$stage.sbatch")
  echo "$stage: array $array, merge $merge"
  # 1: some slides cannot be processed; the others are still predicted.
  after=(--dependency="afterany:$merge")
done
"""


def slurm_files(job: TrainingJob) -> dict[str, str]:
    """The batch scripts of a job, by their file names. SLURM's own file systems take the place of `volumes` and `image`."""
    options: dict[str, object] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": job.cpus_per_node,
        "mem": f"{job.memory_gib}G",
        "time": f"{job.time_limit_h}:00:00",
        "signal": f"USR1@{job.grace_s}",
        "open-mode": "append",
        "mail-type": "BEGIN,END,FAIL,REQUEUE,TIME_LIMIT",
    }
    if job.gpus_per_node:
        options["gpus-per-node"] = job.gpus_per_node
    if job.queue:
        options["partition"] = job.queue
    if job.priority:
        options["qos"] = job.priority
    settings = [
        "# The job's arguments, unless others are given.",
        f"[ $# -gt 0 ] || set -- {shlex.join(job.arguments)}",
        "# How often the job starts again after it lost a process, or a device computed wrongly.",
        f"RESTARTS={job.restarts}",
    ]
    scripts = {"train.sbatch": _script(_ABOUT, options, job, settings, "slurm_train.bash")}
    return scripts if job.cohort is None else {**scripts, **_cohort_files(job, job.cohort)}


def _cohort_files(job: TrainingJob, cohort: Cohort) -> dict[str, str]:
    """The batch scripts of tiling and prediction, and the script that submits their arrays with the merges after them."""
    scripts = {}
    for name, arguments, gpus in (("tile", cohort.tile, 0), ("predict", cohort.predict, cohort.gpus)):
        options: dict[str, object] = {
            "job-name": f"{job.name}-{name}",
            "ntasks": 1,
            "cpus-per-task": cohort.cpus,
            "mem": f"{cohort.memory_gib}G",
            "time": f"{cohort.time_limit_h}:00:00",
            "open-mode": "append",
            "mail-type": "END,FAIL",
        }
        if gpus:
            options["gpus-per-node"] = gpus
        if job.queue:
            options["partition"] = job.queue
        if job.priority:
            options["qos"] = job.priority
        (out,) = (argument.removeprefix("--out=") for argument in arguments if argument.startswith("--out="))
        settings = [
            f"SHARDS=${{CRCJAX_SHARDS:-{cohort.shards}}}",
            f"RESTARTS={cohort.restarts}",
            f"OUT={shlex.quote(out)}",
            f"set -- {name} {shlex.join(arguments)}",
        ]
        about = _ABOUT_ARRAY.format(name=name, shards=cohort.shards)
        scripts[f"{name}.sbatch"] = _script(about, options, job, settings, "slurm_array.bash")
    return {**scripts, "cohort.sh": _COHORT.format(shards=cohort.shards)}


def _script(about: str, options: dict[str, object], job: TrainingJob, settings: list[str], body: str) -> str:
    lines = ["#SBATCH --requeue", *(f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items())]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(job.environment.items())]
    software = [
        f"MODULES={shlex.quote(' '.join(job.modules))}",
        f"APPTAINER={shlex.quote(job.apptainer)}",
        'workdir=""',
    ]
    head = "\n".join([*sorted(lines), "set -uo pipefail", "", *exports, *settings, *software, ""])
    texts = [files("crcjax.launching").joinpath(name).read_text() for name in ("slurm_software.bash", body)]
    return "\n".join(["#!/bin/bash\n" + about + head, *texts])
