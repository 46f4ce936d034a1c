"""A run's journal, `events.jsonl`: one JSON object a line, appended and never changed.

Each has `time` (seconds since 1970; it never goes back within one command) and `kind`:

    stage_started    stage, resumed: whether it goes on with what a stopped process left
    progress         done, total, unit "steps", metrics: of a training, one for each optimiser step (work in other
                     units is told to the terminal only). Steps that are done again after a stop stand there twice
    stage_stopped    stage; one that was killed says nothing
    stage_finished   stage, seconds, ram_bytes, gpu_bytes where there is a GPU, metrics
    stage_skipped    stage, seconds, metrics: it was finished before
    planned          seconds, rates; by stage: stages (tokens, seconds) and peak_bytes (planner/plan.py)
    time_left        seconds; of a stage that was found slower or faster than planned: stage, planned, expected
    notice, alarm    text; an alarm names its stage (see alarms.py)

The terminal shows these events as they come, the report reads them from the file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "events.jsonl"


@dataclass(frozen=True, slots=True)
class Span:
    """Work on one stage by one command, in seconds since 1970; `finished` is False where it was stopped, or goes on."""

    stage: str
    start: float
    end: float
    finished: bool


def read_events(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a run's folder, none where it has no journal; a line that is no event is passed over."""
    if not (run / NAME).is_file():
        return
    with (run / NAME).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:  # a full disk cut it off
                continue
            if isinstance(event, dict) and "kind" in event and "time" in event:
                yield event


def steps_by_stage(events: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Return each training's steps in order, as `step` with its metrics. Of a step that was done twice, the last."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    stage = ""
    for event in events:
        if event["kind"] == "stage_started":
            stage = event["stage"]
            if not event.get("resumed"):
                found.pop(stage, None)
        elif event["kind"] == "progress":
            found.setdefault(stage, {})[event["done"]] = {"step": event["done"], **event["metrics"]}
    return {stage: [steps[number] for number in sorted(steps)] for stage, steps in found.items()}


def spans(events: Iterable[Mapping[str, Any]]) -> list[Span]:
    """Return when each stage was worked on; one that was killed lasts until the last that was heard of it."""
    done: list[Span] = []
    begun: tuple[str, float] | None = None
    last = 0.0
    for event in events:
        kind = event["kind"]
        if kind in ("stage_started", "stage_skipped") and begun:
            done.append(Span(*begun, last, finished=False))
            begun = None
        if kind == "stage_started":
            begun = event["stage"], event["time"]
        elif kind in ("stage_finished", "stage_stopped") and begun:
            done.append(Span(*begun, event["time"], finished=kind == "stage_finished"))
            begun = None
        if kind.startswith("stage_") or kind in ("progress", "time_left"):  # not what the next command says first
            last = event["time"]
    return [*done, Span(*begun, last, finished=False)] if begun else done
