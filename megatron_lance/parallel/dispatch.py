"""Tokens to ranks: from the values of a pack to the tensors that one rank works on.

Station: noising -> [dispatch] -> embedder, layers, heads.  In: pack-order values.  Out: a RankBatch whose rows follow
the expert-sorted layout.  Pure indexing on the CPU; every rank derives its own batch from the same values, without
communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.batch import PackNoise, PackTokens, PackVisuals
from megatron_lance.packing.layout import PADDING, Layout
from megatron_lance.packing.positions import Mape, pack_positions
from megatron_lance.packing.sample import Pack, Task
from megatron_lance.packing.segment import VAE_KINDS, Expert, SegmentKind


@dataclass(frozen=True)
class RankBatch:
    """One pack as one rank sees it: cp rank's rows, and of those this tp rank's shard.

    Shapes: R rows of the cp rank, U / G und / gen rows of it, u / g rows of the tp shard, C latent channels.

    Attributes:
        region_rows: (U, G).
        shard_rows: (u, g).
        small: whether each region is too small for FP8, see Layout.
        plan: slices whose queries lie on this cp rank.
        positions: int64 [3, R]; zeros for padding rows.
        query_rows: int64 [queries], row of each of this rank's queries, in pack order.
        row_queries: int64 [R], query of each row; the number of queries for padding rows.
        key_rows: int64 [K], place of each token that has a row (all L in training) among the joined rows of all cp
            ranks, see Layout.key_rows.
        key_tokens: int64 [K], those tokens.
        token_ids: int64 [U]; 0 for padding rows.
        text_mask: bool [u, 1], rows that take a word embedding.
        vit_rows: int64 [n], rows of the und shard that take ViT output.
        vit: [n, hidden], that output.
        noisy_latents: [g, C], x_t; zeros for padding rows.
        timesteps: float32 [m], the distinct timesteps of the shard.
        timestep_index: int64 [g], into timesteps.
        grid: int64 [g, 3], latent frame, row and column of each row.
        gen_mask: bool [g, 1], rows that hold a token.
        ce_rows: int64 [k >= 1], rows of the und region whose logits are needed.
        ce_labels: int64 [k].
        ce_weights: float32 [k]; 0 for rows without loss.
        ce_tasks: int64 [k], number of the row's task in the order of Task.
        ce_sources: int64 [k], number of the data source of the row's sample; 0 where samples have none.
        target: [g, C], velocity target.
        velocity_weights: float32 [g]; 0 for rows without loss.
        velocity_tasks: int64 [g], as ce_tasks; 0 for padding rows.
        velocity_sources: int64 [g], as ce_sources; 0 for padding rows.
    """

    region_rows: tuple[int, int]
    shard_rows: tuple[int, int]
    small: tuple[bool, bool]
    plan: AttentionPlan
    positions: torch.Tensor
    query_rows: torch.Tensor
    row_queries: torch.Tensor
    key_rows: torch.Tensor
    key_tokens: torch.Tensor
    token_ids: torch.Tensor
    text_mask: torch.Tensor
    vit_rows: torch.Tensor
    vit: torch.Tensor
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    timestep_index: torch.Tensor
    grid: torch.Tensor
    gen_mask: torch.Tensor
    ce_rows: torch.Tensor
    ce_labels: torch.Tensor
    ce_weights: torch.Tensor
    ce_tasks: torch.Tensor
    ce_sources: torch.Tensor
    target: torch.Tensor
    velocity_weights: torch.Tensor
    velocity_tasks: torch.Tensor
    velocity_sources: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> RankBatch:
        """The batch on a device; ViT output and latents that enter the model are cast to `dtype`.

        A GPU goes on with what it does meanwhile: tensors are copied from pinned memory, in the precision they shall
        have, as any other copy would be waited for.
        """
        cast = {"vit", "noisy_latents"}
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
        moved: dict[str, Any] = {
            name: _moved(t, device, dtype if name in cast else t.dtype) for name, t in tensors.items()
        }
        return replace(self, **moved)

    def without_loss(self) -> RankBatch:
        """The batch with all loss weights zero."""
        weights = torch.zeros_like(self.ce_weights), torch.zeros_like(self.velocity_weights)
        return replace(self, ce_weights=weights[0], velocity_weights=weights[1])


def _moved(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    tensor = tensor.to(dtype)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _content_index(pack: Pack, *kinds: SegmentKind) -> np.ndarray:
    """int64 [L]: for content tokens of the kinds their index among them, PADDING elsewhere."""
    index = np.full(pack.length, PADDING, dtype=np.int64)
    at = 0
    for placed in pack.visual_segments(*kinds):
        start, stop = placed.content
        index[start:stop] = np.arange(at, at + stop - start)
        at += stop - start
    return index


def vae_grid(pack: Pack) -> np.ndarray:
    """int64 [N_vae, 3]: latent frame, row and column of every VAE content token, in pack order."""
    cells = [np.indices(p.segment.grid or ()).reshape(3, -1).T for p in pack.visual_segments(*VAE_KINDS)]
    return np.concatenate([np.zeros((0, 3), np.int64), *cells]).astype(np.int64)


def _loss_validity(pack: Pack, valid: torch.Tensor) -> np.ndarray:
    """Bool [L]: False for all tokens of a sample one of whose visual segments could not be read."""
    keep = np.ones(pack.length, dtype=bool)
    starts = pack.sample_starts
    visual = [p for p in pack.placed_segments() if p.segment.is_visual]
    for placed, ok in zip(visual, valid.tolist(), strict=True):
        if not ok:
            start = starts[placed.sample_index]
            keep[start : start + pack.samples[placed.sample_index].length] = False
    return keep


def _take(values: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    """Rows of `values` at `index`; zeros where index is PADDING."""
    rows = torch.from_numpy(index)
    out = values.new_zeros((len(index), *values.shape[1:]))
    held = rows >= 0
    out[held] = values[rows[held]]
    return out


def _of_tokens(per_token: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """per_token[tokens] with PADDING kept."""
    return np.where(tokens == PADDING, PADDING, per_token[np.maximum(tokens, 0)])


def _query_maps(layout: Layout, cp_rank: int) -> dict[str, torch.Tensor]:
    query_rows = layout.query_rows(cp_rank)
    row_queries = np.full(layout.rows, len(query_rows), dtype=np.int64)
    row_queries[query_rows] = np.arange(len(query_rows))
    maps = {
        "query_rows": query_rows,
        "row_queries": row_queries,
        "key_rows": layout.key_rows(),
        "key_tokens": layout.held_tokens(),
    }
    return {name: torch.from_numpy(value) for name, value in maps.items()}


def _token_origins(pack: Pack, sources: Sequence[int]) -> np.ndarray:
    """int64 [2, L]: number of each token's task in the order of Task, and of its source."""
    numbers = {task: number for number, task in enumerate(Task)}
    of_samples = np.array([[numbers[sample.task] for sample in pack.samples], sources or [0] * len(pack.samples)])
    return np.repeat(of_samples, [sample.length for sample in pack.samples], axis=1)


