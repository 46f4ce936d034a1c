"""Estimated time to go: at first from the plan, then corrected by what was measured.

Listens to the events of a run and adds its own: `planned` when the first stage starts, and `time_left` at each stage's
start and after two minutes of steps in a stage. So estimates and measurements stand side by side in the journal.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dpost_lite.planner.plan import Plan
from dpost_lite.runs.stage_names import StageName

CALIBRATION_S = 120
MIN_PLANNED_S = 1  # shorter stages say nothing about the others


class Eta:
    """A listener of `Run`; `emit` is the run's."""

    def __init__(self, plan: Plan, emit: Callable[..., None]) -> None:
        self._planned = {str(name): estimate.seconds for name, estimate in plan.estimates.items()}
        self._to_come = dict.fromkeys(self._planned)
        self._ratios: dict[str, float] = {}  # measured / planned, by kind of stage
        self._emit = emit
        self._stage, self._started, self._first = "", 0.0, (0.0, 0.0)
        self._done, self._is_calibrated, self._is_resumed = 0.0, False, False
        self._plan: Plan | None = plan  # until it was told

    def __call__(self, event: dict[str, Any]) -> None:
        """Take note of one event."""
        kind, stage = event["kind"], event.get("stage", "")
        if kind == "stage_started":
            self._tell_plan()
            self._stage, self._started, self._first = stage, event["time"], (0.0, 0.0)
            self._done, self._is_calibrated = 0.0, False
            self._is_resumed = event.get("resumed", False)
            if stage in self._to_come:
                for name in itertools.takewhile(lambda name: name != stage, list(self._to_come)):
                    self._to_come.pop(name)  # left out: no pairs, or no further round
            self._tell(0.0)
        elif kind == "progress":
            self._on_progress(event)
        elif kind in ("stage_finished", "stage_skipped"):
            self._to_come.pop(stage, None)
            if not self._is_resumed:  # of one that was stopped, not all of its time may be known
                self._learn(stage, event["seconds"])
            self._is_resumed = False

    def _tell_plan(self) -> None:
        """Once, when the first stage begins: a run of which all is done needs no plan."""
        if self._plan is not None:
            plan, self._plan = self._plan, None
            self._emit(
                "planned",
                seconds=round(plan.seconds),
                rates=plan.device.rates_of,
                stages={str(name): asdict(estimate) for name, estimate in plan.estimates.items()},
                peak_bytes={name: round(size) for name, size in plan.peaks.items()},
            )

    def _on_progress(self, event: dict[str, Any]) -> None:
        first_time, first_done = self._first
        if not first_time or event["done"] < self._done:  # a second part of a stage counts from the start again
            self._first = event["time"], event["done"]
        elif event["time"] - first_time >= CALIBRATION_S and event["done"] > first_done and not self._is_calibrated:
            self._is_calibrated = True
            rate = (event["done"] - first_done) / (event["time"] - first_time)
            left = (event["total"] - event["done"]) / rate
            expected = event["time"] - self._started + left
            self._learn(self._stage, expected)
            self._tell(left, stage=self._stage, expected=expected)
        self._done = event["done"]

    def _learn(self, stage: str, seconds: float) -> None:
        planned = self._planned.get(stage, 0)
        if planned >= MIN_PLANNED_S:
            self._ratios[_kind(stage)] = seconds / planned

    def _tell(self, left: float, *, stage: str | None = None, expected: float | None = None) -> None:
        """Emit what is left: of the running stage, and of those to come, each at the pace of its kind."""
        usual = sum(self._ratios.values()) / len(self._ratios) if self._ratios else 1.0
        later = [name for name in self._to_come if name != stage]
        left += sum(self._planned[name] * self._ratios.get(_kind(name), usual) for name in later)
        calibrated = {"stage": stage, "planned": self._planned.get(stage), "expected": expected} if stage else {}
        self._emit("time_left", seconds=round(left), **calibrated)


def _kind(stage: str) -> str:
    name = StageName.parse(stage)
    return name.kind if name else stage
