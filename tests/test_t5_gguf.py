"""T5 as a GGUF file: llama.cpp computes what transformers does, splits texts alike, and answers questions."""

import base64
import copy
import json
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import dpost_lite
from conftest import tiny_t5
from tiny_t5 import t5_tokenizer

from dpost_lite.errors import DataError, ExportError
from dpost_lite.local import engine, gguf, llama, proof
from dpost_lite.local.answer_text import TranslatedText
from dpost_lite.local.config import read_config
from dpost_lite.local.engine import Engine
from dpost_lite.local.proof import Row
from dpost_lite.local.request import Message, Piece, Request, Solution
from dpost_lite.local.solver import Solver
from dpost_lite.local.t5 import MAX_QUESTION, ONLY_HERE
from dpost_lite.models import exact
from dpost_lite.pipeline.evidence import built_in, of_run
from dpost_lite.pipeline.proof import Prover
from dpost_lite.pipeline.streaming import adapter_alone
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.notation import BRACKETS
from dpost_lite.problems.prompts import EncoderDecoderPrompter
from dpost_lite.problems.records import LabelledRationale, Problem, write_jsonl
from dpost_lite.problems.tools import Tools

FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FIRST = {"feed_forward_proj": "relu", "tie_word_embeddings": True}  # the T5 of 2019
PLAIN = {"feed_forward_proj": "relu", "tie_word_embeddings": False}  # no GELU, whose values llama.cpp rounds
SIZES = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "eos_token_id": 1}
QUESTIONS = [
    "Ann has 12 boxes of 24 apples. How many apples?",
    "The train </s> drives 5 <unk> km \n\n in 2 hours… {x} <extra_id_5> naïve ½!",
    "  How many \t eggs?\r\n",
]


def charsmap(replacements: dict[str, str]) -> str:
    """Return SentencePiece's map of characters, a double array and the texts it points to, in base 64."""
    units, texts, blocks = [0] * 256, b"", {b"": 0}

    def block_of(prefix: bytes) -> int:
        """Return where the units of what may follow a prefix begin; that of the end is the first."""
        if prefix in blocks and (block := blocks[prefix]):
            return block
        place = block_of(prefix[:-1]) ^ prefix[-1] if prefix else 0
        blocks[prefix] = block = len(units)
        units.extend([0] * 256)
        units[place] |= (prefix[-1] if prefix else 0) | (place ^ block) << 10
        return block

    for key, text in replacements.items():
        prefix = key.encode()
        block, parent = block_of(prefix), block_of(prefix[:-1])
        units[parent ^ prefix[-1]] |= 1 << 8
        units[block] = 1 << 31 | len(texts)
        texts += text.encode() + b"\0"
    array = struct.pack(f"<{len(units)}I", *units)
    return base64.b64encode(struct.pack("<I", len(array)) + array + texts).decode()


def tokenizer():
    """The small T5 tokenizer, with a map of characters as that of T5."""
    from tokenizers import Tokenizer

    made = copy.deepcopy(t5_tokenizer())
    spec = json.loads(made.backend_tokenizer.to_str())
    mapped = charsmap({"\n": " ", "\t": " ", "\r": " ", "…": "...", "½": "1/2"})
    spec["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": mapped}
    made._tokenizer = Tokenizer.from_str(json.dumps(spec))
    return made


