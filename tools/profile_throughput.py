"""Where the time of a step goes, on any layout.

    torchrun --nproc-per-node 4 tools/profile_throughput.py --config FILE --stage ct3 --out DIR [key=value ...]
    torchrun --nproc-per-node 4 tools/profile_throughput.py --config FILE --out DIR       # the run's own data
    python tools/profile_throughput.py compare A.json B.json

With --stage the packs are synthetic: samples of the stage's mixture, as large as data.seq_length allows, no data set.
DIR gets profile.json, profile.html and, with --trace, a chrome trace of every rank (open in https://ui.perfetto.dev).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.loader import load_config
from megatron_lance.config.logs import set_up_logging
from megatron_lance.config.validate import validate
from megatron_lance.data.synthetic import STAGES
from megatron_lance.profiling.throughput import Profile, compare, read_profile, table


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML file; later ones win")
    parser.add_argument("--stage", choices=sorted(STAGES), help="synthetic packs of this mixture; else the run's data")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    parser.add_argument("--pool", type=int, default=2, help="steps that have synthetic packs of their own (default 2)")
    parser.add_argument("--encoders", action="store_true", help="encode random pixels before synthetic steps")
    parser.add_argument("--trace", action="store_true", help="keep the chrome trace of every rank")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.global_batch_size=8")
    return parser.parse_intermixed_args(arguments)


def _profile(options: argparse.Namespace) -> Profile:
    """Measure; the same on all ranks."""
    first, world_size = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1"))
    set_up_logging(first)
    if options.steps < 1 or options.warmup < 0:
        raise UserError(
            f"--steps {options.steps}, --warmup {options.warmup}: at least one step and no negative warm-up"
        )
    if options.pool < 1:
        raise UserError(f"--pool {options.pool}: there must be packs; name the number of steps they are for")
    if options.out.is_file():
        raise UserError(f"--out {options.out}: is a file; name a folder")
    run = load_config(options.config, options.overrides)
    run = replace(run, optimizer=replace(run.optimizer, lr_warmup_iters=0))
    validate(run, world_size)
    from megatron_lance.data.prompt import Tokenizer
    from megatron_lance.parallel import groups as parallel_groups
    from megatron_lance.training.profile import Settings, measure

    tokenizer = None if options.stage else Tokenizer(run.data.tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)
    groups = parallel_groups.initialize(run.parallel, run.training.seed)
    traces = options.out if options.trace else None
    settings = Settings(options.stage, options.steps, options.warmup, options.encoders, traces, options.pool)
    with tempfile.TemporaryDirectory() as scratch:
        profile = measure(run, groups, settings, settings.traces or Path(scratch), tokenizer)
    parallel_groups.destroy()
    return profile


def main() -> int:
    """Run; returns the exit status."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["compare"]:
        if len(arguments) != 3:
            raise UserError("compare: takes two profiles; name A.json and B.json")
        print(compare(read_profile(arguments[1]), read_profile(arguments[2])))
        return 0
    options = parse_arguments(arguments)
    profile = _profile(options)
    if os.environ.get("RANK", "0") != "0":
        return 0
    from megatron_lance.profiling.provenance import provenance

    found: dict[str, Any] = {key: value for key, value in provenance().items() if key != "device"}
    command = " ".join(["tools/profile_throughput.py", *arguments])
    record = {"command": command, "device_name": provenance()["device"], **found, **profile}
    (options.out / "profile.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(profile))
    from megatron_lance.profiling.throughput_page import write_profile_page  # needs matplotlib

    write_profile_page(profile, options.out / "profile.html")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("profile_throughput", main))
