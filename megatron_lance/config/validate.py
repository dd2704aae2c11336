"""Rules for the values of a configuration and between its fields.

Station: after the loader, before any process group exists.  In: `RunConfig` and the number of ranks.  Out: nothing,
or one `ConfigError` with a line per broken rule: field, value, rule, remedy.  Whether files and folders exist is
checked by what reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from megatron_lance.config.fp8 import RECIPES, fp8_problems
from megatron_lance.config.loader import ConfigError
from megatron_lance.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PreviewConfig,
    RunConfig,
)

TASKS = ("t2i", "t2v", "i2v", "i_edit", "v_edit", "s2i", "s2v", "i2t", "v2t", "t2t")

_CHOICES: dict[str, Sequence[str | None]] = {
    "model.rope_inv_freq_dtype": (None, "float32", "bfloat16"),
    "model.mape": ("release", "paper", "none"),
    "model.attention_backend": (
        "auto",
        "varlen_te",
        "varlen_torch",
        "flex",
        "sdpa",
        "varlen_emulated",
        "dense",
    ),
    "model.transformer_impl": ("local", "transformer_engine"),
    "ops.mape": ("auto", "fused", "reference"),
    "fp8.recipe": RECIPES,
    "fp8.format": ("hybrid", "e4m3"),
    "fp8.amax_compute_algo": ("max", "most_recent"),
    "parallel.recompute_granularity": (None, "selective", "full"),
    "data.frame_sampling": ("release", "trim"),
    "data.dropout_scheme": ("release", "paper"),
    "data.decode": ("host", "mixed"),
    "encoders.vae": ("wan", "block_transform"),
    "encoders.posterior": ("mean", "sample"),
    "encoders.dtype": ("float32", "bfloat16"),
    "objective.timestep_distribution": ("logit_normal", "uniform"),
    "optimizer.lr_decay_style": ("constant", "cosine"),
    "training.precision": ("float32", "bf16"),
    "training.save_format": ("dp_reshardable", "fully_reshardable"),
}
_POSITIVE = (
    "model.num_layers model.hidden_size model.ffn_hidden_size model.num_attention_heads model.num_query_groups "
    "model.kv_channels model.vocab_size model.layernorm_epsilon model.rotary_base model.mape_step "
    "model.latent_channels model.latent_position_frames model.latent_position_size model.ce_chunk_rows "
    "parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size parallel.context_parallel_size "
    "parallel.recompute_num_layers parallel.region_alignment fp8.amax_history_len "
    "data.epochs data.seq_length data.length_bands data.planning_window data.mixing_row_groups data.target_fps "
    "data.max_seconds_generation data.max_seconds_understanding data.decode_threads data.steps_ahead "
    "data.media_seconds data.row_group_cache_gb "
    "encoders.small_vit_hidden encoders.small_vit_depth encoders.small_vit_heads "
    "objective.timestep_shift optimizer.adam_eps "
    "training.train_iters training.global_batch_size training.log_interval training.max_nonfinite_steps "
    "training.straggler_interval training.spike_steps training.spike_window "
    "validation.interval validation.packs validation.max_seconds "
    "preview.interval preview.max_seconds preview.batch preview.height preview.width preview.frames preview.steps "
    "preview.shift preview.max_tokens"
).split()
_NOT_NEGATIVE = (
    "objective.ce_weight objective.mse_weight optimizer.lr optimizer.min_lr optimizer.weight_decay "
    "fp8.margin fp8.first_layers_bf16 fp8.last_layers_bf16 data.workers optimizer.clip_grad "
    "parallel.offload_layers optimizer.lr_warmup_iters training.seed training.save_interval "
    "training.keep_last training.keep_every training.fully_reshardable_every training.stop_after_minutes "
    "training.hang_seconds training.straggler_factor training.spike_factor training.max_rewinds"
).split()
MAX_FUSED_CHANNELS = 256
_RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp")
_EXPERTS = ("und", "gen")
FREEZE_SETS = ("embeddings", "head", "und")
_PROBABILITIES = ("data.caption_dropout", "data.condition_dropout", "data.validation_fraction")


def validate(config: RunConfig, world_size: int) -> None:
    """Refuse a configuration that no run of `world_size` ranks can follow.

    Args:
        config: the configuration.
        world_size: ranks of the run.

    Raises:
        ConfigError: one line per broken rule.  Rules between fields are looked at only once every single value is
            possible by itself.
    """
    problems = list(_values(config)) or [
        *_degrees(config, world_size),
        *_layer_split(config),
        *_recompute(config),
        *_offload(config),
        *_model(config.model),
        *_ops(config),
        *fp8_problems(config),
        *_tensor_split(config.model, config.parallel),
        *_video_length(config.data, config.model),
        *_sources(config.data),
        *_sample_bounds(config.data),
        *_dropout(config.data),
        *_balance(config.data, config.training.global_batch_size),
        *_cache(config),
        *_row_group_cache(config.data),
        *_small_vit(config),
        *_optimizer(config.optimizer, config.training.train_iters),
        *_average(config),
        *_profiling(config),
        *_freeze(config.training.freeze),
        *_preview(config.preview),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _get(config: RunConfig, field: str) -> object:
    section, name = field.split(".")
    return getattr(getattr(config, section), name)


def _values(config: RunConfig) -> Iterator[str]:
    """Rules for one value by itself."""
    for field, choices in _CHOICES.items():
        yield from _choice(field, _get(config, field), choices)
    for i, source in enumerate(config.data.sources):
        yield from _choice(f"data.sources.{i}.task", source.task, TASKS)
        yield from _choice(f"data.sources.{i}.frame_conditions", source.frame_conditions, ("first", "first_last"))
        if source.weight < 0:
            yield f"data.sources.{i}.weight = {source.weight}: must not be negative; set 0 to leave the source out"
    for field in _POSITIVE:
        if not (value := _number(config, field)) > 0:
            yield f"{field} = {value}: must be positive; set a value above 0"
    for field in _NOT_NEGATIVE:
        if not (value := _number(config, field)) >= 0:
            yield f"{field} = {value}: must not be negative; set 0 or more"
    for field in _PROBABILITIES:
        if not 0 <= (value := _number(config, field)) <= 1:
            yield f"{field} = {value}: is a probability; set a value from 0 to 1"
    for field, usual in (
        ("optimizer.adam_beta1", "the recipes use 0.9"),
        ("optimizer.adam_beta2", "the recipes use 0.95"),
        ("training.ema_decay", "usual is 0.9999, and 0 turns it off"),
    ):
        if not 0 <= (value := _number(config, field)) < 1:
            yield f"{field} = {value}: must be at least 0 and below 1; {usual}"
    for field, least, cell in (("data.vae_resolution", 32, 16), ("data.vit_resolution", 37, 28)):
        if (value := _number(config, field)) < least:
            yield f"{field} = {value}: must be at least {least} for every bucket to hold a {cell}-pixel cell; raise it"
    tile = config.encoders.vae_tile
    if tile < 0 or tile % 64 or (tile and config.encoders.vae != "wan"):
        rule = "must be a multiple of 64 pixels with encoders.vae=wan"
        yield f"encoders.vae_tile = {tile}: {rule}; set 0 for whole frames"
    vpp = config.parallel.virtual_pipeline_model_parallel_size
    if vpp is not None and vpp < 2:
        yield f"parallel.virtual_pipeline_model_parallel_size = {vpp}: must be at least 2; set null for no interleaving"


def _number(config: RunConfig, field: str) -> float:
    value = _get(config, field)
    assert isinstance(value, (int, float)), field
    return value


def _choice(field: str, value: object, choices: Sequence[str | None]) -> Iterator[str]:
    if value not in choices:
        yield f"{field} = {value}: unknown choice; set one of {', '.join('null' if c is None else c for c in choices)}"


def _degrees(config: RunConfig, world_size: int) -> Iterator[str]:
    """World size, global batch and micro-batches (design: one error that prints the equation)."""
    p, t = config.parallel, config.training
    tp, cp, pp = p.tensor_model_parallel_size, p.context_parallel_size, p.pipeline_model_parallel_size
    dp = max(world_size // (tp * cp * pp), 1)
    if tp * cp * pp * dp != world_size:
        yield (
            f"parallel: tp {tp} x cp {cp} x pp {pp} x dp {dp} = {tp * cp * pp * dp}, but world size is {world_size}; "
            f"start a multiple of {tp * cp * pp} ranks or change the degrees"
        )
        return
    if t.micro_batch_size != 1:
        yield f"training.micro_batch_size = {t.micro_batch_size}: a pack is a micro-batch; set 1"
    if t.global_batch_size % dp:
        yield (
            f"training.global_batch_size = {t.global_batch_size}: must be divisible by dp {dp} = world size "
            f"{world_size} / (tp {tp} x cp {cp} x pp {pp}); set a multiple of {dp}"
        )
    elif p.virtual_pipeline_model_parallel_size is not None and t.global_batch_size // dp % pp:
        yield (
            f"training.global_batch_size = {t.global_batch_size}: with virtual pipeline stages the "
            f"{t.global_batch_size // dp} micro-batches of a replica (dp {dp}) must be divisible by pp {pp}; "
            f"set a multiple of {dp * pp}"
        )
    if p.overlap_param_gather and not (p.use_distributed_optimizer and p.overlap_grad_reduce):
        yield (
            "parallel.overlap_param_gather = True: needs parallel.use_distributed_optimizer and "
            "parallel.overlap_grad_reduce; set both true or this false"
        )


def _layer_split(config: RunConfig) -> Iterator[str]:
    """Layers over pipeline ranks and model chunks, by Megatron's rules for uneven first and last stages."""
    p, layers = config.parallel, config.model.num_layers
    pp, vpp = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size
    ends = {
        f"parallel.{name}": value
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if (value := getattr(p, name)) is not None
    }
    if pp == 1:
        for field, value in {"parallel.virtual_pipeline_model_parallel_size": vpp, **ends}.items():
            if value is not None:
                yield f"{field} = {value}: needs pp > 1; set null or raise parallel.pipeline_model_parallel_size"
        return
    chunks = vpp or 1
    for field, value in ends.items():
        if value < 1 or value % chunks:
            yield f"{field} = {value}: must be a positive multiple of vpp {chunks}; change one of them"
    middle, stages = layers - sum(ends.values()), pp - len(ends)
    fits = middle == 0 if stages == 0 else middle > 0 and middle % (stages * chunks) == 0
    if not fits:
        uneven = "".join(f" - {value}" for value in ends.values())
        yield (
            f"model.num_layers = {layers}: {layers}{uneven} = {middle} layers must split evenly over {stages} pipeline "
            f"stages x vpp {chunks}; change num_layers, the degrees or the layers of the first and last stage"
        )


