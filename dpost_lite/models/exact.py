"""Logits of a 16-bit model computed in float32, in little more memory than its own."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Within the context `model` computes in float32: each module's weights are widened while it runs.

    A copy in float32 would need twice the model's memory; this needs one layer's.
    """
    narrow: dict[Any, list[Any]] = {}

    def widen(module: Any, _: Any) -> None:
        narrow[module] = [weights.data for weights in module.parameters(recurse=False)]
        for weights in module.parameters(recurse=False):
            weights.data = weights.data.float()

    def restore(module: Any, *_: Any) -> None:
        for weights, data in zip(module.parameters(recurse=False), narrow.pop(module), strict=True):
            weights.data = data

    with ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                for hook in (module.register_forward_pre_hook(widen), module.register_forward_hook(restore)):
                    hooks.callback(hook.remove)
        yield


def logits(model: Any, token_ids: Sequence[int], start: int) -> Any:
    """Return the logits that predict the tokens from `start` on, computed in float32: numpy (tokens, vocab)."""
    import torch

    ids = torch.tensor([list(token_ids[:-1])], device=model.device)
    with torch.inference_mode(), in_float32(model):
        return model(ids, logits_to_keep=len(token_ids) - start, use_cache=False).logits[0].cpu().numpy()
