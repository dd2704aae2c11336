"""Digests of a checkpoint's files.

Station: save -> [digests] -> publication; choice of a checkpoint -> [digests] -> load.  Sizes tell of a torn write,
digests of a disk that returns other bytes than it was given.  Ranks share the work: each hashes what it wrote, and
later an equal share of all files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_lance.checkpoint.files import write_text

DIGESTS_FILE = "digests.json"
_ALGORITHM = "sha256"
_THREADS = 4
_BLOCK = 1 << 20  # bytes
_OF_RANK = re.compile(r"__(\d+)_")


def files_in(folder: Path) -> list[str]:
    """Every file below a folder, by its path in it, ascending."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def written_by(folder: Path, rank: int) -> list[str]:
    """The files of a checkpoint that a rank wrote: tensors carry its number, the rest is the first rank's."""
    owners = {name: _OF_RANK.match(name) for name in files_in(folder)}
    return [name for name, found in owners.items() if (int(found[1]) if found else 0) == rank]


def text_digest(text: str) -> str:
    """Digest of a text file with this content."""
    return hashlib.new(_ALGORITHM, text.encode("utf-8")).hexdigest()


def _digest(path: Path, read: Callable[[int], object] = lambda size: None) -> str:
    """Digest of a file, hex; `read` hears how many bytes were read."""
    digest = hashlib.new(_ALGORITHM)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digest of each named file, hex.

    Raises:
        OSError: if one cannot be read.
    """
    listed = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing leaves the interpreter to others
        return dict(zip(listed, pool.map(lambda name: _digest(folder / name), listed), strict=True))


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Write digests.json."""
    content = {"algorithm": _ALGORITHM, "files": dict(sorted(digests.items()))}
    write_text(folder / DIGESTS_FILE, json.dumps(content, indent=1) + "\n")


def read_digests(folder: Path) -> dict[str, str]:
    """The content of digests.json: hex by file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not what `write_digests` writes.
    """
    content = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("algorithm") != _ALGORITHM or "files" not in content:
        raise ValueError(f"no list of {_ALGORITHM} digests")
    return dict(content["files"])


def damaged(
    folder: Path, share: int = 0, shares: int = 1, read: Callable[[int], object] = lambda size: None
) -> list[str]:
    """What is wrong with a checkpoint's files; one of several equal shares of them.

    Args:
        folder: of a checkpoint.
        share: which files to look at, from 0.
        shares: into how many parts the files are dealt.
        read: called with a number of bytes whenever as many have been read, by several threads.

    Returns:
        a sentence per file that cannot be read or has another digest than was written down.
    """
    try:
        expected = read_digests(folder)
    except (OSError, ValueError) as error:
        return [f"{DIGESTS_FILE} cannot be read ({error})"]

    def fault(name: str) -> str:
        try:
            same = _digest(folder / name, read) == expected[name]
        except OSError as error:
            return f"{name} cannot be read ({error})"
        return "" if same else f"{name} has another {_ALGORITHM} than when it was written"

    with ThreadPoolExecutor(_THREADS) as pool:
        return [found for found in pool.map(fault, sorted(expected)[share::shares]) if found]
