"""Cases of QK-norm + rotation and their truth in float64, for the CPU op, the CUDA op and its emulation."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from megatron_lance.ops.mape import inverse_frequencies
from megatron_lance.ops.qk_norm_mape import qk_norm_mape
from megatron_lance.profiling.benchmarks.mape import Inputs

EPS = 1e-6
HEAD_DIMS = tuple(range(16, 257, 8))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("q", "kv", "dqkv", "dq_weight", "dk_weight")

Results = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one call; g groups of n query heads in QKV, of which `taken` from `offset` on."""

    rows: int
    head_dim: int = 128
    dtype: torch.dtype = torch.float32
    groups: int = 2
    heads: int = 3
    taken: int = 3
    offset: int = 0
    position: int = 200_000  # largest
    device: str = "cpu"

    @property
    def sections(self) -> tuple[int, int, int]:
        """As in the released model: a quarter temporal, the rest height and width."""
        half = self.head_dim // 2
        temporal = half // 4
        height = (half - temporal) // 2
        return temporal, height, half - temporal - height


def values(case: Case, seed: int = 0) -> Inputs:
    """QKV is a strided slice of a larger projection; half the positions are extreme, and a row is nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    d, r, g = case.head_dim, case.rows, case.groups

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, case.dtype)

    positions = torch.randint(0, case.position + 1, (3, r), generator=generator, dtype=torch.int32)
    positions[:, ::2] = case.position - positions[:, ::2] % 1000
    wide = normal(r, g + 1, (case.heads + 2) * d)
    wide[: r // 8] *= 1e-3
    weights = (torch.rand(2, d, generator=generator) + 0.5).to(case.device, case.dtype)
    return Inputs(
        wide[:, 1:],
        positions.to(case.device),
        inverse_frequencies(d, 1e6, "float32").to(case.device),
        weights[0],
        weights[1],
        normal(r, g * case.taken, d),
        normal(r, 2, g, d),
    )


def fenced(tensors: Inputs) -> Inputs:
    """Copies whose last element borders on memory that nobody may touch: reading beyond one ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)

    def copy(x: torch.Tensor) -> torch.Tensor:
        size = x.numel() * x.element_size()
        room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = torch.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), dtype=torch.uint8)
        fence = ctypes.c_void_p(whole.data_ptr() + room)
        assert libc.mprotect(fence, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0, ctypes.get_errno()
        return whole[room - size : room].view(x.dtype).view(x.shape).copy_(x)

    return Inputs(*(copy(getattr(tensors, field.name)) for field in fields(tensors)))


def check_slices(ops: Any, case: Case) -> None:
    """Outputs and their gradients may be slices of wider rows of a joint buffer, of which nothing else is touched."""
    tensors, settings = values(case), (list(case.sections), case.taken, case.offset, EPS)
    given = (tensors.d_query, tensors.d_key_value)
    whole = [x.new_full((len(x) + 2, x[0].numel() + 16), torch.nan) for x in given]
    slices = [w[1:-1, 8:-8].unflatten(1, x.shape[1:]) for w, x in zip(whole, given, strict=True)]
    ops.qk_norm_mape_out(*tensors.inputs, *settings, *slices)
    for w, part, want in zip(whole, slices, ops.qk_norm_mape(*tensors.inputs, *settings), strict=True):
        assert torch.equal(part, want) and w.isnan().sum() == w.numel() - want.numel()
    for part, x in zip(slices, given, strict=True):
        part.copy_(x)
    backward = ops.qk_norm_mape_backward
    want = backward(*given, *tensors.inputs, *settings)
    assert all(map(torch.equal, backward(*slices, *tensors.inputs, *settings), want))


def with_gradients(case: Case, tensors: Inputs, backend: str) -> Results:
    """q, kv and the gradients of qkv and both weights, by the public op."""
    qkv, query_weight, key_weight = leaves = [
        x.detach().requires_grad_() for x in (tensors.qkv, tensors.query_weight, tensors.key_weight)
    ]
    outputs = qk_norm_mape(
        qkv,
        tensors.positions,
        tensors.inv_freq,
        query_weight,
        key_weight,
        sections=case.sections,
        eps=EPS,
        backend=backend,
        query_heads=case.taken,
        query_offset=case.offset,
    )
    gradients = torch.autograd.grad(outputs, leaves, (tensors.d_query, tensors.d_key_value))
    return [*(x.detach() for x in outputs), *gradients]


def truth(case: Case, tensors: Inputs) -> Results:
    """The same in float64, channels j and j + d/2 as one complex number; only the angle is a float32 product."""
    d = case.head_dim
    qkv, query_weight, key_weight = (
        x.detach().cpu().double().requires_grad_() for x in (tensors.qkv, tensors.query_weight, tensors.key_weight)
    )
    axis = torch.tensor([a for a, count in enumerate(case.sections) for _ in range(count)])
    angle = (tensors.positions.cpu()[axis].float() * tensors.inv_freq.cpu()[:, None]).double().T  # [r, d/2]
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        z = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    heads = qkv.unflatten(2, (case.heads + 2, d))
    query = turned(heads[:, :, case.offset : case.offset + case.taken].flatten(1, 2), query_weight)
    key_value = torch.stack([turned(heads[:, :, case.heads], key_weight), heads[:, :, case.heads + 1]], dim=1)
    given = (tensors.d_query.cpu().double(), tensors.d_key_value.cpu().double())
    gradients = torch.autograd.grad((query, key_value), (qkv, query_weight, key_weight), given)
    return [query.detach(), key_value.detach(), *gradients]


def check(case: Case, run: Callable[[Case, Inputs], Results], seed: int = 0) -> None:
    """Every result of `run` errs at most twice as much as the plain-torch reference of the same precision.

    Both the error's norm and its largest element count, over as many draws as make a weight gradient's few elements a
    sample.  A hundredth of the precision is free for the norm; one unit in the last place for the largest element,
    which is a matter of chance.
    """
    precision, draws = torch.finfo(case.dtype).eps, max(1, 256 // case.head_dim)
    samples: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in NAMES}
    for draw in range(draws):
        tensors = values(case, 1000 * seed + draw)
        got, plain, want = run(case, tensors), with_gradients(case, tensors, "reference"), truth(case, tensors)
        for name, ours, theirs, exact in zip(NAMES, got, plain, want, strict=True):
            assert ours.dtype == case.dtype and ours.shape == exact.shape, name
            errors = (x.cpu().double() - exact for x in (ours, theirs))
            samples[name].append(tuple(x.flatten() for x in (*errors, exact)))
    for name, drawn in samples.items():
        error, allowed, exact = (torch.cat(x) for x in zip(*drawn, strict=True))
        if not exact.numel():
            continue
        assert error.norm() <= 2 * allowed.norm() + 0.01 * precision * exact.norm(), name
        assert error.abs().max() <= 2 * allowed.abs().max() + precision * exact.abs().max(), name
