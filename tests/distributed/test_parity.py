"""The parity check on real layouts: every golden case on each, and a wrong weight is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_lance.parity.golden import case_files
from tests.distributed.launch import on_ranks
from tests.shared import shared_path

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, int]] = {
    "one rank": {},
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},  # more ranks than key/value heads
    "pp2": {"pp": 2},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "tp2 cp2": {"tp": 2, "cp": 2},
}


def check_parity(folder: Path, degrees: dict[str, int], exit_code: int = 0) -> list[str]:
    """The tool's lines, one per case (and one per quantity out of tolerance)."""
    ranks = degrees.get("tp", 1) * degrees.get("pp", 1) * degrees.get("cp", 1)
    options = [word for name, degree in degrees.items() for word in (f"--{name}", str(degree))]
    output = on_ranks(ranks, "tools/check_parity.py", "--golden", str(folder), *options, exit_code=exit_code)
    return [line.strip() for line in output.splitlines() if line.strip().startswith(("ok ", "FAIL "))]


@pytest.mark.parametrize("degrees", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_goldens(degrees: dict[str, int]) -> None:
    folder = shared_path("golden")
    lines = check_parity(folder, degrees)
    for case in case_files(folder):
        (line,) = [line for line in lines if f" {case.stem}:" in line]
        assert line.startswith("ok "), line
        quantities = ("exact 10/10", "input sequence", "hidden after layer 3", "final hidden", "gradient")
        assert all(quantity in line for quantity in quantities), line
        assert ("ce " in line) or ("velocity " in line), line


@pytest.mark.parametrize("layout", ["one rank", "tp2", "pp2", "pp2 vpp2", "cp2"])
def test_golden_sampling(layout: str) -> None:
    """Every Euler step of the reference's sampler, with guidance, on any layout."""
    degrees = LAYOUTS[layout]
    ranks = degrees.get("tp", 1) * degrees.get("pp", 1) * degrees.get("cp", 1)
    options = [word for name, degree in degrees.items() for word in (f"--{name}", str(degree))]
    folder = shared_path("golden")
    output = on_ranks(ranks, "tools/check_parity.py", "--sampling", str(folder), *options)
    (line,) = [line for line in output.splitlines() if line.strip().startswith(("ok ", "FAIL "))]
    assert line.startswith("ok   sampling_case1_t2i"), line
    assert all(f"sampling {name} " in line for name in ("x", "v_cond", "v_uncond", "latent")), line


def small_folder(target: Path, case: str = "case1_t2i") -> Path:
    """A golden folder with one case, to be spoilt."""
    for name in ("config.json", "weights.safetensors", f"{case}.json", f"{case}.safetensors"):
        shutil.copyfile(shared_path("golden", name), target / name)
    return target


def test_a_wrong_weight_is_found_and_its_layer_named(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    weights = load_file(folder / "weights.safetensors")
    weights["language_model.model.layers.2.mlp_moe_gen.down_proj.weight"][0, 0] += 0.05
    save_file(weights, folder / "weights.safetensors")
    lines = check_parity(folder, {}, exit_code=1)
    failed = {line.split(":")[0].removeprefix("FAIL ") for line in lines if line.startswith("FAIL ")}
    assert {"case1_t2i", "hidden after layer 2", "hidden after layer 3", "final hidden", "velocity"} <= failed
    assert not failed & {"input sequence", "hidden after layer 0", "hidden after layer 1", "positions", "mask"}


def test_a_wrong_recording_is_found_on_every_layout_rank(tmp_path: Path) -> None:
    """One row of one recorded tensor, on a layout where another rank holds it."""
    folder = small_folder(tmp_path)
    recorded = load_file(folder / "case1_t2i.safetensors")
    recorded["out/velocity_pred_at_mse_indexes"][-1] += 0.01
    recorded["out/position_ids"][0, 0, 3] += 1
    save_file(recorded, folder / "case1_t2i.safetensors")
    lines = check_parity(folder, {"tp": 2}, exit_code=1)
    failed = {line.split(":")[0].removeprefix("FAIL ") for line in lines if line.startswith("FAIL ")}
    assert failed == {"case1_t2i", "velocity", "positions"}
