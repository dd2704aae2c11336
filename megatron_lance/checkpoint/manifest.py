"""What a checkpoint says of itself, and which one a run goes on from.

Station: run folder and configuration -> [manifest] -> store.  A checkpoint is a folder with megatron-core's files,
their digests, and a manifest, checkpoint.json, written last: a folder without one, or whose files differ in size or
digest from what is written down, was never finished or was damaged.

    <run_dir>/checkpoints/step_00000020/checkpoint.json, digests.json, ...
    <run_dir>/checkpoints/latest                              names the newest: step_00000020
"""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_lance.checkpoint.digests import damaged, files_in, read_digests, text_digest, write_digests
from megatron_lance.checkpoint.files import write_text
from megatron_lance.config.code_version import code_version
from megatron_lance.config.errors import UserError
from megatron_lance.config.loader import to_dict
from megatron_lance.config.schema import RunConfig, TrainingConfig

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step_(\d{8,})")
FORMAT = 2
MANIFEST_FILE = "checkpoint.json"
LATEST_FILE = "latest"
DP_RESHARDABLE, FULLY_RESHARDABLE, PER_PARAMETER = "dp_reshardable", "fully_reshardable", "per_parameter"
"""Kinds of an optimizer's state; which loads where is a table in optimizer_state.py."""

# What must not change between a checkpoint and the run that goes on from it, by section; "model" is all of it.
_COMPUTED_ALIKE = ("attention_backend", "ce_chunk_rows", "transformer_impl")
_SAME_TRAINING = ("seed", "global_batch_size", "precision", "freeze")
_SAME_OPTIMIZER = ("use_distributed_optimizer",)
_SAME_BUCKETS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "overlap_grad_reduce",  # decides how parameters are grouped into buckets
)
_OF_THE_RUN = ("training.run_dir", "training.resume", "training.progress", "training.init_from")

BrokenMedia = Mapping[tuple[str, str, int, str], str]
"""Cause of each picture or clip that could not be used, by (source, file, row, element)."""


class StoreError(UserError):
    """A checkpoint that is absent, incomplete, or of another run."""


@dataclass(frozen=True)
class DataIdentity:
    """What the data position of a checkpoint refers to.

    Attributes:
        tokenizer_sha256: of tokenizer.json, hex.
        pack_index_hash: of what shaped the pack index.
    """

    tokenizer_sha256: str
    pack_index_hash: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint without its tensors.

    Attributes:
        step: steps done; the next step's packs follow from it.
        world_size: ranks that wrote it.
        config: the run's resolved configuration, as plain values.
        data: what the position refers to.
        broken: pictures and clips found broken so far, [source, file, row, element, cause] each.
        code_version: of this package, with the commit of a checkout.
        format: of the folder.
        files: size in bytes of every other file but digests.json.
        weights_only: an imported model, without the state of an optimizer.
        optimizer: kind of the optimizer's state; empty: none.
        left_out: global batches that the run leaves out, as data/position.py has them.
    """

    step: int
    world_size: int
    config: dict[str, Any]
    data: DataIdentity
    broken: list[list[Any]]
    code_version: str
    format: int
    files: dict[str, int]
    weights_only: bool = False
    optimizer: str = ""
    left_out: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        folder: Path,
        run: RunConfig,
        step: int,
        world_size: int,
        data: DataIdentity,
        broken: BrokenMedia,
        weights_only: bool = False,
        optimizer: str = "",
        left_out: Sequence[tuple[int, int]] = (),
    ) -> Manifest:
        """The manifest of a folder whose other files are complete."""
        files = {name: (folder / name).stat().st_size for name in files_in(folder)}
        rows = [[*key, cause] for key, cause in sorted(broken.items())]
        config, version = to_dict(run), code_version()
        gaps = [list(gap) for gap in left_out]
        return cls(step, world_size, config, data, rows, version, FORMAT, files, weights_only, optimizer, gaps)

    def write(self, folder: Path, digests: Mapping[str, str]) -> None:
        """Write the digests and the manifest; from now on the folder is a complete checkpoint.

        Args:
            folder: of the checkpoint.
            digests: of all its other files, hex by name.
        """
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_digests(folder, {**digests, MANIFEST_FILE: text_digest(text)})
        write_text(folder / MANIFEST_FILE, text)

    @property
    def has_ema(self) -> bool:
        """Whether averaged weights are part of it."""
        return not self.weights_only and self.config["training"].get("ema_decay", 0.0) > 0.0

    @property
    def broken_media(self) -> dict[tuple[str, str, int, str], str]:
        """`broken` by its key."""
        return {(source, file, row, element): cause for source, file, row, element, cause in self.broken}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: where it lies and what it says of itself."""

    folder: Path
    manifest: Manifest


