"""All training stages in small: PT -> CT-I -> CT-II -> CT-III -> SFT, each from the last checkpoint of the one before.

    python -m tools.run_stages [--out runs/stages] [--steps 40] [--ranks 2] [--force]

Makes a small data set of coloured shapes, and for each stage plans its packs (training and held-out rows), trains its
tiny twin (examples/configs/tiny_*.yaml) on two ranks and writes a report page; the last page shows all stages.  Every
command line is printed before it runs.  Minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.loader import load_config
from tools.run_demo import REPOSITORY, Stage, run_stage

STAGES = ("pt", "ct1", "ct2", "ct3", "sft")
FOLDER = "runs/stages"
"""What the configurations name; another --out is put in its place."""


def moved(stage: str, out: Path) -> list[str]:
    """Overrides that put everything of a stage into `out`."""
    config = load_config([str(REPOSITORY / "examples" / "configs" / f"tiny_{stage}.yaml")], [])
    fields = {
        **{f"data.sources.{i}.path": source.path for i, source in enumerate(config.data.sources)},
        **{f"data.{name}": getattr(config.data, name) for name in ("pack_index", "tokenizer", "facts")},
        "validation.pack_index": config.validation.pack_index,
        "preview.prompts": config.preview.prompts,
        "training.init_from": config.training.init_from,
        "training.run_dir": config.training.run_dir,
    }
    return [f"{name}={value.replace(FOLDER, str(out), 1)}" for name, value in fields.items() if value]


def commands(out: Path, steps: int, ranks: int) -> list[tuple[str, list[str]]]:
    """(name, command line) of everything, in order."""
    python, overrides = [sys.executable], [f"training.train_iters={steps}"]
    launch = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    few = ["--pictures", "600", "--clips", "240", "--quiet"]
    found = [("data", [*python, "-m", "tools.make_demo_data", f"{out}/data", *few])]
    for stage in STAGES:
        settings = ["--config", f"examples/configs/tiny_{stage}.yaml", *overrides, *moved(stage, out)]
        prepack = [*python, "tools/prepack.py", "--quiet", *settings]
        found += [
            (f"{stage}: packs", prepack),
            (f"{stage}: packs of held-out rows", [*prepack, "--held-out"]),
            (f"{stage}: train", [*launch, "-m", "megatron_lance.training.train", *settings]),
            (f"{stage}: page", [*python, "tools/report.py", f"{out}/{stage}"]),
        ]
    pages = [f"{out}/{stage}" for stage in STAGES]
    return [*found, ("page of all stages", [*python, "tools/report.py", *pages, "--out", f"{out}/report.html"])]


def summary(out: Path, done: Sequence[Stage]) -> dict[str, object]:
    """First and last losses of every stage, the time of every command, and the time of all on a core."""
    stages = {}
    for stage in STAGES:
        lines = (out / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        ends = metrics[:5], metrics[-5:]
        first, last = (round(sum(line["loss"] for line in part) / len(part), 4) for part in ends)
        stages[stage] = {
            **{"steps": len(metrics), "loss_of_first_5": first, "loss_of_last_5": last},
            **{"tokens_seen": metrics[-1]["tokens_seen"], "skipped": sum(line["skipped"] for line in metrics)},
        }
    seconds = {each.name: each.seconds for each in done}
    peak = max(each.peak_mib for each in done)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = {"total_seconds": round(sum(seconds.values()), 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}
    return {"stages": stages, "seconds": seconds, **total, "cores": os.cpu_count(), "peak_mib": peak}


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="run_stages", description="All training stages in small.")
    parser.add_argument("--out", type=Path, default=Path(FOLDER), metavar="DIR", help=f"default {FOLDER}")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="of each stage (default 40)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes that train (default 2)")
    parser.add_argument("--force", action="store_true", help="replace what an earlier run made")
    args = parser.parse_args(arguments)
    if args.steps < 12:
        raise UserError(f"--steps {args.steps}: must be more than the 10 steps of warm-up; set 12 or more")
    if args.out.exists() and not args.force:
        raise UserError(f"--out '{args.out}': exists; give --force to replace it or name another folder")
    if args.out.exists() and not (args.out / "data" / "tokenizer").is_dir():
        raise UserError(f"--out '{args.out}': exists and was not made by this program; name another folder")
    shutil.rmtree(args.out, ignore_errors=True)
    done = [run_stage(*command) for command in commands(args.out, args.steps, args.ranks)]
    text = json.dumps(summary(args.out, done), indent=1)
    (args.out / "summary.json").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nlook at {args.out}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("run_stages", main))
