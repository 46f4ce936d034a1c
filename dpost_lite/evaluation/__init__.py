"""Score models, compare them, and compare methods."""
