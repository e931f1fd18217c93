"""`python -m cluster.cli`: the command line."""

from cluster.cli.main import main

if __name__ == "__main__":
    main(prog_name="longreach")
