"""What happened in a run beside its steps: starts, checkpoints, skipped steps, spikes, stops.

Station: loop -> [events] -> <run_dir>/events.jsonl, one object per line: time (UTC), step, event, and what belongs to
it.  Unlike metrics, events of steps that were done again stay.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"


class EventLog:
    """Appends events; every line is on its own, so a killed process leaves at most one torn line.

    No run ends for an event: one that cannot be written, on a full disk for example, is a warning.

    Args:
        run_dir: of the run.
        enabled: False on all ranks but the first.
    """

    def __init__(self, run_dir: Path, enabled: bool) -> None:
        self.path, self.enabled = run_dir / EVENTS_FILE, enabled

    def write(self, step: int, event: str, **detail: Any) -> None:
        """Append one.

        Args:
            step: steps done.
            event: what happened, a word or two.
            detail: JSON values that belong to it.
        """
        if self.enabled:
            values = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "event": event, **detail}
            try:
                with self.path.open("a+b") as file:
                    file.seek(max(0, file.tell() - 1))
                    torn = file.read(1) not in (b"", b"\n")
                    line = json.dumps(values, ensure_ascii=False) + "\n"
                    file.write((b"\n" if torn else b"") + line.encode())
            except OSError as error:
                logger.warning("%s: cannot be written (%s): %s", self.path, error.strerror, values)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run, in order; a torn line is left out.

    Raises:
        OSError: if there is no such file.
    """
    found = []
    for line in (run_dir / EVENTS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
