"""The view of a run's events, plain and live, and the summary at its end."""

import io
from typing import Any

import pytest
from rich.console import Console

from dpost_lite.methods import METHODS
from dpost_lite.problems.comparing import compare
from dpost_lite.problems.records import SampledScore, Score
from dpost_lite.report import summary
from dpost_lite.report.terminal import PLAIN_INTERVAL_S, TerminalView, as_figures, as_time, printable

PLAN = ["data", "sft-0", "score/sft-0", "round-1/sft", "score/round-1"]


class Screen:
    """A console on a string, a clock that the test moves, and the view on both."""

    def __init__(self, *, is_terminal: bool, stages: list[str] | None = None) -> None:
        self.now = 1000.0
        self._file = io.StringIO()
        console = Console(file=self._file, force_terminal=is_terminal, width=120, color_system=None)
        self.view = TerminalView(console, clock=lambda: self.now, stages=stages or [])

    def tell(self, kind: str, **fields: Any) -> None:
        self.view({"time": 0, "kind": kind, **fields})

    def progress(self, done: int, total: int = 100, **metrics: float) -> None:
        self.tell("progress", done=done, total=total, unit="steps", metrics=metrics)

    @property
    def text(self) -> str:
        return self._file.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def block(self) -> str:
        """What the live part of the screen holds now."""
        console = Console(file=io.StringIO(), width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.view._block())
        return capture.get()


def a_score(name: str, strict: float, num_problems: int = 200, **fields: Any) -> Score:
    from dpost_lite.problems.grading import wilson_interval

    low, high = wilson_interval(round(strict * num_problems), num_problems)
    return Score(name, num_problems, strict, strict, low, high, 0, 0, 0, **fields)


def test_plain_lines_for_starts_ends_and_notices() -> None:
    screen = Screen(is_terminal=False, stages=PLAN)
    with screen.view:
        screen.tell("stage_skipped", stage="data", metrics={"train": 1240, "labelled": 80})
        screen.tell("stage_started", stage="sft-0")
        screen.tell("notice", text="something to know")
        screen.tell("alarm", stage="data", text="too few problems: add some")
        screen.tell("stage_finished", stage="sft-0", seconds=83.2, metrics={"num_rationales": 80, "last_loss": 0.12345})
    assert screen.lines == [
        "data: already done: train 1,240, labelled 80",
        "sft-0: started (stage 2 of 5)",
        "note: something to know",
        "alarm: data: too few problems: add some",
        "sft-0: finished in 1:23: rationales 80, last loss 0.123",
    ]


def test_plain_progress_is_at_most_one_line_in_ten_seconds() -> None:
    screen = Screen(is_terminal=False)
    screen.tell("stage_started", stage="sft-0")
    for second in range(1, 61):
        screen.now += 1
        screen.progress(second, loss=1.5)
    progress = screen.lines[1:]
    assert len(progress) == 60 / PLAIN_INTERVAL_S
    assert progress[-1] == "sft-0: 60/100 steps, 1/s, 0:40 left, loss 1.5"


def test_plain_output_is_not_wrapped_and_holds_no_escape() -> None:
    screen = Screen(is_terminal=False)
    screen.tell("notice", text="word " * 100)
    assert len(screen.lines) == 1
    assert "\x1b" not in screen.text


def test_rate_leaves_out_the_time_before_the_first_progress() -> None:
    screen = Screen(is_terminal=False)
    screen.tell("stage_started", stage="sft-0")
    screen.now += 500  # the model is being loaded
    screen.progress(10)
    screen.now += 20
    screen.progress(20)
    assert screen.lines[-1] == "sft-0: 20/100 steps, 0.5/s, 2:40 left"


def test_a_second_part_of_a_stage_counts_from_its_own_start() -> None:
    screen = Screen(is_terminal=False)
    screen.tell("stage_started", stage="score/base")
    for done in (50, 100, 5, 25):  # dev, then test
        screen.now += 20
        screen.progress(done)
    assert screen.lines[-1] == "score/base: 25/100 steps, 1/s, 1:15 left"


def test_slow_units_are_shown_in_seconds_each() -> None:
    screen = Screen(is_terminal=False)
    screen.tell("stage_started", stage="dpo")
    screen.progress(1)
    screen.now += 30
    screen.progress(2, total=4)
    assert screen.lines[-1] == "dpo: 2/4 steps, 30 s each, 1:00 left"


def test_live_block_shows_stage_bar_rate_time_left_metrics_and_place() -> None:
    screen = Screen(is_terminal=True, stages=PLAN)
    screen.tell("stage_started", stage="sft-0")
    screen.now += 10
    screen.progress(20, loss=2.0)
    screen.now += 10
    screen.progress(40, loss=1.25)
    block = screen.block()
    assert "▶ sft-0" in block
    assert "━" in block
    assert "40/100 steps, 2/s, 0:30 left" in block
    assert "loss 1.25" in block
    assert "0:20 elapsed (stage 2 of 5)" in block
    screen.now += 12
    assert "0:18 left" in screen.block()  # it counts down between two events


