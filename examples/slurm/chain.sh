#!/usr/bin/env bash
# Submit all stages: examples/slurm/chain.sh [sbatch option ...], for example examples/slurm/chain.sh --nodes=8
# The packs of all stages are planned at once; each stage trains when its packs are there and the stage before has
# finished, from whose last checkpoint it starts (training.init_from). A stage that is preempted or runs out of time
# goes back into the queue under its number, so the next one waits on. MEMORY=80gb, 80gb_8 (one node) or 141gb takes the
# planner's layout of each stage for such devices. STAGES, PREFIX and SBATCH name other configurations and another
# script.
set -euo pipefail
read -ra stages <<<"${STAGES:-pt_192p pt_360p pt_480p ct1 ct2 ct3 sft}"
prefix="${PREFIX:-examples/configs/lance_3b_}"
script="${SBATCH:-examples/slurm/many_nodes.sbatch}"

before=()
for stage in "${stages[@]}"; do
    export CONFIG="$prefix$stage.yaml"
    case $stage in pt*) kind=pt ;; *) kind=later ;; esac
    export LAYOUT="${MEMORY:+examples/configs/layouts/${kind}_$MEMORY.yaml}"
    packs=$(sbatch --parsable --job-name="packs-$stage" examples/slurm/prepack.sbatch)
    dependency=$(IFS=:; echo "afterok:${before[*]:+${before[*]}:}$packs")
    job=$(sbatch --parsable --job-name="$stage" --dependency="$dependency" --kill-on-invalid-dep=yes "$@" "$script")
    echo "$stage: job $job after ${dependency#afterok:}"
    before=("$job")
done
