"""Feed some steps on one layout after another, as after restarts, and write down what this rank was fed.

Arguments: the folder to write to, a configuration, then per layout its overrides and its steps as FIRST:STOP.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any


def main() -> None:
    """Run."""
    import torch
    import torch.distributed as dist

    from megatron_lance.config.loader import load_config
    from megatron_lance.data.prompt import Tokenizer
    from megatron_lance.parallel import groups as parallel_groups
    from megatron_lance.training.feed import Feed

    out, config, *layouts = sys.argv[1:]
    fed: list[dict[str, Any]] = []
    for layout in layouts:
        *overrides, steps = layout.split()
        run = load_config([config], overrides)
        groups = parallel_groups.initialize(run.parallel, run.training.seed)
        with closing(Feed(run, groups, Tokenizer(run.data.tokenizer))) as feed:
            for step in range(*map(int, steps.split(":"))):
                inputs = feed.step(step)
                rows = [(row.sample.sample_id, row.epoch) for pack in feed.packs(step) for row in pack.rows]
                fed.append(
                    {
                        "step": step,
                        "packs": list(inputs.packs),
                        "rows": rows,
                        "replica": groups.dp_rank,
                        "first of replica": groups.replica.rank() == 0,
                    }
                )
        parallel_groups.leave()
    torch.save(fed, Path(out) / f"rank{dist.get_rank()}.pt")
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
