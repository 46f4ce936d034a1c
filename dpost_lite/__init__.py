"""dpost-lite: self-train a small language model on maths word problems, on one consumer GPU.

Start with `selftrain.py`: the paper's Algorithm 2 on one page. To solve problems with an exported file from Python:

    from dpost_lite import Solver

    with Solver("model.gguf") as solver:
        print(solver.solve("Ann has 3 boxes of 12 apples. How many apples does she have?").answer)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Solver", "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: `import dpost_lite` itself loads no library."""
    if name == "Solver":
        return import_module("dpost_lite.local.solver").Solver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
