"""Golden cases: one packed training batch each, made by the public reference on a small configuration.

Station: files -> [pack, values, expected results] -> comparison.  A case is rebuilt by our own rules from its raw
media, its sequence plans and its token ids; of the reference's results only the recorded noise is an input, and the
batch tells which plan entries of a sample without template were dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import ModelConfig, ObjectiveConfig
from megatron_lance.objectives.flow_matching import loss_rows, shift_timestep
from megatron_lance.packing.batch import PackNoise, PackTokens, PackVisuals
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import VAE_KINDS, Segment, SegmentKind

VIT_REDUCTION = (2, 28, 28)
"""Frames, rows and columns of pixels per merged ViT token."""


class GoldenError(UserError):
    """A golden file that cannot be read as a case."""


@dataclass(frozen=True)
class GoldenConfig:
    """The configuration all cases of a folder share.

    Attributes:
        model: sizes.
        objective: loss weights and timestep shift.
        tokenizer_size: ids the tokenizer uses.
        special: special token ids by name.
    """

    model: ModelConfig
    objective: ObjectiveConfig
    tokenizer_size: int
    special: Mapping[str, int]


@dataclass(frozen=True)
class GoldenCase:
    """One case.

    Attributes:
        name: file name without suffix.
        pack: the structure by our rules.
        tokens: token ids and labels.
        visuals: raw media of all visual segments.
        noise: recorded noise, timesteps from the recorded draws, loss rows by our rules.
        expected: the reference's tensors by name (in/*, out/*).
        gradients: by public key; empty if not given.
        gradient_norms: by public key; empty if not given.
    """

    name: str
    pack: Pack
    tokens: PackTokens
    visuals: PackVisuals
    noise: PackNoise
    expected: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]
    gradient_norms: Mapping[str, float]


def load_config(folder: Path) -> GoldenConfig:
    """Read config.json of a golden folder.

    Raises:
        GoldenError: if it is missing.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise GoldenError(f"golden folder {str(folder)!r}: has no config.json; give a folder of golden cases")
    raw = json.loads(path.read_text())
    model = ModelConfig(
        num_layers=raw["layers"],
        hidden_size=raw["hidden"],
        ffn_hidden_size=raw["ffn"],
        num_attention_heads=raw["q_heads"],
        num_query_groups=raw["kv_heads"],
        kv_channels=raw["head_dim"],
        vocab_size=raw["vocab_rows"],
        layernorm_epsilon=raw["rms_norm_eps"],
        rotary_base=raw["rope_theta"],
        mrope_section=tuple(raw["mrope_section"]),
        latent_channels=raw["z_channels"],
        latent_position_frames=raw["max_num_latent_frames"],
        latent_position_size=raw["max_latent_size"],
    )
    objective = ObjectiveConfig(ce_weight=0.25, mse_weight=1.0, timestep_shift=raw["timestep_shift"])
    return GoldenConfig(model, objective, raw["len_tokenizer_V_eff"], raw["special_ids"])


def case_files(folder: Path) -> list[Path]:
    """The case*.json files of a folder, by number.

    Raises:
        GoldenError: if there is none.
    """
    files = [p for p in folder.glob("case*.json") if p.with_suffix(".safetensors").is_file()]
    if not files:
        raise GoldenError(f"golden folder {str(folder)!r}: no case*.json with its .safetensors; give a golden folder")
    return sorted(files, key=lambda p: (len(p.stem.split("_")[0]), p.stem))


