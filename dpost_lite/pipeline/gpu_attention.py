"""The check of a GPU's fused attention: a decode step's kernel against matrix products, on random numbers.

Checks are as in gpu_checks.py.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dpost_lite.models import hardware
from dpost_lite.pipeline.gpu_checks import PRODUCT_TOLERANCE, Outcome, relative

if TYPE_CHECKING:
    import torch

    from dpost_lite.sampling.attention import Kernel

HEAD_DIMS = 64, 128, 256  # PyTorch's memory-efficient attention has a kernel for each
WINDOWS = None, 8  # this one hides the whole prompt from some rows
NUM_HEADS, NUM_KV_HEADS = 4, 2
PROMPT_LENGTHS, PROMPT_LENGTH = [48, 17, 5], 48
ROW_POSITIONS, ROW_LENGTH = [0, 3, 7, 12, 20, 31], 32  # of two rows for each prompt


def fused_attention(device: str, folder: Path) -> Outcome:
    """Compare the fused kernel of decode steps with matrix products in float32."""
    import torch

    from dpost_lite.sampling.attention import flash_for_cpu, memory_efficient

    dtype = hardware.compute_dtype(on=device)
    if device != "cpu" and dtype == torch.float32:
        return Outcome("not applicable", "float32 does without it")
    kernel = flash_for_cpu if device == "cpu" else memory_efficient
    off = [attention_difference(kernel, dtype, device, dim, window) for dim in HEAD_DIMS for window in WINDOWS]
    worst = math.nan if any(map(math.isnan, off)) else max(off)
    if not worst <= PRODUCT_TOLERANCE[dtype.itemsize]:
        return Outcome("failed", f"the fused kernel is {worst:.2%} off matrix products here")
    return Outcome("ok", f"the fused kernel is within {worst:.2%} of matrix products")


def attention_difference(
    kernel: "Kernel | None", dtype: "torch.dtype", device: str, head_dim: int, window: int | None
) -> float:
    """Return how far a step's attention is from that of products in float32, relative to its size (Frobenius)."""
    import torch

    num_prompts, num_rows = len(PROMPT_LENGTHS), len(ROW_POSITIONS)
    random = torch.Generator().manual_seed(0)

    def rounded(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random).to(dtype)

    numbers = {
        "query": rounded(num_rows, NUM_HEADS, head_dim),
        "key": rounded(num_rows, NUM_KV_HEADS, head_dim),
        "value": rounded(num_rows, NUM_KV_HEADS, head_dim),
        "prompt_keys": rounded(1, num_prompts, NUM_KV_HEADS, PROMPT_LENGTH, head_dim),
        "prompt_values": rounded(1, num_prompts, NUM_KV_HEADS, PROMPT_LENGTH, head_dim),
        "row_keys": rounded(1, num_rows, NUM_KV_HEADS, ROW_LENGTH, head_dim),
        "row_values": rounded(1, num_rows, NUM_KV_HEADS, ROW_LENGTH, head_dim),
    }
    on_device = {name: tensor.to(device) for name, tensor in numbers.items()}
    in_float32 = {name: tensor.float() for name, tensor in numbers.items()}
    return relative(_output(on_device, window, kernel).cpu(), _output(in_float32, window, None))


def _output(numbers: dict[str, "torch.Tensor"], window: int | None, kernel: "Kernel | None") -> "torch.Tensor":
    """Return the attention of all rows to themselves and their prompts, `(rows, heads, head_dim)`."""
    import torch

    from dpost_lite.sampling.attention import Decode, Layer, Part

    query, device = numbers["query"], numbers["query"].device
    num_prompts, num_rows = len(PROMPT_LENGTHS), len(ROW_POSITIONS)
    row, position = torch.arange(num_rows, device=device), torch.tensor(ROW_POSITIONS, device=device)
    by_prompt, lengths = row.view(num_prompts, -1), torch.tensor(PROMPT_LENGTHS, device=device)[:, None]
    last = position[:, None]
    rows = Part(slice(0, num_rows), slice(0, num_rows), ROW_LENGTH, last, last)
    prompts = Part(by_prompt, slice(0, num_prompts), PROMPT_LENGTH, lengths - 1, lengths + position[by_prompt], row)
    cache: Any = SimpleNamespace(**numbers)
    layer = Layer(0, query.shape[-1] ** -0.5, window, None)
    return layer.decode(
        query, numbers["key"], numbers["value"], Decode(cache, row, position, [rows], [prompts], kernel)
    )
