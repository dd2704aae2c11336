"""Training through the real entry: every task mixed, on several layouts; and what happens when a loss is not finite.

On the real parquet files, reduced to small sizes so that 20 steps take seconds.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_lance.config.loader import load_config
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prepack import prepack
from megatron_lance.data.prompt import Tokenizer
from tests.distributed.launch import torchrun
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
LAYOUTS = {"tp2": [TP], "pp2": [PP], "dp2": [], "cp2": [CP]}
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
            "seq_length": 1024,
            "vae_resolution": 96,
            "vit_resolution": 84,
        },
        "training": {"global_batch_size": 2},
    }
    path = folder / "real.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    run = load_config([str(path)])
    index = prepack(run.data, run.model, run.training.seed, progress=False)
    tasks = {str(row.sample.task) for number in range(len(index)) for row in index.pack(number).rows}
    assert index.counts["unusable"] == 0 and tasks == {task for _, _, task in SOURCES}
    return path


def train(config: Path, run_dir: Path, ranks: int, *overrides: str, exit_code: int = 0) -> tuple[list[Any], str]:
    """Train through the entry; returns the lines of metrics.jsonl and the output."""
    arguments = ["--config", str(config), f"training.run_dir={run_dir}", *overrides]
    output = torchrun(ranks, "-m", "megatron_lance.training.train", *arguments, exit_code=exit_code)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], output


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The metrics of one rank in float32."""
    return train(config, tmp_path_factory.mktemp("one") / "run", 1, f"training.train_iters={STEPS}")[0]


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, config: Path, reference: list[Any], tmp_path: Path) -> None:
    """First loss and gradient norm to rounding, the loss after 20 steps within 1e-3.

    Adam divides by the root of the second moment with an eps of 1e-15, so parameters whose gradients are all rounding
    move by a full learning rate in a direction of chance: later losses agree less than first ones.
    """
    metrics, _ = train(config, tmp_path / "run", 2, *LAYOUTS[layout], f"training.train_iters={STEPS}")
    assert len(metrics) == len(reference) == STEPS
    for name in ("loss", "ce_loss", "velocity_loss", "grad_norm"):
        assert relative(metrics[0][name], reference[0][name]) < 1e-5, name
    assert relative(metrics[-1]["loss"], reference[-1]["loss"]) < 1e-3


def test_loss_falls_and_runs_repeat_bit_for_bit(config: Path, tmp_path: Path) -> None:
    runs = [train(config, tmp_path / name, 4, TP, PP, "training.train_iters=8")[0] for name in ("first", "second")]
    names = ("step", "loss", "ce_loss", "velocity_loss", "grad_norm", "learning_rate", "broken", "skipped")
    first, second = ([tuple(line[name] for name in names) for line in run] for run in runs)
    assert first == second
    losses = [line["loss"] for line in runs[0]]
    assert len(losses) == 8 and sum(losses[-3:]) / 3 < losses[0]


def test_bf16_with_the_distributed_optimizer(config: Path, reference: list[Any], tmp_path: Path) -> None:
    """Weights and activations of 8 mantissa bits: each value is off by up to 2**-9, losses are means over many rows."""
    overrides = ["training.precision=bf16", "parallel.use_distributed_optimizer=true", "training.train_iters=5"]
    metrics, _ = train(config, tmp_path / "run", 2, *overrides)
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in metrics)
    assert not any(line["skipped"] for line in metrics)
    assert relative(metrics[0]["loss"], reference[0]["loss"]) < 2**-8
    assert relative(metrics[0]["grad_norm"], reference[0]["grad_norm"]) < 0.05
    assert metrics[0]["loss"] != reference[0]["loss"]


def test_all_ranks_leave_out_a_step_that_is_not_finite_on_one(tiny_run: TinyRun, tmp_path: Path) -> None:
    """An infinite embedding of a token that only one pack of the first step has."""
    run = tiny_run.load()
    reader = PackReader(run.data, PackIndex.open(run.data.pack_index), Tokenizer(run.data.tokenizer))
    tokens = [set(reader.tokens(number).token_ids.tolist()) for number in range(4)]
    alone = tokens[0] - tokens[1] - tokens[2] - tokens[3]
    embeddings = torch.zeros(run.model.vocab_size, run.model.hidden_size)
    embeddings[min(alone)] = float("inf")
    weights = write_weights(tmp_path / "w", run.model, {"language_model.model.embed_tokens.weight": embeddings})
    overrides = [f"training.init_from={weights}", "training.train_iters=2"]
    metrics, output = train(tiny_run.config, tmp_path / "run", 2, *overrides)
    assert [line["skipped"] for line in metrics] == [True, False]
    assert math.isfinite(metrics[1]["loss"]) and math.isfinite(metrics[1]["grad_norm"])
    assert output.count("step 1: loss or gradients are not finite in packs (0, 1)") == 2  # once per rank


def test_a_run_that_stays_not_finite_ends_with_4(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tiny_run.load()
    infinite = torch.full((run.model.hidden_size,), float("inf"))
    weights = write_weights(tmp_path / "w", run.model, {"vae2llm.bias": infinite})
    limit = "training.max_nonfinite_steps=2"
    metrics, output = train(tiny_run.config, tmp_path / "run", 2, f"training.init_from={weights}", limit, exit_code=1)
    assert [line["skipped"] for line in metrics] == [True, True]
    assert "train: error: step 2: 2 steps in a row were not finite, the last with packs (2, 3)" in output
    assert output.count("exitcode  : 4") == 2  # torchrun's report of both ranks
