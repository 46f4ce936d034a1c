"""Linear layers with weights in oneDNN's blocked layout, for sampling on a CPU.

A decode step multiplies a few rows by every weight matrix. oneDNN does that up to twice as fast if the weights were
reordered into its blocks beforehand. PyTorch's own linear layers reorder them in every call, or use a slower kernel.
"""

from typing import Any

import torch


class OneDnnLinear(torch.nn.Module):
    """A frozen linear layer in oneDNN's layout. It has no gradient and cannot be saved.

    `num_tokens` is the number of input rows that the layout is chosen for.
    """

    def __init__(self, linear: torch.nn.Linear, num_tokens: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), num_tokens)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + b: `(..., in_features)` -> `(..., out_features)`."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


def to_onednn_layout(model: Any, num_tokens: int) -> Any:
    """Replace the linear layers of `model` in place, for steps of about `num_tokens` tokens; return the model.

    On a GPU, or if this PyTorch was built without oneDNN, the model is returned unchanged.
    """
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, OneDnnLinear(child, num_tokens))
    return model