def _recompute(config: RunConfig) -> Iterator[str]:
    """Recomputed modules must exist; recomputed chunks must fill every model chunk."""
    p = config.parallel
    for name, known in (("recompute_modules", _RECOMPUTE_MODULES), ("recompute_experts", _EXPERTS)):
        named = getattr(p, name)
        if not named or not set(named) <= set(known):
            yield (
                f"parallel.{name} = {list(named)}: must be some of {', '.join(known)}; for no recompute set "
                "parallel.recompute_granularity=null"
            )
    if p.recompute_granularity != "full":
        return
    chunks = _chunk_layers(config)
    if any(chunk % p.recompute_num_layers for chunk in chunks):
        yield (
            f"parallel.recompute_num_layers = {p.recompute_num_layers}: must divide the layers of every model chunk, "
            f"{sorted(chunks)}; set a divisor, for example 1"
        )


def _chunk_layers(config: RunConfig) -> set[int]:
    """Layers of the model chunks, each number once."""
    p, layers = config.parallel, config.model.num_layers
    ends = [n for n in (p.num_layers_in_first_pipeline_stage, p.num_layers_in_last_pipeline_stage) if n is not None]
    middle_stages = p.pipeline_model_parallel_size - len(ends)
    stages = [*ends, *([(layers - sum(ends)) // middle_stages] if middle_stages > 0 else [])]
    return {stage // (p.virtual_pipeline_model_parallel_size or 1) for stage in stages}


def _offload(config: RunConfig) -> Iterator[str]:
    """Every model chunk must have the layers that are offloaded, and they must keep something."""
    p = config.parallel
    if not p.offload_layers:
        return
    if p.offload_layers > (least := min(_chunk_layers(config))):
        yield (
            f"parallel.offload_layers = {p.offload_layers}: must not exceed the {least} layers of the smallest model "
            "chunk; lower it"
        )
    if p.recompute_granularity == "full":
        yield (
            f"parallel.offload_layers = {p.offload_layers}: parallel.recompute_granularity=full keeps nothing but "
            "layers' inputs; set 0, or selective recompute"
        )


def _model(m: ModelConfig) -> Iterator[str]:
    """Shapes of the model by itself."""
    if m.hidden_size % 2:
        yield f"model.hidden_size = {m.hidden_size}: must be even for the sin-cos position table; change it"
    if m.num_attention_heads % m.num_query_groups:
        yield (
            f"model.num_attention_heads = {m.num_attention_heads}: must be divisible by model.num_query_groups "
            f"{m.num_query_groups}; change one of them"
        )
    if len(m.mrope_section) != 3 or min(m.mrope_section) < 0 or 2 * sum(m.mrope_section) != m.kv_channels:
        yield (
            f"model.mrope_section = {list(m.mrope_section)}: must be three counts (temporal, height, width) with "
            f"2 x sum = model.kv_channels {m.kv_channels}, but 2 x sum = {2 * sum(m.mrope_section)}; change one of them"
        )


def _ops(config: RunConfig) -> Iterator[str]:
    """What a compiled op can do."""
    channels = config.model.kv_channels
    if config.ops.mape == "fused" and (channels % 8 or channels > MAX_FUSED_CHANNELS):
        yield (
            f"ops.mape = fused: model.kv_channels {channels} is no multiple of 8 up to {MAX_FUSED_CHANNELS}; choose "
            "another head size or set ops.mape=auto"
        )
    if config.ops.mape == "fused" and not config.model.qk_norm:
        yield "ops.mape = fused: norms and rotates in one, but model.qk_norm = false has no norm; set ops.mape=auto"


def _tensor_split(m: ModelConfig, p: ParallelConfig) -> Iterator[str]:
    """What tensor parallelism shards."""
    tp = p.tensor_model_parallel_size
    for name in ("num_attention_heads", "ffn_hidden_size", "vocab_size"):
        if (value := getattr(m, name)) % tp:
            yield f"model.{name} = {value}: must be divisible by tp {tp}; change it or the degree"
    if m.num_query_groups % tp and tp % m.num_query_groups:
        yield f"model.num_query_groups = {m.num_query_groups}: must be a multiple or a divisor of tp {tp}; change one"


def _video_length(d: DataConfig, m: ModelConfig) -> Iterator[str]:
    """The longest clip against the rows of the position table (frame rule: spec/data.md section 3)."""
    frames = round(d.max_seconds_generation * d.target_fps)
    frames = max(4 * (frames // 4) + 1 if frames % 4 else frames - 3, 1)
    latent_frames = (frames - 1) // 4 + 1
    if latent_frames > m.latent_position_frames:
        yield (
            f"data.max_seconds_generation = {d.max_seconds_generation}: {frames} frames at {d.target_fps} fps are "
            f"{latent_frames} latent frames, but model.latent_position_frames is {m.latent_position_frames}; shorten "
            "the clips or enlarge the table"
        )


def _sources(d: DataConfig) -> Iterator[str]:
    """The data sets beside one another."""
    names = [s.name for s in d.sources]
    for i, name in enumerate(names):
        if not name or name in names[:i]:
            yield f"data.sources.{i}.name = {name!r}: must be unique and not empty; it is part of every sample id"
    if d.sources and not any(s.weight > 0 for s in d.sources):
        yield "data.sources: every weight is 0; give at least one source a positive weight"


def _sample_bounds(d: DataConfig) -> Iterator[str]:
    """Bounds of sizes and lengths."""
    for name in ("vae_sides", "vit_sides"):
        sides = getattr(d, name)
        if sides and (len(sides) != 2 or not 0 < sides[0] <= sides[1]):
            yield (
                f"data.{name} = {list(sides)}: must be the least short side and the greatest long side in pixels, or "
                "empty; correct it"
            )
    if d.max_sample_length is not None and not 0 < d.max_sample_length <= d.seq_length:
        yield (
            f"data.max_sample_length = {d.max_sample_length}: must be positive and not above data.seq_length "
            f"{d.seq_length}; change it or set null"
        )


def _dropout(d: DataConfig) -> Iterator[str]:
    """The paper's scheme drops all, or the caption alone: two events of which only one can happen."""
    if d.dropout_scheme == "paper" and (total := d.caption_dropout + d.condition_dropout) > 1:
        yield (
            f"data.caption_dropout = {d.caption_dropout}: with data.condition_dropout {d.condition_dropout} is "
            f"{total}, but data.dropout_scheme paper drops one or the other; lower one of them"
        )


def _balance(d: DataConfig, global_batch_size: int) -> Iterator[str]:
    """The data-parallel size that packs are balanced for."""
    replicas = d.balance_replicas
    if replicas is not None and (replicas < 1 or global_batch_size % replicas):
        yield (
            f"data.balance_replicas = {replicas}: must divide training.global_batch_size {global_batch_size}; set the "
            "data-parallel size of the run, or null"
        )


def _cache(config: RunConfig) -> Iterator[str]:
    """A cache holds one encoding per picture or clip."""
    if config.data.encoding_cache and config.encoders.posterior != "mean":
        yield (
            f"data.encoding_cache = {config.data.encoding_cache}: holds means, but encoders.posterior = "
            f"{config.encoders.posterior}; set encoders.posterior=mean or data.encoding_cache=''"
        )


def _row_group_cache(d: DataConfig) -> Iterator[str]:
    """Files of the cache must not be taken for data."""
    if not d.row_group_cache:
        return
    folder = Path(d.row_group_cache).resolve()
    for source in d.sources:
        parts = Path(source.path.removeprefix("file://")).parts
        above = Path(*takewhile(lambda part: not set(part) & set("*?["), parts)).resolve()
        if source.path and folder.is_relative_to(above):
            yield (
                f"data.row_group_cache = {d.row_group_cache}: lies in the folder of data.sources {source.name}; name "
                "a folder outside it, on a disk of each node"
            )


def _small_vit(config: RunConfig) -> Iterator[str]:
    """The small random ViT: its rotary embedding halves a head once per image axis."""
    e = config.encoders
    if not e.vit_path and e.small_vit_hidden % (4 * e.small_vit_heads):
        yield (
            f"encoders.small_vit_hidden = {e.small_vit_hidden}: must be divisible by 4 x encoders.small_vit_heads "
            f"{e.small_vit_heads}; change one of them"
        )


def _average(config: RunConfig) -> Iterator[str]:
    """The running average of the weights: sharded as the distributed optimizer is."""
    decay = config.training.ema_decay
    if decay and not config.parallel.use_distributed_optimizer:
        yield f"training.ema_decay = {decay}: needs parallel.use_distributed_optimizer; set that true or this 0"
    for field in ("validation.ema", "preview.ema"):
        if _get(config, field) and not decay:
            yield f"{field} = True: needs averaged weights; set training.ema_decay, for example 0.9999, or this false"


def _freeze(sets: Sequence[str]) -> Iterator[str]:
    """Freeze sets must exist; the ViT and the VAE are always frozen and are not named."""
    if any(name not in FREEZE_SETS for name in sets) or len(set(sets)) < len(sets):
        yield f"training.freeze = {list(sets)}: must be some of {', '.join(FREEZE_SETS)}, each once; correct the list"


def _preview(p: PreviewConfig) -> Iterator[str]:
    """Sizes that have a latent grid."""
    for name in ("height", "width"):
        if (value := getattr(p, name)) % 16:
            yield f"preview.{name} = {value}: must be a multiple of 16 pixels; change it"
    if p.frames % 4 != 1:
        yield f"preview.frames = {p.frames}: must be 4k+1; set for example 1, 5, 9 or 17"


def _optimizer(o: OptimizerConfig, train_iters: int) -> Iterator[str]:
    """The learning-rate schedule."""
    decay = train_iters if o.lr_decay_iters is None else o.lr_decay_iters
    if decay < 1:
        yield f"optimizer.lr_decay_iters = {decay}: must be positive; set null for training.train_iters"
    elif o.lr_warmup_iters >= min(decay, train_iters):
        yield (
            f"optimizer.lr_warmup_iters = {o.lr_warmup_iters}: must be below training.train_iters {train_iters} and "
            f"optimizer.lr_decay_iters {decay}; shorten the warm-up or lengthen the run"
        )
    if o.min_lr > o.lr:
        yield f"optimizer.min_lr = {o.min_lr}: must not exceed optimizer.lr {o.lr}; lower it"


def _profiling(config: RunConfig) -> Iterator[str]:
    """The peak that speed is measured against."""
    peak = config.profiling.peak_tflops
    if peak is not None and not peak > 0:
        yield f"profiling.peak_tflops = {peak}: must be positive; set 1e12 FLOP/s of a device, or null"
