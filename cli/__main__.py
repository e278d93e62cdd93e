"""`python -m latentrt.cli`."""

from . import main

main()
