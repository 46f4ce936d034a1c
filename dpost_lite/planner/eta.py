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
MIN_PLANNED_S = 1  # shorter stages are no basis for a ratio


class Eta:
    """A listener of `Run`; `emit` is the run's own."""

    def __init__(self, plan: Plan, emit: Callable[..., None]) -> None:
        self._planned = {str(name): estimate.seconds for name, estimate in plan.estimates.items()}
        self._to_come = dict.fromkeys(self._planned)
        self._ratios: dict[str, float] = {}  # measured / planned, by kind of stage
        self._emit = emit
        self._stage, self._started, self._first = "", 0.0, (0.0, 0.0)
        self._done, self._is_calibrated, self._is_resumed = 0.0, False, False
        self._plan: Plan | None = plan  # until it is emitted

    def __call__(self, event: dict[str, Any]) -> None:
        """Handle one event of the run."""
        kind, stage = event["kind"], event.get("stage", "")
        if kind == "stage_started":
            self._emit_plan()
            self._stage, self._started, self._first = stage, event["time"], (0.0, 0.0)
            self._done, self._is_calibrated = 0.0, False
            self._is_resumed = event.get("resumed", False)
            if stage in self._to_come:
                for name in itertools.takewhile(lambda name: name != stage, list(self._to_come)):
                    self._to_come.pop(name)  # skipped: no pairs, or no further round
            self._emit_time_left(0.0)
        elif kind == "progress":
            self._on_progress(event)
        elif kind in ("stage_finished", "stage_skipped"):
            self._to_come.pop(stage, None)
            if not self._is_resumed:  # a resumed stage may not know all the time spent on it
                self._learn(stage, event["seconds"])
            self._is_resumed = False

    def _emit_plan(self) -> None:
        """Emit the plan once, when the first stage starts: a run with nothing left to do needs none."""
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
        if not first_time or event["done"] < self._done:  # the second part of a stage starts counting again
            self._first = event["time"], event["done"]
        elif event["time"] - first_time >= CALIBRATION_S and event["done"] > first_done and not self._is_calibrated:
            self._is_calibrated = True
            rate = (event["done"] - first_done) / (event["time"] - first_time)
            left = (event["total"] - event["done"]) / rate
            expected = event["time"] - self._started + left
            self._learn(self._stage, expected)
            self._emit_time_left(left, stage=self._stage, expected=expected)
        self._done = event["done"]

    def _learn(self, stage: str, seconds: float) -> None:
        planned = self._planned.get(stage, 0)
        if planned >= MIN_PLANNED_S:
            self._ratios[_kind(stage)] = seconds / planned

    def _emit_time_left(self, left: float, *, stage: str | None = None, expected: float | None = None) -> None:
        """Emit the time left in the running stage plus that of later stages, each at the measured pace of its kind."""
        usual = sum(self._ratios.values()) / len(self._ratios) if self._ratios else 1.0
        later = [name for name in self._to_come if name != stage]
        left += sum(self._planned[name] * self._ratios.get(_kind(name), usual) for name in later)
        calibrated = {"stage": stage, "planned": self._planned.get(stage), "expected": expected} if stage else {}
        self._emit("time_left", seconds=round(left), **calibrated)


def _kind(stage: str) -> str:
    name = StageName.parse(stage)
    return name.kind if name else stage
