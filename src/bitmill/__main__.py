"""``python -m bitmill``: the command line where the ``bitmill`` command is not on the path."""

from bitmill.cli.main import main

if __name__ == "__main__":
    main()
