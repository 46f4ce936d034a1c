"""The report of a real run: what it shows, and how Chromium renders it, light and dark, wide and on a phone."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpost_lite.cli.app import app
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.records import RewardedRationale, read_jsonl
from dpost_lite.report import results
from dpost_lite.report.examples import diff, marked
from dpost_lite.report.page import write_report
from dpost_lite.report.tables import stages_of
from dpost_lite.runs.folder import read_json, stages_done
from dpost_lite.runs.journal import read_events

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
    "--virtual-time-budget=5000",
)  # fmt: skip
LOOKS = """<!doctype html><iframe src="{page}" style="width:{width}px;height:800px;border:0"></iframe><pre></pre>
<script>
onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, style = (e) => getComputedStyle(e);
  const box = (e) => e.getBoundingClientRect();
  document.querySelector("pre").textContent = JSON.stringify({{
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    ink: style(page.body).color, paper: style(page.body).backgroundColor,
    letters: [...page.querySelectorAll("figure svg text")].map((e) => style(e).fill),
    sizes: [...page.querySelectorAll("figure svg text")].map((e) => box(e).height),
    figures: [...page.querySelectorAll("figure")].map((e) => [e.id, box(e.querySelector("svg")).width]),
    loaded: frame.contentWindow.performance.getEntriesByType("resource").length,
  }});
}};</script>"""
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page(two_methods) -> Path:
    result = CliRunner().invoke(app, ["report", str(two_methods.folders["dpo-st"])])
    assert result.exit_code == 0, result.output
    path = two_methods.folders["dpo-st"] / "report" / "index.html"
    assert f"wrote {path}" in result.stdout
    return path


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_it_shows_what_the_run_s_files_say(two_methods, page) -> None:
    run, text, source = two_methods.folders["dpo-st"], text_of(page), page.read_text(encoding="utf-8")
    for done in run.rglob("done.json"):
        assert f"<td>{done.parent.relative_to(run).as_posix()}</td>" in source
    for name in ("base", "sft-0", "round-1"):
        strict = read_json(run / "score" / name / "done.json")["metrics"]["test"]["strict"]
        assert re.search(rf"{name}\s*{strict:.1%}", text)
    num_pairs = read_json(run / "round-1/pairs/done.json")["metrics"]["pairs"]
    assert f"<td>pairs</td><td>{num_pairs:,}</td>" in source
    assert "not finished yet" not in text
    assert "dpo-st - st: " in text  # its baseline was found beside it
    alarms = [event for event in map(json.loads, (run / "events.jsonl").open()) if event["kind"] == "alarm"]
    assert alarms  # a random model's answers run to the limit
    for alarm in alarms:
        assert f"{alarm['stage']}: {alarm['text']}" in text
        assert f"alarm: {alarm['stage']}: {alarm['text']}" in two_methods.output


def test_memory_stands_beside_what_was_planned_for_each_stage(two_methods) -> None:
    run = two_methods.folders["dpo-st"]
    events = list(read_events(run))
    planned = [event["peak_bytes"] for event in events if event["kind"] == "planned"][-1]
    assert {"sft-0", "score/sft-0", "round-1/samples-pairs", "round-1/dpo", "round-1/sft", "export"} <= planned.keys()
    found = {stage.name: stage.planned_bytes for stage in stages_of(dict(stages_done(run)), events)}
    assert {name: size for name, size in found.items() if size} == planned


def test_the_figures_are_png_files_too(page) -> None:
    names = set(re.findall(r'<figure id="([^"]+)">', page.read_text(encoding="utf-8")))
    assert names == {
        "accuracy", "yield", "sft-loss", "dpo-loss", "dpo-margin", "round-1-dpo-change", "round-1-dpo-logprob", "time",
        "memory", "timeline",
    }  # fmt: skip
    assert {file.stem for file in page.parent.glob("*.png")} == names | {"round-1-rewards"}  # text in the page
    for file in page.parent.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_each_token_of_a_rejected_rationale_tells_its_reward(two_methods, page) -> None:
    run, source = two_methods.folders["dpo-st"], page.read_text(encoding="utf-8")
    found = list(read_jsonl(run / "round-1" / "dpo" / "rewards.jsonl", RewardedRationale))
    assert found
    spans = re.findall(r'<span class="(raised|lowered)" style="--shade: ([\d.]+)" title="([^"]+)">', source)
    rewards = [reward for one in found for reward in one.rewards]
    assert [float(title) for _, _, title in spans] == pytest.approx(rewards, abs=1e-4)
    assert all((side == "raised") == (reward > 0) for (side, _, _), reward in zip(spans, rewards, strict=True))
    assert max(float(shade) for _, shade, _ in spans) == 1
    assert source.count("rejected; the right answer is ") == len(found)


def test_runs_with_rewards_stand_beside_each_other_and_older_ones_have_none(two_methods, tmp_path) -> None:
    for name in ("mine", "theirs"):
        shutil.copytree(two_methods.folders["dpo-st"], tmp_path / name)
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    text = text_of(write_report(mine, tmp_path / "report", [theirs])[0])
    for name in ("mine", "theirs"):
        assert f"{tmp_path.name}/{name}, round 1" in text
    (theirs / "round-1" / "dpo" / "rewards.jsonl").unlink()
    assert f"{tmp_path.name}/theirs, round 1" not in text_of(write_report(mine, tmp_path / "report", [theirs])[0])
    (mine / "round-1" / "dpo" / "rewards.jsonl").unlink()
    (file, *pictures) = write_report(mine, tmp_path / "other", [theirs])
    assert "Token rewards" not in text_of(file)
    assert "round-1-rewards" not in {picture.stem for picture in pictures}


def test_it_is_one_file_that_loads_and_runs_nothing(page) -> None:
    source = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in source
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)|src=|\son\w+=", source)


def test_it_does_not_change_what_verify_checks(two_methods, page) -> None:
    result = CliRunner().invoke(app, ["verify", str(two_methods.folders["dpo-st"])])
    assert result.exit_code == 0, result.output


def test_text_of_strangers_is_no_markup(two_methods, page, tmp_path) -> None:
    run = tmp_path / "<b>run</b> $x_1$"
    shutil.copytree(two_methods.folders["dpo-st"], run)
    answers = run / "score" / "round-1" / "test.jsonl"
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m <<1+1=<b>>>"
    lines = [{**json.loads(line), "text": evil} for line in answers.read_text(encoding="utf-8").splitlines()]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rewards = run / "round-1" / "dpo" / "rewards.jsonl"
    lines = [{**json.loads(line), "question": evil, "kept": evil, "answer": evil} for line in rewards.open()]
    lines = [{**line, "tokens": [evil] * len(line["tokens"])} for line in lines]
    rewards.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (file, *_) = write_report(run, run / "report", [])
    source = file.read_text(encoding="utf-8")
    assert "<script" not in source
    assert "<b>" not in source
    assert "\x1b" not in source
    assert html.escape("<script>alert(1)</script>") in source


def test_an_unfinished_run_has_a_report_too(two_methods, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_methods.folders["st"], run)
    for stage in ("round-1", "score/round-1", "export", "solved"):
        shutil.rmtree(run / stage)
    (file, *pictures) = write_report(run, tmp_path / "report")
    assert "not finished yet" in text_of(file)
    assert {picture.stem for picture in pictures} == {"accuracy", "time", "memory", "timeline"}  # sft-0 was linked
    (run / "events.jsonl").unlink()  # of a run that was copied without its journal
    (file, *_) = write_report(run, tmp_path / "report")
    assert "sft-0" in text_of(file)


def test_a_run_without_a_stage_or_a_wrong_baseline_is_one_line(two_methods, tmp_path) -> None:
    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["report", *arguments])
        assert result.exit_code == 2
        return result.stderr

    assert "is not a run folder (no run.json)" in said(str(tmp_path))
    run = str(two_methods.folders["dpo-st"])
    assert "is not a run folder" in said(run, "--baseline", str(tmp_path))
    other = tmp_path / "other"
    shutil.copytree(two_methods.folders["st"], other)
    (other / "data" / "test.jsonl").write_text('{"id": "1", "question": "another?", "answer": "1"}\n')
    assert "was tested on other problems than" in said(run, "--baseline", str(other))
    shutil.rmtree(other / "export")
    assert "is not finished" in said(run, "--baseline", str(other))
    for stage in ("data", "score", "sft-0", "round-1", "solved"):
        shutil.rmtree(other / stage)
    assert "has no results yet" in said(str(other))
    (tmp_path / "file").write_text("")
    assert "cannot be written" in said(run, "--out", str(tmp_path / "file"))


def test_only_runs_that_differ_in_method_alone_are_baselines(two_methods, tmp_path) -> None:
    runs = {}
    for name, method in (("mine", "dpo-st"), ("theirs", "st"), ("other", "st"), ("halfway", "st")):
        runs[name] = tmp_path / name
        shutil.copytree(two_methods.folders[method], runs[name])
    recipe = read_json(runs["other"] / "run.json")
    recipe["recipe"]["sft"]["epochs"] = 3
    (runs["other"] / "run.json").write_text(json.dumps(recipe))
    shutil.rmtree(runs["halfway"] / "export")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert list(results.siblings(runs["mine"])) == [runs["theirs"]]
    (file, *_) = write_report(runs["mine"], tmp_path / "report", [runs["other"], runs["theirs"]])
    for other in ("other", "theirs"):  # both are st, so folders tell them apart
        assert f"{tmp_path.name}/mine - {tmp_path.name}/{other}: " in text_of(file)


def test_a_damaged_run_does_not_hide_the_others(two_methods, tmp_path) -> None:
    run = tmp_path / "whole"
    shutil.copytree(two_methods.folders["dpo-st"], run)
    for name, text in (("a", "{}"), ("b", "[]"), ("c", "no JSON")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
        assert CliRunner().invoke(app, ["report", str(tmp_path / name)]).exit_code == 2
    shutil.copytree(two_methods.folders["st"], tmp_path / "st")
    (tmp_path / "st" / "data" / "test.jsonl").write_text("no JSON")
    listed = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert listed.exit_code == 0, listed.output
    assert re.search(r"^whole\s+dpo-st", listed.stdout, re.MULTILINE)
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0


def test_a_run_that_goes_on_is_not_finished(two_methods, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_methods.folders["st"], run)
    assert results.is_finished(run)
    (run / "manifest.json").unlink()  # as the next stage's beginning does
    assert "not finished" in CliRunner().invoke(app, ["runs", str(run)]).stdout
    assert "not finished yet" in text_of(write_report(run, tmp_path / "report")[0])


def test_the_trainings_were_tracked(two_methods) -> None:
    """`report_to=tensorboard`: each training's losses, as transformers writes them."""
    from tensorboardX.proto.event_pb2 import Event

    run = two_methods.folders["dpo-st"]
    for stage, tag in (
        ("sft-0", "train/loss"),
        ("round-1/dpo", "train/rewards/margins"),
        ("round-1/sft", "train/loss"),
    ):
        (file,) = (run / "logs" / "tensorboard" / stage).glob("events.*")
        tags = {value.tag for event in records(file, Event) for value in event.summary.value}
        assert tag in tags, (stage, tags)


