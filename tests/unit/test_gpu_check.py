"""The suites for machines with a GPU: that their command lines are right, and how steps are run and reported.

What they measure needs a GPU; without one they say so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from megatron_lance.config.loader import load_config
from megatron_lance.config.validate import validate
from megatron_lance.profiling.benchmarks import attention, mape
from megatron_lance.profiling.criteria import Criterion
from megatron_lance.profiling.memory import memory_per_rank
from megatron_lance.profiling.roofline import linears_tflops
from tests.command import Commander
from tests.shared import REPOSITORY
from tools import gpu_check
from tools.gpu_check import RECIPES, SUITES, Step, fitting_layers, run_suite, stack
from tools.profile_throughput import parse_arguments

H200 = 139.8 * 2**30
ALL = {name: suite("varlen_te") for name, suite in SUITES.items() if name != "3"}
ALL["3"] = gpu_check.steps("varlen_te", H200)
EACH = [pytest.param(step, id=f"{name}: {step.name}") for name, suite in ALL.items() for step in suite]


@pytest.mark.parametrize("step", EACH)
def test_every_command_is_one_its_program_takes(step: Step) -> None:
    """Files are there; benchmarks and configurations are parsed and checked as their programs do."""
    command = [part.replace("{folder}", "folder") for part in step.command]
    assert all((REPOSITORY / part).is_file() for part in command if part.startswith(("tests/", "tools/", "examples/")))
    if "tools/bench.py" in command:
        name, *rest = command[command.index("tools/bench.py") + 1 :]
        parser = argparse.ArgumentParser()
        {"attention": attention, "mape": mape}[name].add_arguments(parser)
        parser.add_argument("--json")
        parser.parse_args(rest)
    if "tools/profile_throughput.py" in command:
        options = parse_arguments(command[command.index("tools/profile_throughput.py") + 1 :])
        run = load_config(options.config, options.overrides)
        validate(run, 1)
        assert (run.model.hidden_size, run.model.ffn_hidden_size) == (2048, 11008)
        assert run.training.global_batch_size == 1 and run.parallel.recompute_granularity is None
        assert ("FP8" in step.name) == (run.fp8.recipe != "none")
        assert run.model.attention_backend == "varlen_te"


def test_suites_end_in_time_and_hold_what_they_promise() -> None:
    assert gpu_check.MINUTES <= 8
    first = [step.name for step in ALL["first-light"]]
    assert first[:4] == [
        *("stack", "TransformerEngine layer", "attention backends against dense", "attention, copy and GEMM rates")
    ]
    assert [name for name in first if name.startswith("FP8")] == [f"FP8 layer, {recipe}" for recipe in RECIPES]
    assert sum(step.limit for step in ALL["3"]) <= 60 * gpu_check.MINUTES + 60
    tested = {step.name for step in ALL["1"]}
    assert gpu_check.CURVES in tested
    assert {path.stem for path in (REPOSITORY / "tests" / "gpu").glob("test_*.py")} <= tested
    assert {step.name for step in ALL["2"]} >= {"compute-sanitizer memcheck", "compute-sanitizer racecheck"}


@pytest.mark.parametrize("pack", sorted(gpu_check.PACKS))
def test_the_layers_that_fit_are_the_memory_models(pack: str) -> None:
    config, _, length = gpu_check.PACKS[pack]

    def needs(layers: int) -> int:
        overrides = [
            *gpu_check.WIDE,
            *gpu_check._te("varlen_te"),
            f"model.num_layers={layers}",
            f"data.seq_length={length}",
        ]
        run = load_config([str(REPOSITORY / "examples" / "configs" / config)], overrides)
        return memory_per_rank(run, 1)[0].total_bytes

    layers = fitting_layers(pack, "varlen_te", H200)
    assert layers >= 8 and needs(layers) <= gpu_check.MEMORY_SHARE * H200 < needs(layers + 1)
    assert fitting_layers(pack, "varlen_te", 0) == 1


def test_a_step_that_fails_or_hangs_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def python(name: str, code: str, **settings: object) -> Step:
        return Step(name, (sys.executable, "-c", code), **{"limit": 30, **settings})  # type: ignore[arg-type]

    writes = "import json, sys; json.dump({'rate': 7}, open(sys.argv[1] + '/r.json', 'w')); print('done')"
    cut = "import sys; open(sys.argv[1] + '/r.json', 'w').write('{')"
    suite = [
        python("fails", "import os; os.kill(os.getpid(), 11)"),
        python("hangs", "import time; print('begun', flush=True); time.sleep(600)", limit=2),
        Step("writes", (sys.executable, "-c", writes, "{folder}"), 30, "r.json"),
        python("writes nothing", "pass", result="r.json"),
        Step("is cut off", (sys.executable, "-c", cut, "{folder}"), 30, "r.json"),
        Step("is cut off too", (sys.executable, "-c", cut.replace("r.json", "r.xml"), "{folder}"), 30, "r.xml"),
        Step("cannot", ("no-such-program",), 30, missing="not on PATH"),
    ]
    report = run_suite("1", suite, tmp_path / "new", 8)
    assert json.loads((tmp_path / "new" / "gpu-1.json").read_text()) == report
    steps = report["steps"]
    assert [found["status"] for found in steps.values()] == ["failed", "too slow", *["ok"] * 4, "left out"]
    assert all("result" not in steps[name] and steps[name]["unreadable"] for name in ("is cut off", "is cut off too"))
    assert steps["fails"]["code"] == -11 and steps["hangs"]["output"].startswith("begun\n")
    assert steps["writes"]["result"] == {"rate": 7} and steps["writes"]["output"] == "done\n"
    assert "result" not in steps["writes nothing"] and steps["cannot"]["why"] == "not on PATH"
    assert {"commit", "device", "date"} <= set(report)
    assert "too slow" in capsys.readouterr().out


def test_tests_that_are_stopped_are_told_as_far_as_they_came(tmp_path: Path) -> None:
    file = tmp_path / "test_slow.py"
    file.write_text(
        "import time\ndef test_a(record_property): record_property('x', 3)\ndef test_b(): time.sleep(600)\n"
    )
    step = gpu_check._tests("slow", 6, str(file))
    found = run_suite("1", [step], tmp_path, 8)["steps"]["slow"]
    assert found["status"] == "too slow" and found["seconds"] < 30
    assert found["result"]["passed"] == 1 and found["result"]["recorded"] == {"test_a": {"x": "3"}}


def measured_rates(length: int = 65536) -> dict[str, object]:
    """What the benchmark would say of a device with rates that are easy to compute with."""
    products = {"qkv": 500.0, "proj": 500.0, "fc1": 500.0, "fc2": 500.0, "square": 700.0}
    kernel = {"kernel forward": {"tflops": 500.0}, "kernel backward": {"tflops": 500.0}}
    lance = {"varlen_te": {"both": {"tflops": 400.0}, **kernel}, "flex": {"both": {"tflops": 200.0}}}
    return {
        "ceilings": {
            "tflops": {
                "bf16": products,
                "fp8 fast": {k: 2 * v for k, v in products.items()},
                "fp8 exact": {k: 1.5 * v for k, v in products.items()},
            }
        },
        "cases": [{"case": "lance", "length": length, "backends": lance}],
    }


def profiled(seconds: float) -> dict[str, object]:
    parts = {"linears und": 3e14, "linears gen": 6e14, "embedder": 0.0, "heads": 1e14}
    flops = {name: {"forward": work / 3, "backward": 2 * work / 3, "recompute": 0.0} for name, work in parts.items()}
    flops["attention"] = {"forward": 2e14, "backward": 4e14, "recompute": 0.0}
    took = {name: {"mean": 0.2 * seconds} for name in ("linears und", "linears gen")}
    sizes = {"weights": 1.0, "gradients": 2.0, "optimizer": 3.0, "activations": 10.0, "activations by formula": 9.0}
    sizes |= {"total": 16.0, "total by formula": 15.0, "reserved": 17.0}
    memory = {kind: {"max": size} for kind, size in sizes.items()}
    return {"step_seconds": {"p50": seconds}, "flops": flops, "parts": took, "memory": memory}


def test_steps_are_judged() -> None:
    """4 of 5 seconds' linears are 2.0, of 4 seconds' 1.6; peaks are 1 above the model's 15."""
    quarter = "ct, FP8 tensorwise, 7 layers"
    done = {
        "ct, bf16, 7 layers": {"result": profiled(5.0)},
        quarter: {"result": profiled(4.0)},
        "pt, FP8 tensorwise, 9 layers": {"status": "failed"},
        "ct offloaded, bf16, 7 layers": {"result": profiled(9.0)},
        f"ct, {gpu_check.RATES}": {"result": measured_rates()},
    }
    found = gpu_check.criteria(done)
    values = {name: (round(one["value"], 4), one["bound"], one["met"]) for name, one in found.items()}
    assert values == {
        "attention of 65536 tokens, varlen_te over the fastest kernel": (0.8, 0.9, False),
        "ct, bf16, 7 layers: roofline over step": (0.75, 0.85, False),
        f"{quarter}: roofline over step": (round(3.05 / 4, 4), 0.85, False),
        "ct, bf16, 7 layers: peak memory off the model": (round(1 / 15, 4), 0.1, True),
        f"{quarter}: peak memory off the model": (round(1 / 15, 4), 0.1, True),
        f"{quarter}: linears in FP8 over bf16": (1.25, 1.5, False),
        f"{quarter}: Amdahl bound over step in FP8": ((5.0 - 2.0 + 1.6) / 4.0, 0.9, True),
    }
    assert gpu_check.criteria({"stack": {"status": "ok", "result": {"gpu": None}}}) == {}
    assert gpu_check.offload_slows(done) == 9.0 / 5.0
    del done["ct, bf16, 7 layers"]
    assert gpu_check.offload_slows(done) is None
    untold = {"parts": {name: {"mean": 0.0} for name in ("linears und", "linears gen")}}
    for half, fp8 in product(({}, untold), repeat=2):
        results = {"ct, bf16, 7 layers": profiled(5.0) | half, quarter: profiled(4.0) | fp8}
        found = gpu_check.criteria({name: {"result": result} for name, result in results.items()})
        for what in ("linears in FP8 over bf16", "Amdahl bound over step in FP8"):
            assert (found[f"{quarter}: {what}"]["value"] is None) == bool(half or fp8)
            assert not (found[f"{quarter}: {what}"]["met"] and (half or fp8))
    assert not Criterion(float("nan"), 0.9).met and not Criterion(float("nan"), 0.1, at_least=False).met


