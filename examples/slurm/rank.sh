#!/usr/bin/env bash
# One rank of a SLURM step: srun ... examples/slurm/rank.sh COMMAND...
# Gives SLURM's variables the names that torch.distributed reads, and becomes the command, so that signals reach it and
# its exit code leaves it.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=examples/slurm/environment.sh
source "$here/environment.sh"
export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
export LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}"
exec "$@"
