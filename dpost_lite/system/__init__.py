"""This computer: hardware, threads, signals, and what libraries print."""
