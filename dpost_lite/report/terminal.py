"""Show the events of a run live, on a terminal or in a log.

On a terminal, finished stages scroll up, and a live block below shows the running stage (bar, rate, time left, latest
metrics) and the whole run. Elsewhere: one plain line for each start and end of a stage, and occasional progress lines.

Text from models, data files and errors is untrusted: it is never interpreted as rich markup, and control characters
that could move the cursor or change colours are replaced.
"""

import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_INTERVAL_S = 10.0  # minimum time between progress lines if the output is not a terminal
BAR_WIDTH = 24


@dataclass(slots=True)
class _Running:
    """The running stage; its rate counts from `since` and `done_before`, to exclude the time to load a model."""

    name: str
    started: float
    done: float = 0
    total: float = 0
    unit: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    since: float | None = None
    done_before: float = 0
    updated: float = 0

    def update(self, event: Mapping[str, Any], now: float) -> None:
        if self.since is None or event["done"] < self.done:  # a stage's second part starts at 0 again
            self.since, self.done_before = now, event["done"]
        self.done, self.total, self.unit, self.updated = event["done"], event["total"], event["unit"], now
        self.metrics = event.get("metrics") or {}

    def rate(self) -> float | None:
        """Units per second, or None if not known yet."""
        if self.since is None or self.updated <= self.since or self.done <= self.done_before:
            return None
        return (self.done - self.done_before) / (self.updated - self.since)

    def seconds_left(self, now: float) -> float | None:
        rate = self.rate()
        return max(0.0, (self.total - self.done) / rate - (now - self.updated)) if rate else None

    def status(self, now: float) -> str:
        """`120/960 rationales, 3.1/s, 4:30 left`, as far as known."""
        if not self.unit:
            return f"{as_time(now - self.started)} so far"
        parts = [f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"]
        rate, left = self.rate(), self.seconds_left(now)
        if rate is not None and left is not None:
            parts += [f"{rate:.3g}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each", f"{as_time(left)} left"]
        return ", ".join(parts)


class TerminalView:
    """Shows events: pass it to a Run as a listener and keep it open (`with`) during the run.

    `stages` are the names of all stages in order, if known: the view then shows the position in the whole run.
    """

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.monotonic, stages: Sequence[str] = ()
    ) -> None:
        self._console = console
        self._clock = clock
        self._stages = list(stages)
        self._rates = ""  # where the rates behind the estimate come from
        self._time_left_at: tuple[float, float] | None = None  # of the run: seconds, and time of the estimate
        self._opened = clock()
        self._running: _Running | None = None
        self._last_line = 0.0
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, get_renderable=self._block, refresh_per_second=4, transient=True)

    def __enter__(self) -> "TerminalView":
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event (see runs/journal.py); unknown kinds are ignored."""
        show = getattr(self, f"_on_{event['kind']}", None)
        if show is not None:
            show(event)

    def _on_stage_started(self, event: Mapping[str, Any]) -> None:
        now = self._clock()
        self._running = _Running(event["stage"], started=now)
        self._last_line = now
        if not self._live:
            self._print(f"{event['stage']}: started{self._place()}")

    def _on_stage_finished(self, event: Mapping[str, Any]) -> None:
        self._running = None
        self._print_end("✓", event, as_time(event["seconds"]), f"finished in {as_time(event['seconds'])}")

    def _on_stage_skipped(self, event: Mapping[str, Any]) -> None:
        self._print_end("·", event, "done", "already done")

    def _on_planned(self, event: Mapping[str, Any]) -> None:
        self._rates = event["rates"]

    def _on_time_left(self, event: Mapping[str, Any]) -> None:
        is_first = self._time_left_at is None
        self._time_left_at = event["seconds"], self._clock()
        if is_first:
            self._print(f"ETA {as_time(event['seconds'])} ({self._rates})")
        elif event.get("stage"):
            pace = f"{event['stage']} takes {as_time(event['expected'])}, planned {as_time(event['planned'])}"
            self._print(f"ETA {as_time(event['seconds'])}: {pace}")

    def _on_notice(self, event: Mapping[str, Any]) -> None:
        self._print(f"note: {event['text']}", style="yellow")

    def _on_alarm(self, event: Mapping[str, Any]) -> None:
        self._print(f"alarm: {event['stage']}: {event['text']}", style="bold yellow")

    def _on_progress(self, event: Mapping[str, Any]) -> None:
        now = self._clock()
        running = self._running
        if running is None:
            return
        running.update(event, now)
        if not self._live and now - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = now
            figures = as_figures(running.metrics)
            self._print(f"{running.name}: {running.status(now)}{', ' if figures else ''}{figures}")

    def _print_end(self, mark: str, event: Mapping[str, Any], short: str, long: str) -> None:
        figures = as_figures(event.get("metrics") or {})
        if self._live:
            self._print(f"{mark} {event['stage']:<24} {short:>8}  {figures}")
        else:
            self._print(f"{event['stage']}: {long}{': ' if figures else ''}{figures}")

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(plain(text, style), soft_wrap=not self._live)

    def _block(self) -> RenderableType:
        """The live block: the running stage and the whole run."""
        running, now = self._running, self._clock()
        if running is None:
            return Text("")
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=running.total or 1, completed=running.done, width=BAR_WIDTH)
        row.add_row(plain(f"▶ {running.name}", "bold"), bar, plain(running.status(now)))
        whole = f"  {as_time(now - self._opened)} elapsed{self._place()}{self._time_left(now)}"
        figures = [plain(f"  {as_figures(running.metrics)}")] if running.metrics else []
        return Group(row, *figures, plain(whole, style="dim"))

    def _place(self) -> str:
        running = self._running
        if running is None or running.name not in self._stages:
            return ""
        return f" (stage {self._stages.index(running.name) + 1} of {len(self._stages)})"

    def _time_left(self, now: float) -> str:
        """The time left for the whole run, from the last estimate."""
        if self._time_left_at is None:
            return ""
        seconds, estimated_at = self._time_left_at
        return f", ETA {as_time(max(0.0, seconds - (now - estimated_at)))}"


def printable(text: str) -> str:
    """Return `text` with control characters and characters that cannot be encoded replaced by �."""
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


def plain(text: str, style: str = "") -> Text:
    """Return `text` as rich Text without markup or control characters."""
    return Text(printable(text), style=style)


def as_time(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def as_hours(seconds: float) -> str:
    """`12 minutes`, `3.4 hours`, `2.1 days`: rounded, for estimates."""
    for unit, length in (("days", 48 * 3600), ("hours", 2 * 3600)):
        if seconds >= length:
            return f"{seconds / {'days': 86400, 'hours': 3600}[unit]:.1f} {unit}"
    return f"{max(1, round(seconds / 60))} minutes"


def as_figures(metrics: Mapping[str, Any]) -> str:
    """Return a stage's metrics on one line: `labels 240, gold 80`; for a score, strict accuracy and interval."""
    return ", ".join(
        f"{key.removeprefix('num_').replace('_', ' ')} {_figure(key, value)}"
        for key, value in metrics.items()
        if value is not None and key != "proof"  # told at the end
    )


def _figure(key: str, value: Any) -> str:
    if isinstance(value, Mapping) and "strict" in value:
        return f"{value['strict']:.1%} right ({value['low']:.1%} to {value['high']:.1%}) of {value['num_problems']}"
    if key == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    if isinstance(value, float):
        return f"{value:.0%}" if key == "right" else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
