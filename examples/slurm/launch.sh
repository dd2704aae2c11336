# shellcheck shell=bash
# What the sbatch files share: train with resume, and put the job back into the queue when it was stopped.
# Arguments: overrides, as of the training program. CONFIG names the configuration, LAYOUT a second one that goes on top
# of it, for example examples/configs/layouts/later_80gb.yaml. ROW_GROUP_CACHE names a folder on a disk that every node
# has for itself, for example /local/row_groups: its ranks then read each row group of the data once.
#
# Exit codes of the training program (megatron_lance/config/errors.py): 0 finished, 2 configuration, 3 data, 4 not
# finite, 5 hang, 6 stopped after a save: by SIGTERM (preemption), SIGUSR1 (end of time, see --signal) or
# training.stop_after_minutes. srun ends with the greatest code of its ranks, and a rank that was killed counts 137: that
# is what it says of a hang, for SLURM has to kill the rank that did not answer.
set -uo pipefail
: "${CONFIG:?set CONFIG to a configuration, for example examples/configs/lance_3b_ct1.yaml}"
PYTHON="${PYTHON:-python}"
MOST_RESTARTS="${MOST_RESTARTS:-20}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # another port for every job that shares a node
export MASTER_ADDR MASTER_PORT

# A container: with pyxis give srun the image and what it sees, with apptainer put it before the command.
container=()
# container=(--container-image=/images/lance.sqsh --container-mounts="$PWD:$PWD,/data:/data" --container-workdir="$PWD")
before=()
# before=(apptainer exec --nv --bind /data /images/lance.sif)

trap : TERM USR1 # the ranks are signalled too, and save; this shell waits for them

# --wait: when a rank is gone, the others have so many seconds before SLURM kills them. --kill-on-bad-exit would kill
# ranks that are just about to leave with code 6.
srun --wait="${WAIT:-120}" --kill-on-bad-exit=0 "${container[@]}" examples/slurm/rank.sh "${before[@]}" \
    "$PYTHON" -m megatron_lance.training.train --config "$CONFIG" ${LAYOUT:+--config "$LAYOUT"} training.resume=auto \
    ${ROW_GROUP_CACHE:+"data.row_group_cache=$ROW_GROUP_CACHE"} "$@"
code=$?

restarts="${SLURM_RESTART_COUNT:-0}"
case $code in
6) why="stopped after a save" ;;
5) why="hung" ;;
137) why="a rank hung or was killed" ;;
*) why="" ;;
esac
if [[ -n $why && $restarts -lt $MOST_RESTARTS ]]; then
    echo "exit code $code: $why; restart $((restarts + 1)) of job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" # SLURM ends this shell; the job waits in the queue under its number
    sleep 60
fi
exit "$code"
