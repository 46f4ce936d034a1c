"""What models run on here: the device, and the type they compute in."""

from typing import TYPE_CHECKING

from dpost_lite.recipe import ComputeType

if TYPE_CHECKING:
    import torch


def device() -> str:
    """Return "cuda" if a GPU can be used, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(choice: ComputeType = "auto", *, on: str | None = None, float16: bool = True) -> "torch.dtype":
    """Return the type that `model.compute_dtype` asks for.

    "auto" is bfloat16 if the hardware multiplies it (NVIDIA's does from compute capability 8.0 on), else float16 on a
    GPU and float32 on a CPU (most emulate bfloat16, three times slower).
    `on` names a device other than the default one; without `float16`, a GPU that has no bfloat16 computes in float32.
    """
    import torch

    if choice != "auto":
        return torch.bfloat16 if choice == "bfloat16" else torch.float32
    if (on or device()) != "cuda":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if float16 else torch.float32
