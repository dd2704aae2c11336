"""Every setting of a run as frozen dataclasses; the unit or shape of each field is in its comment.

Names of degrees, batch sizes and optimizer settings are Megatron's.  The loader (loader.py) fills these from YAML
files and dotted overrides; `validate` (validate.py) holds the rules for values and between fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of the model (spec/model.md sections 1, 4, 8). Defaults are Lance-3B."""

    num_layers: int = 36  # dual-expert layers
    hidden_size: int = 2048  # channels
    ffn_hidden_size: int = 11008  # channels, SwiGLU
    num_attention_heads: int = 16  # query heads
    num_query_groups: int = 2  # key/value heads
    kv_channels: int = 128  # channels per head
    vocab_size: int = 151936  # rows of embedding and LM head; the tokenizer may use fewer
    layernorm_epsilon: float = 1e-6
    qk_norm: bool = True  # RMSNorm of q and k per head; false: what Qwen2.5-VL computes
    rotary_base: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)  # frequencies per axis (temporal, height, width)
    rope_inv_freq_dtype: str | None = None  # float32 | bfloat16; null: what the weights say, released ones bfloat16
    mape: str = "release"  # release | paper | none
    mape_step: int = 1000  # temporal distance between modality groups
    latent_channels: int = 48  # VAE channels
    latent_position_frames: int = 31  # rows of the frozen position table along time
    latent_position_size: int = 64  # rows of the frozen position table along height and along width
    ce_chunk_rows: int = 2048  # rows of the LM head whose logits exist at a time, in forward and in backward
    transformer_impl: str = "local"  # local (megatron-core's linears) | transformer_engine (its linears and norms)
    attention_backend: str = "auto"  # auto: fastest of a trial on the device (CPU: sdpa) | one of ops/attention.py


@dataclass(frozen=True)
class Fp8Config:
    """FP8 of both experts' linears by megatron-core's recipes; needs model.transformer_impl = transformer_engine."""

    recipe: str = "none"  # none | delayed | tensorwise | blockwise | mxfp8 (Blackwell), of the scaling factors
    format: str = "hybrid"  # hybrid (e4m3, gradients e5m2) | e4m3
    margin: int = 0  # powers of two between the greatest value and the format's; delayed
    amax_history_len: int = 1024  # forward passes whose greatest values are remembered; delayed
    amax_compute_algo: str = "max"  # max | most_recent, of that history; delayed
    first_layers_bf16: int = 0  # layers at the start of the model that stay in bf16; not delayed
    last_layers_bf16: int = 0  # layers at its end that do


@dataclass(frozen=True)
class OpsConfig:
    """Which implementation of an op serves; all compute the same."""

    mape: str = "auto"  # QK-norm and rotation: auto (fused where it can serve) | fused (compiled) | reference (torch)


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees and memory switches, by Megatron's names. Sequence parallelism is always on when TP > 1."""

    tensor_model_parallel_size: int = 1  # ranks
    pipeline_model_parallel_size: int = 1  # ranks
    virtual_pipeline_model_parallel_size: int | None = None  # model chunks per pipeline rank
    context_parallel_size: int = 1  # ranks
    num_layers_in_first_pipeline_stage: int | None = None  # layers
    num_layers_in_last_pipeline_stage: int | None = None  # layers
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute_granularity: str | None = None  # None | selective | full
    recompute_modules: tuple[str, ...] = ("core_attn",)  # what selective recomputes: core_attn, layernorm, mlp
    recompute_experts: tuple[str, ...] = ("und", "gen")  # whose layernorm and mlp selective recomputes
    recompute_num_layers: int = 1  # layers per recomputed chunk (uniform)
    offload_layers: int = 0  # first layers of each model chunk whose saved activations wait on the host
    region_alignment: int = 8  # rows; each expert region per TP rank is a multiple of it


@dataclass(frozen=True)
class SourceConfig:
    """One data set: parquet files of one schema and task."""

    name: str  # stable; part of every sample id
    path: str  # file, folder or glob; fsspec URLs allowed
    task: str  # t2i | t2v | i2v | i_edit | v_edit | s2i | s2v | i2t | v2t | t2t
    weight: float = 1.0  # relative share of samples
    frame_conditions: str = "first"  # i2v: first | first_last
    raw_bytes_input: bool = True  # media columns hold bytes; False: paths or URLs


