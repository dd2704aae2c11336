#!/usr/bin/env bash
# Train on several nodes; run it on each of them: FIRST_NODE=HOST examples/torchrun/many_nodes.sh CONFIG [key=value ...]
# NODES=4 waits for four nodes; NODES=2:4 starts with two and goes on with more or fewer as they come and go: all ranks
# start again from the last checkpoint with another data-parallel size. training.global_batch_size must be divisible by
# all sizes that may occur; a global batch stays the same packs. The rest is as in one_node.sh.
set -euo pipefail
config="${1:?usage: FIRST_NODE=HOST $0 CONFIG [key=value ...]}"
shift
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=examples/slurm/environment.sh
source "$here/../slurm/environment.sh"
set -- --nnodes "${NODES:?set NODES, for example 4 or 2:4}" --nproc-per-node "${RANKS:-gpu}" \
    --max-restarts "${RESTARTS:-10}" --rdzv-backend c10d --rdzv-id "${JOB:-lance}" \
    --rdzv-endpoint "${FIRST_NODE:?set FIRST_NODE}:${PORT:-29400}" --no-python "$here/rank.sh" \
    "${PYTHON:-python}" -m megatron_lance.training.train --config "$config" training.resume=auto "$@"
# shellcheck source=examples/torchrun/launch.sh
source "$here/launch.sh"
