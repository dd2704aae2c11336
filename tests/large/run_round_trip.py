"""Public -> distributed -> public at full size, with time and peak memory.  Not a part of `make test`.

    python tests/large/run_round_trip.py FOLDER --kind video --json FILE [--layout tp2=tensor_model:2 ...]

A released folder of Lance-3B's shape is made with random bits (bfloat16; 1021 tensors for `image`, 1411 for `video`),
imported, exported and verified by the command-line tool.  With --layout the checkpoint is loaded and saved again on as
many ranks as the layout needs, one layout after another, and exported from there.  FOLDER needs room for about 40 GB,
50 GB with layouts, and is emptied again.  A layout needs about 24 GB of memory: the model, and megatron-core's copy of
half of it while it saves.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from megatron_lance.checkpoint.hf_export import llm_config
from megatron_lance.checkpoint.hf_lance import POSITION_KEY, public_shapes
from megatron_lance.checkpoint.hf_vit import vit_shapes
from megatron_lance.checkpoint.public_files import Shape, TensorSpec, write_folder
from megatron_lance.checkpoint.view import position_table
from megatron_lance.config.schema import ModelConfig
from megatron_lance.packing.rng import stream
from megatron_lance.profiling.provenance import provenance
from tests.shared import REPOSITORY
from tests.tiny import write_tokenizer
from tests.unit.test_conversion import IDS

TOOL = str(REPOSITORY / "tools" / "convert_checkpoint.py")
RESAVE = str(REPOSITORY / "tests" / "distributed" / "run_conversion.py")
VIT = Qwen2_5_VLVisionConfig(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048)


def random_bits(key: str, shape: Shape) -> Iterator[torch.Tensor]:
    """Any bfloat16 values, NaN with payload among them, in pieces of at most 64 MiB."""
    rng = stream(0, "random release", key)
    rows = max((1 << 25) // math.prod(shape[1:]), 1)
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), *shape[1:])
        bits = np.frombuffer(rng.bytes(2 * math.prod(size)), np.int16).reshape(size)
        yield torch.from_numpy(bits.copy()).view(torch.bfloat16)


def make_release(folder: Path, kind: str) -> dict[str, TensorSpec]:
    """A released folder; returns its tensors."""
    model = replace(ModelConfig(), latent_position_frames=1 if kind == "image" else 31)
    shapes = public_shapes(model) | {POSITION_KEY: (64 * 64 * model.latent_position_frames, model.hidden_size)}
    if kind == "video":
        shapes |= {f"vit_model.{key}": shape for key, shape in vit_shapes(VIT).items()}
    specs = {key: TensorSpec(shape, torch.bfloat16) for key, shape in shapes.items()}
    write_tokenizer(folder)
    table = position_table(model, model.latent_position_frames)
    tensors = ((key, table if key == POSITION_KEY else random_bits(key, shape)) for key, shape in shapes.items())
    write_folder(folder, specs, tensors, None)
    (folder / "llm_config.json").write_text(json.dumps(llm_config(model, IDS, "bfloat16")), encoding="utf-8")
    return specs


def measure(name: str, *command: str) -> dict[str, Any]:
    """Run a command: its seconds, and the peak of its largest process.

    Raises:
        SystemExit: with its output, if it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}:\n{output}")
    seconds = time.perf_counter() - start
    result = {"step": name, "seconds": round(seconds, 1), "peak_bytes": usage.ru_maxrss * 1024}
    said = output.strip().splitlines()[-1].replace(f"{Path(command[-1]).parent}/", "")
    sys.stderr.write(f"{result} {said}\n")
    return {**result, "said": said}


def through_layout(folder: Path, layout: str) -> list[dict[str, Any]]:
    """Load and save on a layout, export from there, verify."""
    name, _, degrees = layout.partition("=")
    ranks = math.prod(int(part.split(":")[1]) for part in degrees.split(",") if part)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), RESAVE]
    saved = str(folder / "layouts" / name)
    steps = [
        measure(f"load and save on {name}", *launch, str(folder / "checkpoint"), str(folder / "layouts"), layout),
        measure(
            f"export from {name}", TOOL, "export-lance", "--tokenizer", str(folder / "in"), saved, str(folder / "out")
        ),
    ]
    shutil.rmtree(saved)
    steps.append(measure(f"verify {name}", TOOL, "verify", str(folder / "in"), str(folder / "out")))
    shutil.rmtree(folder / "out")
    return steps


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["image", "video"], required=True)
    parser.add_argument("--layout", action="append", default=[], metavar="NAME=DEGREES")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    folder: Path = args.folder
    start = time.perf_counter()
    specs = make_release(folder / "in", args.kind)
    sys.stderr.write(f"made {len(specs)} tensors in {time.perf_counter() - start:.0f} s\n")
    source, checkpoint, out = (str(folder / name) for name in ("in", "checkpoint", "out"))
    steps = [
        measure("import", TOOL, "import-lance", source, checkpoint),
        measure("export", TOOL, "export-lance", checkpoint, out),
        measure("verify", TOOL, "verify", source, out),
    ]
    shutil.rmtree(out)
    for layout in args.layout:
        steps += through_layout(folder, layout)
    for name in ("in", "checkpoint", "layouts"):
        shutil.rmtree(folder / name, ignore_errors=True)
    result = {
        "tensors": len(specs),
        "bytes": sum(spec.bytes for spec in specs.values()),
        "largest_tensor_bytes": max(spec.bytes for spec in specs.values()),
        "dtype": "bfloat16",
        "interpreter_bytes": measure("an interpreter that has imported the exporter", "-c", IMPORT)["peak_bytes"],
        "steps": steps,
    }
    args.json.write_text(json.dumps({**provenance(), **result}, indent=1) + "\n", encoding="utf-8")


IMPORT = "import megatron_lance.checkpoint.hf_export; print('imported')"

if __name__ == "__main__":
    main()