@pytest.mark.parametrize("suite", ALL)
def test_every_suite_is_judged_by_its_own_steps(suite: str) -> None:
    """Whatever each of them leaves; steps of suite 3 are held against rates of their own packs."""
    left = {"profile.json": profiled(5.0), "junit.xml": {"tests": 1}, "stack.json": {"gpu": None}, "": {}}
    done = {
        step.name: {"result": measured_rates(50000 if "pt" in step.name else 65536)}
        if step.result == "result.json" and "attention" in step.command
        else {"result": left.get(step.result, {})}
        for step in ALL[suite]
    }
    found = gpu_check.criteria(done)
    assert sum("roofline" in name for name in found) == (4 if suite == "3" else 0)
    assert any("attention" in name for name in found) == (suite != "1")
    assert all("missing" not in one for one in gpu_check.rooflines(done).values())


def test_steps_and_rates_are_of_one_pack() -> None:
    """A step of one pack, and attention timed on that pack: stage, length and seed."""
    suite = {step.name: step for step in ALL["3"]}
    for pack, (_, stage, length) in gpu_check.PACKS.items():
        command = suite[f"{pack}, {gpu_check.RATES}"].command
        given = dict(pairwise(command))
        assert (given["--stage"], given["--lengths"], given["--seed"]) == (stage, str(length), "1234")
        for name, step in suite.items():
            if name.split(", ")[0] == pack and step.result == "profile.json":
                options = parse_arguments([*step.command[step.command.index("--config") :]])
                run = load_config(options.config, options.overrides)
                assert (options.stage, options.pool, run.data.seq_length) == (stage, 1, length)
                assert (run.training.seed, run.training.global_batch_size) == (1234, 1)


