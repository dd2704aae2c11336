"""What only a GPU can show, as short suites that need nothing but this tree (docs/gpu.md).

    python tools/gpu_check.py first-light --out DIR    # does the stack work, and how fast is attention
    python tools/gpu_check.py 1 --out DIR              # correctness: tests/gpu
    python tools/gpu_check.py 2 --out DIR              # kernels: MaPE, attention, compute-sanitizer
    python tools/gpu_check.py 3 --out DIR              # steps at the width of Lance-3B, bf16 and FP8
    python tools/gpu_check.py stack                    # versions as JSON; anywhere

Every step of a suite is a process of its own with a time limit, in order of value: one that fails or hangs is reported
and does not stop the rest.  DIR/gpu-SUITE.json holds everything and is written anew after each step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tree may be there without being installed

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.loader import load_config
from megatron_lance.ops.attention import BACKENDS
from megatron_lance.ops.qk_norm_mape import why_not_fused
from megatron_lance.profiling.criteria import (
    ROOFLINE_SHARE,
    Criterion,
    attention_criteria,
    fp8_criteria,
    memory_criterion,
)
from megatron_lance.profiling.memory import memory_per_rank
from megatron_lance.profiling.provenance import provenance
from megatron_lance.profiling.roofline import roofline

REPOSITORY = Path(__file__).resolve().parent.parent
MINUTES = 8.0
RATES = "attention, copy and GEMM rates"
SEED = 1234  # of the packs of suite 3: steps and rates are of the same ones
BEFORE_BUILD = ("test_attention_gpu",)
ENGINE, CURVES = "test_transformer_engine_gpu", "FP8 loss curves"
GRACE = 15  # seconds that a step which is stopped has to write what it found
TAIL = 3000  # characters of a step's output that are kept
PACKAGES = (
    *("torch", "triton", "transformer-engine", "transformer-engine-torch", "megatron-core", "numpy", "pytest"),
    *("nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-nccl-cu13", "nvidia-dali-cuda130", "onnxscript", "transformers"),
)
OFFLOADED = "ct offloaded"
RECIPES = ("delayed", "tensorwise", "blockwise")
RECIPE = "tensorwise"
VARLEN = ("varlen_te", "varlen_torch")
WIDE = (  # one pack, no recompute: what the linears and the attention can do
    *("training.global_batch_size=1", "training.init_from=", "training.precision=bf16"),
    *("parallel.recompute_granularity=null", "parallel.overlap_grad_reduce=false"),
    *("parallel.overlap_param_gather=false", "data.max_sample_length=null", f"training.seed={SEED}"),
)
PACKS = {"ct": ("lance_3b_ct1.yaml", "ct1", 65536), "pt": ("lance_3b_pt_192p.yaml", "pt", 50000)}
MEMORY_SHARE = 0.8  # of the device, by the memory model: workspaces and fragments take the rest


@dataclass(frozen=True)
class Step:
    """One step of a suite.

    Attributes:
        name: in the report.
        command: its process; `{folder}` stands for a folder of its own.
        limit: seconds.
        result: the file it leaves in its folder, JSON or JUnit XML; empty if it leaves none.
        missing: why it cannot run here; empty if it can.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    result: str = ""
    missing: str = ""


def _python(*arguments: str) -> tuple[str, ...]:
    return sys.executable, *arguments


def _tests(name: str, limit: float, *arguments: str) -> Step:
    command = ("-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider", "--junitxml={folder}/junit.xml")
    return Step(name, _python(*command), limit, "junit.xml")


def _bench(name: str, limit: float, *arguments: str) -> Step:
    command = _python("tools/bench.py", *arguments, "--json", "{folder}/result.json")
    return Step(name, command, limit, "result.json")


def _profile(name: str, limit: float, pack: str, layers: int, length: int, *overrides: str, steps: int = 5) -> Step:
    """Steps of one synthetic pack at the width of Lance-3B."""
    config, stage, _ = PACKS[pack]
    settings = (*WIDE, f"model.num_layers={layers}", f"data.seq_length={length}", *overrides)
    command = ("tools/profile_throughput.py", "--config", f"examples/configs/{config}", "--stage", stage)
    options = ("--steps", str(steps), "--pool", "1", "--out", "{folder}")
    return Step(name, _python(*command, *options, *settings), limit, "profile.json")


def _build() -> Step:
    """The compiled ops with CUDA, where those at hand lack it."""
    there = torch.cuda.is_available() and not why_not_fused(128, torch.device("cuda"))
    command = ("env", "MEGATRON_LANCE_CUDA=1", *_python("setup.py", "--quiet", "build_ext", "--inplace"))
    return Step("build the compiled ops", command, 240, missing="they are there" if there else "")


