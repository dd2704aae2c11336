"""The benchmark of attention and ceilings: what it counts and says; not how fast anything is."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lance.config.errors import UserError
from megatron_lance.ops.attention import BACKENDS
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.profiling.benchmarks import attention, ceilings
from megatron_lance.profiling.benchmarks.ceilings import layer_shapes, why_not_fp8
from tests.command import Commander


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    return parser.parse_args(given)


def test_plans_of_the_cases() -> None:
    full, causal, lance = (attention.plan_of(case, 512, "ct3") for case in attention.CASES)
    assert (full.mask_pairs, causal.mask_pairs) == (512 * 512, 512 * 513 // 2)
    assert 0.8 * 512 < lance.length <= 512 and {piece.causal for piece in lance.slices} == {True, False}


def test_a_run_counts_allowed_pairs_and_says_what_is_absent() -> None:
    options = arguments("--lengths", "128", "--cases", "causal", "lance", "--dtype", "float32", "--repeats", "2")
    options.only = ["varlen_te", "varlen_emulated", "sdpa"]
    result = attention.run(options)
    assert result["absent"] == {"varlen_te": "needs a GPU"} and result["heads"] == [16, 2, 128]
    assert [case["case"] for case in result["cases"]] == ["causal", "lance"]
    for case in result["cases"]:
        assert set(case["backends"]["varlen_emulated"]) == set(attention.PHASES)
        assert set(case["backends"]["sdpa"]) == {"forward", "backward", "both"} and not case["failed"]
        for phase, flops in (("forward", 4), ("backward", 10), ("both", 14)):
            figures = case["backends"]["sdpa"][phase]
            assert figures["p20_ms"] <= figures["p50_ms"] <= figures["p80_ms"]
            assert figures["tflops"] == pytest.approx(flops * case["pairs"] * 16 * 128 / figures["p50_ms"] / 1e9)
    assert result["ceilings"]["copy_gb_per_s"] > 0
    assert set(result["ceilings"]["tflops"]["bf16"]) == set(layer_shapes(8))
    lines = attention.table(result).split("\n")
    assert sum(line.startswith(("causal", "lance")) for line in lines) == 4
    assert {f"{name}: not measured, needs a GPU" for name in ("varlen_te", "fp8 fast", "fp8 blocks")} <= set(lines)


def test_a_run_that_is_interrupted_gives_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*inputs: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setitem(BACKENDS, "dense", replace(BACKENDS["sdpa"], attend=interrupted))
    options = arguments("--lengths", "64", "128", "--cases", "full", "--dtype", "float32", "--repeats", "1")
    options.only = ["sdpa", "dense"]
    result = attention.run(options)
    assert result["stopped"] and [set(case["backends"]) for case in result["cases"]] == [{"sdpa"}, {"sdpa"}]
    assert result["ceilings"]["copy_gb_per_s"] > 0 and "sdpa" in attention.table(result)


def test_the_long_come_first_and_what_is_compiled_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time runs out, rates of short packs and of compiled backends are what is missing."""
    seen: list[tuple[str, int]] = []

    def measured(name: str, inputs: Any, repeats: int) -> dict[str, Any]:
        seen.append((name, inputs.plan.length))
        return {}

    monkeypatch.setattr(attention, "_measure", measured)
    monkeypatch.setitem(BACKENDS, "flex", BACKENDS["sdpa"])
    lengths = ("--lengths", "256", "2048", "512")
    options = arguments(*lengths, "--cases", "lance", "full", "--dtype", "float32", "--repeats", "1")
    options.only = ["flex", "sdpa"]
    filled = {length: attention.plan_of("lance", length, "ct3").length for length in (2048, 512, 256)}
    assert filled[2048] < 2048 and filled[256] < 256  # a pack is shorter than its budget
    assert [case["length"] for case in attention.run(options)["cases"]] == [256, 256, 2048, 2048, 512, 512]
    both = [tokens for length in (2048, 512, 256) for tokens in (filled[length], length)]
    assert seen == [(name, tokens) for name in ("sdpa", "flex") for tokens in both]


def test_a_device_that_fails_for_good_loses_nothing_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    make = attention._Inputs

    def inputs(plan: AttentionPlan, *rest: Any) -> Any:
        if plan.length == 64:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return make(plan, *rest)

    monkeypatch.setattr(attention, "_Inputs", inputs)
    options = arguments("--lengths", "64", "128", "--cases", "full", "--dtype", "float32", "--repeats", "1")
    options.only = ["sdpa"]
    short, long = attention.run(options)["cases"]
    assert set(long["backends"]) == {"sdpa"} and "illegal memory access" in short["failed"]["sdpa"]


@pytest.mark.parametrize("kind", [kind for kind in ceilings.KINDS if kind != ceilings.BF16])
@pytest.mark.parametrize("name", sorted(layer_shapes(8)))
def test_scales_are_laid_out_as_torch_wants_them(kind: str, name: str) -> None:
    """By its own rules for each scaling, which it has for tensors without values too."""
    rows, inputs, outputs = layer_shapes(256)[name]
    a, b = (torch.empty(n, inputs, dtype=torch.float8_e4m3fn, device="meta") for n in (rows, outputs))
    result = ceilings.scaled_product(a, b, kind)()
    assert result.shape == (rows, outputs) and result.dtype == torch.bfloat16


def test_products_that_a_device_does_not_have_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU stands where a GPU is: it has products with a scale per tensor only."""
    monkeypatch.setattr(ceilings, "why_not_fp8", lambda device: "")
    monkeypatch.setattr(ceilings, "layer_shapes", lambda rows: {"qkv": (rows, 256, 384)})
    found = ceilings.measure_ceilings(16, 1 << 10, 1, torch.device("cpu"))
    assert set(found["tflops"]) | set(found["absent"]) == set(ceilings.KINDS) and "bf16" in found["tflops"]
    assert set(found["absent"]) >= {"fp8 blocks", "fp8 rows"} and all(found["absent"].values())


def test_a_backend_that_fails_is_named_and_the_others_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*inputs: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(BACKENDS, "dense", replace(BACKENDS["sdpa"], attend=fails))
    options = arguments("--lengths", "64", "--cases", "full", "--dtype", "float32", "--repeats", "1")
    options.only = ["dense", "sdpa"]
    (case,) = attention.run(options)["cases"]
    assert case["failed"] == {"dense": "RuntimeError: out of memory"} and set(case["backends"]) == {"sdpa"}


def test_shapes_of_a_layer() -> None:
    shapes = layer_shapes(10)
    assert shapes["qkv"] == (10, 2048, 2560) and shapes["fc1"] == (10, 2048, 22016)
    assert shapes["proj"] == (10, 2048, 2048) and shapes["fc2"] == (10, 11008, 2048)
    assert why_not_fp8(torch.device("cpu")) == "needs a GPU"


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"--lengths \[0\]"):
        attention.run(arguments("--lengths", "0"))


def test_the_command_writes_one_json_object(command: Commander, tmp_path: Path) -> None:
    sizes = "--lengths 64 --cases lance --dtype float32 --repeats 1 --only sdpa"
    done = command(f"bench attention {sizes} --json attention.json", folder=tmp_path)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "attention.json").read_text())
    assert {"command", "device", "commit", "date", "torch", "ceilings", "cases"} <= set(record)