def save_t5(folder: Path, *, dtype: str = "float32", **settings) -> Path:
    """Save a random T5 whose answers differ by question, but that is not too sensitive to rounding."""
    import torch

    made = tokenizer()
    model = tiny_t5(vocab_size=-(-len(made) // 32) * 32, **{**SIZES, **settings})
    if model.config.scale_decoder_outputs:
        model.lm_head.weight = model.shared.weight
    for name, weights in model.named_parameters():
        if name.endswith((".q.weight", "wi_1.weight")):  # attention is not scaled, a gated product grows
            weights.data *= 0.25
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: str = "float32"):
    import torch
    from transformers import T5ForConditionalGeneration

    return T5ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5") / "plain", **PLAIN)


@pytest.fixture(scope="module")
def file(plain) -> Path:
    return gguf.write_gguf(plain, plain.with_suffix(".gguf"), dtype="f32")


@pytest.fixture(scope="module")
def flan(tmp_path_factory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5") / "flan", dtype="bfloat16", **FLAN)


@pytest.fixture(scope="module")
def prompter(plain) -> EncoderDecoderPrompter:
    from dpost_lite.models.loading import load_tokenizer

    return EncoderDecoderPrompter(load_tokenizer(plain))


def make_engine(path: Path, *, calculator: bool = False, **options) -> Engine:
    options = {"max_new_tokens": 30, "num_threads": 1, **options}
    return Engine(path, tools=Tools(Calculator() if calculator else None), **options)


def rows(size: int) -> list[Row]:
    """A short question and a long answer, beyond the largest distance that the bias tells apart; and the reverse."""
    random_ids = np.random.default_rng(0).integers(3, size, 400).tolist()
    return [Row((*random_ids[:5], *random_ids[5:160]), 5), Row((*random_ids[100:390], *random_ids[:9]), 290)]


@pytest.mark.parametrize(
    ("settings", "largest_kl"),
    [(PLAIN, 1e-6), (FIRST, 1e-6), ({**PLAIN, "num_layers": 3, "num_decoder_layers": 1}, 1e-6), (FLAN, 1e-4)],
    ids=["plain", "first", "fewer decoder layers", "flan"],
)
def test_logits_are_those_of_transformers(tmp_path, settings, largest_kl):
    folder = save_t5(tmp_path / "model", **settings)
    model = loaded(folder)
    assert model.config.scale_decoder_outputs == settings["tie_word_embeddings"]
    asked = rows(model.config.vocab_size)
    proof.write_logprobs(tmp_path / "expected.npy", asked, lambda row: exact.logits(model, row.token_ids, row.start))
    made = gguf.write_gguf(folder, tmp_path / "model.gguf", dtype="f32")
    found = proof.measure(
        made, may_end=[0, 1, 2], rows=asked, reference=tmp_path / "expected.npy", written=tmp_path / "found.npy"
    )
    assert found.ending == [1]
    assert [one.num_tokens for one in found.differences] == [155, 9]
    assert max(one.kl for one in found.differences) < largest_kl
    assert np.std(np.load(tmp_path / "expected.npy")) > 0.5  # the model is no uniform one


def test_a_head_that_is_the_embedding_without_scaling(tmp_path):
    """What transformers 5 saves of a T5 1.1 that it has made itself."""
    folder = save_t5(tmp_path / "model", **PLAIN)
    model = loaded(folder)
    model.lm_head.weight = model.shared.weight
    model.config.tie_word_embeddings = True
    model.save_pretrained(folder)
    model = loaded(folder)
    assert model.lm_head.weight is model.shared.weight
    assert not model.config.scale_decoder_outputs
    asked = rows(model.config.vocab_size)
    proof.write_logprobs(tmp_path / "expected.npy", asked, lambda row: exact.logits(model, row.token_ids, row.start))
    made = gguf.write_gguf(folder, tmp_path / "model.gguf", dtype="f32")
    found = proof.measure(
        made, may_end=[0, 1, 2], rows=asked, reference=tmp_path / "expected.npy", written=tmp_path / "found.npy"
    )
    assert max(one.kl for one in found.differences) < 1e-6


def test_questions_that_the_encoder_cannot_read_are_no_evidence(prompter, tmp_path):
    """Else an export would fail after all training, for one long question."""
    short, long = Problem("short", "How many eggs?", "2"), Problem("long", "egg " * MAX_QUESTION, "2")
    (tmp_path / "data").mkdir()
    for part in ("dev", "test", "train"):
        write_jsonl(tmp_path / "data" / f"{part}.jsonl", [long, short])
    gold = [LabelledRationale(p.id, p.question, "#### 2", prompter.answer_ids("#### 2"), True) for p in (long, short)]
    write_jsonl(tmp_path / "data" / "labels.jsonl", gold)
    found = of_run(tmp_path, None, prompter)
    assert {problem.id for problem in (*found.problems, *found.dev)} == {"short"}
    assert [rationale.problem_id for rationale in found.rationales] == ["short"]


def test_16_bit_weights_are_widened_one_part_at_a_time(flan):
    import torch

    model, wide = loaded(flan, "bfloat16"), loaded(flan)
    ids = tuple(range(3, 40))
    expected = wide(torch.tensor([ids[:20]]), decoder_input_ids=torch.tensor([[0, *ids[20:-1]]])).logits[0]
    found = exact.logits(model, ids, 20)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)
    assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}


