"""FLOPs of a step by formula, and utilisation.

Station: packs and model sizes -> [FLOPs by part] -> metrics, throughput report, planner.  A multiplication with its
addition counts two; norms, rotation, activations and softmax are not counted.

Symbols: h hidden, q = query heads x head channels, kv = key/value heads x head channels, f FFN channels, N layers, V
vocabulary rows, C latent channels; u and g rows of the understanding and the generation expert, P allowed (query, key)
pairs of the mask, e CE rows, m distinct timesteps.

    linears of an expert   forward 2 (h (q + 2 kv) + q h + 3 h f) N u    backward twice that (inputs and weights)
    attention              forward 4 q P N (scores and values)           backward twice that
    embedder               forward 2 C h g + 2 (256 h + h h) m           backward: weights, and h h m for its input
    heads                  forward 2 h V e + 2 h C g                     backward twice that
    recompute              forward of what is run again in backward: 2 h V e of the LM head, whose logits are not kept;
                           by configuration all layers (full), attention (core_attn), or the 3 h f part of the linears
                           (mlp)

Model FLOPs are forward and backward of real tokens and real mask pairs, whatever a layout pads or recomputes; encoders,
which are frozen, are told apart.  The flash kernels' second look at the scores in backward is theirs, not the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from megatron_lance.config.schema import ModelConfig, ParallelConfig
from megatron_lance.packing.packer import mask_pairs
from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import VAE_KINDS, SegmentKind
from megatron_lance.parallel.dispatch import RankBatch

TIME_FEATURES = 256
"""Inputs of the time embedder's first linear."""


@dataclass(frozen=True)
class Work:
    """What of some packs costs FLOPs; counts add up.

    Attributes:
        und: rows of the understanding expert.
        gen: rows of the generation expert.
        pairs: (query, key) pairs.
        ce: rows of the LM head.
        timesteps: distinct timesteps, each of a noisy item or 0 for clean ones.
        squares: sum of squared sample lengths, which the BAGEL formula takes for pairs.
    """

    und: int = 0
    gen: int = 0
    pairs: int = 0
    ce: int = 0
    timesteps: int = 0
    squares: int = 0

    @classmethod
    def of(cls, pack: Pack) -> Work:
        """Real tokens and real mask pairs of a pack."""
        visual = [p.segment for p in pack.visual_segments(*VAE_KINDS)]
        noisy = sum(1 for segment in visual if segment.kind is SegmentKind.NOISE)
        clean = any(segment.kind is SegmentKind.CLEAN or segment.clean_frames for segment in visual)
        return cls(
            und=pack.length - pack.gen_length,
            gen=pack.gen_length,
            pairs=sum(mask_pairs(sample.segments) for sample in pack.samples),
            ce=pack.ce_rows,
            timesteps=noisy + clean,
            squares=sum(sample.length**2 for sample in pack.samples),
        )

    @classmethod
    def computed(cls, batch: RankBatch) -> Work:
        """What a context-parallel rank computes of a pack: padding rows, and masked pairs of causal slices, too."""
        und, gen = batch.region_rows
        pairs = sum(piece.num_queries * piece.num_keys for piece in batch.plan.slices)
        return cls(und, gen, pairs, len(batch.ce_rows), len(batch.timesteps), 0)

    @classmethod
    def total(cls, works: Iterable[Work]) -> Work:
        """Sum."""
        rows = [[getattr(work, field.name) for field in fields(cls)] for work in works]
        return cls(*map(sum, zip(*rows, strict=True)))

    @classmethod
    def mean(cls, works: Sequence[Work]) -> Work:
        """Mean, in whole numbers."""
        return cls(*(round(value / len(works)) for value in vars(cls.total(works)).values()))

    @property
    def tokens(self) -> int:
        """Rows of both experts."""
        return self.und + self.gen


