"""`python -m rankgrpo` is the command line, as torchrun needs it."""

from rankgrpo.cli import main

main()
