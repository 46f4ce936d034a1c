"""Check a GPU before it is trusted, once for each device and version of the packages (`dpost-lite doctor --gpu`).

Every check is one or two child processes: an error of CUDA makes a process useless, and one that dies is a check that
failed. What is found is recorded at once, so nothing is lost if a later check fails or the user stops.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpost_lite.errors import DpostError, ModelError, OutOfMemory, ProcessFailed, RunError
from dpost_lite.models.backend import FIRST_IMPORTS
from dpost_lite.pipeline import gpu_attention, gpu_checks, gpu_memory
from dpost_lite.pipeline.gpu_checks import Outcome
from dpost_lite.pipeline.worker import run_in_child
from dpost_lite.recipe import Recipe
from dpost_lite.system import gpu_record
from dpost_lite.system.gpu_record import Feature, Result, State
from dpost_lite.system.machine import cache_dir

Part = Callable[[str, Path], Outcome | None]
"""A function of the device and a folder. It returns None if the next part decides."""

LIMIT_S = 300.0  # unsloth compiles for a minute or two; what takes longer than this hangs
MARKS = {"ok": "✓", "note": "!", "failed": "✗", "not applicable": "-"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: its parts, each in its own process (one that must import a module first names it), what a
    failure switches off, and what that costs or what to do, as the end of a sentence.
    """

    name: str
    parts: tuple[tuple[Part, str | None], ...]
    switches_off: Feature | None
    remedy: str


CHECKS = (
    Check(
        "attention", ((gpu_attention.fused_attention, None),), "attention",
        "switched off, matrix products compute it, sampling may be slower",
    ),  # first: graphs and sampler are checked with what it leaves on
    Check(
        "CUDA graphs", ((gpu_checks.graphs, None),), "graphs", "switched off, sampling of small models is slower"
    ),
    Check(
        "sampler", ((gpu_checks.engine, None),), "engine",
        "`run` refuses this GPU; use --gpu-mem cpu, and please report it",
    ),
    Check(
        "4-bit layers", ((gpu_checks.four_bit, None),), "4bit",
        "`run` refuses 4-bit weights; use --precision 16bit, which needs more memory",
    ),
    Check(
        "unsloth", ((gpu_checks.plain_step, None), (gpu_checks.unsloth_step, FIRST_IMPORTS["unsloth"])), "unsloth",
        "switched off, the plain backend trains, which is slower",
    ),
    Check(
        "memory cap", ((gpu_memory.memory_cap, None),), None,
        "a size given as --gpu-mem is planned for but not enforced",
    ),
    Check(
        "memory", ((gpu_memory.memory_plan, None),), None,
        "nothing is switched off; if a stage runs out of memory, give a smaller --gpu-mem",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckTask:
    """The `Task` of one part."""

    part: Part
    device: str

    def run(self, out: Path, progress: Callable[..., None]) -> dict[str, Any]:
        """Return the part's outcome as a dictionary, empty if it has none."""
        outcome = self.part(self.device, out)
        return {} if outcome is None else asdict(outcome)


def check_once(say: Callable[[str], None]) -> None:
    """Run the checks that are not recorded for this GPU and these versions, and `say` each result; none on a CPU."""
    name = gpu_record.device_name()
    if name is None:
        return
    recorded = gpu_record.results()
    if missing := [check for check in CHECKS if check.name not in recorded]:
        say(f"Checking {name}, which is done once and takes a minute or two:")
        for result in run_checks(missing):
            say(line(result))
        say("")


def run_checks(checks: Sequence[Check], device: str = "cuda") -> Iterator[Result]:
    """Run checks, whatever is recorded, and yield each result once it is recorded itself.

    A check that runs out of memory says nothing about the device and is not recorded: the next run repeats it. Raises
    RunError if the disk is full.
    """
    for check in checks:
        try:
            result = _run(check, device)
        except OutOfMemory as error:
            yield Result(check.name, "note", f"not checked, for want of memory ({error}): close other programs")
            continue
        gpu_record.remember(result)
        yield result


def _run(check: Check, device: str, *, is_repeated: bool = False) -> Result:
    """Run one check, and once more if its process dies or hangs."""
    log = cache_dir() / "gpu-check" / f"{check.name.replace(' ', '-')}.log"
    failed: State = "failed" if check.switches_off else "note"
    try:
        outcome = _outcome(check, device, log)
    except ProcessFailed as error:
        if not is_repeated:  # perhaps the device was busy, or a first compilation took long
            return _run(check, device, is_repeated=True)
        last_line = f"; {log} ends: {error.last_line}" if error.last_line else ""
        outcome = Outcome(failed, f"the check crashed twice ({error.reason}{last_line})")
    except (OutOfMemory, RunError):
        raise
    except DpostError as error:  # such as NaN; what to do about it is said of a run
        outcome = Outcome(failed, str(error).partition(":")[0])
    if outcome.state in ("failed", "note"):
        return Result(check.name, outcome.state, f"{outcome.text}: {check.remedy}", check.switches_off)
    return Result(check.name, outcome.state, outcome.text, check.switches_off)


def _outcome(check: Check, device: str, log: Path) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="dpost-lite-") as folder:
        for part, first_import in check.parts:
            found = run_in_child(
                CheckTask(part, device), Path(folder), log=log, progress=lambda *_, **__: None,
                first_import=first_import, limit_s=LIMIT_S,
            )  # fmt: skip
            if found.metrics:
                return Outcome(**found.metrics)
    raise ValueError(f"no part of the check '{check.name}' decides")


def line(result: Result) -> str:
    """Return a result as a line of text."""
    words = "" if result.state in ("ok", "note") else f"{result.state}: "
    return f"{MARKS[result.state]} {result.name:<18} {words}{result.text}"


def refuse(recipe: Recipe) -> None:
    """Raise ModelError if this GPU is known to compute wrong what a recipe needs."""
    off = gpu_record.switched_off()
    if "engine" in off:
        raise ModelError(
            "this GPU: the sampler failed its check (`dpost-lite doctor` says how); run on the CPU with --gpu-mem cpu, "
            "and please report it, or test again with `dpost-lite doctor --gpu`"
        )
    if "4bit" in off and recipe.model.precision == "4bit":
        raise ModelError(
            "model.precision=4bit: 4-bit layers compute wrong results on this GPU (`dpost-lite doctor` says how); "
            "use --precision 16bit, or test again with `dpost-lite doctor --gpu`"
        )
