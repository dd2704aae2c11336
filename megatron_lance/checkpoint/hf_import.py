"""Public weights -> a checkpoint that a run starts from, and that every layout loads (spec/model.md section 9).

Station: folder in the public layout -> [import] -> checkpoint of weights only, at step 0.  One process writes each
parameter as it is joined; no process group and no model is needed.

    OUT/checkpoint.json, digests.json        as in every checkpoint
    OUT/__0_0.distcp, .metadata, ...         megatron-core's files
    OUT/vit/vit.safetensors                  the frozen ViT, if the folder holds one; for encoders.vit_path and exports
    OUT/tokenizer/                           the folder's tokenizer, if it holds one
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_lance.checkpoint.digests import digests_of, files_in
from megatron_lance.checkpoint.files import partial_folder, publish
from megatron_lance.checkpoint.hf_export import CONFIG_FILE, TOKENIZER_FOLDER, copy_tokenizer
from megatron_lance.checkpoint.hf_lance import (
    POSITION_KEY,
    VIT_PREFIX,
    FolderSource,
    WeightSource,
    bindings,
    with_rope_of,
)
from megatron_lance.checkpoint.manifest import MANIFEST_FILE, DataIdentity, Manifest, StoreError
from megatron_lance.checkpoint.public_files import CheckpointError, Shape, TensorFolder, TensorSpec, write_safetensors
from megatron_lance.checkpoint.tensors import write_model
from megatron_lance.checkpoint.view import VIT_FOLDER, position_table
from megatron_lance.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_lance.data.prompt import Tokenizer

logger = logging.getLogger(__name__)

PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bf16"}
VIT_FILE = "vit.safetensors"
_RELEASED_SIZE = 64  # rows of the released position table along height and along width


@dataclass(frozen=True)
class Import:
    """What is to be written.

    Attributes:
        source: tensors by Lance key, of any dtype.
        model: sizes and variants.
        dtype: of the checkpoint's parameters.
        folder: the public folder; for its tokenizer.
        files: its tensors.
        vit: name in `files` of each tensor of the ViT, by its name in a bare one.
        vit_config: of the ViT, if known.
    """

    source: WeightSource
    model: ModelConfig
    dtype: torch.dtype
    folder: Path
    files: TensorFolder
    vit: Mapping[str, str]
    vit_config: Mapping[str, Any] | None = None


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a public folder.

    Raises:
        CheckpointError: if it is missing or not JSON.
    """
    path = folder / name
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{folder}': has no {name}; give a folder in the public layout") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}': is not a JSON object ({error}); copy it again") from error


def text_sizes(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """The sizes that a Qwen2 or Qwen2.5-VL configuration gives.

    Args:
        config: content of the text part; rotary settings under either of the names that transformers has used.
        path: of the file, for errors.

    Raises:
        CheckpointError: naming every field that is missing.
    """
    names = (
        "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads vocab_size "
        "rms_norm_eps"
    ).split()
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta", rope.get("rope_theta"))
    missing = [name for name in names if name not in config]
    missing += [] if theta is not None else ["rope_theta"]
    missing += [] if "mrope_section" in rope else ["rope_scaling.mrope_section"]
    if missing:
        raise CheckpointError(f"'{path}': lacks {', '.join(missing)}; copy it again")
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        layernorm_epsilon=config["rms_norm_eps"],
        rotary_base=float(theta),
        mrope_section=tuple(rope["mrope_section"]),
    )


def dtype_of(specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """The one dtype of all tensors, or float32, which holds every value of a mixture.

    Raises:
        CheckpointError: if there are tensors of another type than these.
    """
    dtypes = {spec.dtype for spec in specs.values()}
    if unknown := dtypes - PRECISIONS.keys():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in unknown))
        raise CheckpointError(f"weights of dtype {names}: must be float32 or bfloat16; convert them")
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def import_lance(folder: Path, out: Path, *, force: bool = False, progress: bool = False) -> None:
    """Make a checkpoint of a released or exported Lance folder.

    Args:
        folder: llm_config.json and safetensors files, with or without vit_model.* and the position table.
        out: folder to make.
        force: replace an earlier import.
        progress: draw a progress bar on stderr.

    Raises:
        UserError: if the folder is no whole Lance model; names all tensors that do not fit.
    """
    files = TensorFolder(folder)
    config = read_config(folder, CONFIG_FILE)
    sizes = text_sizes(config, folder / CONFIG_FILE)
    channels = files.specs["vae2llm.weight"].shape[-1] if "vae2llm.weight" in files.specs else sizes.latent_channels
    size = config.get("latent_position_size", _RELEASED_SIZE)
    model = replace(sizes, latent_channels=channels, latent_position_size=size)
    model = replace(model, latent_position_frames=_table_frames(files, model))
    model = with_rope_of(model, folder)
    source = FolderSource(folder, model)
    _check_table(files, model)
    own = {key: spec for key, spec in files.specs.items() if not key.startswith(VIT_PREFIX) and key != POSITION_KEY}
    vit = {key.removeprefix(VIT_PREFIX): key for key in files.specs if key.startswith(VIT_PREFIX)}
    write_import(Import(source, model, dtype_of(own), folder, files, vit), out, force, progress)


