"""`python -m seesaw`: the same as the `seesaw` command."""

from seesaw.cli.main import main

if __name__ == "__main__":
    main()
