"""llama.cpp on machines that it crashes on: found out in a child process, avoided, remembered, and told in one line.

The child of these tests is a real one. A `sitecustomize` that only it imports has it die of a signal where
llama.cpp decodes.
"""

import json
import os
import queue
import signal
import threading
from pathlib import Path

import pytest
from test_gguf import save_model
from typer.testing import CliRunner

from dpost_lite.cli import diagnosis
from dpost_lite.cli.app import app
from dpost_lite.errors import DataError, ExportError
from dpost_lite.local import gguf, llama
from dpost_lite.local.engine import Engine
from dpost_lite.local.llama import Trial
from dpost_lite.local.request import Piece, Request, Solution
from dpost_lite.local.solver_process import SolverProcess
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.tools import Tools

SYSTEM_INFO = llama.system_info  # replaced in the tests below

WITH_BUFFERS = "sys.argv[-1] == 'on' and batch.n_tokens > 1"  # of `trial FILE on`


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder / "model", "llama", "smollm")
    return gguf.write_gguf(folder / "model", folder / "model.gguf")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> None:
    """A machine without AMX that nothing is remembered of, wherever the test runs."""
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llama, "system_info", lambda: "AVX2 = 1 | AMX_INT8 = 0")
    llama._machine.cache_clear()
    yield
    llama._machine.cache_clear()


def children(monkeypatch) -> list[str]:
    """Collect "on" or "off" for each child that tries a file."""
    tried: list[str] = []
    real = llama.run_module
    monkeypatch.setattr(llama, "run_module", lambda *a, **k: tried.append(a[-1]) or real(*a, **k))
    return tried


# Extra buffers


@pytest.mark.parametrize("extra_buffers", [True, False])
def test_a_file_is_opened_with_or_without_extra_buffers(tiny, extra_buffers):
    import llama_cpp.llama_cpp as bindings

    defaults = bindings.llama_model_default_params
    model = llama.open_gguf(tiny, extra_buffers=extra_buffers, n_ctx=32)
    assert model.model_params.use_extra_bufts is extra_buffers
    assert bindings.llama_model_default_params is defaults


@pytest.mark.parametrize(("rows", "way_out"), [(1, "close other programs"), (8, "a lower --parallel")])
def test_too_little_memory_for_the_context_is_not_the_files_fault(tiny, monkeypatch, rows, way_out):
    def failing(*_, **__):
        raise ValueError("Failed to create llama_context")

    monkeypatch.setattr("llama_cpp.Llama", failing)
    with pytest.raises(ExportError, match=f"no memory for .*{way_out}"):
        llama.open_gguf(tiny, extra_buffers=False, num_sequences=rows)


def test_a_file_that_crashes_with_extra_buffers_is_used_without_and_tried_once(tiny, dies, monkeypatch):
    dies(WITH_BUFFERS)
    tried = children(monkeypatch)
    assert llama.uses_extra_buffers(tiny) is False
    assert tried == ["on", "off"]
    assert llama.trials() == {"f16": Trial(True, False, "SIGSEGV")}
    assert llama.uses_extra_buffers(tiny) is False
    assert tried == ["on", "off"]  # it is remembered


def test_other_machines_keep_extra_buffers(tiny, monkeypatch):
    """Where nothing crashes: as fast as before."""
    monkeypatch.setattr(llama, "run_module", lambda *_, **__: _Ended(0, b"\n1 2\n"))  # real buffers may crash here
    assert llama.try_file(tiny) == (True, [1, 2])
    assert llama.trials() == {"f16": Trial(True, True, None)}


class _Ended:
    def __init__(self, returncode: int, stdout: bytes = b"", stderr: bytes = b"") -> None:
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


def test_with_amx_extra_buffers_are_not_even_tried(tiny, dies, monkeypatch):
    monkeypatch.setattr(llama, "system_info", lambda: "AVX2 = 1 | AMX_INT8 = 1 | OPENMP = 1")
    dies(WITH_BUFFERS)
    tried = children(monkeypatch)
    assert llama.uses_extra_buffers(tiny) is False
    assert tried == ["off"]
    assert llama.trials() == {"f16": Trial(True, False, None)}