def test_steps_are_held_against_the_rates_of_the_same_suite() -> None:
    """1.8 s of linears at 500 TFLOP/s, 0.2 s of heads, 3.5 x 2e14 / 400e12 = 1.75 s of attention.

    In FP8 a third of the linears' work is at 1000, the rest, backward, at 750 TFLOP/s.
    """
    done = {
        "ct, bf16, 7 layers": {"result": profiled(5.0)},
        "ct, FP8 tensorwise, 7 layers": {"result": profiled(4.0)},
        "ct, FP8 blockwise, 7 layers": {"result": profiled(4.0)},
        "pt, bf16, 9 layers": {"result": profiled(4.0)},
        "pt, FP8 blockwise, 9 layers": {"status": "failed"},
        "TransformerEngine layer": {"result": profiled(4.0)},
        f"ct, {gpu_check.RATES}": {"result": measured_rates()},
        f"pt, {gpu_check.RATES}": {"result": measured_rates()},
    }
    found = gpu_check.rooflines(done)
    assert found["ct, bf16, 7 layers"]["seconds"] == pytest.approx(1.8 + 0.2 + 1.75)
    assert found["ct, bf16, 7 layers"]["share"] == pytest.approx(0.75)
    assert found["ct, FP8 tensorwise, 7 layers"]["seconds"] == pytest.approx(0.3 + 0.8 + 0.2 + 1.75)
    assert "no products of fp8 blocks, fp8 blocks, fp8 rows" in found["ct, FP8 blockwise, 7 layers"]["missing"]
    assert "no Lance pack of 50000 tokens" in found["pt, bf16, 9 layers"]["missing"]
    assert set(found) == {name for name in list(done)[:4]}
    del done[f"ct, {gpu_check.RATES}"], done[f"pt, {gpu_check.RATES}"]
    assert all("has no result" in one["missing"] for one in gpu_check.rooflines(done).values())


