"""Recorded samplings of a shape that the shared folder does not hold: an edit, and a renorm by channel with a floor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lance.parity.golden import load_config
from megatron_lance.parity.sampling import check_sampling
from megatron_lance.sampling.flow_sampler import Request
from tests.shared import shared_path

STEPS, SHIFT, SCALE, ROWS = 4, 3.5, 4.0, 24
CAPTION = 12  # tokens of the recorded edit's


def model_of(x: torch.Tensor, length: int, t: float) -> torch.Tensor:
    """Stands for a model: a velocity that tells x, the sequence's length and the time."""
    return torch.sin(x * 3 + t) + length / 100 * torch.cos(x)


def velocity(requests: Sequence[Request], xs: Sequence[torch.Tensor], t: float) -> list[torch.Tensor]:
    return [model_of(x, len(request.token_ids), t) for request, x in zip(requests, xs, strict=True)]


def record(folder: Path, renorm: tuple[str, float]) -> Path:
    """An edit as the reference records it: x of source and target rows, velocities of the target's, both latents."""
    case = json.loads(shared_path("golden", "case4_edit.json").read_text())
    tensors = load_file(shared_path("golden", "case4_edit.safetensors"))
    source = tensors["raw_media/0/vae_video/1"].reshape(ROWS, -1)
    noise = torch.randn(2 * ROWS, source.shape[1], generator=torch.Generator().manual_seed(0))
    saved = {key: value for key, value in tensors.items() if key.startswith("raw_media/")}
    times = torch.linspace(1, 0, STEPS + 1)
    times = SHIFT * times / (1 + (SHIFT - 1) * times)
    x, length = torch.cat([source, noise[ROWS:]]), sum(case["split_lens"][:-1])
    for step in range(STEPS):
        now = float(times[step])
        conditional = model_of(x[ROWS:], length, now)
        saved[f"step{step}/x_t_all_vae_tokens"], saved[f"step{step}/v_cond"] = x.clone(), conditional
        v = conditional
        if now > 0.4:
            plain = model_of(x[ROWS:], length - CAPTION, now)
            saved[f"step{step}/v_uncond"] = plain
            v = plain + SCALE * (conditional - plain)
            dim = -1 if renorm[0] == "channel" else None
            before, after = (torch.linalg.vector_norm(part, dim=dim, keepdim=True) for part in (conditional, v))
            v = v * (before / (after + 1e-8)).clamp(renorm[1], 1.0)
        x[ROWS:] -= v * (times[step] - times[step + 1])
    saved |= {"x_T_noise_all_vae_tokens": noise, "x_0_latent/0": source.reshape(1, 4, 6, -1).clone()}
    saved["x_0_latent/1"] = x[ROWS:].reshape(1, 4, 6, -1)
    save_file({key: value.contiguous() for key, value in saved.items()}, folder / "sampling_case4_edit.safetensors")
    settings = {
        "steps": STEPS,
        "timestep_shift": SHIFT,
        "cfg_text_scale": SCALE,
        "cfg_interval": [0.4, 1.0],
        "cfg_renorm": list(renorm),
        "samples": case["samples"],
        "split_lens": case["split_lens"][:-1],
        "attn_modes": case["attn_modes"][:-1],
    }
    path = folder / "sampling_case4_edit.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("renorm", [("global", 0.0), ("channel", 0.0), ("channel", 0.97)])
def test_an_edit_is_compared_with_its_own_target(tmp_path: Path, renorm: tuple[str, float]) -> None:
    path = record(tmp_path, renorm)
    differences = check_sampling(path, load_config(shared_path("golden")), velocity)
    assert {d.quantity for d in differences} == {f"sampling {name}" for name in ("x", "v_cond", "v_uncond", "latent")}
    assert all(d.ok for d in differences), differences


def test_another_renorm_is_found(tmp_path: Path) -> None:
    path = record(tmp_path, ("channel", 0.97))
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "cfg_renorm": ["channel", 0.0]}))
    differences = check_sampling(path, load_config(shared_path("golden")), velocity)
    assert not next(d for d in differences if d.quantity == "sampling latent").ok