def test_what_is_remembered_is_of_one_machine_and_version(tiny, monkeypatch):
    llama.remember("f16", Trial(True, True))
    monkeypatch.setattr(llama, "version", lambda package: "9.9.9")
    llama._machine.cache_clear()
    assert llama.trials() == {}
    llama.remember("q8_0", Trial(True, False))
    assert llama.trials() == {"q8_0": Trial(True, False)}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 3}'])
def test_a_damaged_record_is_no_error(tiny, text, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "llama.cpp.json").write_text(text)
    assert llama.trials() == {}
    llama.remember("f16", Trial(True, False))
    assert llama.trials() == {"f16": Trial(True, False)}


# Crashes


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_library_for_another_processor_kills_a_child_alone(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])]))
    SYSTEM_INFO.cache_clear()
    with pytest.raises(ExportError, match=r"cannot be loaded \(SIGILL: .*--no-binary llama-cpp-python"):
        SYSTEM_INFO()
    monkeypatch.setattr(llama, "system_info", SYSTEM_INFO)
    (finding,) = diagnosis._llama()  # so that `doctor` lives to tell
    assert (finding.topic, finding.state) == ("llama.cpp", "missing")
    assert "SIGILL" in finding.value


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_file_that_crashes_either_way_is_refused_in_one_line_and_tried_again_later(tiny, dies, monkeypatch):
    dies("True", "SIGILL")
    with pytest.raises(
        ExportError,
        match=r"crashes with f16 files .* \(SIGILL\); choose another type, such as q8_0: `export --quant q8_0`",
    ) as error:
        llama.uses_extra_buffers(tiny)
    assert "\n" not in str(error.value)
    assert llama.trials() == {"f16": Trial(False, False, "SIGILL")}
    monkeypatch.delenv("PYTHONPATH")
    tried = children(monkeypatch)
    monkeypatch.setattr(llama, "system_info", lambda: "AMX_INT8 = 1")  # real buffers may crash here
    assert llama.uses_extra_buffers(tiny) is False
    assert tried == ["off"]


def test_a_file_that_is_merely_wrong_is_not_tried_twice(tiny, dies, monkeypatch, tmp_path):
    dies("1 / 0")
    tried = children(monkeypatch)
    with pytest.raises(ExportError, match=r"cannot use the f16 file .*ZeroDivisionError"):
        llama.uses_extra_buffers(tiny)
    assert tried == ["on"]
    assert llama.trials() == {}


def test_an_export_whose_file_crashes_leaves_nothing(tiny, dies, tmp_path):
    dies("True")
    with pytest.raises(ExportError, match=r"crashes with q8_0 files .*SIGSEGV.*such as f16"):
        gguf.export(tiny.parent / "model", tmp_path / "out.gguf", quant="q8_0")
    assert not list(tmp_path.glob("out*"))


# The solver's own process


def works(tiny: Path) -> None:
    llama.remember("f16", Trial(True, False))


def test_a_solver_process_answers_as_the_engine_does(tiny):
    works(tiny)
    here = Engine(tiny, tools=Tools(Calculator()), max_new_tokens=12, extra_buffers=False)
    with SolverProcess(tiny, tools=Tools(Calculator()), max_new_tokens=12) as solver:
        for temperature, seed in ((0.0, 0), (1.0, 3), (1.0, 4)):
            request = Request.of("How many?", temperature=temperature, seed=seed)
            (expected,) = here.run([request])
            assert solver.solve("How many?", temperature=temperature, seed=seed) == expected
            *pieces, solution = solver.stream(request)
            assert solution == expected
            assert "".join(piece.text for piece in pieces) == expected.text
        with pytest.raises(DataError, match="the question has"):
            solver.solve("many " * 400)
        assert solver.solve("How many?").text  # it goes on after a mistake
        assert (solver.num_context, solver.is_alive) == (256, True)
    assert not solver.is_alive


