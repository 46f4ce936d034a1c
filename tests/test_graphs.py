"""When steps are recorded as CUDA graphs, and what happens where they cannot be; that they change nothing, on a GPU."""

# ruff: noqa: F811 - a fixture is imported and then named as an argument

import copy

import pytest

torch = pytest.importorskip("torch")

from stories import FORCER, ask, generated, prompts, run, same, storyteller  # noqa: E402, F401  (a fixture)
from test_step_inputs import drawn, stories  # noqa: E402

from dpost_lite.sampling.engine import Engine  # noqa: E402
from dpost_lite.sampling.graphs import RECORD_AT, Graphs  # noqa: E402
from dpost_lite.sampling.statistics import Statistics  # noqa: E402
from dpost_lite.sampling.step_inputs import StepShape  # noqa: E402


def graphs_of_refused(monkeypatch, error: Exception) -> tuple[Graphs, list[str]]:
    """Graphs on the CPU, where none can be recorded, and the shapes that were tried."""
    tried: list[str] = []

    def refuse(self, numbers, shape):
        tried.append(shape)
        raise error

    monkeypatch.setattr(Graphs, "_record", refuse)
    graphs = Graphs(lambda numbers, shape: numbers * 2, torch.device("cpu"), Statistics(), max_rows=5)  # type: ignore[arg-type]
    return graphs, tried


def test_a_shape_is_recorded_when_it_has_come_often_enough(monkeypatch):
    graphs, tried = graphs_of_refused(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    for number in range(1, RECORD_AT):
        for shape in ("one", "other"):
            assert graphs(torch.tensor([number]), shape).tolist() == [2 * number]
    assert tried == []
    with pytest.raises(torch.OutOfMemoryError):  # the engine halves its rows
        graphs(torch.tensor([1]), "one")
    assert tried == ["one"]


def test_a_model_whose_steps_cannot_be_graphs_runs_without(monkeypatch):
    graphs, tried = graphs_of_refused(monkeypatch, RuntimeError("operation not permitted\nCompile with"))
    with pytest.warns(UserWarning, match="cannot be CUDA graphs, so sampling is slower: operation not permitted$"):
        found = [graphs(torch.tensor([number]), shape).item() for number in range(9) for shape in ("one", "other")]
    assert found == [2 * number for number in range(9) for _ in range(2)]
    assert tried == ["one"]


def recordings(monkeypatch) -> list[StepShape]:
    """The shapes that are recorded from now on."""
    recorded: list[StepShape] = []
    inner = Graphs._record

    def noted(self, numbers, shape):
        done = inner(self, numbers, shape)
        recorded.append(shape)
        return done

    monkeypatch.setattr(Graphs, "_record", noted)
    return recorded


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:this model's steps cannot be CUDA graphs")
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma2", "gemma3"])
def test_graphs_change_nothing(model_of, family, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = model_of(family)
    asked = [ask(p, max_new_tokens=14, num_samples=2) for p in prompts(6)]
    expected = {request.prompt_ids: generated(model, request.prompt_ids, 14) for request in asked}
    recorded = recordings(monkeypatch)
    engine = Engine(copy.deepcopy(model).cuda(), writer=None, max_rows=5)
    for (prompt, _), sample in drawn(engine, asked).items():
        assert sample.token_ids == expected[prompt]
    assert recorded


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:this model's steps cannot be CUDA graphs")
def test_graphs_with_forced_tokens_change_nothing(storyteller, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recorded = recordings(monkeypatch)
    engine = Engine(copy.deepcopy(storyteller).cuda(), writer=FORCER, max_rows=13)
    asked = stories(num_samples=10, max_new_tokens=60)
    same(run(storyteller, asked, 13, FORCER), drawn(engine, asked))
    assert any(shape.num_extra for shape in recorded)
