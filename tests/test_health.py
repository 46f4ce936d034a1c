"""The health of a round, from files made by hand: what is counted, and when it alarms."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpost_lite.problems.records import LabelledRationale, PreferencePair, Problem, Rationale, write_jsonl
from dpost_lite.report import health
from dpost_lite.report.journal import Span, read_events, spans, steps_by_stage


def rationale(problem: str, sample: int, *, correct: bool, ids: range = range(10), end: str = "stop") -> Rationale:
    text = f"{problem} {sample}"
    return Rationale(problem, sample, text, tuple(ids), (0,) * len(ids), 0.0, end, "1", correct, 2, 1)  # type: ignore[arg-type]


class Folder:
    """A run's folder, stage by stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        dpo = {"batch_size": 8, "max_steps": 4}
        (path / "run.json").write_text(json.dumps({"recipe": {"dpo": dpo}}))
        self.stage("data", train=[Problem(str(i), "?", "1") for i in range(4)])

    def stage(self, name: str, inputs: tuple[str, ...] = (), metrics: Any = None, **files: list[Any]) -> None:
        folder = self.path / name
        folder.mkdir(parents=True)
        for file, records in files.items():
            write_jsonl(folder / f"{file}.jsonl", records)
        settings = {"sampling": {"max_new_tokens": 96}}
        record = {"inputs": dict.fromkeys(inputs, ""), "settings": settings, "metrics": metrics or {}, "seconds": 1.0}
        (folder / "done.json").write_text(json.dumps(record))

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


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def test_what_was_drawn_is_counted_by_problem_and_by_rationale(folder) -> None:
    looping = range(10, 14)
    drawn = [
        rationale("0", 0, correct=True), rationale("0", 1, correct=True),
        rationale("1", 0, correct=False), rationale("1", 1, correct=False, ids=range(30)),
        rationale("2", 0, correct=True), rationale("2", 1, correct=False),
        rationale("3", 0, correct=False), rationale("3", 1, correct=False, end="limit"),
    ]  # fmt: skip
    drawn[-1] = Rationale(**{**_fields(drawn[-1]), "token_ids": tuple(looping) * 20, "forced": (0,) * 80})
    folder.stage("round-1/samples-pairs", rationales=drawn)
    found = health.drawn(folder.path, "round-1/samples-pairs")
    assert (found.all_right, found.mixed, found.all_wrong) == (0.25, 0.25, 0.5)
    assert (found.right, found.unfinished, found.repetitive) == (3 / 8, 1 / 8, 1 / 8)
    assert found.tokens == pytest.approx((6 * 10 + 30) / 7)  # of finished ones
    assert (found.num_rationales, found.calculated, found.refused) == (8, 2, 1)


