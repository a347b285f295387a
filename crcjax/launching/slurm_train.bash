# The exit status of crcjax.main when it saved a checkpoint after a signal, or when a device ran out of memory.
AGAIN=85
again=""
arguments=("$@")
array="${SLURM_ARRAY_TASK_ID:-}"

# The run's directory. A wrong config, or an array without folds, ends the job here, before any node computes.
if ! workdir=$("${python[@]}" - "$array" "$@" <<'END'
import sys
from crcjax.errors import InputError
from crcjax.main import read_config

fold, *arguments = sys.argv[1:]
try:
    config, workdir = read_config(arguments)
except InputError as error:
    sys.exit(f"train.sbatch: {error}")
if fold and not config.data.folds:
    sys.exit("train.sbatch: an array trains folds; give their number with --config.data.folds=N, or give no --array")
print(workdir / f"fold-{fold}" / f"seed-{config.seed}" if fold else workdir)
END
); then
  notify failure 2
  exit 2
fi
# The last value of a flag counts.
[ -z "$array" ] || arguments+=("--config.data.fold=$array" "--workdir=$workdir")

# One secret per job, by which the processes recognise each other. srun passes the environment on to them.
CRCJAX_RENDEZVOUS_SECRET=$("${python[@]}" -c 'import secrets; print(secrets.token_hex(32))')
export CRCJAX_RENDEZVOUS_SECRET

# scontrol requeue, called by another program, sends TERM to this shell too, which must wait until the processes have saved.
outside=0
trap 'outside=1' TERM
notify start null
srun --export=ALL --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" "${python[@]}" -m crcjax.main "${arguments[@]}" &
child=$!
while :; do
  wait "$child"
  status=$?
  # A status above 128 may mean that a signal interrupted the wait, and that the processes are still running.
  if [ "$status" -le 128 ] || ! kill -0 "$child" 2>/dev/null; then break; fi
done
# The processes may have ended just after that wait; the shell still has their status.
wait "$child" 2>/dev/null
status=$?

# After a lost process (4) or a device that computed wrongly (6), the next attempt may succeed, as for crcjax supervise.
case "$status" in 4 | 6) [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ] && again=1 ;; esac
if [ "$status" = "$AGAIN" ] || [ -n "$again" ]; then
  notify requeue "$status"
  # The requeued job resumes from the checkpoint. If another program called scontrol requeue, SLURM requeues it.
  [ "$outside" = 1 ] || scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" = 0 ]; then
  notify end 0
else
  notify failure "$status"
fi
exit "$status"
