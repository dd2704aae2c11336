"""The degrees of a run and the process groups that follow from them.

Station: start of a run.  In: the parallel configuration and the launcher's environment.  Out: one object that owns
degrees, ranks and groups; megatron-core's parallel state is initialised to the same.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_lance.config.schema import ParallelConfig
from megatron_lance.parallel import cpu_rehearsal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Groups:
    """Degrees, this process's ranks and its groups.

    Attributes:
        tp: tensor-parallel degree; cp, pp, dp likewise.
        tp_rank: this process's rank in its tensor-parallel group; cp_rank, pp_rank, dp_rank likewise.
        device: where this process computes.
        replica: the group of the tp * cp * pp ranks that hold one model.
    """

    tp: int
    cp: int
    pp: int
    dp: int
    tp_rank: int
    cp_rank: int
    pp_rank: int
    dp_rank: int
    device: torch.device
    replica: dist.ProcessGroup

    @property
    def sequence_parallel(self) -> bool:
        """Whether hidden states are sharded over the tensor-parallel group between linears."""
        return self.tp > 1


def _replica_group(parallel: ParallelConfig, dp: int) -> dist.ProcessGroup:
    """The tp x cp x pp group; created by all ranks in the same order."""
    generator = parallel_state.RankGenerator(
        tp=parallel.tensor_model_parallel_size,
        ep=1,
        dp=dp,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        order="tp-cp-ep-dp-pp",
    )
    own = None
    for ranks in generator.get_ranks("tp-cp-pp"):
        group = parallel_state.create_group(sorted(ranks), group_desc="REPLICA_GROUP")
        if dist.get_rank() in ranks:
            own = group
    if own is None:
        raise RuntimeError(f"rank {dist.get_rank()} is in no replica; the rank generator and the world disagree")
    return own


def initialize(parallel: ParallelConfig, seed: int, timeout_minutes: float = 10.0) -> Groups:
    """Join the process groups of a run; one process per GPU, or per rehearsal rank on the CPU.

    Reads RANK, WORLD_SIZE, LOCAL_RANK as torchrun sets them; a missing environment means one process.  May be
    called again with other degrees of the same world after `leave`.

    Args:
        parallel: degrees; `config.validate` has checked them against the world size.
        seed: seeds megatron-core's RNG tracker, which is forked but draws nothing here (dropout is 0).
        timeout_minutes: of every collective.

    Returns:
        the groups.
    """
    on_cpu = cpu_rehearsal.start_if_needed()
    if not dist.is_initialized():
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
            os.environ.setdefault(name, value)
        if not on_cpu:
            if parallel.tensor_model_parallel_size > 1:  # communication kernels keep their place among the others
                os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("gloo" if on_cpu else "nccl", timeout=timedelta(minutes=timeout_minutes))
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=cp,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    dp = dist.get_world_size() // (tp * cp * pp)
    return Groups(
        tp=tp,
        cp=cp,
        pp=pp,
        dp=dp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()),
        replica=_replica_group(parallel, dp),
    )


def leave() -> None:
    """Leave the groups of a run but not the world, so that the same processes may `initialize` another one.

    megatron-core forgets its groups and does not end them; each would keep its connections and threads.  They end with
    the last object that has the group, such as a model.
    """
    own = [group for group in parallel_state._global_process_group_list or () if group is not None]
    parallel_state.destroy_model_parallel()
    for group in own:
        dist.destroy_process_group(group)


def destroy() -> None:
    """Leave megatron-core's groups and the world; the end of a run."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