def _table_frames(files: TensorFolder, model: ModelConfig) -> int:
    """Frames of a folder's position table; without one those of the video release."""
    if POSITION_KEY not in files.specs:
        return model.latent_position_frames
    shape, plane = files.specs[POSITION_KEY].shape, model.latent_position_size**2
    if len(shape) != 2 or shape[1] != model.hidden_size or shape[0] % plane:
        raise CheckpointError(
            f"'{files.folder}': {POSITION_KEY} has shape {shape}, expected frames x {plane} rows of "
            f"{model.hidden_size}; name another latent_position_size in {CONFIG_FILE}"
        )
    return shape[0] // plane


def _check_table(files: TensorFolder, model: ModelConfig) -> None:
    """The table is rebuilt, not loaded: what the folder holds must be it, but for rounding."""
    if POSITION_KEY not in files.specs:
        return
    start, worst = 0, 0.0
    table = files.get(POSITION_KEY)
    for part in position_table(model, model.latent_position_frames):
        worst = max(worst, float((table[start : start + len(part)].float() - part).abs().max()))
        start += len(part)
    if not worst <= 2**-8:  # half of bfloat16's distance between 0.5 and 1, twice
        raise CheckpointError(
            f"'{files.folder}': {POSITION_KEY} differs by up to {worst:.3g} from the table this model computes; these "
            "weights belong to another model"
        )


def write_import(job: Import, out: Path, force: bool, progress: bool) -> None:
    """Write a checkpoint of weights only; the folder appears complete or not at all.

    Raises:
        StoreError: if `out` exists without `force`, or is no checkpoint.
    """
    if out.exists() and not (force and (out / MANIFEST_FILE).is_file()):
        remedy = "name another folder" if force else "give --force to replace it"
        raise StoreError(f"'{out}': exists{' and is no checkpoint' if force else ''}; {remedy}")
    partial = partial_folder(out)
    _write_parameters(partial, job, progress)
    if job.vit:
        _write_vit(partial / VIT_FOLDER, job)
    tokenizer = partial / TOKENIZER_FOLDER
    sha256 = ""
    if (job.folder / "tokenizer.json").is_file():
        sha256 = Tokenizer(job.folder).sha256
        copy_tokenizer(job.folder, tokenizer)
    run = RunConfig(
        model=job.model,
        data=DataConfig(tokenizer=str(out / TOKENIZER_FOLDER) if sha256 else ""),
        training=TrainingConfig(precision=PRECISIONS[job.dtype], init_from=str(job.folder)),
    )
    manifest = Manifest.of(partial, run, 0, 1, DataIdentity(sha256, ""), {}, weights_only=True)
    manifest.write(partial, digests_of(partial, files_in(partial)))
    publish(partial, out)


def _write_parameters(folder: Path, job: Import, progress: bool) -> None:
    table = bindings(job.model)
    bar = tqdm(desc="import", unit="tensor", total=len(table), disable=not progress)

    def read(name: str) -> torch.Tensor:
        binding = table[name]
        tensors = [job.source.get(key, shape) for key, shape in zip(binding.keys, binding.shapes, strict=True)]
        bar.update()
        return binding.join([tensor.to(job.dtype) for tensor in tensors])

    specs = {name: TensorSpec(binding.shape, job.dtype) for name, binding in table.items()}
    with bar:
        write_model(folder, specs, job.model.num_layers, read)


def _write_vit(folder: Path, job: Import) -> None:
    """The ViT as encoders.vit_path takes it; without config.json where the public folder has none."""
    folder.mkdir()
    specs: dict[str, TensorSpec] = {name: job.files.specs[key] for name, key in job.vit.items()}

    def stream() -> Iterator[tuple[str, list[torch.Tensor]]]:
        for name, key in job.vit.items():
            yield name, [job.files.get(key)]

    write_safetensors(folder / VIT_FILE, specs, stream())
    if job.vit_config is not None:
        (folder / "config.json").write_text(json.dumps(dict(job.vit_config), indent=2) + "\n", encoding="utf-8")


def shapes_of(files: TensorFolder) -> dict[str, Shape]:
    """Shape of every tensor of a folder."""
    return {key: spec.shape for key, spec in files.specs.items()}