@dataclass(frozen=True)
class Flops:
    """FLOPs of one part.

    Attributes:
        forward: once.
        backward: of inputs and weights.
        recompute: forward again within backward.
    """

    forward: float
    backward: float
    recompute: float = 0.0

    @property
    def model(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def computed(self) -> float:
        """With recompute."""
        return self.model + self.recompute


def linear_weights(model: ModelConfig) -> tuple[int, int]:
    """Multiplications of a token in one layer: (QKV and output projection, the three of SwiGLU)."""
    heads, groups = (n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
    return model.hidden_size * (2 * heads + 2 * groups), 3 * model.hidden_size * model.ffn_hidden_size


def flops_by_part(
    model: ModelConfig, work: Work, parallel: ParallelConfig | None = None, freeze: Sequence[str] = ()
) -> dict[str, Flops]:
    """FLOPs of each part over all layers and ranks.

    Args:
        model: sizes.
        work: of the packs.
        parallel: what is recomputed; None: nothing.
        freeze: training.freeze; frozen weights need no gradient, so backward is once of inputs.

    Returns:
        by "linears und", "linears gen", "attention", "embedder", "heads".
    """
    granularity = parallel.recompute_granularity if parallel else None
    modules = parallel.recompute_modules if parallel and granularity == "selective" else ()
    full = granularity == "full"
    projections, mlp = linear_weights(model)
    experts = parallel.recompute_experts if parallel and "mlp" in modules else ()
    layers, h, c = model.num_layers, model.hidden_size, model.latent_channels

    def linears(expert: str, rows: int, frozen: bool = False) -> Flops:
        each, again = 2.0 * rows * layers, (projections + mlp) * full + mlp * (expert in experts)
        return Flops(each * (projections + mlp), (2 - frozen) * each * (projections + mlp), each * again)

    attended = 4.0 * model.num_attention_heads * model.kv_channels * work.pairs * layers
    connectors = 2.0 * c * h * work.gen + 2.0 * TIME_FEATURES * h * work.timesteps
    second = 2.0 * h * h * work.timesteps  # of the time embedder; the only one whose input needs a gradient
    words, velocities = 2.0 * h * model.vocab_size * work.ce, 2.0 * h * c * work.gen
    return {
        "linears und": linears("und", work.und, "und" in freeze),
        "linears gen": linears("gen", work.gen),
        "attention": Flops(attended, 2 * attended, attended * (full or "core_attn" in modules)),
        "embedder": Flops(connectors + second, connectors + 2 * second),
        "heads": Flops(words + velocities, (2 - ("head" in freeze)) * words + 2 * velocities, words),
    }


def model_flops(model: ModelConfig, work: Work, freeze: Sequence[str] = ()) -> float:
    """Forward and backward of the trained model."""
    return sum(part.model for part in flops_by_part(model, work, freeze=freeze).values())


def bagel_flops(model: ModelConfig, work: Work) -> float:
    """The formula that BAGEL's trainer logs: 6 (weights of one expert, embedding and head) tokens + 12 q N squares.

    It takes a token for one that passes all of embedding and head, and a sample's mask for its whole square.
    """
    weights = sum(linear_weights(model)) * model.num_layers + 2 * model.vocab_size * model.hidden_size
    heads = model.num_attention_heads * model.kv_channels
    return 6.0 * weights * work.tokens + 12.0 * heads * model.num_layers * work.squares


@dataclass(frozen=True)
class Speed:
    """How fast a step's FLOPs were, per device.

    Attributes:
        tflops: model FLOPs, 1e12 per second and device.
        bagel_tflops: the same by the BAGEL formula.
        mfu: the first over the device's peak; None where that is not known.
        bagel_mfu: the second over it.
    """

    tflops: float
    bagel_tflops: float
    mfu: float | None
    bagel_mfu: float | None

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        work: Work,
        seconds: float,
        devices: int,
        peak: float | None,
        freeze: Sequence[str] = (),
    ) -> Speed:
        """Of a step.

        Args:
            model: sizes.
            work: of the global batch.
            seconds: of the step.
            devices: that shared it.
            peak: of a device, 1e12 FLOP/s, or None.
            freeze: training.freeze.
        """
        counted = (model_flops(model, work, freeze), bagel_flops(model, work))
        rates = [flops / seconds / devices / 1e12 for flops in counted]
        used = [None if peak is None else rate / peak for rate in rates]
        return cls(rates[0], rates[1], used[0], used[1])
