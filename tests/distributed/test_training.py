"""Training through the real entry: every task mixed, on several layouts; and what happens when a loss is not finite.

On the real parquet files, reduced to small sizes so that 20 steps take seconds.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_lance.checkpoint.hf_lance import RandomSource, public_shapes
from megatron_lance.config.loader import load_config
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prepack import prepack
from megatron_lance.data.prompt import Tokenizer
from tests.distributed.launch import on_ranks, torchrun
from tests.shared import REPOSITORY, shared_path
from tests.tiny import TinyRun, write_weights

SOURCES = (
    ("t2i", "text2image", "t2i"),
    ("t2v", "text2video", "t2v"),
    ("i2v", "text2video", "i2v"),
    ("i_edit", "image2image", "i_edit"),
    ("v_edit", "video2video", "v_edit"),
    ("s2i", "interleave_subject", "s2i"),
    ("i2t", "x2t_image", "i2t"),
    ("v2t", "x2t_video", "v2t"),
)
TP, PP, CP = (f"parallel.{name}_parallel_size=2" for name in ("tensor_model", "pipeline_model", "context"))
LAYOUTS = {"tp2": TP, "pp2": PP, "dp2": "", "cp2": CP}
BF16 = "training.precision=bf16 parallel.use_distributed_optimizer=true"
SCRIPT = str(REPOSITORY / "tests" / "distributed" / "run_training.py")
STEPS = 20

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks over the real files, prepacked."""
    folder = tmp_path_factory.mktemp("real")
    sources = [{"name": n, "path": str(shared_path("data", f"{file}.parquet")), "task": t} for n, file, t in SOURCES]
    settings = {
        "extends": str(REPOSITORY / "examples" / "configs" / "tiny.yaml"),
        "data": {
            "sources": sources,
            "tokenizer": str(shared_path("golden", "tokenizer")),
            "pack_index": str(folder / "index"),
            "seq_length": 640,
            "vae_resolution": 64,
            "vit_resolution": 56,
            "frame_sampling": "trim",  # decodes less
            "max_seconds_generation": 0.75,
            "max_seconds_understanding": 0.75,
        },
        "training": {"global_batch_size": 2},
    }
    path = folder / "real.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    run = load_config([str(path)])
    index = prepack(run.data, run.model, run.training.seed, run.training.global_batch_size, progress=False)
    tasks = {str(row.sample.task) for number in range(len(index)) for row in index.pack(number).rows}
    assert index.counts["unusable"] == 0 and tasks == {task for _, _, task in SOURCES}
    return path


def read_metrics(run_dir: Path) -> list[Any]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def train(config: Path, run_dir: Path, ranks: int, *overrides: str, exit_code: int = 0) -> tuple[list[Any], str]:
    """Train through the entry; returns the lines of metrics.jsonl and the output."""
    arguments = ["--config", str(config), f"training.run_dir={run_dir}", *overrides]
    output = torchrun(ranks, "-m", "megatron_lance.training.train", *arguments, exit_code=exit_code)
    return read_metrics(run_dir), output