def _ce_part(
    layout: Layout, cp_rank: int, tokens: PackTokens, keep: np.ndarray, origins: np.ndarray
) -> dict[str, torch.Tensor]:
    """CE rows on this cp rank; a dummy row of weight zero where there is none, so that the head always runs."""
    row_of = np.full(layout.length, PADDING, dtype=np.int64)
    region = layout.region_tokens(Expert.UND, cp_rank)
    held = np.flatnonzero(region != PADDING)
    row_of[region[held]] = held
    rows = row_of[tokens.ce_rows.numpy()]
    here = np.flatnonzero(rows != PADDING)
    if not len(here):
        zero = torch.zeros(1, dtype=torch.int64)
        numbers = dict.fromkeys(("ce_rows", "ce_labels", "ce_tasks", "ce_sources"), zero)
        return {**numbers, "ce_weights": torch.zeros(1)}
    predicting = tokens.ce_rows.numpy()[here]
    weights = keep[predicting].astype(np.float32)
    return {
        "ce_rows": torch.from_numpy(rows[here]),
        "ce_labels": tokens.ce_labels[torch.from_numpy(here)],
        "ce_weights": torch.from_numpy(weights),
        "ce_tasks": torch.from_numpy(origins[0, predicting]),
        "ce_sources": torch.from_numpy(origins[1, predicting]),
    }