def _te(attention: str, recipe: str = "none") -> tuple[str, ...]:
    """Overrides for TransformerEngine's linears, in bf16 or by a recipe of FP8."""
    engine = "model.transformer_impl=transformer_engine"
    return engine, f"model.attention_backend={attention}", f"fp8.recipe={recipe}"


def first_light(attention: str) -> list[Step]:
    """Does the stack work at all, and which attention is fast."""
    table = ("--cases", "lance", "full", "--lengths", "16384", "32768", "65536", "--repeats", "5")
    tests = "tests/gpu/test_attention_gpu.py"
    return [
        Step("stack", _python("tools/gpu_check.py", "stack", "--json", "{folder}/stack.json"), 60, "stack.json"),
        _profile("TransformerEngine layer", 60, "ct", 1, 8192, *_te(attention), steps=3),
        _tests("attention backends against dense", 80, tests, "-k", "not flex"),
        _bench(RATES, 120, "attention", *table),
        *(_profile(f"FP8 layer, {recipe}", 60, "ct", 1, 8192, *_te(attention, recipe), steps=3) for recipe in RECIPES),
        _tests("flex against dense", 100, tests, "-k", "flex"),
    ]


def correctness(attention: str) -> list[Step]:
    """All of tests/gpu, a process per file and one for the loss curves; compiled ops are built before they are needed.

    Args:
        attention: does not matter here.
    """
    names = sorted(path.stem for path in (REPOSITORY / "tests" / "gpu").glob("test_*.py"))
    tests = {name: _tests(name, 150, f"tests/gpu/{name}.py") for name in names if name != ENGINE}
    engine = [
        _tests(name, limit, f"tests/gpu/{ENGINE}.py", "-k", chosen)
        for name, limit, chosen in ((ENGINE, 150, "not loss_curve"), (CURVES, 180, "loss_curve"))
    ]
    return [engine[0], *(tests.pop(name) for name in BEFORE_BUILD), engine[1], _build(), *tests.values()]


def kernels(attention: str) -> list[Step]:
    """MaPE and attention rates, and the compiled kernels under compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer") or ""
    few = (
        "tests/gpu/test_qk_norm_mape_gpu.py",
        "-q",
        "-k",
        "some_query_heads or two_regions",
        "-p",
        "no:cacheprovider",
    )
    return [
        _bench(RATES, 200, "attention", "--cases", "lance", "full", "--lengths", "16384", "32768", "65536"),
        _build(),
        _bench("QK-norm and MaPE", 100, "mape"),
        *(
            Step(
                f"compute-sanitizer {tool}",
                (sanitizer, "--tool", tool, "--error-exitcode", "9", *_python("-m", "pytest", *few)),
                90,
                missing="" if sanitizer else "compute-sanitizer is not on PATH",
            )
            for tool in ("memcheck", "racecheck")
        ),
    ]


def steps(attention: str, memory: float | None = None, recipe: str = RECIPE) -> list[Step]:
    """A CT pack of 65,536 tokens and a PT pack of 50,000, bf16 and FP8, and the rates they are held against.

    Last the CT pack again with half of its layers offloaded: what copies cost beside the layers.

    Args:
        attention: backend.
        memory: bytes of the device; None: this machine's GPU.
        recipe: of FP8.
    """
    found = []
    for pack, (_, stage, length) in PACKS.items():
        layers = fitting_layers(pack, attention, memory)
        for kind, overrides in (("bf16", _te(attention)), (f"FP8 {recipe}", _te(attention, recipe))):
            found.append(_profile(f"{pack}, {kind}, {layers} layers", 80, pack, layers, length, *overrides))
        pick = ("--cases", "lance", "--stage", stage, "--lengths", str(length), "--seed", str(SEED))
        found.append(_bench(f"{pack}, {RATES}", 60, "attention", *pick, "--only", *sorted({attention, *VARLEN})))
    layers = fitting_layers("ct", attention, memory)
    half = f"parallel.offload_layers={layers // 2}"
    name = f"{OFFLOADED}, bf16, {layers} layers"
    return [*found, _profile(name, 80, "ct", layers, PACKS["ct"][2], *_te(attention), half)]


def fitting_layers(pack: str, attention: str, memory: float | None = None) -> int:
    """Dual-expert layers at the width of Lance-3B that the memory model says fit in bf16, without recompute.

    Args:
        pack: a key of PACKS.
        attention: backend.
        memory: bytes of the device; None: this machine's GPU.
    """
    config, _, length = PACKS[pack]
    available = MEMORY_SHARE * (torch.cuda.get_device_properties(0).total_memory if memory is None else memory)
    fitting = 1
    for layers in range(1, 37):
        overrides = [*WIDE, *_te(attention), f"model.num_layers={layers}", f"data.seq_length={length}"]
        run = load_config([str(REPOSITORY / "examples" / "configs" / config)], overrides)
        if memory_per_rank(run, 1)[0].total_bytes <= available:
            fitting = layers
    return fitting


SUITES: dict[str, Callable[[str], list[Step]]] = {
    "first-light": first_light,
    "1": correctness,
    "2": kernels,
    "3": steps,
}


def stack() -> dict[str, Any]:
    """Versions, the device, and what can serve on it."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    found: dict[str, Any] = {**provenance(), "packages": versions, "cuda": torch.version.cuda, "gpu": None}
    found["tools"] = {
        name: shutil.which(name) or "" for name in ("nvcc", "g++", "nvidia-smi", "compute-sanitizer", "ncu")
    }
    found["transformer_engine"] = {recipe: _why_not_engine(recipe) or "serves" for recipe in ("none", *RECIPES)}
    if not torch.cuda.is_available():
        return found
    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    found["gpu"] = {
        "name": properties.name,
        "capability": torch.cuda.get_device_capability(device),
        "memory_gib": properties.total_memory / 2**30,
        "processors": properties.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),
    }
    heads = {name: one.why_not(device, torch.bfloat16, 128) for name, one in BACKENDS.items()}
    found["attention"] = {name: reason or "serves" for name, reason in heads.items()}
    found["mape"] = why_not_fused(128, device) or "serves"
    return found


