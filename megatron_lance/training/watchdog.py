"""A run that stands still says where, and ends.

Station: beside the run.  A rank that waits in a collective for one that is gone waits in silence; a thread of each
rank sees that its station has not changed for too long, says which it is with the stack of every thread, and ends the
process with ExitCode.HANG.  Ranks that said nothing are the ones to look at: the first rank that reports names them.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from megatron_lance.config.errors import ExitCode
from megatron_lance.training.events import EventLog

_RANK_FILE = re.compile(r"rank_(\d+)\.txt")
_MOST_REPORT_SECONDS = 60.0
"""After which a rank ends without its report: what hangs may be the disk."""


class Watchdog:
    """Ends this process when its station has not changed for too long.

    Args:
        run_dir: of the run; reports go to its folder hang/.
        seconds: without progress that are too long; 0: never.
        rank: of this process.
        world_size: ranks of the run.
    """

    def __init__(self, run_dir: Path, seconds: float, rank: int, world_size: int) -> None:
        self.run_dir, self.seconds, self.rank, self.world_size = run_dir, seconds, rank, world_size
        self._station, self._step, self._since = "start", 0, time.monotonic()
        self._report_file = run_dir / "hang" / f"rank_{rank}.txt"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.at("start", self._step)
        self._report_file.unlink(missing_ok=True)  # of an earlier process
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def at(self, station: str, step: int) -> None:
        """Say what this rank does now.

        Args:
            station: in a few words.
            step: that it belongs to, from 1.
        """
        self._station, self._step, self._since = station, step, time.monotonic()

    @property
    def step(self) -> int:
        """The step this rank is at."""
        return self._step

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._since > self.seconds:
                end = threading.Timer(_MOST_REPORT_SECONDS, os._exit, (ExitCode.HANG,))
                end.daemon = True
                end.start()
                try:
                    self._report()
                except OSError as error:
                    sys.stderr.write(f"hang: no report to '{self._report_file}': {error}\n")
                os._exit(ExitCode.HANG)

    def _report(self) -> None:
        """Say where this rank stands and, after a while, which ranks said nothing."""
        step, folder = self._step, self._report_file.parent
        place = f"rank {self.rank} on {socket.gethostname()}: at '{self._station}' of step {step}"
        sys.stderr.write(f"hang: no progress for {self.seconds:g} s: {place}\n")
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._report_file.write_text(place + "\n", encoding="utf-8")
        time.sleep(min(10.0, self.seconds))  # others find out a little later
        found = ((_RANK_FILE.fullmatch(path.name), path) for path in folder.iterdir())
        reports = {int(name[1]): path for name, path in found if name and int(name[1]) < self.world_size}
        if self.rank == min(reports):
            lines = [reports[rank].read_text(encoding="utf-8").strip() for rank in sorted(reports)]
            silent = sorted(set(range(self.world_size)) - set(reports))
            what = f"silent ranks: {', '.join(map(str, silent)) or 'none'}"
            sys.stderr.write("\n".join(["hang: all ranks that report:", *lines, f"hang: {what}"]) + "\n")
            EventLog(self.run_dir, enabled=True).write(step, "hang", stations=lines, silent=silent)
        sys.stderr.flush()
