#!/usr/bin/env python
"""Convert checkpoints, and say what they hold.

    python tools/convert_checkpoint.py export-lance runs/tiny/checkpoints/step_00000020 exported
    python tools/convert_checkpoint.py info runs/tiny

A checkpoint is named by its own folder or by the run's, which means its latest.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import Counter
from pathlib import Path

from safetensors import safe_open

from megatron_lance.checkpoint.manifest import Checkpoint, checkpoint_at
from megatron_lance.config.errors import run_command


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export-lance", help="write a checkpoint's weights in the public Hugging Face layout")
    export.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder of a checkpoint or of a run")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights; by default the checkpoint's")
    export.add_argument("--tokenizer", type=Path, metavar="DIR", help="if it no longer lies where the run had it")
    export.add_argument("--force", action="store_true", help="replace an earlier export")
    info = commands.add_parser("info", help="say what a checkpoint or an exported folder holds")
    info.add_argument("path", type=Path, metavar="PATH", help="folder of a checkpoint, a run or an export")
    return parser.parse_args()


def checkpoint_lines(checkpoint: Checkpoint) -> list[str]:
    """A checkpoint in words."""
    manifest = checkpoint.manifest
    model, parallel, training = (manifest.config[name] for name in ("model", "parallel", "training"))
    names = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context"}
    degrees = {short: parallel[f"{name}_parallel_size"] for short, name in names.items()}
    degrees["dp"] = manifest.world_size // math.prod(degrees.values())
    sizes = [f"{name} {model[name]}" for name in ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size")]
    return [
        f"checkpoint {checkpoint.folder}",
        f"  step {manifest.step}, {manifest.step * training['global_batch_size']} packs, {training['precision']}",
        f"  written by version {manifest.code_version} (format {manifest.format}) on "
        + " x ".join(f"{name} {degree}" for name, degree in degrees.items()),
        f"  model: {', '.join(sizes)}",
        f"  tokenizer sha256 {manifest.data.tokenizer_sha256}, pack index hash {manifest.data.pack_index_hash}",
        f"  broken media known: {len(manifest.broken)}",
        f"  {len(manifest.files)} files, {sum(manifest.files.values())} bytes",
    ]


def export_lines(folder: Path) -> list[str]:
    """A folder in the public layout in words."""
    tensors: Counter[str] = Counter()
    values: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (no mapping)
                part = handle.get_slice(key)
                tensors[part.get_dtype()] += 1
                values[part.get_dtype()] += math.prod(part.get_shape())
    lines = [f"  {dtype}: {tensors[dtype]} tensors, {values[dtype]} values" for dtype in sorted(tensors)]
    return [f"public layout {folder}", *lines, f"  files: {', '.join(sorted(path.name for path in folder.iterdir()))}"]


def main() -> int:
    """Run; returns the exit status."""
    arguments = parse_arguments()
    if arguments.command == "info":
        exported = any(arguments.path.glob("*.safetensors"))
        print("\n".join(export_lines(arguments.path) if exported else checkpoint_lines(checkpoint_at(arguments.path))))
        return 0
    checkpoint = checkpoint_at(arguments.checkpoint)
    warnings.filterwarnings("ignore", module="megatron")  # what megatron-core would like to have installed
    from megatron_lance.checkpoint.hf_export import export_lance  # heavy: not for `info`

    export_lance(
        checkpoint,
        arguments.out,
        dtype=arguments.dtype,
        tokenizer=arguments.tokenizer,
        force=arguments.force,
        progress=sys.stderr.isatty(),
    )
    print(f"{arguments.out}: weights after step {checkpoint.manifest.step} of {checkpoint.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("convert_checkpoint", main))