def _why_not_engine(recipe: str) -> str:
    """Why TransformerEngine's layers cannot serve here, by a recipe of FP8; empty if they can."""
    from megatron_lance.model.layer_specs import check_transformer_engine  # loads megatron-core

    try:
        check_transformer_engine(recipe)
    except UserError as error:
        return str(error)
    return ""


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Exit status of a process; None if it had to be stopped, first by an interrupt that lets pytest report."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


def run_step(step: Step, seconds: float) -> dict[str, Any]:
    """Run a step for at most so many seconds; never raises for what the step does."""
    if step.missing:
        return {"status": "left out", "why": step.missing}
    if seconds < 5:
        return {"status": "left out", "why": "the suite's time was up"}
    with tempfile.TemporaryDirectory() as folder:
        command = [part.replace("{folder}", folder) for part in step.command]
        start, log = time.perf_counter(), Path(folder, "log")
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": path},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = _wait(process, min(step.limit, seconds))
        found: dict[str, Any] = {
            "status": "ok" if code == 0 else "too slow" if code is None else "failed",
            "code": code,
            "seconds": round(time.perf_counter() - start, 1),
            "command": shlex.join(command),
            "output": log.read_text(encoding="utf-8", errors="replace")[-TAIL:],
        }
        result = Path(folder, step.result)
        if step.result and result.is_file():
            try:
                found["result"] = _junit(result) if result.suffix == ".xml" else json.loads(result.read_text("utf-8"))
            except (ElementTree.ParseError, ValueError) as error:
                found["unreadable"] = str(error)  # it was stopped while it wrote
        return found


def _junit(file: Path) -> dict[str, Any]:
    """Counts of a test run, what failed or was skipped, with the first line of why, and what tests recorded."""
    every = ElementTree.parse(file).getroot().iter("testcase")
    cases = [case for case in every if case.get("name")]  # a test that was interrupted has none
    told: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
    for case in cases:
        for kind, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
            for node in (case.find(tag) for tag in tags):
                if node is not None:
                    told[kind][str(case.get("name"))] = (node.get("message") or "").split("\n")[0]
    recorded = {
        str(case.get("name")): {str(p.get("name")): p.get("value") for p in case.iter("property")}
        for case in cases
        if case.find("properties") is not None
    }
    return {"tests": len(cases), "passed": len(cases) - sum(map(len, told.values())), **told, "recorded": recorded}


def run_suite(name: str, suite: Sequence[Step], out: Path, minutes: float) -> dict[str, Any]:
    """Run the steps one after another; the report is on disk after each."""
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"suite": name, **provenance(), "minutes": minutes, "steps": {}}
    end = time.perf_counter() + 60 * minutes
    for step in suite:
        found = run_step(step, end - time.perf_counter())
        report["steps"][step.name] = found
        print(
            f"{found['status']:<9} {found.get('seconds', 0):>6.1f} s  {step.name}  {found.get('why', '')}", flush=True
        )
        _write(report, out)
    return report


