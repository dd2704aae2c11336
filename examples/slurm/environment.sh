# shellcheck shell=bash
# Settings of every rank, sourced by rank.sh. What is commented out depends on the cluster.

# Megatron's order of kernels: with one hardware queue a collective that was started first also runs first, so that
# gathers and reductions overlap with the products behind them (tensor and sequence parallelism, Hopper and before).
export CUDA_DEVICE_MAX_CONNECTIONS=1

# Rows per expert differ from pack to pack, and with them tensor sizes: let the allocator grow its segments instead of
# keeping many that do not fit.
export PYTORCH_ALLOC_CONF=expandable_segments:True

# Warnings only; INFO shows rings, trees and which network interfaces are taken: look at it once on a new cluster.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# The interface for the first contact between nodes, and the adapters for the data, where NCCL chooses wrongly.
# export NCCL_SOCKET_IFNAME=eth0
# export NCCL_IB_HCA=mlx5
# What the last collectives of each rank were, for a rank that hangs.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"

# Threads of each rank; reading and decoding have processes of their own (data.workers).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
