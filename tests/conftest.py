"""Shared fixtures: tiny random models and tokenizers, made in the test, so that no test needs a download."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dpost_lite.problems.notation import BRACKETS
from dpost_lite.system.machine import let_threads_sleep

let_threads_sleep()  # before a test imports torch, as the command line does
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core for each of the two processes


SHARING = ("test_also.py", "test_baselines.py", "test_report.py")  # the most expensive fixture, `two_methods`


@pytest.hookimpl(optionalhook=True)  # without xdist there is none
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole files, and those that share a fixture to one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "two_methods" if file.endswith(SHARING) else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Ann buys 12 boxes of 36 apples for $4.50 each. How many apples does she have?",
    "She has 12*36=<<12*36=432>>432 apples. Then she sells 48/2=<<48/2=24>>24 of them.\n#### 408",
    "The train drives 80 km in 2 hours, so 80/2 = <<80/2=40>>40 km/h.\nIt is 3-5=<<3-5=-2>>-2 or 1/4=<<1/4=0.25>>0.25.",
    "A farmer sells 1,234 eggs a week (and eats 3): 100-20*2=<<100-20*2=60>>60 > 50 < 70!",
]
MERGED = ["=2", ">>2", "24>>", "/2=", "=2>>2", ">>24", "=-", ">><", "=<", "=<<", " <<", "<<4", "0.", "2 "]
MERGED_IN_BRACKETS = ["= 2", " = 24", "2] 2", "] 24", "24] ", "/ 2 =", "= 2] 2", "] [ ", "[ 4", " [", "= -", "0.", "2 "]
PRINTABLE = [chr(i) for i in range(32, 127)]


def trained_tokenizer(kind: str) -> Any:
    """Return a transformers tokenizer of one kind, trained here.

    - "digits": byte-level BPE, every digit by itself, GPT-2's word pattern (as SmolLM2's).
    - "merged": BPE without a pre-tokenizer, so that merges cross digits, `=` and `>>` freely.
    - "spm": SentencePiece-like (Metaspace, byte fallback), with the same merges.
    - "groups": byte-level BPE with GPT-2's word pattern and numbers of several digits.
    - "brackets": as "merged", for calculations in brackets, with merges across spaces too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts, alphabet, special = MERGED * 50 + CORPUS, [*PRINTABLE, "\n"], list(SPECIAL)
    if kind == "brackets":
        texts = MERGED_IN_BRACKETS * 50 + list(map(BRACKETS.to_model, CORPUS))
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    if kind in ("digits", "groups"):
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if kind == "digits":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind in ("merged", "brackets"):
        tokenizer.decoder = decoders.Fuse()
    elif kind == "spm":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)  # "first" once trained
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        texts = [text.replace("\n", " ") for text in texts]
        alphabet = ["▁", *PRINTABLE]
        special += [f"<0x{i:02X}>" for i in range(256)]
    else:
        raise ValueError(kind)
    size = {"digits": 340, "groups": 400, "merged": 160, "spm": 440, "brackets": 160}[kind]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False, limit_alphabet=300
    )
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "spm":
        tokenizer = with_plain_bytes(tokenizer)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
    )


def with_plain_bytes(tokenizer: Any) -> Any:
    """Return the tokenizer with its byte tokens as ordinary words: the trainer takes them as special ones only."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return type(tokenizer).from_str(json.dumps(state))


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], Any]:
    """A function: kind -> its tokenizer, trained once. Tests must not change it; `copy.deepcopy` it first."""
    return cache(trained_tokenizer)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # far from uniform, so that greedy answers vary and attention matters
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 4}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 7, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {"sliding_window": 7, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2}),
}

ALL_FAMILIES = [*FAMILIES, "t5"]
"""With an encoder–decoder."""

T5 = {
    "vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,  # as Flan-T5
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def tiny_t5(**overrides: Any) -> Any:
    """Return a random float32 T5 with a head of its own, the same at every call; `overrides` go to its config."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**T5, **overrides})).float().eval()
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    for name, weights in model.named_parameters():
        if weights.dim() == 2:  # far from uniform, so that greedy answers vary and attention matters
            std = 2.0 if "relative" in name else 1.0 if "shared" in name else 0.2
            torch.nn.init.normal_(weights, std=std)
    return model


def tiny_model(family: str, **overrides: Any) -> Any:
    """Return a random float32 model of one family, the same at every call; `overrides` go to its config."""
    from dpost_lite.models.vector_maths import choose_kernels

    choose_kernels()
    import torch
    import transformers

    if family == "t5":
        return tiny_t5(**overrides)
    name, settings = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    return model_class(config_class(**{**SIZES, **settings, **overrides})).float().eval()


