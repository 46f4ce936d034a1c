"""dpost-lite: a small language model teaches itself maths word problems on one consumer GPU.

Start with `selftrain.py`: the paper's Algorithm 2 on one page.
"""

__version__ = "0.1.0"