def _gen_part(
    pack: Pack, shard: np.ndarray, visuals: PackVisuals, noise: PackNoise, keep: np.ndarray, origins: np.ndarray
) -> dict[str, torch.Tensor]:
    """Generation rows of one shard: x_t, timesteps, grid, target, weights (spec/model.md section 5)."""
    index = _of_tokens(_content_index(pack, *VAE_KINDS), shard)
    latents, eps = _take(visuals.latents.float(), index), _take(noise.noise, index)
    t = _take(noise.timesteps, index)
    distinct, timestep_index = torch.unique(t, return_inverse=True)
    weights = _take(noise.loss_rows.float(), index) * torch.from_numpy(
        np.where(shard == PADDING, False, keep[np.maximum(shard, 0)]).astype(np.float32)
    )
    mixed = (1 - t)[:, None] * latents + t[:, None] * eps
    return {
        "noisy_latents": mixed if noise.x_t is None else _take(noise.x_t, index),
        "timesteps": distinct,
        "timestep_index": timestep_index,
        "grid": _take(torch.from_numpy(vae_grid(pack)), index),
        "gen_mask": torch.from_numpy(shard != PADDING)[:, None],
        "target": eps - latents,
        "velocity_weights": weights,
        "velocity_tasks": torch.from_numpy(np.where(shard == PADDING, 0, origins[0, np.maximum(shard, 0)])),
        "velocity_sources": torch.from_numpy(np.where(shard == PADDING, 0, origins[1, np.maximum(shard, 0)])),
    }


def rank_batch(
    pack: Pack,
    layout: Layout,
    tokens: PackTokens,
    visuals: PackVisuals,
    noise: PackNoise,
    *,
    mape: Mape,
    mape_step: int,
    cp_rank: int,
    tp_rank: int,
    sources: Sequence[int] = (),
) -> RankBatch:
    """What one rank needs of a pack.

    Args:
        pack: the structure.
        layout: its layout for the run's degrees.
        tokens: token ids and labels, pack order.
        visuals: encodings, pack order.
        noise: timesteps, noise and loss rows, pack order.
        mape: which MaPE rule.
        mape_step: temporal distance between modality groups.
        cp_rank: this rank's place among the context-parallel ranks.
        tp_rank: this rank's place among the tensor-parallel ranks.
        sources: number of each sample's data source; empty where samples have none.

    Returns:
        the batch, on the CPU.

    Raises:
        ValueError: if the encodings contradict the pack.
    """
    visuals.check(pack)
    rows = layout.tokens[cp_rank]
    und_region = layout.region_tokens(Expert.UND, cp_rank)
    und_shard = layout.shard_tokens(Expert.UND, cp_rank, tp_rank)
    gen_shard = layout.shard_tokens(Expert.GEN, cp_rank, tp_rank)
    positions = pack_positions(pack, mape, mape_step)
    vit_index = _of_tokens(_content_index(pack, SegmentKind.VIT), und_shard)
    vit_rows = np.flatnonzero(vit_index != PADDING)
    keep, origins = _loss_validity(pack, visuals.valid), _token_origins(pack, sources)
    return RankBatch(
        region_rows=(layout.und_rows, layout.gen_rows),
        shard_rows=layout.shard_rows,
        small=layout.small,
        plan=AttentionPlan.from_pack(pack).restrict(layout.query_ranges(cp_rank)),
        positions=torch.from_numpy(np.where(rows == PADDING, 0, positions[:, np.maximum(rows, 0)])),
        **_query_maps(layout, cp_rank),
        token_ids=_take(tokens.token_ids, und_region),
        text_mask=torch.from_numpy((und_shard != PADDING) & (vit_index == PADDING))[:, None],
        vit_rows=torch.from_numpy(vit_rows),
        vit=visuals.vit[torch.from_numpy(vit_index[vit_rows])],
        **_ce_part(layout, cp_rank, tokens, keep, origins),
        **_gen_part(pack, gen_shard, visuals, noise, keep, origins),
    )