def test_texts_have_the_tokenizer_s_ids(file, prompter):
    answerer = make_engine(file)
    texts = [
        *QUESTIONS,
        llama.PROBE,
        "[ 48 / 2 = 24] 24",
        "\n",
        "",
        "日本 10 円 🙂",
        "</s></s>",
        "<unk >",
        "[PAD537]",
        "a\x1c\x0b\u2003b",
    ]
    for text in texts:
        assert answerer.model.encode(text) == prompter.encode_text(text), text
        assert tuple(answerer.model.prompt_ids(Request.of(text))) == prompter.prompt_ids(text), text
    assert prompter.encode_text("…") == prompter.encode_text("...")  # the map of characters is there
    ids = prompter.answer_ids("She has 12*36=<<12*36=432>>432 apples")
    assert answerer.model.text(list(ids)).removeprefix(" ") == "She has 12*36=[ 12 * 36 = 432] 432 apples"
    answerer.close()


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_k_m"])
def test_every_type_is_written_and_near(flan, tmp_path, quant):
    from gguf import GGUFReader

    model, near = loaded(flan, "bfloat16"), {}
    asked = rows(model.config.vocab_size)
    proof.write_logprobs(tmp_path / "expected.npy", asked, lambda row: exact.logits(model, row.token_ids, row.start))

    def check(source: Path, made: Path) -> None:
        for file in (source, made):
            near[file] = proof.measure(
                file, rows=asked, reference=tmp_path / "expected.npy", written=tmp_path / "found.npy"
            ).differences
        assert llama.file_type(source) == "f16"  # in bfloat16 llama.cpp would round the activations too
        assert max(one.kl for one in near[source]) < 1e-4
        assert max(one.kl for one in near[made]) < 0.1

    out = gguf.export(flan, tmp_path / "model.gguf", quant=quant, check=check)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out).tensors}
    assert types["enc.blk.0.attn_rel_b.weight"] == "F32"
    assert (
        types["dec.blk.1.ffn_down.weight"] == "F32" if quant == "f16" else types["dec.blk.1.ffn_down.weight"] != "F32"
    )
    assert types["output.weight"] != "F32"


def test_one_tensor_at_a_time_it_is_the_same_q8_0_file(flan, tmp_path):
    from gguf import GGUFReader

    theirs = GGUFReader(gguf.export(flan, tmp_path / "theirs.gguf", quant="q8_0")).tensors
    ours = {
        tensor.name: tensor for tensor in GGUFReader(gguf.write_gguf(flan, tmp_path / "o.gguf", dtype="q8_0")).tensors
    }
    assert ours.keys() == {tensor.name for tensor in theirs}
    for tensor in theirs:
        assert tensor.tensor_type == ours[tensor.name].tensor_type
        assert np.array_equal(tensor.data, ours[tensor.name].data), tensor.name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, "llama.cpp's t5 has no feed_forward_proj gated-silu"),
        ({"relative_attention_max_distance": 64}, r"has no relative_attention_max_distance 64 \(it has 128\)"),
        ({"num_decoder_layers": 3}, "has no num_decoder_layers above num_layers, 3"),
        ({"d_model": None}, "config.json lacks hidden_size"),
        ({"model_type": "mt5"}, "models of type 'mt5' cannot be exported"),
    ],
)
def test_what_llama_cpp_has_not_is_refused(plain, tmp_path, changed, message):
    config = {**json.loads((plain / "config.json").read_text()), **changed}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=message) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_other_tokenizers_are_refused(plain, tmp_path):
    spec = json.loads((plain / "tokenizer.json").read_text())
    for changed, message in (
        ({"pre_tokenizer": spec["pre_tokenizer"]["pretokenizers"][1]}, "no equivalent of this normaliser"),
        ({"normalizer": {"type": "NFKC"}}, "no equivalent of this normaliser"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "only Unigram tokenizers"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **changed}))
        with pytest.raises(ExportError, match=message):
            gguf.write_gguf(plain, tmp_path / "model.gguf", tokenizer_dir=tmp_path)
    assert not (tmp_path / "model.gguf").exists()


