"""`python -m dpost_lite`: the command line."""

from dpost_lite.cli.app import main

main()
