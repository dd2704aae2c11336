"""The loader: every kind of error is one line that names the place, what wins over what, and round trips."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from megatron_lance.config.loader import ConfigError, dump_yaml, load_config, to_dict
from megatron_lance.config.schema import DataConfig, ModelConfig, OptimizerConfig, RunConfig, SourceConfig
from megatron_lance.config.validate import validate
from tests.shared import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "examples" / "configs").glob("*.yaml"))
SOURCES = "data: {sources: [{name: a, path: a.parquet, task: t2i}, {name: b, path: b, task: v2t, weight: 3}]}"


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_line(paths: list[str], *overrides: str) -> str:
    with pytest.raises(ConfigError) as info:
        load_config(paths, overrides)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_no_file_gives_the_defaults() -> None:
    assert load_config([]) == RunConfig()


def test_values_of_every_type(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: {mrope_section: [2, 3, 3], rotary_base: 10000}\n"
        "optimizer: {lr: 1e-3, adam_eps: 1.0e-8, lr_decay_iters: 5}\n"
        "parallel: {virtual_pipeline_model_parallel_size: null, use_distributed_optimizer: false}\n"
        "training: {run_dir: runs/x}\n" + SOURCES,
    )
    config = load_config([path])
    assert config.model == ModelConfig(mrope_section=(2, 3, 3), rotary_base=10000.0)
    assert isinstance(config.model.rotary_base, float)
    assert config.optimizer == OptimizerConfig(lr=1e-3, adam_eps=1e-8, lr_decay_iters=5)
    assert config.parallel.virtual_pipeline_model_parallel_size is None
    assert config.parallel.use_distributed_optimizer is False
    assert config.training.run_dir == "runs/x"
    assert config.data.sources == (
        SourceConfig("a", "a.parquet", "t2i"),
        SourceConfig("b", "b", "v2t", weight=3.0),
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_load_and_are_valid(example: Path) -> None:
    config = load_config([str(example)])
    p = config.parallel
    validate(config, p.tensor_model_parallel_size * p.context_parallel_size * p.pipeline_model_parallel_size)


def test_examples_are_found() -> None:
    assert {"tiny.yaml", "lance_3b.yaml"} <= {p.name for p in EXAMPLES}


def test_lance_3b_has_the_default_model() -> None:
    assert load_config([str(REPOSITORY / "examples/configs/lance_3b.yaml")]).model == ModelConfig()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_dump_round_trip(tmp_path: Path, example: Path) -> None:
    source = "data.sources=[{name: 'no', path: '1e-4', task: t2i, weight: 1e-15}]"
    config = load_config([str(example)], [source, "training.init_from='x: y # z'", "optimizer.lr_decay_iters=7"])
    assert load_config([write(tmp_path, dump_yaml(config))]) == config
    assert yaml.safe_load(dump_yaml(config)) == to_dict(config)


def test_to_dict_is_complete() -> None:
    plain = to_dict(RunConfig(data=DataConfig(sources=(SourceConfig("a", "b", "t2i"),))))
    assert plain["data"]["sources"] == [dataclasses.asdict(SourceConfig("a", "b", "t2i"))]
    assert plain["model"]["mrope_section"] == [16, 24, 24]
    assert set(plain) == {f.name for f in dataclasses.fields(RunConfig)}


# What wins


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    first = write(tmp_path, "training: {seed: 1, train_iters: 1, log_interval: 1}", "a.yaml")
    second = write(tmp_path, "training: {seed: 2, train_iters: 2}", "b.yaml")
    config = load_config([first, second], ["training.train_iters=3", "training.train_iters=4"])
    assert (config.training.log_interval, config.training.seed, config.training.train_iters) == (1, 2, 4)


def test_extends_chain_and_list(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", "training: {seed: 1, train_iters: 1, global_batch_size: 1, log_interval: 11}", "root.yaml")
    write(tmp_path / "base", "extends: root.yaml\ntraining: {seed: 2, train_iters: 2, global_batch_size: 2}", "a.yaml")
    write(tmp_path / "base", "extends: root.yaml\ntraining: {train_iters: 3, global_batch_size: 3}", "b.yaml")
    top = write(tmp_path, "extends: [base/a.yaml, base/b.yaml]\ntraining: {global_batch_size: 4}")
    training = load_config([top]).training
    assert training.log_interval == 11
    assert training.seed == 1  # b.yaml brings root.yaml again, after a.yaml
    assert training.train_iters == 3
    assert training.global_batch_size == 4


def test_a_list_replaces_the_list_before_it(tmp_path: Path) -> None:
    first, second = write(tmp_path, SOURCES, "a.yaml"), write(tmp_path, "data: {sources: []}", "b.yaml")
    assert load_config([first, second]).data.sources == ()


def test_overrides_reach_list_elements(tmp_path: Path) -> None:
    config = load_config(
        [write(tmp_path, SOURCES)],
        ["data.sources.0.weight=2", "data.sources.1={task: t2v}", "model.mrope_section.2=25", "data.seq_length=8192"],
    )
    assert config.data.sources == (
        SourceConfig("a", "a.parquet", "t2i", weight=2.0),
        SourceConfig("b", "b", "t2v", weight=3.0),
    )
    assert config.model.mrope_section == (16, 24, 25)
    assert config.data.seq_length == 8192


def test_an_override_without_a_value_is_empty_text() -> None:
    assert load_config([], ["training.init_from=weights", "training.init_from="]).training.init_from == ""


def test_override_of_a_section_merges() -> None:
    config = load_config([], ["training={seed: 5, train_iters: 9}", "data.prompts.editing='a = b'"])
    assert (config.training.seed, config.training.train_iters, config.training.precision) == (5, 9, "bf16")
    assert config.data.prompts.editing == "a = b"


# Errors: each is one line with place, value, rule and remedy


def test_unknown_key_names_near_and_valid_ones(tmp_path: Path) -> None:
    line = error_line([write(tmp_path, "model: {hiden_size: 8}")])
    assert "run.yaml: model.hiden_size: unknown key; did you mean model.hidden_size? valid keys: num_layers, " in line


def test_unknown_key_of_another_section(tmp_path: Path) -> None:
    assert "did you mean optimizer.lr?" in error_line([write(tmp_path, "training: {lr: 8}")])


@pytest.mark.parametrize("text", ["modle: {}", "data: {sources: [{nam: a}]}", "1: 2", "null: 2", "[1]: 2"])
def test_unknown_key_anywhere(tmp_path: Path, text: str) -> None:
    assert re.search("unknown key|not valid YAML", error_line([write(tmp_path, text)]))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("model.num_layers", "true", "True: must be an integer"),
        ("model.num_layers", "4.0", "4.0: must be an integer"),
        ("model.num_layers", "'4'", "'4': must be an integer"),
        ("model.num_layers", "1e3", "'1e3': must be an integer"),
        ("model.num_layers", "null", "None: must be an integer"),
        ("optimizer.lr", "fast", "'fast': must be a finite number"),
        ("optimizer.lr", "true", "True: must be a finite number"),
        ("optimizer.lr", ".nan", "nan: must be a finite number"),
        ("optimizer.lr", "infinity", "must be a finite number"),
        ("optimizer.lr", "9" * 400, "must be a finite number"),
        ("parallel.overlap_grad_reduce", "1", "1: must be a boolean"),
        ("parallel.overlap_grad_reduce", "'true'", "'true': must be a boolean"),
        ("training.run_dir", "12", "12: must be text; put it in quotes"),
        ("training.run_dir", "null", "None: must be text; put it in quotes, and write '' for empty"),
        ("training.run_dir", "2026-01-01", "must be text"),
        ("training.run_dir", "2026-13-01", "not valid YAML"),
        ("parallel.recompute_granularity", "[full]", "['full']: must be text"),
        ("parallel.virtual_pipeline_model_parallel_size", "two", "'two': must be an integer"),
        ("model.mrope_section", "16", "16: must be a list"),
        ("model.mrope_section", "[1, 2, x]", "model.mrope_section.2 = 'x': must be an integer"),
        ("data.sources", "[a]", "data.sources.0 = 'a': must be a mapping with keys among name, path"),
        ("data.prompts", "hello", "'hello': must be a mapping with keys among generation"),
        ("data.sources", "[{name: a, task: t2i}]", "path is missing and has no default; add it"),
        ("training.run_dir", "[unclosed", "not valid YAML"),
    ],
)
def test_wrong_values(tmp_path: Path, field: str, value: str, rule: str) -> None:
    section, name = field.split(".")
    for line in (
        error_line([], f"{field}={value}"),
        error_line([write(tmp_path, f"{section}:\n  {name}: {value}\n")]),
    ):
        assert rule in line
        assert field in line or "run.yaml" in line


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "None: must be a mapping of the sections model, ops"),
        ("- a", "must be a mapping of the sections"),
        ("model: [1", "line 1 column"),
        ("model: {}\n---\nmodel: {}", "not valid YAML"),
        ("model: !!python/object:os.system {}", "not valid YAML"),
        ("model: \x07", "not valid YAML"),
        ("model:", "model = None: must be a mapping"),
        ("model: {num_layers: 1}\nmodel: {num_layers: 2}", "line 2 column 1: not valid YAML: duplicate key 'model'"),
        ("model: {num_layers: 1, num_layers: 1}", "duplicate key 'num_layers'; keep one"),
        ("extends: 5", "extends = 5: must be a file name or a list of file names"),
        ("extends:", "extends = None: must be a file name or a list of file names"),
        ("extends: gone.yaml", "gone.yaml: no such configuration file; check the path"),
        ("extends: run.yaml", "in a circle (run.yaml -> run.yaml); remove one link"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, rule: str) -> None:
    line = error_line([write(tmp_path, text)])
    assert rule in line
    assert "run.yaml" in line


def test_missing_file(tmp_path: Path) -> None:
    line = error_line([str(tmp_path / "gone.yaml")])
    assert line == f"{tmp_path / 'gone.yaml'}: no such configuration file; check the path"


def test_unreadable_files(tmp_path: Path) -> None:
    assert "cannot be read as UTF-8 text" in error_line([str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes(b"training: {run_dir: \xe4}")
    assert "cannot be read as UTF-8 text" in error_line([str(tmp_path / "latin.yaml")])


def test_extends_cycle_names_the_files(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml", "a.yaml")
    write(tmp_path, "extends: a.yaml", "b.yaml")
    assert "in a circle (a.yaml -> b.yaml -> a.yaml)" in error_line([str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("training.seed", "must have the form section.field=value"),
        ("=3", "must have the form section.field=value"),
        ("training.sede=3", "did you mean training.seed?"),
        ("trainin.seed=3", "did you mean training?"),
        ("training.seed.x=3", "training.seed is a single value and has no part 'x'; write training.seed=value"),
        ("data.sources.0.weight=1", "data.sources has 0 elements, numbered from 0"),
        ("model.mrope_section.3=1", "has 3 elements, numbered from 0"),
        ("model.mrope_section.-1=1", "has 3 elements, numbered from 0"),
        ("training=3", "training = 3: must be a mapping"),
    ],
)
def test_broken_overrides(override: str, rule: str) -> None:
    line = error_line([], override)
    assert line.startswith(f"override {override!r}")
    assert rule in line
