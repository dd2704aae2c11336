"""A SLURM of one node on this machine: its real daemons with files in one folder, for checks.  Needs root.

Debian's packages slurm-wlm and munge; proctrack and task plugins that need no control groups, so it runs in containers.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_CONF = """ClusterName=check
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={other_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=30
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def why_not() -> str:
    """Why a cluster cannot run here; empty if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Cluster:
    """A cluster that runs.

    Args:
        folder: of its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin"

    def run(self, *command: str, **variables: str) -> str:
        """Run a command of SLURM; returns what it prints.

        Raises:
            RuntimeError: if it fails, with what it says.
        """
        done = subprocess.run(
            command, env={**self.environment, **variables}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start one, and end it with all its jobs.

    Args:
        folder: new; for its files, 107 characters at most with the name of a socket.

    Raises:
        RuntimeError: if the node does not come up.
    """
    folder.mkdir(parents=True, mode=0o700)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    ports = {"port": _free_port(), "other_port": _free_port()}
    (folder / "slurm.conf").write_text(_CONF.format(host=host, folder=folder, **ports), encoding="utf-8")
    made = Cluster(folder)
    munge = {name: f"{folder}/munge.{name}" for name in ("key", "socket", "pid", "log", "seed")}
    daemons = [
        ["munged", "--foreground", "--force", "--key-file", munge["key"], "--socket", munge["socket"]]
        + ["--pid-file", munge["pid"], "--log-file", munge["log"], "--seed-file", munge["seed"]],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            with (folder / f"{command[0]}.out").open("wb") as out:
                running.append(subprocess.Popen(command, env=made.environment, stdout=out, stderr=out))
            time.sleep(2)
        _await_node(made)
        yield made
    finally:
        for daemon in reversed(running):
            daemon.terminate()
            daemon.wait(timeout=60)


def _await_node(made: Cluster, seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while "idle" not in made.run("sinfo", "--noheader", "--format=%t"):
        if time.monotonic() > until:
            raise RuntimeError(f"the node does not come up; see {made.folder}/slurmd.log and slurmctld.log")
        time.sleep(1)
