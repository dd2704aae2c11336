"""What a run reports: JSON lines of steps, validations and previews, and TensorBoard.

Station: step, validation, preview -> [metrics].  Only the first rank writes.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from megatron_lance.config.loader import ConfigError
from megatron_lance.sampling.media import Frames, gif_bytes
from megatron_lance.training.preview import Samples
from megatron_lance.training.validation import ValidationMetrics

logger = logging.getLogger(__name__)

BOARD_GROUPS = {
    "loss_by_task": "loss",
    "loss_by_source": "loss_of_source",
    "grad_norm_by_expert": "grad_norm",
    "tokens_seen": "tokens_seen",
}
"""How TensorBoard groups figures that have parts."""

TAG_LENGTH = 80
"""Characters of a prompt's name in TensorBoard."""


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
        padded_tokens_per_second: the same with the padding of its packs.
        tflops: model FLOPs from real tokens and mask pairs, 1e12 per second and device.
        mfu: of the device's peak; None where that is not known (profiling.peak_tflops).
        bagel_tflops: as tflops, by the formula that BAGEL logs.
        bagel_mfu: as mfu, by that formula.
        fill: real tokens / capacity.
        step_seconds: whole step.
        data_seconds: of it, until the inputs were there: waiting for what is read ahead, encoding, exchange.
        read_seconds: of those, waiting for what is read ahead.
        read_retries: reads of remote storage that the first rank has repeated so far.
        reader_restarts: times that the first rank has started its reading processes again so far.
        broken: visual segments of the global batch that could not be read.
        loss_by_task: mean over the loss rows of each task in the batch: CE of understanding, velocity of generation.
        loss_by_source: the same of each data source.
        grad_norm_by_expert: of the understanding (und) and the generation expert (gen) and what both share (shared).
        tokens_seen: by kind (text with vision markers, vit, clean and noise latents) of all steps so far.
        memory_bytes: most device memory that tensors of any rank took since the step before; on a CPU, the resident
            memory of its process.
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
    padded_tokens_per_second: float
    tflops: float
    mfu: float | None
    bagel_tflops: float
    bagel_mfu: float | None
    fill: float
    step_seconds: float
    data_seconds: float
    read_seconds: float
    read_retries: int
    reader_restarts: int
    broken: int
    loss_by_task: dict[str, float]
    loss_by_source: dict[str, float]
    grad_norm_by_expert: dict[str, float]
    tokens_seen: dict[str, int]
    memory_bytes: int
    skipped: bool
    save_stall_seconds: float
    save_seconds: float

    def line(self, last_step: int) -> str:
        """The step as one line."""
        note = " SKIPPED (not finite)" if self.skipped else ""
        used = "" if self.mfu is None else f"MFU {self.mfu:.1%} "
        ce, velocity = (f"{loss:.4f}" if loss else "-" for loss in (self.ce_loss, self.velocity_loss))  # 0: no row
        return (
            f"step {self.step}/{last_step} loss {self.loss:.5f} ce {ce} velocity {velocity} "
            f"grad norm {self.grad_norm:.3f} lr {self.learning_rate:.2e} "
            f"tokens/s {self.tokens_per_second:.0f} {used}fill {self.fill:.1%} "
            f"step {self.step_seconds:.2f} s (data {self.data_seconds:.2f} s, reading {self.read_seconds:.2f} s){note}"
        )


def _drop_after(path: Path, step: float) -> None:
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


class _StepLines:
    """A file of JSON objects with a step each, that goes on behind `steps_done`.

    Attributes:
        last: step of the last line; 0 if there is none.
    """

    def __init__(self, path: Path, steps_done: float) -> None:
        _drop_after(path, steps_done)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.last: int = json.loads(lines[-1])["step"] if lines else 0
        self.file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(_finite(values), ensure_ascii=False) + "\n")
        self.file.flush()


@contextmanager
def written_in(run_dir: Path) -> Iterator[None]:
    """Say what goes wrong with the run's own files as a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"training.run_dir '{run_dir}': cannot be written ({error.strerror}); make room or give another folder"
        ) from error


class MetricsWriter:
    """Writes what a run reports into its folder, behind that of the steps before it.

    Args:
        run_dir: of the run.
        enabled: False on all ranks but the first.
        steps_done: what an earlier process wrote of later steps is dropped, so that no step stands twice; None if no
            step is to come, so that nothing is dropped.

    Raises:
        ConfigError: here and by every method that writes, if the disk is full or the folder cannot be written.
    """

    def __init__(self, run_dir: Path, enabled: bool, steps_done: int | None = 0) -> None:
        self.run_dir, self.enabled = run_dir, enabled
        if enabled:
            purge, last = (None, math.inf) if steps_done is None else (steps_done + 1, steps_done)
            with written_in(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
                self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
                names = ("metrics", "validation", "preview")
                self.lines = {name: _StepLines(run_dir / f"{name}.jsonl", last) for name in names}

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.board.close()
            for lines in self.lines.values():
                lines.file.close()

    def known(self, step: int) -> list[str]:
        """Which of metrics, validation and preview have a line of this step."""
        return [name for name, lines in self.lines.items() if lines.last == step] if self.enabled else []

    def losses(self, count: int) -> list[float | None]:
        """Losses of the last steps, `count` of them at most; None where a step was left out."""
        with (self.run_dir / "metrics.jsonl").open(encoding="utf-8") as file:
            last = [json.loads(line) for line in deque(file, maxlen=count)]
        return [None if line["skipped"] else line["loss"] for line in last]

    def write(self, metrics: StepMetrics) -> None:
        """Append one step."""
        if self.enabled:
            self._line("metrics", asdict(metrics))
            self._scalars("train", asdict(metrics))

    def write_validation(self, metrics: ValidationMetrics) -> None:
        """Append the losses of held-out packs."""
        if self.enabled:
            self._line("validation", asdict(metrics))
            self._scalars("validation", asdict(metrics))

    def _line(self, name: str, values: dict[str, Any]) -> None:
        with written_in(self.run_dir):
            self.lines[name].write(values)

    def _scalars(self, group: str, values: dict[str, Any]) -> None:
        step = values.pop("step")
        for name, value in values.items():
            parts = value if isinstance(value, dict) else {"": value}
            for part, number in parts.items():
                if number is not None:
                    tag = f"{BOARD_GROUPS[name]}/{part}" if part else name
                    self.board.add_scalar(f"{group}/{tag}", float(number), step)

    def write_samples(self, samples: Samples) -> None:
        """Show pictures, clips and answers under their prompts; answers stand in preview.jsonl too."""
        if not self.enabled:
            return
        answers = []
        for line, result in samples.found:
            tag = f"preview/{line.number:02d} {line.task} {line.texts[-1]}"[:TAG_LENGTH]
            if isinstance(result, str):
                answers.append(
                    {"line": line.number, "task": str(line.task), "question": line.texts[0], "answer": result}
                )
                self.board.add_text(tag, f"**{line.texts[0]}**\n\n{result}", samples.step)
            elif len(result) == 1:
                self.board.add_image(tag, result[0], samples.step, dataformats="HWC")
            else:
                self._clip(tag, result, samples)
        shown = {"step": samples.step, "samples": len(samples.found), "prompts": samples.prompts}
        rest = {"averaged": samples.averaged, "seconds": samples.seconds, "answers": answers}
        self._line("preview", {**shown, **rest})

    def _clip(self, tag: str, frames: Frames, samples: Samples) -> None:
        """A clip as an animated picture."""
        height, width = frames.shape[1:3]
        gif = gif_bytes(frames, samples.fps)
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self.board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), samples.step)
