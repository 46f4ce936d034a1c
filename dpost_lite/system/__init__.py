"""The machine: hardware, threads, signals, and redirecting library output."""