@dataclass(frozen=True)
class PromptConfig:
    """System prompts (spec/data.md section 2); {v} becomes image or video, the target's kind."""

    generation: str = (
        "Describe the {v} by detailing the color, quantity, visible text, shape, size, texture, spatial relationships "
        "and motion/camera movements of the objects and background:"
    )
    generation_image_inference: str = (
        "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the "
        "objects and background:"
    )
    editing: str = (
        "Describe the key features of the input {v} (color, shape, size, texture, objects, background), then explain "
        "how the user’s text instruction should alter or modify the {v}. Generate a new {v} that meets the user’s "
        "requirements while maintaining consistency with the original input where appropriate."
    )
    subject: str = (
        "Describe the key features of the input image (color, shape, size, texture, objects, background, style), then "
        "incorporate the user’s text description to generate a new {v} that satisfies the user’s requirements while "
        "preserving the essential identity and object or style information from the reference input."
    )
    captioning: str = (
        "Generate a detailed and accurate description of the {v}, including all the key moments and visual details."
    )
    understanding: str = "View the {v} attentively and provide a suitable answer to the posed question."


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are sized and packed (spec/data.md)."""

    sources: tuple[SourceConfig, ...] = ()
    pack_index: str = ""  # folder written by tools/prepack.py
    facts: str = ""  # folder of what prepack found out about data files, kept between runs; empty: beside pack_index
    epochs: int = 1  # passes over the mixture that prepack plans; training wraps round behind them
    tokenizer: str = ""  # folder with tokenizer.json
    seq_length: int = 50000  # tokens, capacity of a pack (the recipes' max)
    max_sample_length: int | None = None  # tokens; longer rows are unusable; null: seq_length
    balance_replicas: int | None = None  # data-parallel size whose cost packs even out; null: half the global batch
    length_bands: int = 1  # 1: all steps alike; k: each step from one of k bands of length, packs in it more alike
    planning_window: int = 384  # packs that are formed at a time
    mixing_row_groups: int = 8  # row groups of a source whose rows are drawn mixed; a read of one serves all its rows
    validation_fraction: float = 0.0  # share of rows, by a hash of file name and row, that training never sees
    vae_resolution: int = 640  # pixels; bucket area is its square
    vit_resolution: int = 616  # pixels
    vae_sides: tuple[int, ...] = ()  # pixels, (least short side, greatest long side) of VAE sizes; empty: any bucket
    vit_sides: tuple[int, ...] = ()  # pixels, as vae_sides, of ViT sizes in whole patches of 14
    target_fps: float = 12.0  # frames per second
    max_seconds_generation: float = 6.0  # seconds, generation and editing
    max_seconds_understanding: float = 2.0  # seconds
    frame_sampling: str = "release"  # release (whole clip, compressed in time) | trim (its first max_seconds)
    dropout_scheme: str = "release"  # release: caption and each condition by itself | paper: all, or the caption alone
    caption_dropout: float = 0.1  # probability that the caption is left out; paper: it alone
    condition_dropout: float = (
        0.1  # probability, release: of each condition, ViT and VAE together; paper: of everything
    )
    decode: str = "host"  # host (PyAV on a CPU) | mixed (NVDEC)
    decode_threads: int = 2  # threads of every process that decodes
    workers: int = 2  # processes per rank that read, tokenise and decode ahead; 0: none, steps are read when due
    steps_ahead: int = 1  # steps that are read before they are due; their pixels wait in shared memory
    encoding_cache: str = ""  # folder written by tools/encode_latents.py; what it lacks is encoded; empty: no cache
    row_group_cache: str = ""  # folder on a disk of each node, whose processes then read a row group once; empty: none
    row_group_cache_gb: float = 64.0  # GB (1e9 bytes) of all files there; what was used least recently is removed
    media_seconds: float = 30.0  # seconds that decoding a picture or clip may take in a worker; else it is broken
    prompts: PromptConfig = field(default_factory=PromptConfig)


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen encoders. An empty path gives a small random model, for trials and tests."""

    vit_path: str = ""  # folder in the Qwen2.5-VL layout (config.json, safetensors)
    vae: str = "wan"  # wan (diffusers AutoencoderKLWan, Wan2.2) | block_transform (weight-free codec)
    vae_path: str = ""  # folder in the diffusers layout, or the public file Wan2.2_VAE.pth
    posterior: str = "mean"  # mean | sample
    vae_tile: int = 0  # pixels, side of the tiles that samples are decoded in, a multiple of 64; 0: whole frames
    small_vit_hidden: int = 32  # channels of the small random ViT
    small_vit_depth: int = 2  # blocks of the small random ViT
    small_vit_heads: int = 2  # heads of the small random ViT
    dtype: str = "float32"  # float32 | bfloat16


