"""The whole demo: data, prepack, training on two ranks, resume, export, samples, score.

    python tools/run_demo.py [--out runs/demo] [--force] [--iters N] [--variety V] [--config FILE]

Each stage is one of the ordinary command lines, printed before it runs, so that any of them can be repeated by hand.
Prints a summary and writes it to OUT/summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.loader import load_config

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = "examples/configs/demo.yaml"


@dataclass(frozen=True)
class Stage:
    """One finished stage.

    Attributes:
        name: of the stage.
        seconds: wall time.
        peak_mib: largest resident memory of any process of it, MiB.
    """

    name: str
    seconds: float
    peak_mib: float


def run_stage(name: str, command: list[str]) -> Stage:
    """Run a command line in the repository; its output goes to the terminal.

    Raises:
        UserError: if it fails.
    """
    print(f"\n== {name}\n$ {shlex.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _resident_mib(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise UserError(f"stage {name!r} ended with exit code {process.returncode}; its own message stands above")
    return Stage(name, round(time.perf_counter() - start, 1), round(peak, 1))


def _resident_mib(pid: int) -> float:
    """Resident memory of the largest process of a tree, MiB."""
    import psutil

    try:
        parent = psutil.Process(pid)
        return max(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def ranks() -> int:
    """Processes that train and sample: two on CPUs, on GPUs as many as there are up to two."""
    import torch

    return min(2, torch.cuda.device_count() or 2)


def torchrun(*arguments: str) -> list[str]:
    """A command line on `ranks()` processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks())]
    return [*launcher, *arguments]


def stages(out: Path, iters: int, extra: int, file: str, variety: float) -> list[tuple[str, list[str]]]:
    """The command line of every stage."""
    config = ["--config", file]
    sources = [
        f"data.sources.{number}.path={out}/data/{name}.parquet"
        for number, name in enumerate(
            "text2image text2video text2video image2image video2video interleave_subject x2t_image x2t_video".split()
        )
    ]
    place = [
        f"training.run_dir={out}/train",
        f"data.pack_index={out}/packs",
        f"data.tokenizer={out}/data/tokenizer",
        f"preview.prompts={out}/data/preview.jsonl",
        *([f"parallel.tensor_model_parallel_size={ranks()}"] if file == CONFIG and ranks() != 2 else []),
        *(sources if out != Path("runs/demo") else []),
    ]
    warmup = load_config([str(REPOSITORY / file)]).optimizer.lr_warmup_iters
    short = [f"optimizer.lr_warmup_iters={iters // 2}"] if warmup >= iters else []
    train = ["-m", "megatron_lance.training.train", *config, *place, *short, "training.progress=true"]
    python = [sys.executable]
    return [
        ("data", [*python, "-m", "tools.make_demo_data", f"{out}/data", f"--variety={variety:g}"]),
        ("prepack", [*python, "tools/prepack.py", *config, *place]),
        ("train", torchrun(*train, f"training.train_iters={iters}")),
        ("resume", torchrun(*train, f"training.train_iters={iters + extra}", "training.resume=latest")),
        (
            "export",
            [
                *python,
                "tools/convert_checkpoint.py",
                "export-lance",
                f"{out}/train",
                f"{out}/export",
            ],
        ),
        (
            "sample",
            torchrun(
                "tools/sample.py",
                *config,
                *place,
                f"--weights={out}/export",
                f"--prompts={out}/data/heldout.jsonl",
                f"--out={out}/samples",
                "--size=64x64",
                "--frames=9",
                "--steps=20",
                "--shift=2",
                "--scale=3",
                "--batch=36",
                "--max-tokens=24",
            ),
        ),
        (
            "score",
            [*python, "-m", "tools.judge_demo", f"{out}/samples", f"--data={out}/data", f"--json={out}/score.json"],
        ),
    ]


def summary(out: Path, done: list[Stage]) -> dict[str, object]:
    """Losses, speed, times and score of a finished demo."""
    lines = (out / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    speeds = sorted(m["tokens_per_second"] for m in metrics)
    return {
        "paths": {
            "data": str(out / "data"),
            "run": str(out / "train"),
            "tensorboard": str(out / "train" / "tensorboard"),
            "export": str(out / "export"),
            "contact_sheet": str(out / "samples" / "contact_sheet.png"),
        },
        "steps": metrics[-1]["step"],
        "first_loss": metrics[0]["loss"],
        "last_loss": sum(m["loss"] for m in metrics[-20:]) / len(metrics[-20:]),
        "tokens_per_second": speeds[len(speeds) // 2],
        "stages": [asdict(stage) for stage in done],
        "score": json.loads((out / "score.json").read_text(encoding="utf-8")),
    }


def main() -> int:
    """Run all stages and print the summary; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder of the demo")
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help=f"of the training (default {CONFIG})")
    parser.add_argument("--iters", type=int, default=760, help="training steps before the resume (default 760)")
    parser.add_argument("--extra", type=int, default=25, help="training steps after the resume (default 25)")
    parser.add_argument(
        "--variety", type=float, default=0.25, help="of the shapes, see tools/make_demo_data.py (default 0.25)"
    )
    parser.add_argument("--force", action="store_true", help="delete an earlier demo in DIR")
    options = parser.parse_args()
    if options.iters < 1 or options.extra < 1:
        raise UserError(f"--iters {options.iters} --extra {options.extra}: must be positive; correct them")
    if options.out.exists() and not options.force:
        raise UserError(f"--out {options.out}: exists; give --force to delete it, or another folder")
    shutil.rmtree(options.out, ignore_errors=True)
    commands = stages(options.out, options.iters, options.extra, options.config, options.variety)
    done = [run_stage(name, command) for name, command in commands]
    result = summary(options.out, done)
    (options.out / "summary.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print("\n== summary")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("run_demo", main))
