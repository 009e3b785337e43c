"""Entry of `python -m modsquad_ds`: hands the command line to cli.py."""

from modsquad_ds.cli import main

if __name__ == "__main__":
    main()
