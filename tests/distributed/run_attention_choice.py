"""All ranks take the first rank's choice of an attention backend, with its timings; the others measure nothing."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from megatron_lance.ops import attention_trial


def main() -> int:
    """Run on any number of gloo ranks; prints the choice once."""
    dist.init_process_group("gloo")
    attention_trial.TRIAL_SIDE = 2
    measured: list[str] = []
    trial = attention_trial.run_trial

    def counted(*arguments: Any) -> attention_trial.Trial:
        measured.append("once")
        return trial(*arguments)

    attention_trial.run_trial = counted  # type: ignore[assignment]
    chosen = attention_trial._agreed(attention_trial.Heads(2, 1, 8), torch.float32, torch.device("cpu"))
    said: list[tuple[tuple[str, str], int]] = [(("", ""), 0)] * dist.get_world_size()
    dist.all_gather_object(said, (chosen, len(measured)))
    dist.destroy_process_group()
    assert {choice for choice, _ in said} == {chosen}, said
    assert [count for _, count in said] == [1] + [0] * (len(said) - 1), said
    if measured:
        sys.stdout.write(f"chosen {chosen[0]}{chosen[1]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
