workdir="$OUT"
shard="${SLURM_ARRAY_TASK_ID:-}"
if [ -n "$shard" ] && { [ "$shard" -lt 1 ] || [ "$shard" -gt "$SHARDS" ]; }; then
  echo "$SLURM_JOB_NAME: a task of the array must be from 1 to $SHARDS, got $shard; give --array=1-$SHARDS, or set CRCJAX_SHARDS" >&2
  exit 2
fi

# Runs the command for one shard, or for the whole cohort. A signal to this shell goes on to the command.
run() {
  srun --ntasks=1 --kill-on-bad-exit=1 "${python[@]}" -m crcjax.cli "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null' TERM
  while :; do
    wait "$child"
    status=$?
    if [ "$status" -le 128 ] || ! kill -0 "$child" 2>/dev/null; then break; fi
  done
  trap - TERM
  return "$status"
}

status=0
if [ -n "$shard" ]; then
  run "$@" --shard "$shard/$SHARDS" || status=$?
  # A killed process may succeed at the next attempt; what it finished is kept. 1: some slides cannot be processed.
  if [ "$status" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ]; then
    notify requeue "$status"
    scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
  fi
  [ "$status" -le 1 ] || notify failure "$status"
  exit "$status"
fi

# The merge: every shard once more. One that is complete ends at once, and what a task left out is done here.
for ((number = 1; number <= SHARDS; number++)); do
  one=0
  run "$@" --shard "$number/$SHARDS" || one=$?
  [ "$one" -le "$status" ] || status=$one
done
if [ "$status" -le 1 ]; then notify end "$status"; else notify failure "$status"; fi
exit "$status"
