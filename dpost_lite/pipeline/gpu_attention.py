"""The check of a GPU's fused attention: a decode step's kernel against matrix products, on random numbers.

Checks are as in gpu_checks.py.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from dpost_lite.models import hardware
from dpost_lite.pipeline.gpu_checks import Outcome, relative

if TYPE_CHECKING:
    import torch

    from dpost_lite.sampling.attention import Kernel
    from dpost_lite.sampling.request import CacheSize
    from dpost_lite.sampling.step_inputs import StepInputs, StepShape

HEAD_DIMS = 64, 128, 256  # the GPU kernel is another one for each; it takes 64 or 128 keys and 32 or 64 queries at once
WINDOWS = None, 40  # this one hides the prompt from most rows, and from long ones the first keys of their own
NUM_KV_HEADS, GROUP = 2, 7
PROMPT_LENGTHS, PROMPT_LENGTH = (328, 130, 5), 328
ROW_LENGTH = 200
ROWS_OF_PROMPT = 16, 5, 3
TOLERANCE = {4: 1e-4, 2: 1e-2}  # by bytes of the type; 3e-7, 0.0005 (float16) and 0.005 (bfloat16) on a CPU


def fused_attention(device: str, folder: Path) -> Outcome:
    """Compare the fused kernel of decode steps with matrix products in float32."""
    import torch

    from dpost_lite.sampling.attention import kernel_for

    dtype = hardware.compute_dtype(on=device)
    kernel = kernel_for(torch.device(device), dtype, HEAD_DIMS[0], is_checked=False)
    if kernel is None:
        return Outcome("not applicable", f"there is no fused kernel for {str(dtype).removeprefix('torch.')} here")
    off = [attention_difference(kernel, dtype, device, dim, window) for dim in HEAD_DIMS for window in WINDOWS]
    off.append(attention_difference(kernel, dtype, device, HEAD_DIMS[0], None, has_bias=True))
    worst = math.nan if any(map(math.isnan, off)) else max(off)
    if not worst <= TOLERANCE[dtype.itemsize]:
        return Outcome("failed", f"the fused kernel is {worst:.2%} off matrix products here")
    return Outcome("ok", f"the fused kernel is within {worst:.2%} of matrix products")


def attention_difference(
    kernel: "Kernel | None", dtype: "torch.dtype", device: str, head_dim: int, window: int | None, *,
    has_bias: bool = False,
) -> float:  # fmt: skip
    """Return how far a step's attention is from that of products in float32, relative to its size (Frobenius).

    With `has_bias` it is T5's, where each head has its own keys and a bias on its scores.
    """
    import torch

    shape, inputs = _step()
    num_tokens, num_rows = shape.num_extra + shape.num_rows, sum(ROWS_OF_PROMPT)
    group = 1 if has_bias else GROUP
    random = torch.Generator().manual_seed(0)

    def rounded(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random).to(dtype)

    numbers = {
        "query": rounded(num_tokens, NUM_KV_HEADS * group, head_dim),
        "key": rounded(num_tokens, NUM_KV_HEADS, head_dim),
        "value": rounded(num_tokens, NUM_KV_HEADS, head_dim),
        "prompt_keys": rounded(len(PROMPT_LENGTHS), NUM_KV_HEADS, PROMPT_LENGTH, head_dim),
        "prompt_values": rounded(len(PROMPT_LENGTHS), NUM_KV_HEADS, PROMPT_LENGTH, head_dim),
        "row_keys": rounded(num_rows + 1, NUM_KV_HEADS, ROW_LENGTH, head_dim),
        "row_values": rounded(num_rows + 1, NUM_KV_HEADS, ROW_LENGTH, head_dim),
    }
    if has_bias:
        numbers["bias"] = rounded(NUM_KV_HEADS, ROW_LENGTH)
    on_device = {name: tensor.to(device) for name, tensor in numbers.items()}
    in_float32 = {name: tensor.float() for name, tensor in numbers.items()}
    found = _output(shape, inputs, on_device, window, kernel).cpu()
    return relative(found, _output(shape, inputs, in_float32, window, None))


def _size() -> "CacheSize":
    from dpost_lite.sampling.request import CacheSize

    return CacheSize(len(PROMPT_LENGTHS), PROMPT_LENGTH, sum(ROWS_OF_PROMPT), ROW_LENGTH, num_logit_copies=1)


def _step() -> tuple["StepShape", "StepInputs[list[int]]"]:
    """Return a padded step of rows of all lengths, some with several tokens."""
    from dpost_lite.problems.answer_tokens import AnswerTokens
    from dpost_lite.sampling.request import Request
    from dpost_lite.sampling.scheduler import Prompt, Row
    from dpost_lite.sampling.step_inputs import StepInputs, StepShape

    nothing = frozenset[int]()
    prompts = [
        Prompt(
            Request(key=slot, prompt_ids=(0,) * length, stop_ids=nothing), [], set(), slot, logits=None,
            num_running=num_rows,
        )
        for slot, (length, num_rows) in enumerate(zip(PROMPT_LENGTHS, ROWS_OF_PROMPT, strict=True))
    ]  # fmt: skip
    of_rows = [prompt for prompt in prompts for _ in range(prompt.num_running)]
    rows = [
        Row(
            prompt, slot, AnswerTokens(None, nothing.__contains__, ROW_LENGTH), nothing, slot,
            length=8 * slot, unread=[0] * (1 + slot % 5),
        )
        for slot, prompt in enumerate(of_rows)
    ]  # fmt: skip
    shape = StepShape.of(rows, prompts, len(rows)).padded(_size())
    return shape, StepInputs.of(rows, prompts, shape, scratch_row=len(rows))


def _output(
    shape: "StepShape", inputs: "StepInputs[list[int]]", numbers: dict[str, "torch.Tensor"], window: int | None,
    kernel: "Kernel | None",
) -> "torch.Tensor":  # fmt: skip
    """Return the attention of all tokens, `(tokens, heads, head_dim)`."""
    from dpost_lite.sampling.attention import Layer
    from dpost_lite.sampling.cache import KVCache
    from dpost_lite.sampling.step_inputs import StepInputs

    query, key, value = (numbers[name] for name in ("query", "key", "value"))
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=key.shape[1], head_dim=key.shape[2])
    cache = KVCache(config, _size(), num_scratch=1, dtype=query.dtype, device=query.device)
    for name in ("prompt_keys", "prompt_values", "row_keys", "row_values"):
        getattr(cache, name)[0] = numbers[name]
    plan = StepInputs.unpack(inputs.pack().to(query.device), shape).plan(shape, cache, kernel)
    for part in plan.rows:
        part.bias = numbers["bias"].float() if "bias" in numbers else None
    return Layer(0, query.shape[-1] ** -0.5, window, None).decode(query, key, value, plan)
