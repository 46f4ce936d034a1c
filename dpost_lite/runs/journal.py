"""A run's journal, `events.jsonl`: one JSON object per line, append-only.

Each event has `time` (seconds since 1970, monotonic within one command) and `kind`:

    stage_started    stage, resumed: whether it continues from what an interrupted process left
    progress         done, total, unit "steps", metrics: one per optimiser step of a training (progress in other units
                     is shown on the terminal only). Steps repeated after an interruption appear twice
    stage_stopped    stage; missing if the process was killed
    stage_finished   stage, seconds, ram_bytes, gpu_bytes (if there is a GPU), metrics
    stage_skipped    stage, seconds, metrics: it was finished by an earlier command
    planned          seconds, rates; by stage: stages (tokens, seconds) and peak_bytes (planner/plan.py)
    time_left        seconds; if a stage turns out slower or faster than planned: stage, planned, expected
    notice, alarm    text; an alarm also has a stage (report/alarms.py)

The terminal shows events as they are emitted; the report reads them from the file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "events.jsonl"


@dataclass(frozen=True, slots=True)
class Span:
    """Work on one stage by one command, in seconds since 1970; `finished` is False if interrupted or running."""

    stage: str
    start: float
    end: float
    finished: bool


def read_events(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a run folder (none if it has no journal), skipping damaged lines."""
    if not (run / NAME).is_file():
        return
    with (run / NAME).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:  # truncated by a full disk
                continue
            if isinstance(event, dict) and "kind" in event and "time" in event:
                yield event


def steps_by_stage(events: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Return each training's steps in order, as `step` plus metrics; the last record of a repeated step counts."""
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
    """Return when each stage was worked on; a killed stage ends at its last event."""
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
        if kind.startswith("stage_") or kind in ("progress", "time_left"):  # a notice or plan may be by a later command
            last = event["time"]
    return [*done, Span(*begun, last, finished=False)] if begun else done