def records(file: Path, kind: type) -> list:
    """Read TensorBoard's framing: a length of 8 bytes, its checksum of 4, the record, its checksum of 4."""
    data, found = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(kind.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_runs_are_listed_and_compared(two_methods) -> None:
    folder = two_methods.folders["dpo-st"].parent.parent
    result = CliRunner().invoke(app, ["runs", str(folder)])
    assert result.exit_code == 0, result.output
    assert re.search(r"seed-1/dpo-st\s+dpo-st .* finished", result.stdout)
    assert re.search(r"seed-1/st\s+st .* finished", result.stdout)
    assert len(re.findall(r"points, 95 % interval .* McNemar p = ", result.stdout)) == 1
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if "McNemar" not in line)
    alone = CliRunner().invoke(app, ["runs", str(two_methods.folders["st"])])
    assert re.search(r"^st\s+st .* finished", alone.stdout, re.MULTILINE)
    assert "McNemar" not in alone.stdout


def test_a_folder_without_runs_is_one_line(tmp_path) -> None:
    result = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert result.exit_code == 2
    assert "contains no runs" in result.stderr
    assert CliRunner().invoke(app, ["runs", str(tmp_path / "absent")]).exit_code == 2


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_chromium_renders_it(page, tmp_path, width, dark) -> None:
    outer = tmp_path / "outer.html"
    outer.write_text(LOOKS.format(page=page.as_uri(), width=width), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *QUIET, scheme, f"--user-data-dir={tmp_path / 'user'}", "--dump-dom", outer.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    seen = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", dumped, re.DOTALL)[1]))
    assert seen["overflow"] <= 0  # nothing to push sideways
    assert seen["loaded"] == 0
    assert is_dark(seen["paper"]) == dark != is_dark(seen["ink"])
    assert {is_dark(colour) for colour in seen["letters"]} == {is_dark(seen["ink"])}
    assert len(seen["figures"]) == 10
    assert all(300 <= shown <= width for _, shown in seen["figures"])
    assert min(seen["sizes"]) > 8  # pixels: letters that can be read on a phone


def is_dark(colour: str) -> bool:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) < 3 * 128


