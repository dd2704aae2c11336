"""All communication of a step, and how long it takes on a cluster.

Station: configuration -> [transfers of a step] -> planner.  A transfer is a kind of collective (or send) that one rank
takes part in, with its group, its calls and the bytes that pass the rank: (n - 1) / n of what is gathered or scattered
among n ranks, twice that for an all-reduce.  A test holds the bytes against those counted in real steps.

Per micro-batch and layer: sequence-parallel gathers and scatters and, beyond the key/value heads, those of QKV (tp);
keys and values and their gradients (cp); full recompute repeats what forward sends, a recomputed MLP its half.  Per
micro-batch: understanding rows scattered by the embedding and gathered for the head, the gradient of CE rows (tp);
hidden rows to the next stage and their gradients back (pp).  Per step: gradients in float32 and weights (dp x cp),
gradients of what sequence-parallel ranks replicate (tp).

Ranks are numbered tp first, then cp, dp, pp, and fill node after node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.schema import ModelConfig, RunConfig
from megatron_lance.packing.layout import rows_per_rank
from megatron_lance.profiling.communication import gathered_keys_values, qkv_over_tp, sequence_parallel
from megatron_lance.profiling.flops import TIME_FEATURES
from megatron_lance.profiling.memory import layers_of_stages, memory_per_rank


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of one rank.

    Attributes:
        name: what is sent.
        axis: tp, cp, pp or dp: which ranks take part (dp: data- and context-parallel ones).
        ranks: how many.
        stride: distance of neighbours in rank numbers.
        calls: per step.
        moved: bytes that pass the rank, per step.
    """

    name: str
    axis: str
    ranks: int
    stride: int
    calls: int
    moved: float

    @property
    def steps(self) -> int:
        """Latencies that pass one after another: of a collective the logarithm of its ranks, as in trees."""
        return self.calls * (1 if self.axis == "pp" else math.ceil(math.log2(self.ranks)))

    def outside(self, node_size: int) -> float:
        """Bytes that a rank's adapter takes from other nodes; 0 where all ranks lie in one node.

        The k ranks of a group in one node share what the node receives, (N - 1) / N of the whole among N nodes.  Of a
        pipeline that crosses nodes somewhere the slowest send counts, whole.

        Args:
            node_size: devices of a node.
        """
        if self.ranks * self.stride <= node_size:
            return 0.0
        if self.axis == "pp":
            return self.moved
        together = max(1, min(self.ranks, node_size // self.stride))
        nodes = self.ranks / together
        whole = self.moved * self.ranks / (self.ranks - 1)
        return whole * (nodes - 1) / nodes / together


@dataclass(frozen=True)
class Links:
    """What connects devices.

    Attributes:
        node_size: devices of a node.
        node_bandwidth: bytes/s and direction within a node, as collectives reach it.
        network_bandwidth: bytes/s and direction of a device to other nodes.
        node_latency: seconds of a step of a collective within a node.
        network_latency: seconds of one between nodes.
    """

    node_size: int
    node_bandwidth: float
    network_bandwidth: float
    node_latency: float
    network_latency: float

    def seconds(self, transfer: Transfer) -> float:
        """Of all calls of a transfer, one after another.

        Within a node: bytes over its bandwidth.  Across nodes adapters carry what comes from outside, while the links
        of the node carry the rest; the slower of the two counts.
        """
        if transfer.ranks == 1:
            return 0.0
        inside, outside = transfer.moved / self.node_bandwidth, transfer.outside(self.node_size)
        if outside:
            return max(inside, outside / self.network_bandwidth) + transfer.steps * self.network_latency
        return inside + transfer.steps * self.node_latency


def _replicated(model: ModelConfig, layers: int, first: bool, last: bool) -> int:
    """Parameters of a stage that sequence-parallel ranks hold whole."""
    h, c = model.hidden_size, model.latent_channels
    count = layers * 2 * (2 * h + (2 * model.kv_channels if model.qk_norm else 0))
    count += (c * h + h + TIME_FEATURES * h + h + h * h + h) if first else 0
    return count + ((2 * h + h * c + c) if last else 0)


def _layer_transfers(run: RunConfig, rows: int, width: int, layers: int, micro_batches: int) -> list[Transfer]:
    """Those of all layers of a stage, over tp and cp."""
    model, parallel = run.model, run.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    full = parallel.recompute_granularity == "full"
    again = parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()
    times, found = layers * micro_batches, []
    if tp > 1:
        around = sequence_parallel(model, rows, tp, width)
        mlp = around.forward / 2 if "mlp" in again else 0.0
        moved = around.total + full * around.forward + mlp
        calls = 2 * (4 + 6 + 4 * full + 2 * ("mlp" in again))  # of both experts
        found.append(Transfer("sequence parallel", "tp", tp, 1, calls * times, moved * times))
        beyond = qkv_over_tp(model, rows, tp, width)
        if beyond.total:
            moved = beyond.total + full * beyond.forward
            found.append(Transfer("QKV over tp", "tp", tp, 1, (4 + 2 * full) * times, moved * times))
    if cp > 1:
        shared = gathered_keys_values(model, rows, cp, tp, width)
        moved = shared.total + full * shared.forward
        found.append(Transfer("keys and values", "cp", cp, tp, (4 + 2 * full) * times, moved * times))
    return found


def step_transfers(run: RunConfig, world_size: int, pp_rank: int, *, und_rows: float, ce_rows: float) -> list[Transfer]:
    """What one rank of a pipeline stage sends and receives in a step.

    Args:
        run: the whole configuration.
        world_size: processes of the run.
        pp_rank: its stage.
        und_rows: rows of the understanding region of a context-parallel rank, mean over micro-batches.
        ce_rows: rows of the LM head on it, likewise.
    """
    model, parallel = run.model, run.parallel
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    dp = world_size // (tp * cp * pp)
    micro_batches, width = run.training.global_batch_size // dp, 4 if run.training.precision == "float32" else 2
    rows = rows_per_rank(run.data.seq_length, cp, tp, row_alignment(run))
    layers, first, last = layers_of_stages(run)[pp_rank], pp_rank == 0, pp_rank == pp - 1
    found = _layer_transfers(run, rows, width, layers, micro_batches)
    share = (tp - 1) / tp
    if tp > 1:
        words = und_rows * model.hidden_size * width * share * micro_batches
        if first:
            found.append(Transfer("embedding", "tp", tp, 1, 2 * micro_batches, 2 * words))
        if last:
            ce = 2 * share * ce_rows * (model.hidden_size * width + 3 * 4) * micro_batches
            found.append(Transfer("LM head and CE", "tp", tp, 1, 5 * micro_batches, words + ce))
        norms = 2 * share * 4 * _replicated(model, layers, first, last)
        found.append(Transfer("replicated gradients", "tp", tp, 1, 1, norms))
    if pp > 1:
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        sends = micro_batches * (2 * chunks - first - last)  # the last chunk sends no rows, the first no gradients
        hidden = rows // tp * model.hidden_size * width
        found.append(Transfer("hidden rows", "pp", pp, tp * cp * dp, sends, sends * hidden))
    return found + _optimizer_transfers(run, world_size, pp_rank, width)


def _optimizer_transfers(run: RunConfig, world_size: int, pp_rank: int, width: int) -> list[Transfer]:
    """Gradients and weights over data- and context-parallel ranks."""
    parallel = run.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ranks = world_size // (tp * pp)
    if ranks == 1:
        return []
    memory, share = memory_per_rank(run, world_size)[pp_rank], (ranks - 1) / ranks
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    if not parallel.use_distributed_optimizer:
        return [Transfer("gradients", "dp", ranks, tp, chunks, 2 * share * memory.gradient_bytes)]
    return [
        Transfer("gradients", "dp", ranks, tp, chunks, share * memory.gradient_bytes),
        Transfer("weights", "dp", ranks, tp, chunks, share * memory.trained * width),
    ]
