"""YAML files and dotted overrides in, one frozen `RunConfig` out.

Station: before everything else; no process group exists yet.  In: paths of YAML files and overrides such as
`training.train_iters=20`.  Out: `RunConfig`.

What wins, weakest first: the defaults of schema.py, the files in the order given (a file's `extends` before the file
itself), the overrides in the order given.  Sections merge key by key; a list replaces the list before it.  An
`extends` path is relative to the file that names it.  Paths among the settings (data.*, encoders.*,
training.init_from, training.run_dir) stay as written and so are relative to the working directory: an override, a
file and the resolved copy in the run folder then all mean the same place.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import RunConfig

_RULES = {
    int: "must be an integer; write it without quotes, fraction or exponent",
    float: "must be a finite number; write it like 0.5 or 1e-4",
    bool: "must be a boolean; write true or false without quotes",
    str: "must be text; put it in quotes, and write '' for empty",
}


class ConfigError(UserError):
    """A setting breaks a rule.  One line per problem: file or field, value, rule, remedy."""


def load_config(paths: Sequence[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read files and overrides into a configuration; see the module docstring for what wins.

    Args:
        paths: YAML files, later ones win.
        overrides: `dotted.field=value` with the value in YAML; list elements by number, as in
            `data.sources.0.weight=2`.  They win over all files.

    Raises:
        ConfigError: missing or broken file, `extends` cycle, duplicate or unknown key, wrong type, missing setting.
    """
    tree: Any = to_dict(RunConfig())
    for path in paths:
        for file, layer in _read_layers(Path(path), ()):
            tree = _merge(tree, _check(RunConfig, layer, str(file), "", partial=True))
    for override in overrides:
        tree = _override(tree, override)
    return _build(RunConfig, tree)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars, every field present."""
    return _plain(config)


def from_dict(values: Any, where: str) -> RunConfig:
    """The inverse of `to_dict`; settings that `values` lack take their defaults.

    Args:
        values: plain dicts, lists and scalars.
        where: they come from, for messages.

    Raises:
        ConfigError: unknown key, wrong type.
    """
    return _build(RunConfig, _check(RunConfig, values, where, "", partial=False))


def dump_yaml(config: RunConfig) -> str:
    """The configuration as YAML text, every field present; `load_config` of this text gives an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, with a key given twice as an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"duplicate key {key.value!r}; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> Any:
    """YAML text to plain values."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # characters YAML forbids; values such as the date 2026-13-01
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _read_layers(path: Path, stack: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """The mapping of a file and of all files it extends, weakest first.

    Args:
        path: the file.
        stack: resolved paths of the files that led here by `extends`.
    """
    by = f"{stack[-1]}: extends: " if stack else ""
    resolved = path.resolve()
    if resolved in stack:
        chain = " -> ".join(p.name for p in (*stack[stack.index(resolved) :], resolved))
        raise ConfigError(f"{by}{path}: files must not extend one another in a circle ({chain}); remove one link")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{by}{path}: no such configuration file; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{by}{path}: cannot be read as UTF-8 text: {error}; check the path") from error
    layer = _parse(text, str(path))
    if not isinstance(layer, dict):
        raise ConfigError(
            f"{path}: holds {_show(layer)}: must be a mapping of the sections {_names(RunConfig)}; "
            "write {} if nothing is to change"
        )
    parents = layer.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError(f"{path}: extends = {_show(parents)}: must be a file name or a list of file names")
    layers = [layer for p in parents for layer in _read_layers(path.parent / p, (*stack, resolved))]
    return [*layers, (path, layer)]


def _check(kind: Any, value: Any, where: str, name: str, partial: bool) -> Any:
    """Check a value read from YAML against a type of the schema.

    Args:
        kind: dataclass, tuple[X, ...], union of scalar types or of one and None, or scalar type.
        value: what YAML gave.
        where: file or override, for messages.
        name: dotted field, for messages; empty for the whole configuration.
        partial: a dataclass may lack fields (they come from weaker layers); else its defaults are filled in.

    Returns:
        The same as plain values of the right types.
    """
    label = f"{where}: {name or 'configuration'}"
    if dataclasses.is_dataclass(kind):
        return _check_section(kind, value, where, name, partial)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{label} = {_show(value)}: must be a list; write it like [a, b]")
        element = typing.get_args(kind)[0]
        return [_check(element, v, where, f"{name}.{i}", partial=False) for i, v in enumerate(value)]
    if isinstance(kind, types.UnionType):
        kinds = typing.get_args(kind)
        if value is None and type(None) in kinds:
            return None
        return _check(type(value) if type(value) in kinds else kinds[0], value, where, name, partial)
    if kind is float:
        value = _as_float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{label} = {_show(value)}: {_RULES[kind]}")
    return value


def _check_section(kind: Any, value: Any, where: str, name: str, partial: bool) -> dict[str, Any]:
    """Check a mapping against a dataclass; arguments and result as in `_check`."""
    label = f"{where}: {name or 'configuration'}"
    if not isinstance(value, dict):
        raise ConfigError(f"{label} = {_show(value)}: must be a mapping with keys among {_names(kind)}")
    hints, checked = typing.get_type_hints(kind), {}
    for key, v in value.items():
        _check_key(kind, key, where, name)
        checked[key] = _check(hints[key], v, where, f"{name}.{key}".lstrip("."), partial)
    if partial:
        return checked
    filled = {}
    for f in dataclasses.fields(kind):
        if f.name in checked:
            filled[f.name] = checked[f.name]
        elif f.default is not dataclasses.MISSING:
            filled[f.name] = _plain(f.default)
        elif f.default_factory is not dataclasses.MISSING:
            filled[f.name] = _plain(f.default_factory())
        else:
            raise ConfigError(f"{label} = {_show(value)}: {f.name} is missing and has no default; add it")
    return filled


def _check_key(kind: Any, key: object, where: str, name: str) -> None:
    """Refuse a key that the dataclass does not have; name near ones and all valid ones."""
    valid = [f.name for f in dataclasses.fields(kind)]
    if key in valid:
        return
    near = difflib.get_close_matches(str(key), valid, n=1)
    sections = typing.get_type_hints(RunConfig)
    elsewhere = [f"{s}.{key}" for s, k in sections.items() if key in {f.name for f in dataclasses.fields(k)}]
    guess = [f"{name}.{k}".lstrip(".") for k in near] or elsewhere
    hint = f" did you mean {' or '.join(guess)}?" if guess else ""
    raise ConfigError(f"{where}: {f'{name}.{key}'.lstrip('.')}: unknown key;{hint} valid keys: {_names(kind)}")


def _as_float(value: Any) -> Any:
    """An int, or a text such as 1e-4 that YAML does not take for a number, as a float; anything else unchanged."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _merge(old: Any, new: Any) -> Any:
    """The value of `new` over `old`; mappings merge key by key."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _merge(old[key], value) for key, value in new.items()}
    return new


def _override(tree: Any, override: str) -> Any:
    """The tree with one `dotted.field=value` applied."""
    field, equals, text = override.partition("=")
    where = f"override {override!r}"
    if not equals or not field.strip():
        raise ConfigError(f"{where}: must have the form section.field=value; add the missing part")
    value = _parse(text, where) if text.strip() else ""  # a shell takes the quotes of field='' away
    return _assign(RunConfig, tree, field.strip().split("."), 0, value, where)


def _assign(kind: Any, node: Any, path: list[str], depth: int, value: Any, where: str) -> Any:
    """`node`, of type `kind` and found at path[:depth], with `value` put at path[depth:]."""
    name = ".".join(path[:depth])
    if depth == len(path):
        return _merge(node, _check(kind, value, where, name, partial=True))
    part = path[depth]
    if dataclasses.is_dataclass(kind):
        _check_key(kind, part, where, name)
        child = typing.get_type_hints(kind)[part]
        return node | {part: _assign(child, node[part], path, depth + 1, value, where)}
    if typing.get_origin(kind) is not tuple:
        raise ConfigError(f"{where}: {name} is a single value and has no part {part!r}; write {name}=value")
    if part not in map(str, range(len(node))):
        raise ConfigError(
            f"{where}: {name}.{part}: {name} has {len(node)} elements, numbered from 0; name one of them or set the "
            f"whole list with {name}=[...]"
        )
    changed = _assign(typing.get_args(kind)[0], node[int(part)], path, depth + 1, value, where)
    return [changed if i == int(part) else v for i, v in enumerate(node)]


def _build(kind: Any, node: Any) -> Any:
    """Checked plain values as frozen dataclasses and tuples."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{key: _build(hints[key], value) for key, value in node.items()})  # type: ignore[operator]
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], v) for v in node)
    return node


def _names(kind: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(kind))


def _show(value: Any) -> str:
    """A value for a message, on one line and not long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
