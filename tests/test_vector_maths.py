"""PyTorch's vector functions have chosen their kernels before several threads call them.

What goes wrong otherwise cannot be provoked in a test: it needs two threads at the same instant.
"""

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from dpost_lite.models import loading, vector_maths  # noqa: E402


class Calls(TorchDispatchMode):
    """Records the functions that are called, with type and number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, torch.dtype, int]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.found.add((func.overloadpacket.__name__, args[0].dtype, args[0].numel()))
        return func(*args, **(kwargs or {}))


def test_every_function_is_called_on_one_number_of_either_type():
    with Calls() as calls:
        vector_maths.choose_kernels()
    types = (torch.float32, torch.float64)
    assert {(name, dtype, 1) for name in vector_maths.FUNCTIONS for dtype in types} <= calls.found
    assert {num for _, _, num in calls.found} == {1}


def test_before_a_model_is_loaded(base_dir, monkeypatch):
    from transformers import AutoModelForCausalLM

    order = []
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def load(*args, **kwargs):
        order.append("model")
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(loading, "choose_kernels", lambda: order.append("kernels"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    loading.load(base_dir)
    assert order == ["kernels", "model"]