def _grid(entry: Mapping[str, Any], media: torch.Tensor) -> tuple[int, int, int]:
    """Grid of a visual plan entry: from pixels for the ViT, from the latents for the VAE."""
    if entry["type"].startswith("vit"):
        t, h, w = (pixels // step for pixels, step in zip(entry["thw"], VIT_REDUCTION, strict=True))
    else:
        t, h, w, _ = media.shape
    return t, h, w


def _visual_segment(entry: Mapping[str, Any], media: torch.Tensor) -> Segment:
    """The segment of a visual plan entry; a frame condition of -1 is the last frame unless that is frame 1."""
    grid = _grid(entry, media)
    if entry["type"].startswith("vit"):
        return Segment.visual(SegmentKind.VIT, grid)
    if not entry["loss"]:
        return Segment.visual(SegmentKind.CLEAN, grid)
    last = grid[0] - 1
    wanted = entry.get("frame_condition_idx") or []
    frames = {last if frame == -1 else frame for frame in wanted if not (frame == -1 and last == 1)}
    return Segment.visual(SegmentKind.NOISE, grid, tuple(sorted(frames)))


def _task(name: str, segments: Iterable[Segment]) -> Task:
    """Our task of a reference sample: its name and what it holds."""
    by_kind: dict[SegmentKind, Segment] = {}
    for segment in segments:
        by_kind.setdefault(segment.kind, segment)
    noise, vit = by_kind.get(SegmentKind.NOISE), by_kind.get(SegmentKind.VIT)
    grid = (noise or vit or Segment.text(1)).grid
    video = grid is not None and grid[0] > 1
    if noise is None:
        return Task.T2T if vit is None else (Task.V2T if video else Task.I2T)
    if name == "edit":
        return Task.V_EDIT if video else Task.I_EDIT
    if name in ("idip", "maze"):
        return Task.S2V if video else Task.S2I
    if SegmentKind.CLEAN in by_kind:
        raise GoldenError(f"sample_task {name!r} with a clean VAE block: the reference defines no positions for it")
    return Task.I2V if noise.clean_frames else (Task.T2V if video else Task.T2I)


def _runs(indices: list[int]) -> tuple[tuple[int, int], ...]:
    """[start, stop) runs of ascending indices."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return tuple(runs)


@dataclass(frozen=True)
class Rebuilt:
    """A sample by our rules.

    Attributes:
        sample: its structure.
        ids: its token ids.
        keys: the media keys of its visual segments, in order.
    """

    sample: Sample
    ids: list[int]
    keys: list[str]


def _templated(name: str, raw: Mapping[str, Any], media: Mapping[str, torch.Tensor]) -> Rebuilt:
    """A sample in the chat template: the ids hold everything, spans tell where blocks are."""
    (template,) = (entry for entry in raw["sequence_plan"] if entry["type"] == "text_template")
    entries = [entry for entry in raw["sequence_plan"] if entry is not template]
    ids, keys = list(raw["text_ids_list"][0]), [item["key"] for item in raw["visual_items"]]
    segments: list[Segment] = []
    at = 0
    for entry, key, span in zip(entries, keys, template["spans_index"][: len(entries)], strict=True):
        if span[0] - 1 > at:
            segments.append(Segment.text(span[0] - 1 - at))
        segments.append(_visual_segment(entry, media[key]))
        at = span[-1] + 2
    if at < len(ids):
        segments.append(Segment.text(len(ids) - at))
    labels = _runs(template["packed_label_index"]) if template["loss"] else ()
    caption = template.get("cap_index") or []
    sample = Sample(
        name,
        _task(raw["sample_task"], segments),
        tuple(segments),
        labels,
        (caption[0], caption[-1] + 1) if caption else None,
    )
    return Rebuilt(sample, ids, keys)


MODES = {SegmentKind.VIT: "full", SegmentKind.CLEAN: "full_noise", SegmentKind.NOISE: "noise"}
"""The reference's names of attention modes (its full_noise is a clean block)."""

VIT_CONTENT = ("in/packed_vit_token_indexes", "in/packed_vit_tokens_cat")
VAE_CONTENT = ("in/packed_vae_token_indexes", "in/clean_latent_tokens")
"""Where the batch has the content of visual blocks: pack-order tokens and their encodings."""


@dataclass(frozen=True)
class _Piece:
    """A piece of the batch: its mode, its ids and the encodings of its content (none for text)."""

    mode: str
    ids: list[int]
    content: torch.Tensor


def _piece(mode: str, start: int, length: int, batch: Mapping[str, torch.Tensor]) -> _Piece:
    """The piece of `length` tokens from pack-order token `start`."""
    ids = batch["in/packed_text_ids"][start : start + length].tolist()
    if mode == "causal":
        return _Piece(mode, ids, torch.zeros(0))
    tokens, encodings = VIT_CONTENT if mode == "full" else VAE_CONTENT
    first = int(torch.searchsorted(batch[tokens], start))
    return _Piece(mode, ids, batch[encodings][first : first + length - 2])


def _plain(
    name: str,
    raw: Mapping[str, Any],
    media: Mapping[str, torch.Tensor],
    special: Mapping[str, int],
    pieces: list[_Piece],
) -> Rebuilt:
    """A sample without the template: plan entries in order, im_start/im_end around text.

    The reference may drop entries after the plan was made, and may keep the delimiters of a dropped text, alone or
    around end-of-text ids; `pieces`, what the batch really has, tell which are left.  They are told apart by content,
    since entries may be equal in size.
    """
    segments: list[Segment] = []
    ids: list[int] = []
    keys: list[str] = []
    labels: list[tuple[int, int]] = []
    texts, items, left = iter(raw["text_ids_list"]), iter(raw["visual_items"]), list(pieces)
    visual_entries = sum(entry["type"] != "text" for entry in raw["sequence_plan"])
    recorded = (len(raw["text_ids_list"]), len(raw["visual_items"]))
    if recorded != (len(raw["sequence_plan"]) - visual_entries, visual_entries):
        raise GoldenError(f"{name}: {recorded} recorded texts and media do not match its sequence plan one to one")
    for entry in raw["sequence_plan"]:
        if entry["type"] == "text":
            body = list(next(texts))
            dropped = [[], [special["<|endoftext|>"]] * len(body)] if entry["enable_cfg"] else []
            if not left or left[0].mode != "causal" or left[0].ids[1:-1] not in [body, *dropped]:
                continue
            piece = [special["<|im_start|>"], *left.pop(0).ids[1:-1], special["<|im_end|>"]]
            segments.append(Segment.text(len(piece)))
            if entry["loss"]:
                labels.append((len(ids) + 1, len(ids) + len(piece)))
        else:
            key = next(items)["key"]
            segment, content = _visual_segment(entry, media[key]), media[key].flatten(end_dim=-2)
            if not left or left[0].mode != MODES[segment.kind] or not torch.equal(left[0].content, content):
                continue
            left.pop(0)
            pads = [special["<|video_pad|>"]] * segment.content_length
            piece = [special["<|vision_start|>"], *pads, special["<|vision_end|>"]]
            segments.append(segment)
            keys.append(key)
        ids.extend(piece)
    if left:
        sizes = [(len(p.ids), p.mode) for p in left]
        raise GoldenError(f"{name}: pieces {sizes} of the batch match no entry of the sequence plan")
    return Rebuilt(Sample(name, _task(raw["sample_task"], segments), tuple(segments), tuple(labels)), ids, keys)


def _pieces_of_samples(raw: Mapping[str, Any], batch: Mapping[str, torch.Tensor]) -> list[list[_Piece]]:
    """The pieces of each sample of a case."""
    lengths = list(zip(raw["split_lens"], raw["attn_modes"], strict=True))
    out, at, start = [], 0, 0
    for sample_length in raw["sample_lens"]:
        own, stop = [], start + sample_length
        while start < stop and at < len(lengths):
            length, mode = lengths[at]
            own.append(_piece(mode, start, length, batch))
            start, at = start + length, at + 1
        out.append(own)
    return out


def rebuild_samples(
    raw: Mapping[str, Any],
    batch: Mapping[str, torch.Tensor],
    media: Mapping[str, torch.Tensor],
    special: Mapping[str, int],
) -> list[Rebuilt]:
    """All samples of a case by our rules.

    Args:
        raw: the case's json.
        batch: its recorded batch.
        media: raw media by key.
        special: special token ids by name.

    Raises:
        GoldenError: if the plan is one the reference defines no result for.
    """
    rebuilt = []
    for index, sample in enumerate(raw["samples"]):
        name = f"sample {index}"
        templates = [entry for entry in sample["sequence_plan"] if entry["type"] == "text_template"]
        if len(templates) > 1:
            raise GoldenError(f"{name}: {len(templates)} text_template entries; one is defined")
        if templates:
            rebuilt.append(_templated(name, sample, media))
        else:
            rebuilt.append(_plain(name, sample, media, special, _pieces_of_samples(raw, batch)[index]))
    return rebuilt


def _stack(parts: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.cat([torch.zeros(0, width), *(part.reshape(-1, width) for part in parts)])


def _noise(pack: Pack, expected: Mapping[str, torch.Tensor], shift: float, channels: int) -> PackNoise:
    """Recorded noise and draws; rows that our rules call clean have t = 0."""
    mask = loss_rows(pack)
    if not len(mask):
        return PackNoise(torch.zeros(0), torch.zeros(0, channels), mask)
    drawn = shift_timestep(torch.sigmoid(expected["in/packed_timesteps"]), shift)
    return PackNoise(torch.where(mask, drawn, 0.0), expected["out/noise"], mask)


def load_case(path: Path, config: GoldenConfig) -> GoldenCase:
    """Rebuild one case by our rules.

    Args:
        path: its .json file.
        config: of its folder.

    Raises:
        GoldenError: if the plan is one the reference defines no result for.
    """
    raw = json.loads(path.read_text())
    tensors = load_file(path.with_suffix(".safetensors"))
    media = {key: value for key, value in tensors.items() if key.startswith("raw_media/")}
    rebuilt = rebuild_samples(raw, tensors, media, config.special)
    pack = Pack(tuple(r.sample for r in rebuilt), capacity=sum(raw["sample_lens"]))
    keys = [key for r in rebuilt for key in r.keys]
    kinds = [p.segment.kind for p in pack.placed_segments() if p.segment.is_visual]
    visuals = PackVisuals(
        vit=_stack(
            [media[k] for k, kind in zip(keys, kinds, strict=True) if kind is SegmentKind.VIT],
            config.model.hidden_size,
        ),
        latents=_stack(
            [media[k] for k, kind in zip(keys, kinds, strict=True) if kind in VAE_KINDS],
            config.model.latent_channels,
        ),
        valid=torch.ones(len(keys), dtype=torch.bool),
    )
    gradients = path.with_name(f"{path.stem}_grads.safetensors")
    return GoldenCase(
        name=path.stem,
        pack=pack,
        tokens=PackTokens.from_ids(pack, torch.tensor([i for r in rebuilt for i in r.ids])),
        visuals=visuals,
        noise=_noise(pack, tensors, config.objective.timestep_shift, config.model.latent_channels),
        expected={key: value for key, value in tensors.items() if not key.startswith("raw_media/")},
        gradients=load_file(gradients) if gradients.is_file() else {},
        gradient_norms={key: norm or 0.0 for key, norm in raw.get("grad_norms", {}).items()},  # null: no gradient
    )
