"""What alarms, with which words and which key, and what does not."""

from dataclasses import asdict

import pytest
from run_folder import RunFolder, rationale

from dpost_lite.problems.gate import Yields
from dpost_lite.problems.records import PreferencePair, Score
from dpost_lite.report import alarms, health


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


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


def alarm(folder: RunFolder, stage: str) -> str:
    (text,) = alarms.alarms(folder.path, stage)
    return text


def draw(folder: RunFolder, number: int, part: str, *, by_dpo: bool = False, **counts: int) -> str:
    """A sampling stage of 1,000 rationales of 10 tokens; so many percent of them cut off, looping, or both."""
    stage = f"round-{number}/samples-{part}"
    drawn = [rationale("0", s, correct=True, ids=range(counts.get("tokens", 10))) for s in range(1000)]
    for kind, ids, end in (
        ("cut", range(10), "limit"),
        ("looping", (5,) * 10, "stop"),
        ("rambling", (5,) * 10, "limit"),
    ):
        share = [rationale("0", 0, correct=False, ids=ids, end=end)] * 10 * counts.get(kind, 0)
        drawn = [*drawn[len(share) :], *share]
    folder.stage(stage, inputs=("data", f"round-{number}/dpo" if by_dpo else "sft-0"), rationales=drawn)
    return stage


def test_unfinished_rationales_alarm(folder) -> None:
    assert alarms.alarms(folder.path, draw(folder, 1, "pairs", cut=1)) == []
    assert alarm(folder, draw(folder, 2, "pairs", cut=2)) == (
        "2.0% of the rationales hit the limit of 96 tokens: raise sampling.max_new_tokens"
    )
    assert alarm(folder, draw(folder, 3, "pairs", cut=1, rambling=1)).endswith(
        "tokens: raise sft.epochs or sft.learning_rate"
    )


def test_few_rationales_do_not_alarm_by_chance(folder) -> None:
    ended = [rationale("0", s, correct=True) for s in range(376)]
    cut = [rationale("0", s, correct=False, end="limit") for s in range(8)]
    folder.stage("round-1/samples-pairs", rationales=ended + cut[:4])
    folder.stage("round-2/samples-pairs", rationales=ended + cut)
    looping = [rationale("0", s, correct=False, ids=(5,) * 10, end="stop") for s in range(9)]  # 2.3 %
    folder.stage("round-3/samples-pairs", rationales=ended[9:] + looping)
    folder.stage("round-4/samples-pairs", rationales=ended[:19] + cut[:1])
    for number in (1, 3, 4):
        assert alarms.alarms(folder.path, f"round-{number}/samples-pairs") == []
    assert alarm(folder, "round-2/samples-pairs").startswith("2.1% of the rationales hit the limit")


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
    assert text.startswith("3.0% of the rationales repeat themselves: ")
    assert key in text


@pytest.mark.parametrize("tokens", [6, 14])
def test_drifting_lengths_alarm(folder, tokens) -> None:
    draw(folder, 1, "pairs")
    text = alarm(folder, draw(folder, 1, "labels", by_dpo=True, tokens=tokens))
    assert text.startswith(
        f"DPO changed the mean rationale from 10 to {tokens} tokens: lower dpo.learning_rate or raise dpo."
    )
    assert "dpo.loss=sigmoid_norm" in text
    folder.recipe("dpo.loss=sigmoid_norm")
    assert "sigmoid_norm" not in alarm(folder, "round-1/samples-labels")
    assert alarms.alarms(folder.path, draw(folder, 2, "pairs")) == []  # SFT samples are compared with SFT samples
    assert alarm(folder, draw(folder, 3, "pairs", tokens=tokens)).startswith(
        "this round changed the mean rationale from 10"
    )


def test_rounds_beyond_the_ninth_come_after_it(folder) -> None:
    for number, tokens in ((1, 20), (9, 10), (10, 20)):
        draw(folder, number, "labels", tokens=tokens)
    assert "from 10 to 20 tokens" in alarm(folder, "round-10/samples-labels")
    (folder.path / "round-1-copy").mkdir()
    (folder.path / "round-1" / "samples-labels").rename(folder.path / "round-1-copy" / "samples-labels")
    assert [one.number for one in health.rounds(folder.path)] == [9, 10]


def test_too_few_pairs_alarm(folder) -> None:
    folder.recipe("dpo.batch_size=8", "dpo.max_steps=100")
    folder.stage("round-1/pairs", pairs=[PreferencePair("0", "?", "", "", (1,), (2,))] * 20)
    assert alarm(folder, "round-1/pairs").startswith(
        "20 pairs are enough for 3 of dpo.max_steps=100: raise sampling.samples_for"
    )


