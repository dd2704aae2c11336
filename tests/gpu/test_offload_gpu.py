"""Offload on a GPU: the same gradients, less memory, and no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megatron_lance.checkpoint.hf_lance import RandomSource, load_weights
from megatron_lance.config.schema import DataConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_lance.model import offload
from megatron_lance.model.heads import HeadOutputs
from megatron_lance.model.lance_model import LanceModel, build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.parallel.dispatch import RankBatch, rank_batch
from megatron_lance.parallel.groups import Groups
from megatron_lance.profiling.memory import PackLoad, memory_per_rank
from tests.strategies import pack_values
from tests.unit.tiny_model import TOKENIZER_SIZE, Result, forward_backward, one_rank, pack_of, with_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; none is present"),
]
PICTURE = (Segment.text(20), Segment.visual(SegmentKind.NOISE, (1, 32, 32)), Segment.text(1))
PACK = pack_of(
    Sample("talk", Task.T2T, (Segment.text(1000),), ((2, 600),)),
    *(Sample(f"picture {i}", Task.T2I, PICTURE) for i in range(2)),
)
ALL = ("core_attn", "layernorm", "mlp")
RUN = RunConfig(
    model=with_model(
        num_layers=6,
        hidden_size=512,
        ffn_hidden_size=2048,
        num_attention_heads=8,
        kv_channels=64,
        mrope_section=(8, 12, 12),
        latent_position_size=32,
    ),
    parallel=ParallelConfig(region_alignment=8),
    data=DataConfig(seq_length=PACK.capacity),
    training=TrainingConfig(precision="bf16", global_batch_size=1),
)


@pytest.fixture
def groups() -> Iterator[Groups]:
    with one_rank() as groups:
        yield groups


def run_with(layers: int, modules: tuple[str, ...] = ()) -> RunConfig:
    again = {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
    return replace(RUN, parallel=replace(RUN.parallel, offload_layers=layers, **again))  # type: ignore[arg-type]


def model_of(run: RunConfig) -> LanceModel:
    (stage,) = build_stages(transformer_config(run.model, run.parallel, "bf16"), run.model, TOKENIZER_SIZE)
    load_weights([stage], RandomSource(3, run.model), run.model, tp_rank=0, tp=1)
    return stage


def batch_of(groups: Groups) -> RankBatch:
    sizes = {"hidden": RUN.model.hidden_size, "channels": RUN.model.latent_channels}
    values = pack_values(PACK, vocabulary=TOKENIZER_SIZE, **sizes)
    layout = Layout.build(PACK, 1, 1, RUN.parallel.region_alignment)
    batch = rank_batch(PACK, layout, *values, mape=Mape.RELEASE, mape_step=1000, cp_rank=0, tp_rank=0)
    return batch.to(groups.device, torch.bfloat16)


def apart(a: Result, b: Result) -> float:
    """Greatest distance of a gradient over its length; kernels may add in another order each time."""
    pairs = [(a.gradients[name], b.gradients[name]) for name in a.gradients]
    return max(
        float((x.float() - y.float()).norm() / y.float().norm()) for x, y in pairs if x is not None and y is not None
    )


@pytest.mark.parametrize("modules", [(), ALL])
@pytest.mark.parametrize("layers", [3, 6])
def test_gradients_are_the_same(
    layers: int, modules: tuple[str, ...], groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small storages travel too; twice, the second time with pinned memory and device memory used before."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    batch = batch_of(groups)
    plain = forward_backward(model_of(run_with(0, modules)), PACK, batch)
    model = model_of(run_with(layers, modules))
    for _ in range(2):
        assert apart(forward_backward(model, PACK, batch), plain) < 1e-2
    assert model.offload is not None and model.offload.host_bytes == 0


@pytest.mark.parametrize("modules", [(), ALL])
def test_nothing_waits_for_the_gpu(modules: tuple[str, ...], groups: Groups) -> None:
    model, batch = model_of(run_with(4, modules)), batch_of(groups)
    forward_backward(model, PACK, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(model, PACK, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def forward_and_backward(model: LanceModel, batch: RankBatch) -> None:
    """A pass that adds to the gradients that are there."""
    outputs = model(batch)
    assert isinstance(outputs, HeadOutputs)
    (outputs.ce.sum() + outputs.velocity.float().square().sum()).backward()


def peak(run: RunConfig, batch: RankBatch) -> int:
    """Bytes that a pass adds at most; gradients of parameters are there before."""
    model = model_of(run)
    forward_and_backward(model, batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_and_backward(model, batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("layers", [3, 4])
def test_memory_goes_down_by_what_the_model_says(layers: int, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    batch = batch_of(groups)
    load = PackLoad.of([batch])
    runs = [run_with(0), run_with(layers)]
    found, expected = [peak(run, batch) for run in runs], [memory_per_rank(run, 1, load)[0] for run in runs]
    assert found[0] - found[1] == pytest.approx(expected[0].activation_bytes - expected[1].activation_bytes, rel=0.15)