def test_time_to_go_is_the_plans_then_what_was_measured() -> None:
    screen = Screen(is_terminal=True, stages=PLAN)
    screen.tell("stage_started", stage="sft-0")
    screen.tell("planned", seconds=700, rates="measured here")
    assert "ETA" not in screen.block() + screen.text  # nobody has said: all may be done already
    screen.tell("time_left", seconds=600)
    assert screen.lines[-1] == "ETA 10:00 (measured here)"
    screen.now += 100
    assert "ETA 8:20" in screen.block()
    screen.tell("time_left", seconds=700, stage="sft-0", planned=300.0, expected=420.0)
    assert screen.lines[-1] == "ETA 11:40: sft-0 takes 7:00, planned 5:00"
    screen.now += 10
    assert "ETA 11:30" in screen.block()
    screen.tell("time_left", seconds=60)
    assert "ETA 1:00" in screen.block()
    assert "11:40" in screen.lines[-1]  # at a stage's end nothing is added


def test_live_view_leaves_finished_stages_on_the_screen() -> None:
    screen = Screen(is_terminal=True, stages=PLAN)
    with screen.view:
        screen.tell("stage_skipped", stage="data", metrics={"train": 240})
        screen.tell("stage_started", stage="sft-0")
        screen.progress(3)
        screen.tell("stage_finished", stage="sft-0", seconds=5, metrics={"steps": 3})
    assert "· data" in screen.text
    assert "✓ sft-0" in screen.text
    assert "steps 3" in screen.text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_text_of_strangers_is_neither_markup_nor_control(is_terminal: bool) -> None:
    screen = Screen(is_terminal=is_terminal)
    screen.tell("notice", text="[bold]loud[/bold] \x1b[2J\x07 [/]")
    assert "[bold]loud[/bold] �[2J� [/]" in screen.text
    assert "\x1b[2J" not in screen.text


def test_printable_keeps_lines_and_letters() -> None:
    assert printable("½ × 3\n\tés ✓") == "½ × 3\n\tés ✓"
    assert printable("\x9b31m\r\ud800\x00") == "�31m���"


def test_an_unknown_event_and_stray_progress_are_passed_over() -> None:
    screen = Screen(is_terminal=False)
    screen.tell("of_a_later_version", stage="x")
    screen.progress(1)
    assert screen.text == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (86461, "24:01:01")])
def test_as_time(seconds: float, text: str) -> None:
    assert as_time(seconds) == text


def test_figures_of_a_score_an_export_and_a_share() -> None:
    score = {"strict": 0.31, "low": 0.25, "high": 0.377, "num_problems": 200}
    assert as_figures({"test": score}) == "test 31.0% right (25.0% to 37.7%) of 200"
    assert as_figures({"file": "a.gguf", "bytes": 105 * 2**20, "last_margin": None}) == "file a.gguf, bytes 105 MiB"
    assert as_figures({"right": 0.314}) == "right 31%"
    assert as_figures({"right": 12}) == "right 12"
    assert as_figures({"dev": 0.5, "dev_draws": {"num_problems": 2}}) == "dev 0.5"  # for the report


def test_score_table_has_a_row_for_each_score() -> None:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        console.print(summary.score_table([a_score("base", 0.0), a_score("[b]odd", 0.25, calculator=False)]))
    start_of_header, header, base, odd = capture.get().splitlines()
    assert start_of_header.split() == ["95", "%"]
    assert header.split() == ["calculator", "strict", "interval", "flexible", "unfinished", "n"]
    assert base.split() == ["base", "on", "0.0%", "0.0–1.9%", "0.0%", "0", "200"]
    assert odd.split()[:3] == ["[b]odd", "off", "25.0%"]


def test_score_table_keeps_each_figure_whole_on_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(summary.score_table([a_score("an-owner/a-model-with-a-long-name", 0.25)]))
    assert "25.0%  19.5–31.4%     25.0%           0  200" in capture.get()


