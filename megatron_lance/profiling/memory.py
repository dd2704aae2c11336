"""Parameters and memory of every rank, from the configuration alone.

Station: configuration -> [estimate] -> --dry-run, planner.  Parameters, gradients and optimizer state are exact but for
the padding of buckets; activations are those that autograd keeps, and what backward needs at its peak.  Tests compare
them with what built models hold, rank by rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from megatron_lance.checkpoint.hf_lance import bindings
from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_lance.model.freeze import is_frozen
from megatron_lance.ops.attention import KERNELS
from megatron_lance.ops.attention_varlen import kernel_calls
from megatron_lance.packing.layout import rows_per_rank
from megatron_lance.parallel.dispatch import RankBatch

GIB = 2**30
_AHEAD = 2
"""Inputs that the interleaved schedule has received of passes that have not begun: one to three were counted."""


@dataclass(frozen=True)
class RankMemory:
    """One pipeline rank's share; the same for all its tensor-, context- and data-parallel ranks.

    Attributes:
        pp_rank: pipeline rank.
        parameters: parameters on the rank.
        trained: of them those that are not frozen.
        weight_bytes: of all in the training precision.
        gradient_bytes: float32 gradient buffer of the trained ones.
        optimizer_bytes: float32 main weights (bf16 only), two moments and the average of the weights (with
            training.ema_decay), sharded over replicas and context-parallel ranks with the distributed optimizer.
        activation_bytes: peak of forward and backward, with logits and all micro-batches in flight.
        host_bytes: activations that wait on the host at the peak (parallel.offload_layers), no part of the total.
    """

    pp_rank: int
    parameters: int
    trained: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    host_bytes: int = 0

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
            ("activations", self.activation_bytes),
            ("total", self.total_bytes),
            *([("on the host", self.host_bytes)] if self.host_bytes else []),
        )
        frozen = f" ({self.parameters - self.trained:,} frozen)" if self.trained < self.parameters else ""
        return f"pp rank {self.pp_rank}: {self.parameters:,} parameters{frozen}; " + ", ".join(
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


@lru_cache(maxsize=64)
def _parameters(model: ModelConfig, tp: int, without: tuple[str, ...] = ()) -> tuple[int, int, int]:
    """Parameters per tp rank of (embedder, one layer, heads), but for those of the freeze sets `without`."""
    counts = {"embedder": 0, "decoder": 0, "heads": 0}
    for name, binding in bindings(model).items():
        if is_frozen(name, without):
            continue
        whole = sum(_size(shape) for shape in binding.shapes)
        counts[name.split(".")[0]] += whole if binding.shard_dim is None else whole // tp
    return counts["embedder"], counts["decoder"] // model.num_layers, counts["heads"]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


@dataclass(frozen=True)
class PackLoad:
    """What of a pack memory depends on, beside its budget of tokens.

    Attributes:
        ce_rows: rows of the LM head on one context-parallel rank.
        copied_keys: keys that the slices of a context-parallel rank copy together, in tokens.
        und_rows: share of a pack's rows that the understanding expert has.
        gen_rows: that the generation expert has.
    """

    ce_rows: int
    copied_keys: int
    und_rows: float
    gen_rows: float

    @property
    def widest_region(self) -> float:
        """Share of the busier expert."""
        return max(self.und_rows, self.gen_rows)

    @classmethod
    def usual(cls, run: RunConfig) -> PackLoad:
        """Where no packs are at hand: a row in 32 predicts a label, a token is the key of two slices, gen has 4/5."""
        cp, length = run.parallel.context_parallel_size, run.data.seq_length
        return cls(ce_rows=-(-length // (32 * cp)), copied_keys=2 * length, und_rows=0.2, gen_rows=0.8)

    @classmethod
    def of(cls, batches: Iterable[RankBatch]) -> PackLoad:
        """The most of some packs as a rank sees them; shares may be those of different packs."""
        loads = [
            (
                len(batch.ce_rows),
                sum(stop - start for _, keys, _ in kernel_calls(batch.plan) for start, stop in keys),
                *(rows / sum(batch.region_rows) for rows in batch.region_rows),
            )
            for batch in batches
        ]
        return cls(*(max(values) for values in zip(*loads, strict=True)))


@dataclass(frozen=True)
class _Sizes:
    """Rows and widths of one rank: R rows of the cp rank, L tokens of the pack, w bytes per value; others over tp."""

    rows: int
    length: int
    shard: int  # rows of the tp rank, R / tp
    width: int
    hidden: int
    q: int
    kv: int
    qkv: int
    heads: int
    ffn: int
    vocabulary: int
    chunk: int  # rows of the LM head at a time
    held: int  # bytes a linear keeps of a value of its input
    norm: int  # of a norm's value, with the linear behind it
    mlp: int  # of a value between an MLP's linears
    copies: int  # quantised weights of a layer, kept for backward
    tp: int

    @classmethod
    def of(cls, run: RunConfig) -> _Sizes:
        """Of a configuration."""
        model, parallel = run.model, run.parallel
        tp, cp, hn = parallel.tensor_model_parallel_size, parallel.context_parallel_size, model.kv_channels
        rows = rows_per_rank(run.data.seq_length, cp, tp, row_alignment(run))
        groups = max(model.num_query_groups // tp, 1)
        width, fp8 = 4 if run.training.precision == "float32" else 2, run.fp8.recipe != "none"
        held, engine = 1 if fp8 else width, model.transformer_impl == "transformer_engine"
        return cls(
            rows=rows,
            length=run.data.seq_length,
            shard=rows // tp,
            width=width,
            hidden=model.hidden_size,
            q=model.num_attention_heads * hn // tp,
            kv=groups * hn,
            qkv=groups * (model.num_attention_heads // model.num_query_groups + 2) * hn,
            heads=model.num_attention_heads // tp,
            ffn=model.ffn_hidden_size // tp,
            vocabulary=model.vocab_size // tp,
            chunk=model.ce_chunk_rows,
            held=held,
            norm=width + held if engine else 4 + 2 * width,
            mlp=2 * width + held if engine else 5 * width,
            copies=2 * _parameters(model, tp)[1] if fp8 else 0,
            tp=tp,
        )


def layer_activation_bytes(run: RunConfig, load: PackLoad | None = None) -> int:
    """Bytes autograd keeps of one layer and micro-batch on one rank without full recompute.

    Of the shard's rows, times hidden, for each of two norms: its float32 input, its output before and after the
    weight: 4 + 2 w (recomputed: the input, w).  Of all rows: QKV before norm and rotation w (q + 2 kv), queries in pack
    order and attention output, twice, 3 w q, log-sum-exp 4 per head, keys and values as each slice copies them 2 w kv
    (float32 models keep those of all tokens beside them; a variable-length backend that is named keeps those alone,
    `auto` is counted as what keeps most), gate and up, SiLU, up again, product: 5 w f.  The reference
    of QK-norm and rotation keeps 2 w (q + 2 kv) more.  Recomputed attention keeps queries w q, output w q, gathered
    keys and values of all tokens 2 w kv, and its own 2 w kv; a recomputed MLP nothing.

    TransformerEngine's norms keep their input and nothing in float32, its SwiGLU gate and up alone.  In FP8 linears
    keep one byte of each value of their input, and their weights quantised twice, by rows and by columns.

    Of one expert that recomputes, its share of the rows counts as recomputed.

    Args:
        run: the whole configuration.
        load: of its packs; None: usual ones.
    """
    s, load = _Sizes.of(run), load or PackLoad.usual(run)
    again = _again(run.parallel)
    w, kept = s.width, _kept_rows(run.parallel, load)
    norms = int(2 * s.shard * s.hidden * (w + kept["layernorm"] * (s.norm - w)))
    projected = s.rows * w * (s.qkv + (2 * (s.q + 2 * s.kv) if run.ops.mape == "reference" else 0))
    if "core_attn" in again:
        attention = s.rows * ((w + s.held) * s.q + 2 * w * s.kv) + 2 * w * s.kv * s.length
    else:
        copied = 0 if run.model.attention_backend in KERNELS else load.copied_keys
        keys = 2 * w * s.kv * (copied + (s.length if w == 4 or not copied else 0))
        attention = s.rows * ((2 * w + s.held) * s.q + 4 * s.heads) + keys
    mlp = int(kept["mlp"] * s.mlp * s.ffn * s.rows)
    dropped = 6 * s.hidden * s.ffn * len(set(run.parallel.recompute_experts)) if "mlp" in again else 0
    return norms + projected + attention + mlp + max(s.copies - dropped, 0)


def offloaded_bytes(run: RunConfig, load: PackLoad | None = None) -> int:
    """Bytes of a micro-batch that the offloaded layers of a model chunk keep on the host.

    Args:
        run: the whole configuration.
        load: of its packs; None: usual ones.
    """
    held = _held_bytes(_Sizes.of(run), run.parallel)
    return run.parallel.offload_layers * (layer_activation_bytes(run, load) - held)


def _held_bytes(s: _Sizes, parallel: ParallelConfig) -> int:
    """What an offloaded layer keeps on the device: gathered keys and values of all tokens, for recomputed attention."""
    return 2 * s.width * s.kv * s.length if "core_attn" in _again(parallel) else 0


def _again(parallel: ParallelConfig) -> tuple[str, ...]:
    """Modules that selective recompute runs again."""
    return parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()


def _kept_rows(parallel: ParallelConfig, load: PackLoad) -> dict[str, float]:
    """Share of the rows of which norms and MLPs keep what they save, at most."""
    shares = {"und": load.und_rows, "gen": load.gen_rows}
    others = sum(share for expert, share in shares.items() if expert not in parallel.recompute_experts)
    return {module: min(others, 1.0) if module in _again(parallel) else 1.0 for module in ("layernorm", "mlp")}


def _head_bytes(s: _Sizes, load: PackLoad) -> tuple[int, int]:
    """(kept, more at the start of backward) of final norms, LM head and CE.

    Kept: both norms; of CE rows the input of the head.  More: of a chunk of rows the logits, in float32 too, or their
    gradient and that of the head's weight, which several chunks add up in float32; or the norms' own gradients.
    """
    w, rows = s.width, min(load.ce_rows, s.chunk)
    kept = s.shard * s.hidden * (4 + 2 * w) + load.ce_rows * s.hidden * w
    weight, several = s.vocabulary * s.hidden, load.ce_rows > s.chunk
    logits = rows * s.vocabulary * (4 + (w if w < 4 else 0))
    chunk = max(logits, rows * s.vocabulary * w + weight * w) + (4 * weight if several else 0)
    return kept, max(chunk, s.shard * s.hidden * (8 + w))


def _layer_backward_bytes(s: _Sizes, load: PackLoad) -> int:
    """What the backward of a layer needs beside what is kept.

    The MLP of the busier expert: gradients of product, gate and up, 3 w f, or of gate and up, in FP8 quantised by rows
    and by columns beside, and over tp the gathered input and its gradient; or attention: float32 gradients of all keys
    and values, in slices, joined, reduced.
    """
    region = int(s.rows * load.widest_region)
    quantised = 4 * s.ffn if s.copies else 0
    behind = s.width * (2 * s.ffn + (2 * s.hidden if s.tp > 1 else 0)) + quantised
    mlp = region * max(3 * s.width * s.ffn, behind)
    attention = 3 * s.rows * s.q * s.width + 3 * 8 * s.kv * s.length
    return max(mlp, attention) + s.shard * s.hidden * s.width


def passes_in_flight(parallel: ParallelConfig, pp_rank: int, micro_batches: int) -> int:
    """Forward passes of a model chunk that wait for their backward at most, in 1F1B or interleaved 1F1B."""
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    ahead = pp - pp_rank if chunks == 1 else 2 * (pp - pp_rank - 1) + (chunks - 1) * pp + 1
    return min(ahead, micro_batches * chunks)


def _activations(run: RunConfig, load: PackLoad, layers: int, pp_rank: int, micro_batches: int) -> tuple[int, int]:
    """Peak bytes of a pipeline rank, (on its device, on the host).

    On the device: at the start of a backward pass, or within that of a layer.  Of offloaded layers it has what two
    layers keep, of the one pass that is under way: the one that runs and the one that is on its way; of all of them the
    gathered keys and values that recomputed attention keeps, 2 w kv of all tokens; and what a chunk received, which the
    schedule holds.  The interleaved schedule has _AHEAD inputs of passes that have not begun.  What a chunk
    sends leaves the device then, but stays on CPUs, where gloo may still read it.
    """
    parallel, s = run.parallel, _Sizes.of(run)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    chunk_layers = layers // chunks
    layer = layer_activation_bytes(run, load)
    away = parallel.offload_layers
    if parallel.recompute_granularity == "full":  # only the inputs of recomputed groups of layers stay
        kept = -(-chunk_layers // parallel.recompute_num_layers) * s.shard * s.hidden * s.width
        again, now = parallel.recompute_num_layers * layer, kept
    else:
        received = s.shard * s.hidden * s.width if away and (pp_rank or chunks > 1) else 0
        kept = chunk_layers * layer - offloaded_bytes(run, load) + received
        now = max(chunk_layers - away, min(chunk_layers, 2)) * layer + away * _held_bytes(s, parallel)
        now = now if away else kept
        shares = {"und": load.und_rows, "gen": load.gen_rows}
        widest = max(shares[expert] for expert in parallel.recompute_experts) if "mlp" in _again(parallel) else 0
        again = int(s.rows * widest) * s.mlp * s.ffn
    passes = passes_in_flight(parallel, pp_rank, micro_batches)
    ahead = _AHEAD * s.shard * s.hidden * s.width if chunks > 1 else 0
    waiting, host = (passes - 1) * kept + now + ahead, passes * offloaded_bytes(run, load)
    within = waiting + again + _layer_backward_bytes(s, load)
    if pp_rank != parallel.pipeline_model_parallel_size - 1:
        return within, host
    head, head_backward = _head_bytes(s, load)
    return max(within, waiting + head + head_backward), host


def memory_per_rank(run: RunConfig, world_size: int, load: PackLoad | None = None) -> list[RankMemory]:
    """Parameters and memory of each pipeline rank.

    Args:
        run: the whole configuration, validated.
        world_size: processes of the run.
        load: the heaviest of its packs; None: usual ones.
    """
    load = load or PackLoad.usual(run)
    parallel = run.parallel
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    dp = world_size // (tp * cp * pp)
    width = 4 if run.training.precision == "float32" else 2
    state = (8 if width == 4 else 12) + (4 if run.training.ema_decay else 0)
    shards = dp * cp if parallel.use_distributed_optimizer else 1
    of_all, of_trained = _parameters(run.model, tp), _parameters(run.model, tp, tuple(run.training.freeze))
    result = []
    for pp_rank, layers in enumerate(layers_of_stages(run)):
        count, trained = (
            layers * layer + (embedder if pp_rank == 0 else 0) + (heads if pp_rank == pp - 1 else 0)
            for embedder, layer, heads in (of_all, of_trained)
        )
        activations, host = _activations(run, load, layers, pp_rank, run.training.global_batch_size // dp)
        state_bytes = trained * state // shards
        result.append(RankMemory(pp_rank, count, trained, count * width, trained * 4, state_bytes, activations, host))
    return result
