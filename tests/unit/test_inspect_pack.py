"""The picture of a pack: every token dealt once, the mask where it is, the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from megatron_lance.data.pack_index import PackIndex, PlannedPack
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.layout import token_experts
from megatron_lance.profiling.pack_picture import BAR, GAP, GEN, MARGIN, SIDE, TITLE, UND, deal, draw
from tests.command import Commander
from tests.tiny import TinyRun


def first_pack(run: TinyRun) -> PlannedPack:
    return PackIndex.open(run.folder / "index").pack(0)


def test_shares_of_single_tokens_are_the_mask(tiny_run: TinyRun) -> None:
    plan = AttentionPlan.from_pack(first_pack(tiny_run).pack)
    assert np.array_equal(plan.cell_shares(plan.length), plan.dense())
    few = plan.cell_shares(7)
    assert few.shape == (7, 7) and (np.triu(few, 1) == 0).sum() > 10 and few.max() <= 1


def test_ranks_share_the_pack(tiny_run: TinyRun) -> None:
    planned = first_pack(tiny_run)
    for cp in (1, 3):
        owner, works = deal(planned, cp)
        assert np.bincount(owner, minlength=cp).tolist() == [work.rows for work in works]
        assert sum(work.rows for work in works) == planned.pack.length
        assert sum(work.pairs for work in works) == planned.mask_pairs
        assert max(work.rows for work in works) - min(work.rows for work in works) <= 2


def test_the_picture_shows_mask_and_experts(tiny_run: TinyRun) -> None:
    planned = first_pack(tiny_run)
    pixels = np.asarray(draw(planned, 2))
    left, top = MARGIN + BAR + GAP, MARGIN + TITLE + BAR + GAP
    mask = pixels[top : top + SIDE, left : left + SIDE]
    token = ((np.arange(SIDE) + 0.5) * planned.pack.length / SIDE).astype(int)
    dense = AttentionPlan.from_pack(planned.pack).dense()[token][:, token]
    gen = token_experts(planned.pack)[token]
    grid = (mask == (150, 150, 150)).all(-1)  # lines between samples
    for expert, colour in ((~gen, UND), (gen, GEN)):
        full = (mask == colour).all(-1)
        assert not (full & ~dense & ~grid).any(), "a forbidden pair is coloured"
        assert (full[:, expert] | grid[:, expert])[dense[:, expert]].mean() > 0.9
    assert (mask[~dense & ~grid] == 255).mean() > 0.95
    assert (mask != 255).any(-1).sum() < 0.9 * SIDE * SIDE


def test_the_command_writes_a_picture_and_the_deal(tiny_run: TinyRun, command: Commander, tmp_path: Path) -> None:
    done = command(f"inspect_pack {tiny_run.folder / 'index'} --pack 0 1 --cp 2 --png {tmp_path}", folder=tmp_path)
    assert done.code == 0, done.err
    assert done.out.count("cp rank ") == 4 and "of the tiles" in done.out
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == ["pack_000000.png", "pack_000001.png"]
    with Image.open(tmp_path / "pack_000001.png") as picture:
        assert picture.size[0] > SIDE and picture.size[1] > SIDE
    packs = len(PackIndex.open(tiny_run.folder / "index"))
    done = command(f"inspect_pack {tiny_run.folder / 'index'} --pack {packs + 1}", folder=tmp_path)
    assert done.code == 0 and f"pack {packs + 1} lies behind the last one: pack 1 again" in done.out