def test_threads_share_a_process_and_each_request_hears_of_itself_alone(tiny):
    works(tiny)
    requests = [
        Request.of(
            f"{n} apples?",
            temperature=1.0,
            seed=n,
        )
        for n in range(12)
    ]
    with SolverProcess(tiny, tools=Tools(), max_new_tokens=12, num_parallel=4) as solver:
        expected = list(solver.solve_all(requests))
        told: dict[int, list] = {n: [] for n in range(12)}
        threads = [threading.Thread(target=lambda n=n: told[n].extend(solver.stream(requests[n]))) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for n, events in told.items():
        assert isinstance(events[-1], Solution)
        assert "".join(event.text for event in events[:-1]) == events[-1].text
        assert len({e.text for e in expected}) > 6
        assert events[-1].text == expected[n].text


def test_a_cancelled_answer_ends_early_and_the_next_one_starts(tiny):
    works(tiny)
    with SolverProcess(tiny, tools=Tools(), max_new_tokens=200) as solver:
        long = Request.of("How many?", temperature=1.0, seed=1)
        told: queue.Queue = queue.Queue()
        number = solver.start(long, told.put)
        assert isinstance(told.get(timeout=30), Piece)
        solver.cancel(number)
        while isinstance(event := told.get(timeout=30), Piece):
            pass
        assert event.end == "cancelled"
        assert event.num_tokens < 200
        solver.cancel(number)  # it has ended: nothing happens
        stream = solver.stream(long)
        next(stream)
        stream.close()
        assert solver.solve("How many?").text


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_crash_is_told_to_all_who_wait(tiny, dies):
    llama.remember("f16", Trial(True, False))
    dies("batch.n_tokens == 3")  # one token for each of three rows
    with SolverProcess(tiny, tools=Tools(), max_new_tokens=50, num_parallel=3) as solver:
        told: queue.Queue = queue.Queue()
        for n in range(5):
            solver.start(Request.of(f"{n} apples?", temperature=1.0, seed=n), lambda event, n=n: told.put((n, event)))
        ended = {}
        while len(ended) < 5:
            n, event = told.get(timeout=60)
            if not isinstance(event, Piece):
                ended[n] = event
        assert all(isinstance(event, ExportError) for event in ended.values()), ended
        assert "SIGSEGV" in str(ended[4])
        assert not solver.is_alive
        with pytest.raises(ExportError, match="SIGSEGV"):
            solver.start(Request.of("?"), told.put)


@pytest.mark.parametrize("command", ["solve", "eval"])
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_commands_survive_a_crash_with_one_line(tiny, dies, tmp_path, monkeypatch, command):
    """The trial went well, and llama.cpp crashes later all the same."""
    llama.remember("f16", Trial(True, True))
    monkeypatch.chdir(tmp_path)
    dies("os.kill(os.getpid(), signal.SIGABRT)")
    arguments = ["solve", str(tiny), "How many?"]
    if command == "eval":
        arguments = ["eval", str(tiny), "--data", "synthetic", "--limit", "2", "--calculator", "on"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("dpost-lite: llama.cpp crashed while it answered with ")
    assert "(SIGABRT" in line
    assert "the same command tries again without its extra buffers" in line
    assert llama.trials() == {"f16": Trial(True, False, "SIGABRT")}
    again = CliRunner().invoke(app, arguments)
    assert "choose another type, such as q8_0: `export --quant q8_0`" in again.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_child_that_was_stopped_says_nothing_of_the_file(tiny, dies, name):
    """Ctrl-C, or no memory left: llama.cpp is not to blame, and nothing is remembered."""
    dies("True", name)
    with pytest.raises(ExportError, match=f"testing the f16 file was stopped \\({name}\\)"):
        llama.uses_extra_buffers(tiny)
    assert llama.trials() == {}
    llama.remember("f16", Trial(True, True))
    with SolverProcess(tiny, tools=Tools()) as solver, pytest.raises(ExportError, match="close other programs"):
        solver.solve("How many?")
    assert llama.trials() == {"f16": Trial(True, True)}


def test_children_are_out_of_reach_of_ctrl_c(tiny, monkeypatch):
    works(tiny)
    with SolverProcess(tiny, tools=Tools()) as solver:
        assert os.getsid(solver._process.pid) != os.getsid(0)


def test_a_python_error_in_the_solver_is_no_crash(tiny, dies):
    llama.remember("f16", Trial(True, True))
    dies("1 / 0")
    with SolverProcess(tiny, tools=Tools()) as solver, pytest.raises(ExportError, match=r"ZeroDivisionError.*a bug"):
        solver.solve("How many?")
    assert llama.trials() == {"f16": Trial(True, True)}


def test_an_export_does_not_forget_a_crash_that_its_probe_does_not_show(tiny, tmp_path, monkeypatch):
    llama.remember("q8_0", Trial(True, False, "SIGSEGV"))
    tried = children(monkeypatch)
    gguf.export(tiny.parent / "model", tmp_path / "out.gguf", quant="q8_0")
    assert tried == ["q8_0", "off"]
    assert llama.trials() == {"q8_0": Trial(True, False, "SIGSEGV")}


def test_the_users_folder_is_not_imported_from(tiny, tmp_path, monkeypatch):
    works(tiny)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gguf.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "llama_cpp.py").write_text("raise SystemExit('shadowed')")
    llama.try_file(tiny)
    with SolverProcess(tiny, tools=Tools(), max_new_tokens=2) as solver:
        assert solver.solve("How many?").text


def test_a_header_with_a_strange_type_is_no_traceback(monkeypatch):
    for value in ("abc", [1], 10**30):
        monkeypatch.setattr(llama, "read_header", lambda _, value=value: {"general.file_type": value})
        assert llama.file_type(Path("x.gguf")) == "unknown"


def test_a_solver_process_ends_with_its_block(tiny):
    works(tiny)
    with SolverProcess(tiny, tools=Tools()) as solver:
        process = solver._process
        assert process.poll() is None
    assert process.returncode == 0
    solver = SolverProcess(tiny, tools=Tools())
    solver.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # in the middle of an answer
    assert solver._process.returncode == -signal.SIGKILL or os.name == "nt"


def test_what_the_solver_refuses_is_an_error_here(tmp_path):
    with pytest.raises(ExportError, match=r"none\.gguf cannot be read"):
        SolverProcess(tmp_path / "none.gguf", tools=Tools())


# doctor


def told(monkeypatch) -> str:
    return "\n".join(f"{finding.topic}: {finding.value}" for finding in diagnosis._llama())


def test_doctor_says_what_was_found_and_what_is_done(monkeypatch):
    assert "runs with extra buffers" in told(monkeypatch)
    assert "none tested yet" in told(monkeypatch)
    llama.remember("q4_k_m", Trial(True, False, "SIGSEGV"))
    llama.remember("q8_0", Trial(False, False, "SIGILL"))
    said = told(monkeypatch)
    assert str(llama.record()) in said
    assert "q4_k_m files: work without extra buffers, crashed with them (SIGSEGV)" in said
    assert "q8_0 files: crash llama.cpp with and without extra buffers (SIGILL); export another type" in said
    monkeypatch.setattr(llama, "system_info", lambda: "AMX_INT8 = 1")
    assert "without extra buffers, because its AMX kernels crash" in told(monkeypatch)


def test_the_record_is_json_that_a_person_can_read(tmp_path):
    llama.remember("f16", Trial(True, False))
    (machine,) = json.loads((tmp_path / "cache" / "llama.cpp.json").read_text())
    assert "llama-cpp-python" in machine
