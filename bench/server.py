"""How fast does `dpost-lite serve` answer 1, 8 and 32 clients, beside llama-cpp-python's own server on the same file?

    python bench/server.py FILE.gguf [--clients 1 8 32] [--servers ours llama.cpp] [--requests 64]
                           [--tokens 96] [--long 1000] [--save FILE.json]

Every client asks built-in problems one after the other, streaming, at temperature 0.7 with the request's number as its
seed. Per server and number of clients it prints tokens per second (the answers as the file's tokenizer splits them),
the time to the first text and to the end of an answer, and errors. `--long` requests of 32 clients then show whether
the memory of the server and its child processes stays flat. `ours-off` is our server with `"calculator": false`: what
parallel decoding alone gives. llama-cpp-python's server needs its extra `server`, and is left out without it. The last
line is one JSON object.
"""

import argparse
import asyncio
import importlib.util
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from publish import publish, result_of

from dpost_lite.local.llama import open_gguf, uses_extra_buffers
from dpost_lite.problems import synthetic
from dpost_lite.system.machine import physical_cores
from dpost_lite.system.quiet import stderr_to

SERVERS = ("ours", "ours-off", "llama.cpp")
LONG_CLIENTS = 32
LONG_TOKENS = 16
SECONDS_TO_START = 120
WITHOUT_EXTRA_BUFFERS = """import runpy, llama_cpp.llama_cpp as bindings
defaults = bindings.llama_model_default_params
def params():
    made = defaults()
    made.use_extra_bufts = False
    return made
bindings.llama_model_default_params = params
runpy.run_module("llama_cpp.server", run_name="__main__")"""  # which crash on some processors: local/llama.py


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as its client saw it: seconds to its first text and its end; `error` if it failed."""

    text: str
    first: float
    total: float
    error: str | None = None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--servers", nargs="+", default=SERVERS, choices=SERVERS)
    parser.add_argument("--requests", type=int, default=64, help="for each number of clients")
    parser.add_argument("--tokens", type=int, default=96, help="max_tokens of a request")
    parser.add_argument("--parallel", type=int, default=8, help="of our server")
    parser.add_argument("--long", type=int, default=1000, help="requests of the test of memory; 0: none")
    parser.add_argument("--note", default="", help="goes into the result, e.g. what else the machine was doing")
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    arguments = parser.parse_args()
    with stderr_to():
        vocabulary = open_gguf(arguments.file, extra_buffers=False, vocab_only=True)
    rows, memory = [], {}
    for entrant in arguments.servers:
        if entrant == "llama.cpp" and not importlib.util.find_spec("sse_starlette"):
            print('llama-cpp-python\'s server is left out; pip install "llama-cpp-python[server]"')
            continue
        with server(entrant, arguments.file, arguments.parallel) as (process, url):
            extra = {"calculator": False} if entrant == "ours-off" else {}
            measure(url, clients=1, requests=2, tokens=8, extra=extra)  # warm up
            for clients in arguments.clients:
                answers, seconds = measure(
                    url, clients=clients, requests=arguments.requests, tokens=arguments.tokens, extra=extra
                )
                rows.append({"server": entrant, "clients": clients, **figures(answers, seconds, vocabulary)})
                show(rows[-1])
            if arguments.long and entrant == "ours":
                memory = flat(process, url, arguments.long)
    publish(
        result_of(
            "server", file=arguments.file.name, parallel=arguments.parallel, requests=arguments.requests,
            tokens=arguments.tokens, note=arguments.note, rows=rows, memory=memory,
        ),
        arguments.save,
    )  # fmt: skip


@contextmanager
def server(entrant: str, file: Path, parallel: int) -> Iterator[tuple[psutil.Process, str]]:
    """Start a server on a free port; yield its process and address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    if entrant == "llama.cpp":  # by default it breaks off an answer when the next request comes
        start = ["-m", "llama_cpp.server"] if uses_extra_buffers(file) else ["-c", WITHOUT_EXTRA_BUFFERS]
        threads = str(physical_cores())  # as many as ours; its default is half of the logical cores
        command = [
            *start, "--model", str(file), "--interrupt_requests", "False", "--n_ctx", "4096",
            "--n_threads", threads, "--n_threads_batch", threads,
        ]  # fmt: skip
    else:
        command = ["-m", "dpost_lite", "serve", str(file), "--parallel", str(parallel), "--timeout", "600"]

    process = subprocess.Popen(
        [sys.executable, *command, "--port", port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        end = time.monotonic() + SECONDS_TO_START
        while True:
            assert process.poll() is None, f"{entrant} has ended"
            assert time.monotonic() < end, f"{entrant} does not answer"
            try:
                httpx.get(f"{url}/models", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield psutil.Process(process.pid), url
    finally:
        process.terminate()
        process.wait(30)


def measure(url: str, *, clients: int, requests: int, tokens: int, extra: dict[str, Any]) -> tuple[list[Answer], float]:
    """Return the answers of `clients` who share `requests`, and the seconds it took."""
    questions = [problem.question for problem in synthetic.generate(requests, seed=1, max_steps=2)]

    async def ask_all() -> list[Answer]:
        numbers, answers = iter(range(requests)), []
        async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

            async def one_client() -> None:
                for number in numbers:
                    body = {
                        "messages": [{"role": "user", "content": questions[number]}], "temperature": 0.7,
                        "seed": number, "max_tokens": tokens, "stream": True, **extra,
                    }  # fmt: skip
                    answers.append(await ask(client, f"{url}/chat/completions", body))

            await asyncio.gather(*(one_client() for _ in range(clients)))
        return answers

    begin = time.monotonic()
    return asyncio.run(ask_all()), time.monotonic() - begin


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Answer:
    """Return one answer."""
    begin, first, text, is_done = time.monotonic(), 0.0, "", False
    try:
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                return Answer("", 0, 0, f"status {response.status_code}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    content = json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content")
                    if content:
                        first = first or time.monotonic() - begin
                        text += content
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return Answer(text, first, 0, repr(error))
    total = time.monotonic() - begin
    return Answer(text, first or total, total, None if is_done else "the stream broke off")


def figures(answers: list[Answer], seconds: float, vocabulary: Any) -> dict[str, Any]:
    """Return the rates and times of good answers, and what went wrong with the others."""
    good = [answer for answer in answers if answer.error is None]
    num_tokens = sum(len(vocabulary.tokenize(answer.text.encode(), add_bos=False)) for answer in good)

    def percentiles(values: list[float]) -> dict[str, float]:
        p50, p95 = np.percentile(values, [50, 95]) if values else (math.nan, math.nan)
        return {"p50": float(p50), "p95": float(p95)}

    errors = [answer.error for answer in answers if answer.error is not None]
    return {
        "answers": len(good),
        "tokens_per_s": num_tokens / seconds,
        "tokens_per_answer": num_tokens / max(len(good), 1),
        "first_s": percentiles([answer.first for answer in good]),
        "total_s": percentiles([answer.total for answer in good]),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
    }


def show(row: dict[str, Any]) -> None:
    """Print one row of the table."""
    first, total = row["first_s"], row["total_s"]
    print(
        f"{row['server']:<10}{row['clients']:>3} clients {row['tokens_per_s']:7.1f} tokens/s   first text "
        f"{first['p50']:6.2f} s, p95 {first['p95']:6.2f} s   answer {total['p50']:6.2f} s, p95 {total['p95']:6.2f} s   "
        f"errors {row['errors']}",
        flush=True,
    )


def flat(process: psutil.Process, url: str, requests: int) -> dict[str, Any]:
    """Return the memory after each fifth of many short requests, in MiB, of the server and its children."""
    sizes = []
    for _ in range(5):
        answers, _ = measure(url, clients=LONG_CLIENTS, requests=requests // 5, tokens=LONG_TOKENS, extra={})
        errors = [answer.error for answer in answers if answer.error]
        assert not errors, errors[0]
        family = [process, *process.children(recursive=True)]
        sizes.append(round(sum(member.memory_info().rss for member in family) / 2**20, 1))
    print(f"memory over {requests:,} requests of {LONG_CLIENTS} clients: {', '.join(map(str, sizes))} MiB")
    return {"requests": requests, "mib": sizes}


if __name__ == "__main__":
    main()
