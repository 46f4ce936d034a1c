"""The real Python in a sandbox of the kernel: what code can do there, and above all what it cannot."""

import contextlib
import json
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from dpost_lite.errors import SandboxError
from dpost_lite.sandbox import choose, launchers, seccomp
from dpost_lite.sandbox.base import MAX_PRINTED, PRINTED_TOO_MUCH, Limits, took_too_long, took_too_much_memory
from dpost_lite.sandbox.real_python import RealPython

LIMITS = Limits(seconds=1.0, memory_mib=64)
SECRET = "secret-5f3c"
WRITE = "import os\ndef write(*a):\n    try: os.write(*a)\n    except OSError: pass\n"
TOO_LONG, TOO_MUCH = took_too_long(LIMITS), took_too_much_memory(LIMITS)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes of the Linux kernel")


@pytest.fixture(scope="module", params=["sandlock", "bubblewrap"])
def sandbox(request):
    os.environ["DPOST_SECRET"] = SECRET
    try:
        sandbox = open_or_skip(request.param, num_workers=2)
    finally:
        del os.environ["DPOST_SECRET"]
    yield sandbox
    sandbox.close()


def open_or_skip(launcher: launchers.Launcher, num_workers: int = 1) -> RealPython:
    """Skip the test where the launcher does not work; not where it works and lets code out."""
    try:
        return RealPython(launcher, LIMITS, num_workers)
    except SandboxError as error:
        if "a trial gave" in str(error):
            raise
        pytest.skip(str(error))


def read(sandbox: RealPython, code: str, *earlier: str) -> str:
    return sandbox.run(earlier, code).result(timeout=30).text


def attack(sandbox: RealPython, code: str) -> str:
    """Run code beside an innocent call, which must not notice, and before another one on the same worker."""
    beside = "import time\nfor _ in range(10): time.sleep(0.01)\nsum(range(10))"
    calls: list[Future[str]] = [sandbox.run([], beside), sandbox.run([], code)]
    after = [sandbox.run([], "6 * 7") for _ in range(2)]
    texts = [call.result(timeout=30).text for call in (*calls, *after)]
    assert [texts[0], *texts[2:]] == ["45", "42", "42"]
    return texts[1]


def refused(text: str) -> bool:
    return text.split(":")[0] in ("PermissionError", "FileNotFoundError", "OSError", "ProcessLookupError")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('a')\n1 + 1", "a\n2"),
        ("x = 3", ""),
        ("None", ""),
        ("'text'", "'text'"),
        ("import sys\nprint('a'); print('b', file=sys.stderr); print('c')", "a\nb\nc"),
        ("print('a')\n1 / 0", "a\nZeroDivisionError: division by zero"),
        ("{}['k']", "KeyError: 'k'"),
        ("assert False", "AssertionError"),
        ("x = (", "SyntaxError: '(' was never closed"),
        ("raise ValueError('one\\ntwo')", "ValueError: one two"),
        ("raise ValueError(object())", "ValueError: <object object at 0x...>"),
        ("from math import nothing", "ImportError: cannot import name 'nothing' from 'math'"),
        ("input()", "EOFError: EOF when reading a line"),
        ("exit", "NameError: name 'exit' is not defined"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("", ""),
    ],
)
def test_the_text_is_that_of_a_notebook(sandbox, code, text):
    assert read(sandbox, code).replace(" (unknown location)", "") == text


def test_sympy_works(sandbox):
    solved = "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 5*x + 6, x))\nsimplify(sin(x)**2 + cos(x)**2)"
    assert read(sandbox, solved) == "[2, 3]\n1"
    assert read(sandbox, "from fractions import Fraction\nFraction(1, 3) + Fraction(1, 6)") == "Fraction(1, 2)"
    assert read(sandbox, "import json, statistics\nstatistics.mean([1, 2, 6])") == "3"


def test_a_block_sees_earlier_ones_but_not_what_they_print(sandbox):
    assert read(sandbox, "x + 1", "x = 41\nprint('not this')\nx") == "42"
    assert read(sandbox, "x", "x = 1", "x = 2\n1 / 0\nx = 3") == "2"
    assert read(sandbox, "x", "import os\nx = 4\nprint('a', end='')\nos.write(1, b'not this')") == "4"
    assert read(sandbox, "x", "x = 5\nimport sys\nsys.stdout.close()").endswith(
        "ValueError: I/O operation on closed file."
    )