def _fields(record: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(record)


@pytest.mark.parametrize(
    ("ids", "repeats"),
    [((), False), ((1, 2, 3), False), (tuple(range(50)), False), ((7,) * 30, True), ((1, 2, 3, 4, 5) * 2, False),
     ((1, 2, 3, 4, 5) * 4, True)],
)  # fmt: skip
def test_what_repeats_itself(ids, repeats) -> None:
    assert health.is_repetitive(ids) == repeats


def test_pairs_and_labels_are_counted(folder) -> None:
    ids = tuple(range(9))
    pairs = [PreferencePair(p, "?", "yes", "no", ids[:8], ids[:n]) for p, n in (("0", 2), ("0", 4), ("2", 6))]
    folder.stage("round-1/pairs", pairs=pairs)
    found = health.paired(folder.path, "round-1/pairs")
    assert (found.num_pairs, found.per_problem, found.chosen_tokens, found.rejected_tokens) == (3, 1.5, 8, 4)
    gold = LabelledRationale("0", "?", "gold", ids, is_gold=True)
    first, second = (LabelledRationale(p, "?", t, ids, is_gold=False) for p, t in (("1", "a"), ("2", "b")))
    for number in (1, 2):
        drawn = [rationale(p, s, correct=p != "3") for p in "0123" for s in range(number)]
        folder.stage(f"round-{number}/samples-labels", rationales=drawn)
    drawn = [f"round-{number}/samples-labels" for number in (1, 2)]
    folder.stage("round-1/labels", inputs=("data", *drawn[:1]), labels=[gold, first])
    folder.stage("round-2/labels", inputs=("data", *drawn), labels=[gold, first, second])
    one, two = (each.labels for each in health.rounds(folder.path))
    assert (one.num_labels, one.num_gold, one.new_per_problem, one.num_dropped) == (2, 1, 0.25, 2)
    assert (two.num_labels, two.num_gold, two.new_per_problem, two.num_dropped) == (3, 1, 0.25, 7)


def test_what_dpo_did_is_read_from_the_last_fifth_of_its_steps(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps(*[(0.0, 0.0)] * 8, (1.0, -3.0), (2.0, -6.0))
    (one,) = health.rounds(folder.path)
    assert (one.dpo.num_steps, one.dpo.chosen_change, one.dpo.rejected_change) == (10, 1.5, -4.5)
    assert (one.dpo.kl, one.dpo.margin) == (pytest.approx(1.5), pytest.approx(0.6))
    assert health.preferred("round-1/dpo", []) is None  # of an older version, without steps in its journal


def test_a_healthy_stage_does_not_alarm(folder) -> None:
    ids = tuple(range(9))
    folder.stage("round-1/samples-pairs", rationales=[rationale("0", s, correct=True) for s in range(200)])
    folder.stage(
        "round-1/samples-labels", rationales=[rationale("0", s, correct=True, ids=range(12)) for s in range(9)]
    )
    folder.stage("round-1/pairs", pairs=[PreferencePair("0", "?", "", "", ids, ids)] * 8)
    folder.stage("round-1/dpo")
    folder.dpo_steps((-1.0, -4.0))
    folder.stage("score/sft-0", metrics={"dev": {"strict": 0.30, "num_problems": 100}})
    folder.stage("score/round-1", metrics={"dev": {"strict": 0.28, "num_problems": 100}})
    folder.stage("export")
    for stage in ("data", *(f"round-1/{part}" for part in ("samples-pairs", "samples-labels", "pairs", "dpo")),
                  "score/sft-0", "score/round-1", "export"):  # fmt: skip
        assert health.alarms(folder.path, stage) == [], stage


def alarm(folder: Folder, stage: str) -> str:
    (text,) = health.alarms(folder.path, stage)
    return text


def test_unfinished_rationales_alarm(folder) -> None:
    drawn = [rationale("0", s, correct=True, end="limit" if s < 3 else "stop") for s in range(200)]
    folder.stage("round-1/samples-pairs", rationales=drawn)
    assert alarm(folder, "round-1/samples-pairs") == (
        "1.5% of the rationales ran into the limit of 96 tokens: raise sampling.max_new_tokens, or sft.epochs if they "
        "ramble"
    )


@pytest.mark.parametrize(
    ("stage", "key"),
    [("round-1/samples-pairs", "sampling.temperature"), ("round-1/samples-labels", "lower dpo.learning_rate")],
)
def test_repetition_alarms_with_the_key_of_what_trained_the_policy(folder, stage, key) -> None:
    looping = Rationale(**{**_fields(rationale("0", 1, correct=False)), "token_ids": (5,) * 10})
    folder.stage("round-1/samples-pairs", rationales=[rationale("0", 0, correct=True), looping])
    if stage != "round-1/samples-pairs":
        folder.stage(stage, rationales=[rationale("0", 0, correct=True), looping])
    assert alarm(folder, stage).startswith("50.0% of the rationales say the same again and again: ")
    assert key in alarm(folder, stage)


@pytest.mark.parametrize("tokens", [6, 14])
def test_drifting_lengths_alarm(folder, tokens) -> None:
    folder.stage("round-1/samples-pairs", rationales=[rationale("0", 0, correct=True)])
    folder.stage("round-1/samples-labels", rationales=[rationale("0", 0, correct=True, ids=range(tokens))])
    said = alarm(folder, "round-1/samples-labels")
    assert said.startswith(f"finished rationales went from 10 tokens (round-1/samples-pairs) to {tokens}: lower dpo.")
    assert health.alarms(folder.path, "round-1/samples-pairs") == []


def test_rounds_beyond_the_ninth_come_after_it(folder) -> None:
    for number, tokens in ((1, 30), (9, 10), (10, 11)):
        folder.stage(f"round-{number}/samples-labels", rationales=[rationale("0", 0, correct=True, ids=range(tokens))])
    assert health.alarms(folder.path, "round-10/samples-labels") == []
    assert [one.number for one in health.rounds(folder.path)] == [1, 9, 10]


def test_too_few_pairs_alarm(folder) -> None:
    path = folder.path / "run.json"
    path.write_text(json.dumps({"recipe": {"dpo": {"batch_size": 8, "max_steps": 100}}}))
    folder.stage("round-1/pairs", pairs=[PreferencePair("0", "?", "", "", (1,), (2,))] * 20)
    assert alarm(folder, "round-1/pairs").startswith("20 pairs make 3 of dpo.max_steps=100: raise sampling.samples_for")


def test_a_falling_chosen_log_probability_alarms(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps((0.0, 0.0), (-9.04, -30.0))
    assert alarm(folder, "round-1/dpo") == (
        "the log-probability of chosen rationales fell by 9.0 nats, of rejected ones by 30.0: lower dpo.learning_rate "
        "or set dpo.nll_weight"
    )


def test_a_falling_dev_accuracy_alarms(folder) -> None:
    for name, strict in (("base", 0.9), ("sft-0", 0.30), ("round-1", 0.40), ("round-2", 0.32)):
        folder.stage(f"score/{name}", metrics={"dev": {"strict": strict, "num_problems": 100}})
    assert health.alarms(folder.path, "score/round-1") == health.alarms(folder.path, "score/base") == []
    assert alarm(folder, "score/round-2").startswith(
        "accuracy on the dev problems fell from 40.0% (round-1) to 32.0%: set patience=1"
    )


def test_a_stage_alarms_once_when_it_ends(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps((-9.0, -9.0))
    told = []
    look = health.watch(folder.path, lambda kind, **fields: told.append((kind, fields["stage"])))
    for kind in ("stage_started", "stage_finished", "stage_skipped"):
        look({"kind": kind, "stage": "round-1/dpo"})
    assert told == [("alarm", "round-1/dpo")]


def test_the_journal_s_steps_and_times(folder) -> None:
    def step(done: int, loss: float) -> dict[str, Any]:
        return {"kind": "progress", "done": done, "total": 3, "unit": "steps", "metrics": {"loss": loss}}

    folder.journal(
        {"kind": "stage_started", "stage": "sft-0", "resumed": False}, step(1, 9.0),  # stopped, and begun anew
        {"kind": "stage_started", "stage": "sft-0", "resumed": False}, step(1, 3.0), step(2, 2.5),
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
        Span("sft-0", 0.0, 1.0, finished=False), Span("sft-0", 2.0, 4.0, finished=False),
        Span("sft-0", 5.0, 8.0, finished=True),
    ]  # fmt: skip
    assert list(read_events(folder.path / "data")) == []
