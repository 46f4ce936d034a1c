"""What a line of Algorithm 2 asks for: stages, the tasks behind them, and the process that does a task."""
