"""Compare our structure, activations and gradients with a golden case.

Station: golden case -> model -> [differences].  Structure is compared exactly and by every rank; activations are
collected from wherever they are computed (stage, context-parallel rank, shard) and put into pack order.

The measure is max |ours - theirs| / max |theirs| over a whole quantity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_lance.model.heads import HeadOutputs
from megatron_lance.model.lance_model import LanceModel
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.layout import PADDING, Layout, token_experts
from megatron_lance.packing.positions import Mape, base_positions, pack_positions
from megatron_lance.packing.segment import Expert, SegmentKind
from megatron_lance.parallel.dispatch import vae_grid
from megatron_lance.parity.golden import GoldenCase

EXACT = 0.0
RELATIVE = 1e-5


@dataclass(frozen=True)
class Difference:
    """One compared quantity.

    Attributes:
        quantity: its name.
        value: largest relative difference; for exact quantities the share of entries that differ.
        tolerance: largest allowed value.
    """

    quantity: str
    value: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the value is a number within the tolerance."""
        return self.value <= self.tolerance


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Max |ours - theirs| / max |theirs|; infinite if the shapes differ, 0 for two empty tensors."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not theirs.numel():
        return 0.0
    scale = theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((ours.double() - theirs.double()).abs().max() / scale)


def _share_unequal(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.mean(ours != theirs)) if ours.size else 0.0


def _empty(case: GoldenCase, key: str, shape: tuple[int, ...] = (0,)) -> np.ndarray:
    """A recorded tensor; optional tensors are absent where a case has no such rows."""
    return case.expected[key].numpy() if key in case.expected else np.zeros(shape, dtype=np.int64)


def _latent_rows(case: GoldenCase, table_size: int) -> np.ndarray:
    grid = vae_grid(case.pack)
    return grid[:, 0] * table_size**2 + grid[:, 1] * table_size + grid[:, 2]


def structure(case: GoldenCase, table_size: int) -> list[Difference]:
    """Layout, positions and mask against the recorded ones, exactly.

    Args:
        case: rebuilt by our rules.
        table_size: rows of the position table per side.
    """
    pack = case.pack
    gen = np.flatnonzero(token_experts(pack))
    vit = [np.arange(*p.content) for p in pack.visual_segments(SegmentKind.VIT)]
    base = np.concatenate([base_positions(sample) for sample in pack.samples], axis=1)
    placed = pack_positions(pack, Mape.RELEASE, 1000)
    mask = case.expected["out/attention_mask_dense_incl_pad"].bool().numpy()[: pack.length, : pack.length]
    layout = {
        "token ids": (case.tokens.token_ids.numpy(), _empty(case, "in/packed_text_ids")),
        "gen tokens": (gen, _empty(case, "in/packed_vae_token_indexes")),
        "vit tokens": (np.concatenate([np.zeros(0, np.int64), *vit]), _empty(case, "in/packed_vit_token_indexes")),
        "ce rows": (case.tokens.ce_rows.numpy(), _empty(case, "in/ce_loss_indexes")),
        "ce labels": (case.tokens.ce_labels.numpy(), _empty(case, "in/packed_label_ids")),
        "velocity rows": (gen[case.noise.loss_rows.numpy()], _empty(case, "in/mse_loss_indexes")),
        "latent places": (_latent_rows(case, table_size), _empty(case, "in/packed_latent_position_ids")),
    }
    return [
        *(Difference(f"layout: {name}", _share_unequal(*pair), EXACT) for name, pair in layout.items()),
        Difference("base positions", _share_unequal(base, _empty(case, "out/position_ids_before_shift")[:, 0]), EXACT),
        Difference("positions", _share_unequal(placed, _empty(case, "out/position_ids")[:, 0]), EXACT),
        Difference("mask", _share_unequal(AttentionPlan.from_pack(pack).dense(), mask), EXACT),
    ]


