"""The command line: a module per command, named after it, and what they share (options, resolve)."""
