"""The server as real clients see it: the openai package, llm and LangChain, without settings beyond the address."""

import json

import pytest
from serving import MODEL, TEXT, Serving, serving, wait_until

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def shared():
    with serving() as served:
        yield served


@pytest.fixture
def served(shared: Serving) -> Serving:
    shared.solver.asked.clear()
    shared.solver.cancelled.clear()
    return shared


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(text: str = "How many?") -> list[dict]:
    return [{"role": "user", "content": text}]


def test_openai_reads_whole_answers(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    reply = client.chat.completions.create(model=MODEL, messages=user(), n=2)
    assert [choice.message.content for choice in reply.choices] == [TEXT, TEXT]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].dpost_lite == {"answer": "28"}
    assert reply.usage.total_tokens == 11 + 2 * 8
    text = client.completions.create(model=MODEL, prompt="4*7=", max_tokens=9)
    assert text.choices[0].text == TEXT


def test_openai_reads_streams(client, served):
    stream = client.chat.completions.create(
        model=MODEL, messages=user(), stream=True, stream_options={"include_usage": True},
        extra_body={"calculator": False},
    )  # fmt: skip
    *streamed, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == TEXT
    assert streamed[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in streamed][-2:] == [None, "stop"]
    assert last.usage.completion_tokens == 8
    assert not served.solver.asked[0].uses_tools
    with client.chat.completions.stream(model=MODEL, messages=user()) as stream:  # checks every chunk's order
        assert stream.get_final_completion().choices[0].message.content == TEXT
    written = client.completions.create(model=MODEL, prompt="4*7=", stream=True)
    assert "".join(chunk.choices[0].text for chunk in written) == TEXT


def test_openai_gets_errors_of_its_own_kinds(client, served):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4o", messages=user())
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=user("long"))
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=user(), logprobs=True)
    assert raised.value.param == "logprobs"
    running = client.chat.completions.create(model=MODEL, messages=user("endless"), n=8, stream=True)
    next(iter(running))
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model=MODEL, messages=user())
    running.close()
    wait_until(lambda: not served.solver.running)
    with pytest.raises(openai.APIError, match="SIGSEGV"):
        list(client.chat.completions.create(model=MODEL, messages=user("crash"), stream=True))


def test_openai_that_stops_reading_ends_the_answer(client, served):
    stream = client.chat.completions.create(model=MODEL, messages=user("endless"), stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: len(served.solver.cancelled) == 1)


def test_llm(served, tmp_path, monkeypatch):
    """The tool `llm`, with its file for other servers; it always asks for the usage when it streams."""
    llm = pytest.importorskip("llm")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    entry = {"model_id": "solver", "model_name": MODEL, "api_base": f"{served.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    model = llm.get_model("solver")
    for stream in (True, False):
        response = model.prompt("How many?", stream=stream, key="none")
        assert response.text() == TEXT
        usage = response.usage()
        assert (usage.input, usage.output) == (11, 8)
    conversation = model.conversation()
    conversation.prompt("How many?", system="Be brief.", key="none").text()
    conversation.prompt("And now?", key="none", temperature=0.5, max_tokens=20, seed=3, stop="x").text()
    asked = served.solver.asked[-1]
    assert [message.role for message in asked.messages][-3:] == ["user", "assistant", "user"]
    assert (asked.temperature, asked.max_new_tokens, asked.seed, asked.stop) == (0.5, 20, 3, ("x",))


def test_langchain(served):
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    chat = chat_openai(model=MODEL, base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    reply = chat.invoke("How many?")
    assert reply.content == TEXT
    assert reply.usage_metadata["output_tokens"] == 8
    assert reply.response_metadata["finish_reason"] == "stop"
    assert "".join(chunk.content for chunk in chat.stream("How many?")) == TEXT
    assert [reply.content for reply in chat.batch(["One?", "Two?", "Three?"])] == [TEXT] * 3
    limited = chat.bind(max_tokens=12, stop=["\n"])
    limited.invoke([("system", "Be brief."), ("human", [{"type": "text", "text": "How many?"}])])
    asked = served.solver.asked[-1]
    assert (asked.max_new_tokens, asked.stop, asked.messages[0].role) == (12, ("\n",), "system")
