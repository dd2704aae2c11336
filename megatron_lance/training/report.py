"""A run as one page: curves, samples, events, configuration; everything inside one HTML file.

Station: run folder (metrics, validation, preview and events .jsonl, tensorboard/, config.yaml) -> [report] -> page.
Nothing is fetched when the page is opened, so it can be mailed or archived.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from megatron_lance.config.errors import UserError
from megatron_lance.profiling.charts import Chart, image
from megatron_lance.profiling.page import html_table
from megatron_lance.profiling.page import page as html_page
from megatron_lance.training.events import EVENTS_FILE, read_events

Line = dict[str, Any]
SHOWN_STEPS = 6
"""Steps whose samples are shown: the first, the last and some between."""
MARKED = {"started": "tab:blue", "skipped": "tab:red", "spike": "tab:orange", "rewound": "tab:purple"}
"""Events that are drawn into the curves, and their colours."""


@dataclass(frozen=True)
class Picture:
    """A sample.

    Attributes:
        step: after which it was made.
        data: a PNG or GIF file.
    """

    step: int
    data: bytes

    @property
    def uri(self) -> str:
        """The file inside a page."""
        kind = "gif" if self.data.startswith(b"GIF") else "png"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Record:
    """What a run left in its folder.

    Attributes:
        folder: of the run.
        steps: lines of metrics.jsonl, of which there is at least one.
        validations: lines of validation.jsonl.
        previews: lines of preview.jsonl.
        events: lines of events.jsonl.
        pictures: samples by prompt.
        config: the resolved configuration, YAML; empty if it is missing.
    """

    folder: Path
    steps: Sequence[Line]
    validations: Sequence[Line]
    previews: Sequence[Line]
    events: Sequence[Line]
    pictures: Mapping[str, Sequence[Picture]]
    config: str


def read_run(folder: Path) -> Record:
    """Read a run, finished or not.

    Raises:
        UserError: if the folder is none of a run, or its run has done no step.
    """
    steps = _lines(folder / "metrics.jsonl")
    if not steps:
        raise UserError(f"run folder '{folder}': has no step in metrics.jsonl; name the training.run_dir of a run")
    config = folder / "config.yaml"
    return Record(
        folder.resolve(),  # "." has a name too
        steps,
        _lines(folder / "validation.jsonl"),
        _lines(folder / "preview.jsonl"),
        read_events(folder) if (folder / EVENTS_FILE).is_file() else [],
        _pictures(folder / "tensorboard"),
        config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def _lines(path: Path) -> list[Line]:
    """The objects of a JSONL file; a last line that is being written is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _pictures(folder: Path) -> dict[str, list[Picture]]:
    if not folder.is_dir():
        return {}
    board = EventAccumulator(str(folder), size_guidance={IMAGES: 0}).Reload()
    found = {}
    for tag in sorted(board.Tags()[IMAGES]):
        by_step = {event.step: Picture(event.step, event.encoded_image_string) for event in board.Images(tag)}
        found[tag.removeprefix("preview/")] = [by_step[step] for step in sorted(by_step)]
    return found