def test_too_few_step_controlled_pairs_alarm_with_their_own_keys(folder) -> None:
    folder.recipe("dpo.batch_size=8", "dpo.max_steps=100", "pairs.stepwise=0.5")
    folder.stage("round-1/pairs", pairs=[PreferencePair("0", "?", "", "", (1,), (2,), "a", (3,))] * 20)
    assert alarm(folder, "round-1/pairs").endswith(
        "100: set rests.cut=every, raise sampling.samples_for_pairs, raise dpo.epochs, or lower dpo.batch_size"
    )


def test_a_falling_chosen_log_probability_alarms(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps((0.0, 0.0), (-9.04, -30.0))
    assert alarm(folder, "round-1/dpo") == (
        "the log-probability of chosen rationales dropped by 9.0 nats (rejected: -30.0): "
        "lower dpo.learning_rate or set dpo.nll_weight"
    )


def test_a_dpo_that_hardly_does_anything_alarms(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps((0.1, -0.1))
    assert alarm(folder, "round-1/dpo") == (
        "DPO separated the log-probabilities of chosen and rejected rationales by only 0.2 nats: raise "
        "dpo.learning_rate, dpo.epochs or dpo.max_steps"
    )


def test_a_dpo_that_was_stopped_alarms(folder) -> None:
    folder.recipe("dpo.max_logp_drop=3")
    folder.stage("round-1/dpo", metrics={"ended_early": True, "restored": True})
    folder.dpo_steps((0.0, 0.0), (-1.0, -4.25))
    assert alarm(folder, "round-1/dpo") == (
        "DPO was stopped after step 2, and went back to the last good weights: its rationales had lost "
        "more than dpo.max_logp_drop=3 nats: lower dpo.learning_rate or raise dpo.beta"
    )


@pytest.mark.parametrize(("high", "alarms_"), [(0.0, False), (0.1, False), (-0.01, True)])
def test_a_dpo_that_lowers_what_is_drawn_alarms(folder, high, alarms_) -> None:
    found = asdict(Yields(64, 90, 70, -0.3, -0.5, high))
    folder.stage("round-1/gate", metrics={"goes_on_with": "sft", **found})
    expected = (
        "DPO lowered the distinct right rationales for 64 problems from 90 to 70, so the round goes on without it: "
        "lower dpo.learning_rate or raise dpo.beta"
    )
    assert alarms.alarms(folder.path, "round-1/gate") == [expected] * alarms_


def test_a_round_without_dpo_is_compared_with_draws_of_an_sft_policy(folder) -> None:
    draw(folder, 1, "pairs", tokens=20)
    draw(folder, 1, "labels", by_dpo=True, tokens=10)
    draw(folder, 2, "pairs", tokens=20)
    assert alarms.alarms(folder.path, draw(folder, 2, "labels", tokens=20)) == []


def test_a_falling_dev_accuracy_alarms(folder) -> None:
    """Against the best so far, and beyond what the problems that both answered allow."""
    folder.stage("score/base", metrics={"dev": asdict(Score("base", 100, 0.9, 0, 0, 0, 0, 0, 0))})
    for name, right in (("sft-0", range(30)), ("round-1", range(40)), ("round-2", range(37)), ("round-3", range(34))):
        folder.dev(name, right)
        assert len(alarms.alarms(folder.path, f"score/{name}")) == (name == "round-3"), name
    assert alarms.alarms(folder.path, "score/base") == []
    assert alarm(folder, "score/round-3") == (
        "dev accuracy dropped from 40.0% (round-1) to 34.0%: set patience=1 to stop at a drop, or lower sft.epochs"
    )
    folder.recipe("patience=1")
    assert alarm(folder, "score/round-3").endswith("to 34.0%: lower sft.epochs")
    folder.recipe("method=scdpo")  # which has no rounds
    assert alarm(folder, "score/round-3").endswith("to 34.0%: lower dpo.learning_rate or raise dpo.beta")


def test_a_stage_alarms_once_when_it_ends(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps((-9.0, -9.0))
    told = []
    look = alarms.watch(folder.path, lambda kind, **fields: told.append((kind, fields["stage"])))
    for kind in ("stage_started", "stage_finished", "stage_skipped"):
        look({"kind": kind, "stage": "round-1/dpo"})
    assert told == [("alarm", "round-1/dpo")]


def test_a_failing_check_does_not_end_a_run(folder) -> None:
    folder.stage("round-1/pairs")  # its file is missing
    told = []
    alarms.watch(folder.path, lambda kind, **fields: told.append((kind, fields["text"])))(
        {"kind": "stage_finished", "stage": "round-1/pairs"}
    )
    ((kind, text),) = told
    assert kind == "notice"
    assert text.startswith("round-1/pairs: alarms could not be checked (FileNotFoundError: ")
