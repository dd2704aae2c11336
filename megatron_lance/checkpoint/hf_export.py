"""A checkpoint's weights in the public Hugging Face layout (spec/model.md section 9).

Station: checkpoint -> [export] -> folder with model.safetensors, llm_config.json, generation_config.json and the
tokenizer's files; `training.init_from` reads such a folder.  One process reads the checkpoint of any layout and writes
each tensor as it comes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_lance.checkpoint.files import partial_folder, publish
from megatron_lance.checkpoint.hf_lance import Shape, bindings, public_shapes
from megatron_lance.checkpoint.manifest import Checkpoint
from megatron_lance.checkpoint.tensors import ModelTensors
from megatron_lance.config.errors import UserError
from megatron_lance.config.loader import from_dict
from megatron_lance.config.schema import ModelConfig
from megatron_lance.data.prompt import IM_END, VIDEO_PAD, VISION_END, VISION_START, Tokenizer
from megatron_lance.model.embedder import LatentPosition
from megatron_lance.packing.positions import TEMPORAL_STRIDE

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "llm_config.json"
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "chat_template.json chat_template.jinja"
).split()
POSITION_KEY = "latent_pos_embed.pos_embed"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_MAX_POSITIONS = 128000  # of Qwen2.5-VL-3B; rotary positions have no bound of their own


class ExportError(UserError):
    """An export that cannot be made."""


def export_lance(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    progress: bool = False,
) -> None:
    """Write a checkpoint's weights to `out`; the folder appears complete or not at all.

    Args:
        checkpoint: written on any layout.
        out: folder to make.
        dtype: a key of DTYPES; None keeps the checkpoint's.
        tokenizer: folder with tokenizer.json; None takes the run's.
        force: replace an earlier export.
        progress: draw a progress bar on stderr.

    Raises:
        ExportError: if `out` exists or the tokenizer is not the run's.
        TokenizerError: if the tokenizer is missing.
    """
    _check_target(out, force)
    run = from_dict(checkpoint.manifest.config, f"checkpoint '{checkpoint.folder}'")
    folder = tokenizer or Path(run.data.tokenizer)
    words = Tokenizer(folder)
    if words.sha256 != checkpoint.manifest.data.tokenizer_sha256:
        raise ExportError(f"tokenizer '{folder}': is not the one of the checkpoint; give its folder with --tokenizer")
    partial = partial_folder(out)
    tensors = ModelTensors(checkpoint.folder)
    name = dtype or next(name for name, value in DTYPES.items() if value is tensors.dtype)
    shapes = {**public_shapes(run.model), POSITION_KEY: _position_shape(run.model)}
    public = tqdm(_public(tensors, run.model), desc="export", unit="tensor", total=len(shapes), disable=not progress)
    write_safetensors(partial / WEIGHTS_FILE, shapes, DTYPES[name], iter(public))
    ids = _token_ids(folder)
    _write_json(partial / CONFIG_FILE, llm_config(run.model, ids, name))
    _write_json(partial / "generation_config.json", _generation_config(ids))
    for file in TOKENIZER_FILES:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, partial / file)
    publish(partial, out)


def _check_target(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise ExportError(f"'{out}': exists; give --force to replace it")
    if out.exists() and not (out / CONFIG_FILE).is_file():
        raise ExportError(f"'{out}': exists and holds no {CONFIG_FILE}, so it is no export; name another folder")


def _public(tensors: ModelTensors, model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every public tensor in the order of `public_shapes`, then the position table."""
    for name, binding in bindings(model).items():
        yield from binding.public([tensors.get(name)]).items()
    yield POSITION_KEY, position_table(model)


def _position_shape(model: ModelConfig) -> Shape:
    return model.latent_position_frames * model.latent_position_size**2, model.hidden_size


def position_table(model: ModelConfig) -> torch.Tensor:
    """The frozen latent position table, float32 [frames * size * size, hidden]."""
    frames, size = model.latent_position_frames, model.latent_position_size
    rows = LatentPosition(frames, size, model.hidden_size)
    table = torch.empty(_position_shape(model))
    plane = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    for frame, part in enumerate(table.chunk(frames)):
        part.copy_(rows(torch.cat([torch.full((size * size, 1), frame), plane], dim=1)))
    return table


def write_safetensors(
    path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Write a safetensors file header first, so that one tensor at a time is in memory.

    Args:
        path: to write.
        shapes: of all tensors, in the order they come.
        dtype: of all tensors in the file.
        tensors: (key, tensor of any dtype).

    Raises:
        ExportError: if a tensor is not the one that its place calls for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (key, shape), (found, tensor) in zip(shapes.items(), tensors, strict=True):
            if (found, tuple(tensor.shape)) != (key, shape):
                raise ExportError(f"{path}: {found} {tuple(tensor.shape)} came in place of {key} {shape}")
            file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().data)


def _token_ids(folder: Path) -> dict[str, int]:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in content["added_tokens"]}


def llm_config(model: ModelConfig, ids: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """The content of llm_config.json.

    Args:
        model: sizes.
        ids: of the tokenizer's special tokens; without an image_pad token of its own, images share video_pad, which
            is the placeholder of every visual block.
        dtype: of the weights.
    """
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": ids.get("<|endoftext|>"),
        "eos_token_id": ids[IM_END],
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "image_token_id": ids.get("<|image_pad|>", ids[VIDEO_PAD]),
        "initializer_range": 0.02,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": _MAX_POSITIONS,
        "max_window_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_scaling": {"type": "mrope", "mrope_section": list(model.mrope_section)},
        "rope_inv_freq_dtype": model.rope_inv_freq_dtype or "float32",
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": ids[VIDEO_PAD],
        "vision_config": {"spatial_merge_size": 2, "tokens_per_second": TEMPORAL_STRIDE},
        "vision_end_token_id": ids[VISION_END],
        "vision_start_token_id": ids[VISION_START],
        "vocab_size": model.vocab_size,
    }


def _generation_config(ids: Mapping[str, int]) -> dict[str, Any]:
    """Greedy decoding of up to 256 tokens, the released default."""
    return {
        "bos_token_id": ids.get("<|endoftext|>"),
        "do_sample": False,
        "eos_token_id": ids[IM_END],
        "max_new_tokens": 256,
        "pad_token_id": ids.get("<|endoftext|>"),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
