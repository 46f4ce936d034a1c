"""The planner beside figures that others published (bench/published.py)."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def published() -> Any:
    """The benchmark as a module. Its folder comes last on the path, since it has a `code.py`, as Python has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(BENCH)])
        yield importlib.import_module("published")


def test_every_figure_has_a_source_and_most_are_near(published: Any) -> None:
    rows = published.compare()
    assert {row["source"] for row in rows} == set(published.SOURCES)
    assert len({source.url for source in published.SOURCES.values()}) >= 4
    assert all(row["gib"] or row["rate"] for row in rows)
    found = published.summary(rows)
    assert found["counted whole"]["memory"]["within"] / found["counted whole"]["memory"]["of"] > 0.85
    for source in ("torchtune", "LLaMA-Factory, FA2", "T4", "Unsloth, HF+FA2"):
        assert found[source]["memory"]["within"] == found[source]["memory"]["of"] > 0
    assert found["counted whole"]["rate"]["within"] / found["counted whole"]["rate"]["of"] > 0.75
    assert found["LLaMA-Factory, FA2"]["rate"]["within"] >= 5
    for source in ("answer.ai", "T4"):
        assert found[source]["rate"]["within"] == found[source]["rate"]["of"] > 0


def test_sizes_where_all_settings_are_known_are_within_three_percent(published: Any) -> None:
    ratios = [row["memory_ratio"] for row in published.compare() if row["source"] == "T4"]
    assert len(ratios) == 11
    assert ratios == pytest.approx([1] * 11, abs=0.03)


def test_the_saved_result_is_what_is_computed_now(published: Any) -> None:
    saved = json.loads((BENCH / "results" / "published.json").read_text(encoding="utf-8"))
    rows = published.compare()
    assert saved["held_out"] == published.held_out(rows)
    assert saved["by_source"] == published.summary(rows)
    assert [row["cell"] for row in saved["rows"]] == [row["cell"] for row in rows]
    for key in ("gib", "memory_ratio", "rate", "rate_ratio"):
        assert [row[key] for row in saved["rows"]] == pytest.approx([row[key] for row in rows])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("QWEN_2_7B", 7_615_616_512), ("MISTRAL", 7_248_023_552), ("DEEPSEEK", 1_346_471_936),
        ("QWEN_2_1B5", 1_543_714_304), ("LLAMA_3_3B", 3_212_749_824), ("LLAMA_3_1B", 1_235_814_400),
        ("LLAMA_2_7B", 6_738_415_616), ("LLAMA_2_13B", 13_015_864_320),
    ],
)  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(published: Any, name: str, parameters: int) -> None:
    assert getattr(published, name).num_parameters == parameters


@pytest.mark.parametrize(
    ("source", "model", "rank", "trained"),
    [
        ("LitGPT", "Llama-2-7B", 8, 4_194_304), ("LitGPT", "Llama-2-13B", 8, 6_553_600),
        ("T4", "Qwen2.5-7B", 16, 10_092_544), ("T4", "Mistral-7B-v0.3", 16, 13_631_488),
        ("T4", "Llama-3.2-1B", 16, 3_407_872),
    ],
)  # fmt: skip
def test_adapters_have_the_published_number_of_weights(
    published: Any, source: str, model: str, rank: int, trained: int
) -> None:
    found = {
        run.num_trained for run in published.runs() if (run.source, run.shape.name, run.rank) == (source, model, rank)
    }
    assert found == {trained}


def test_the_table_ends_with_one_json_object(published: Any, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["published.py", "--save", str(tmp_path / "published.json")])
    published.main()
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].startswith("source ")
    assert "counted whole" in "\n".join(table)
    assert json.loads(last) == json.loads((tmp_path / "published.json").read_text(encoding="utf-8"))