@pytest.fixture(scope="session")
def model_of() -> Callable[..., Any]:
    """A function: (family, **config overrides) -> a tiny random model in float32, made once; not to be changed."""
    return cache(tiny_model)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, tokenizer_of, model_of) -> Path:
    """A random Llama and its tokenizer as a folder; sizes are those that bitsandbytes' packed CPU kernel can take."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = tokenizer_of("digits")
    size = -(-len(tokenizer) // 32) * 32
    model_of("llama", vocab_size=size, intermediate_size=128, initializer_range=0.1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def prompter(base_dir) -> Any:
    from dpost_lite.models import loading
    from dpost_lite.problems.prompts import Prompter

    return Prompter(loading.load_tokenizer(base_dir))


@pytest.fixture(scope="session")
def policy_dir(base_dir, tmp_path_factory) -> Path:
    """A saved adapter that does something: B is not zero, and its values are no bfloat16 numbers."""
    import torch
    from tiny_training import LORA, load

    from dpost_lite.models import adapters

    path = tmp_path_factory.mktemp("policy")
    model = adapters.create(load(base_dir), LORA, seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.02)
    adapters.save(model, None, path)
    return path


@pytest.fixture(scope="session")
def full_dir(base_dir, tmp_path_factory, prompter) -> Path:
    """A policy of which all weights were trained, saved."""
    from tiny_training import run_sft

    path = tmp_path_factory.mktemp("full")
    run_sft(base_dir, prompter, path, precision="full", learning_rate=1e-3)
    return path


BARE_CONFIG = {  # all of a model that the command line reads before it loads one
    "model_type": "llama",
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"), 8),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "num_key_value_heads"), 8),
}


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bare_model(cwd: Path) -> Path:
    """The folder `model` in the current one: a tokenizer and a config, no weights."""
    from dpost_lite.runs.folder import write_json

    trained_tokenizer("digits").save_pretrained(cwd / "model")
    write_json(cwd / "model" / "config.json", BARE_CONFIG)
    return cwd / "model"


@pytest.fixture
def data_dir() -> Path:
    """The folder with the published sets; skips where $DPOST_DATA_DIR does not name one."""
    folder = os.environ.get("DPOST_DATA_DIR")
    if not folder:
        pytest.skip("DPOST_DATA_DIR is not set")
    return Path(folder)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A function: a size in bytes -> a folder on a file system of that size (tmpfs; skips who may not mount one)."""
    mounted = []

    def mount(num_bytes: int) -> Path:
        folder = tmp_path / f"disk-{num_bytes}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a small file system can be mounted by root on Linux alone")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


CRASH = """
import os, signal, sys
import llama_cpp.llama_cpp as bindings
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs inherit this
    signal.signal(signal.SIGINT, signal.default_int_handler)
real = bindings.llama_decode
def llama_decode(context, batch):
    if {condition}:
        os.kill(os.getpid(), signal.{name})
    return real(context, batch)
bindings.llama_decode = llama_decode
"""


@pytest.fixture
def dies(tmp_path, monkeypatch) -> Callable[..., None]:
    """A function: (condition, signal) -> from now on new processes die of the signal where llama.cpp is to decode a
    `batch` and the condition holds: a `sitecustomize` that only they import sees to it.
    """

    def die(condition: str = "True", name: str = "SIGSEGV") -> None:
        folder = tmp_path / "site"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(CRASH.format(condition=condition, name=name))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path(__file__).parents[1])]))

    return die


@dataclass(frozen=True)
class TwoMethods:
    """DPO-ST and plain self-training from one warm-up, by the command line; `output` is what it printed."""

    command: list[str]
    output: str
    folders: dict[str, Path]


@pytest.fixture(scope="session")
def two_methods(base_dir, tmp_path_factory) -> TwoMethods:
    from easy import SETTINGS, write_problems  # beside the tests that ask for it
    from typer.testing import CliRunner

    from dpost_lite.cli.app import app

    folder = tmp_path_factory.mktemp("methods")
    data = write_problems(folder / "mine.jsonl")
    command = [
        "run", "--method", "dpo-st,st", "--out", str(folder / "run"), "--data", str(data), "--model", str(base_dir),
        *SETTINGS, "rounds=1", "seed=1", "sft.epochs=5", "report_to=tensorboard",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    folders = {method: folder / "run" / "seed-1" / method for method in ("dpo-st", "st")}
    return TwoMethods(command, result.stdout, folders)
