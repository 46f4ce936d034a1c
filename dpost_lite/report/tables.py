"""The tables of the report: stages with their plan, the health of each round, and what DPO did to the dev problems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpost_lite.problems.dev_draws import Change
from dpost_lite.report.health import Round


@dataclass(frozen=True, slots=True)
class Stage:
    """One finished stage with its plan: times in seconds, memory in bytes, None if unknown; `rate` as text."""

    name: str
    seconds: float
    planned_seconds: float | None
    peak_bytes: float | None
    planned_bytes: float | None
    rate: str


def stages_of(done: Mapping[str, Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """Return the finished stages, in the order of the journal."""
    plans = [event for event in events if event["kind"] == "planned"]
    seconds = {name: estimate["seconds"] for plan in plans for name, estimate in plan["stages"].items()}
    peaks = {name: size for plan in plans for name, size in plan["peak_bytes"].items()}
    order = [event["stage"] for event in events if event["kind"] in ("stage_finished", "stage_skipped")]
    names = [*dict.fromkeys(name for name in order if name in done), *(name for name in done if name not in order)]
    memory = memory_of(done)
    return [
        Stage(
            name=name,
            seconds=done[name]["seconds"],
            planned_seconds=seconds.get(name) or None,
            peak_bytes=done[name].get(f"{memory.lower()}_bytes") or None,
            planned_bytes=peaks.get(name) or None,
            rate=_rate(done[name]),
        )
        for name in names
    ]


def memory_of(done: Mapping[str, Mapping[str, Any]]) -> str:
    """Which memory the plan is about: "GPU" if one was used, else "RAM"."""
    return "GPU" if any(record.get("gpu_bytes") for record in done.values()) else "RAM"


def _rate(record: Mapping[str, Any]) -> str:
    """The throughput of a stage, as text."""
    metrics, seconds = record["metrics"], record["seconds"]
    if not seconds:
        return ""
    if "tokens" in metrics:
        return f"{metrics['tokens'] / seconds:,.0f} tokens/s"
    if "steps" in metrics:
        return f"{60 * metrics['steps'] / seconds:,.1f} steps/min"
    answers = sum(part["num_problems"] for part in metrics.values() if isinstance(part, dict) and "strict" in part)
    return f"{answers / seconds:,.1f} answers/s" if answers else ""


def dev_table(one: Round) -> list[tuple[str, str, str, str]]:
    """Return rows of (name, before DPO, after DPO, change with its 95 % interval) on the dev problems."""
    greedy, drawn = one.dpo_on_dev, one.dev_draws
    rows: list[tuple[str, Change | None, str]] = []
    if greedy:
        change = Change(greedy.a, greedy.b, greedy.difference, greedy.low, greedy.high)
        rows.append((f"greedy accuracy, {greedy.num_problems:,} problems", change, ".1%"))
    if drawn:
        has_many = drawn.num_samples > 1  # else both are the same
        rows += [
            ("samples: right (pass@1)", drawn.pass_at_1, ".1%"),
            (f"problems with a right one (pass@{drawn.num_samples})", drawn.pass_at_k if has_many else None, ".1%"),
            ("distinct right rationales", drawn.distinct_right, ",.0f"),
            ("steps per rationale", drawn.steps, ".2f"),
            ("tokens per rationale", drawn.tokens, ".1f"),
            ("unfinished", drawn.unfinished, ".1%"),
        ]
    return [(what, *_change(found, form)) for what, found, form in rows if found]


def _change(found: Change, form: str) -> tuple[str, str, str]:
    """Write a change; that of percentages in points."""
    scale, unit = (100, " points") if form.endswith("%") else (1, "")
    number = f"+{form.replace('%', 'f')}"
    difference, low, high = (format(scale * value, number) for value in (found.difference, found.low, found.high))
    return format(found.before, form), format(found.after, form), f"{difference}{unit} ({low} to {high})"


def health_table(rounds: Sequence[Round]) -> list[tuple[str, list[str]]]:
    """Return rows of (name, a value per round), without empty rows."""

    def of(part: str, name: str, form: str) -> list[str]:
        parts = [getattr(one, part) for one in rounds]
        return ["" if each is None else format(getattr(each, name), form) for each in parts]

    rows = [
        *(
            (f"{label}: {what}", of(part, name, form))
            for part, label in (("for_pairs", "samples for pairs"), ("for_labels", "samples for labels"))
            for what, name, form in (
                ("rationales", "num_rationales", ",d"),
                ("right", "right", ".1%"),
                ("problems all right", "all_right", ".1%"),
                ("problems mixed", "mixed", ".1%"),
                ("problems all wrong", "all_wrong", ".1%"),
                ("unfinished", "unfinished", ".1%"),
                ("repetitive", "repetitive", ".1%"),
                ("tokens per rationale", "tokens", ".0f"),
                ("calculations or code blocks per rationale", "calculated", ".2f"),
                ("left to the model, or failed, per rationale", "left_to_model", ".2f"),
            )
        ),
        ("right rationales that were cut", of("rests", "num_cuts", ",d")),
        ("rests sampled again", of("rests", "num_rests", ",d")),
        ("rests: wrong and usable", of("rests", "usable", ".1%")),
        ("rests: right", of("rests", "right", ".1%")),
        ("rests: unfinished", of("rests", "unfinished", ".1%")),
        ("rests: repetitive", of("rests", "repetitive", ".1%")),
        ("pairs", of("pairs", "num_pairs", ",d")),
        ("pairs that are step-controlled", of("pairs", "num_stepwise", ",d") if any(r.rests for r in rounds) else []),
        ("problems with pairs", of("pairs", "num_problems", ",d")),
        ("tokens per chosen", of("pairs", "chosen_tokens", ".0f")),
        ("tokens per rejected", of("pairs", "rejected_tokens", ".0f")),
        ("DPO steps", of("dpo", "num_steps", ",d")),
        ("DPO margin at the end", of("dpo", "margin", ".3f")),
        ("chosen log π/π_ref, nats", of("dpo", "chosen_change", "+.2f")),
        ("rejected log π/π_ref, nats", of("dpo", "rejected_change", "+.2f")),
        ("KL to the reference (rough), nats", of("dpo", "kl", ".2f")),
        ("before DPO: distinct right rationales", of("gate", "distinct_right_before", ",d")),
        ("after DPO: distinct right rationales", of("gate", "distinct_right_after", ",d")),
        *(
            (f"{when} DPO: {what}", of(f"{when}_dpo", name, form))
            for what, name, form in (
                ("pass@1", "right", ".1%"),
                ("problems with a right one", "some_right", ".1%"),
                ("unfinished", "unfinished", ".1%"),
                ("steps per rationale", "steps_per_rationale", ".2f"),
                ("tokens per rationale", "tokens", ".1f"),
            )
            for when in ("before", "after")
        ),
        ("DPO policy kept", ["" if one.dpo_kept is None else "yes" if one.dpo_kept else "no" for one in rounds]),
        ("labels", of("labels", "num_labels", ",d")),
        ("gold labels", of("labels", "num_gold", ",d")),
        ("new pseudo-labels per problem", of("labels", "new_per_problem", ".2f")),
        ("right rationales dropped (duplicates, cap)", of("labels", "num_dropped", ",d")),
        ("dev accuracy", ["" if one.dev is None else f"{one.dev:.1%}" for one in rounds]),
    ]
    return [(what, values) for what, values in rows if any(values)]
