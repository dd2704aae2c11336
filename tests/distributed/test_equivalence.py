"""tools/check_equivalence.py: a few layouts against one rank, and what it says of wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_lance.parity.equivalence import FEW, LAYOUTS
from tests.distributed.launch import on_ranks


def test_a_few_layouts_agree_with_one_rank(tmp_path: Path) -> None:
    file = tmp_path / "equivalence.json"
    output = on_ranks(8, "tools/check_equivalence.py", "--few", f"--json={file}")
    assert [line.split()[:2] for line in output.splitlines() if line.startswith("ok")] == [["ok", n] for n in FEW]
    record = json.loads(file.read_text())
    assert set(record["layouts"]) == set(FEW) and record["losses"][0] != record["losses"][1]
    for name, found in record["layouts"].items():
        sharded = LAYOUTS[name].parallel.get("use_distributed_optimizer", False)
        groups = {"und self_attn", "gen self_attn", "und mlp", "gen norms", "lm_head", "vae2llm", "time_embedder"}
        assert {"loss", "grad norm"} <= set(found) and (sharded or groups <= set(found))
        assert max(found.values()) <= 1e-5


def test_gathered_keys_on_context_parallel_ranks_agree_with_one_rank() -> None:
    """The plan of variable-length attention, computed by plain torch, where a rank has some of the queries."""
    output = on_ranks(2, "tools/check_equivalence.py", "--layout", "cp2", "--attention", "varlen_emulated")
    assert [line.split()[:2] for line in output.splitlines() if line.startswith("ok")] == [["ok", "cp2"]]
