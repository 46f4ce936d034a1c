"""`python -m dpost_lite`: the command line."""

from dpost_lite.cli import main

main()
