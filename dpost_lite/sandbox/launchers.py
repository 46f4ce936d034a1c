"""Starting a Python that the kernel shuts off from files, network and other processes: by sandlock or bubblewrap."""

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from dpost_lite.errors import SandboxError
from dpost_lite.sandbox.seccomp import MACHINES, allow_list

Launcher = Literal["sandlock", "bubblewrap"]

SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/urandom")
ENVIRONMENT = {
    "HOME": "/", "LANG": "C.UTF-8", "PATH": "/nowhere", "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
WAY_OUT = "set code.sandbox=monty"


class Started(Protocol):
    """A started worker; the three files are unbuffered."""

    stdin: IO[bytes] | None
    stdout: IO[bytes] | None
    stderr: IO[bytes] | None

    @property
    def pid(self) -> int | None: ...

    def kill(self) -> None:
        """Kill it and all that it started."""

    def wait(self) -> object: ...


def start(launcher: Launcher, command: list[str]) -> Started:
    """Start a command in the sandbox. Raises SandboxError if it cannot be started.

    The process ends with the thread that started it, at the latest.
    """
    return _start_sandlock(command) if launcher == "sandlock" else _start_bubblewrap(command)


def check(launcher: Launcher) -> None:
    """Raise SandboxError, in one line, if something is missing that the launcher needs."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise SandboxError(f'the sandbox "{launcher}" needs Linux on {" or ".join(MACHINES)}; {WAY_OUT}')
    if launcher == "bubblewrap":
        if shutil.which("bwrap") is None:
            raise SandboxError(
                f'the sandbox "bubblewrap" needs the program bwrap: install the package bubblewrap, or {WAY_OUT}'
            )
        return
    try:
        import sandlock
    except (ImportError, OSError) as error:
        raise SandboxError(
            f'the sandbox "sandlock" needs its package ({error}): pip install "dpost-lite[sympy]", or {WAY_OUT}'
        ) from error
    has, needs = sandlock.landlock_abi_version(), sandlock.min_landlock_abi()
    if has < needs:
        what = f"this kernel has {has}" if has > 0 else "this kernel has none, or it is switched off"
        raise SandboxError(
            f'the sandbox "sandlock" needs Landlock ABI {needs} (Linux 6.12), and {what}; '
            f'use the sandbox "bubblewrap", or {WAY_OUT}'
        )


def python_command(settings: dict[str, Any]) -> list[str]:
    """Return the command of a worker (inside.py). Raises SandboxError if sympy is missing."""
    everything = {**settings, "packages": package_folders(), "filter": allow_list(platform.machine()).hex()}
    text = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
    return [python_program(), "-s", "-S", "-P", "-B", "-X", "utf8", "-c", text, json.dumps(everything)]


def python_program() -> str:
    """Return the path of the Python that this environment is based on, without links."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def package_folders() -> list[str]:
    """Return the folders that hold sympy and what it needs. Raises SandboxError if sympy is missing."""
    folders = []
    for name in ("sympy", "mpmath"):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise SandboxError(f"this sandbox needs the package {name}: pip install {name}, or {WAY_OUT}")
        folder = Path(found.origin).resolve().parent.parent
        if Path.home().resolve().is_relative_to(folder):
            raise SandboxError(f"{name} lies in {folder}, which a sandbox must not show to code; pip install {name}")
        folders.append(str(folder))
    return sorted(set(folders))


def readable() -> list[str]:
    """Return the files and folders that Python needs, none of them inside another."""
    python = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    if sys.base_prefix not in ("/", "/usr"):
        python.append(os.path.join(sys.base_prefix, "lib"))
    system = [*SYSTEM_LIBRARIES, python_program(), *python]
    return _outermost(path for path in (*system, *package_folders()) if os.path.exists(path))


def bubblewrap_command(command: list[str]) -> list[str]:
    """Return the command that runs `command` in new namespaces, with an empty, unchangeable file system.

    It shows the files that Python needs, at their own paths. There is no /proc.
    """
    arguments = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    arguments += ["--tmpfs", "/"]
    for path in readable():
        arguments += ["--ro-bind", path, path]
    for path in DEVICES:
        arguments += ["--dev-bind", path, path]
    return [shutil.which("bwrap") or "bwrap", *arguments, "--remount-ro", "/", "--chdir", "/", "--", *command]


def _outermost(paths: Iterable[str]) -> list[str]:
    chosen: list[str] = []
    for path in sorted(set(paths), key=lambda path: (len(Path(path).parts), path)):
        if not any(Path(path).is_relative_to(other) for other in chosen):
            chosen.append(path)
    return chosen


def _start_sandlock(command: list[str]) -> Started:
    import sandlock

    pipe = sandlock.StdioMode.PIPED
    sandbox = sandlock.Sandbox(
        fs_readable=[*readable(), *DEVICES], fs_writable=["/dev/null"], cwd="/", max_processes=4,
        clean_env=True, env=ENVIRONMENT, no_coredump=True, no_randomize_memory=True,
    )  # fmt: skip
    try:  # without random addresses, sets of objects have the same order in every worker
        return sandbox.popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    except (RuntimeError, OSError, sandlock.SandlockError) as error:
        raise SandboxError(f'the sandbox "sandlock" does not work here ({error}); {WAY_OUT}') from error


def _start_bubblewrap(command: list[str]) -> Started:
    return _Group(
        bubblewrap_command(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        bufsize=0, start_new_session=True, env={},
    )  # fmt: skip


class _Group(subprocess.Popen[bytes]):
    def kill(self) -> None:
        if self.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
