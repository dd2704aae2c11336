"""A run as one HTML page: `python tools/report.py RUN_DIR [RUN_DIR ...] [--out PAGE.html]`.

Curves of losses, learning rate, gradient norms, speed, memory and tokens, samples, events and the configuration of each
run, of a finished one or of one that goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lance.config.errors import UserError, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="report", description="Write a page of one or several runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="training.run_dir of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    args = parser.parse_args(arguments)
    out = args.out or args.runs[0] / "report.html"
    if out.is_dir():
        raise UserError(f"--out '{out}': is a folder; name a file")
    from megatron_lance.training.report import page, read_run  # heavy: only once the command line stands

    text = page([read_run(run) for run in args.runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("report", main))
