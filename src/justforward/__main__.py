"""`python -m justforward` is the command."""

from justforward.cli import entry

if __name__ == "__main__":
    entry()
