"""The estimated time of a run: an estimate first, then what was measured, both in the journal."""

import pytest

from dpost_lite.planner.device import Device
from dpost_lite.planner.eta import CALIBRATION_S, Eta
from dpost_lite.planner.pace import Estimate
from dpost_lite.planner.plan import Plan, find_shape
from dpost_lite.runs.stage_names import StageName

SECONDS = {"data": 0, "score/base": 50, "sft-0": 600, "score/sft-0": 50, "round-1/sft": 1200, "score/round-1": 50}


@pytest.fixture
def told():
    return []


@pytest.fixture
def eta(told):
    device = Device("cpu", 1e9, 4, 1e11, 1e10, "measured here")
    estimates = {StageName.parse(name): Estimate(1, seconds) for name, seconds in SECONDS.items()}
    plan = Plan(find_shape("HuggingFaceTB/SmolLM2-135M"), device, (), estimates)
    return Eta(plan, lambda kind, **fields: told.append({"kind": kind, **fields}))


def start(stage, time):
    return {"kind": "stage_started", "stage": stage, "time": time}


def step(done, total, time):
    return {"kind": "progress", "done": done, "total": total, "time": time}


def finish(stage, seconds, kind="stage_finished"):
    return {"kind": kind, "stage": stage, "seconds": seconds, "time": 0}


def test_the_plan_is_told_when_the_first_stage_begins(eta, told):
    eta(finish("data", 3, "stage_skipped"))
    assert told == []  # a run of which all is done needs none
    eta(start("score/base", 5))
    assert told[0]["kind"] == "planned"
    assert told[0]["seconds"] == sum(SECONDS.values())
    assert told[0]["stages"]["sft-0"] == {"tokens": 1, "seconds": 600}
    assert [event["kind"] for event in told] == ["planned", "time_left"]
    eta(start("sft-0", 60))
    assert [event["kind"] for event in told] == ["planned", "time_left", "time_left"]


def test_two_minutes_of_steps_replace_the_estimate(eta, told):
    eta(start("sft-0", 1000))
    eta(step(1, 100, 1020))  # loading took 20 s
    eta(step(11, 100, 1020 + CALIBRATION_S - 1))
    assert len(told) == 2
    eta(step(13, 100, 1020 + CALIBRATION_S))  # 10 s a step
    (calibrated,) = told[2:]
    assert calibrated["stage"] == "sft-0"
    assert calibrated["planned"] == 600
    assert calibrated["expected"] == pytest.approx(20 + 120 + 870)
    ratio = 1010 / 600  # for all that is to come, since nothing else is known
    assert calibrated["seconds"] == pytest.approx(870 + ratio * (50 + 1200 + 50), abs=1)
    eta(step(30, 100, 1300))
    assert len(told) == 3  # once a stage


def test_each_kind_of_stage_keeps_its_own_pace(eta, told):
    eta(start("score/base", 0))
    eta(finish("score/base", 25))
    eta(start("sft-0", 30))
    eta(finish("sft-0", 900))
    eta(start("score/sft-0", 930))
    assert told[-1]["seconds"] == 2 * 25 + 1800
    assert "stage" not in told[-1]


def test_stages_done_earlier_count(eta, told):
    eta(finish("score/base", 100, "stage_skipped"))
    eta(finish("sft-0", 600, "stage_skipped"))
    assert told == []
    eta(start("score/sft-0", 0))
    assert told[-1]["seconds"] == 100 + 1200 + 100
    eta(finish("score/sft-0", 100))
    eta(start("round-1/sft", 100))
    assert told[-1]["seconds"] == 1200 + 100


def test_stages_that_are_left_out_are_not_waited_for(eta, told):
    eta(start("score/base", 0))
    eta(finish("score/base", 50))
    eta(start("score/round-1", 50))
    assert told[-1]["seconds"] == 50


def test_a_second_part_of_a_stage_counts_from_its_own_start(eta, told):
    eta(start("score/sft-0", 0))
    eta(step(1, 200, 5))
    eta(step(190, 200, 10))
    eta(step(1, 200, 60))
    eta(step(101, 200, 60 + CALIBRATION_S))
    assert told[-1]["expected"] == pytest.approx(180 + 99 * 1.2)


def test_a_stage_that_was_stopped_says_nothing_about_the_others(eta, told):
    eta({**start("sft-0", 0), "resumed": True})
    eta(finish("sft-0", 6))
    eta(start("round-1/sft", 10))
    assert told[-1]["seconds"] == 1200 + 50


def test_stages_that_take_no_time_teach_nothing(eta, told):
    eta(start("data", 0))
    eta(finish("data", 3))
    eta(start("score/base", 3))
    assert told[-1]["seconds"] == sum(SECONDS.values())
