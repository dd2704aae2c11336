"""Benchmark of damaged media: every file through planning and through the feed of several ranks.

Station: damaged files -> [prepack; prepack on good files, then feed] -> outcome of each file -> tools/bench.py.  Start
it with torchrun; all ranks form one replica, which shares out the media.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import (
    DataConfig,
    EncoderConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from megatron_lance.data.media import is_image
from megatron_lance.data.pack_index import PlannedPack
from megatron_lance.data.pack_index_format import UNUSABLE_FILE
from megatron_lance.data.prepack import prepack
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.packing.batch import PackVisuals
from megatron_lance.packing.segment import VAE_KINDS
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.groups import Groups
from megatron_lance.profiling.benchmarks.damaged_files import Damaged, clip, damaged_files, picture
from megatron_lance.training.feed import Feed

SUMMARY = "damaged pictures and clips through planning and feed, under torchrun: outcome of each, flags of all ranks"
TASKS = {"image": "t2i", "video": "t2v"}
GLOBAL_BATCH = 4
SAME, OTHER = "decoded to the good file's pixels", "decoded to other pixels"
Row = tuple[str, int]
"""Kind and row of a file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="folder with tokenizer.json")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="parquet files of public schemas to damage too")
    parser.add_argument("--each", type=int, default=1, help="media of each file of --data (default 1)")
    parser.add_argument("--workers", type=int, default=1, help="processes per rank that read (default 1)")