def test_results_of_the_calculator_are_told_from_others() -> None:
    text = "He has 2*3=<<2*3=6>>6, then <<x=4>>4, <<6+1=8>>8 and <<1/3=0.3333>>0.3333."
    pieces = [
        ("He has 2*3=<<2*3=", ""), ("6", "calculated"), (">>6, then <<x=4>>4, <<6+1=", ""), ("8", "miscalculated"),
        (">>8 and <<1/3=", ""), ("0.3333", "calculated"), (">>0.3333.", ""),
    ]  # fmt: skip
    assert marked(text, Calculator(rounded_decimals=4)) == pieces
    assert marked(text, Calculator())[-2] == ("0.3333", "miscalculated")  # the run's own would have rounded to 0.33
    assert marked("", Calculator()) == []


def test_what_differs_between_two_texts() -> None:
    first, second = diff("Ann has 3 apples.\n#### 3", "Ann sold 3 pears.\n#### 3")
    assert first == [("Ann ", ""), ("has", "differs"), (" 3 ", ""), ("apples.", "differs"), ("\n#### 3", "")]
    assert second == [("Ann ", ""), ("sold", "differs"), (" 3 ", ""), ("pears.", "differs"), ("\n#### 3", "")]
    assert diff("same", "same") == ([("same", "")], [("same", "")])
    assert diff("", "all") == ([], [("all", "differs")])
