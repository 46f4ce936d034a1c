"""Score, compare, and set methods beside each other."""
