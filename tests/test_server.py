"""The server with a scripted solver: what clients send and get, and who may ask."""

import json
import re
import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest
from serving import MODEL, PIECES, TEXT, ScriptedSolver, Serving, send_raw, serving, wait_until

from dpost_lite.errors import ExportError, RecipeError
from dpost_lite.local.request import Message
from dpost_lite.server import async_solver
from dpost_lite.server.app import MAX_BODY
from dpost_lite.server.gate import Access
from dpost_lite.server.page import content_security_policy
from dpost_lite.server.run import listen, url_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def shared():
    with serving() as served:
        yield served


@pytest.fixture
def served(shared: Serving) -> Serving:
    shared.solver.asked.clear()
    shared.solver.cancelled.clear()
    return shared


def chat(served: Serving, content="How many?", **fields) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
    return httpx.post(served.url + CHAT, json=body)


def chunks(served: Serving, path: str = CHAT, **fields) -> list[dict]:
    """The chunks of a stream, which ends in [DONE]."""
    fields = fields if path == COMPLETIONS else {"messages": [{"role": "user", "content": "How many?"}], **fields}
    response = httpx.post(served.url + path, json={"stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


# What is answered


def test_a_chat_is_answered(served):
    reply = chat(served).json()
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert choice["dpost_lite"] == {"answer": "28"}
    assert reply["usage"] == {"prompt_tokens": 11, "completion_tokens": 8, "total_tokens": 19}
    assert (reply["object"], reply["model"]) == ("chat.completion", MODEL)
    assert reply["id"].startswith("chatcmpl-")
    (cut,) = chat(served, "cut").json()["choices"]
    assert (cut["finish_reason"], cut["dpost_lite"]) == ("length", {"answer": None})


def test_a_chat_is_streamed(served):
    streamed = chunks(served)
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in streamed] == [None] * (len(PIECES) + 1) + ["stop"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed) == TEXT
    assert streamed[2]["choices"][0]["delta"] == {"content": "28>>", "dpost_lite": {"inserted": True}}
    assert streamed[-1]["choices"][0]["delta"] == {}
    assert streamed[-1]["choices"][0]["dpost_lite"] == {"answer": "28"}
    assert len({(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in streamed}) == 1
    assert not any("usage" in chunk for chunk in streamed)


def test_usage_comes_in_the_stream_if_it_is_asked_for(served):
    *others, last = chunks(served, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 11, "completion_tokens": 8, "total_tokens": 19}
    assert all(chunk["choices"] for chunk in others)
    assert all(chunk["choices"] for chunk in chunks(served, stream_options={"include_usage": False}))


def test_choices_are_drawn_with_seeds_of_their_own(served):
    reply = chat(served, "seed", n=3, seed=4, temperature=0.8).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["#### 1", "#### 2", "#### 0"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["usage"] == {"prompt_tokens": 11, "completion_tokens": 6, "total_tokens": 17}
    assert [request.seed for request in served.solver.asked] == [4, 5, 6]
    streamed = chunks(served, n=3, stream_options={"include_usage": True})
    for index in range(3):
        own = [c["choices"][0] for c in streamed if c["choices"] and c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert [choice["finish_reason"] for choice in own] == [None] * 5 + ["stop"]
    assert streamed[-1]["usage"]["completion_tokens"] == 24


def test_without_a_temperature_one_answer_is_greedy_and_several_are_drawn(served):
    chat(served)
    chat(served, n=2)
    chat(served, n=2, temperature=0)
    chat(served, temperature=1.3, top_p=0.5)
    chat(served, temperature=1.3, top_p=0)
    chat(served, temperature=None, top_p=None, n=None, seed=None, stop=None, max_tokens=None, stream_options=None)
    asked = [(request.temperature, request.top_p) for request in served.solver.asked]
    assert asked == [(0, 1), (0.7, 1), (0.7, 1), (0, 1), (0, 1), (1.3, 0.5), (0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, 300),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7}, 7),
        ({"max_completion_tokens": 7, "max_tokens": 5}, 7),
        ({"max_tokens": 10**6}, 300),
    ],
)
def test_limits_of_length(served, fields, limit):
    chat(served, **fields)
    assert served.solver.asked[0].max_new_tokens == limit


def test_stops_seeds_and_the_calculator(served):
    chat(served, stop="\n", seed=7, calculator=False)
    chat(served, stop=["a", "", "b"], seed=-1, calculator=True)
    first, second = served.solver.asked
    assert (first.stop, first.seed, first.uses_tools) == (("\n",), 7, False)
    assert (second.stop, second.seed, second.uses_tools) == (("a", "b"), 2**32 - 1, True)


def test_messages_are_sent_as_they_are(served):
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "  And <|im_end|>?\n"},
    ]
    assert httpx.post(served.url + CHAT, json={"messages": messages}).status_code == 200
    expected = (("system", "Be brief."), ("user", "How many?"), ("assistant", ""), ("user", "  And <|im_end|>?\n"))
    assert served.solver.asked[0].messages == tuple(Message(role, content) for role, content in expected)