def checkpoints_folder(training: TrainingConfig) -> Path:
    """Where a run's checkpoints lie."""
    return Path(training.run_dir) / "checkpoints"


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return root / f"step_{step:08d}"


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest and hold its files against it.

    Raises:
        StoreError: if the folder is missing, has no manifest, is of another format, or a file is missing or of
            another size.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise StoreError(f"checkpoint '{folder}': no such folder; {_available(folder.parent)}")
    if not path.is_file():
        raise StoreError(
            f"checkpoint '{folder}': has no {MANIFEST_FILE}, so it was never finished or is none; "
            f"{_available(folder.parent)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise StoreError(
                f"checkpoint '{folder}': has format {values['format']}, this program reads {FORMAT}; use version "
                f"{values['code_version']}, which wrote it"
            )
        manifest = Manifest(**{**values, "data": DataIdentity(**values["data"])})
        expected = read_digests(folder)[MANIFEST_FILE]
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"checkpoint '{path}': cannot be read ({error!r}); {_available(folder.parent)}") from error
    if text_digest(text) != expected:
        raise StoreError(
            f"checkpoint '{folder}': is damaged, {MANIFEST_FILE} has another digest than when it was written; restore "
            f"the file or use another checkpoint; {_available(folder.parent)}"
        )
    for name, size in manifest.files.items():
        file = folder / name
        found = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
        if found != f"has {size} bytes":
            raise StoreError(
                f"checkpoint '{folder}': is incomplete, {name} {found}, expected {size} bytes; restore the file or "
                f"use another checkpoint; {_available(folder.parent)}"
            )
    return Checkpoint(folder, manifest)


def check_digests(checkpoint: Checkpoint, read: Callable[[int], object] = lambda size: None) -> None:
    """Hold every file of a checkpoint against its digest.

    Args:
        checkpoint: complete.
        read: called with a number of bytes whenever as many have been read, by several threads.

    Raises:
        StoreError: naming the files that differ.
    """
    if faults := damaged(checkpoint.folder, read=read):
        raise damage(checkpoint, faults)


def damage(checkpoint: Checkpoint, faults: Sequence[str]) -> StoreError:
    """The error of a checkpoint with damaged files."""
    return StoreError(
        f"checkpoint '{checkpoint.folder}': is damaged, {'; '.join(faults)}; restore the file or use another "
        f"checkpoint; {_available(checkpoint.folder.parent)}"
    )


def steps_in(root: Path) -> list[int]:
    """Steps of the folders in `root` that are named as checkpoints, ascending."""
    names = (path.name.removeprefix("step_") for path in root.glob("step_*") if (path / MANIFEST_FILE).is_file())
    return sorted(int(name) for name in names if name.isdecimal())


def latest_step(root: Path) -> int | None:
    """Step that `latest` names; None if it is missing or names none."""
    pointer = root / LATEST_FILE
    text = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return int(found[1]) if (found := _STEP_NAME.fullmatch(text)) else None


def _available(root: Path) -> str:
    steps, where = steps_in(root), root if root.name else root.absolute()
    return f"'{where}' has steps {', '.join(map(str, steps))}" if steps else f"'{where}' has no checkpoint"


def _latest(root: Path, damaged_ones: Collection[Path] = ()) -> Checkpoint | None:
    """The checkpoint that `latest` names, or else the complete one with most steps, whatever its folder is called.

    A process killed while it replaced a checkpoint may have left the only complete copy under a temporary name.
    """
    pointer = root / LATEST_FILE
    if not pointer.is_file() and not steps_in(root):
        return None
    problem = f"'{pointer}' is missing"
    if pointer.is_file():
        step = latest_step(root)
        try:
            if step is None:
                problem = f"'{pointer}' names no step"
            elif (named := step_folder(root, step)) not in damaged_ones:
                return open_checkpoint(named)
            else:
                problem = f"'{named}' is damaged"
        except StoreError as error:
            problem = str(error)
    others = (found for found in _complete(root) if found.folder not in damaged_ones)
    complete = max(others, key=lambda found: found.manifest.step, default=None)
    if complete is None:
        raise StoreError(f"{problem}; no other checkpoint in '{root}' is complete; restore one from a copy")
    logger.warning("%s; going on from '%s' instead", problem, complete.folder)
    return complete


def _complete(root: Path) -> Iterator[Checkpoint]:
    for path in sorted(root.iterdir()):
        if (path / MANIFEST_FILE).is_file():
            try:
                yield open_checkpoint(path)
            except StoreError as error:
                logger.warning("passed over: %s", error)


def names_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint or the folder of a run, and not one in the public layout."""
    return any((path / part).exists() for part in (MANIFEST_FILE, LATEST_FILE, "checkpoints"))


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or the latest of a run's folder.

    Raises:
        StoreError: if there is none or it is incomplete.
    """
    for root in (path / "checkpoints", path):
        if root.is_dir() and (latest := _latest(root)) is not None:
            return latest
    return open_checkpoint(path)


