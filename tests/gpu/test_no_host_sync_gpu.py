"""Forward and backward of a model on a GPU read nothing back: the host runs ahead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_lance.ops.attention import BACKENDS
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.positions import Mape
from megatron_lance.parallel.dispatch import rank_batch
from megatron_lance.parallel.groups import Groups
from tests.strategies import pack_values
from tests.unit.tiny_model import TOKENIZER_SIZE, build, forward_backward, mixed_pack, one_rank, with_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; none is present"),
]
WIDE = {
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "kv_channels": 32,
    "mrope_section": (4, 6, 6),
}


@pytest.fixture
def groups() -> Iterator[Groups]:
    with one_rank() as groups:
        yield groups


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("backend", ["varlen_te", "varlen_torch", "sdpa"])
def test_forward_and_backward_do_not_wait(backend: str, recompute: str | None, groups: Groups) -> None:
    """The first pass uploads the plan's index tensors and compiles; the second must not wait for the GPU."""
    if reason := BACKENDS[backend].why_not(groups.device, torch.bfloat16, 32):
        pytest.skip(f"{backend} {reason}")
    model, pack = with_model(**WIDE, attention_backend=backend), mixed_pack()
    values = pack_values(pack, vocabulary=TOKENIZER_SIZE, hidden=model.hidden_size, channels=model.latent_channels)
    layout = Layout.build(pack, 1, 1, 8)
    batch = rank_batch(pack, layout, *values, mape=Mape.RELEASE, mape_step=1000, cp_rank=0, tp_rank=0)
    batch = batch.to(groups.device, torch.bfloat16)
    stage = build(model, precision="bf16", recompute=recompute)
    first = forward_backward(stage, pack, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = forward_backward(stage, pack, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(second.loss, first.loss, rtol=1e-3, atol=0)
