"""A training job as a batch script of SLURM."""

from __future__ import annotations

import shlex
from importlib.resources import files

from crcjax.launching.job import TrainingJob

_ABOUT = """# Trains on the nodes of a SLURM job, with one process per node that uses all of the node's GPUs (docs/slurm.md):
#
#   sbatch --nodes=4 --gpus-per-node=8 --mail-user=YOU train.sbatch --config configs/epoc.py --workdir RUN [...]
#
# With --array=0-4 and --config.data.folds=5, each task of the array trains one fold, in RUN/fold-I/seed-S, where
# crcjax crossvalidate --out RUN expects it. Options of sbatch on the command line override the lines below, and arguments
# after the script replace those of the job. Rendered by crcjax launch render: edit the job's TOML file, not this one.
"""


def slurm_files(job: TrainingJob) -> dict[str, str]:
    """The batch script of a job, by its file name. SLURM's own file systems take the place of `volumes` and `image`."""
    options = {
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
    lines = ["#SBATCH --requeue", *(f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items())]
    settings = [f"export {name}={shlex.quote(value)}" for name, value in sorted(job.environment.items())]
    settings += [
        "# The job's arguments, unless others are given.",
        f"[ $# -gt 0 ] || set -- {shlex.join(job.arguments)}",
        "# How often the job starts again after it lost a process, or a device computed wrongly.",
        f"RESTARTS={job.restarts}",
    ]
    body = files("crcjax.launching").joinpath("slurm_train.bash").read_text()
    return {
        "train.sbatch": "#!/bin/bash\n"
        + _ABOUT
        + "\n".join([*sorted(lines), "set -uo pipefail", "", *settings, ""])
        + "\n"
        + body
    }
