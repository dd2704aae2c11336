"""Where tests find the material that does not live in this repository: golden tensors, real media."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def shared_path(*parts: str) -> Path:
    """A path inside the shared folder, or a skip of the calling test if it is not there.

    The folder is $MEGATRON_LANCE_SHARED, by default `shared` beside the repository.
    """
    root = Path(os.environ.get("MEGATRON_LANCE_SHARED", REPOSITORY.parent / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} does not exist; set MEGATRON_LANCE_SHARED to the folder with golden/ and data/")
    return path
