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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_lance.checkpoint.digests import DIGESTS_FILE, digests_of, files_in
from megatron_lance.checkpoint.hf_export import TOKENIZER_FOLDER, copy_tokenizer
from megatron_lance.checkpoint.hf_lance import (
    POSITION_KEY,
    VIT_PREFIX,
    FolderSource,
    WeightSource,
    bindings,
    public_shapes,
)
from megatron_lance.checkpoint.hf_vit import expected_shapes
from megatron_lance.checkpoint.manifest import MANIFEST_FILE, DataIdentity, Manifest, StoreError
from megatron_lance.checkpoint.public_config import CONFIG_FILE, read_config, text_sizes, variants
from megatron_lance.checkpoint.public_files import (
    CheckpointError,
    Shape,
    TensorFolder,
    TensorSpec,
    check_names,
    new_folder,
    shown,
    write_safetensors,
)
from megatron_lance.checkpoint.tensors import write_model
from megatron_lance.checkpoint.view import VIT_FOLDER, position_table
from megatron_lance.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_lance.data.prompt import Tokenizer

PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bf16"}
VIT_FILE = "vit.safetensors"
_RELEASED = {"rope_inv_freq_dtype": "bfloat16"}  # what llm_config.json does not say there and ModelConfig leaves open


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
    shape = files.specs["vae2llm.weight"].shape if "vae2llm.weight" in files.specs else ()
    channels = shape[-1] if shape else sizes.latent_channels
    model = replace(sizes, latent_channels=channels, **(_RELEASED | variants(folder)))
    model = replace(model, latent_position_frames=_table_frames(files, model))
    vit = {key.removeprefix(VIT_PREFIX): key for key in files.specs if key.startswith(VIT_PREFIX)}
    _check_names(files, model, vit)
    source = FolderSource(folder, model)
    _check_table(files, model)
    own = {key: spec for key, spec in files.specs.items() if not key.startswith(VIT_PREFIX) and key != POSITION_KEY}
    write_import(Import(source, model, dtype_of(own), folder, files, vit), out, force, progress)


def _check_names(files: TensorFolder, model: ModelConfig, vit: Mapping[str, str]) -> None:
    """All tensors but the position table, the ViT's too if there is one of them."""
    wanted = public_shapes(model)
    if vit:
        shapes = expected_shapes({name: files.specs[key].shape for name, key in vit.items()}, model.hidden_size)
        wanted |= {VIT_PREFIX + name: shape for name, shape in shapes.items()}
    found = {key: shape for key, shape in shapes_of(files).items() if key != POSITION_KEY}
    check_names(wanted, found, str(files.folder))


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
        StoreError: if `out` exists without `force`, or is no earlier import and nothing else.
        CheckpointError: if the disk does not take it.
    """
    _check_target(out, force)
    with new_folder(out) as partial:
        _write_parameters(partial, job, progress)
        if job.vit:
            _write_vit(partial / VIT_FOLDER, job)
        sha256 = ""
        if (job.folder / "tokenizer.json").is_file():
            sha256 = Tokenizer(job.folder).sha256
            copy_tokenizer(job.folder, partial / TOKENIZER_FOLDER)
        run = RunConfig(
            model=job.model,
            data=DataConfig(tokenizer=str(out / TOKENIZER_FOLDER) if sha256 else ""),
            training=TrainingConfig(precision=PRECISIONS[job.dtype], init_from=str(job.folder)),
        )
        manifest = Manifest.of(partial, run, 0, 1, DataIdentity(sha256, ""), {}, weights_only=True)
        manifest.write(partial, digests_of(partial, files_in(partial)))


def _check_target(out: Path, force: bool) -> None:
    """Refuse to replace anything but an earlier import: a run's checkpoint holds what exists nowhere else."""
    if not out.exists():
        return
    if not force:
        raise StoreError(f"'{out}': exists; give --force to replace it")
    if not (out / MANIFEST_FILE).is_file():
        raise StoreError(f"'{out}': exists and is no checkpoint; name another folder")
    manifest = read_config(out, MANIFEST_FILE)
    if manifest.get("weights_only") is not True:
        raise StoreError(
            f"'{out}': is a checkpoint of a run, with the state of its optimizer, and no import; name another folder"
        )
    own = {*manifest.get("files", ()), MANIFEST_FILE, DIGESTS_FILE}
    if foreign := [name for name in files_in(out) if name not in own]:
        raise StoreError(f"'{out}': holds files that no import wrote: {shown(foreign)}; name another folder")


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
