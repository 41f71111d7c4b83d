"""`python -m nyscaled.cli` is the command `nyscaled`."""

import sys

from nyscaled.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