def find_checkpoint(training: TrainingConfig, damaged_ones: Collection[Path] = ()) -> Checkpoint | None:
    """The checkpoint that `training.resume` asks for; None for a fresh start.

    Args:
        training: run folder and choice.
        damaged_ones: folders that `auto` and `latest` pass over.

    Raises:
        StoreError: if it does not exist or is incomplete, or if a fresh start would mix with an earlier run's
            checkpoints.
    """
    root, resume = checkpoints_folder(training), str(training.resume)
    if resume == "":
        if steps_in(root):
            raise StoreError(
                f"training.run_dir '{training.run_dir}': holds checkpoints of an earlier run ({_available(root)}); set "
                "training.resume=auto to go on, or another training.run_dir to start afresh"
            )
        return None
    if resume in ("auto", "latest"):
        latest = _latest(root, damaged_ones) if root.is_dir() else None
        if latest is None and resume == "latest":
            raise StoreError(
                f"training.resume 'latest': '{root}' has no checkpoint; set training.resume=auto to start afresh if "
                "there is none, or correct training.run_dir"
            )
        return latest
    try:
        return open_checkpoint(step_folder(root, int(resume))) if resume.isdecimal() else checkpoint_at(Path(resume))
    except StoreError as error:
        choices = "give auto, latest, a step or a checkpoint's folder"
        own = "" if resume.isdecimal() else f"; of this run {_available(root)}"
        raise StoreError(f"training.resume '{resume}': {error}; {choices}{own}") from error


def checkpoint_before(training: TrainingConfig, step: int) -> Checkpoint | None:
    """The newest complete checkpoint of a run with fewer steps; None if there is none."""
    root = checkpoints_folder(training)
    older = [found for found in _complete(root) if found.manifest.step < step] if root.is_dir() else []
    return max(older, key=lambda found: found.manifest.step, default=None)


def check_resumable(checkpoint: Checkpoint, run: RunConfig, data: DataIdentity) -> None:
    """Refuse a checkpoint from which this run cannot go on exactly.

    Raises:
        StoreError: listing everything that differs.
    """
    if checkpoint.manifest.weights_only:
        raise StoreError(
            f"checkpoint '{checkpoint.folder}': holds weights without the state of a run; start a new run from it with "
            "training.init_from"
        )
    old, new = checkpoint.manifest.config, to_dict(run)
    model = [f.name for f in fields(run.model) if f.name not in _COMPUTED_ALIKE]
    same = [f"model.{name}" for name in model] + [f"training.{name}" for name in _SAME_TRAINING]
    same += [f"parallel.{name}" for name in _SAME_OPTIMIZER]
    remedy = "use the checkpoint's settings"
    problems = _differing(old, new, same)
    layout = _differing(old, new, [f"parallel.{name}" for name in _SAME_BUCKETS])
    if layout and checkpoint.manifest.optimizer not in (FULLY_RESHARDABLE, PER_PARAMETER):
        problems += layout
        step = checkpoint.manifest.step
        remedy += (
            f"; the optimizer's state, {DP_RESHARDABLE}, loads on other dp and cp sizes only: to change the rest, "
            f"write it again on its own layout with training.resume={step} training.train_iters={step} "
            f"training.save_format={FULLY_RESHARDABLE} optimizer.lr_warmup_iters=0 and go on from that, or start from "
            "its weights by training.init_from"
        )
    mine = checkpoint.manifest.data
    if data.tokenizer_sha256 != mine.tokenizer_sha256:
        problems.append(
            f"data.tokenizer: another tokenizer (sha256 {mine.tokenizer_sha256} -> {data.tokenizer_sha256})"
        )
    if data.pack_index_hash != mine.pack_index_hash:
        problems.append(f"data.pack_index: another pack index (hash {mine.pack_index_hash} -> {data.pack_index_hash})")
    if problems:
        listed = "; ".join(problems)
        raise StoreError(f"checkpoint '{checkpoint.folder}': this run differs from it: {listed}; {remedy}")


def changed_settings(checkpoint: Checkpoint, run: RunConfig) -> list[str]:
    """Every other setting that differs, as `name: old -> new`; the run's own value counts."""
    new = to_dict(run)
    names = [f"{section}.{name}" for section, values in new.items() for name in values]
    return _differing(checkpoint.manifest.config, new, [name for name in names if name not in _OF_THE_RUN])


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """`name: old -> new` of each setting that differs; settings younger than the checkpoint are left out."""
    found = []
    for name in names:
        section, setting = name.split(".")
        before, now = old.get(section, {}), new[section][setting]
        if setting in before and before[setting] != now:
            found.append(f"{name}: {reprlib.repr(before[setting])} -> {reprlib.repr(now)}")
    return found
