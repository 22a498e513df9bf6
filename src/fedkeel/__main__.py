"""`python -m fedkeel` is `fedkeel`."""

from fedkeel.cli import main

main()
