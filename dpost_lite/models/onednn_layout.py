"""Linear layers with weights in oneDNN's blocked layout, for sampling on a CPU.

A decode step multiplies few rows by every weight. oneDNN does that up to twice as fast if the weights have its
blocked layout; PyTorch's own linear layers reorder them at every call, or fall back to a slower product.
"""

from typing import Any

import torch

NUM_TOKENS = 64
"""Tokens of a step for which oneDNN chooses the layout. That for 1 was slower in steps of 1 to 128 tokens, in bfloat16
and float32; those for 16 and 256 were as fast (Xeon with AMX)."""


class BlockedLinear(torch.nn.Module):
    """A frozen linear layer with weights in oneDNN's blocked layout; it has no gradient and cannot be saved."""

    weight = None  # T5 asks its layers for it

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), NUM_TOKENS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + b; `x` is `(…, in_features)`."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


def use_blocked_layout(model: Any) -> Any:
    """Replace the plain linear layers of `model` by blocked ones.

    Only on CPUs and if this PyTorch was built with oneDNN; otherwise the model is returned unchanged.
    """
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return model
    parents = [module for module in model.modules() if type(module) is not torch.nn.Linear]  # whose weights are freed
    for parent in parents:
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, BlockedLinear(child))
    return model
