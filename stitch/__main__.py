"""`python -m stitch`: the same as the command `stitch`."""

import sys

from stitch.cli import main

if __name__ == "__main__":
    sys.exit(main())