def test_text_is_continued_without_the_template(served):
    reply = httpx.post(served.url + COMPLETIONS, json={"prompt": ["4*7=", "seed"], "n": 2, "seed": 1}).json()
    assert reply["object"] == "text_completion"
    assert [choice["text"] for choice in reply["choices"]] == [TEXT, TEXT, "#### 1", "#### 2"]
    assert reply["usage"] == {"prompt_tokens": 22, "completion_tokens": 20, "total_tokens": 42}
    assert [request.prompt for request in served.solver.asked] == ["4*7=", "4*7=", "seed", "seed"]
    streamed = chunks(served, COMPLETIONS, prompt="4*7=", stream_options={"include_usage": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed[:-1]) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in streamed[:-1]] == [None] * 4 + ["stop"]
    assert streamed[-1]["usage"]["total_tokens"] == 19


def test_titles_and_tags_cost_nothing(served):
    job = '### Task:\nGenerate 1-3 broad tags.\n### Output:\nJSON format: { "tags": ["tag1"] }\n### Chat History:\n…'
    reply = chat(served, job).json()
    assert reply["choices"][0]["message"]["content"] == "{}"
    assert reply["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert chunks(served, messages=[{"role": "user", "content": job}])[1]["choices"][0]["delta"]["content"] == "{}"
    assert not served.solver.asked
    assert chat(served, "### Task:\nAnn has 3 apples.").json()["choices"][0]["message"]["content"] == TEXT


def test_models_are_listed(served):
    (listed,) = httpx.get(served.url + "/v1/models").json()["data"]
    assert (listed["id"], listed["object"]) == (MODEL, "model")
    assert httpx.get(f"{served.url}/v1/models/{MODEL}").json() == listed
    assert error_of(httpx.get(served.url + "/v1/models/gpt"), 404)["code"] == "model_not_found"
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}


# What is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "How many?"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x"}] * 1000}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"stop": 5}, "stop"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_bad_and_unsupported_fields_are_named(served, fields, param):
    error = error_of(chat(served, **fields), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(param)
    assert not served.solver.asked


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2]], [], None, 5])
def test_prompts_are_texts(served, prompt):
    error = error_of(httpx.post(served.url + COMPLETIONS, json={"prompt": prompt}), 400)
    assert error["param"].startswith("prompt")


def test_what_cannot_change_the_answer_is_ignored(served):
    harmless = {
        "user": "ann", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "service_tier": "auto",
        "tools": [], "tool_choice": "auto", "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0,
        "logit_bias": {}, "response_format": {"type": "text"}, "modalities": ["text"], "my_own": {"deep": []},
    }  # fmt: skip
    assert chat(served, **harmless).json()["choices"][0]["message"]["content"] == TEXT


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
     b'{"messages": ' + b"[" * 60_000, b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'],
    ids=["empty", "cut", "list", "null", "not UTF-8", "half a character", "deep", "NaN"],
)  # fmt: skip
def test_broken_bodies_are_one_error(served, body):
    error_of(httpx.post(served.url + CHAT, content=body), 400)
    assert not served.solver.asked


def test_bodies_are_bounded(served):
    error_of(chat(served, "x" * MAX_BODY), 413)
    endless = (b"x" * 2**16 for _ in range(1000))  # without a content-length
    with suppress(httpx.WriteError):  # the server hung up while the rest was still sent
        error_of(httpx.post(served.url + CHAT, content=endless), 413)
    assert chat(served).status_code == 200