def test_the_rate_of_a_layer_is_that_of_its_products_one_after_another() -> None:
    """QKV, projection, gate and up, down: 5.24, 4.19, 45.1 and 22.5 million multiplications per row."""
    rates = {"qkv": 100.0, "proj": 200.0, "fc1": 400.0, "fc2": 300.0, "square": 1.0}
    time = 5.24288 / 100 + 4.194304 / 200 + 45.088768 / 400 + 22.544384 / 300
    assert linears_tflops(rates) == pytest.approx((5.24288 + 4.194304 + 45.088768 + 22.544384) / time)


def test_steps_without_time_are_left_out(tmp_path: Path) -> None:
    report = run_suite("2", [Step("late", (sys.executable, "-c", "pass"), 30)], tmp_path, 0.01)
    assert report["steps"] == {"late": {"status": "left out", "why": "the suite's time was up"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU; there is one")
def test_gpu_tests_are_skipped_with_the_reason_in_the_report(tmp_path: Path) -> None:
    step, flex = [step for step in ALL["first-light"] if "dense" in step.name]
    assert flex is ALL["first-light"][-1], "it is compiled for each plan"
    found = run_suite("first-light", [step], tmp_path, 8)["steps"][step.name]
    assert found["status"] == "ok", found["output"]
    assert found["result"]["tests"] == len(found["result"]["skipped"]) > 20 and not found["result"]["failed"]
    assert set(found["result"]["skipped"].values()) == {"needs a GPU; none is present"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU; there is one")
@pytest.mark.parametrize("suite", SUITES)
def test_without_a_gpu_a_suite_says_so(suite: str, command: Commander, tmp_path: Path) -> None:
    done = command(f"gpu_check {suite} --out {tmp_path}/report")
    assert done.code == 2 and not (tmp_path / "report").exists()
    assert f"suite {suite}: needs a GPU and torch sees none here; run it on a machine with one" in done.err


def test_failures_and_skips_of_a_test_run_are_told(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    file.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="wrong&#10;more"/></testcase>'
        '<testcase name="c"><skipped message="no GPU"/></testcase>'
        '<testcase name="d"><error message="broke"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert gpu_check._junit(file) == {
        "tests": 4,
        "passed": 1,
        "failed": {"b": "wrong", "d": "broke"},
        "skipped": {"c": "no GPU"},
        "recorded": {},
    }


def test_the_stack_is_told_anywhere() -> None:
    found = stack()
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(found["packages"]) == set(gpu_check.PACKAGES) and "nvcc" in found["tools"]
    assert (found["gpu"] is None) != torch.cuda.is_available()
    engine = found["transformer_engine"]
    assert set(engine) == {"none", *RECIPES}
    assert torch.cuda.is_available() or all("needs TransformerEngine on a GPU" in said for said in engine.values())


def test_no_media_library_is_needed() -> None:
    """GPU machines may have neither PyAV nor DALI; what the suites run imports none of them."""
    modules = "tools.gpu_check, tools.bench, tools.profile_throughput, megatron_lance.training.profile"
    modules += ", megatron_lance.profiling.benchmarks.attention, megatron_lance.profiling.benchmarks.mape"
    code = f"import sys\nfor name in ('av', 'nvidia.dali'): sys.modules[name] = None\nimport {modules}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tests_for_gpus_are_collected_without_media_libraries() -> None:
    code = "import sys, pytest\nfor name in ('av', 'nvidia.dali'): sys.modules[name] = None\n"
    code += "sys.exit(pytest.main(['tests/gpu', '--collect-only', '-q', '-p', 'no:cacheprovider']))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_tree_need_not_be_installed(tmp_path: Path) -> None:
    """Called by its path from elsewhere, by a Python that does not know the package."""
    program = str(REPOSITORY / "tools" / "gpu_check.py")
    code = f"import runpy, sys\nsys.path = [p for p in sys.path if p not in ('', {str(REPOSITORY)!r})]\n"
    code += "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n"
    code += f"sys.argv = ['gpu_check', 'stack']\nrunpy.run_path({program!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and '"packages"' in done.stdout, done.stderr


def test_make_takes_the_python_it_is_given() -> None:
    command = ["make", "--dry-run", "gpu-first-light", "gpu-2", "PYTHON=python9", "OUT=there"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for suite in ("first-light", "2"):
        assert f'python9 tools/gpu_check.py {suite} --out "there"' in done.stdout
    assert ".venv" not in done.stdout
