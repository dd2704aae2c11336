"""Parameters and memory of every rank, from the configuration alone.

Station: configuration -> [estimate] -> --dry-run.  Parameters are exact (a test compares them with built models);
activations are an estimate by the tensors that autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lance.checkpoint.hf_lance import bindings
from megatron_lance.config.schema import RunConfig
from megatron_lance.packing.layout import rows_per_rank

GIB = 2**30


@dataclass(frozen=True)
class RankMemory:
    """One pipeline rank's share; the same for all its tensor-, context- and data-parallel ranks.

    Attributes:
        pp_rank: pipeline rank.
        parameters: parameters on the rank.
        weight_bytes: of them in the training precision.
        gradient_bytes: float32 gradient buffer.
        optimizer_bytes: float32 main weights (bf16 only), two moments and the average of the weights (with
            training.ema_decay), sharded over replicas and context-parallel ranks with the distributed optimizer.
        activation_bytes: estimate for the micro-batches in flight.
    """

    pp_rank: int
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    def line(self) -> str:
        """The share as one line."""
        parts = (
            ("weights", self.weight_bytes),
            ("gradients", self.gradient_bytes),
            ("optimizer", self.optimizer_bytes),
            ("activations (estimate)", self.activation_bytes),
            ("total", self.total_bytes),
        )
        return f"pp rank {self.pp_rank}: {self.parameters:,} parameters; " + ", ".join(
            f"{name} {size / GIB:.3f} GiB" for name, size in parts
        )


def layers_of_stages(run: RunConfig) -> list[int]:
    """Layers of each pipeline rank, uneven first and last stages honoured."""
    parallel, total = run.parallel, run.model.num_layers
    pp = parallel.pipeline_model_parallel_size
    fixed = {0: parallel.num_layers_in_first_pipeline_stage, pp - 1: parallel.num_layers_in_last_pipeline_stage}
    given = {rank: count for rank, count in fixed.items() if count is not None}
    rest = (total - sum(given.values())) // max(pp - len(given), 1)
    return [given.get(rank, rest) for rank in range(pp)]


def _parameters(run: RunConfig, tp: int) -> tuple[int, int, int]:
    """Parameters per tp rank of (embedder, one layer, heads)."""
    counts = {"embedder": 0, "decoder": 0, "heads": 0}
    for name, binding in bindings(run.model).items():
        whole = sum(_size(shape) for shape in binding.shapes)
        counts[name.split(".")[0]] += whole if binding.shard_dim is None else whole // tp
    return counts["embedder"], counts["decoder"] // run.model.num_layers, counts["heads"]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def layer_activation_bytes(run: RunConfig) -> int:
    """Bytes autograd keeps of one layer and micro-batch on one rank without full recompute (estimate).

    Sharded rows (R / tp) x hidden: block input, residual after attention, two norms of which each keeps its float32
    input and its output: 2 * width + 2 * (4 + width).  Whole rows R, over tp: q, k and v before and after norm and
    rotation with float32 copies: about (q + 2 kv) * (2 * width + 8); float32 k and v of all context-parallel ranks:
    8 * kv * cp; attention output q * width; gate, up, silu(gate), product: 4 * ffn * width.  Selective recompute drops
    the norms (layernorm), gate to product (mlp), and keeps k and v as they were gathered, width instead of 4
    (core_attn).

    Args:
        run: the whole configuration.
    """
    model, parallel = run.model, run.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    width = 4 if run.training.precision == "float32" else 2
    rows = rows_per_rank(run.data.seq_length, cp, tp, parallel.region_alignment)
    q = model.num_attention_heads * model.kv_channels // tp
    kv = max(model.num_query_groups // tp, 1) * model.kv_channels
    dropped = parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()
    norms = 0 if "layernorm" in dropped else 2 * (4 + width)
    mlp = 0 if "mlp" in dropped else 4 * (model.ffn_hidden_size // tp) * width
    joined = 2 * kv * cp * (width if "core_attn" in dropped else 4)
    sharded = model.hidden_size * (2 * width + norms) / tp
    whole = (q + 2 * kv) * (2 * width + 8) + joined + q * width + mlp
    return int(rows * (sharded + whole))


def _activations(run: RunConfig, layers: int, pp_rank: int, micro_batches: int) -> int:
    """Bytes for the micro-batches in flight on a pipeline rank; with full recompute only layer inputs stay."""
    parallel = run.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    in_flight = min(parallel.pipeline_model_parallel_size - pp_rank, micro_batches)
    layer = layer_activation_bytes(run)
    if parallel.recompute_granularity != "full":
        return in_flight * layers * layer
    width = 4 if run.training.precision == "float32" else 2
    rows = rows_per_rank(run.data.seq_length, cp, tp, parallel.region_alignment)
    inputs = -(-layers // parallel.recompute_num_layers) * rows * run.model.hidden_size * width // tp
    return in_flight * inputs + parallel.recompute_num_layers * layer


def memory_per_rank(run: RunConfig, world_size: int) -> list[RankMemory]:
    """Parameters and memory of each pipeline rank.

    Args:
        run: the whole configuration, validated.
        world_size: processes of the run.
    """
    parallel = run.parallel
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    dp = world_size // (tp * cp * pp)
    embedder, layer, heads = _parameters(run, tp)
    width = 4 if run.training.precision == "float32" else 2
    state = (8 if width == 4 else 12) + (4 if run.training.ema_decay else 0)
    shards = dp * cp if parallel.use_distributed_optimizer else 1
    result = []
    for pp_rank, layers in enumerate(layers_of_stages(run)):
        count = layers * layer + (embedder if pp_rank == 0 else 0) + (heads if pp_rank == pp - 1 else 0)
        activations = _activations(run, layers, pp_rank, run.training.global_batch_size // dp)
        result.append(RankMemory(pp_rank, count, count * width, count * 4, count * state // shards, activations))
    return result