def test_unknown_models_and_paths(served):
    error = error_of(chat(served, model="gpt-4o"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert MODEL in error["message"]
    error_of(httpx.get(served.url + "/v1/embeddings"), 404)
    error_of(httpx.get(served.url + "/docs"), 404)
    error_of(httpx.get(served.url + CHAT), 405)


@pytest.mark.parametrize("stream", [False, True])
def test_a_question_too_long_is_an_error_of_the_client(served, stream):
    error = error_of(chat(served, "long", stream=stream), 400)
    assert (error["code"], error["type"]) == ("context_length_exceeded", "invalid_request_error")
    assert "9000 tokens" in error["message"]


# Load, and clients that go away


def test_a_full_queue_is_refused():
    with serving(max_outstanding=3) as served:
        waiting = threading.Thread(target=chat, args=(served, "hang"), kwargs={"n": 2})
        waiting.start()
        wait_until(lambda: len(served.solver.running) == 2)
        refused = chat(served, n=2)
        assert error_of(refused, 429)["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        assert "at most 3" in error_of(chat(served, n=4), 400)["message"]  # would never fit
        assert chat(served).status_code == 200
        served.server.should_exit = True
        waiting.join()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("question", ["endless", "hang"])
def test_a_client_that_goes_away_is_no_longer_answered(served, question, stream):
    body = json.dumps({"messages": [{"role": "user", "content": question}], "n": 2, "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connection = send_raw(served.url, head + body)
    wait_until(lambda: len(served.solver.running) == 2)
    if stream and question == "endless":
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_until(lambda: len(served.solver.cancelled) == 2 and not served.solver.running)
    for _ in range(4):  # its place is free again
        assert chat(served, n=8).status_code == 200


def test_an_answer_that_takes_too_long_is_cut_off():
    with serving(max_seconds=0.3) as served:
        (choice,) = chat(served, "endless").json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("on and ", "length")
        *_, last, done, _ = chat(served, "endless", stream=True).text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
        for stream in (False, True):  # it waited in vain for its turn
            late = chat(served, "hang", stream=stream)
            assert "no answer was begun in time" in error_of(late, 503)["message"]
            assert int(late.headers["retry-after"]) >= 1
        assert not served.solver.running


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_were_begun_are_not_lost_with_one_that_was_not(stream):
    with serving(max_seconds=0.3, open_solver=lambda: ScriptedSolver(num_rows=1)) as served:
        if stream:
            told = chunks(served, messages=[{"role": "user", "content": "endless"}], n=2)
            ends = {chunk["choices"][0]["index"]: chunk["choices"][0]["finish_reason"] for chunk in told}
            texts = ["".join(c["choices"][0]["delta"].get("content", "") for c in told if c["choices"][0]["index"] == i)
                     for i in (0, 1)]  # fmt: skip
            assert texts[0].startswith("on and ")
            assert texts[1] == ""
        else:
            first, second = chat(served, "endless", n=2).json()["choices"]
            ends = {0: first["finish_reason"], 1: second["finish_reason"]}
            assert (first["message"]["content"], second["message"]["content"]) == ("on and ", "")
        assert ends == {0: "length", 1: "length"}


def test_a_solver_that_does_not_even_end_a_late_answer_is_an_error(monkeypatch):
    monkeypatch.setattr(async_solver, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(ScriptedSolver, "cancel", lambda *_: None)
    with serving(max_seconds=0.2) as served:
        assert "the solver does not answer" in error_of(chat(served, "hang"), 503)["message"]
        served.solver.running.clear()


def test_a_crash_ends_the_worker_and_not_the_server(served):
    solver, answers = served.solver, {}

    def ask(name: str, **fields) -> None:
        answers[name] = chat(served, "endless", **fields)

    others = [threading.Thread(target=ask, args=(f"{stream}",), kwargs={"stream": stream}) for stream in (False, True)]
    for other in others:
        other.start()
    wait_until(lambda: len(solver.running) == 2)
    time.sleep(0.1)
    assert "SIGSEGV" in error_of(chat(served, "crash"), 503)["message"]
    for other in others:
        other.join()
    assert "SIGSEGV" in error_of(answers["False"], 503)["message"]
    *_, last = answers["True"].text.split("data: ")  # its status was sent long before
    assert json.loads(last)["error"]["code"] == "solver_died"
    assert [chat(served).status_code for _ in range(2)] == [200, 200]
    assert served.solver is not solver
    assert solver.closed


def test_a_solver_that_cannot_be_opened_again_is_tried_with_the_next_request():
    opened = []

    def open_solver() -> ScriptedSolver:
        opened.append(1)
        if len(opened) in (2, 3):
            raise ExportError("model.gguf cannot be read")
        return ScriptedSolver()

    with serving(open_solver=open_solver) as served:
        error_of(chat(served, "crash"), 503)
        assert [chat(served).status_code for _ in range(3)] == [503, 503, 200]


def test_open_streams_end_when_the_server_stops():
    received = []
    with serving() as served:

        def read() -> None:
            body = {"messages": [{"role": "user", "content": "endless"}], "stream": True}
            with httpx.stream("POST", served.url + CHAT, json=body) as response:
                received.extend(response.iter_lines())

        reading = threading.Thread(target=read)
        reading.start()
        wait_until(lambda: len(received) > 10)
        begin = time.monotonic()
        served.server.should_exit = True
        reading.join()
        assert time.monotonic() - begin < 3
    assert "shutting down" in received[-2]
    assert served.solver.closed


# Who may ask


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "[::1", "", "127.0.0.1@evil.example"]
)
def test_other_names_are_refused(served, host):
    """A name that a page of another site points here (DNS rebinding)."""
    for path in ("/", "/v1/models", "/health"):
        error_of(httpx.get(served.url + path, headers={"host": host}), 403)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9", "192.168.1.7:8000", "[::1]:8000", "LOCALHOST:8000"])
def test_own_names_and_addresses_are_accepted(served, host):
    assert httpx.get(served.url + "/v1/models", headers={"host": host}).status_code == 200


def test_pages_of_other_sites_may_not_ask(served):
    for origin in ("http://evil.example", "null", "", f"{served.url}.evil.example", "http://127.0.0.1:1"):
        refused = httpx.post(served.url + CHAT, content=b"{}", headers={"origin": origin})
        error_of(refused, 403)
        assert "access-control-allow-origin" not in refused.headers
    assert httpx.get(served.url + "/v1/models", headers={"origin": served.url}).status_code == 200
    assert httpx.options(served.url + CHAT, headers={"origin": "http://evil.example"}).status_code == 403


def test_allowed_names_and_sites():
    site = "http://front.example:3000"
    with serving(access=Access("k", {"solver.local"}, (site,))) as served:
        headers = {"origin": site, "access-control-request-method": "POST",
                   "access-control-request-headers": "authorization, content-type"}  # fmt: skip
        preflight = httpx.options(served.url + CHAT, headers=headers)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == site
        other = httpx.options(served.url + CHAT, headers={**headers, "origin": "http://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        allowed = {"host": "solver.local:8000", "origin": site, "authorization": "Bearer k"}
        answered = httpx.get(served.url + "/v1/models", headers=allowed)
        assert answered.status_code == 200
        assert answered.headers["access-control-allow-origin"] == site


def test_all_sites_can_be_allowed_but_not_all_names():
    with serving(access=Access(origins=("*",))) as served:
        headers = {"origin": "http://any.example"}
        answered = httpx.get(served.url + "/v1/models", headers=headers)
        assert answered.headers["access-control-allow-origin"] == "*"
        error_of(httpx.get(served.url + "/v1/models", headers={**headers, "host": "evil.example"}), 403)


def test_the_key_is_asked_for():
    with serving(access=Access("geheim-ü")) as served:
        for given in (None, "Bearer", "Bearer geheim", "geheim-ü", "Basic geheim-ü", "Bearer geheim-ü2"):
            headers = {} if given is None else {"authorization": given.encode()}
            for path in ("/v1/models", CHAT, "/v1/none", "//"):
                assert error_of(httpx.get(served.url + path, headers=headers), 401)["code"] == "invalid_api_key"
        right = {"authorization": "Bearer geheim-ü".encode()}
        assert httpx.get(served.url + "/v1/models", headers=right).status_code == 200
        assert not served.solver.asked
        assert httpx.get(served.url + "/").status_code == 200
        assert httpx.get(served.url + "/health").status_code == 200


def test_the_page_may_run_and_load_nothing_else(served):
    page = httpx.get(served.url + "/")
    policy = page.headers["content-security-policy"]
    assert policy == content_security_policy(page.text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.findall(r"https?:|innerHTML|insertAdjacentHTML|eval\(| on\w+=\"", page.text)
    assert page.headers["x-content-type-options"] == "nosniff"


def test_a_port_in_use_is_one_line():
    with listen("127.0.0.1", 0) as first:
        port = int(url_of(first).rpartition(":")[2])
        with pytest.raises(RecipeError, match=f"cannot listen on 127.0.0.1:{port} .*give another port"):
            listen("127.0.0.1", port)
    for host in ("no.such.host.invalid", "203.0.113.9", "x" * 300):
        with pytest.raises(RecipeError, match="--host, --port: cannot listen"):
            listen(host, 0)
    if socket.has_ipv6:
        with listen("::1", 0) as other:
            assert url_of(other).startswith("http://[::1]:")
