"""A run's folder made by hand, stage by stage, for the tests of what a report reads from it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpost_lite.problems.records import GradedAnswer, Rationale, Score, write_jsonl
from dpost_lite.recipe_files import load_recipe


def rationale(
    problem: str, sample: int, *, correct: bool, ids: Sequence[int] = range(10), end: str = "stop"
) -> Rationale:
    text = f"{problem} {sample}"
    return Rationale(problem, sample, text, tuple(ids), (0,) * len(ids), 0.0, end, "1", correct, 2, 1)  # type: ignore[arg-type]


class RunFolder:
    """A run's folder, stage by stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe("dpo.batch_size=8", "dpo.max_steps=4", "sampling.max_new_tokens=96")
        self.stage("data", metrics={"train": 4})

    def recipe(self, *overrides: str) -> None:
        values = load_recipe(None, list(overrides)).model_dump(mode="json")
        (self.path / "run.json").write_text(json.dumps({"recipe": values}))

    def stage(self, name: str, inputs: tuple[str, ...] = (), metrics: Any = None, **files: list[Any]) -> None:
        folder = self.path / name
        folder.mkdir(parents=True)
        for file, records in files.items():
            write_jsonl(folder / f"{file}.jsonl", records)
        drawn = files.get("rationales")
        metrics = metrics or ({"right": sum(r.correct for r in drawn)} if drawn else {})
        record = {"inputs": dict.fromkeys(inputs, ""), "settings": {}, "metrics": metrics, "seconds": 1.0}
        (folder / "done.json").write_text(json.dumps(record))

    def dev(self, name: str, right: range) -> None:
        """A policy that solves some of 100 dev problems."""
        metrics = asdict(Score(name, 100, len(right) / 100, 0, 0, 0, 0, 0, 0))
        self.stage(
            f"score/{name}",
            metrics={"dev": metrics},
            dev=[GradedAnswer(str(i), 0, "", "stop", "", i in right) for i in range(100)],
        )

    def journal(self, *events: dict[str, Any]) -> None:
        lines = [json.dumps({"time": float(i), **event}) for i, event in enumerate(events)]
        (self.path / "events.jsonl").write_text("\n".join(lines) + "\n")

    def dpo_steps(self, *changes: tuple[float, float]) -> None:
        steps = [
            {"kind": "progress", "done": i + 1, "total": len(changes), "unit": "steps",
             "metrics": {"loss": 0.6, "margin": 0.1 * (a - b), "chosen_change": a, "rejected_change": b}}
            for i, (a, b) in enumerate(changes)
        ]  # fmt: skip
        self.journal({"kind": "stage_started", "stage": "round-1/dpo", "resumed": False}, *steps)
