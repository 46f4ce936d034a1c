"""The report of a run: one self-contained HTML file without scripts, and its figures as PNG files.

Text from models and data sets is untrusted: jinja2 escapes it, and the page's content security policy forbids loading
or running anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpost_lite.errors import RunError
from dpost_lite.methods import METHODS
from dpost_lite.problems.comparing import compare
from dpost_lite.report import alarms, examples, figures, health, proof, results, summary, tables
from dpost_lite.report.terminal import as_time, printable
from dpost_lite.runs import journal
from dpost_lite.runs.folder import stages_begun, stages_done

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure of the page; `name` is that of its PNG file."""

    name: str
    caption: str
    figure: "Figure"
    is_in_page: bool = True
    """False for what the page itself shows as text."""


@dataclass(frozen=True, slots=True)
class ReportData:
    """The data of a run for its report; `done` has the records of its finished stages by name."""

    path: Path
    done: Mapping[str, Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    recipe: Mapping[str, Any]
    rounds: Sequence[health.Round]
    stages: Sequence[tables.Stage]
    others: Mapping[str, Path]
    """Other runs to compare with, by label."""
    label: str
    """Of this run: its method, or its folder if the runs may differ in more than the method."""
    is_finished: bool


def write_report(run: Path, out: Path, baselines: Sequence[Path] | None = None) -> list[Path]:
    """Write index.html and its figures to `out`; return their paths.

    `baselines` are other runs to compare with; unset, those made by the same `run --method a,b` command.

    Raises RunError if the run has no data yet, a baseline is not finished or was tested on other problems, or `out`
    cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    data = _read(run, baselines)
    template = Environment(
        loader=PackageLoader("dpost_lite.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")  # fmt: skip
    with figures.style():
        pictures = list(_pictures(data))
        svgs = [(picture, figures.as_svg(picture.figure)) for picture in pictures if picture.is_in_page]
        html = template.render(**_content(data), pictures=svgs)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for picture in pictures:
                figures.save_png(picture.figure, out / f"{picture.name}.png")
            (out / "index.html").write_text(printable(html), encoding="utf-8")
        except OSError as error:
            raise RunError(f"--out: {out} cannot be written ({error.strerror}); give another folder") from error
    return [out / "index.html", *(out / f"{picture.name}.png" for picture in pictures)]


def _read(run: Path, baselines: Sequence[Path] | None) -> ReportData:
    done, events, recipe = dict(stages_done(run)), list(journal.read_events(run)), results.recipe_of(run)
    if "data" not in done:
        raise RunError(f"{run} has no results yet; run its `dpost-lite run` command again to resume")
    others = list(results.siblings(run)) if baselines is None else _checked(run, baselines)
    labels = [recipe["method"], *(results.recipe_of(other)["method"] for other in others)]
    if baselines is not None or len(set(labels)) < len(labels):  # the method alone does not identify them
        labels = ["/".join(path.resolve().parts[-2:]) for path in (run, *others)]
    return ReportData(
        path=run,
        done=done,
        events=events,
        recipe=recipe,
        rounds=health.rounds(run),
        stages=tables.stages_of(done, events),
        others=dict(zip(labels[1:], others, strict=True)),
        label=labels[0],
        is_finished=results.is_finished(run),
    )


def _checked(run: Path, baselines: Sequence[Path]) -> list[Path]:
    for other in baselines:
        if not (other / "run.json").is_file():
            raise RunError(
                f"--baseline: {other} is not a run folder (no run.json); give a folder written by `dpost-lite run`"
            )
        if results.exported(other) is None:
            raise RunError(f"--baseline: {other} is not finished; run its `dpost-lite run` command again to resume")
        if not results.same_problems(run, other):
            raise RunError(
                f"--baseline: {other} was tested on other problems than {run}; give a run with the same data"
            )
    return list(baselines)


def _content(data: ReportData) -> dict[str, Any]:
    """The variables of the page template, except the figures."""
    run, scores = data.path, results.scores(data.path)
    names = [score.name for score in scores]
    shown = [(name, names[place - 1] if place > 1 else None) for place, name in enumerate(names) if name != "base"]
    manifest = run / "manifest.json"
    rewards, reward_scale = _rewards(data)
    return {
        "run": run.resolve().name,
        "recipe": data.recipe,
        "data": _data_counts(data.done["data"]["metrics"], data.done.get("data-also", {}).get("metrics", {})),
        "is_finished": data.is_finished,
        "seconds": as_time(sum(stage.seconds for stage in data.stages)),
        "statements": list(_statements(data)),
        "alarms": [(stage.name, text) for stage in data.stages for text in alarms.alarms(run, stage.name)],
        "notices": list(dict.fromkeys(event["text"] for event in data.events if event["kind"] == "notice")),
        "scores": [(score, summary.interval(score)) for score in scores],
        "also": [
            (part, [(score, summary.interval(score)) for score in found])
            for part, found in results.also_scores(run).items()
            if found
        ],
        "proof": proof.for_page(data.done.get("export", {}).get("metrics", {})),
        "rounds": [one.number for one in data.rounds],
        "health": tables.health_table(data.rounds),
        "on_dev": [(one, rows) for one in data.rounds if (rows := tables.dev_table(one))],
        "stages": data.stages,
        "examples": [(name, examples.rationales(run, name, before)) for name, before in shown],
        "pairs": [(one.number, examples.pairs(run, one.number)) for one in data.rounds if one.pairs],
        "rewards": rewards,
        "reward_scale": reward_scale,
        "recipe_text": _as_yaml(data.recipe),
        "manifest_text": manifest.read_text(encoding="utf-8") if manifest.is_file() else "",
        "as_time": as_time,
    }


def _rewards(data: ReportData) -> tuple[dict[str, dict[int, list[examples.RewardExample]]], float]:
    """Return rationales with token rewards by run and round, and the scale of all.

    The other runs are there if this one has any.
    """
    runs = {data.label: examples.rewards(data.path)}
    if runs[data.label]:
        runs |= {label: examples.rewards(other) for label, other in data.others.items()}
    scale = examples.reward_scale(one for rounds in runs.values() for shown in rounds.values() for one in shown)
    return {
        label: {number: [examples.shaded(one, scale) for one in shown] for number, shown in rounds.items()}
        for label, rounds in runs.items()
        if rounds
    }, scale


def _data_counts(counts: Mapping[str, int], also: Mapping[str, int]) -> str:
    train, labelled, dev, test = (f"{counts[part]:,}" for part in ("train", "labelled", "dev", "test"))
    further = "".join(f", {number:,} {part}" for part, number in also.items())
    return f"{train} training problems, {labelled} of them labelled, {dev} dev, {test} test{further};"


def _statements(data: ReportData) -> Iterator[str]:
    """Sentences about the gain in accuracy and its significance."""
    method = METHODS[data.recipe["method"]]
    if gained := results.gain(data.path):
        yield summary.verdict(*gained, method)
    for part, also_gained in results.also_gains(data.path).items():
        yield summary.verdict(*also_gained, method, part=part)
    best = results.exported(data.path)
    if best is None:
        return
    dev = results.dev_scores(data.path)
    is_best = dev and max(dev, key=lambda score: score.strict).name == best
    if is_best and (text := summary.dev_drop(dev)):
        yield text
    own = results.right(data.path, best)
    for label, other in data.others.items():
        compared = compare(results.right(other, results.exported(other) or ""), own)
        yield f"{summary.method_difference(label, data.label, [compared])}."


def _pictures(data: ReportData) -> Iterator[Picture]:
    if scores := results.scores(data.path):
        runs = {data.label: scores, **{label: results.scores(other) for label, other in data.others.items()}}
        caption = "Greedy accuracy (strict) with 95 % Wilson intervals."
        yield Picture("accuracy", caption, figures.accuracy(runs, results.dev_scores(data.path)))
    if any(one.for_pairs or one.for_labels for one in data.rounds):
        caption = "Training problems by the rationales sampled for them."
        yield Picture("yield", caption, figures.yields(data.rounds))
    yield from _curves(data)
    minutes = {stage.name: stage.seconds / 60 for stage in data.stages}
    planned = {stage.name: stage.planned_seconds / 60 for stage in data.stages if stage.planned_seconds}
    yield Picture(
        "time", "Time of each stage, measured and planned.", figures.against_plan("time, minutes", planned, minutes)
    )
    if peaks := {stage.name: stage.peak_bytes / 2**30 for stage in data.stages if stage.peak_bytes}:
        planned = {stage.name: stage.planned_bytes / 2**30 for stage in data.stages if stage.planned_bytes}
        title = f"peak {tables.memory_of(data.done)} memory, GiB"
        caption = "Peak memory of each stage, measured and planned."
        yield Picture("memory", caption, figures.against_plan(title, planned, peaks))
    if spans := journal.spans(data.events):
        yield Picture("timeline", "When each stage was worked on.", figures.timeline(spans))
    rewards, scale = _rewards(data)
    for number, shown in rewards.get(data.label, {}).items():
        figure = figures.rewards(f"round {number}: token rewards of rejected rationales", shown, scale)
        yield Picture(f"round-{number}-rewards", "", figure, is_in_page=False)


def _curves(data: ReportData) -> Iterator[Picture]:
    """Training curves of finished and unfinished stages, without archived ones."""
    there = {*data.done, *(name for name, _ in stages_begun(data.path))}
    steps = {stage: done for stage, done in journal.steps_by_stage(data.events).items() if stage in there}
    sft = {stage: done for stage, done in steps.items() if not stage.endswith("/dpo")}
    dpo = {stage: done for stage, done in steps.items() if stage.endswith("/dpo")}
    if sft:
        lines = {stage: _points(done, "loss") for stage, done in sft.items()}
        caption = "Loss of each SFT; each starts from the base."
        yield Picture("sft-loss", caption, figures.curves("loss by optimiser step", lines))
    if dpo:
        is_plain = data.recipe["dpo"]["loss"] == "sigmoid" and not data.recipe["dpo"]["nll_weight"]
        caption = "Loss of DPO; it starts at ln 2 = 0.69." if is_plain else "Loss of DPO."
        lines = {stage: _points(done, "loss") for stage, done in dpo.items()}
        yield Picture("dpo-loss", caption, figures.curves("loss by optimiser step", lines))
    dpo = {stage: done for stage, done in dpo.items() if all("chosen_change" in step for step in done)}
    if dpo:
        lines = {stage: _points(done, "margin") for stage, done in dpo.items()}
        figure = figures.curves("DPO: reward margin by optimiser step", lines, has_zero=True)
        yield Picture("dpo-margin", "Reward margin of chosen over rejected rationales.", figure)
    for stage, done in dpo.items():
        name, sides = stage.replace("/", "-"), ("chosen", "rejected")
        lines = {side: _points(done, f"{side}_change") for side in sides}
        caption = "Relative to the reference. Chosen should not fall; far from 0 is far from the reference."
        yield Picture(f"{name}-change", caption, figures.curves(f"{stage}: log π/π_ref, nats", lines, has_zero=True))
        lines = {side: _points(done, side) for side in sides}
        caption = "Log-probability of each step's rationales; every step has different pairs."
        yield Picture(f"{name}-logprob", caption, figures.curves(f"{stage}: log π, nats", lines))


def _points(steps: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(step["step"], step[key]) for step in steps]


def _as_yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
