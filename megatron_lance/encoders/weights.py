"""Weights of the frozen encoders: read from local safetensors, or drawn by parameter name.

Station: decode -> [encoders] -> noising.  In: a module's factory, then a folder or a seed.  Out: the module with
every parameter set, frozen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megatron_lance.config.errors import UserError
from megatron_lance.packing.rng import stream

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

SHOWN = 8
"""Tensors that an error names before it only counts them."""

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


class EncoderError(UserError):
    """The folder or the settings of an encoder are not usable."""


def construct(factory: Callable[[], ModuleT], dtype: str) -> ModuleT:
    """Build a frozen module in eval mode, leaving the global random state as it was.

    Only parameters take `dtype`; buffers such as rotary frequencies keep the precision they were computed in.

    Args:
        factory: builds the module on the CPU; the weights it draws are to be overwritten.
        dtype: float32 | bfloat16.

    Raises:
        EncoderError: if `dtype` is unknown.
    """
    if dtype not in DTYPES:
        raise EncoderError(f"encoders.dtype '{dtype}': unknown; use one of {', '.join(DTYPES)}")
    with torch.random.fork_rng(devices=[]):
        module = factory()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    return module.requires_grad_(False).eval()


@torch.no_grad()
def draw_parameters(module: torch.nn.Module, seed: int, prefix: str) -> None:
    """Set every parameter to a function of (seed, prefix.name): the same bits on every rank and in every order.

    Matrices and kernels are normal with variance 1 / fan-in (float32, then the parameter's dtype), norm weights are
    1, biases 0.

    Args:
        module: what to fill.
        seed: the run's seed.
        prefix: the module's name, e.g. "vit_model"; keeps equal names of two modules apart.
    """
    for name, parameter in module.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "bias":
            parameter.zero_()
        elif leaf == "gamma" or parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            draws = stream(seed, "initial weight", f"{prefix}.{name}")
            values = draws.standard_normal(parameter.shape, dtype=np.float32)
            fan_in = parameter.numel() // parameter.shape[0]
            parameter.copy_(torch.from_numpy(values) * fan_in**-0.5)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder`/`name`.

    Raises:
        EncoderError: if there is no such file, or it is not JSON.
    """
    path = folder / name
    if not path.is_file():
        raise EncoderError(
            f"{path}: not found; an encoder's folder holds {name} and safetensors files: correct encoders.vit_path or "
            "encoders.vae_path"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EncoderError(f"{path}: is not JSON ({error}); copy it again") from error
    return content


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as handle:
            return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}
    except SafetensorError as error:
        raise EncoderError(f"{path}: is not a readable safetensors file ({error}); copy it again") from error


@torch.no_grad()
def load_parameters(module: torch.nn.Module, folder: Path, prefixes: Sequence[str] = ()) -> None:
    """Copy a folder's safetensors into `module`, all of them and nothing else.

    Args:
        module: its parameters are overwritten and keep their dtype.
        folder: every *.safetensors file in it is read; tensors may be split over files.
        prefixes: if names in the folder begin with one of these, only those are read, without it; the rest belongs
            to other modules.

    Raises:
        EncoderError: if the folder has no safetensors file or an unreadable one; or naming the missing, unknown,
            repeated and misshapen tensors at once.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EncoderError(f"{folder}: no *.safetensors file; give a folder with the encoder's weights")
    wanted = dict(module.named_parameters())
    found: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    for path in files:
        own = _shapes(path)
        problems += [f"{key}: in {found[key].name} and in {path.name}" for key in own if key in found]
        found |= dict.fromkeys(own, path)
        shapes |= own
    names = _strip_prefix(found, prefixes, folder)
    check_parameters(module, {name: shapes[key] for name, key in names.items()}, folder, problems)
    by_key = {key: name for name, key in names.items()}
    for path in files:
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():
                if key in by_key:
                    wanted[by_key[key]].copy_(handle.get_tensor(key))


def check_parameters(
    module: torch.nn.Module, found: Mapping[str, tuple[int, ...]], where: Path, problems: Sequence[str] = ()
) -> None:
    """Hold names and shapes of weights against a module's parameters.

    Args:
        module: to be filled.
        found: shapes by the module's names.
        where: file or folder, for errors.
        problems: found before, told with the rest.

    Raises:
        EncoderError: naming the missing, unknown and misshapen tensors and the problems at once.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    faults = [
        *problems,
        *(f"{name}: missing" for name in wanted if name not in found),
        *(f"{name}: unknown" for name in found if name not in wanted),
        *(
            f"{name}: shape {shape}, expected {wanted[name]}"
            for name, shape in found.items()
            if name in wanted and shape != wanted[name]
        ),
    ]
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        listed = "; ".join([*faults[:SHOWN], *more])
        raise EncoderError(f"{where}: weights do not fit the configuration beside them: {listed}")


def _strip_prefix(found: Mapping[str, Path], prefixes: Sequence[str], folder: Path) -> dict[str, str]:
    """Name in the module -> name in the folder, for the one prefix in use or for all names when none is."""
    used = [prefix for prefix in prefixes if any(key.startswith(prefix) for key in found)]
    if len(used) > 1:
        raise EncoderError(f"{folder}: names with {' and '.join(used)}: cannot choose; keep one copy of the encoder")
    prefix = used[0] if used else ""
    return {key.removeprefix(prefix): key for key in found if key.startswith(prefix)}
