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

    def own(module: Any) -> Iterator[Any]:
        return module.parameters(recurse=_looks_at_a_child(module))

    def widen(module: Any, _: Any) -> None:
        narrow[module] = [weights.data for weights in own(module)]
        for weights in own(module):
            weights.data = weights.data.float()

    def restore(module: Any, *_: Any) -> None:
        for weights, data in zip(own(module), narrow.pop(module), strict=True):
            weights.data = data

    with ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None or _looks_at_a_child(module):
                for hook in (module.register_forward_pre_hook(widen), module.register_forward_hook(restore)):
                    hooks.callback(hook.remove)
        yield


def _looks_at_a_child(module: Any) -> bool:
    """Whether it is T5's feed-forward, which casts to the type of the layer `wo` before that runs."""
    return hasattr(module, "wo")


def logits(model: Any, token_ids: Sequence[int], start: int) -> Any:
    """Return the logits that predict the tokens from `start` on, computed in float32: numpy (tokens, vocab)."""
    import torch

    ids = torch.tensor([list(token_ids[:-1])], device=model.device)
    with torch.inference_mode(), in_float32(model):
        if model.config.is_encoder_decoder:
            first = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
            answer = torch.cat([first, ids[:, start:]], dim=1)
            return model(ids[:, :start], decoder_input_ids=answer, use_cache=False).logits[0].cpu().numpy()
        return model(ids, logits_to_keep=len(token_ids) - start, use_cache=False).logits[0].cpu().numpy()
