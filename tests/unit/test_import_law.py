"""Who may import whom, and what no module of the package does: print, catch everything, import by the back door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shared import REPOSITORY

PACKAGE = REPOSITORY / "megatron_lance"
MODULES = sorted(PACKAGE.rglob("*.py"))

_BELOW_MODEL = {"config", "packing", "ops", "parallel", "data", "encoders", "objectives", "model"}
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "packing": set(),
    "ops": {"packing"},
    "data": {"config", "packing"},
    "encoders": {"config", "packing", "data"},
    "parallel": {"config", "packing"},
    "objectives": {"config", "packing"},
    "model": {"config", "packing", "ops", "parallel"},
    "checkpoint": _BELOW_MODEL,
    "sampling": _BELOW_MODEL,
    "profiling": _BELOW_MODEL | {"checkpoint"},
    "parity": _BELOW_MODEL | {"sampling"},
    "training": _BELOW_MODEL | {"checkpoint", "sampling", "profiling"},
}
# External module -> the only files that may import it, relative to the package.
CONFINED: dict[str, set[str]] = {
    "nvidia.dali": {"data/decode.py"},
    "transformer_engine": {"model/layer_specs.py", "ops/attention_te.py", "profiling/benchmarks/mape.py"},
    "megatron.training": set(),
    "tools": set(),
    "tests": set(),
}


def imported_names(tree: ast.Module, file: Path) -> Iterator[str]:
    """Every dotted name a module imports, at any depth; `from a import b` gives a.b.

    Args:
        tree: the parsed module.
        file: its path relative to the repository, to resolve relative imports.
    """
    package = file.parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def import_violations(source: str, file: Path) -> list[str]:
    """The imports of a module that break the law; `file` is relative to the repository."""
    own = file.parts[1] if len(file.parts) > 2 else ""
    allowed = ALLOWED[own] | {own} if own else set()
    found = []
    for name in imported_names(ast.parse(source), file):
        if is_within(name, "megatron_lance"):
            other = (name.split(".") + [""])[1]
            if other not in allowed:
                found.append(f"{file} imports {name}: {own or 'the root'} may import only {sorted(allowed)}")
        for module, files in CONFINED.items():
            if is_within(name, module) and "/".join(file.parts[1:]) not in files:
                found.append(f"{file} imports {name}: allowed only in {sorted(files) or 'no file'}")
    return found


def habit_violations(source: str, file: Path) -> list[str]:
    """Calls of print and handlers that catch everything."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"{file}:{node.lineno}: print; use logging")
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(c is None or (isinstance(c, ast.Name) and c.id in ("Exception", "BaseException")) for c in caught):
                found.append(f"{file}:{node.lineno}: catches everything; name the errors")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_obeys(path: Path) -> None:
    source, file = path.read_text(encoding="utf-8"), path.relative_to(REPOSITORY)
    assert import_violations(source, file) + habit_violations(source, file) == []


def test_every_folder_has_a_law() -> None:
    folders = {p.relative_to(PACKAGE).parts[0] for p in MODULES if p.parent != PACKAGE}
    assert {"config", "packing"} <= folders <= set(ALLOWED)


def test_the_law_has_no_circle() -> None:
    above: dict[str, set[str]] = {k: set(v) for k, v in ALLOWED.items()}
    while bottom := [k for k, v in above.items() if not v]:
        above = {k: v - set(bottom) for k, v in above.items() if k not in bottom}
    assert above == {}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("packing/a.py", "from megatron_lance.config import schema"),
        ("packing/a.py", "import megatron_lance.config.schema"),
        ("packing/a.py", "from megatron_lance import config"),
        ("packing/a.py", "import megatron_lance"),
        ("packing/a.py", "from ..config import schema"),
        ("packing/a.py", "from .. import config"),
        ("data/a.py", "def f():\n    from megatron_lance.training import loop"),
        ("data/a.py", "if TYPE_CHECKING:\n    from megatron_lance.model import heads"),
        ("data/a.py", "importlib.import_module('megatron_lance.model')"),
        ("data/loader.py", "def f():\n    import nvidia.dali.fn as fn"),
        ("data/loader.py", "from nvidia import dali"),
        ("model/heads.py", "import transformer_engine.pytorch as te"),
        ("training/train.py", "from megatron.training import get_args"),
        ("training/train.py", "from tools.prepack import main"),
        ("__init__.py", "from megatron_lance.config import schema"),
    ],
)
def test_a_forbidden_import_is_found(file: str, source: str) -> None:
    assert len(import_violations(source, Path("megatron_lance", file))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/decode.py", "from nvidia.dali import fn"),
        ("ops/attention_te.py", "import transformer_engine"),
        ("packing/a.py", "from .segment import Segment\nimport torch, tokenizers"),
        ("training/a.py", "from megatron_lance.checkpoint import store\nfrom megatron.core import parallel_state"),
    ],
)
def test_an_allowed_import_passes(file: str, source: str) -> None:
    assert import_violations(source, Path("megatron_lance", file)) == []


@pytest.mark.parametrize("handler", ["except:", "except Exception:", "except (OSError, BaseException) as e:"])
def test_a_broad_handler_is_found(handler: str) -> None:
    assert len(habit_violations(f"try:\n    f()\n{handler}\n    raise", Path("a.py"))) == 1
    assert len(habit_violations("print(1)", Path("a.py"))) == 1
    assert habit_violations("try:\n    f()\nexcept OSError:\n    raise", Path("a.py")) == []
