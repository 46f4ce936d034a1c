"""The journal of a run, read again: steps and times of trainings that were stopped and gone on with."""

from typing import Any

from run_folder import RunFolder

from dpost_lite.runs.journal import Span, read_events, spans, steps_by_stage


def test_steps_and_times(tmp_path) -> None:
    folder = RunFolder(tmp_path)

    def step(done: int, loss: float) -> dict[str, Any]:
        return {"kind": "progress", "done": done, "total": 3, "unit": "steps", "metrics": {"loss": loss}}

    folder.journal(
        {"kind": "stage_started", "stage": "sft-0", "resumed": False}, step(1, 9.0),  # killed, and started again
        {"kind": "notice", "text": "archived"},
        {"kind": "stage_started", "stage": "sft-0", "resumed": False}, step(1, 3.0), step(2, 2.5),
        {"kind": "stage_stopped", "stage": "sft-0"},
        {"kind": "stage_started", "stage": "sft-0", "resumed": True}, step(2, 2.0), step(3, 1.0),
        {"kind": "stage_finished", "stage": "sft-0", "seconds": 5.0, "metrics": {}},
        {"kind": "stage_skipped", "stage": "data", "seconds": 1.0, "metrics": {}},
    )  # fmt: skip
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('{"kind": "noti')  # the disk was full
    events = list(read_events(folder.path))
    assert steps_by_stage(events) == {
        "sft-0": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    }
    assert spans(events) == [
        Span("sft-0", 0.0, 1.0, finished=False), Span("sft-0", 3.0, 6.0, finished=False),
        Span("sft-0", 7.0, 10.0, finished=True),
    ]  # fmt: skip
    assert list(read_events(folder.path / "data")) == []
