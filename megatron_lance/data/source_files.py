"""Source files: which parquet files a source has.

Station: configuration -> [source files] -> row groups -> record.  In: the path of a source: a file, a folder or a glob
of any file system that fsspec knows.  Out: its files with what the file system says of them; none is opened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import fsspec

from megatron_lance.config.errors import DataError
from megatron_lance.config.schema import SourceConfig

_VERSIONS = (
    *("ETag", "etag", "md5Hash", "mtime", "LastModified"),
    *("xet_hash", "blob_id", "CRC", "Last-Modified", "last_modified", "modificationTime"),
)
"""Names that file systems give to the version of a file: hf and zip have hashes, http and webhdfs times."""


class DataSetError(DataError):
    """A data set that cannot be used: no files, an unreadable file, missing columns."""


@dataclass(frozen=True)
class SourceFile:
    """A parquet file: its name below the source's folder, where it lies, its size in bytes.

    `stamp` is what the file system says of its version: etag, hash or time of change; empty if it says nothing.
    """

    name: str
    path: str
    size: int
    stamp: str = ""


def list_files(source: SourceConfig) -> tuple[Any, tuple[SourceFile, ...]]:
    """(file system, parquet files) of a source's file, folder or glob."""
    if not source.path:
        raise DataSetError(f"data.sources {source.name}: path is empty; give a file, folder or glob")
    try:
        fs, found, folder = _find(source.path)
    except (OSError, ValueError, ImportError) as error:  # no rights, unknown protocol, protocol without its package
        raise DataSetError(
            f"data.sources {source.name}: path '{source.path}' cannot be listed ({error}); correct the path or install "
            "what its protocol needs"
        ) from error
    files = tuple(
        SourceFile(path.removeprefix(folder).lstrip("/"), path, int(info["size"]), _stamp(info))
        for path, info in sorted(found.items())
        if info["type"] == "file"
    )
    if not files:
        raise DataSetError(
            f"data.sources {source.name}: path '{source.path}' names no parquet file; give a file, folder or glob"
        )
    return fs, files


def _stamp(info: dict[str, Any]) -> str:
    return next((f"{key} {info[key]}" for key in _VERSIONS if info.get(key) is not None), "")


def _find(path: str) -> tuple[Any, dict[str, dict[str, Any]], str]:
    """(file system, what a path names with its details, the folder that names are relative to)."""
    fs, root = fsspec.core.url_to_fs(path)
    if any(c in root for c in "*?[") and not fs.exists(root):  # a name may hold them too
        found = fs.glob(root, detail=True)
        folder = root[: min(root.find(c) for c in "*?[" if c in root)].rpartition("/")[0]
    elif fs.isdir(root):
        found = {name: info for name, info in fs.find(root, detail=True).items() if name.endswith(".parquet")}
        folder = root.rstrip("/")
    else:
        found = {root: fs.info(root)} if fs.isfile(root) else {}
        folder = root.rpartition("/")[0]
    return fs, {name: _details(fs, info) for name, info in found.items()}, folder


def _details(fs: Any, info: dict[str, Any]) -> dict[str, Any]:
    """The details of a file; of what it leads to where it is a link, as in the cache of a hub.

    Raises:
        ValueError: if its size is not told, neither in the folder's list, as of http, nor when asked for.
    """
    if info.get("islink"):
        return dict(fs.info(os.path.realpath(info["name"])))
    if info["type"] != "file" or info["size"] is not None:
        return info
    asked = dict(fs.info(info["name"]))
    if asked["size"] is None:
        raise ValueError(f"the size of {info['name']} is not told")
    return asked