def _write(report: dict[str, Any], out: Path) -> None:
    (out / f"gpu-{report['suite']}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _profiles(done: dict[str, Any]) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """(pack, recipe of FP8 or none, profile) of each step of suite 3 that was profiled, by its name."""
    found = {}
    for name, step in done.items():
        pack, kind, *_ = [*name.split(", "), ""]
        if pack in PACKS and "step_seconds" in step.get("result", {}):
            found[name] = pack, kind.removeprefix("FP8 ") if "FP8" in kind else "none", step["result"]
    return found


def rooflines(done: dict[str, Any]) -> dict[str, Any]:
    """Each profiled step of suite 3 against the rates measured on the same pack; without those, why not."""
    found = {}
    for name, (pack, recipe, profile) in _profiles(done).items():
        rates = done.get(f"{pack}, {RATES}", {}).get("result")
        try:
            if rates is None:
                raise ValueError(f"the step '{pack}, {RATES}' has no result")
            one = roofline(profile, rates, PACKS[pack][2], recipe)
            found[name] = {**asdict(one), "seconds": one.seconds, "share": one.share}
        except ValueError as error:
            found[name] = {"missing": str(error)}
    return found


def offload_slows(done: dict[str, Any]) -> float | None:
    """How many times as long a step takes with offload, in suite 3; None if one of the two has no result."""
    took = {
        name.split(",")[0]: step["result"]["step_seconds"]["p50"]
        for name, step in done.items()
        if ", bf16," in name and "step_seconds" in step.get("result", {})
    }
    return took[OFFLOADED] / took["ct"] if {"ct", OFFLOADED} <= took.keys() else None


def criteria(done: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What suites are judged by, as far as they have measured it: value, bound, whether it is met.

    Args:
        done: the steps, and what they left.
    """
    found: dict[str, Criterion] = {}
    for step in (step for name, step in done.items() if name.endswith(RATES)):
        found |= attention_criteria(step.get("result", {}).get("cases", []))
    profiles = _profiles(done)
    for name, one in rooflines(done).items():
        if "share" in one:
            found[f"{name}: roofline over step"] = Criterion(one["share"], ROOFLINE_SHARE)
    for name, (pack, recipe, profile) in profiles.items():
        found[f"{name}: peak memory off the model"] = memory_criterion(profile)
        halves = [half for of, kind, half in profiles.values() if (of, kind) == (pack, "none")]
        if recipe != "none" and halves:
            found |= {f"{name}: {what}": one for what, one in fp8_criteria(halves[0], profile).items()}
    return {name: one.record() for name, one in found.items()}


def main() -> int:
    """Run; returns the exit status: 1 if a step failed or was too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "stack"], help="what to run")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="for the report")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of the whole suite (default {MINUTES})")
    parser.add_argument(
        "--attention", choices=list(BACKENDS), default="varlen_te", help="of the steps (default varlen_te); no trial"
    )
    parser.add_argument("--fp8", choices=RECIPES, default=RECIPE, help=f"recipe of suite 3 (default {RECIPE})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of stack, instead of printing")
    args = parser.parse_args()
    if args.suite == "stack":
        text = json.dumps(stack(), indent=1) + "\n"
        if args.json:
            args.json.write_text(text, encoding="utf-8")
        else:
            print(text, end="")
        return 0
    if not torch.cuda.is_available():
        raise UserError(f"suite {args.suite}: needs a GPU and torch sees none here; run it on a machine with one")
    suite = steps(args.attention, recipe=args.fp8) if args.suite == "3" else SUITES[args.suite](args.attention)
    report = run_suite(args.suite, suite, args.out, args.minutes)
    if args.suite == "3":
        report["rooflines"], report["offload_slows"] = rooflines(report["steps"]), offload_slows(report["steps"])
    report["criteria"] = criteria(report["steps"])
    for name, one in report["criteria"].items():
        sign = ">=" if one["at_least"] else "<="
        value = "no value" if one["value"] is None else f"{one['value']:.3f}"
        print(f"{'met' if one['met'] else 'NOT MET':<9} {value} {sign} {one['bound']}  {name}")
    _write(report, args.out)
    return int(any(found["status"] in ("failed", "too slow") for found in report["steps"].values()))


if __name__ == "__main__":
    sys.exit(run_command("gpu_check", main))
