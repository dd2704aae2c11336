"""The mistakes that docs/mistakes.md lists, made: every command of the table ends with its message and exit code.

The table is the list of cases: its commands are run as they stand there, in a folder that holds a good data set and
run beside files that are wrong in the way their names say.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from megatron_lance.checkpoint.digests import digests_of, files_in
from megatron_lance.checkpoint.hf_export import llm_config
from megatron_lance.checkpoint.hf_import import import_lance
from megatron_lance.checkpoint.manifest import DP_RESHARDABLE, DataIdentity, Manifest
from megatron_lance.data.encoding_cache import CacheWriter
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prompt import Tokenizer
from tests.command import Commander
from tests.shared import REPOSITORY
from tests.tiny import SPECIAL, TASKS, TinyRun, jpeg, write_table, write_tokenizer, write_weights

TABLE = REPOSITORY / "docs" / "mistakes.md"


@dataclass(frozen=True)
class Mistake:
    """A row of the table."""

    title: str
    ranks: int
    command: str
    message: str
    code: int


def read_table() -> list[Mistake]:
    """All rows of the table in docs/mistakes.md."""
    rows = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[1].isdigit():
            title, ranks, command, message, code = cells
            rows.append(Mistake(title, int(ranks), command, message.replace("\\|", "|"), int(code)))
    return rows


MISTAKES = read_table()


def _write_configs(folder: Path, good: Path) -> None:
    """tiny.yaml with paths relative to the folder, and broken files."""
    sources = [{"name": name, "path": f"data/{name}.parquet", "task": task} for name, task in TASKS.items()]
    data = {"sources": sources, "tokenizer": "tokenizer", "pack_index": "index"}
    settings = {"extends": str(good), "data": data, "training": {"run_dir": "run"}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    texts = {
        "typo.yaml": "extends: tiny.yaml\noptimiser: {lr: 1e-4}\n",
        "broken.yaml": "extends: tiny.yaml\ntraining: {train_iters: 5\n",
        "twice.yaml": "training:\n  seed: 1\n  seed: 2\n",
        "circle.yaml": "extends: circle.yaml\n",
        "orphan.yaml": "extends: base.yaml\n",
        "list.yaml": "- training\n",
        "empty.yaml": "",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_data(folder: Path) -> None:
    """Data sets that are wrong in one way each, below `wrong/`."""
    wrong = folder / "wrong"
    good = (folder / "data" / "text2image.parquet").read_bytes()
    write_table(wrong / "renamed_column.parquet", {"text": ["a square"], "image_bytes": [jpeg("red")]})
    write_table(wrong / "no_rows.parquet", {"caption": [], "image_bytes": []})
    write_table(wrong / "no_pictures.parquet", {"caption": ["a", "b"], "image_bytes": [b"a text", b"and another"]})
    write_table(wrong / "paths.parquet", {"caption": ["a square"], "image_bytes": ["red.jpg"]})
    write_table(wrong / "empty_captions.parquet", {"caption": [""], "image_bytes": [jpeg("red")]})
    write_table(wrong / "text_interleave.parquet", {"interleave_array": ["a"], "element_dtype_array": ["text"]})
    (wrong / "cut_short.parquet").write_bytes(good[: len(good) // 2])
    (wrong / "empty_folder").mkdir()
    shutil.copytree(folder / "data", folder / "grown")
    shutil.copy(folder / "grown" / "text2video.parquet", folder / "grown" / "text2image.parquet")


def _write_prompts(folder: Path) -> None:
    """Prompt lists that are wrong in one way each, below `wrong/`."""
    prompts = folder / "wrong" / "prompts.jsonl"
    prompts.write_text('{"task": "t2i", "caption": "a"}\n{"task": "t2i", "text": "b"}\n', encoding="utf-8")
    (folder / "wrong" / "twice.jsonl").write_text('{"prompt": "a"}\n' * 2, encoding="utf-8")
    for name, lines in {
        "misspelt": '{"task": "t2i", "caption": "a", "szie": "64x64"}\n',
        "turns": '{"task": "i_edit", "caption": "a", "image": "twice.jsonl", "turns": "make it red"}\n',
        "no_source": '{"task": "t2i", "caption": "a", "size": "64x64"}\n{"task": "i_edit", "caption": "a"}\n',
        "prompts_good": '{"task": "t2i", "caption": "a"}\n',
    }.items():
        (folder / "wrong" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "wrong" / "no_picture.jsonl").write_text(
        '{"task": "i_edit", "instruction": "a", "image": "cut_short.parquet"}\n', encoding="utf-8"
    )


def _write_tokenizers(folder: Path) -> None:
    write_tokenizer(folder / "wrong" / "tokenizer_without_pads", special=[s for s in SPECIAL if "pad" not in s])
    (folder / "wrong" / "tokenizer_torn").mkdir()
    torn = (folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")[:1000]
    (folder / "wrong" / "tokenizer_torn" / "tokenizer.json").write_text(torn, encoding="utf-8")


def _write_indices(folder: Path) -> None:
    for name in ("index_old", "index_torn", "index_edited"):
        shutil.copytree(folder / "index", folder / "wrong" / name)
    header = json.loads((folder / "index" / "index.json").read_text(encoding="utf-8"))
    old, edited = header | {"version": 0}, header | {"counts": header["counts"] | {"samples": 7}}
    (folder / "wrong" / "index_old" / "index.json").write_text(json.dumps(old), encoding="utf-8")
    (folder / "wrong" / "index_edited" / "index.json").write_text(json.dumps(edited), encoding="utf-8")
    (folder / "wrong" / "index_torn" / "packs.arrow").write_bytes(b"ARROW1")


def _write_cache(folder: Path) -> None:
    CacheWriter(folder / "wrong" / "cache", {"vit": "of another seed"})


def _write_weights(folder: Path, run: TinyRun) -> None:
    """Weights in the public layout: good ones, and some that do not fit."""
    model, wrong = run.load().model, folder / "wrong"
    bias = "vae2llm.bias"
    write_weights(wrong / "weights_good", model, {})
    write_weights(wrong / "weights_misshapen", model, {bias: torch.zeros(3)})
    write_weights(wrong / "weights_incomplete", model, {"language_model.lm_head.weight": None})
    write_weights(wrong / "weights_infinite", model, {bias: torch.full((model.hidden_size,), float("inf"))})
    (wrong / "weights_torn").mkdir()
    (wrong / "weights_torn" / "model.safetensors").write_bytes(b"not tensors")


def _write_released(folder: Path, run: TinyRun) -> None:
    """Folders like a release: a good one and what was imported of it, and others with a wrong ViT or configuration."""
    model, wrong = run.load().model, folder / "wrong"
    config = llm_config(model, dict.fromkeys(SPECIAL, 0), "float32")
    for name, tensors, changes in (
        ("released", {}, {}),
        ("released_vit", {"vit_model.typo.weight": torch.zeros(3)}, {}),
        ("released_config", {}, {"num_hidden_layers": "3", "rope_inv_freq_dtype": "fp16"}),
    ):
        write_weights(wrong / name, model, tensors)
        (wrong / name / "llm_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    import_lance(wrong / "released", wrong / "imported")


def _write_checkpoints(folder: Path, run: TinyRun) -> None:
    """Checkpoints of the good run whose one file of tensors was changed or deleted after it was written."""
    config = run.load("model.rope_inv_freq_dtype=float32")
    data = DataIdentity(Tokenizer(config.data.tokenizer).sha256, PackIndex.open(config.data.pack_index).hash)
    for name in ("flipped", "lacking"):
        root = folder / "wrong" / name / "checkpoints"
        file = root / "step_00000005" / "__0_0.distcp"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"tensors")
        manifest = Manifest.of(file.parent, config, 5, 1, data, {}, optimizer=DP_RESHARDABLE)
        manifest.write(file.parent, digests_of(file.parent, files_in(file.parent)))
        (root / "latest").write_text("step_00000005\n", encoding="utf-8")
        file.write_bytes(b"Tensors")
    file.unlink()


@pytest.fixture(scope="module")
def workshop(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the commands of the table run in."""
    folder = tmp_path_factory.mktemp("mistakes") / "run"
    shutil.copytree(tiny_run.folder, folder)
    _write_configs(folder, tiny_run.config)
    _write_data(folder)
    _write_prompts(folder)
    _write_tokenizers(folder)
    _write_indices(folder)
    _write_cache(folder)
    _write_weights(folder, tiny_run)
    _write_released(folder, tiny_run)
    _write_checkpoints(folder, tiny_run)
    used = folder / "wrong" / "used" / "checkpoints" / "step_00000005"
    used.mkdir(parents=True)
    (used / "checkpoint.json").write_text("{", encoding="utf-8")
    return folder


