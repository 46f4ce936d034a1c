"""The clock of a run: an estimate first, then what was measured, both in the journal."""

import pytest

from dpost_lite.planner.device import Device
from dpost_lite.planner.eta import CALIBRATION_S, Clock
from dpost_lite.planner.pace import Estimate
from dpost_lite.planner.plan import Plan, find_shape

SECONDS = {"data": 0, "score/base": 50, "sft-0": 600, "score/sft-0": 50, "round-1/sft": 1200, "score/round-1": 50}


@pytest.fixture
def told():
    return []


@pytest.fixture
def clock(told):
    device = Device("cpu", 1e9, 4, 1e11, 1e10, "measured here")
    estimates = {name: Estimate(1, seconds) for name, seconds in SECONDS.items()}
    plan = Plan(find_shape("HuggingFaceTB/SmolLM2-135M"), device, (), estimates)
    return Clock(plan, lambda kind, **fields: told.append({"kind": kind, **fields}))


def start(stage, time):
    return {"kind": "stage_started", "stage": stage, "time": time}


def step(done, total, time):
    return {"kind": "progress", "done": done, "total": total, "time": time}


def finish(stage, seconds, kind="stage_finished"):
    return {"kind": kind, "stage": stage, "seconds": seconds, "time": 0}


def test_the_plan_is_told_when_the_first_stage_begins(clock, told):
    clock(finish("data", 3, "stage_skipped"))
    assert told == []  # a run of which all is done needs none
    clock(start("score/base", 5))
    assert told[0]["kind"] == "planned"
    assert told[0]["seconds"] == sum(SECONDS.values())
    assert told[0]["stages"]["sft-0"] == {"tokens": 1, "seconds": 600}
    assert [event["kind"] for event in told] == ["planned", "time_left"]
    clock(start("sft-0", 60))
    assert [event["kind"] for event in told] == ["planned", "time_left", "time_left"]


def test_two_minutes_of_steps_replace_the_estimate(clock, told):
    clock(start("sft-0", 1000))
    clock(step(1, 100, 1020))  # loading took 20 s
    clock(step(11, 100, 1020 + CALIBRATION_S - 1))
    assert len(told) == 2
    clock(step(13, 100, 1020 + CALIBRATION_S))  # 10 s a step
    (calibrated,) = told[2:]
    assert calibrated["stage"] == "sft-0"
    assert calibrated["planned"] == 600
    assert calibrated["expected"] == pytest.approx(20 + 120 + 870)
    ratio = 1010 / 600  # for all that is to come, since nothing else is known
    assert calibrated["seconds"] == pytest.approx(870 + ratio * (50 + 1200 + 50), abs=1)
    clock(step(30, 100, 1300))
    assert len(told) == 3  # once a stage


def test_each_kind_of_stage_keeps_its_own_pace(clock, told):
    clock(start("score/base", 0))
    clock(finish("score/base", 25))
    clock(start("sft-0", 30))
    clock(finish("sft-0", 900))
    clock(start("score/sft-0", 930))
    assert told[-1]["seconds"] == 2 * 25 + 1800
    assert "stage" not in told[-1]


def test_stages_done_earlier_count(clock, told):
    clock(finish("score/base", 100, "stage_skipped"))
    clock(finish("sft-0", 600, "stage_skipped"))
    assert told == []
    clock(start("score/sft-0", 0))
    assert told[-1]["seconds"] == 100 + 1200 + 100
    clock(finish("score/sft-0", 100))
    clock(start("round-1/sft", 100))
    assert told[-1]["seconds"] == 1200 + 100


def test_stages_that_are_left_out_are_not_waited_for(clock, told):
    clock(start("score/base", 0))
    clock(finish("score/base", 50))
    clock(start("score/round-1", 50))
    assert told[-1]["seconds"] == 50


def test_a_second_part_of_a_stage_counts_from_its_own_start(clock, told):
    clock(start("score/sft-0", 0))
    clock(step(1, 200, 5))
    clock(step(190, 200, 10))
    clock(step(1, 200, 60))
    clock(step(101, 200, 60 + CALIBRATION_S))
    assert told[-1]["expected"] == pytest.approx(180 + 99 * 1.2)


def test_a_stage_that_was_stopped_says_nothing_about_the_others(clock, told):
    clock({**start("sft-0", 0), "resumed": True})
    clock(finish("sft-0", 6))
    clock(start("round-1/sft", 10))
    assert told[-1]["seconds"] == 1200 + 50


def test_stages_that_take_no_time_teach_nothing(clock, told):
    clock(start("data", 0))
    clock(finish("data", 3))
    clock(start("score/base", 3))
    assert told[-1]["seconds"] == sum(SECONDS.values())
