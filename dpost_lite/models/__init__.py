"""Models: find and load a base, train it with SFT and DPO, merge adapters into 16-bit weights."""
