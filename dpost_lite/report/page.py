"""A run as one HTML file that needs no network and runs no script, and its pictures as PNG files beside it.

Everything that a model or a data set said is text of strangers: jinja2 escapes it, and the page forbids itself, by its
content security policy, to load or run anything.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpost_lite.errors import RunError
from dpost_lite.problems.comparing import compare
from dpost_lite.problems.records import Score
from dpost_lite.report import examples, figures, health, journal, results, summary
from dpost_lite.report.terminal import as_time, printable
from dpost_lite.rundir import stages_done

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLANNED_AS = {  # the names of a plan's peaks (see planner/plan.py), by the last part of a stage's name
    "sft": "sft", "sft-0": "sft", "dpo": "dpo", "samples-pairs": "sampling", "samples-labels": "sampling",
    "export": "merge, export",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure of the page: the name of its PNG file, what it shows, and how it is drawn."""

    name: str
    caption: str
    figure: "Figure"


@dataclass(frozen=True, slots=True)
class Stage:
    """One finished stage beside its plan; None where there is nothing to say. Times in seconds, memory in bytes."""

    name: str
    seconds: float
    planned_seconds: float | None
    peak_bytes: float | None
    planned_bytes: float | None
    rate: str


def write_report(run: Path, out: Path, baselines: Sequence[Path] | None = None) -> list[Path]:
    """Write index.html and its pictures into `out`; return the files.

    `baselines` are other runs, for the first picture; unset, the runs beside this one that `run --method` made.

    Raises RunError if the run has nothing to show yet, if a baseline was tested on other problems, or if `out` cannot
    be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    events = list(journal.read_events(run))
    if not any(True for _ in stages_done(run)):
        raise RunError(f"{run} has no finished stage yet; give its `dpost-lite run` command again to go on")
    others = list(results.siblings(run)) if baselines is None else _checked(run, baselines)
    template = Environment(
        loader=PackageLoader("dpost_lite.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")  # fmt: skip
    with figures.style():
        pictures = list(_pictures(run, events, others))
        svgs = [(picture, figures.as_svg(picture.figure)) for picture in pictures]
        html = template.render(**_content(run, events, others), pictures=svgs)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for picture in pictures:
                figures.save_png(picture.figure, out / f"{picture.name}.png")
            (out / "index.html").write_text(printable(html), encoding="utf-8")
        except OSError as error:
            raise RunError(f"--out: {out} cannot be written ({error.strerror}); name another folder") from error
    return [out / "index.html", *(out / f"{picture.name}.png" for picture in pictures)]


def _checked(run: Path, baselines: Sequence[Path]) -> list[Path]:
    for other in baselines:
        if not (other / "run.json").is_file():
            raise RunError(f"--baseline: {other} is not a run folder (no run.json)")
        if not results.same_problems(run, other):
            raise RunError(
                f"--baseline: {other} was not tested on the problems of {run}; take a run with the same data"
            )
    return list(baselines)


def _content(run: Path, events: Sequence[Mapping[str, Any]], others: Sequence[Path]) -> dict[str, Any]:
    """Everything of the page but its pictures."""
    done, recipe, scored = dict(stages_done(run)), results.recipe_of(run), results.scores(run)
    rounds = health.rounds(run)
    manifest = run / "manifest.json"
    names = [score.name for score in scored]
    shown = [(name, names[place - 1] if place > 1 else None) for place, name in enumerate(names) if name != "base"]
    stages = _stages(done, events)
    return {
        "run": run.name or str(run.resolve().name),
        "recipe": recipe,
        "data": _of_data(done["data"]["metrics"]) if "data" in done else "",
        "is_finished": "solved" in done,
        "seconds": as_time(sum(record["seconds"] for record in done.values())),
        "statements": list(_statements(run, others)),
        "alarms": [(stage.name, text) for stage in stages for text in health.alarms(run, stage.name)],
        "notices": [event["text"] for event in events if event["kind"] == "notice"],
        "scores": [(score, summary.interval(score)) for score in scored],
        "health": _health_table(rounds),
        "stages": stages,
        "examples": [(name, examples.rationales(run, name, before)) for name, before in shown],
        "pairs": [(one.pairs.stage, examples.pairs(run, one.pairs.stage)) for one in rounds if one.pairs],
        "recipe_text": _as_yaml(recipe),
        "manifest_text": manifest.read_text(encoding="utf-8") if manifest.is_file() else "",
        "as_time": as_time,
    }


def _of_data(counts: Mapping[str, int]) -> str:
    train, labelled, dev, test = (f"{counts[part]:,}" for part in ("train", "labelled", "dev", "test"))
    return f"{train} training problems, {labelled} of them labelled, {dev} dev, {test} test;"


def _statements(run: Path, others: Sequence[Path]) -> Iterable[str]:
    """Sentences about what was gained, and how sure that is."""
    if gained := results.gain(run):
        yield summary.verdict(*gained)
    if text := summary.fallen(results.scores(run, "dev")):
        yield text
    if best := results.best(run):
        own = results.recipe_of(run)["method"]
        for other in others:
            compared = compare(results.right(other, results.best(other)), results.right(run, best))
            yield f"{summary.method_difference(results.recipe_of(other)['method'], own, [compared])}."


def _pictures(run: Path, events: Sequence[Mapping[str, Any]], others: Sequence[Path]) -> Iterable[Picture]:
    scored, dev = results.scores(run), [score for score in results.scores(run, "dev") if score.name != "base"]
    if scored:
        runs: dict[str, Sequence[Score]] = {results.recipe_of(run)["method"]: scored}
        for other in others:
            runs[_new_label(results.recipe_of(other)["method"], runs)] = results.scores(other)
        caption = "Greedy accuracy (strict) with 95 % Wilson intervals."
        yield Picture("accuracy", caption, figures.accuracy(runs, dev))
    rounds = health.rounds(run)
    if any(one.for_pairs or one.for_labels for one in rounds):
        caption = "Rationales of each sampling stage: only problems with right and wrong ones give pairs."
        yield Picture("yield", caption, figures.yields(rounds))
    steps = journal.steps_by_stage(events)
    sft = {stage: done for stage, done in steps.items() if "margin" not in done[0]}
    dpo = {stage: done for stage, done in steps.items() if "margin" in done[0]}
    if sft:
        yield Picture("sft-loss", "Loss of each supervised training; each starts from the base.", figures.losses(sft))
    if dpo:
        yield Picture("dpo-loss", "Loss of DPO; ln 2 = 0.69 is where it starts.", figures.losses(dpo))
        yield Picture("dpo-margin", "Reward of chosen over rejected rationales.", figures.margins(dpo))
    for stage, done in dpo.items():
        caption = "Chosen should not fall; the further from 0, the further from the reference."
        yield Picture(f"{stage.replace('/', '-')}-change", caption, figures.preference(stage, done))
    stages = _stages(dict(stages_done(run)), events)
    minutes = {stage.name: stage.seconds / 60 for stage in stages}
    planned = {stage.name: stage.planned_seconds / 60 for stage in stages if stage.planned_seconds}
    yield Picture(
        "time", "Time of each stage against its plan.", figures.against_plan("time, minutes", planned, minutes)
    )
    peaks = {stage.name: stage.peak_bytes / 2**30 for stage in stages if stage.peak_bytes}
    if peaks:
        planned = {stage.name: stage.planned_bytes / 2**30 for stage in stages if stage.planned_bytes}
        yield Picture(
            "memory", "Peak memory against the plan.", figures.against_plan("peak memory, GiB", planned, peaks)
        )
    if spans := journal.spans(events):
        yield Picture("timeline", "When each stage was worked on.", figures.timeline(spans))


def _new_label(label: str, taken: Mapping[str, Any]) -> str:
    return label if label not in taken else f"{label} ({len(taken) + 1})"


def _stages(done: Mapping[str, Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """Finished stages in the order of the journal."""
    plans = [event for event in events if event["kind"] == "planned"]
    seconds = {name: estimate["seconds"] for plan in plans for name, estimate in plan["stages"].items()}
    peaks = {name: size for plan in plans for name, size in plan["peak_bytes"].items()}
    order = [event["stage"] for event in events if event["kind"] in ("stage_finished", "stage_skipped")]
    names = [*dict.fromkeys(name for name in order if name in done), *(name for name in done if name not in order)]
    return [
        Stage(
            name=name,
            seconds=done[name]["seconds"],
            planned_seconds=seconds.get(name) or None,
            peak_bytes=done[name].get("gpu_bytes") or done[name].get("ram_bytes"),
            planned_bytes=peaks.get(
                "sampling" if name.startswith("score/") else PLANNED_AS.get(name.split("/")[-1], "")
            ),
            rate=_rate(done[name]),
        )
        for name in names
    ]


def _rate(record: Mapping[str, Any]) -> str:
    """What a stage did in a second or a minute."""
    metrics, seconds = record["metrics"], record["seconds"]
    if not seconds:
        return ""
    if "tokens" in metrics:
        return f"{metrics['tokens'] / seconds:,.0f} tokens/s"
    if "steps" in metrics:
        return f"{60 * metrics['steps'] / seconds:,.1f} steps/min"
    answers = sum(
        part["num_problems"] for part in metrics.values() if isinstance(part, dict) and "num_problems" in part
    )
    return f"{answers / seconds:,.1f} answers/s" if answers else ""


def _health_table(rounds: Sequence[health.Round]) -> list[tuple[str, list[str]]]:
    """Rows of (what, a figure for each round); rows without any figure are left out."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    def of(part: str, name: str, form: str) -> list[str]:
        parts = [getattr(one, part) for one in rounds]
        return ["" if each is None else format(getattr(each, name), form) for each in parts]

    rows = [
        *(
            (f"{label}: {what}", of(part, name, form))
            for part, label in (("for_pairs", "drawn for pairs"), ("for_labels", "drawn for labels"))
            for what, name, form in (
                ("rationales", "num_rationales", ",d"),
                ("right", "right", ".1%"),
                ("problems all right", "all_right", ".1%"),
                ("problems mixed", "mixed", ".1%"),
                ("problems all wrong", "all_wrong", ".1%"),
                ("unfinished", "unfinished", ".1%"),
                ("repetitive", "repetitive", ".1%"),
                ("tokens a rationale", "tokens", ".0f"),
                ("calculated a rationale", "calculated", ".2f"),
                ("left to the model", "refused", ".2f"),
            )
        ),
        ("pairs", of("pairs", "num_pairs", ",d")),
        ("pairs a problem that gives any", of("pairs", "per_problem", ".1f")),
        ("tokens of chosen", of("pairs", "chosen_tokens", ".0f")),
        ("tokens of rejected", of("pairs", "rejected_tokens", ".0f")),
        ("DPO steps", of("dpo", "num_steps", ",d")),
        ("DPO margin at the end", of("dpo", "margin", ".3f")),
        ("chosen log π/π_ref, nats", of("dpo", "chosen_change", "+.2f")),
        ("rejected log π/π_ref, nats", of("dpo", "rejected_change", "+.2f")),
        ("KL to the reference, nats", of("dpo", "kl", ".2f")),
        ("labels", of("labels", "num_labels", ",d")),
        ("gold labels", of("labels", "num_gold", ",d")),
        ("new pseudo-labels a problem", of("labels", "new_per_problem", ".2f")),
        ("right ones dropped as repeats, or above the cap", of("labels", "num_dropped", ",d")),
        ("dev accuracy", [percent(one.dev) for one in rounds]),
    ]
    return [(what, values) for what, values in rows if any(values)]


def _as_yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
