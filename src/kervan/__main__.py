"""`python -m kervan`."""

from kervan.cli import main

main()
