"""The command lines of all stages: each from the stage before, all of them in the folder that was asked for."""

from __future__ import annotations

from pathlib import Path

from tools.run_stages import FOLDER, STAGES, commands, moved


def test_every_stage_plans_trains_and_reports_in_order() -> None:
    names = [name for name, _ in commands(Path("out"), 40, 2)]
    assert names[0] == "data" and names[-1] == "page of all stages"
    per_stage = [name for stage in STAGES for name in names if name.startswith(f"{stage}: ")]
    assert names[1:-1] == per_stage and len(per_stage) == 4 * len(STAGES)


def test_everything_is_moved_and_each_stage_starts_from_the_one_before() -> None:
    for stage, before in zip(STAGES, ("", *STAGES), strict=False):
        settings = moved(stage, Path("out/there"))
        assert not any(FOLDER in setting for setting in settings)
        assert all(value.startswith("out/there/") for _, value in (setting.split("=", 1) for setting in settings))
        starts = [setting for setting in settings if setting.startswith("training.init_from=")]
        assert starts == ([f"training.init_from=out/there/{before}"] if before else [])
    lines = commands(Path("out"), 17, 3)
    train = [line for name, line in lines if name.endswith(": train")]
    assert all("training.train_iters=17" in line and line[line.index("--nproc-per-node") + 1] == "3" for line in train)
    held_out = [line for name, line in lines if name.endswith("held-out rows")]
    assert all("--held-out" in line for line in held_out)
