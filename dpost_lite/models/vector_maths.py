"""A workaround for a defect of PyTorch on Intel processors (pytorch/pytorch#188792, open; oneMKL before 2025.0).

oneMKL chooses the kernel of cos, exp and others at each function's first call. If several threads make that call at
once, one of them may compute its share with a kernel that is accurate to 11 bits only. With two threads this happened
to the rotary embedding of the first prompts in 5 to 20 % of processes, and the same command then drew other samples.
"""

FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan", "tanh",
    "trunc",
)  # fmt: skip
"""All that PyTorch's ATen/cpu/vml.h hands to oneMKL."""


def choose_kernels() -> None:
    """Call each function on one number, which takes one thread; later calls find its kernel chosen."""
    import torch

    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(number)
