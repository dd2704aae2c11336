"""FLOP formulas against torch's own counter, and utilisation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from megatron_lance.config.schema import EncoderConfig, ModelConfig, ParallelConfig
from megatron_lance.encoders.vae import SMALL_WAN_DIMS, WAN22_CONFIG
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.profiling.devices import find_device, peak_tflops
from megatron_lance.profiling.encoder_flops import VitSizes, _counted, encoder_flops, vae_flops, vit_flops
from megatron_lance.profiling.flops import Speed, Work, bagel_flops, flops_by_part, model_flops
from tests.unit.tiny_model import TINY, batch_of, build, forward_backward, mixed_pack, one_rank, values_of


class Counter(TorchDispatchMode):
    """Torch's FLOP formulas summed; FlopCounterMode itself also follows modules, which recompute does not allow."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(
    ("recompute", "modules"),
    [
        (None, ()),
        ("selective", ("core_attn",)),
        ("selective", ("mlp",)),
        ("selective", ("core_attn", "layernorm", "mlp")),
        ("full", ()),
    ],
)
def test_formulas_are_what_torch_counts(recompute: str | None, modules: tuple[str, ...]) -> None:
    """Forward, backward and recompute of the tiny model; attention as plain products, without a flash kernel's own."""
    pack = mixed_pack()
    _, batch = batch_of(pack, values_of(pack))
    parallel = ParallelConfig(recompute_granularity=recompute, recompute_modules=modules or ("core_attn",))
    parts = flops_by_part(TINY, Work.computed(batch), parallel)
    with one_rank(), sdpa_kernel(SDPBackend.MATH):
        model = build(recompute=recompute, modules=modules or ("core_attn",))
        with Counter() as forward, torch.no_grad():
            model(batch)
        with Counter() as both:
            forward_backward(model, pack, batch)
    assert forward.flops == sum(part.forward for part in parts.values())
    assert both.flops == sum(part.computed for part in parts.values())


def test_work_of_a_pack_counts_what_is_real() -> None:
    pack = mixed_pack()
    _, batch = batch_of(pack, values_of(pack))
    real, computed = Work.of(pack), Work.computed(batch)
    assert real.tokens == pack.length < computed.tokens
    assert (real.gen, real.ce) == (pack.gen_length, pack.ce_rows)
    assert real.pairs == batch.plan.mask_pairs < computed.pairs  # causal slices are computed whole by plain products
    assert real.timesteps == computed.timesteps == 3  # two noisy items, and the clean tokens' 0
    assert real.squares == sum(s.length**2 for s in pack.samples) > real.pairs
    twice = Work.total([real, real])
    assert asdict(twice) == {name: 2 * value for name, value in asdict(real).items()}


def test_only_what_is_recomputed_counts_again() -> None:
    work = Work(und=10, gen=20, pairs=300, ce=4, timesteps=2)
    plain = flops_by_part(TINY, work)
    full = flops_by_part(TINY, work, ParallelConfig(recompute_granularity="full"))
    for part in ("linears und", "linears gen", "attention"):
        assert plain[part].recompute == 0 and full[part].recompute == full[part].forward
    assert full["embedder"].recompute == 0
    assert full["heads"].recompute == plain["heads"].recompute == 2 * TINY.hidden_size * TINY.vocab_size * 4  # logits
    assert sum(part.model for part in full.values()) == model_flops(TINY, work)
    of_gen = ParallelConfig(
        recompute_granularity="selective", recompute_modules=("core_attn", "mlp"), recompute_experts=("gen",)
    )
    found = flops_by_part(TINY, work, of_gen)
    assert found["linears und"].recompute == 0 < found["linears gen"].recompute < plain["linears gen"].forward
    assert found["attention"].recompute == plain["attention"].forward
    frozen = flops_by_part(TINY, work, freeze=("und", "head", "embeddings"))
    assert frozen["linears und"].backward == plain["linears und"].forward
    assert frozen["heads"].backward == 2 * TINY.hidden_size * (TINY.vocab_size * 4 + 2 * TINY.latent_channels * 20)


def test_known_sizes() -> None:
    """Lance-3B: six FLOPs per weight that a token meets; the BAGEL formula lets every token meet embedding and head."""
    model = ModelConfig()
    each = model_flops(model, Work(und=1))
    assert each == 6 * 36 * (2048 * (4096 + 512) + 3 * 2048 * 11008)
    assert model_flops(model, Work(gen=1)) == each + 10 * 48 * 2048  # llm2vae; vae2llm, whose input needs no gradient
    assert bagel_flops(model, Work(und=1)) == each + 6 * 2 * 151936 * 2048
    assert bagel_flops(model, Work(squares=1)) == model_flops(model, Work(pairs=1)) == 12 * 2048 * 36


def test_speed() -> None:
    work = Work(und=1000, gen=500, pairs=10**6, ce=10, timesteps=1, squares=2 * 10**6)
    speed = Speed.of(TINY, work, seconds=2.0, devices=4, peak=1e-6)
    assert speed.tflops == pytest.approx(model_flops(TINY, work) / 8e12)
    assert speed.mfu == pytest.approx(speed.tflops / 1e-6)
    assert speed.bagel_tflops == pytest.approx(bagel_flops(TINY, work) / 8e12)
    unknown = Speed.of(TINY, work, 2.0, 4, None)
    assert (unknown.mfu, unknown.bagel_mfu) == (None, None) and unknown.tflops == speed.tflops


def test_devices() -> None:
    h200 = find_device("NVIDIA H200")
    assert h200 is not None and (h200.tflops, h200.memory_gib) == (989.4, 139.8)
    assert find_device("NVIDIA H100 80GB HBM3") == find_device("h100") != find_device("GH200") == h200
    for other in ("x86_64", "", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA RTX A1000", "NVIDIA H20"):
        assert find_device(other) is None, other
    if not torch.cuda.is_available():
        assert peak_tflops("bf16") is None


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 56, 84), (3, 168, 280)])
def test_vit_formula_is_what_torch_counts(frames: int, height: int, width: int) -> None:
    config = EncoderConfig(small_vit_hidden=16, small_vit_depth=3)
    encoder = VitEncoder.build(config, hidden_size=24, seed=1)
    pixels = torch.zeros(3, frames, height, width)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder.encode([pixels])
    grid = (-(-frames // 2), height // 28, width // 28)
    assert counter.get_total_flops() == vit_flops(VitSizes.of(encoder.vision.config), grid)


def test_vae_coefficients_go_on_exactly() -> None:
    """Counted on other frames and another size than those the coefficients are from."""
    settings = {**WAN22_CONFIG, **SMALL_WAN_DIMS}
    assert vae_flops((4, 6, 6), settings) == pytest.approx(_counted(settings, 4, 6), rel=1e-12)


def test_encoders_of_a_pack() -> None:
    found = encoder_flops(mixed_pack())
    assert found["vit"] == vit_flops(VitSizes(), (1, 2, 2)) + vit_flops(VitSizes(), (1, 1, 2))
    assert found["vae"] == 2 * vae_flops((1, 2, 2)) + vae_flops((3, 1, 2)) > 0
