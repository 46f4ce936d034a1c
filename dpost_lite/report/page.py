"""A run as one HTML file that needs no network and runs no script, and its pictures as PNG files beside it.

Everything that a model or a data set said is text of strangers: jinja2 escapes it, and the page forbids itself, by its
content security policy, to load or run anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpost_lite.errors import RunError
from dpost_lite.problems.comparing import compare
from dpost_lite.report import alarms, examples, figures, health, results, summary, tables
from dpost_lite.report.terminal import as_time, printable
from dpost_lite.runs import journal
from dpost_lite.runs.folder import stages_begun, stages_done

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure of the page: the name of its PNG file, what it shows, and how it is drawn."""

    name: str
    caption: str
    figure: "Figure"


@dataclass(frozen=True, slots=True)
class Told:
    """All that was read of a run: finished stages by name, the events of its journal, its recipe, and the rest."""

    path: Path
    done: Mapping[str, Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    recipe: Mapping[str, Any]
    rounds: Sequence[health.Round]
    stages: Sequence[tables.Stage]
    others: Mapping[str, Path]
    """Other runs to hold it against, by their labels."""
    label: str
    """Its own: the method, or its folder where more than the method may differ."""
    is_finished: bool


def write_report(run: Path, out: Path, baselines: Sequence[Path] | None = None) -> list[Path]:
    """Write index.html and its pictures into `out`; return the files.

    `baselines` are other runs to hold it against; unset, those beside it that `run --method` made.

    Raises RunError if the run has nothing to show yet, if a baseline is not finished or was tested on other problems,
    or if `out` cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    told = _read(run, baselines)
    template = Environment(
        loader=PackageLoader("dpost_lite.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")  # fmt: skip
    with figures.style():
        pictures = list(_pictures(told))
        svgs = [(picture, figures.as_svg(picture.figure)) for picture in pictures]
        html = template.render(**_content(told), pictures=svgs)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for picture in pictures:
                figures.save_png(picture.figure, out / f"{picture.name}.png")
            (out / "index.html").write_text(printable(html), encoding="utf-8")
        except OSError as error:
            raise RunError(f"--out: {out} cannot be written ({error.strerror}); name another folder") from error
    return [out / "index.html", *(out / f"{picture.name}.png" for picture in pictures)]


def _read(run: Path, baselines: Sequence[Path] | None) -> Told:
    done, events, recipe = dict(stages_done(run)), list(journal.read_events(run)), results.recipe_of(run)
    if "data" not in done:
        raise RunError(f"{run} has not read its problems yet; give its `dpost-lite run` command again to go on")
    others = list(results.siblings(run)) if baselines is None else _checked(run, baselines)
    labels = [recipe["method"], *(results.recipe_of(other)["method"] for other in others)]
    if baselines is not None or len(set(labels)) < len(labels):  # they may differ in more than the method
        labels = ["/".join(path.resolve().parts[-2:]) for path in (run, *others)]
    return Told(
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
                f"--baseline: {other} is not a run folder (no run.json); name one that `dpost-lite run` wrote"
            )
        if results.exported(other) is None:
            raise RunError(f"--baseline: {other} is not finished; give its `dpost-lite run` command again to go on")
        if not results.same_problems(run, other):
            raise RunError(
                f"--baseline: {other} was not tested on the problems of {run}; take a run with the same data"
            )
    return list(baselines)


def _content(told: Told) -> dict[str, Any]:
    """Everything of the page but its pictures."""
    run, scores = told.path, results.scores(told.path)
    names = [score.name for score in scores]
    shown = [(name, names[place - 1] if place > 1 else None) for place, name in enumerate(names) if name != "base"]
    manifest = run / "manifest.json"
    return {
        "run": run.resolve().name,
        "recipe": told.recipe,
        "data": _of_data(told.done["data"]["metrics"]),
        "is_finished": told.is_finished,
        "seconds": as_time(sum(stage.seconds for stage in told.stages)),
        "statements": list(_statements(told)),
        "alarms": [(stage.name, text) for stage in told.stages for text in alarms.alarms(run, stage.name)],
        "notices": list(dict.fromkeys(event["text"] for event in told.events if event["kind"] == "notice")),
        "scores": [(score, summary.interval(score)) for score in scores],
        "rounds": [one.number for one in told.rounds],
        "health": tables.health_table(told.rounds),
        "stages": told.stages,
        "examples": [(name, examples.rationales(run, name, before)) for name, before in shown],
        "pairs": [(one.number, examples.pairs(run, one.number)) for one in told.rounds if one.pairs],
        "recipe_text": _as_yaml(told.recipe),
        "manifest_text": manifest.read_text(encoding="utf-8") if manifest.is_file() else "",
        "as_time": as_time,
    }


def _of_data(counts: Mapping[str, int]) -> str:
    train, labelled, dev, test = (f"{counts[part]:,}" for part in ("train", "labelled", "dev", "test"))
    return f"{train} training problems, {labelled} of them labelled, {dev} dev, {test} test;"


def _statements(told: Told) -> Iterator[str]:
    """Sentences about what was gained, and how sure that is."""
    if gained := results.gain(told.path):
        yield summary.verdict(*gained)
    best = results.exported(told.path)
    if best is None:
        return
    dev = results.dev_scores(told.path)
    is_best = dev and max(dev, key=lambda score: score.strict).name == best
    if is_best and (text := summary.fallen(dev)):
        yield text
    own = results.right(told.path, best)
    for label, other in told.others.items():
        compared = compare(results.right(other, results.exported(other) or ""), own)
        yield f"{summary.method_difference(label, told.label, [compared])}."


def _pictures(told: Told) -> Iterator[Picture]:
    if scores := results.scores(told.path):
        runs = {told.label: scores, **{label: results.scores(other) for label, other in told.others.items()}}
        caption = "Greedy accuracy (strict) with 95 % Wilson intervals."
        yield Picture("accuracy", caption, figures.accuracy(runs, results.dev_scores(told.path)))
    if any(one.for_pairs or one.for_labels for one in told.rounds):
        caption = "Training problems by the rationales that were drawn for them."
        yield Picture("yield", caption, figures.yields(told.rounds))
    yield from _curves(told)
    minutes = {stage.name: stage.seconds / 60 for stage in told.stages}
    planned = {stage.name: stage.planned_seconds / 60 for stage in told.stages if stage.planned_seconds}
    yield Picture(
        "time", "Time of each stage against its plan.", figures.against_plan("time, minutes", planned, minutes)
    )
    if peaks := {stage.name: stage.peak_bytes / 2**30 for stage in told.stages if stage.peak_bytes}:
        planned = {stage.name: stage.planned_bytes / 2**30 for stage in told.stages if stage.planned_bytes}
        title = f"peak {tables.memory_of(told.done)} memory, GiB"
        yield Picture("memory", "Peak memory against the plan.", figures.against_plan(title, planned, peaks))
    if spans := journal.spans(told.events):
        yield Picture("timeline", "Which stage was worked on after which.", figures.timeline(spans))


def _curves(told: Told) -> Iterator[Picture]:
    """What the trainings' steps show, of stages that are done or begun; those put aside are left out."""
    there = {*told.done, *(name for name, _ in stages_begun(told.path))}
    steps = {stage: done for stage, done in journal.steps_by_stage(told.events).items() if stage in there}
    sft = {stage: done for stage, done in steps.items() if not stage.endswith("/dpo")}
    dpo = {stage: done for stage, done in steps.items() if stage.endswith("/dpo")}
    if sft:
        lines = {stage: _points(done, "loss") for stage, done in sft.items()}
        caption = "Loss of each supervised training; each starts from the base."
        yield Picture("sft-loss", caption, figures.curves("loss by optimiser step", lines))
    if dpo:
        is_plain = told.recipe["dpo"]["loss"] == "sigmoid" and not told.recipe["dpo"]["nll_weight"]
        caption = "Loss of DPO; ln 2 = 0.69 is where it starts." if is_plain else "Loss of DPO."
        lines = {stage: _points(done, "loss") for stage, done in dpo.items()}
        yield Picture("dpo-loss", caption, figures.curves("loss by optimiser step", lines))
    dpo = {stage: done for stage, done in dpo.items() if all("chosen_change" in step for step in done)}
    if dpo:
        lines = {stage: _points(done, "margin") for stage, done in dpo.items()}
        figure = figures.curves("DPO: reward margin by optimiser step", lines, has_zero=True)
        yield Picture("dpo-margin", "Reward of chosen over rejected rationales.", figure)
    for stage, done in dpo.items():
        name, sides = stage.replace("/", "-"), ("chosen", "rejected")
        lines = {side: _points(done, f"{side}_change") for side in sides}
        caption = "Against the reference. Chosen should not fall; the further from 0, the further from the reference."
        yield Picture(f"{name}-change", caption, figures.curves(f"{stage}: log π/π_ref, nats", lines, has_zero=True))
        lines = {side: _points(done, side) for side in sides}
        caption = "Of the rationales of each step's pairs, which differ from step to step."
        yield Picture(f"{name}-logprob", caption, figures.curves(f"{stage}: log π, nats", lines))


def _points(steps: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(step["step"], step[key]) for step in steps]


def _as_yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
