"""`python -m flyball` is the same as `flyball`."""

from flyball.cli import main

main()