@pytest.mark.parametrize(
    ("won", "lost", "said", "is_chance"),
    [
        (30, 30, "did not help (round-1 is at 30.0%, sft-0 at 30.0%; 95 % interval -", False),
        (10, 30, "did not help (round-1 is at 20.0%", False),
        (35, 25, "gained 5.0 points (round-1 is at 35.0%, sft-0 at 30.0%", True),
        (40, 2, "gained 19.0 points (round-1 is at 49.0%", False),
        (4, 0, "gained 2.0 points (round-1 is at 32.0%, sft-0 at 30.0%; 95 % interval +0.5", True),
    ],
)
def test_the_verdict_goes_by_the_problems_that_both_answered(won: int, lost: int, said: str, is_chance: bool) -> None:
    """60 of 200 are solved by sft-0; the last round wins some and loses some of them."""
    before = {str(i): i < 60 for i in range(200)}
    after = {str(i): lost <= i < 60 + won for i in range(200)}
    text = summary.verdict("round-1", compare(before, after), METHODS["dpo-st"])
    assert said in text
    assert "by paired bootstrap, McNemar p = " in text
    assert ("may be chance" in text) == is_chance


def test_a_further_test_set_has_its_table_and_sentence() -> None:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(summary.also_table("svamp", [a_score("sft-0", 0.0), a_score("round-1", 0.25)]))
    _, header, _, row = capture.get().splitlines()
    assert header.split() == ["svamp", "strict", "interval", "flexible", "n"]
    assert row.split() == ["round-1", "25.0%", "19.5–31.4%", "25.0%", "200"]
    gained = compare({str(i): False for i in range(9)}, {str(i): True for i in range(9)})
    assert summary.verdict("round-1", gained, METHODS["st"], part="svamp").startswith(
        "On svamp, self-training gained 100.0 points ("
    )


@pytest.mark.parametrize(
    ("strict", "end", "mark"), [("42.0", "stop", "✓"), ("41", "stop", "✗"), (None, "stop", "✗"), ("42", "limit", "✗")]
)
def test_a_solved_problem_is_marked_against_the_known_answer(strict: str | None, end: str, mark: str) -> None:
    solution = {"text": "[b]It is[/b] 42.\n#### 42", "strict": strict, "end": end}
    text = summary.solved_problem({"question": "How many?", "answer": "42", "solution": solution}).plain
    assert text.splitlines()[1:-1] == ["How many?", "[b]It is[/b] 42.", "#### 42"]
    assert text.splitlines()[-1].startswith(f"{mark} the answer is 42")


def test_a_fall_on_the_dev_problems_is_told_with_what_was_exported() -> None:
    rounds = [a_score("sft-0", 0.30), a_score("round-1", 0.35), a_score("round-2", 0.32)]
    assert summary.dev_drop(rounds) == (
        "Dev accuracy dropped from 35.0% (round-1) to 32.0% (round-2); round-1 is the best policy."
    )
    assert (
        summary.dev_drop(rounds[:2])
        == summary.dev_drop([])
        == summary.dev_drop([*rounds, a_score("round-3", 0.35)])
        == ""
    )


def test_what_answers_were_like_fits_into_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(summary.answers_table([a_score("round-1", 0.25, num_unparsed=7, num_characters=20_000)]))
    *_, header, row = capture.get().splitlines()
    assert "calculator" in header
    assert row.split() == ["round-1", "on", "7", "0.0", "0.0", "100"]


def test_samples_have_a_column_for_each_k() -> None:
    console = Console(file=io.StringIO(), width=80)
    scored = SampledScore("round-1", 200, 8, {1: 0.2, 5: 0.4, 8: 0.45}, 0.31, calculator=False)
    with console.capture() as capture:
        console.print(summary.samples_table([scored]))
    header, row = capture.get().splitlines()
    assert header.split() == ["calculator", "pass@1", "pass@5", "pass@8", "maj@8", "n"]
    assert row.split() == ["round-1", "off", "20.0%", "40.0%", "45.0%", "31.0%", "200"]


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_methods_stand_side_by_side(num_seeds) -> None:
    console = Console(file=io.StringIO(), width=100)
    rates = {"dpo-st": (0.35, 0.45), "st": (0.30, 0.30)}
    runs = [(method, seed, a_score("round-1", rates[method][seed])) for seed in range(num_seeds) for method in rates]
    with console.capture() as capture:
        console.print(summary.methods_table(runs))
    row = next(line.split() for line in capture.get().splitlines() if line.startswith("dpo-st"))
    assert (
        row
        == [
            ["dpo-st", "35.0%", "28.7–41.8%", "200"],
            ["dpo-st", "35.0%", "45.0%", "40.0%", "7.1", "200"],
        ][num_seeds - 1]
    )
    one = compare({"1": True, "2": False}, {"1": True, "2": True})
    told = summary.method_difference("st", "dpo-st", [one] * num_seeds)
    assert told.startswith("dpo-st - st: +50.0 points")
    assert ("on average over 2 seeds, 95 % interval +50.0 to +50.0 (for other" in told) == (num_seeds == 2)
    assert ("or +0.0 to +100.0 (for these seeds" in told) == (num_seeds == 2)
    assert ("by seed +50.0 (p = 1), +50.0 (p = 1), p by McNemar's exact test" in told) == (num_seeds == 2)