@dataclass(frozen=True)
class ObjectiveConfig:
    """Losses and flow matching (spec/model.md sections 5 and 6)."""

    ce_weight: float = 0.25
    mse_weight: float = 1.0
    timestep_shift: float = 1.0
    timestep_distribution: str = "logit_normal"  # logit_normal | uniform


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW through megatron-core (spec/recipes.md)."""

    lr: float = 1e-4
    min_lr: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-15
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # global gradient norm
    lr_decay_style: str = "constant"  # constant | cosine
    lr_warmup_iters: int = 0  # steps
    lr_decay_iters: int | None = None  # steps; None: train_iters


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    train_iters: int = 1000  # steps
    global_batch_size: int = 1  # packs per step
    micro_batch_size: int = 1  # packs per micro-batch; a pack is a micro-batch, so always 1
    seed: int = 1234
    precision: str = "bf16"  # float32 | bf16 (float32 main weights and gradients)
    init_from: str = ""  # folder in the public Lance layout, or a checkpoint; empty: random by (seed, parameter name)
    freeze: tuple[str, ...] = ()  # weights left as they are, beside ViT and VAE: embeddings, head, und (the expert)
    run_dir: str = "runs/default"  # everything a run writes
    log_interval: int = 1  # steps
    max_nonfinite_steps: int = 3  # steps in a row whose loss or gradients may be not finite before the run ends
    stop_after_minutes: float = 0.0  # minutes of this process, after which it saves and ends; 0: no limit
    hang_seconds: float = 1800.0  # seconds without progress, after which a rank says where it stands and ends; 0: never
    straggler_factor: float = 1.25  # of the replicas' median time from which a replica is named; 0: never
    straggler_interval: int = 50  # steps over which that time is added up
    spike_factor: float = 0.0  # of the median loss above which the run goes back to a checkpoint; 0: never
    spike_steps: int = 3  # steps in a row with so high a loss
    spike_window: int = 100  # steps the median is of
    max_rewinds: int = 3  # times a process goes back before it ends
    save_interval: int = 0  # steps between checkpoints; 0: only at the end
    keep_last: int = 0  # newest checkpoints that are kept; 0: all
    keep_every: int = 0  # steps; checkpoints of its multiples are kept beside the newest; 0: none
    async_save: bool = False  # write checkpoints in the background while training goes on
    save_format: str = "dp_reshardable"  # of the optimizer's state | fully_reshardable: loads on other tp and pp too
    fully_reshardable_every: int = 0  # steps; checkpoints of its multiples are fully reshardable; 0: none
    ema_decay: float = 0.0  # of a float32 running average of the weights, per step, below 1; 0: no average
    resume: str | int = (
        ""  # empty: start afresh | auto: the latest if there is one | latest | a step | a checkpoint's folder
    )
    progress: bool = False  # progress bar instead of log lines, on a terminal


@dataclass(frozen=True)
class ValidationConfig:
    """Losses of rows that training never sees, at fixed noise and timesteps."""

    pack_index: str = ""  # folder written by tools/prepack.py --held-out; empty: no validation
    interval: int = 1000  # steps; also after the last step
    packs: int = 64  # packs that are gone through, the first of the index; all where it has fewer
    max_seconds: float = 600.0  # seconds; once they are over no further packs are begun
    ema: bool = False  # measure the averaged weights


@dataclass(frozen=True)
class PreviewConfig:
    """Fixed prompts sampled during training for TensorBoard."""

    prompts: str = ""  # JSONL of prompts, any tasks (megatron_lance/sampling/prompt_list.py); empty: nothing
    interval: int = 1000  # steps; also after the last step
    max_seconds: float = 600.0  # seconds; once they are over no further batch is begun
    batch: int = 8  # prompts per forward pass
    height: int = 256  # pixels, a multiple of 16; of lines that do not say it; an edit takes its source's
    width: int = 256  # pixels, as height
    frames: int = 17  # of clips, 4k+1; of lines that do not say it; an edit takes its source's
    steps: int = 30  # Euler steps
    shift: float = 3.5  # timestep shift of the sampler
    scale: float = 4.0  # guidance scale on text
    visual_scale: float = 1.0  # guidance scale on visual conditions
    max_tokens: int = 64  # of an answer, which is greedy
    ema: bool = False  # sample with the averaged weights


@dataclass(frozen=True)
class ProfilingConfig:
    """What speed is measured against."""

    peak_tflops: float | None = (
        None  # 1e12 FLOP/s of a device in the run's precision; null: of its data sheet, if known
    )


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoders: EncoderConfig = field(default_factory=EncoderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
