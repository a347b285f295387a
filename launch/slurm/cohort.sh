#!/bin/bash
# Submits tiling and prediction of the cohort: two arrays, each with a merge after it (docs/slurm.md).
#
#   bash cohort.sh [OPTIONS OF SBATCH]
#
# Prints the numbers of the jobs. Rendered by crcjax launch render: edit the job's TOML file, not this one.
set -euo pipefail
folder=$(dirname "$0")
after=()
for stage in tile predict; do
  array=$(sbatch --parsable --array="1-${CRCJAX_SHARDS:-16}" --mail-type=NONE "${after[@]}" "$@" "$folder/$stage.sbatch")
  # Whatever became of the tasks: the merge completes their work.
  merge=$(sbatch --parsable --dependency="afterany:$array" "$@" "$folder/$stage.sbatch")
  echo "$stage: array $array, merge $merge"
  # 1: some slides cannot be processed; the others are still predicted.
  after=(--dependency="afterany:$merge")
done
