"""The values of one pack, in pack order: token ids, labels, encodings, noise.

Station: pack -> decode -> encoders -> [PackTokens, PackVisuals] -> noising -> [PackNoise] -> embedder.  Plain
containers of CPU tensors that check their own shapes against the pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import VAE_KINDS, SegmentKind


def label_rows(pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """CE rows of a pack.

    Returns:
        (rows, label positions), int64 [N_ce] each, pack order: the row that predicts a label is one before it.
    """
    positions: list[int] = []
    for start, sample in zip(pack.sample_starts, pack.samples, strict=True):
        for a, b in sample.label_spans:
            positions.extend(range(start + a, start + b))
    at = torch.tensor(positions, dtype=torch.int64)
    return at - 1, at


@dataclass(frozen=True)
class PackTokens:
    """The text of a pack.

    Attributes:
        token_ids: int64 [L]; visual content rows hold the video_pad id.
        ce_rows: int64 [N_ce], pack-order rows that predict a label.
        ce_labels: int64 [N_ce], the token ids they should predict.
    """

    token_ids: torch.Tensor
    ce_rows: torch.Tensor
    ce_labels: torch.Tensor

    @classmethod
    def from_ids(cls, pack: Pack, token_ids: torch.Tensor) -> PackTokens:
        """Token ids with the labels that the pack's label spans name.

        Args:
            pack: the structure.
            token_ids: int64 [L].

        Raises:
            ValueError: if the number of ids is not the pack's length.
        """
        if token_ids.shape != (pack.length,):
            raise ValueError(f"token_ids of shape {tuple(token_ids.shape)}: the pack has {pack.length} tokens")
        rows, positions = label_rows(pack)
        return cls(token_ids, rows, token_ids[positions])


@dataclass(frozen=True)
class PackVisuals:
    """The encodings of a pack's visual segments, content only, in pack order.

    Attributes:
        vit: [N_vit, hidden], output of the ViT for all VIT segments.
        latents: [N_vae, channels], normalised clean latents for all CLEAN and NOISE segments.
        valid: bool [number of visual segments], False where decoding failed: the segment's encodings are zeros and
            its sample's loss rows get weight zero.
    """

    vit: torch.Tensor
    latents: torch.Tensor
    valid: torch.Tensor

    def check(self, pack: Pack) -> None:
        """Raise ValueError unless the row counts are those of the pack."""
        n_vit = sum(p.segment.content_length for p in pack.visual_segments(SegmentKind.VIT))
        n_vae = sum(p.segment.content_length for p in pack.visual_segments(*VAE_KINDS))
        n_visual = sum(1 for p in pack.placed_segments() if p.segment.is_visual)
        for name, have, want in (
            ("vit", self.vit.shape[0], n_vit),
            ("latents", self.latents.shape[0], n_vae),
            ("valid", self.valid.shape[0], n_visual),
        ):
            if have != want:
                raise ValueError(f"visuals.{name} has {have} rows: the pack needs {want}")


@dataclass(frozen=True)
class PackNoise:
    """What the noising path adds; explicit so that a caller may give its own x_t and t.

    Attributes:
        timesteps: float32 [N_vae], t of each VAE row; 0 for clean rows and frame conditions.
        noise: float32 [N_vae, channels].
        loss_rows: bool [N_vae], rows with a velocity loss.
        x_t: float32 [N_vae, channels], what the model sees; None: (1 - t) * latents + t * noise.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    loss_rows: torch.Tensor
    x_t: torch.Tensor | None = None