def test_calls_share_nothing(sandbox):
    for _ in range(4):
        assert read(sandbox, "import math\nmath.pi = 3\ny = 1\nmath.pi") == "3"
        assert read(sandbox, "import math\nprint(math.pi > 3.1)\ny") == "True\nNameError: name 'y' is not defined"


def test_equal_calls_give_equal_texts(sandbox):
    code = "import random, sympy\nprint(random.random(), {'a', 'b', 'c'}, hash('x'))\nsympy.randMatrix(2)"
    assert len({read(sandbox, code) for _ in range(6)}) == 1


def test_a_limit_of_time_is_for_each_block(sandbox):
    nap = "import time\ntime.sleep(0.7)"
    assert read(sandbox, nap + "\n'done'", nap, nap) == "'done'"
    assert read(sandbox, "1", "while True: pass") == TOO_LONG


def test_many_calls_run_side_by_side(sandbox):
    calls = [sandbox.run([f"x = {number}"], "x * x") for number in range(40)]
    assert [call.result(timeout=30).text for call in calls] == [str(number**2) for number in range(40)]


def test_run_returns_at_once(sandbox):
    started = time.monotonic()
    call = sandbox.run([], "import time\ntime.sleep(0.5)")
    assert time.monotonic() - started < 0.3
    assert call.result(timeout=30).text == ""


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('head', flush=True)\nwhile True: pass", f"head\n{TOO_LONG}"),
        ("9**9**9", TOO_LONG),
        ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", TOO_LONG),
        ("import time\ntime.sleep(100)", TOO_LONG),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError: maximum recursion depth exceeded"),
        ("x = bytearray(10**9)", TOO_MUCH),
        ("x = []\nwhile True: x.append(bytes(10**6))", TOO_MUCH),
        ("import mmap\nmmap.mmap(-1, 10**9)", TOO_MUCH),
    ],
)
def test_code_that_takes_too_much(sandbox, code, text):
    assert attack(sandbox, code) == text


def test_memory_is_counted_on_top_of_what_python_and_sympy_need(sandbox):
    assert read(sandbox, f"len(bytearray({LIMITS.memory_mib - 8} * 2**20)) > 0") == "True"
    assert read(sandbox, f"len(bytearray({LIMITS.memory_mib + 8} * 2**20)) > 0") == TOO_MUCH
    assert read(sandbox, "len(x)", "x = 'kept'\ny = bytearray(10**9)") == "4"


def test_recursion_without_a_limit_ends_somehow(sandbox):
    assert attack(sandbox, "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)")
    assert attack(sandbox, "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)")


def test_a_gigabyte_of_output(sandbox):
    text = attack(sandbox, "print('head')\nfor _ in range(10**6): print('x' * 1000)")
    assert text.startswith("head\nxxx")
    assert text.endswith(PRINTED_TOO_MUCH)
    assert len(text) < 500
    exactly = f"import sys\n_ = sys.stdout.write('é' * {MAX_PRINTED})"
    assert PRINTED_TOO_MUCH not in read(sandbox, exactly)
    assert PRINTED_TOO_MUCH in read(sandbox, exactly.replace(f"{MAX_PRINTED}", f"{MAX_PRINTED + 1}"))


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'sleep 77 & sleep 77'])",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(77)'])",
        "import os\nos.posix_spawn('/bin/sleep', ['sleep', '77'], {})",
        "import os\nos.execv('/bin/sleep', ['sleep', '77'])",
        "import os\nos.setsid()",
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
        "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['/bin/sh'])"
        " if any(c.__name__ == 'Popen' for c in ().__class__.__base__.__subclasses__())"
        " else [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0]"
        ".__init__.__globals__['execv']('/bin/sh', ['sh'])",
    ],
)
def test_no_process_is_started(sandbox, code):
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    assert refused(attack(sandbox, code))
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_threads_work_and_end_with_the_block(sandbox):
    code = "import threading, time\nt = threading.Thread(target={})\nt.start()\n"
    assert attack(sandbox, code.format("lambda: print('in a thread')") + "t.join()\n1") == "in a thread\n1"
    assert attack(sandbox, code.format("time.sleep, args=(77,)") + "2") == "2"
    assert attack(sandbox, "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()")


