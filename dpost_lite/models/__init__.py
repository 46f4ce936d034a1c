"""Weights: find them, load them in 4 bit, train adapters on them, merge them again in 16 bit."""
