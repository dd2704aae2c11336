#!/usr/bin/env bash
# Train on all GPUs of this node: examples/torchrun/one_node.sh CONFIG [key=value ...]
# When a rank dies or hangs, torchrun starts all of them again, up to RESTARTS times, and they go on from the last
# checkpoint. To stop, send SIGTERM to this script, or SIGUSR1 to a rank: it ends with code 6 once the step is saved.
set -euo pipefail
config="${1:?usage: $0 CONFIG [key=value ...]}"
shift
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=examples/slurm/environment.sh
source "$here/../slurm/environment.sh"
set -- --standalone --nproc-per-node "${RANKS:-gpu}" --max-restarts "${RESTARTS:-3}" --no-python "$here/rank.sh" \
    "${PYTHON:-python}" -m megatron_lance.training.train --config "$config" training.resume=auto "$@"
# shellcheck source=examples/torchrun/launch.sh
source "$here/launch.sh"
