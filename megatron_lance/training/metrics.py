"""What a run reports: one line per logged step, TensorBoard scalars and a metrics.jsonl.

Station: step -> [metrics].  Only the first rank writes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_lance.sampling.media import Frames

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepMetrics:
    """One step.

    Attributes:
        step: from 1.
        loss: weighted total.
        ce_loss: nats per CE row.
        velocity_loss: per velocity row.
        grad_norm: before clipping.
        learning_rate: of this step.
        tokens_per_second: real tokens of the global batch over the step's time.
        fill: real tokens / capacity.
        step_seconds: whole step.
        data_seconds: of it, waiting for data.
        broken: visual segments of the global batch that could not be read.
        loss_by_task: mean over the loss rows of each task in the batch: CE of understanding, velocity of generation.
        skipped: whether the optimizer step was left out because loss or gradients were not finite.
        save_stall_seconds: that training stood still for checkpoints since the line before.
        save_seconds: of the checkpoint published since then, from its begin; 0 if there was none.
    """

    step: int
    loss: float
    ce_loss: float
    velocity_loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    fill: float
    step_seconds: float
    data_seconds: float
    broken: int
    loss_by_task: dict[str, float]
    skipped: bool
    save_stall_seconds: float
    save_seconds: float

    def line(self, last_step: int) -> str:
        """The step as one line."""
        note = " SKIPPED (not finite)" if self.skipped else ""
        return (
            f"step {self.step}/{last_step} loss {self.loss:.5f} ce {self.ce_loss:.4f} "
            f"velocity {self.velocity_loss:.4f} grad norm {self.grad_norm:.3f} lr {self.learning_rate:.2e} "
            f"tokens/s {self.tokens_per_second:.0f} fill {self.fill:.1%} "
            f"step {self.step_seconds:.2f} s (data {self.data_seconds:.2f} s){note}"
        )


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; a line torn by a kill is dropped too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            logger.warning("%s: dropped an incomplete line", path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    """A value as JSON has it: None for a number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """Writes metrics of a run into its folder, behind those of the steps before it.

    Args:
        run_dir: of the run.
        enabled: False on all ranks but the first.
        steps_done: what an earlier process wrote of later steps is dropped, so that no step stands twice.
    """

    def __init__(self, run_dir: Path, enabled: bool, steps_done: int = 0) -> None:
        self.enabled = enabled
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            _drop_after(run_dir / "metrics.jsonl", steps_done)
            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=steps_done + 1)
            self.lines = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.board.close()
            self.lines.close()

    def write_pictures(self, captions: Sequence[str], pictures: Sequence[Frames], step: int) -> None:
        """Put drawn pictures, uint8 [1, H, W, 3] each, under their captions."""
        if self.enabled:
            for caption, picture in zip(captions, pictures, strict=True):
                self.board.add_image(f"preview/{caption}", picture[0], step, dataformats="HWC")

    def write(self, metrics: StepMetrics) -> None:
        """Append one step."""
        if not self.enabled:
            return
        values = asdict(metrics)
        self.lines.write(json.dumps({name: _finite(value) for name, value in values.items()}) + "\n")
        self.lines.flush()
        by_task = {f"loss/{task}": loss for task, loss in values.pop("loss_by_task").items()}
        for name, value in {**values, **by_task}.items():
            if name != "step":
                self.board.add_scalar(f"train/{name}", float(value), metrics.step)
