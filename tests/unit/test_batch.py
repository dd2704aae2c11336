"""Values of a pack: labels and shape checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from megatron_lance.packing.batch import PackTokens, PackVisuals, label_rows
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from tests.strategies import pack_values, packs


@settings(max_examples=40, deadline=None)
@given(packs())
def test_a_label_is_predicted_by_the_row_before_it(pack: Pack) -> None:
    rows, labels = label_rows(pack)
    want = [
        start + i
        for start, sample in zip(pack.sample_starts, pack.samples, strict=True)
        for a, b in sample.label_spans
        for i in range(a, b)
    ]
    assert labels.tolist() == want and rows.tolist() == [i - 1 for i in want]
    assert len(want) == pack.ce_rows
    tokens = PackTokens.from_ids(pack, torch.arange(pack.length) + 7)
    assert tokens.ce_labels.tolist() == [i + 7 for i in want]
    assert tokens.ce_rows.tolist() == rows.tolist()


def test_no_labels_give_empty_integer_rows() -> None:
    rows, labels = label_rows(Pack((Sample("s", Task.T2T, (Segment.text(3),)),), 3))
    assert rows.dtype == labels.dtype == torch.int64 and rows.shape == labels.shape == (0,)


@pytest.mark.parametrize("count", [2, 4])
def test_token_ids_must_be_as_many_as_the_pack(count: int) -> None:
    pack = Pack((Sample("s", Task.T2T, (Segment.text(3),)),), 3)
    with pytest.raises(ValueError, match=rf"token_ids of shape \({count},\): the pack has 3 tokens"):
        PackTokens.from_ids(pack, torch.zeros(count, dtype=torch.int64))


@settings(max_examples=30, deadline=None)
@given(packs())
def test_visuals_that_fit_pass(pack: Pack) -> None:
    _, visuals, noise = pack_values(pack)
    visuals.check(pack)
    assert len(noise.timesteps) == len(noise.loss_rows) == len(visuals.latents)


@pytest.mark.parametrize("name", ["vit", "latents", "valid"])
@pytest.mark.parametrize("change", [-1, 1])
def test_visuals_that_contradict_the_pack_are_named(name: str, change: int) -> None:
    segments = tuple(Segment.visual(kind, (1, 1, 2)) for kind in (SegmentKind.VIT, SegmentKind.CLEAN))
    pack = Pack((Sample("s", Task.I_EDIT, segments),), 8)
    visuals = PackVisuals(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, dtype=torch.bool))
    wrong = replace(visuals, **{name: torch.zeros(2 + change, 3)})
    with pytest.raises(ValueError, match=f"visuals.{name} has {2 + change} rows: the pack needs 2"):
        wrong.check(pack)


def test_a_label_after_vae_content_is_refused() -> None:
    block = Segment.visual(SegmentKind.CLEAN, (1, 1, 2))  # marker, 2 cells, marker: tokens 2 to 5
    segments = (Segment.text(2), block, Segment.text(3))
    for span in ((2, 5), (5, 6), (1, 9)):
        with pytest.raises(ValueError, match="predicted by VAE content"):
            Sample("s", Task.I2T, segments, (span,))
    assert Sample("s", Task.I2T, segments, ((1, 4), (6, 9))).ce_rows == 6
