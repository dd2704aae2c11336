"""LM head and cross-entropy over tensor-parallel ranks against megatron-core's own, whole logits and all.

Run by torchrun; every rank holds the two paths against one another and ends with an error where they differ.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_lance.config.schema import ModelConfig, ParallelConfig
from megatron_lance.model.heads import LanguageHead
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.parallel import groups as parallel_groups

ROWS, HIDDEN, IDS = 23, 32, 96


def check(used: int, chunk_rows: int, dtype: torch.dtype) -> None:
    """One comparison; of the vocabulary `used` ids are the tokenizer's."""
    tp = dist.get_world_size()
    group = parallel_state.get_tensor_model_parallel_group()
    model = ModelConfig(hidden_size=HIDDEN, vocab_size=IDS, ce_chunk_rows=chunk_rows)
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    precision = "float32" if dtype == torch.float32 else "bf16"
    head = LanguageHead(transformer_config(model, parallel, precision), model, used, group)
    generator = torch.Generator().manual_seed(used)
    weight = torch.randn(IDS, HIDDEN, generator=generator).chunk(tp)[group.rank()]
    rows = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels, gradient = torch.randint(used, (ROWS,), generator=generator), torch.rand(ROWS, generator=generator)
    with torch.no_grad():
        head.weight.copy_(weight)
    logits, _ = ColumnParallelLinear.forward(head, rows)
    unused = torch.arange(logits.shape[-1]) >= head.used_columns
    whole = logits.masked_fill(unused, float("-inf")).to(torch.float32, copy=True)
    want = vocab_parallel_cross_entropy(whole, labels)
    wanted = torch.autograd.grad(want, (rows, head.weight), gradient)
    got = head(rows, labels)
    found = torch.autograd.grad(got, (rows, head.weight), gradient)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **near)  # type: ignore[arg-type]
    assert not found[1][head.used_columns :].any()
    everywhere = [torch.empty_like(got) for _ in range(tp)]
    dist.all_gather(everywhere, got.detach())
    assert all(torch.equal(everywhere[0], other) for other in everywhere)


def main() -> None:
    """Run."""
    parallel_groups.initialize(ParallelConfig(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"])), seed=1)
    for used in (IDS, IDS - 5, IDS // 2 - 1):  # the last leaves the last shard without a used id
        for chunk_rows in (5, 100):
            for dtype in (torch.float32, torch.bfloat16):
                check(used, chunk_rows, dtype)
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
