"""What steps train on: the same with and without worker processes, and after restarts on other layouts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_lance.data.pack_index import PackIndex
from megatron_lance.encoders.offline import encode_index
from tests.distributed.launch import on_ranks
from tests.shared import REPOSITORY
from tests.tiny import TinyRun

FOLDER = REPOSITORY / "tests" / "distributed"
TP, CP, PP = (f"parallel.{name}_parallel_size=2" for name in ("tensor_model", "context", "pipeline_model"))
LAYOUTS = ("data.workers=1 0:3", f"{TP} 3:5", f"{CP} data.workers=1 5:7", f"{PP} 7:8", "data.workers=2 8:12")

pytestmark = pytest.mark.distributed


def test_restarts_on_other_layouts_lose_and_repeat_no_sample(tiny_run: TinyRun, tmp_path: Path) -> None:
    on_ranks(2, str(FOLDER / "run_feed.py"), str(tmp_path), str(tiny_run.config), *LAYOUTS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    run = tiny_run.load()
    index = PackIndex.open(run.data.pack_index)
    seen: Counter[tuple[str, int]] = Counter()
    for step, fed in enumerate(zip(*ranks, strict=True)):
        packs = index.global_batch(step, run.training.global_batch_size)
        planned = Counter((row.sample.sample_id, row.epoch) for n in packs for row in index.pack(n).rows)
        assert [(one["step"], one["packs"]) for one in fed] == [(step, list(packs))] * 2
        of_replicas = Counter(row for one in fed if one["first of replica"] for row in one["rows"])
        assert of_replicas == planned
        assert len({one["replica"] for one in fed}) == sum(one["first of replica"] for one in fed)
        seen += of_replicas
    uninterrupted = Counter(
        (row.sample.sample_id, row.epoch)
        for n in range(12 * run.training.global_batch_size)
        for row in index.pack(n).rows
    )
    assert step == 11 and seen == uninterrupted and set(seen.values()) == {1}


def test_training_with_workers_or_a_cache_gives_the_same_bits(tiny_run: TinyRun, tmp_path: Path) -> None:
    cache = f"data.encoding_cache={tmp_path / 'cache'}"
    assert encode_index(tiny_run.load(cache), rank=0, ranks=1, progress=False).broken == 0
    settings = {
        "without": "data.workers=0",
        "with": "data.workers=2 data.steps_ahead=2",
        "cached": f"data.workers=1 {cache}",
    }
    trainings = [f"training.run_dir={tmp_path / n} training.train_iters=4 {TP} {s}" for n, s in settings.items()]
    on_ranks(2, str(FOLDER / "run_training.py"), str(tiny_run.config), *trainings)
    runs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in settings
    ]
    losses = [[(line["loss"], line["grad_norm"], line["broken"]) for line in run] for run in runs]
    assert len(losses[0]) == 4 and losses[0] == losses[1] == losses[2]
    for run in runs:
        assert all(0 < line["read_seconds"] < line["data_seconds"] for line in run)
        assert all(line["read_retries"] == line["reader_restarts"] == 0 for line in run)
