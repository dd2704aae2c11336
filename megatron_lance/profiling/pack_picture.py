"""Picture of a pack: its samples and segments, the mask, and which context-parallel rank computes which queries.

Station: pack index -> [picture] -> tools/inspect_pack.py.  In: a planned pack and the number of context-parallel ranks.
Out: an image; rows are queries, columns keys, both in pack order.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from megatron_lance.data.pack_index import PlannedPack
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.balance import tile_costs
from megatron_lance.packing.layout import Layout, token_experts
from megatron_lance.packing.segment import SegmentKind

UInt8Array = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

SIDE, BAR, GAP, LEGEND, MARGIN, TITLE, LINE = 720, 18, 4, 330, 16, 52, 17
"""Pixels: of the mask, the bars beside it, the space between, the legend, the edge, the heading, a line of text."""
KINDS: dict[SegmentKind, Colour] = {
    SegmentKind.TEXT: (70, 70, 70),
    SegmentKind.VIT: (60, 140, 90),
    SegmentKind.CLEAN: (230, 170, 50),
    SegmentKind.NOISE: (200, 70, 60),
}
UND, GEN, PAPER, INK = (40, 90, 170), (215, 110, 30), (255, 255, 255), (20, 20, 20)


@dataclass(frozen=True)
class RankWork:
    """What a context-parallel rank gets of a pack.

    Attributes:
        rows: tokens.
        pairs: allowed (query, key) pairs.
        tiles: tiles that attention computes.
    """

    rows: int
    pairs: int
    tiles: int


def deal(planned: PlannedPack, cp: int, alignment: int = 8) -> tuple[npt.NDArray[np.int64], list[RankWork]]:
    """(rank of each token, int64 [L]; work of each rank)."""
    layout = Layout.build(planned.pack, cp, 1, alignment)
    plan = AttentionPlan.from_pack(planned.pack)
    owner = np.zeros(planned.pack.length, np.int64)
    works = []
    for rank in range(cp):
        ranges = layout.query_ranges(rank)
        for start, stop in ranges:
            owner[start:stop] = rank
        mine = plan.restrict(ranges)
        rows = sum(stop - start for start, stop in ranges)
        works.append(RankWork(rows, mine.mask_pairs, int(tile_costs(mine).sum())))
    return owner, works


def draw(planned: PlannedPack, cp: int) -> Image.Image:
    """The picture of a pack dealt to `cp` ranks.

    Bars above the mask: expert of the keys; left: segment kinds of the queries; right: ranks of the queries.
    """
    pack = planned.pack
    owner, works = deal(planned, cp)
    gen = token_experts(pack)
    at = (np.arange(SIDE) + 0.5) * pack.length / SIDE
    token = at.astype(np.int64)  # the token that a pixel shows
    kinds = np.zeros((pack.length, 3), np.uint8)
    for placed in pack.placed_segments():
        kinds[placed.start : placed.stop] = KINDS[placed.segment.kind]
    ranks = np.array([_rank_colour(rank, cp) for rank in range(cp)], np.uint8)
    experts = np.where(gen[:, None], GEN, UND).astype(np.uint8)
    size = (2 * MARGIN + 2 * (BAR + GAP) + SIDE + LEGEND, 2 * MARGIN + TITLE + BAR + GAP + SIDE)
    image = Image.new("RGB", size, PAPER)
    left, top = MARGIN + BAR + GAP, MARGIN + TITLE + BAR + GAP
    image.paste(Image.fromarray(_mask(planned, experts[token])), (left, top))
    image.paste(_bar(experts[token], True), (left, top - BAR - GAP))
    image.paste(_bar(kinds[token], False), (MARGIN, top))
    image.paste(_bar(ranks[owner[token]], False), (left + SIDE + GAP, top))
    canvas = ImageDraw.Draw(image)
    for start in pack.sample_starts[1:]:
        y = top + round(start * SIDE / pack.length)
        canvas.line((MARGIN, y, left + SIDE + GAP + BAR, y), fill=(150, 150, 150))
        x = left + round(start * SIDE / pack.length)
        canvas.line((x, top - BAR - GAP, x, top + SIDE), fill=(150, 150, 150))
    _write(canvas, planned, works, (left + SIDE + 2 * GAP + BAR + MARGIN, top))
    return image


def _rank_colour(rank: int, ranks: int) -> Colour:
    """Hues around the circle; neighbours differ in brightness too."""
    red, green, blue = colorsys.hsv_to_rgb(rank / ranks, 0.65, 0.95 if rank % 2 else 0.7)
    return round(255 * red), round(255 * green), round(255 * blue)


def _mask(planned: PlannedPack, keys: UInt8Array) -> UInt8Array:
    """uint8 [SIDE, SIDE, 3]: each column in the colour of its key's expert, as strong as the share of allowed pairs."""
    plan = AttentionPlan.from_pack(planned.pack)
    cells = min(SIDE, planned.pack.length)
    share = plan.cell_shares(cells)
    index = ((np.arange(SIDE) + 0.5) * cells / SIDE).astype(np.int64)
    weight = share[index][:, index, None] ** 0.7  # a thin diagonal still shows
    return (PAPER + weight * (keys[None, :, :].astype(np.float64) - PAPER)).astype(np.uint8)


def _bar(colours: UInt8Array, across: bool) -> Image.Image:
    """A strip of SIDE x BAR pixels."""
    return Image.fromarray(np.repeat(colours[None] if across else colours[:, None], BAR, axis=0 if across else 1))


def _write(canvas: ImageDraw.ImageDraw, planned: PlannedPack, works: list[RankWork], corner: tuple[int, int]) -> None:
    """Heading and legend."""
    font = ImageFont.load_default(13)
    pack = planned.pack
    heading = [
        f"pack {planned.number}: {len(pack.samples)} samples, {pack.length} of {pack.capacity} tokens "
        f"(fill {pack.length / pack.capacity:.1%}), {pack.gen_length} of the generation expert",
        f"{planned.mask_pairs / 1e6:.1f} M mask pairs, "
        f"{planned.ce_rows} CE rows, {planned.velocity_rows} velocity rows",
    ]
    for i, text in enumerate(heading):
        canvas.text((MARGIN, MARGIN + i * (LINE + 2)), text, INK, font)
    lines: list[tuple[Colour | None, str]] = [(None, "left: segment"), *((c, str(k)) for k, c in KINDS.items())]
    lines += [(None, "above, and colour of the mask: expert of the key"), (UND, "understanding"), (GEN, "generation")]
    lines.append((None, f"right: rank of the query, cp {len(works)} (rows, tiles)"))
    for rank, work in enumerate(works[:16]):
        tiles = work.tiles / sum(w.tiles for w in works)
        lines.append((_rank_colour(rank, len(works)), f"{rank}: {work.rows / pack.length:.1%}, {tiles:.1%}"))
    lines.append((None, "samples"))
    lines += [(None, f"  {s.task}  {s.length} tokens") for s in pack.samples]
    room = SIDE // LINE
    if len(lines) > room:
        lines = [*lines[: room - 1], (None, f"  and {len(lines) - room + 1} more")]
    for i, (colour, text) in enumerate(lines):
        x, y = corner[0], corner[1] + i * LINE
        if colour:
            canvas.rectangle((x + 4, y + 3, x + 14, y + 13), fill=colour)
        canvas.text((x + (20 if colour else 0), y), text, INK, font)
