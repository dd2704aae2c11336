"""Encoding shared out over the ranks of a replica: the same values on any number of them, broken media told alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prepack import prepack
from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import VAE_KINDS, SegmentKind
from tests.distributed.launch import torchrun
from tests.shared import REPOSITORY
from tests.tiny import ROWS, TASKS, TinyRun, jpeg, mp4

SCRIPT = str(REPOSITORY / "tests" / "distributed" / "run_replica.py")
RANKS = (1, 2, 3)

pytestmark = pytest.mark.distributed


def damage(path: Path, media: bytes, broken: bytes) -> None:
    """Replace one row's media in a parquet file by as many other bytes, so that file and index still fit."""
    content = path.read_bytes()
    assert content.count(media) == 1 and len(broken) == len(media)
    path.write_bytes(content.replace(media, broken))


@pytest.fixture(scope="module")
def damaged(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration over a copy of the data, two rows of which were damaged after prepacking."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(tiny_run.folder, folder)
    clip, picture = mp4("blue"), jpeg("red")
    damage(folder / "data" / "text2video.parquet", clip, clip[:40] + bytes(len(clip) - 40))
    damage(folder / "data" / "text2image.parquet", picture, b"\xff\xd8\xff" + bytes(len(picture) - 3))
    sources = [{"name": n, "path": str(folder / "data" / f"{n}.parquet"), "task": t} for n, t in TASKS.items()]
    settings = {"extends": str(tiny_run.config), "data": {"sources": sources}}
    config = folder / "damaged.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return config


BROKEN = {"text2image/text2image.parquet/0", "text2video/text2video.parquet/2"}


def broken_step(run: RunConfig) -> int:
    """The first step that trains on a damaged row."""
    index = PackIndex.open(run.data.pack_index)
    for step in range(len(index)):
        for number in index.global_batch(step, run.training.global_batch_size):
            if any(row.sample.sample_id in BROKEN for row in index.pack(number).rows):
                return step
    raise AssertionError("no step has a damaged row")


Results = list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tiny_run: TinyRun, damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """Of the good and of the damaged data: per number of ranks, what each rank got."""
    good, bad = [], []
    for ranks in RANKS:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        torchrun(ranks, SCRIPT, str(folder), str(broken_step(tiny_run.load())), str(tiny_run.config), str(damaged))
        pairs = [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
        good.append([pair[0] for pair in pairs])
        bad.append([pair[1] for pair in pairs])
    return good, bad


def equal(ours: list[Any], theirs: list[Any]) -> bool:
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


def visual_samples(pack: Pack, *kinds: SegmentKind) -> Iterator[tuple[str, int]]:
    """(sample id, content rows) of the visual segments of some kinds."""
    return ((pack.samples[p.sample_index].sample_id, p.segment.content_length) for p in pack.visual_segments(*kinds))


def test_encodings_are_the_same_on_any_number_of_ranks(results: tuple[Results, Results]) -> None:
    reference = results[0][0][0]["visuals"]
    vit, latents, valid = (torch.cat(values) for values in zip(*reference, strict=True))
    assert vit.any(dim=1).all() and latents.any(dim=1).all() and valid.all()
    assert len(vit) and len(latents)
    for ranks in results[0]:
        for rank in ranks:
            assert equal(rank["visuals"], reference)
            assert rank["named"] == [] and rank["broken"] == 0


def test_a_broken_item_is_flagged_on_all_ranks(tiny_run: TinyRun, results: tuple[Results, Results]) -> None:
    whole, broken = (each[0][0]["visuals"] for each in results)
    index = PackIndex.open(tiny_run.load().data.pack_index)
    for ranks in results[1]:
        for rank in ranks:
            assert equal(rank["visuals"], broken)
    for number, ((vit, latents, valid), (good_vit, good_latents, _)) in enumerate(zip(broken, whole, strict=True)):
        pack = index.pack(number).pack
        every = visual_samples(pack, SegmentKind.VIT, *VAE_KINDS)
        assert valid.tolist() == [sample not in BROKEN for sample, _ in every]
        assert torch.equal(vit, good_vit)
        at = 0
        for sample, rows in visual_samples(pack, *VAE_KINDS):
            expected = (
                torch.zeros_like(good_latents[at : at + rows]) if sample in BROKEN else good_latents[at : at + rows]
            )
            assert torch.equal(latents[at : at + rows], expected)
            at += rows
        assert at == len(latents)


def test_a_broken_item_is_named_once(results: tuple[Results, Results]) -> None:
    keys = [
        ("text2image", "text2image.parquet", 0, "image_bytes"),
        ("text2video", "text2video.parquet", 2, "video_bytes"),
    ]
    for ranks in results[1]:
        assert sorted(key for rank in ranks for key in rank["named"]) == keys


def test_rows_of_a_broken_sample_have_weight_zero_and_still_count(
    tiny_run: TinyRun, results: tuple[Results, Results]
) -> None:
    run = tiny_run.load()
    index = PackIndex.open(run.data.pack_index)
    numbers = index.global_batch(broken_step(run), run.training.global_batch_size)
    packs = [index.pack(number) for number in numbers]
    kept = [[s for s in planned.pack.samples if s.sample_id not in BROKEN] for planned in packs]
    assert any(len(samples) < len(planned.rows) for samples, planned in zip(kept, packs, strict=True))
    expected = [(sum(s.ce_rows for s in samples), sum(s.velocity_rows for s in samples)) for samples in kept]
    for ranks in results[1]:
        found = [
            [sum(values) for values in zip(*(rank["weights"][i] for rank in ranks), strict=True)] for i in range(2)
        ]
        assert [tuple(pair) for pair in found] == expected
        for rank in ranks:
            assert rank["counts"] == (sum(p.ce_rows for p in packs), sum(p.velocity_rows for p in packs))
            assert rank["broken"] == sum(len(p.rows) for p in packs) - sum(map(len, kept))


def train(config: Path, run_dir: Path, *overrides: str) -> tuple[list[dict[str, Any]], str]:
    """Three steps on two ranks: the lines of metrics.jsonl, and the output."""
    arguments = ["--config", str(config), "training.train_iters=3", f"training.run_dir={run_dir}", *overrides]
    output = torchrun(2, "-m", "megatron_lance.training.train", *arguments)
    assert "step 3/3 loss" in output and "SKIPPED" not in output
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()], output


@pytest.mark.parametrize("replicas", [1, 2])
def test_training_goes_on_over_broken_media(replicas: int, damaged: Path, tmp_path: Path) -> None:
    metrics, output = train(damaged, tmp_path / "run", f"parallel.context_parallel_size={2 // replicas}")
    for place in (
        "source text2image, file text2image.parquet, row 0, image_bytes: ",
        "source text2video, file text2video.parquet, row 2, video_bytes: ",
    ):
        assert 1 <= output.count(f"broken media: {place}") <= replicas
    run = load_config([str(damaged)])
    index = PackIndex.open(run.data.pack_index)
    batches = [index.global_batch(step, run.training.global_batch_size) for step in range(3)]
    ids = [[row.sample.sample_id for number in batch for row in index.pack(number).rows] for batch in batches]
    assert [line["broken"] for line in metrics] == [sum(i in BROKEN for i in batch) for batch in ids]
    assert any(line["broken"] for line in metrics)


def test_what_prepack_finds_broken_is_replaced(damaged: Path, tmp_path: Path) -> None:
    pack_index = f"data.pack_index={tmp_path / 'index'}"
    run = load_config([str(damaged)], [pack_index])
    index = prepack(run.data, run.model, run.training.seed, run.training.global_batch_size, progress=False)
    assert (index.counts["unusable"], index.counts["substituted"]) == (2, 2 * run.data.epochs)
    assert index.counts["samples"] == run.data.epochs * ROWS * len(TASKS)
    metrics, output = train(damaged, tmp_path / "run", pack_index)
    assert [line["broken"] for line in metrics] == [0, 0, 0] and "broken media" not in output
