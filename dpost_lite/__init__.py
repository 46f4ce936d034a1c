"""dpost-lite: self-train a small language model on maths word problems, on one consumer GPU.

Start with `selftrain.py`: the paper's Algorithm 2 on one page.
"""

__version__ = "0.1.0"
