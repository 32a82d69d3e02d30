"""`python -m moyu_ext` is the command line, the same as `moyu`."""

from .cli import main

if __name__ == "__main__":
    main()
