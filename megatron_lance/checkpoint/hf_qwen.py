"""A Lance model that starts from Qwen2.5-VL (spec/model.md section 9).

Station: folder that transformers has saved -> [import] -> checkpoint of weights only.  The understanding expert, the
embeddings, the LM head and the ViT are Qwen2.5-VL's; the generation expert is a copy of the understanding expert;
QK-norm starts at 1; connectors and time embedder as torch initialises linears, addressed by seed and name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from megatron_lance.checkpoint.hf_import import Import, dtype_of, shapes_of, write_import
from megatron_lance.checkpoint.hf_lance import RandomSource, public_shapes
from megatron_lance.checkpoint.hf_vit import vit_shapes
from megatron_lance.checkpoint.public_config import read_config, text_sizes
from megatron_lance.checkpoint.public_files import CheckpointError, Shape, TensorFolder, check_names
from megatron_lance.config.schema import ModelConfig

CONFIG_FILE = "config.json"
LAYOUTS = {"model.language_model.": "model.visual.", "model.": "visual."}
"""Prefixes of language model and ViT that transformers has used, the newer first."""
HEAD, EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"
_LANCE = "language_model.model."
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


class QwenSource:
    """Qwen2.5-VL's tensors by Lance key.

    Args:
        files: of the folder.
        model: sizes.
        language: prefix of the language model's names.
        tied: take the embeddings for the LM head.
        seed: of what Qwen2.5-VL has no weights for.
    """

    def __init__(self, files: TensorFolder, model: ModelConfig, language: str, tied: bool, seed: int) -> None:
        self.files, self.language, self.tied = files, language, tied
        self.drawn = RandomSource(seed, model)

    def key(self, lance: str) -> str | None:
        """The tensor in the folder that a Lance tensor starts as; None if there is none."""
        if lance == f"language_model.{HEAD}":
            return self.language + EMBEDDINGS if self.tied else HEAD
        if not lance.startswith(_LANCE):
            return None
        name = lance.removeprefix(_LANCE).replace("_moe_gen", "")
        return None if any(norm in name for norm in _QK_NORMS) else self.language + name

    def get(self, key: str, shape: Shape) -> torch.Tensor:
        """The tensor that `key` starts as."""
        found = self.key(key)
        return self.drawn.get(key, shape) if found is None else self.files.get(found)


def import_qwen(folder: Path, out: Path, *, seed: int, force: bool = False, progress: bool = False) -> None:
    """Make a checkpoint of a Lance model from a Qwen2.5-VL folder.

    Args:
        folder: config.json and safetensors files, with either of the key layouts transformers has used.
        out: folder to make.
        seed: of connectors and time embedder.
        force: replace an earlier import.
        progress: draw a progress bar on stderr.

    Raises:
        UserError: if the folder is no whole Qwen2.5-VL; names all tensors that do not fit.
    """
    files = TensorFolder(folder)
    config = read_config(folder, CONFIG_FILE)
    if "vision_config" not in config:
        raise CheckpointError(f"'{folder / CONFIG_FILE}': lacks vision_config; give a Qwen2.5-VL model")
    text = config.get("text_config", config)
    model = replace(text_sizes(text, folder / CONFIG_FILE), rope_inv_freq_dtype="float32")
    language = next((prefix for prefix in LAYOUTS if any(key.startswith(prefix) for key in files.specs)), "model.")
    visual = LAYOUTS[language]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)) and HEAD not in files.specs
    source = QwenSource(files, model, language, tied, seed)
    vision = Qwen2_5_VLVisionConfig.from_dict(config["vision_config"])
    wanted = {own: shape for key, shape in public_shapes(model).items() if (own := source.key(key)) is not None}
    check_names(
        wanted | {visual + name: shape for name, shape in vit_shapes(vision).items()}, shapes_of(files), str(folder)
    )
    dtype = dtype_of({key: files.specs[key] for key in wanted})
    vit = {key.removeprefix(visual): key for key in files.specs if key.startswith(visual)}
    write_import(Import(source, model, dtype, folder, files, vit, vision.to_dict()), out, force, progress)