def test_files_cannot_be_read(sandbox, tmp_path):
    (tmp_path / "file").write_text(SECRET)
    with tempfile.NamedTemporaryFile("w", dir=Path.home(), prefix=".dpost-test-") as in_home:
        in_home.write(SECRET)
        in_home.flush()
        paths = [tmp_path / "file", in_home.name, "/etc/passwd", "/proc/self/maps", "/proc/1/cmdline", __file__]
        for path in map(str, paths):
            assert refused(attack(sandbox, f"print(open({path!r}).read())"))
        for folder in (str(tmp_path), str(Path.home()), "/proc", "/tmp", os.getcwd()):
            text = read(sandbox, f"import os\nprint(os.listdir({folder!r}))")
            assert refused(text) or not any(name in text for name in ("file", ".dpost-test-", "tests"))


def test_the_environment_is_empty(sandbox):
    for code in (
        "import os\nprint(os.environ)",
        f"print(open('/proc/{os.getpid()}/environ').read())",
        "import os\nprint(open(f'/proc/{os.getppid()}/environ').read())",
        "import ctypes\ne = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n"
        "i = 0\nwhile e and e[i]:\n    print(e[i])\n    i += 1",
    ):
        text = attack(sandbox, code)
        assert SECRET not in text
        assert "DPOST" not in text


def test_nothing_is_written(sandbox, tmp_path):
    (tmp_path / "file").write_text("unchanged")
    folders = [tmp_path, Path.home(), "/tmp", "/dev/shm", "/", sys.prefix, *launchers.package_folders(), "."]
    for folder in map(str, folders):
        assert refused(attack(sandbox, f"open({folder!r} + '/written', 'w').write('x')"))
        assert not Path(folder, "written").exists()
    path = str(tmp_path / "file")
    for code in (
        "os.unlink({})",
        "os.truncate({}, 0)",
        "os.chmod({}, 0)",
        "os.mkdir({} + 'd')",
        "os.rename({0}, {0} + 'x')",
    ):
        assert refused(attack(sandbox, f"import os\n{code.format(repr(path))}"))
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "unchanged"
    assert not attack(sandbox, "import os\nf = os.memfd_create('x')\nwhile True: os.write(f, bytes(10**6))").isdigit()


def test_no_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        assert refused(attack(sandbox, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 0.5)"))
        with pytest.raises(TimeoutError):
            listener.accept()
    for kind in (
        "AF_INET, s.SOCK_DGRAM",
        "AF_INET6, s.SOCK_STREAM",
        "AF_UNIX, s.SOCK_STREAM",
        "AF_NETLINK, s.SOCK_RAW",
    ):
        assert refused(read(sandbox, f"import socket as s\ns.socket(s.{kind})"))


@pytest.mark.parametrize("target", [str(os.getpid()), "os.getppid()"], ids=["this process", "the parent"])
def test_other_processes_cannot_be_changed(sandbox, target):
    """With a signal that is ignored, and with limits that are only asked for, in case that the sandbox is broken."""
    nice, cores = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    for code in (
        "os.kill(T, signal.SIGURG)",
        "os.killpg(T, signal.SIGURG)",
        "os.kill(0, signal.SIGURG)",
        "os.kill(-1, signal.SIGURG)",
        "signal.pidfd_send_signal(os.pidfd_open(T), signal.SIGURG)",
        "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, T)",
        "resource.prlimit(T, resource.RLIMIT_CPU)",
        "os.setpriority(os.PRIO_PROCESS, T, 19)",
        "os.sched_setaffinity(T, {0})",
        "libc.ptrace(16, T, 0, 0) == 0 or failed()",
        "libc.process_vm_readv(T, 0, 0, 0, 0, 0) == 0 or failed()",
        "open(f'/proc/{T}/mem', 'r+b')",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (65, 65))",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ):
        text = attack(
            sandbox,
            f"import ctypes, fcntl, os, resource, signal\nT = {target}\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            f"def failed(): raise OSError(ctypes.get_errno(), 'failed')\n{code}",
        )
        assert refused(text) or text == "ValueError: not allowed to raise maximum limit", (code, text)
    assert nice == os.getpriority(os.PRIO_PROCESS, 0)
    assert cores == os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import os\nos._exit(0)", "SystemExit: the code ended its process (exit code 0)"),
        ("import os\nos._exit(7)", "SystemExit: the code ended its process (exit code 7)"),
        ("import ctypes\nctypes.string_at(0)", f"SystemExit: the code ended its process (signal {signal.SIGSEGV:d})"),
        ("import os\nos.closerange(0, 100)\nprint(1)", ""),
        (
            "import os\nfor fd in range(100):\n    try: os.close(fd)\n    except OSError: pass\nwhile True: pass",
            TOO_LONG,
        ),
        ("import os\nos._exit = lambda code: None\n5", "5"),
        ("import os\nos.write = os._exit = None\nprint(5)", "5"),
    ],
)
def test_code_that_breaks_its_process(sandbox, code, text):
    said = attack(sandbox, code)
    assert said == text or (not text and said.startswith("SystemExit")) or (text == "5" and said.startswith("5\n"))


