"""The engine: many rationales at once, with the calculator in the loop. `sampler.py` is its public face."""
