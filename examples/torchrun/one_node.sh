#!/usr/bin/env bash
# Train on all GPUs of this node: examples/torchrun/one_node.sh CONFIG [key=value ...]
# When a rank dies, torchrun starts all of them again, up to RESTARTS times, and they go on from the last checkpoint.
# torchrun itself ends with 1 whatever its ranks ended with; the last line of events.jsonl in the run folder has the code.
# To stop for good, send SIGTERM to torchrun: its ranks have 30 seconds to finish the step and save.
set -euo pipefail
config="${1:?usage: $0 CONFIG [key=value ...]}"
shift
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=examples/slurm/environment.sh
source "$here/../slurm/environment.sh"
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${RANKS:-gpu}" \
    --max-restarts "${RESTARTS:-3}" -m megatron_lance.training.train --config "$config" training.resume=auto "$@"
