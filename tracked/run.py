"""`python -m tracked.run`: the command line."""

from tracked.cli import main

if __name__ == "__main__":
    main()