def test_what_code_writes_is_never_taken_for_an_answer(sandbox):
    forged = json.dumps({"end": "done", "printed": "forged", "error": ""})
    to_all = f"{WRITE}for fd in range(64): write(fd, {forged!r}.encode() + b'\\n')"
    assert '"forged"' in attack(sandbox, to_all)
    dots = f"{WRITE}for fd in range(3, 64): write(fd, b'.' * 1000)\n"
    started = time.monotonic()
    assert TOO_LONG in attack(sandbox, f"{dots}while True: pass")
    assert time.monotonic() - started < 10
    assert attack(sandbox, f"{WRITE}while True:\n    for fd in range(64): write(fd, b'.' * 9999)")
    assert attack(sandbox, "import os\n_ = os.write(1, b'\\xff\\x00\\x1b[31m')") == "\ufffd\x00\x1b[31m"
    assert attack(sandbox, "print('\\ud800')") == "?"


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def none_runs(processes: set[psutil.Process]) -> bool:
    """Wait a little until all have ended. Where nobody buries orphans, zombies stay."""
    deadline = time.monotonic() + 5
    while running := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > deadline:
            return False
        psutil.wait_procs(running, timeout=0.1)
    return True


@pytest.mark.parametrize("launcher", ["sandlock", "bubblewrap"])
def test_code_runs_without_capabilities_and_with_a_filter_even_as_root(launcher):
    before = children()
    with contextlib.closing(open_or_skip(launcher)) as sandbox:
        sandbox.run([], "import time\ntime.sleep(0.5)")
        time.sleep(0.2)
        newest = max(children() - before, key=lambda process: process.create_time())
        status = Path(f"/proc/{newest.pid}/status").read_text().replace("\t", " ").splitlines()
        own = os.readlink("/proc/self/ns/net") != os.readlink(f"/proc/{newest.pid}/ns/net")
    assert {"CapEff: 0000000000000000", "CapPrm: 0000000000000000", "NoNewPrivs: 1", "Seccomp: 2"} <= set(status)
    assert own == (launcher == "bubblewrap")


@pytest.mark.parametrize("launcher", ["sandlock", "bubblewrap"])
def test_close_leaves_no_process(launcher):
    before = children()
    sandbox = open_or_skip(launcher)
    running = sandbox.run([], "while True: pass")
    waiting = [sandbox.run([], "1") for _ in range(20)]
    time.sleep(0.2)
    started = children() - before
    sandbox.close()
    assert len(started) >= 2
    assert none_runs(started)
    assert all(call.done() for call in (running, *waiting))


@pytest.mark.parametrize("launcher", ["sandlock", "bubblewrap"])
def test_nothing_is_left_if_this_process_is_killed(launcher):
    open_or_skip(launcher).close()
    program = (
        "import psutil, time\nfrom dpost_lite.sandbox.base import Limits\n"
        "from dpost_lite.sandbox.real_python import RealPython\n"
        f"sandbox = RealPython({launcher!r}, Limits(seconds=60), 1)\n"
        "sandbox.run([], 'while True: pass')\ntime.sleep(0.5)\nprint(flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        started = set(psutil.Process(parent.pid).children(recursive=True))
        parent.kill()
    assert len(started) >= 2
    assert none_runs(started)


def test_a_worker_that_dies_is_replaced():
    sandbox = open_or_skip("sandlock")
    with contextlib.closing(sandbox):
        call = sandbox.run([], "for i in range(3 * 10**6): pass\nprint(i)")
        time.sleep(0.1)
        for worker in list(sandbox._workers):
            worker.kill()
        assert call.result(timeout=30).text == "2999999", "it is repeated once"
        assert read(sandbox, "1 + 1") == "2"


def test_what_is_missing_is_said_in_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SandboxError, match=r"^the sandbox .bubblewrap. needs the program bwrap: install .*monty.*$"):
        RealPython("bubblewrap", LIMITS)
    monkeypatch.setitem(sys.modules, "sandlock", None)
    with pytest.raises(SandboxError, match=r'^the sandbox .sandlock. needs .*pip install "dpost-lite\[sympy\]".*$'):
        RealPython("sandlock", LIMITS)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match=r"needs Linux on x86_64 or aarch64"):
        RealPython("sandlock", LIMITS)
    assert all("needs Linux" in reason for name, reason in choose.available().items() if name != "monty")