@dataclass
class Probe:
    """Collects what this rank computes, by quantity, with the pack-order token of each row.

    Attributes:
        layout: of the pack.
        cp_rank: of this rank.
        tp_rank: of this rank.
        rows: quantity -> (tokens, values).
    """

    layout: Layout
    cp_rank: int
    tp_rank: int
    rows: dict[str, tuple[np.ndarray, torch.Tensor]] = field(default_factory=dict)

    def _shard(self, expert: Expert) -> np.ndarray:
        return self.layout.shard_tokens(expert, self.cp_rank, self.tp_rank)

    def keep(self, quantity: str, tokens: np.ndarray, values: torch.Tensor) -> None:
        """Remember rows [n, ...] of `quantity`; padding rows are left out."""
        held = tokens != PADDING
        self.rows[quantity] = (tokens[held], values.detach().float().cpu()[torch.from_numpy(held)])

    def keep_hidden(self, quantity: str, hidden: torch.Tensor) -> None:
        """Remember hidden states [s, 1, h] of this rank's shard."""
        tokens = np.concatenate([self._shard(Expert.UND), self._shard(Expert.GEN)])
        self.keep(quantity, tokens, hidden.squeeze(1))

    def keep_heads(self, outputs: HeadOutputs, ce_tokens: np.ndarray) -> None:
        """Remember the heads' outputs; `ce_tokens` are the tokens of the CE rows on this rank."""
        self.keep("velocity", self._shard(Expert.GEN), outputs.velocity)
        if len(ce_tokens):
            self.keep("ce", ce_tokens, outputs.ce)

    @contextmanager
    def watch(self, stages: Sequence[LanceModel], ce_tokens: np.ndarray) -> Iterator[None]:
        """Observe a forward pass of this rank's stages by module hooks."""
        handles = []

        def observe(module: torch.nn.Module, keep: Any) -> None:
            handles.append(module.register_forward_hook(lambda _module, _inputs, output: keep(output)))

        for stage in stages:
            if stage.embedder is not None:
                observe(stage.embedder, lambda out: self.keep_hidden("input sequence", out))
            for layer in stage.decoder.layers:
                name = f"hidden after layer {layer.layer_number - 1}"
                observe(layer, lambda out, name=name: self.keep_hidden(name, out[0]))
            if stage.heads is not None:
                observe(stage.heads.und_norm, lambda out: self._keep_norm(Expert.UND, out))
                observe(stage.heads.gen_norm, lambda out: self._keep_norm(Expert.GEN, out))
                observe(stage.heads, lambda out: self.keep_heads(out, ce_tokens))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep_norm(self, expert: Expert, out: torch.Tensor) -> None:
        self.keep(f"final hidden {expert}", self._shard(expert), out.squeeze(1))

    def collect(self) -> dict[str, dict[int, torch.Tensor]]:
        """Rows of all ranks: quantity -> token -> values; a collective of the whole world."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.rows)
        merged: dict[str, dict[int, torch.Tensor]] = {}
        for rows in everyone:
            for quantity, (tokens, values) in rows.items():
                merged.setdefault(quantity, {}).update(zip(tokens.tolist(), values, strict=True))
        return merged


def _in_order(rows: Mapping[int, torch.Tensor], tokens: Sequence[int]) -> torch.Tensor:
    """Values at `tokens`; a NaN row where one is missing."""
    if not len(tokens):
        return torch.zeros(0)
    width = next(iter(rows.values())) if rows else torch.zeros(())
    return torch.stack([rows.get(t, torch.full_like(width, float("nan"))) for t in tokens])


def activations(case: GoldenCase, collected: Mapping[str, Mapping[int, torch.Tensor]], layers: int) -> list[Difference]:
    """Input sequence, hidden states, velocity and CE against the recorded ones.

    Quantities a case did not record are left out, but the final hidden state must be there.

    Args:
        case: the golden case.
        collected: from Probe.collect.
        layers: of the model.
    """
    everything = list(range(case.pack.length))
    hidden = {"input sequence": "out/packed_sequence_in"} | {
        f"hidden after layer {i}": f"out/hidden_after_layer_{i}" for i in range(layers)
    }
    final = {**collected.get("final hidden und", {}), **collected.get("final hidden gen", {})}
    wanted = {name: (collected.get(name, {}), everything, key) for name, key in hidden.items()}
    wanted["final hidden"] = (final, everything, "out/final_hidden")
    velocity_rows = _empty(case, "in/mse_loss_indexes").tolist()
    wanted["velocity"] = (collected.get("velocity", {}), velocity_rows, "out/velocity_pred_at_mse_indexes")
    wanted["ce"] = (collected.get("ce", {}), _empty(case, "in/ce_loss_indexes").tolist(), "out/ce_per_token")
    return [
        Difference(name, relative(_in_order(rows, tokens), case.expected.get(key, torch.zeros(0))), RELATIVE)
        for name, (rows, tokens, key) in wanted.items()
        if (key in case.expected or name == "final hidden") and len(tokens)
    ]


def _worst(values: Iterable[tuple[float, str]]) -> tuple[float, str]:
    """The largest value and its name; a value that is no number is larger than any."""
    return max(values, key=lambda item: float("inf") if math.isnan(item[0]) else item[0])


def gradients(case: GoldenCase, ours: Mapping[str, torch.Tensor]) -> list[Difference]:
    """Gradients by public key where the case has them whole, else their norms; the worst of all parameters.

    A norm below a thousandth of the largest is compared on the scale of that thousandth: it is a sum of cancelling
    terms (a key bias shifts all scores of a query alike, so its gradient is rounding).

    Args:
        case: the golden case.
        ours: gradients of all parameters by public key.
    """
    absent = sorted(set(case.gradients or case.gradient_norms) - set(ours))
    if absent:
        return [Difference(f"gradients: no parameter {', '.join(absent)}", float("inf"), RELATIVE)]
    if case.gradients:
        worst = _worst((relative(ours[key], grad), key) for key, grad in case.gradients.items())
        return [Difference(f"gradients of {len(case.gradients)} tensors (worst {worst[1]})", worst[0], RELATIVE)]
    if not case.gradient_norms:
        return []
    largest = max(case.gradient_norms.values())
    worst = _worst(
        (abs(float(ours[key].double().norm()) - norm) / max(norm, 1e-3 * largest), key)
        for key, norm in case.gradient_norms.items()
    )
    return [Difference(f"gradient norms of {len(case.gradient_norms)} tensors (worst {worst[1]})", worst[0], RELATIVE)]