def test_the_table_lists_every_mistake_once() -> None:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(MISTAKES) == len(lines) - 2 >= 30  # all lines but the head and the rule under it
    for values in ([m.title for m in MISTAKES], [(m.ranks, m.command) for m in MISTAKES]):
        assert len(set(values)) == len(values)


def test_the_commands_stand_on_a_run_that_works(workshop: Path, command: Commander) -> None:
    for line in ("train --config tiny.yaml training.train_iters=1 training.run_dir=good", "inspect_pack index"):
        done = command(line, folder=workshop)
        assert done.code == 0, done.err


def _left(folder: Path) -> list[Path]:
    """What lies there, but the facts of data files, which stay for the next run."""
    return sorted(path for path in folder.rglob("*") if ".facts" not in f"{path.parent.name} {path.name}")


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.title for m in MISTAKES])
def test_mistake(mistake: Mistake, workshop: Path, command: Commander) -> None:
    if "without a GPU" in mistake.title and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    before = _left(workshop)
    done = command(mistake.command, ranks=mistake.ranks, folder=workshop)
    assert (done.code, "Traceback" in done.err) == (mistake.code, False), done.err
    last = done.err.strip().splitlines()[-1]
    pattern = r"\S+: (?:rank \d+: )?error: " + ".*".join(map(re.escape, mistake.message.split("…")))
    assert re.fullmatch(pattern, last), f"{last!r} is not {mistake.message!r}"
    if mistake.command.startswith(("prepack", "inspect_pack")):
        assert _left(workshop) == before
