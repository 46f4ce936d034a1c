"""The whole loop on a tiny random T5, from a user's file to a GGUF file that answers, as on decoder-only models."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from easy import SETTINGS, write_problems
from tiny_t5 import t5_tokenizer
from typer.testing import CliRunner

from dpost_lite.cli.app import app
from dpost_lite.models.shapes import EncoderDecoderShape
from dpost_lite.problems.records import LabelledRationale, Rationale, read_jsonl
from dpost_lite.runs.folder import read_json


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Untrained, with a head of its own, as Flan-T5 has."""
    folder, tokenizer = tmp_path_factory.mktemp("t5"), t5_tokenizer()
    shape = EncoderDecoderShape(
        name="tiny", num_layers=2, num_encoder_layers=2, hidden=64, intermediate=128, num_heads=4, num_kv_heads=4,
        head_dim=16, vocabulary=-(-len(tokenizer) // 32) * 32, is_tied=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(shape.config())
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach() / 8)
    model.config.dropout_rate, model.config.tie_word_embeddings = 0.0, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Finished:
    folder: Path
    command: list[str]
    printed: str


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Finished:
    """LoRA on 4 bits; full precision has its tests in test_seq2seq.py, and the rehearsal of T5."""
    folder = tmp_path_factory.mktemp("run")
    data = write_problems(folder / "mine.jsonl")
    command = ["run", "--data", str(data), "--model", str(base), "--out", str(folder / "run"), *SETTINGS]
    command += ["rounds=1", "model.prompt=auto", "sft.epochs=20"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return Finished(folder / "run", command, result.output)


def test_every_stage_has_something_to_do(run):
    folder, printed = run.folder, run.printed
    finished = re.findall(r"^(\S+): finished in", printed, re.MULTILINE)
    assert finished == [
        "data", "score/base", "sft-0", "score/sft-0", "round-1/samples-pairs", "round-1/pairs", "round-1/dpo",
        "round-1/gate", "round-1/samples-labels", "round-1/labels", "round-1/sft", "score/round-1", "export", "solved",
    ]  # fmt: skip
    metrics = {name: read_json(folder / name / "done.json")["metrics"] for name in finished}
    assert metrics["round-1/dpo"]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert metrics["round-1/pairs"]["pairs"] > 0
    assert metrics["round-1/labels"]["labels"] > metrics["round-1/labels"]["gold"] > 0
    assert metrics["round-1/samples-labels"]["calculated"] > 0


def test_texts_are_in_gsm8ks_notation_and_tokens_in_brackets(run):
    folder = run.folder
    tokenizer = t5_tokenizer()
    labels = list(read_jsonl(folder / "round-1" / "labels" / "labels.jsonl", LabelledRationale))
    assert all(re.search(r"2\+\d=<<2\+\d=\d>>\d\n#### \d$", label.text) for label in labels if label.is_gold)
    assert all("[ 2 + " in tokenizer.decode(list(label.token_ids)) for label in labels if label.is_gold)
    drawn = list(read_jsonl(folder / "round-1" / "samples-labels" / "rationales.jsonl", Rationale))
    right = [rationale for rationale in drawn if rationale.correct and rationale.num_calculated]
    assert right
    for rationale in right:
        assert rationale.token_ids[-1] == tokenizer.eos_token_id
        assert re.search(r"<<2\+\d=\d>>\d", rationale.text)
        assert "[" not in rationale.text


def test_the_file_answers_and_is_checked(run):
    folder, printed = run.folder, run.printed
    export = read_json(folder / "export" / "done.json")["metrics"]
    assert export["proof"]["exact"]["kl"] < 1e-4
    assert len(read_json(folder / "solved" / "solved.json")) == 3
    assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 0
    solved = CliRunner().invoke(app, ["solve", str(folder), "Ann in 2 and 5?"])
    assert solved.exit_code == 0, solved.output
    assert "its model card, and where it runs" in printed
    assert "Ollama cannot run encoder–decoders" in (folder / "export" / "README.md").read_text(encoding="utf-8")


def test_a_report_and_an_evaluation_are_made(run):
    folder = run.folder
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    assert (folder / "report" / "index.html").is_file()
    out = folder.with_name("evals")
    scored = CliRunner().invoke(
        app, ["eval", str(folder), "--policy", "sft-0", "--calculator", "on", "--out", str(out)]
    )
    assert scored.exit_code == 0, scored.output


def test_the_command_again_does_nothing_twice(run):
    recorded = {path: path.stat().st_mtime_ns for path in run.folder.rglob("done.json")}
    again = CliRunner().invoke(app, run.command)
    assert again.exit_code == 0, again.output
    assert "finished in" not in again.output
    assert recorded == {path: path.stat().st_mtime_ns for path in run.folder.rglob("done.json")}