def _series(lines: Iterable[Line], *names: str) -> dict[str, tuple[list[int], list[float]]]:
    """Values over steps of each name, and of each part of a name that has parts; what is null or absent is left out."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name in names:
            value = line.get(name)
            parts = value if isinstance(value, dict) else {name: value}
            for part, number in parts.items():
                if number is not None:
                    steps, values = found.setdefault(part, ([], []))
                    steps.append(line["step"])
                    values.append(float(number))
    return found


def _scaled(series: dict[str, tuple[list[int], list[float]]], factor: float) -> dict[str, Any]:
    return {name: (steps, [factor * value for value in values]) for name, (steps, values) in series.items()}


def charts(record: Record) -> list[Chart]:
    """The curves of a run; those without a value are left out."""
    steps = record.steps
    validation = {f"validation {name}": curve for name, curve in _series(record.validations, "loss").items()}
    norms = {**_series(steps, "grad_norm"), **_series(steps, "grad_norm_by_expert")}
    found = [
        Chart("loss", "", {**_series(steps, "loss"), **validation}),
        Chart("loss of answers (CE) and of velocities", "", _series(steps, "ce_loss", "velocity_loss")),
        Chart("loss by task", "", _series(steps, "loss_by_task")),
        Chart("loss by source", "", _series(steps, "loss_by_source")),
        Chart("validation loss by task", "", _series(record.validations, "loss_by_task"), dots=True),
        Chart("learning rate", "", _series(steps, "learning_rate")),
        Chart("gradient norm before clipping", "", norms, log=True),
        Chart("speed", "tokens/s", _series(steps, "tokens_per_second", "padded_tokens_per_second"), from_zero=True),
        Chart("use of the devices' peak", "MFU", _series(steps, "mfu", "bagel_mfu"), from_zero=True),
        Chart(
            "where the time of a step goes",
            "s",
            _series(steps, "step_seconds", "data_seconds", "save_stall_seconds"),
            from_zero=True,
        ),
        Chart("fill of packs", "", _series(steps, "fill")),
        Chart("most memory of a rank", "GiB", _scaled(_series(steps, "memory_bytes"), 2**-30), from_zero=True),
        Chart("tokens seen by kind", "", _series(steps, "tokens_seen"), from_zero=True),
    ]
    return [chart for chart in found if chart.series]


def _marks(record: Record) -> list[tuple[int, str, str]]:
    """(step, event, colour) of what is drawn into curves; the first start is none."""
    starts = [event for event in record.events if event["event"] == "started"][1:]
    others = [event for event in record.events if event["event"] in MARKED and event["event"] != "started"]
    return [(event["step"], event["event"], MARKED[event["event"]]) for event in [*starts, *others]]


def _summary(record: Record) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    steps, last = record.steps, record.steps[-1]
    seconds = sum(line["step_seconds"] for line in steps)
    rate = last["tokens_per_second"] if len(steps) < 3 else _median([line["tokens_per_second"] for line in steps])
    turns = [event for event in record.events if event["event"] in ("started", "ended")]
    end = "running, or killed"
    if turns and turns[-1]["event"] == "ended":
        end = f"{turns[-1]['reason']} (exit code {turns[-1]['exit_code']})"
    rows = [
        ("steps", f"{last['step']}; {end}"),
        ("loss", f"{_number(steps[0]['loss'])} at step {steps[0]['step']}, {_number(last['loss'])} at the last"),
        ("tokens seen", ", ".join(f"{kind} {count:,}" for kind, count in last.get("tokens_seen", {}).items())),
        ("speed", f"{rate:,.0f} real tokens/s in the median step, {seconds / 3600:.2f} hours in steps"),
        ("starts", str(sum(event["event"] == "started" for event in record.events))),
        ("steps left out", str(sum(bool(line["skipped"]) for line in steps))),
        ("broken media met", str(sum(line["broken"] for line in steps))),
    ]
    return rows


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"


def _chosen(steps: Sequence[int]) -> list[int]:
    """At most SHOWN_STEPS of ascending steps, evenly, both ends among them."""
    if len(steps) <= SHOWN_STEPS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]


def _samples(record: Record) -> str:
    """A row per prompt, a column per step; answers below."""
    shown = _chosen(sorted({picture.step for each in record.pictures.values() for picture in each}))
    rows = []
    for prompt, pictures in record.pictures.items():
        by_step = {picture.step: picture for picture in pictures}
        cells = (f'<img alt="" src="{by_step[step].uri}">' if step in by_step else "" for step in shown)
        rows.append(f"<tr><td>{html.escape(prompt)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>step {step}</th>" for step in shown)
    pictures_table = f'<table class="samples"><tr><th></th>{head}</tr>{"".join(rows)}</table>' if rows else ""
    answers = [
        (str(line["step"]), answer["task"], answer["question"], answer["answer"])
        for line in record.previews
        if line["step"] in _chosen([each["step"] for each in record.previews])
        for answer in line["answers"]
    ]
    return pictures_table + (html_table(answers, ("step", "task", "question", "answer")) if answers else "")


def _events(record: Record) -> str:
    rows = []
    for event in record.events:
        rest = {name: value for name, value in event.items() if name not in ("time", "step", "event")}
        detail = ", ".join(f"{name} {value}" for name, value in rest.items())
        rows.append((event["time"], str(event["step"]), event["event"], detail))
    return html_table(rows, ("time (UTC)", "steps done", "event", ""))


def _section(record: Record) -> str:
    """One run."""
    name = html.escape(record.folder.name)
    marks = _marks(record)
    images = (image(chart, marks) for chart in charts(record))
    legend = ", ".join(f"{event} {colour.removeprefix('tab:')}" for event, colour in MARKED.items())
    parts = [
        f'<h1 id="{name}">{name}</h1>{html_table(_summary(record))}',
        f'<h2>Curves</h2><p class="quiet">Vertical lines: {legend}.</p><div class="charts">{"".join(images)}</div>',
    ]
    samples = _samples(record)
    parts += [f"<h2>Samples</h2>{samples}"] if samples else []
    parts += [f"<h2>Events</h2>{_events(record)}"] if record.events else []
    if record.config:
        parts.append(f"<details><summary>Configuration</summary><pre>{html.escape(record.config)}</pre></details>")
    return "".join(parts)


def page(records: Sequence[Record]) -> str:
    """One HTML page of one or several runs, one below the other.

    Args:
        records: at least one.
    """
    names = [html.escape(record.folder.name) for record in records]
    links = " · ".join(f'<a href="#{name}">{name}</a>' for name in names) if len(names) > 1 else ""
    body = "<hr>".join(_section(record) for record in records)
    return html_page(", ".join(record.folder.name for record in records), f"<p>{links}</p>{body}")
