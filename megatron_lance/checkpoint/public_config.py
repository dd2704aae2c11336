"""Sizes and variants of a model in the JSON files of public folders.

Station: llm_config.json of Lance, config.json of Qwen2.5-VL -> [public_config] -> ModelConfig.  Files come from
anywhere, so every value is checked here, before anything is computed from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_lance.checkpoint.public_files import CheckpointError
from megatron_lance.config.schema import ModelConfig
from megatron_lance.packing.positions import Mape

CONFIG_FILE = "llm_config.json"


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _are_three_counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(part) is int and part >= 0 for part in value)


Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is possible, and what it must be, in words."""
COUNT: Rule = (_is_count, "a positive integer")
POSITIVE: Rule = (_is_positive, "a positive number")
_SIZES = ("num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads vocab_size").split()
_ROPE: Mapping[str, Rule] = {
    "rope_theta": POSITIVE,
    "rope_scaling.mrope_section": (_are_three_counts, "a list of three counts"),
}
VARIANTS: Mapping[str, Rule] = {
    "latent_position_size": COUNT,
    "mape": (lambda value: value in list(Mape), f"one of {', '.join(Mape)}"),
    "mape_step": COUNT,
    "qk_norm": (lambda value: isinstance(value, bool), "true or false"),
    "rope_inv_freq_dtype": (lambda value: value in ("float32", "bfloat16"), "float32 or bfloat16"),
}
"""Settings of ModelConfig that exports of this project add to llm_config.json under their own names."""


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a public folder.

    Raises:
        CheckpointError: if it is missing or not JSON.
    """
    path = folder / name
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{folder}': has no {name}; give a folder in the public layout") from error
    except (OSError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}': is not a JSON object ({error}); copy it again") from error


def text_sizes(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """The sizes that a Qwen2 or Qwen2.5-VL configuration gives.

    Args:
        config: content of the text part; rotary settings under either of the names that transformers has used.
        path: of the file, for errors.

    Raises:
        CheckpointError: naming every field that is missing, or else every one that cannot be.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"'{path}': rope_scaling = {json.dumps(rope)}: must be an object; copy it again")
    values = {name: config[name] for name in (*_SIZES, "rms_norm_eps", "rope_theta") if name in config}
    values |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    values |= {"rope_scaling.mrope_section": rope["mrope_section"]} if "mrope_section" in rope else {}
    rules = {**dict.fromkeys(_SIZES, COUNT), "rms_norm_eps": POSITIVE, **_ROPE}
    if missing := [name for name in rules if name not in values]:
        raise CheckpointError(f"'{path}': lacks {', '.join(missing)}; copy it again")
    if config.get("head_dim") is not None:
        values, rules = {**values, "head_dim": config["head_dim"]}, {**rules, "head_dim": COUNT}
    _check(values, rules, path)
    model = ModelConfig(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=values["num_attention_heads"],
        num_query_groups=values["num_key_value_heads"],
        kv_channels=values.get("head_dim", values["hidden_size"] // values["num_attention_heads"]),
        vocab_size=values["vocab_size"],
        layernorm_epsilon=values["rms_norm_eps"],
        rotary_base=float(values["rope_theta"]),
        mrope_section=tuple(values["rope_scaling.mrope_section"]),
    )
    if model.num_attention_heads % model.num_query_groups or 2 * sum(model.mrope_section) != model.kv_channels:
        raise CheckpointError(
            f"'{path}': num_attention_heads {model.num_attention_heads} must be a multiple of num_key_value_heads "
            f"{model.num_query_groups}, and the sum of mrope_section {list(model.mrope_section)} half of the head size "
            f"{model.kv_channels}; copy it again"
        )
    return model


def variants(folder: Path) -> dict[str, Any]:
    """The settings of VARIANTS and the rotary base that a public folder's llm_config.json names; none without it.

    Raises:
        CheckpointError: if the file is not JSON, or naming every value that cannot be.
    """
    if not (folder / CONFIG_FILE).is_file():
        return {}
    config = read_config(folder, CONFIG_FILE)
    rules = {**VARIANTS, "rope_theta": POSITIVE}
    named = {name: config[name] for name in rules if name in config}
    _check(named, rules, folder / CONFIG_FILE)
    base = named.pop("rope_theta", None)
    return named if base is None else {**named, "rotary_base": float(base)}


def _check(values: Mapping[str, Any], rules: Mapping[str, Rule], path: Path) -> None:
    wrong = [
        f"{name} = {json.dumps(value)}: must be {rules[name][1]}"
        for name, value in values.items()
        if not rules[name][0](value)
    ]
    if wrong:
        raise CheckpointError(f"'{path}': {'; '.join(wrong)}; copy it again")
