"""The health of a round, from files made by hand: what is counted, and when it alarms."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dpost_lite.problems.records import Answered, LabelledRationale, PreferencePair, Rationale, Score, write_jsonl
from dpost_lite.recipe import load_recipe
from dpost_lite.report import alarms, health
from dpost_lite.report.journal import Span, read_events, spans, steps_by_stage


def rationale(
    problem: str, sample: int, *, correct: bool, ids: Sequence[int] = range(10), end: str = "stop"
) -> Rationale:
    text = f"{problem} {sample}"
    return Rationale(problem, sample, text, tuple(ids), (0,) * len(ids), 0.0, end, "1", correct, 2, 1)  # type: ignore[arg-type]


class Folder:
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
            dev=[Answered(str(i), 0, "", "stop", "", i in right) for i in range(100)],
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
    drawn[-1] = Rationale(**{**asdict(drawn[-1]), "token_ids": tuple(looping) * 20, "forced": (0,) * 80})
    folder.stage("round-1/samples-pairs", rationales=drawn)
    found = health.drawn(folder.path / "round-1/samples-pairs")
    assert (found.all_right, found.mixed, found.all_wrong) == (0.25, 0.25, 0.5)
    assert (found.right, found.unfinished, found.repetitive) == (3 / 8, 1 / 8, 1 / 8)
    assert found.tokens == pytest.approx((6 * 10 + 30) / 7)  # of finished ones
    assert (found.num_rationales, found.calculated, found.refused) == (8, 2, 1)


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
    found = health.paired(folder.path / "round-1/pairs")
    assert (found.num_pairs, found.num_problems, found.chosen_tokens, found.rejected_tokens) == (3, 2, 8, 4)
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
    assert health.preferred([]) is None  # of an older version, without steps in its journal


def test_a_healthy_stage_does_not_alarm(folder) -> None:
    ids = tuple(range(9))
    folder.stage("round-1/samples-pairs", rationales=[rationale("0", s, correct=True) for s in range(200)])
    drawn = [rationale("0", s, correct=True, ids=range(12)) for s in range(9)]
    folder.stage("round-1/samples-labels", inputs=("round-1/dpo", "data"), rationales=drawn)
    folder.stage("round-1/pairs", pairs=[PreferencePair("0", "?", "", "", ids, ids)] * 8)
    folder.stage("round-1/dpo")
    folder.dpo_steps((-1.0, -4.0))
    folder.dev("sft-0", range(30))
    folder.dev("round-1", range(2, 31))
    folder.stage("export")
    for stage in ("data", *(f"round-1/{part}" for part in ("samples-pairs", "samples-labels", "pairs", "dpo")),
                  "score/sft-0", "score/round-1", "export"):  # fmt: skip
        assert alarms.alarms(folder.path, stage) == [], stage


def alarm(folder: Folder, stage: str) -> str:
    (text,) = alarms.alarms(folder.path, stage)
    return text


def draw(folder: Folder, number: int, part: str, *, by_dpo: bool = False, **counts: int) -> str:
    """A sampling stage of 100 rationales of 10 tokens; so many of them cut off, looping, or both."""
    stage = f"round-{number}/samples-{part}"
    drawn = [rationale("0", s, correct=True, ids=range(counts.get("tokens", 10))) for s in range(100)]
    for kind, ids, end in (
        ("cut", range(10), "limit"),
        ("looping", (5,) * 10, "stop"),
        ("rambling", (5,) * 10, "limit"),
    ):
        for _ in range(counts.get(kind, 0)):
            drawn = [*drawn[1:], rationale("0", 0, correct=False, ids=ids, end=end)]
    folder.stage(stage, inputs=("data", f"round-{number}/dpo" if by_dpo else "sft-0"), rationales=drawn)
    return stage


def test_unfinished_rationales_alarm(folder) -> None:
    assert alarms.alarms(folder.path, draw(folder, 1, "pairs", cut=1)) == []
    assert alarm(folder, draw(folder, 2, "pairs", cut=2)) == (
        "2.0% of the rationales ran into the limit of 96 tokens: raise sampling.max_new_tokens"
    )
    assert alarm(folder, draw(folder, 3, "pairs", cut=1, rambling=1)).endswith(
        "tokens: raise sft.epochs or sft.learning_rate"
    )


def test_unfinished_rationales_are_laid_to_dpo_if_they_came_with_it(folder) -> None:
    draw(folder, 1, "pairs", cut=1)
    assert alarm(folder, draw(folder, 1, "labels", by_dpo=True, cut=3)).endswith(
        "lower dpo.learning_rate or raise dpo.beta"
    )
    draw(folder, 2, "pairs", cut=3)
    assert alarm(folder, draw(folder, 2, "labels", by_dpo=True, cut=2)).endswith("raise sampling.max_new_tokens")


def test_a_dpo_that_hardly_did_anything_is_not_to_blame(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps((0.1, 0.1))
    draw(folder, 1, "pairs", cut=1)
    assert alarm(folder, draw(folder, 1, "labels", by_dpo=True, cut=5)).endswith("raise sampling.max_new_tokens")


@pytest.mark.parametrize(
    ("before", "by_dpo", "key"),
    [(0, True, "lower dpo.learning_rate"), (9, True, "raise sft.epochs"), (0, False, "raise sft.epochs")],
)
def test_repetition_alarms_with_the_key_of_what_brought_it(folder, before, by_dpo, key) -> None:
    draw(folder, 1, "pairs", looping=before)
    text = alarm(folder, draw(folder, 1, "labels", by_dpo=by_dpo, looping=3))
    assert text.startswith("3.0% of the rationales say the same again and again: ")
    assert key in text


@pytest.mark.parametrize("tokens", [6, 14])
def test_drifting_lengths_alarm(folder, tokens) -> None:
    draw(folder, 1, "pairs")
    text = alarm(folder, draw(folder, 1, "labels", by_dpo=True, tokens=tokens))
    assert text.startswith(
        f"DPO took finished rationales from 10 tokens to {tokens}: lower dpo.learning_rate or raise dpo."
    )
    assert "dpo.loss=sigmoid_norm" in text
    folder.recipe("dpo.loss=sigmoid_norm")
    assert "sigmoid_norm" not in alarm(folder, "round-1/samples-labels")
    assert alarms.alarms(folder.path, draw(folder, 2, "pairs")) == []  # what SFT drew is held against what SFT drew
    assert alarm(folder, draw(folder, 3, "pairs", tokens=tokens)).startswith(
        "this round took finished rationales from 10"
    )


def test_rounds_beyond_the_ninth_come_after_it(folder) -> None:
    for number, tokens in ((1, 20), (9, 10), (10, 20)):
        draw(folder, number, "labels", tokens=tokens)
    assert "from 10 tokens to 20" in alarm(folder, "round-10/samples-labels")
    (folder.path / "round-1-copy").mkdir()
    (folder.path / "round-1" / "samples-labels").rename(folder.path / "round-1-copy" / "samples-labels")
    assert [one.number for one in health.rounds(folder.path)] == [9, 10]


def test_too_few_pairs_alarm(folder) -> None:
    folder.recipe("dpo.batch_size=8", "dpo.max_steps=100")
    folder.stage("round-1/pairs", pairs=[PreferencePair("0", "?", "", "", (1,), (2,))] * 20)
    assert alarm(folder, "round-1/pairs").startswith("20 pairs make 3 of dpo.max_steps=100: raise sampling.samples_for")


def test_a_falling_chosen_log_probability_alarms(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps((0.0, 0.0), (-9.04, -30.0))
    assert alarm(folder, "round-1/dpo") == (
        "the log-probability of chosen rationales fell by 9.0 nats, that of rejected ones changed by -30.0: "
        "lower dpo.learning_rate or set dpo.nll_weight"
    )


def test_a_dpo_that_hardly_does_anything_alarms(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps((0.2, -0.6))
    assert alarm(folder, "round-1/dpo") == (
        "DPO moved the log-probabilities of chosen and rejected rationales only 0.8 nats apart: raise "
        "dpo.learning_rate or dpo.max_steps"
    )


def test_a_falling_dev_accuracy_alarms(folder) -> None:
    """Against the best so far, and beyond what the problems that both answered allow."""
    folder.stage("score/base", metrics={"dev": asdict(Score("base", 100, 0.9, 0, 0, 0, 0, 0, 0))})
    for name, right in (("sft-0", range(30)), ("round-1", range(40)), ("round-2", range(37)), ("round-3", range(34))):
        folder.dev(name, right)
        assert len(alarms.alarms(folder.path, f"score/{name}")) == (name == "round-3"), name
    assert alarms.alarms(folder.path, "score/base") == []
    assert alarm(folder, "score/round-3") == (
        "accuracy on the dev problems fell from 40.0% (round-1) to 34.0%: set patience=1 to stop where it falls, or "
        "lower sft.epochs"
    )
    folder.recipe("patience=1")
    assert alarm(folder, "score/round-3").endswith("to 34.0%: lower sft.epochs")


def test_a_stage_alarms_once_when_it_ends(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps((-9.0, -9.0))
    told = []
    look = alarms.watch(folder.path, lambda kind, **fields: told.append((kind, fields["stage"])))
    for kind in ("stage_started", "stage_finished", "stage_skipped"):
        look({"kind": kind, "stage": "round-1/dpo"})
    assert told == [("alarm", "round-1/dpo")]


def test_what_cannot_be_told_does_not_end_a_run(folder) -> None:
    folder.stage("round-1/pairs")  # its file is missing
    told = []
    alarms.watch(folder.path, lambda kind, **fields: told.append((kind, fields["text"])))(
        {"kind": "stage_finished", "stage": "round-1/pairs"}
    )
    ((kind, text),) = told
    assert kind == "notice"
    assert text.startswith("round-1/pairs: its health could not be told (FileNotFoundError: ")


def test_the_journal_s_steps_and_times(folder) -> None:
    def step(done: int, loss: float) -> dict[str, Any]:
        return {"kind": "progress", "done": done, "total": 3, "unit": "steps", "metrics": {"loss": loss}}

    folder.journal(
        {"kind": "stage_started", "stage": "sft-0", "resumed": False}, step(1, 9.0),  # killed, and begun anew
        {"kind": "notice", "text": "put aside"},
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
