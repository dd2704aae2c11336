"""The CUDA kernels where there is no GPU: they compile cleanly, and their source computes the right thing.

The second part runs the kernels' own source lane by lane on the CPU (tests/cuda_emulation); what only hardware shows is
in tests/gpu.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_lance.profiling.benchmarks import mape_registers
from megatron_lance.profiling.benchmarks.mape import Inputs
from tests.cuda_emulation.build import build
from tests.mape_cases import DTYPES, EPS, Case, Results, check, check_slices, fenced

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc; none is on PATH")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.ops.load_library(str(build(tmp_path_factory.mktemp("emulated"), mape_registers.cuda_include())))


def run(case: Case, tensors: Inputs) -> Results:
    ops = torch.ops.megatron_lance_emulated
    settings = (list(case.sections), case.taken, case.offset, EPS)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # all rows in one launch
        outputs = ops.qk_norm_mape(*tensors.inputs, *settings)
        gradients = ops.qk_norm_mape_backward(tensors.d_query, tensors.d_key_value, *tensors.inputs, *settings)
    finally:
        torch.set_num_threads(before)
    return [*outputs, *gradients]


def test_they_compile_for_every_architecture_without_warnings_and_without_spills() -> None:
    kernels = mape_registers.compile_all()
    assert {k["architecture"] for k in kernels} == {"sm_80", "sm_90", "sm_100"}
    assert len(kernels) == 3 * (8 + 8 + 3)  # forward, backward, sum of weight gradients
    assert [k for k in kernels if k["spill_bytes"] or k["stack_bytes"]] == []
    assert max(int(k["registers"]) for k in kernels) <= 128


def test_the_kernels_have_no_torch_headers_and_no_approximate_functions() -> None:
    for path in Path(mape_registers.SOURCES).glob("*.cu*"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"#include <(torch|ATen|c10)|__sinf|__cosf|__sincosf|atomicAdd|use_fast_math", text), path


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 48, 64, 72, 120, 128, 144, 192, 248, 256])
def test_emulated_error_is_at_most_twice_that_of_plain_torch(head_dim: int, dtype: torch.dtype) -> None:
    check(Case(18, head_dim, dtype), run, seed=head_dim)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 16, 35])
def test_emulated_row_counts(rows: int) -> None:
    case = Case(rows, 32, torch.bfloat16, groups=3, heads=5, taken=2, offset=2)
    check(case, lambda case, tensors: run(case, fenced(tensors)), seed=rows)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("head_dim", [24, 128])
def test_emulated_outputs_may_be_slices_of_joint_buffers(head_dim: int) -> None:
    case = Case(5, head_dim, torch.bfloat16, heads=4, taken=2, offset=1)
    check_slices(torch.ops.megatron_lance_emulated, case)
