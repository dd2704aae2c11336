#!/usr/bin/env python
"""Convert checkpoints from and to the public Hugging Face layout, compare them, and say what they hold.

    python tools/convert_checkpoint.py import-lance Lance_3B imported
    python tools/convert_checkpoint.py import-qwen Qwen2.5-VL-3B-Instruct imported
    python tools/convert_checkpoint.py export-lance runs/tiny exported --dtype bf16
    python tools/convert_checkpoint.py verify Lance_3B exported
    python tools/convert_checkpoint.py info runs/tiny

A checkpoint is named by its own folder or by the run's, which means its latest.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from megatron_lance.checkpoint.manifest import Checkpoint, checkpoint_at, names_checkpoint
from megatron_lance.checkpoint.public_files import CheckpointError, TensorFolder, parse_size
from megatron_lance.config.errors import run_command
from megatron_lance.config.logs import hide_library_warnings

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    lance = commands.add_parser("import-lance", help="make a checkpoint of a released or exported Lance folder")
    qwen = commands.add_parser("import-qwen", help="make a checkpoint of a Lance model from Qwen2.5-VL")
    for command in (lance, qwen):
        command.add_argument("folder", type=Path, metavar="DIR", help="folder in the public layout")
        command.add_argument("out", type=Path, metavar="OUT", help="checkpoint to make")
        command.add_argument("--force", action="store_true", help="replace an earlier import")
    qwen.add_argument("--seed", type=int, default=1234, help="of connectors and time embedder (default: %(default)s)")
    export = commands.add_parser("export-lance", help="write a checkpoint's weights in the public Hugging Face layout")
    export.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder of a checkpoint or of a run")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    export.add_argument("--weights", choices=["own", "ema"], default="own", help="ema: the averaged ones")
    export.add_argument("--dtype", choices=DTYPES, help="of the weights; by default the checkpoint's")
    export.add_argument(
        "--target", choices=["image", "video"], help="rows of the position table; by default the model's"
    )
    export.add_argument(
        "--vit", type=Path, metavar="DIR", help="add this ViT as vit_model.*; by default the imported one"
    )
    export.add_argument("--tokenizer", type=Path, metavar="DIR", help="if it no longer lies where the run had it")
    export.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB; by default one file")
    export.add_argument("--force", action="store_true", help="replace an earlier export")
    verify = commands.add_parser("verify", help="list every difference of two models, in either layout")
    for name in ("a", "b"):
        verify.add_argument(name, type=Path, metavar=name.upper(), help="public folder, checkpoint or run")
    info = commands.add_parser("info", help="say what a checkpoint or a public folder holds")
    info.add_argument("path", type=Path, metavar="PATH", help="folder of a checkpoint, a run or public weights")
    return parser.parse_args()


def checkpoint_lines(checkpoint: Checkpoint) -> list[str]:
    """A checkpoint in words."""
    manifest = checkpoint.manifest
    model, parallel, training = (manifest.config[name] for name in ("model", "parallel", "training"))
    names = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context"}
    degrees = {short: parallel[f"{name}_parallel_size"] for short, name in names.items()}
    degrees["dp"] = manifest.world_size // math.prod(degrees.values())
    sizes = [f"{name} {model[name]}" for name in ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size")]
    average = f"with decay {training['ema_decay']}" if manifest.has_ema else "none"
    origin = f"on {' x '.join(f'{name} {degree}' for name, degree in degrees.items())}"
    if manifest.weights_only:
        origin = f"from '{training['init_from']}', weights only"
    return [
        f"checkpoint {checkpoint.folder}",
        f"  step {manifest.step}, {manifest.step * training['global_batch_size']} packs, {training['precision']}",
        f"  written by version {manifest.code_version} (format {manifest.format}) {origin}",
        f"  model: {', '.join(sizes)}",
        f"  optimizer's state: {manifest.optimizer or 'none'}; averaged weights: {average}",
        f"  tokenizer sha256 {manifest.data.tokenizer_sha256}, pack index hash {manifest.data.pack_index_hash}",
        f"  broken media known: {len(manifest.broken)}",
        f"  {len(manifest.files)} files, {sum(manifest.files.values())} bytes",
    ]


def public_lines(folder: Path) -> list[str]:
    """A folder in the public layout in words."""
    specs = TensorFolder(folder).specs
    tensors = Counter(str(spec.dtype).removeprefix("torch.") for spec in specs.values())
    values: Counter[str] = Counter()
    for spec in specs.values():
        values[str(spec.dtype).removeprefix("torch.")] += math.prod(spec.shape)
    lines = [f"  {dtype}: {tensors[dtype]} tensors, {values[dtype]} values" for dtype in sorted(tensors)]
    parts = Counter(key.split(".")[0] for key in specs)
    return [
        f"public layout {folder}: {len(specs)} tensors",
        *lines,
        f"  parts: {', '.join(f'{part} {count}' for part, count in sorted(parts.items()))}",
        f"  files: {', '.join(sorted(path.name for path in folder.iterdir()))}",
    ]


def info(path: Path) -> int:
    """Print what a folder holds."""
    if not path.is_dir():
        raise CheckpointError(f"'{path}': no such folder; give a checkpoint, a run or public weights")
    public = any(path.glob("*.safetensors")) and not names_checkpoint(path)
    print("\n".join(public_lines(path) if public else checkpoint_lines(checkpoint_at(path))))
    return 0


def verify(a: Path, b: Path, progress: bool) -> int:
    """Print every difference of two models; the exit status tells whether there is one."""
    from megatron_lance.checkpoint.view import all_keys, differences, open_public  # heavy: not for `info`

    one, two = open_public(a, progress), open_public(b, progress)
    keys = all_keys(one, two)
    count = 0
    bar = tqdm(keys, desc="verify", unit="tensor", disable=not progress)
    for line in differences(one, two, bar):
        count += 1
        tqdm.write(line, file=sys.stdout)
    print(f"{len(keys)} tensors: {f'{count} differences' if count else 'all equal'}")
    return 1 if count else 0


def import_public(arguments: argparse.Namespace, progress: bool) -> int:
    """Make a checkpoint of public weights."""
    if arguments.command == "import-lance":
        from megatron_lance.checkpoint.hf_import import import_lance

        import_lance(arguments.folder, arguments.out, force=arguments.force, progress=progress)
    else:
        from megatron_lance.checkpoint.hf_qwen import import_qwen

        import_qwen(arguments.folder, arguments.out, seed=arguments.seed, force=arguments.force, progress=progress)
    print(f"{arguments.out}: weights of {arguments.folder}; start a run from them with training.init_from")
    return 0


def export(arguments: argparse.Namespace, progress: bool) -> int:
    """Write public weights of a checkpoint."""
    from megatron_lance.checkpoint.hf_export import export_lance
    from megatron_lance.checkpoint.view import sound_at

    size = parse_size(arguments.max_shard_size) if arguments.max_shard_size else None
    checkpoint = sound_at(arguments.checkpoint, progress)
    export_lance(
        checkpoint,
        arguments.out,
        dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
        target=arguments.target,
        vit=arguments.vit,
        tokenizer=arguments.tokenizer,
        max_shard_bytes=size,
        ema=arguments.weights == "ema",
        force=arguments.force,
        progress=progress,
    )
    print(f"{arguments.out}: weights after step {checkpoint.manifest.step} of {checkpoint.folder}")
    return 0


def main() -> int:
    """Run; returns the exit status."""
    arguments = parse_arguments()
    hide_library_warnings()
    progress = sys.stderr.isatty()
    if arguments.command == "info":
        return info(arguments.path)
    if arguments.command == "verify":
        return verify(arguments.a, arguments.b, progress)
    return export(arguments, progress) if arguments.command == "export-lance" else import_public(arguments, progress)


if __name__ == "__main__":
    sys.exit(run_command("convert_checkpoint", main))