def test_an_old_kernel_is_refused(monkeypatch):
    sandlock = pytest.importorskip("sandlock")
    monkeypatch.setattr(sandlock, "landlock_abi_version", lambda: -1)
    with pytest.raises(SandboxError, match=r"needs Landlock ABI 6 .*switched off.*bubblewrap"):
        RealPython("sandlock", LIMITS)


def test_a_sandbox_that_does_not_start_is_refused(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match=r"does not work here \(bwrap: No permissions to create new namespace\)"):
        RealPython("bubblewrap", LIMITS)


def test_a_sandbox_that_lets_code_out_is_refused(monkeypatch):
    """As when bwrap were a script that just runs the command."""
    open_or_skip("sandlock").close()
    monkeypatch.setattr(launchers, "bubblewrap_command", lambda command: command)
    monkeypatch.setattr(launchers, "check", lambda launcher: None)
    with pytest.raises(SandboxError, match=r"a trial gave .open.;"):
        RealPython("bubblewrap", LIMITS)


def test_the_arguments_of_bubblewrap(monkeypatch):
    monkeypatch.setattr(launchers.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(launchers, "readable", lambda: ["/usr/lib", "/somewhere/python"])
    monkeypatch.setattr(launchers, "ENVIRONMENT", {"PYTHONHASHSEED": "0"})
    assert " ".join(launchers.bubblewrap_command(["python", "-c", "code"])) == (
        "/opt/bwrap --unshare-all --die-with-parent --new-session --cap-drop ALL --clearenv --setenv PYTHONHASHSEED 0 "
        "--tmpfs / --ro-bind /usr/lib /usr/lib --ro-bind /somewhere/python /somewhere/python "
        "--dev-bind /dev/null /dev/null --dev-bind /dev/urandom /dev/urandom --remount-ro / --chdir / -- python -c code"
    )


def test_only_what_python_needs_can_be_read():
    pytest.importorskip("sympy")
    paths = launchers.readable()
    assert not [path for path in paths if Path.home().is_relative_to(path) or path == "/"]
    assert len(paths) == len(set(paths))
    for path in paths:
        assert not any(Path(path).is_relative_to(other) for other in paths if other != path)


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_the_filter_of_system_calls(machine, column):
    program = list(struct.iter_unpack("=HBBI", seccomp.allow_list(machine)))

    def verdict(number: int, *arguments: int, architecture: int = seccomp.MACHINES[machine]) -> int:
        data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
        at = value = 0
        while True:
            code, if_true, if_false, constant = program[at]
            if code == seccomp.RETURN:
                return constant
            if code == seccomp.LOAD:
                (value,) = struct.unpack_from("=I", data, constant)
            elif value == constant if code == seccomp.EQUALS else value & constant:
                at += if_true
            else:
                at += if_false
            at += 1

    allowed = {numbers[column] for numbers in seccomp.ALLOWED.values()} - {None}
    refused, allow = seccomp.FAIL | 1, seccomp.ALLOW
    special = {call[column] for call in (seccomp.CLONE, seccomp.CLONE3, seccomp.PRLIMIT, seccomp.FCNTL, seccomp.IOCTL)}
    assert not allowed & special
    for number in set(range(600)) - special:
        assert verdict(number) == (allow if number in allowed else refused)
        assert verdict(number, architecture=0x40000003) == seccomp.KILL
        assert verdict(number | 0x40000000) == refused
    assert verdict(seccomp.CLONE[column], 0x3D0F00) == allow
    assert verdict(seccomp.CLONE[column], 17) == verdict(seccomp.CLONE[column], 0x4011) == refused
    assert verdict(seccomp.CLONE3[column]) == seccomp.FAIL | 38
    assert verdict(seccomp.PRLIMIT[column], 0) == allow
    assert verdict(seccomp.PRLIMIT[column], 1) == refused
    for call, commands in ((seccomp.FCNTL, seccomp.FCNTL_COMMANDS), (seccomp.IOCTL, seccomp.IOCTL_COMMANDS)):
        for command in (*range(2000), *seccomp.IOCTL_COMMANDS, 0x5412, 0x8901, 0x8902):
            assert verdict(call[column], 3, command) == (allow if command in commands else refused)
