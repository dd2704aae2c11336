"""A checkpoint's weights in the public Hugging Face layout (spec/model.md section 9).

Station: checkpoint -> [export] -> folder with model.safetensors (or several files and their index), llm_config.json,
generation_config.json, the tokenizer's files, and export.json, which names them all; `training.init_from` reads such a
folder.  One process reads the checkpoint of any layout and writes each tensor as it comes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_lance.checkpoint.digests import files_in
from megatron_lance.checkpoint.hf_vit import check_vit
from megatron_lance.checkpoint.manifest import Checkpoint
from megatron_lance.checkpoint.public_config import CONFIG_FILE, VARIANTS, read_config
from megatron_lance.checkpoint.public_files import TensorFolder, new_folder, shown, write_folder
from megatron_lance.checkpoint.view import CheckpointView
from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import ModelConfig
from megatron_lance.data.prompt import IM_END, VIDEO_PAD, VISION_END, VISION_START, Tokenizer
from megatron_lance.packing.positions import TEMPORAL_STRIDE

EXPORT_FILE = "export.json"
"""Names the files of an export, so that only an export is ever replaced."""
TOKENIZER_FOLDER = "tokenizer"
"""Where an imported checkpoint keeps the tokenizer of the public folder."""
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "chat_template.json chat_template.jinja"
).split()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = ("image", "video")
VIDEO_FRAMES = 31
"""Frames of the position table of the released video model."""
_MAX_POSITIONS = 128000  # of Qwen2.5-VL-3B; rotary positions have no bound of their own


class ExportError(UserError):
    """An export that cannot be made."""


def export_lance(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str | None = None,
    target: str | None = None,
    vit: Path | None = None,
    tokenizer: Path | None = None,
    max_shard_bytes: int | None = None,
    ema: bool = False,
    force: bool = False,
    progress: bool = False,
) -> None:
    """Write a checkpoint's weights to `out`; the folder appears complete or not at all.

    The largest tensor, embeddings or LM head, is in memory once, also where shards on several ranks wrote it; what is
    converted or computed is so in small blocks.

    Args:
        checkpoint: written on any layout.
        out: folder to make.
        dtype: a key of DTYPES; None keeps the checkpoint's.
        target: of TARGETS: a position table of one frame, or of 31 or the model's; None: the model's.
        vit: folder of a bare ViT to add as vit_model.*; None: the one that was imported with the checkpoint, if any.
        tokenizer: folder with tokenizer.json; None takes the imported one or the run's.
        max_shard_bytes: of tensors in a file; None: one file.
        ema: write the averaged weights.
        force: replace an earlier export.
        progress: draw a progress bar on stderr.

    Raises:
        ExportError: if `out` exists or the tokenizer is not the run's.
        CheckpointError: if the ViT does not fit, or the disk does not take the export.
        TokenizerError: if the tokenizer is missing.
    """
    _check_target(out, force)
    if vit is not None:
        shapes = {key: spec.shape for key, spec in TensorFolder(vit, f"--vit '{vit}'").specs.items()}
        check_vit(shapes, checkpoint.manifest.config["model"]["hidden_size"], f"--vit '{vit}'")
    view = CheckpointView(checkpoint, _frames(checkpoint, target), vit, ema)
    folder = _tokenizer_folder(checkpoint, tokenizer, view.run.data.tokenizer)
    if dtype is not None:
        view.specs = {key: replace(spec, dtype=DTYPES[dtype]) for key, spec in view.specs.items()}
    name = dtype or next(name for name, value in DTYPES.items() if value is view.tensors.dtype)
    ids = _token_ids(folder)
    with new_folder(out) as partial:
        stream = tqdm(view.stream(), desc="export", unit="tensor", total=len(view.specs), disable=not progress)
        write_folder(partial, view.specs, iter(stream), max_shard_bytes)
        _write_json(partial / CONFIG_FILE, llm_config(view.model, ids, name))
        _write_json(partial / "generation_config.json", _generation_config(ids))
        copy_tokenizer(folder, partial)
        _write_json(partial / EXPORT_FILE, {"files": [*files_in(partial), EXPORT_FILE]})


def _frames(checkpoint: Checkpoint, target: str | None) -> int | None:
    """Frames of a target's position table (spec/model.md section 1)."""
    frames: int = checkpoint.manifest.config["model"]["latent_position_frames"]
    return {None: None, "image": 1, "video": frames if frames > 1 else VIDEO_FRAMES}[target]


def _tokenizer_folder(checkpoint: Checkpoint, given: Path | None, of_the_run: str) -> Path:
    """The folder of the checkpoint's tokenizer."""
    own = checkpoint.folder / TOKENIZER_FOLDER
    if given is None and not own.is_dir() and not of_the_run:
        raise ExportError(f"checkpoint '{checkpoint.folder}': was imported without a tokenizer; give --tokenizer DIR")
    folder = given or (own if own.is_dir() else Path(of_the_run))
    expected = checkpoint.manifest.data.tokenizer_sha256
    if Tokenizer(folder).sha256 != expected and expected:
        raise ExportError(f"tokenizer '{folder}': is not the one of the checkpoint; give its folder with --tokenizer")
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files into a folder, which is made if it does not exist."""
    folder.mkdir(exist_ok=True)
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)


def _check_target(out: Path, force: bool) -> None:
    """Refuse to replace anything but an earlier export."""
    if not out.exists():
        return
    if not force:
        raise ExportError(f"'{out}': exists; give --force to replace it")
    if not (out / EXPORT_FILE).is_file():
        raise ExportError(f"'{out}': exists and holds no {EXPORT_FILE}, so it is no export; name another folder")
    own = read_config(out, EXPORT_FILE).get("files", [])
    if foreign := [name for name in files_in(out) if name not in own]:
        raise ExportError(f"'{out}': holds files that no export wrote: {shown(foreign)}; name another folder")


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
        **{name: getattr(model, name) for name in VARIANTS},
        "rope_inv_freq_dtype": model.rope_inv_freq_dtype or "float32",
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
