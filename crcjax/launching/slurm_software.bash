# Software of the cluster: environment modules, and an Apptainer image in which Python runs. Each may also be empty.
modules="${CRCJAX_MODULES-$MODULES}"
image="${CRCJAX_APPTAINER-$APPTAINER}"
if [ -n "$modules" ]; then
  # A batch job's shell has not read the profile that defines the function.
  if ! type module >/dev/null 2>&1; then
    for file in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh "${MODULESHOME:-/nowhere}/init/bash"; do
      # shellcheck disable=SC1090
      if [ -r "$file" ]; then . "$file"; break; fi
    done
  fi
  # shellcheck disable=SC2086
  if ! module load $modules; then
    echo "$SLURM_JOB_NAME: the modules $modules cannot be loaded; correct the job's field modules, or set CRCJAX_MODULES" >&2
    exit 2
  fi
fi
python=("${CRCJAX_PYTHON:-python}")
if [ -n "$image" ]; then
  if ! command -v apptainer >/dev/null; then
    echo "$SLURM_JOB_NAME: apptainer is not on the PATH of ${SLURMD_NODENAME:-this node}; load its module, or set CRCJAX_APPTAINER= to run without the image" >&2
    exit 2
  fi
  python=(apptainer exec)
  [ -z "${SLURM_JOB_GPUS:-}${SLURM_GPUS_ON_NODE:-}" ] || python+=(--nv)
  python+=(--bind "$PWD" "$image" "${CRCJAX_PYTHON:-python}")
fi

# Posts a small JSON to $CRCJAX_WEBHOOK, if it is set. A webhook that does not answer does not stop the job.
notify() {
  [ -n "${CRCJAX_WEBHOOK:-}" ] || return 0
  curl --silent --show-error --max-time 10 --header 'Content-Type: application/json' --data \
    "{\"event\": \"$1\", \"job\": \"$SLURM_JOB_ID\", \"name\": \"$SLURM_JOB_NAME\", \"nodes\": \"$SLURM_JOB_NODELIST\", \"restarts\": ${SLURM_RESTART_COUNT:-0}, \"workdir\": \"${workdir//\"/}\", \"status\": $2}" \
    "$CRCJAX_WEBHOOK" >/dev/null || echo "$SLURM_JOB_NAME: the webhook did not accept '$1'" >&2
}