@pytest.fixture(scope="module")
def metrics(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The metrics of one rank, of two under each layout, and of two in bf16; the same global batches."""
    folder = tmp_path_factory.mktemp("layouts")
    trainings = {name: f"{overrides} training.train_iters={STEPS}" for name, overrides in LAYOUTS.items()}
    trainings["bf16"] = f"{BF16} training.train_iters=5"
    on_ranks(1, SCRIPT, str(config), f"training.run_dir={folder / 'one'} training.train_iters={STEPS}")
    on_ranks(2, SCRIPT, str(config), *(f"training.run_dir={folder / n} {text}" for n, text in trainings.items()))
    return {name: read_metrics(folder / name) for name in ("one", *trainings)}


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, metrics: dict[str, list[Any]]) -> None:
    """First loss and gradient norm to rounding, the loss after 20 steps within 1e-3.

    Adam divides by the root of the second moment with an eps of 1e-15, so a parameter whose gradient is all rounding
    moves by a full learning rate in a direction of chance: later losses may differ by more than first ones.
    """
    ours, reference = metrics[layout], metrics["one"]
    assert len(ours) == len(reference) == STEPS
    for name in ("loss", "ce_loss", "velocity_loss", "grad_norm"):
        assert relative(ours[0][name], reference[0][name]) < 1e-5, name
    assert relative(ours[-1]["loss"], reference[-1]["loss"]) < 1e-3


@pytest.mark.parametrize("layout", ["one", *LAYOUTS, "bf16"])
def test_gradient_norms_of_the_experts_add_up(layout: str, metrics: dict[str, list[Any]]) -> None:
    for line, reference in zip(metrics[layout][:5], metrics["one"], strict=False):
        parts = line["grad_norm_by_expert"]
        assert list(parts) == ["und", "gen", "shared"] and min(parts.values()) > 0
        assert math.sqrt(sum(norm**2 for norm in parts.values())) == pytest.approx(line["grad_norm"], rel=1e-5)
        if line["step"] == 1:
            tolerance = 0.05 if layout == "bf16" else 1e-5
            assert parts == pytest.approx(reference["grad_norm_by_expert"], rel=tolerance)
        assert line["memory_bytes"] > 2**26


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_losses_of_sources_are_those_of_their_tasks(layout: str, metrics: dict[str, list[Any]]) -> None:
    """Every source here has a task of its own."""
    for line in metrics[layout]:
        assert line["loss_by_source"] == pytest.approx(line["loss_by_task"], rel=1e-5)
    assert {name for line in metrics[layout] for name in line["loss_by_source"]} == {task for _, _, task in SOURCES}


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_tokens_are_counted_by_kind(layout: str, config: Path, metrics: dict[str, list[Any]]) -> None:
    index = PackIndex.open(load_config([str(config)]).data.pack_index)
    seen = dict.fromkeys(("text", "vit", "clean", "noise"), 0)
    for line in metrics[layout]:
        for number in index.global_batch(line["step"] - 1, 2):
            for segment in (s for sample in index.pack(number).pack.samples for s in sample.segments):
                seen["text"] += segment.length - segment.content_length
                seen[str(segment.kind)] += segment.content_length
        assert line["tokens_seen"] == seen and min(seen.values()) > 0


def test_loss_falls_and_runs_repeat_bit_for_bit(config: Path, tmp_path: Path) -> None:
    runs = [train(config, tmp_path / name, 4, TP, PP, "training.train_iters=8")[0] for name in ("first", "second")]
    names = ("step", "loss", "ce_loss", "velocity_loss", "grad_norm", "learning_rate", "broken", "skipped")
    first, second = ([tuple(line[name] for name in names) for line in run] for run in runs)
    assert first == second
    losses = [line["loss"] for line in runs[0]]
    assert len(losses) == 8 and sum(losses[-3:]) / 3 < losses[0]


def test_bf16_with_the_distributed_optimizer(metrics: dict[str, list[Any]]) -> None:
    """Weights and activations have 8 mantissa bits: values are off by up to 2**-9, a loss is a mean over many rows."""
    ours, first = metrics["bf16"], metrics["one"][0]
    assert len(ours) == 5
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in ours)
    assert not any(line["skipped"] for line in ours)
    assert 0 < relative(ours[0]["loss"], first["loss"]) < 2**-8
    assert relative(ours[0]["grad_norm"], first["grad_norm"]) < 0.05


def test_all_ranks_leave_out_a_step_that_is_not_finite_on_one(tiny_run: TinyRun, tmp_path: Path) -> None:
    """An infinite embedding of a token that one pack of a step has, the other has not, nor has the next step."""
    run = tiny_run.load()
    reader = PackReader(run.data, PackIndex.open(run.data.pack_index), Tokenizer(run.data.tokenizer))
    ids = [set(reader.tokens(number).token_ids.tolist()) for number in range(8)]
    steps = list(zip(ids[::2], ids[1::2], strict=True))
    token, step = next(
        (t, s) for s in range(3) for t in sorted(set.symmetric_difference(*steps[s]) - set.union(*steps[s + 1]))
    )
    expected = [token in set.union(*packs) for packs in steps[: step + 2]]
    key = "language_model.model.embed_tokens.weight"
    embeddings = RandomSource(1, run.model).get(key, public_shapes(run.model)[key])
    embeddings[token] = float("inf")
    weights = write_weights(tmp_path / "w", run.model, {key: embeddings})
    overrides = [f"training.init_from={weights}", f"training.train_iters={step + 2}", "training.max_nonfinite_steps=9"]
    lines, output = train(tiny_run.config, tmp_path / "run", 2, *overrides)
    assert [line["skipped"] for line in lines] == expected and expected[-2:] == [True, False]
    assert math.isfinite(lines[-1]["loss"]) and math.isfinite(lines[-1]["grad_norm"])
    guilty = next(number for number in (2 * step, 2 * step + 1) if token in ids[number])
    named = f"step {step + 1}: loss or gradients are not finite in packs {guilty}\n"
    assert output.count(named) == 2  # once per rank


def test_a_run_that_stays_not_finite_ends_with_4(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tiny_run.load()
    infinite = torch.full((run.model.hidden_size,), float("inf"))
    weights = write_weights(tmp_path / "w", run.model, {"vae2llm.bias": infinite})
    limit = "training.max_nonfinite_steps=2"
    lines, output = train(tiny_run.config, tmp_path / "run", 2, f"training.init_from={weights}", limit, exit_code=1)
    assert [line["skipped"] for line in lines] == [True, True]
    assert re.search(r"train: rank \d: error: step 2: 2 steps in a row were not finite, .* packs 2, 3;", output)
    assert "exitcode  : 4" in output  # torchrun's report; it ends the other rank when one ended so