def _good(folder: Path | None, each: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(clips, pictures) by name: drawn ones, and those of parquet files."""
    clips, pictures = {"drawn clip": clip()}, {f"drawn {name}": picture(name) for name in ("JPEG", "PNG", "WEBP")}
    for path in sorted(folder.glob("*.parquet")) if folder else ():
        columns = [name for name in pq.read_schema(path).names if name.endswith("_bytes")]
        if path.name.startswith("bad") or not columns:
            continue
        for row, data in enumerate(pq.read_table(path, columns=columns[-1:]).column(0).to_pylist()[:each]):
            (pictures if is_image(data) else clips)[f"{path.stem} {row}"] = data
    return clips, pictures


def _write(folder: Path, files: Sequence[Damaged], good: dict[str, bytes] | None = None) -> None:
    """Files under their numbers; with `good` (by name and by kind) what each was made from, or one of its kind."""
    for number, file in enumerate(files):
        (folder / f"{number}.bin").write_bytes(file.data if good is None else good[file.good or file.kind])


def _write_tables(folder: Path, files: Sequence[Damaged]) -> None:
    """A parquet file of references per kind."""
    for kind in TASKS:
        names = [f"{number}.bin" for number, file in enumerate(files) if file.kind == kind]
        columns = {"caption": ["some words"] * len(names), f"{kind}_bytes": names}
        pq.write_table(pa.table(columns), folder / f"{kind}.parquet")


def _run(folder: Path, tokenizer: str, workers: int, files: Sequence[Damaged]) -> RunConfig:
    """An epoch of it has every file once."""
    rows = Counter(file.kind for file in files)
    sources = tuple(
        SourceConfig(kind, str(folder / f"{kind}.parquet"), task, float(rows[kind]), raw_bytes_input=False)
        for kind, task in TASKS.items()
    )
    data = DataConfig(
        sources=sources,
        tokenizer=tokenizer,
        seq_length=2048,
        vae_resolution=64,
        vit_resolution=56,
        max_seconds_generation=1.0,
        workers=workers,
        decode_threads=1,
        balance_replicas=1,
    )
    return RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"])),
        data=data,
        encoders=EncoderConfig(vae="block_transform"),
        training=TrainingConfig(global_batch_size=GLOBAL_BATCH, precision="float32"),
    )


def _plan(run: RunConfig, folder: Path, name: str) -> tuple[RunConfig, dict[Row, str]]:
    """The run with a pack index that the first rank writes; cause of each row that cannot be used."""
    run = replace(run, data=replace(run.data, pack_index=str(folder / name)))
    if dist.get_rank() == 0:
        prepack(run.data, run.model, run.training.seed, GLOBAL_BATCH, progress=False)
    dist.barrier()
    lines = (Path(run.data.pack_index) / UNUSABLE_FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return run, {(row["source"], row["row"]): row["cause"] for row in rows}


def _digests(visuals: PackVisuals, planned: PlannedPack) -> dict[Row, str]:
    """A hash of the latents of each row of a pack; empty where it was flagged as broken."""
    rows = [segment.segment.content_length for segment in planned.pack.visual_segments(*VAE_KINDS)]
    found = {}
    for item, valid, latents in zip(planned.media, visuals.valid.tolist(), visuals.latents.split(rows), strict=True):
        digest = hashlib.sha256(latents.numpy().tobytes()).hexdigest()[:16]
        found[item.source, item.row] = digest if valid else ""
    return found


class _Fed(NamedTuple):
    """What the feed gave.

    Attributes:
        digests: by row; empty for what was flagged as broken.
        causes: by row of what was flagged.
        slowest: seconds of the longest step of any rank, the first left out: it starts the workers.
        agree: whether all ranks had the same in every step.
        restarts: of workers of all ranks.
    """

    digests: dict[Row, str]
    causes: dict[Row, str]
    slowest: float
    agree: bool
    restarts: int


def _of_all_ranks(value: Any) -> list[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _feed(run: RunConfig, groups: Groups) -> _Fed:
    """All steps of an index through the feed."""
    digests: dict[Row, str] = {}
    seconds, agree = [], True
    with closing(Feed(run, groups, Tokenizer(run.data.tokenizer))) as feed:
        for step in range(-(-len(feed.index) // GLOBAL_BATCH)):
            start = time.perf_counter()
            packs = feed.packs(step)
            visuals = feed.encoder.encode(packs, feed.ahead.step(step).media)
            seconds.append(time.perf_counter() - start)
            own = {row: d for v, pack in zip(visuals, packs, strict=True) for row, d in _digests(v, pack).items()}
            agree &= all(other == own for other in _of_all_ranks(own))
            digests |= own
        ends = _of_all_ranks((dict(feed.encoder.broken), max(seconds[1:], default=0.0), feed.ahead.restarts))
    causes = {(source, row): cause for broken, _, _ in ends for (source, _, row, _), cause in broken.items()}
    return _Fed(digests, causes, max(end[1] for end in ends), agree, sum(end[2] for end in ends))


def _outcome(row: Row, fed: _Fed, good: str | None = None) -> str:
    """What came of a file in the feed."""
    digest = fed.digests.get(row)
    if digest is None:
        return "not planned"
    if not digest:
        return fed.causes.get(row, "")
    if good is None:
        return "decoded"
    return SAME if digest == good else OTHER


def _measure(
    folder: Path, files: Sequence[Damaged], good: dict[str, bytes], args: argparse.Namespace
) -> dict[str, Any]:
    run = _run(folder, args.tokenizer, args.workers, files)
    groups = parallel_groups.initialize(run.parallel, seed=1)
    first = dist.get_rank() == 0
    if first:
        _write_tables(folder, files)
        _write(folder, files, good)
    planned_good, _ = _plan(run, folder, "planned on good files")
    whole = _feed(planned_good, groups)
    if first:
        _write(folder, files)
    dist.barrier()
    after = _feed(planned_good, groups)
    planned, unusable = _plan(run, folder, "planned on damaged files")
    rest = _feed(planned, groups)
    outcomes = []
    rows: Counter[str] = Counter()
    for file in files:
        row = file.kind, rows[file.kind]
        rows[file.kind] += 1
        outcomes.append(
            {
                **{"name": file.name, "damage": file.damage, "kind": file.kind, "bytes": len(file.data)},
                "planned": unusable.get(row) or _outcome(row, rest),
                "broken after planning": _outcome(row, after, whole.digests[row]),
            }
        )
    assert all(one["planned"] and one["broken after planning"] for one in outcomes), "a cause is missing"
    feeds = {"good": whole, "broken after planning": after, "planned": rest}
    parallel_groups.destroy()
    return {
        "files": len(files),
        "ranks_agree": {name: fed.agree for name, fed in feeds.items()},
        "slowest_step_seconds": {name: fed.slowest for name, fed in feeds.items()},
        "worker_restarts": {name: fed.restarts for name, fed in feeds.items()},
        "load_average": os.getloadavg()[0],
        "outcomes": outcomes,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the result is one JSON object."""
    if args.data is not None and not args.data.is_dir():
        raise UserError(f"--data {args.data}: is no folder; give one with parquet files")
    ranks = int(os.environ.get("WORLD_SIZE", "0"))
    if not ranks:
        raise UserError("damaged-media: runs on several ranks; start it with torchrun --nproc-per-node 2")
    logging.getLogger("megatron_lance").setLevel(logging.ERROR)  # hundreds of warnings stand in the result instead
    folder = Path(tempfile.gettempdir()) / f"damaged_{os.environ['TORCHELASTIC_RUN_ID']}_{os.environ['MASTER_PORT']}"
    if os.environ["RANK"] == "0":
        folder.mkdir()
    try:
        clips, pictures = _good(args.data, args.each)
        of_kinds = {"image": next(iter(pictures.values())), "video": next(iter(clips.values()))}
        good = {**clips, **pictures, **of_kinds}
        return {"ranks": ranks, "workers": args.workers, **_measure(folder, damaged_files(clips, pictures), good, args)}
    finally:
        if os.environ["RANK"] == "0":
            shutil.rmtree(folder)


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['files']} files on {result['ranks']} ranks; ranks agree: {result['ranks_agree']}; slowest step "
        f"{max(result['slowest_step_seconds'].values()):.1f} s; workers restarted {result['worker_restarts']}",
        f"{'damage':<20} {'files':>5} {'named by planning':>18} {'named by the feed, planned on good':>35} "
        f"{'decoded otherwise':>18}",
    ]
    for damage in dict.fromkeys(one["damage"] for one in result["outcomes"]):
        ones = [one for one in result["outcomes"] if one["damage"] == damage]
        later = [one["broken after planning"] for one in ones]
        named = sum(not text.startswith("decoded") for text in later)
        otherwise = sum(text == OTHER for text in later)
        planned = sum(one["planned"] != "decoded" for one in ones)
        lines.append(f"{damage:<20} {len(ones):>5} {planned:>18} {named:>35} {otherwise:>18}")
    return "\n".join(lines)
