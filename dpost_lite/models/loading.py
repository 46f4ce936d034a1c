"""Load a base or merged model, in 4 bit, 16 bit or float32, and its tokenizer.

The 4-bit base runs the same code on a CPU as on a GPU: bitsandbytes supports both.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpost_lite.errors import ModelError, is_out_of_memory
from dpost_lite.models import hardware
from dpost_lite.models.family import ENCODER_DECODER, family_of
from dpost_lite.models.private_api import keep_differentiable, mark_unquantized
from dpost_lite.models.vector_maths import choose_kernels
from dpost_lite.problems.prompts import Prompter
from dpost_lite.recipe import ComputeType, ModelRecipe
from dpost_lite.system.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch

Precision = Literal["4bit", "16bit", "full"]


def load_tokenizer(model_dir: Path) -> Any:
    """Return the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)  # unset, it would ask
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.name: {model_dir} has no usable tokenizer ({_first_line(error)})") from error


def load_prompter(model_dir: Path, recipe: ModelRecipe) -> Prompter:
    """Return the prompter of a model: its tokenizer, with the prompt template that a recipe asks for if it has any."""
    return family_of(model_dir).prompter(load_tokenizer(model_dir), recipe.prompt)


def load(
    model_dir: Path, precision: Precision = "4bit", *, compute: ComputeType = "auto", on: str | None = None
) -> Any:
    """Return a model in evaluation mode, on the GPU if there is one, or on the device `on`.

    "4bit": NormalFloat with double quantisation (Dettmers et al. 2023, QLoRA); "16bit": the compute type; "full":
    float32, to train all weights. `compute` is the recipe's `model.compute_dtype`. Raises ModelError if the folder
    cannot be read as a language model.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    family = family_of(model_dir)
    auto_class = getattr(transformers, family.auto_class)
    in_use = hardware.compute_dtype(compute, on=on, float16=family.uses_float16)
    dtype = torch.float32 if precision == "full" else in_use
    choose_kernels()
    try:
        with quiet_transformers():
            loaded: Any = auto_class.from_pretrained(
                model_dir,
                dtype=dtype,
                quantization_config=nf4(dtype) if precision == "4bit" else None,
                device_map={"": on or hardware.device()},
                use_safetensors=True,  # the alternative is a pickle
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"model.name: {model_dir} cannot be loaded ({_first_line(error)})") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers would initialise them at random
        raise ModelError(
            f"model.name: {model_dir} lacks {len(missing)} weights, such as {missing[0]}; download it again"
        )
    if family is ENCODER_DECODER:  # T5's config says "tied" whatever its file says; other readers would believe it
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.config.tie_word_embeddings = is_tied
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


def dequantize(model: Any) -> None:
    """Turn a 4-bit model into a plain one in its compute type, in place, one layer at a time.

    transformers' own would hold all 4-bit layers until the last is replaced: a quarter more memory.
    """
    import torch
    from bitsandbytes.nn import Linear4bit

    for name in [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]:
        layer = model.get_submodule(name)
        with torch.device("meta"):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight, plain.bias = torch.nn.Parameter(_dequantized(layer).to(model.dtype)), layer.bias
        model.set_submodule(name, plain)
        del layer.weight  # which refers to its layer, so that both would wait for the garbage collector
    mark_unquantized(model)


def _dequantized(layer: Any) -> Any:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed blocks instead of handing them back to the system (no effect elsewhere).

    On a CPU every step of training or sampling frees and allocates large blocks; having the kernel map them again, page
    by page, costs up to half of a training step on a virtual machine.
    """
    import ctypes

    mmap_max, trim_threshold = -4, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def return_freed_memory() -> None:
    """Hand freed blocks back to the system after all, for another process (with glibc; elsewhere no effect)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