@pytest.fixture
def prover(flan, tmp_path) -> Prover:
    from dpost_lite.models.loading import load_tokenizer

    prompter = EncoderDecoderPrompter(load_tokenizer(flan))
    too_long = LabelledRationale("long", "eggs " * MAX_QUESTION, "#### 1", prompter.answer_ids("#### 1"), True)
    evidence = built_in(prompter)
    (tmp_path / "scratch").mkdir()
    evidence = replace(evidence, problems=evidence.problems[:20], rationales=(too_long, *evidence.rationales[:4]))
    made = Prover(prompter, evidence, tmp_path / "scratch", flan)
    assert [len(row.token_ids) for row in made._rows] == [
        len(prompter.prompt_ids(one.question)) + len(one.token_ids) for one in evidence.rationales[1:]
    ]
    made.evaluate(loaded(flan, "bfloat16"))
    return made


def test_the_proof_passes_and_names_a_wrong_tensor(prover, flan, tmp_path):
    from safetensors.torch import load_file, save_file

    assert 0 < prover.check_16_bit(gguf.write_gguf(flan, tmp_path / "16.gguf")).kl < 1e-5
    wrong, name = shutil.copytree(flan, tmp_path / "wrong"), "decoder.block.1.layer.1.EncDecAttention.v.weight"
    weights = load_file(wrong / "model.safetensors")
    save_file({**weights, name: weights[name] * 0.5}, wrong / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"tensor {name} is farthest from the trained one"):
        prover.check_16_bit(gguf.write_gguf(wrong, tmp_path / "wrong.gguf"))
    spec = json.loads((wrong / "tokenizer.json").read_text())
    spec["model"]["vocab"] = [[piece, -99.0 if piece == "▁many" else score] for piece, score in spec["model"]["vocab"]]
    (wrong / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(
        ExportError, match=r"llama.cpp tokenises problem \S+ differently .*: \['▁'\] instead of \['▁many'\]"
    ):
        prover.check_16_bit(gguf.write_gguf(flan, tmp_path / "wrong.gguf", tokenizer_dir=wrong))


def generated(folder: Path, prompter: EncoderDecoderPrompter, question: str, num_tokens: int) -> str:
    import torch

    prompt = torch.tensor([prompter.prompt_ids(question)])
    return prompter.text(loaded(folder).generate(prompt, max_new_tokens=num_tokens, do_sample=False)[0, 1:].tolist())


@pytest.mark.parametrize("num_parallel", [1, 3])
def test_greedy_answers_are_those_of_transformers(plain, file, prompter, num_parallel):
    answerer = make_engine(file, num_parallel=num_parallel)
    asked = [QUESTIONS[i] for i in (0, 1, 1, 0, 2)]
    for question, solved in zip(asked, answerer.run([Request.of(q) for q in asked]), strict=True):
        assert solved.text == generated(plain, prompter, question, 30)
        assert solved.num_prompt_tokens == len(prompter.prompt_ids(question))
    answerer.close()


def test_samples_of_one_question_share_its_encoding(file, monkeypatch):
    read = []

    def encode(llm, ids, num_sequences):
        read.append(ids)
        llama.encode(llm, ids, num_sequences)

    monkeypatch.setattr(engine, "encode", encode)
    requests = [Request.of(q, temperature=1.0, seed=s) for q in QUESTIONS[:2] for s in range(4)]
    together, alone = make_engine(file, num_parallel=4), make_engine(file)
    texts = [solved.text for solved in together.run(requests)]
    assert len(set(texts)) == 8
    assert len(read) == 2
    assert texts == [solved.text for request in requests for solved in alone.run([request])]
    together.close()
    alone.close()


class Script:
    """Chooses the tokens of a text one after the other, then the stop token."""

    def __init__(self, answerer: Engine, text: str) -> None:
        self.ids = [*answerer.model.encode(text), answerer.model.llm.token_eos()]

    def __call__(self, logits) -> int:
        return self.ids.pop(0)


def test_the_calculator_completes_brackets(file, prompter, monkeypatch):
    answerer = make_engine(file, calculator=True)
    monkeypatch.setattr(engine, "chooser", lambda *_: Script(answerer, "So 48 / 2 = [ 48 / 2 ="))
    number, events = answerer.add_request(Request.of("How many?")), []
    while answerer.has_unfinished():
        events += [event for told, event in answerer.step() if told == number]
    *pieces, solved = events
    assert isinstance(solved, Solution)
    assert solved.text == "So 48 / 2 = <<48/2=24>>24"
    assert (solved.num_calculated, solved.end) == (1, "stop")
    assert "".join(piece.text for piece in pieces) == solved.text
    assert "".join(piece.text for piece in pieces if piece.is_inserted) == "24>>24"
    monkeypatch.setattr(engine, "chooser", lambda *_: Script(answerer, "2 + 2 = [ 2 + 2 = 5] 5 eggs #### 5"))
    (solved,) = answerer.run([replace(Request.of("How many?"), uses_tools=False)])
    assert (solved.text, solved.strict) == ("2 + 2 = <<2+2=5>>5 eggs\n#### 5", "5")
    answerer.close()


def test_a_text_is_translated_as_it_is_written():
    written = " So [ 12 * 4 = 48] 48 > 5 [5] #1 ## then [ 48 / 2 = 24] 24 ### [ 1 = #### 24"
    expected, rng = BRACKETS.from_model(written[1:]), random.Random(0)
    assert "<<48/2=24>>24" in expected
    assert "\n#### 24" in expected
    for _ in range(300):
        cuts = sorted(rng.sample(range(1, len(written)), rng.randrange(1, 20)))
        parts = [written[a:b] for a, b in zip([0, *cuts], [*cuts, len(written)], strict=True)]
        text = TranslatedText(BRACKETS)
        pieces = [piece for part in parts for piece in text.add(part.encode(), is_inserted=False)]
        assert expected.startswith("".join(piece.text for piece in pieces))
        pieces += text.finish()
        assert "".join(piece.text for piece in pieces) == text.text == expected
    stopped = TranslatedText(BRACKETS, [">>4"])
    assert stopped.add(b" a [ 2 + 2 = 4] 4", is_inserted=True) + stopped.finish() == [Piece("a <<2+2=4", True)]
    assert stopped.is_stopped


def test_questions_that_cannot_be_read(file):
    answerer = make_engine(file)
    with pytest.raises(DataError, match=f"the model reads {MAX_QUESTION}"):
        answerer.add_request(Request.of("eggs " * MAX_QUESTION))
    longest = replace(Request.of("eggs " * (MAX_QUESTION - 1)), max_new_tokens=1)
    assert answerer.run([longest])[0].num_prompt_tokens == MAX_QUESTION
    history = (Message("user", "2+2?"), Message("assistant", "4"), Message("user", "And 3+3?"))
    with pytest.raises(ExportError, match="reads one question"):
        answerer.add_request(Request(history))
    answerer.close()


@pytest.fixture(scope="module")
def exported(flan, tmp_path_factory) -> Path:
    """The folder in which the command exported a model."""
    folder = tmp_path_factory.mktemp("exported")
    result = dpost_lite("export", flan, "--quant", "f16", "--out", folder / "flan.gguf")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"beside it: README.md\n{ONLY_HERE}\n")
    return folder


def test_the_command_exports_and_proves_and_promises_no_more(exported):
    assert {path.name for path in exported.iterdir()} == {"flan.gguf", "README.md"}
    card = (exported / "README.md").read_text()
    assert ONLY_HERE in card
    assert "ollama create" not in card


def test_no_adapter_is_written_alone(flan):
    with pytest.raises(ExportError, match=r"cannot run encoder–decoders.*leave out --lora"):
        adapter_alone(flan, None)


def test_the_solver_answers_with_the_file(exported):
    with Solver(exported / "flan.gguf", max_new_tokens=20, num_parallel=2) as solver:
        first, second = solver.solve(QUESTIONS[:2])
        assert solver.solve(QUESTIONS[0]).text == first.text != second.text
        assert sum((solver.solve(QUESTIONS[0], samples=3, seed=1).votes or {}).values()) <= 3
